"""Bulletins: signed by enough operators, of the asked kind and cluster, in date, and never one step back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.bulletin import (
    BULLETIN_TYPE,
    MAX_BULLETIN,
    Bulletin,
    check_successor,
    open_bulletin,
    peek_bulletin,
    sign_bulletin,
)
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.signing import Identity, PublicIdentity, merge
from tests.support import signed_vectors

NOW = 1_800_000_000
DOCUMENT = signed_vectors.load("bulletin")
PEOPLE = {name: PublicIdentity.from_bytes(entry["public"]) for name, entry in DOCUMENT["identities"].items()}
ANN = Identity.from_seeds(b"\x01" * 32, b"\x02" * 32)
MADE = Bulletin("demo", "reference-values", 3, NOW, NOW + 1000, {"list": ["a", "é"], "number": 1})

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@pytest.mark.parametrize("vector", DOCUMENT["vectors"], ids=lambda v: v["name"])
def test_vector(vector: signed_vectors.Vector) -> None:
    def act() -> bytes:
        signers = {name: PEOPLE[name] for name in vector["signers"]}
        opened = open_bulletin(
            vector["envelope"],
            vector["kind"],
            signers,
            vector["threshold"],
            vector["now"],
            cluster=vector["cluster"],
            minimum_version=vector["minimum_version"],
        )
        check_successor(opened, vector["minimum_version"], vector["last_digest"])
        return opened.payload()

    if vector["expect"] == "ok":
        assert act() == vector["payload"]
    else:
        with pytest.raises(KeyquorumError) as caught:
            act()
        assert caught.value.reason == vector["expect"]


def test_layout_is_pinned() -> None:
    assert (
        MADE.payload()
        == (
            '{"body":{"list":["a","é"],"number":1},"cluster":"demo","expires_at":1800001000,"issued_at":1800000000,'
            '"kind":"reference-values","version":3}'
        ).encode()
    )
    assert MADE.digest == hashlib.sha256(MADE.payload()).hexdigest()
    assert json.loads(sign_bulletin(MADE, [ANN]))["payloadType"] == "application/vnd.keyquorum.bulletin.v1+json"


def test_who_signed_is_told_and_signatures_are_gathered_one_by_one() -> None:
    ben = Identity.generate()
    envelope = merge([sign_bulletin(MADE, [ben]), sign_bulletin(MADE, [ANN])], BULLETIN_TYPE)
    operators = {"ann": ANN.public, "ben": ben.public}
    opened = open_bulletin(envelope, "reference-values", operators, 2, NOW, cluster="demo")
    assert opened == MADE
    assert opened.signers == ("ann", "ben")
    assert peek_bulletin(envelope).signers == ()


@given(body=st.dictionaries(st.text(max_size=8), json_values, max_size=4))
def test_any_body_without_floats_comes_back(body: dict[str, Any]) -> None:
    made = dataclasses.replace(MADE, body=body)
    assert Bulletin.parse(made.payload()) == made


@settings(max_examples=300)
@given(position=st.integers(0, len(MADE.payload()) - 1), byte=st.integers(0, 255))
def test_any_other_byte_is_another_bulletin_or_none(position: int, byte: int) -> None:
    payload = bytearray(MADE.payload())
    if payload[position] == byte:
        return
    payload[position] = byte
    try:
        parsed = Bulletin.parse(bytes(payload))
    except MalformedError:
        return
    assert parsed != MADE
    assert parsed.payload() == bytes(payload)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": ""}, Reason.MALFORMED),
        ({"kind": "a" * 33}, Reason.MALFORMED),
        ({"cluster": "DEMO"}, Reason.MALFORMED),
        ({"version": 0}, Reason.MALFORMED),
        ({"issued_at": -1}, Reason.MALFORMED),
        ({"expires_at": NOW}, Reason.MALFORMED),
        ({"body": {"x": 1.5}}, Reason.MALFORMED),
        ({"body": {"x": float("nan")}}, Reason.MALFORMED),
        ({"body": {"x": object()}}, Reason.MALFORMED),
        ({"body": {"x": "\ud800"}}, Reason.MALFORMED),
        ({"body": {"x": 2**53}}, Reason.MALFORMED),
        ({"body": {"x": "y" * MAX_BULLETIN}}, Reason.TOO_LARGE),
        ({"body": {"x": [[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]}}, Reason.MALFORMED),
    ],
)
def test_nothing_is_signed_that_no_reader_would_take(changes: dict[str, Any], reason: Reason) -> None:
    with pytest.raises(MalformedError) as caught:
        sign_bulletin(dataclasses.replace(MADE, **changes), [ANN])
    assert caught.value.reason == reason


def test_a_later_version_may_follow_and_anything_else_may_not() -> None:
    check_successor(MADE, 2, "anything")
    check_successor(MADE, 3, MADE.digest)
    for version, digest in ((4, ""), (3, "00" * 32)):
        with pytest.raises(RefusedError) as caught:
            check_successor(MADE, version, digest)
        assert caught.value.reason == Reason.ROLLBACK


def test_a_payload_of_another_order_is_refused_even_when_signed() -> None:
    tree = json.loads(MADE.payload())
    reversed_order = json.dumps(dict(reversed(tree.items())), ensure_ascii=False, separators=(",", ":")).encode()
    assert rfc8785.dumps(json.loads(reversed_order)) == MADE.payload()
    with pytest.raises(MalformedError):
        Bulletin.parse(reversed_order)
