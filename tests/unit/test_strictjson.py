"""JSON from others: nothing repeated, unknown, inexact or unbounded gets through."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.strictjson import Fields, loads

INTEGERS = st.integers(-(2**53) + 1, 2**53 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | INTEGERS | TEXT,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(TEXT, x, max_size=4),
    max_leaves=12,
)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_canonical_json_comes_back_as_it_was(value: object) -> None:
    assert loads(rfc8785.dumps(value), "value") == value  # type: ignore[arg-type]  # JSON values by construction


@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda t: t.encode("utf-8", "surrogatepass")))
@settings(max_examples=300, deadline=None)
def test_any_bytes_parse_or_are_malformed(data: bytes) -> None:
    try:
        value = loads(data, "bytes")
    except MalformedError:
        return
    assert json.loads(data) == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"{}x",
        b"{} {}",
        b"nul",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1.0",
        b"1e3",
        b"1E400",
        b"01",
        b"+1",
        b"9007199254740992",
        b"-9007199254740992",
        b"1" * 5000,
        b"'a'",
        b'"\x00"',
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b"\xef\xbb\xbf{}",
        b'{"a":1,"a":1}',
        b'{"a":1,"\\u0061":2}',
        b'[{"b":{"a":1,"a":2}}]',
        b'{"a":1,}',
        b"[1,]",
        b'{a:1}',
        b"// x\n1",
    ],
    ids=lambda d: ascii(d)[:24],
)  # fmt: skip
def test_what_is_not_strict_json_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError) as caught:
        loads(data, "thing")
    assert "thing" in caught.value.message


def test_integers_are_exact_up_to_two_to_the_53() -> None:
    assert loads(b"9007199254740991", "n") == 2**53 - 1
    assert loads(b"-9007199254740991", "n") == -(2**53) + 1


def test_size_has_a_bound() -> None:
    assert loads(b"[1]", "list", max_bytes=3) == [1]
    with pytest.raises(MalformedError) as caught:
        loads(b"[11]", "list", max_bytes=3)
    assert caught.value.reason is Reason.TOO_LARGE


def test_depth_has_a_bound_and_brackets_in_strings_do_not_count() -> None:
    assert loads(b"[" * 32 + b"]" * 32, "list") != []
    with pytest.raises(MalformedError):
        loads(b"[" * 33 + b"]" * 33, "list")
    with pytest.raises(MalformedError):
        loads(b'{"a":' * 100_000, "object")
    assert loads(b'["' + b"[" * 100 + b'\\"[{"]', "list") == ["[" * 100 + '"[{']
    assert loads(b"[[],[],[]]", "list", max_depth=2) == [[], [], []]


def fields(**members: object) -> Fields:
    return Fields(members, "thing")


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (lambda f: f.text("x", max_length=3), ["a", "abc", "a\n", "é"], ["", "abcd", "\0", "\t", 1, None, []]),
        (lambda f: f.text("x", allow_empty=True), ["", "a"], [None, 0, False]),
        (lambda f: f.literal("x", "yes"), ["yes"], ["no", "", None, 1, ["yes"]]),
        (lambda f: f.integer("x", 1, 9), [1, 9], [0, 10, -1, True, "1", None]),
        (lambda f: f.boolean("x"), [True, False], [0, 1, "true", None]),
        (lambda f: f.hex("x", 2).hex(), ["00ff"], ["00FF", "00f", "00ff00", "", "zzzz", 1, "\u0660" * 4]),
        (lambda f: f.list("x", max_items=2, min_items=1), [[1], [1, None]], [[], [1, 2, 3], "ab", {}, None]),
        (lambda f: list(f.texts("x", max_items=2, max_length=2)), [[], ["a"], ["a", "bc"]], [["abc"], [""], [1]]),
        (
            lambda f: [each.hex() for each in f.hexes("x", 2, max_items=2)],
            [[], ["00ff"], ["00ff", "1234"]],
            [["00ff", "123"], ["00ff12", "34"], ["00FF"], ["00ff", 1], [None], ["00ff"] * 3, "00ff", {}],
        ),
        (lambda f: f.object("x").names() == (), [], [[], None, "x", 1]),
    ],
    ids=["text", "empty text", "literal", "integer", "boolean", "hex", "list", "texts", "hexes", "object"],
)  # fmt: skip
def test_each_reader_takes_its_type_in_its_bounds(
    read: Callable[[Fields], object], good: list[object], bad: list[object]
) -> None:
    for value in good:
        f = fields(x=value)
        assert read(f) == value
        f.done()
    for value in bad:
        with pytest.raises(MalformedError) as caught:
            read(fields(x=value))
        assert caught.value.reason is Reason.MALFORMED
        assert "thing" in caught.value.message
    with pytest.raises(MalformedError):
        read(fields())


@given(st.binary(max_size=40))
def test_base64_round_trip(data: bytes) -> None:
    assert fields(x=base64.b64encode(data).decode()).base64("x", max_bytes=40, min_bytes=0) == data


@pytest.mark.parametrize(
    "value", ["QQ", "QQ=", "QR==", "Q Q==", "QQ==\n", "-_8=", "QQ==QQ==", "", "é", None, 1, "QUFB" * 2], ids=ascii
)
def test_base64_has_one_spelling_and_a_bound(value: object) -> None:
    with pytest.raises(MalformedError):
        fields(x=value).base64("x", max_bytes=3)


def test_unknown_members_are_refused_by_name() -> None:
    f = fields(a=1, b=2)
    assert "a" in f
    assert f.integer("a") == 1
    assert "a" not in f
    assert f.names() == ("b",)
    with pytest.raises(MalformedError) as caught:
        f.done()
    assert caught.value.actual == "b"


def test_a_member_is_read_once() -> None:
    f = fields(a=1)
    assert f.raw("a") == 1
    with pytest.raises(MalformedError):
        f.raw("a")


@pytest.mark.parametrize("value", [None, [], "text", 1, True], ids=str)
def test_only_objects_have_members(value: object) -> None:
    with pytest.raises(MalformedError):
        Fields(value, "thing")


def test_errors_name_the_nested_structure() -> None:
    with pytest.raises(MalformedError) as caught:
        fields(inner={"x": "no"}).object("inner").integer("x")
    assert "thing.inner" in caught.value.message


@pytest.mark.parametrize("text", [r'["\ud800"]', r'{"\udfff": 1}', r'["\ud800\ud800"]'])
def test_a_lone_surrogate_is_refused(text: str) -> None:
    with pytest.raises(MalformedError, match="Unicode"):
        loads(text.encode(), "thing")


def test_a_surrogate_pair_is_one_character() -> None:
    assert loads(rb'["\ud83d\ude00"]', "thing") == ["\U0001f600"]
