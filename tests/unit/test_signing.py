"""Hybrid signatures over DSSE: both halves always, exact bytes back, and nothing decided by a hint."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import json
import pickle
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.signing import (
    ML_DSA_CONTEXT,
    Identity,
    PublicIdentity,
    ed25519_public,
    merge,
    open_envelope,
    open_multi,
    pae,
    peek_payload,
    sign,
    sign_many,
)
from tests.support import signed_vectors

KIND = "application/vnd.keyquorum.example+json"
PAYLOAD = b'{"a":1}'
ALICE = Identity.from_seeds(bytes(range(32)), bytes(range(32, 64)))
BOB = Identity.from_seeds(b"\x01" * 32, b"\x02" * 32)
CAROL = Identity.from_seeds(b"\x03" * 32, b"\x04" * 32)
GOOD = sign(ALICE, KIND, PAYLOAD)

DOCUMENT = signed_vectors.load("signatures")


def edited(envelope: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(envelope), **changes}).encode()


@pytest.mark.parametrize("vector", DOCUMENT["vectors"], ids=lambda v: v["name"])
def test_vector(vector: signed_vectors.Vector) -> None:
    people = {name: PublicIdentity.from_bytes(entry["public"]) for name, entry in DOCUMENT["identities"].items()}

    def act() -> object:
        match vector["operation"]:
            case "open_envelope":
                return open_envelope(vector["envelope"], vector["payload_type"], people[vector["by"]], "example")
            case "open_multi":
                signers = {name: people[name] for name in vector["signers"]}
                return open_multi(vector["envelope"], vector["payload_type"], signers, vector["threshold"], "example")
            case "parse_identity":
                return PublicIdentity.from_bytes(vector["public"]).fingerprint
        raise AssertionError(vector["operation"])

    if vector["expect"] != "ok":
        with pytest.raises(KeyquorumError) as caught:
            act()
        assert caught.value.reason == vector["expect"]
    elif vector["operation"] == "open_multi":
        assert act() == (vector["payload"], tuple(vector["signed"]))
    else:
        assert act() == vector.get("payload", vector.get("fingerprint"))


def test_seeds_in_the_vectors_give_the_public_identities() -> None:
    for entry in DOCUMENT["identities"].values():
        identity = Identity.from_seeds(bytes.fromhex(entry["ed25519_seed"]), bytes.fromhex(entry["ml_dsa_seed"]))
        assert identity.public.to_bytes() == entry["public"]


def test_layout_of_pae_is_pinned() -> None:
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "


def test_layout_of_identity_and_envelope_is_pinned() -> None:
    raw = ALICE.public.to_bytes()
    assert len(raw) == 1984
    assert raw[:32].hex() == "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
    assert hashlib.sha256(raw).hexdigest() == PINNED["identity"]
    assert ALICE.public.fingerprint == PINNED["fingerprint"]
    envelope = json.loads(GOOD)
    assert rfc8785.dumps(envelope) == GOOD
    assert list(envelope) == ["payload", "payloadType", "signatures"]
    hint = ALICE.public.fingerprint[:16]
    assert [s["keyid"] for s in envelope["signatures"]] == [f"{hint}/ed25519", f"{hint}/ml-dsa-65"]
    assert [len(base64.b64decode(s["sig"])) for s in envelope["signatures"]] == [64, 3309]


PINNED = {
    "identity": "8cd10c2cc5ca933652c2d40496887e0f5d58901a65b0cdbaf2f73663488f1284",
    "fingerprint": "841a0195a981e52347e110371b2c7e4431bcfa49c8029361f47c1b825f7aa807",
}


def test_exact_payload_bytes_come_back() -> None:
    for payload in (b"", b"\x00\xff", b'{ "not" : "canonical" }'):
        assert open_envelope(sign(ALICE, KIND, payload), KIND, ALICE.public, "example") == payload
        assert peek_payload(sign(ALICE, KIND, payload), KIND, "example") == payload


def test_every_bit_of_the_payload_and_of_the_signatures_counts() -> None:
    first, second = json.loads(GOOD)["signatures"]
    ed, ml = base64.b64decode(first["sig"]), base64.b64decode(second["sig"])

    def flips(data: bytes, step: int) -> list[str]:
        out = []
        for bit in range(0, 8 * len(data), step):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            out.append(base64.b64encode(changed).decode())
        return out

    twins = [edited(GOOD, payload=p) for p in flips(PAYLOAD, 1)]
    twins += [edited(GOOD, signatures=[{"sig": s}, second]) for s in flips(ed, 1)]
    twins += [edited(GOOD, signatures=[first, {"sig": s}]) for s in flips(ml, 61)]
    for twin in twins:
        with pytest.raises(RefusedError) as caught:
            open_envelope(twin, KIND, ALICE.public, "example")
        assert caught.value.reason is Reason.SIGNATURE


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_random_bytes_are_no_envelope(data: bytes) -> None:
    with pytest.raises(KeyquorumError):
        open_envelope(data, KIND, ALICE.public, "example")
    with pytest.raises(KeyquorumError):
        merge([data])


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.sampled_from(("replace", "insert", "delete")))
@settings(max_examples=300, deadline=None)
def test_a_mutated_envelope_is_refused_or_gives_the_same_payload(at: int, byte: int, how: str) -> None:
    end = at if how == "insert" else at + 1
    twin = GOOD[:at] + (b"" if how == "delete" else bytes([byte])) + GOOD[end:]
    with contextlib.suppress(MalformedError, RefusedError):
        assert open_envelope(twin, KIND, ALICE.public, "example") == PAYLOAD


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(("payload", "payloadType", "signatures", "keyid", "sig")), x), max_leaves=8))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_envelope_shaped_json_raises_only_our_errors(value: object) -> None:
    data = json.dumps(value).encode()
    with pytest.raises(KeyquorumError):
        open_envelope(data, KIND, ALICE.public, "example")
    with pytest.raises(KeyquorumError):
        merge([data])


def test_an_oversized_envelope_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(MalformedError) as caught:
        open_envelope(GOOD, KIND, ALICE.public, "example", max_bytes=len(GOOD) - 1)
    assert caught.value.reason is Reason.TOO_LARGE


def test_a_signature_for_one_payload_type_is_none_for_another() -> None:
    with pytest.raises(RefusedError):
        open_envelope(edited(GOOD, payloadType="other"), "other", ALICE.public, "example")


def test_merge_keeps_one_pair_per_signer_and_refuses_another_payload() -> None:
    merged = merge([GOOD, sign(BOB, KIND, PAYLOAD), sign(ALICE, KIND, PAYLOAD)])
    signers = {"alice": ALICE.public, "bob": BOB.public}
    assert open_multi(merged, KIND, signers, 2, "example") == (PAYLOAD, ("alice", "bob"))
    for other in (sign(BOB, KIND, b"other"), sign(BOB, "other/type", PAYLOAD)):
        with pytest.raises(MalformedError):
            merge([GOOD, other])
    with pytest.raises(MalformedError):
        merge([])


def test_one_key_under_two_names_never_counts_twice() -> None:
    both = sign_many((ALICE, ALICE), KIND, PAYLOAD)
    half = PublicIdentity.from_bytes(ALICE.public.ed25519 + BOB.public.ml_dsa_65)
    for twin in (ALICE.public, half):
        with pytest.raises(MalformedError) as caught:
            open_multi(both, KIND, {"alice": ALICE.public, "twin": twin}, 2, "example")
        assert caught.value.reason is Reason.ROSTER


@pytest.mark.parametrize("threshold", [0, -1, 3])
def test_a_threshold_that_makes_no_sense_is_refused(threshold: int) -> None:
    with pytest.raises(MalformedError):
        open_multi(GOOD, KIND, {"alice": ALICE.public, "bob": BOB.public}, threshold, "example")


def test_ml_dsa_signs_under_the_product_context() -> None:
    assert ML_DSA_CONTEXT == b"keyquorum/v1"
    assert ALICE.public.verifies(b"m", *ALICE.sign_pair(b"m")) == ""


def test_identities_compare_by_bytes_and_are_parsed_once() -> None:
    assert PublicIdentity.from_bytes(ALICE.public.to_bytes()) == ALICE.public
    assert PublicIdentity.from_bytes(ALICE.public.to_bytes()) is PublicIdentity.from_bytes(ALICE.public.to_bytes())
    assert hash(pickle.loads(pickle.dumps(ALICE.public))) == hash(ALICE.public)  # noqa: S301 - our own bytes
    assert BOB.public != ALICE.public
    assert Identity.from_seeds(*CAROL.seeds()).public == CAROL.public
    assert Identity.generate().public != Identity.generate().public


def test_private_identities_do_not_leak() -> None:
    for shown in (repr(ALICE), str(ALICE), f"{ALICE}"):
        assert ALICE.public.fingerprint[:16] in shown
        assert all(seed.hex() not in shown for seed in ALICE.seeds())
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            act(ALICE)


@pytest.mark.parametrize("seeds", [(b"", b""), (b"\0" * 31, b"\0" * 32), (b"\0" * 32, b"\0" * 33)])
def test_seeds_of_another_size_are_refused(seeds: tuple[bytes, bytes]) -> None:
    with pytest.raises(MalformedError):
        Identity.from_seeds(*seeds)


def test_small_order_and_non_canonical_ed25519_keys_are_refused() -> None:
    p = 2**255 - 19
    y8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
    for y in (0, 1, p - 1, y8, p - y8, p, p + 1, 2**255 - 1):
        for sign_bit in (0, 1):
            with pytest.raises(MalformedError):
                ed25519_public((y | sign_bit << 255).to_bytes(32, "little"))
