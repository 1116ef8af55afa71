"""CBOR: what another implementation writes is read alike, and whatever has a second encoding is refused."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.attestation.cbor import Tagged, Value, loads
from keyquorum_core.errors import KeyquorumError, MalformedError

ITEMS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=300) | st.text(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=30)
        | st.dictionaries(
            st.integers(-(2**32), 2**32) | st.text(max_size=6) | st.binary(max_size=6), inner, max_size=30
        )
    ),
    max_leaves=40,
)


def read(data: bytes, **options: Any) -> Value:
    return loads(data, "item", **{"max_bytes": 1 << 16, "max_depth": 40, **options})


@settings(max_examples=150, deadline=None)
@given(ITEMS)
def test_what_cbor2_writes_is_read_alike(value: Any) -> None:
    assert read(cbor2.dumps(value)) == value


def test_tags_are_kept() -> None:
    assert read(cbor2.dumps(cbor2.CBORTag(18, [1]))) == Tagged(18, [1])


def test_a_map_of_indefinite_length_is_read_where_allowed() -> None:
    data = b"\xbf\x01\x02\xff"
    assert read(data, indefinite_maps=True) == {1: 2}
    with pytest.raises(MalformedError):
        read(data)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("", "nothing"),
        ("0000", "bytes after the item"),
        ("1800", "0 in a byte of its own"),
        ("190017", "23 in two bytes"),
        ("1a0000ffff", "65535 in four bytes"),
        ("1b00000000ffffffff", "4294967295 in eight bytes"),
        ("580161", "a length not in its shortest form"),
        ("4261", "bytes cut"),
        ("61ff", "text that is not UTF-8"),
        ("5f4101ff", "bytes of indefinite length"),
        ("7f6161ff", "text of indefinite length"),
        ("9f01ff", "an array of indefinite length"),
        ("1c", "a reserved length"),
        ("1f", "an integer of indefinite length"),
        ("df00", "a tag of indefinite length"),
        ("ff", "a break with nothing to end"),
        ("f7", "undefined"),
        ("f814", "false in two bytes"),
        ("f93c00", "a float"),
        ("9bffffffffffffffff", "an array longer than the input"),
        ("bbffffffffffffffff", "a map longer than the input"),
        ("a201000100", "a key twice"),
        ("a1f500", "a key that is true"),
        ("a1f600", "a key that is null"),
        ("a18000", "a key that is an array"),
        ("a101", "a map cut in a pair"),
        ("bf01ff", "a break within a pair"),
        ("bf0102", "a map without its break"),
    ],
)
def test_what_is_not_one_item_in_its_one_form_is_malformed(data: str, what: str) -> None:
    for allowed in (False, True):
        with pytest.raises(MalformedError):
            read(bytes.fromhex(data), indefinite_maps=allowed)


def test_depth_size_and_count_are_bounded() -> None:
    assert read(b"\x81" * 3 + b"\x00", max_depth=3) == [[[0]]]
    for data in (b"\x81" * 4 + b"\x00", b"\xa1\x00" * 4 + b"\x00", b"\xc1" * 4 + b"\x00", b"\x81" * 60000):
        with pytest.raises(MalformedError):
            read(data, max_depth=3)
    with pytest.raises(MalformedError):
        read(b"\x43abc", max_bytes=3)
    with pytest.raises(MalformedError):
        read(cbor2.dumps([0] * 5000))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing_but_ours(data: bytes) -> None:
    try:
        read(data, indefinite_maps=True)
    except KeyquorumError:
        return
