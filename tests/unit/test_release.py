"""The bytes of a release: leaves, windows, nonces, answers. A changed bit anywhere is refused."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import hmac
import json
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.release import (
    NO_LEASE,
    Answer,
    Leaf,
    LeaseTerms,
    Share,
    Window,
    answer_message,
    challenge,
    decode_share,
    encode_share,
    make_nonce,
    make_window,
    open_share,
    open_window,
    share_info,
    sign_answer,
    sign_window,
    verify_answer,
    verify_receipt,
    window_of,
)
from keyquorum_core.sealing import RecipientKey, seal
from keyquorum_core.signing import Identity, PublicIdentity
from tests.support import signed_vectors

NOW = 1_800_000_000
JOB = "abcdefghijklmnopqrstuvwxyz"
LEAF = Leaf(JOB, "11" * 32, "22" * 32, "33" * 32, "chem-2027", 1, NOW, "worker")
CUSTODIAN = Identity.from_seeds(b"\x01" * 32, b"\x02" * 32)
ANSWER_KEY = Ed25519PrivateKey.from_private_bytes(b"\x03" * 32)
WINDOW = make_window("demo", "ch-1", window_of(NOW), b"\x04" * 32, ANSWER_KEY.public_key().public_bytes_raw())
SUBJECT = b"\x05" * 32
LEASE = LeaseTerms(3600, 1800)
QUORUM = Quorum({"at_least": 2}, (Custodian("ch-1", "CH"), Custodian("de-1", "DE"), Custodian("us-1", "US")))


def answer(sealed: bytes = b"sealed") -> Answer:
    return sign_answer(ANSWER_KEY, SUBJECT, LEAF.hash(), "ch-1", "chem-2027", 1, WINDOW.window, sealed)


def with_(received: Answer, changes: dict[str, Any]) -> Answer:
    return dataclasses.replace(received, **changes)


def verify(received: Answer, leaf_hash: bytes = LEAF.hash(), subject: bytes = SUBJECT, epoch: int = 1) -> None:
    verify_answer(received, WINDOW, subject, leaf_hash, key_id="chem-2027", epoch=epoch)


def replay(vector: signed_vectors.Vector) -> object:
    match vector["operation"]:
        case "leaf":
            leaf = Leaf.parse(vector["leaf"])
            assert leaf.to_bytes() == vector["leaf"]
            return leaf.hash().hex()
        case "share_info":
            return share_info(bytes.fromhex(vector["leaf_hash"]), vector["custodian"], vector["recipient"]).hex()
        case "share":
            share = decode_share(bytes.fromhex(vector["plaintext"]), tuple(vector["indices"]))
            assert encode_share(share.contributions, share.lease).hex() == vector["plaintext"]
            return {"lease_seconds": share.lease.seconds, "reattest_seconds": share.lease.reattest_seconds}
        case "nonce":
            return make_nonce(bytes.fromhex(vector["boot_secret"]), vector["window"]).hex()
        case "challenge":
            return challenge({k: bytes.fromhex(v) for k, v in vector["nonces"].items()}).hex()
        case "window":
            return open_window(
                vector["envelope"],
                PublicIdentity.from_bytes(vector["identity"]),
                custodian=vector["custodian"],
                cluster=vector["cluster"],
                now=vector["now"],
                skew=vector["skew"],
            ).payload()
        case "answer":
            claim = dict(vector["answer"])
            claim["sealed"] = base64.b64decode(claim["sealed"])
            claim["signature"] = bytes.fromhex(claim["signature"])
            received = Answer(**claim)
            subject, leaf_hash = bytes.fromhex(vector["subject"]), bytes.fromhex(vector["leaf_hash"])
            expected = {"key_id": vector["key_id"], "epoch": vector["epoch"]}
            verify_answer(received, Window.parse(base64.b64decode(vector["window"])), subject, leaf_hash, **expected)
            fields = (received.custodian, received.key_id, received.epoch, received.window, received.sealed)
            return base64.b64encode(answer_message(subject, leaf_hash, *fields)).decode()
    raise AssertionError(vector["operation"])


@pytest.mark.parametrize("vector", signed_vectors.load("release")["vectors"], ids=lambda v: v["name"])
def test_vector(vector: signed_vectors.Vector) -> None:
    if vector["expect"] == "ok":
        results = ("terms", "hash", "info", "nonce", "challenge", "payload", "message")
        assert replay(vector) == next(vector[name] for name in results if name in vector)
    else:
        with pytest.raises(KeyquorumError) as caught:
            replay(vector)
        assert caught.value.reason == vector["expect"]


def test_layout_of_the_leaf_is_pinned() -> None:
    data = LEAF.to_bytes()
    assert data == (
        b'{"development":false,"epoch":1,"evidence_sha256":"' + b"33" * 32 + b'","job_id":"abcdefghijklmnopqrstuvwxyz",'
        b'"key_id":"chem-2027","manifest_sha256":"' + b"11" * 32 + b'","recipient":"worker",'
        b'"recipient_sha256":"' + b"22" * 32 + b'","time":1800000000,"type":"release.intent"}'
    )
    assert rfc8785.dumps(json.loads(data)) == data
    assert LEAF.hash() == hashlib.sha256(b"\x00" + data).digest()
    assert Leaf.parse(data) == LEAF


def test_layout_of_the_window_is_pinned() -> None:
    nonce = hmac.digest(
        b"\x04" * 32, b"\x00\x12keyquorum/v1/nonce" + (8).to_bytes(8, "big") + (60_000_000).to_bytes(8, "big"), "sha256"
    )
    assert WINDOW.payload() == (
        b'{"answer_key":"' + ANSWER_KEY.public_key().public_bytes_raw().hex().encode() + b'","cluster":"demo",'
        b'"custodian":"ch-1","nonce":"' + nonce.hex().encode() + b'","not_after":1800000060,'
        b'"not_before":1800000000,"window":60000000}'
    )
    assert Window.parse(WINDOW.payload()) == WINDOW
    assert WINDOW.nonce_bytes == nonce


def test_layout_of_the_answer_message_is_pinned() -> None:
    def part(value: bytes) -> bytes:
        return len(value).to_bytes(8, "big") + value

    leaf_hash = b"\x07" * 32
    assert answer_message(SUBJECT, leaf_hash, "ch-1", "chem-2027", 1, 2, b"sealed") == (
        b"\x00\x13keyquorum/v1/answer"
        + part(SUBJECT)
        + part(leaf_hash)
        + part(b"ch-1")
        + part(b"chem-2027")
        + part((1).to_bytes(8, "big"))
        + part((2).to_bytes(8, "big"))
        + part(hashlib.sha256(b"sealed").digest())
    )


def test_layout_of_the_challenge_is_pinned_and_sorted() -> None:
    def part(value: bytes) -> bytes:
        return len(value).to_bytes(8, "big") + value

    a, b = b"\x01" * 32, b"\x02" * 32
    text = b"\x00\x16keyquorum/v1/challenge" + part(b"ch-1") + part(a) + part(b"de-1") + part(b)
    assert challenge({"de-1": b, "ch-1": a}) == hashlib.sha256(text).digest()
    for bad in ({}, {"ch-1": b""}, {"ch-1": a + b"\0"}):
        with pytest.raises(MalformedError):
            challenge(bad)


def test_nonces_differ_by_window_and_boot() -> None:
    values = {make_nonce(secret, window) for secret in (b"a" * 32, b"b" * 32) for window in range(10)}
    assert len(values) == 20


def test_every_bit_of_an_answer_counts() -> None:
    good = answer()
    verify(good)
    for name in ("sealed", "signature"):
        value: bytes = getattr(good, name)
        for bit in range(8 * len(value)):
            twin = bytearray(value)
            twin[bit // 8] ^= 1 << bit % 8
            with pytest.raises(RefusedError) as caught:
                verify(with_(good, {name: bytes(twin)}))
            assert caught.value.reason is Reason.SIGNATURE
    for bit in range(256):
        other = (int.from_bytes(SUBJECT, "big") ^ 1 << bit).to_bytes(32, "big")
        leaf = (int.from_bytes(LEAF.hash(), "big") ^ 1 << bit).to_bytes(32, "big")
        for subject, leaf_hash in ((other, LEAF.hash()), (SUBJECT, leaf)):
            with pytest.raises(RefusedError):
                verify(good, leaf_hash, subject)


def test_every_bit_of_a_leaf_counts() -> None:
    """A flipped bit is refused, or is another leaf with another hash: never the same leaf written otherwise."""
    data = LEAF.to_bytes()
    for bit in range(8 * len(data)):
        twin = bytearray(data)
        twin[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(MalformedError):
            parsed = Leaf.parse(bytes(twin))
            assert parsed.to_bytes() == bytes(twin)
            assert parsed.hash() != LEAF.hash()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"custodian": "de-1"}, Reason.UNKNOWN_CUSTODIAN),
        ({"window": WINDOW.window - 1}, Reason.STALE),
        ({"key_id": "other"}, Reason.UNKNOWN_KEY),
        ({"epoch": 2}, Reason.EPOCH),
        ({"signature": b""}, Reason.SIGNATURE),
    ],
)
def test_an_answer_about_something_else_is_refused_by_name(change: dict[str, Any], reason: Reason) -> None:
    twin = dataclasses.replace(answer(), **change)
    with pytest.raises(RefusedError) as caught:
        verify(twin)
    assert caught.value.reason is reason
    with pytest.raises(RefusedError):
        verify_receipt(twin.receipt(), WINDOW, SUBJECT, LEAF.hash(), key_id="chem-2027", epoch=1)


def test_a_receipt_verifies_without_the_ciphertext() -> None:
    receipt = answer(b"x" * 1000).receipt()
    verify_receipt(receipt, WINDOW, SUBJECT, LEAF.hash(), key_id="chem-2027", epoch=1)
    other = dataclasses.replace(receipt, sealed_sha256=bytes(32))
    with pytest.raises(RefusedError):
        verify_receipt(other, WINDOW, SUBJECT, LEAF.hash(), key_id="chem-2027", epoch=1)


def test_a_share_opens_for_its_recipient_leaf_and_custodian_only() -> None:
    recipient, other = RecipientKey.generate(), RecipientKey.generate()
    share = {index: bytes([index]) * 32 for index in QUORUM.indices_of("ch-1")}
    info = share_info(LEAF.hash(), "ch-1", recipient.public)
    good = answer(seal(recipient.public, encode_share(share, LEASE), info))
    assert open_share(good, recipient, LEAF.hash(), QUORUM) == Share(share, LEASE)
    posing = dataclasses.replace(good, custodian="de-1")
    trials = (good, other, LEAF.hash()), (good, recipient, bytes(32)), (posing, recipient, LEAF.hash())
    for received, key, leaf_hash in trials:
        with pytest.raises(RefusedError) as caught:
            open_share(received, key, leaf_hash, QUORUM)
        assert caught.value.reason is Reason.UNSEAL
    with pytest.raises(RefusedError) as caught:
        open_share(dataclasses.replace(good, custodian="xx-9"), recipient, LEAF.hash(), QUORUM)
    assert caught.value.reason is Reason.UNKNOWN_CUSTODIAN


def test_the_bytes_of_a_share_are_pinned() -> None:
    terms = LeaseTerms(0x0102, 0x0101)
    assert encode_share({3: b"\xaa" * 32}, terms).hex() == "000001020000010100000003" + "aa" * 32
    assert encode_share({}, NO_LEASE).hex() == "00" * 8


@given(seconds=st.integers(5, 7 * 86400), share=st.floats(0, 1), other=st.integers(5, 7 * 86400), least=st.floats(0, 1))
def test_the_shorter_of_two_leases_satisfies_both(seconds: int, share: float, other: int, least: float) -> None:
    one = LeaseTerms(seconds, max(1, int(seconds * share)))
    two = LeaseTerms(other, max(1, int(other * least)))
    both = one.shortest(two)
    assert both == two.shortest(one)
    assert both.seconds == min(seconds, other)
    assert both.reattest_seconds == min(one.reattest_seconds, two.reattest_seconds)


@pytest.mark.parametrize("terms", [(4, 1), (0, 1), (5, 0), (5, 6), (7 * 86400 + 1, 1)])
def test_terms_that_no_key_policy_has_are_refused(terms: tuple[int, int]) -> None:
    with pytest.raises(MalformedError):
        LeaseTerms(*terms)


def test_a_share_must_hold_exactly_the_custodian_s_indices() -> None:
    recipient = RecipientKey.generate()
    info = share_info(LEAF.hash(), "ch-1", recipient.public)
    held = QUORUM.indices_of("ch-1")
    for indices in (held[:-1], (*held, max(held) + 1), QUORUM.indices_of("de-1"), ()):
        blob = encode_share({index: bytes(32) for index in indices}, NO_LEASE)
        with pytest.raises(MalformedError):
            open_share(answer(seal(recipient.public, blob, info)), recipient, LEAF.hash(), QUORUM)


@pytest.mark.parametrize("now", [NOW - 30, NOW, NOW + 30, NOW + 89])
def test_a_window_is_current_for_two_windows_and_the_skew(now: int) -> None:
    envelope = sign_window(WINDOW, CUSTODIAN)
    assert open_window(envelope, CUSTODIAN.public, custodian="ch-1", cluster="demo", now=now) == WINDOW


@pytest.mark.parametrize(
    "change",
    [{"nonce": "00"}, {"answer_key": "zz" * 32}, {"answer_key": "01" + "00" * 31}, {"not_after": NOW + 61},
     {"not_before": NOW - 30}, {"window": -1}, {"window": 2**53}, {"custodian": "CH-1"}, {"cluster": "a b"}],
    ids=str,
)  # fmt: skip
def test_a_window_that_makes_no_sense_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        dataclasses.replace(WINDOW, **change)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_random_bytes_raise_only_our_errors(data: bytes) -> None:
    for parse in (Leaf.parse, Window.parse):
        with pytest.raises(MalformedError):
            parse(data)


@given(st.sampled_from((LEAF.to_bytes(), WINDOW.payload())), st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_leaves_and_windows_raise_only_our_errors(good: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(good)))
    twin = good[:at] + data.draw(st.binary(max_size=4)) + good[at + data.draw(st.integers(0, 4)) :]
    for parse in (Leaf.parse, Window.parse):
        with contextlib.suppress(MalformedError):
            assert isinstance(parse(twin), Leaf | Window)


@given(
    st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Leaf)]), st.none() | st.integers() | st.text())
)
@settings(max_examples=150, deadline=None)
def test_leaf_shaped_json_raises_only_our_errors(changes: dict[str, object]) -> None:
    data = json.dumps({**json.loads(LEAF.to_bytes()), **changes}, sort_keys=True, separators=(",", ":")).encode()
    with contextlib.suppress(MalformedError):
        assert Leaf.parse(data).to_bytes() == data
