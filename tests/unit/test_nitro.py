"""Nitro documents: a real one, those of a test vendor, and every way in which one can fail."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.attestation import nitro
from keyquorum_core.attestation.findings import require
from keyquorum_core.attestation.nitro_appraisal import (
    AppraisedDocument,
    appraise,
    evaluate,
)
from keyquorum_core.attestation.nitro_document import parse_document
from keyquorum_core.attestation.nitro_reference import NitroReferenceValues
from keyquorum_core.attestation.nitro_verdict import judge_nitro
from keyquorum_core.attestation.roots import AWS_NITRO_ROOTS
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from tests.support.nitro_vendor import (
    CHALLENGE,
    DAY,
    HOUR,
    INSTANCE,
    NOW,
    PROTECTED,
    REPORT_DATA,
    NitroVendor,
    links,
    new_key,
    nitro_vendor,
    payload_of,
    pcrs,
)
from tests.support.vectors import vector

REAL_TIME = 1766668537  # 2025-12-25T13:15:37Z, the document's own
AWS = next(iter(AWS_NITRO_ROOTS))


def real() -> bytes:
    """The vector's document: 4 bytes into the file, and as long as those say (4527 bytes); another's data follows."""
    data = vector("nitro/nitro_attestation.bin")
    size = int.from_bytes(data[2:4], "little") >> 2
    return data[4 : 4 + size]


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


def verify(
    document: bytes | None = None, *, vendor: NitroVendor | None = None, now: int = NOW
) -> nitro.VerifiedDocument:
    vendor = vendor or nitro_vendor()
    return nitro.verify(vendor.document() if document is None else document, pinned_roots={vendor.fingerprint}, now=now)


def made(**changes: Any) -> bytes:
    return nitro_vendor().document(**changes)


# Real evidence


def test_a_real_document_verifies_and_can_bind_no_key() -> None:
    verified = nitro.verify(real(), pinned_roots=AWS_NITRO_ROOTS, now=REAL_TIME)
    assert (verified.document.timestamp, verified.root, verified.development) == (REAL_TIME, AWS, False)
    assert verified.document.instance_id == INSTANCE
    assert verified.document.public_key is None
    verdict = judge_nitro(real(), now=REAL_TIME)
    assert (verdict.ok, verdict.verified, verdict.reason) == (False, True, "BINDING")
    assert verdict.as_dict()["claims"]["measurement"].startswith("5cb70295")  # type: ignore[index]


@pytest.mark.parametrize(
    ("seconds", "reason"), [(-HOUR, Reason.NOT_YET_VALID), (4 * HOUR, Reason.EXPIRED), (DAY, Reason.EXPIRED)]
)
def test_a_real_document_is_refused_at_another_time(seconds: int, reason: Reason) -> None:
    document = real()
    refused(reason, lambda: nitro.verify(document, pinned_roots=AWS_NITRO_ROOTS, now=REAL_TIME + seconds))


def test_a_real_document_is_refused_where_aws_is_not_pinned() -> None:
    document = real()
    pinned = {nitro_vendor().fingerprint}
    refused(Reason.ROOT_NOT_PINNED, lambda: nitro.verify(document, pinned_roots=pinned, now=REAL_TIME))


def test_every_bit_flip_in_a_real_document_is_refused() -> None:
    """2 200 flips anywhere in the document: headers, payload, certificates, signature."""
    document = real()
    for bit in random.Random("nitro").sample(range(8 * len(document)), 2200):  # noqa: S311 - a fixed sample
        flipped = bytearray(document)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyquorumError):
            nitro.verify(bytes(flipped), pinned_roots=AWS_NITRO_ROOTS, now=REAL_TIME)


# Documents of the test vendor


@pytest.mark.parametrize("tagged", [False, True])
def test_a_document_verifies_with_its_tag_and_without(tagged: bool) -> None:
    verified = verify(made(tagged=tagged))
    assert verified.document.pcrs[4] == b"\xd4" * 48
    assert (verified.document.public_key, verified.document.nonce) == (REPORT_DATA, CHALLENGE)
    assert (verified.root, verified.development) == (nitro_vendor().fingerprint, True)
    assert (verified.not_before, verified.not_after) == (NOW - HOUR, NOW + 2 * HOUR)


def test_a_payload_of_definite_length_verifies() -> None:
    members = nitro_vendor().members(user_data=b"x" * 512, public_key=b"k" * 1024)
    verify(nitro_vendor().sign(cbor2.dumps(members)))


def cose(**changes: Any) -> bytes:
    parts = dict(zip(("protected", "unprotected", "payload", "signature"), cbor2.loads(made()), strict=True))
    return cbor2.dumps(list((parts | changes).values()))


def without(member: str) -> bytes:
    members = nitro_vendor().members()
    del members[member]
    return nitro_vendor().sign(payload_of(members))


MALFORMED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "another vendor's report": lambda: bytes(1184),
    "too large": lambda: bytes(1 << 16),
    "padded": lambda: made() + b"\0",
    "concatenated": lambda: made() * 2,
    "under another tag": lambda: cbor2.dumps(cbor2.CBORTag(17, cbor2.loads(made()))),
    "tagged twice": lambda: b"\xd2" + made(tagged=True),
    "three parts": lambda: cbor2.dumps(cbor2.loads(made())[:3]),
    "five parts": lambda: cbor2.dumps([*cbor2.loads(made()), b""]),
    "array of indefinite length": lambda: b"\x9f" + made()[1:] + b"\xff",
    "ES256": lambda: cose(protected=cbor2.dumps({1: -7})),
    "ES384 and more": lambda: cose(protected=cbor2.dumps({1: -35, 3: 0})),
    "no protected header": lambda: cose(protected=b""),
    "unprotected header": lambda: cose(unprotected={1: -35}),
    "detached payload": lambda: cose(payload=None),
    "signature in DER": lambda: cose(signature=b"\x30" * 102),
    "signature cut": lambda: cose(signature=bytes(95)),
    "payload that is no map": lambda: nitro_vendor().sign(cbor2.dumps([0] * 90)),
    "payload with bytes after it": lambda: nitro_vendor().sign(payload_of(nitro_vendor().members()) + b"\0"),
    "further member": lambda: nitro_vendor().sign(payload_of({**nitro_vendor().members(), "x": 1})),
    "member twice": lambda: nitro_vendor().sign(
        payload_of(nitro_vendor().members())[:-1] + cbor2.dumps("nonce") + cbor2.dumps(b"n") + b"\xff"
    ),
    "nested map of indefinite length": lambda: nitro_vendor().sign(
        payload_of(nitro_vendor().members()).replace(b"\x64pcrs\xb0", b"\x64pcrs\xbf")
    ),
    "length not in its shortest form": lambda: nitro_vendor().sign(
        payload_of(nitro_vendor().members()).replace(b"\x66digest\x66SHA384", b"\x66digest\x78\x06SHA384")
    ),
    **{f"no {member}": lambda member=member: without(member) for member in nitro_vendor().members()},  # type: ignore[misc]
    "SHA-256": lambda: made(digest="SHA256"),
    "module id empty": lambda: made(module_id=""),
    "module id with a space": lambda: made(module_id="i-0 -enc1"),
    "module id too long": lambda: made(module_id="i" * 129),
    "time zero": lambda: made(timestamp=0),
    "time true": lambda: made(timestamp=True),
    "time a float": lambda: made(timestamp=1.5),
    "PCRs a list": lambda: made(pcrs=[bytes(48)] * 3),
    "no PCR": lambda: made(pcrs={}),
    "no PCR0": lambda: made(pcrs=pcrs(PCR0=None)),
    "no PCR2": lambda: made(pcrs=pcrs(PCR2=None)),
    "PCR32": lambda: made(pcrs=pcrs(PCR32=bytes(48))),
    "PCR by name": lambda: made(pcrs={**pcrs(), "0": bytes(48)}),
    "PCR of SHA-256": lambda: made(pcrs=pcrs(PCR1=bytes(32))),
    "PCR empty": lambda: made(pcrs=pcrs(PCR0=b"")),
    "no CA": lambda: made(cabundle=[]),
    "too many CAs": lambda: made(cabundle=[b"x"] * 9),
    "CA too large": lambda: made(cabundle=[bytes(1025)]),
    "CA that is none": lambda: made(cabundle=[b"x"]),
    "certificate a text": lambda: made(certificate="x"),
    "public key too large": lambda: made(public_key=bytes(1025)),
    "public key a text": lambda: made(public_key="key"),
    "user data too large": lambda: made(user_data=bytes(513)),
    "nonce too large": lambda: made(nonce=bytes(513)),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_document_of_another_form_is_malformed(what: str) -> None:
    refused(Reason.MALFORMED, lambda: verify(MALFORMED[what]()))


def test_a_document_cut_anywhere_is_malformed() -> None:
    document = made()
    for size in range(0, len(document), 41):
        refused(Reason.MALFORMED, lambda size=size: parse_document(document[:size]))  # type: ignore[misc]


# Chain


def test_a_root_of_the_same_name_with_another_key_is_refused() -> None:
    document = NitroVendor().document()
    refused(Reason.ROOT_NOT_PINNED, lambda: verify(document))
    refused(Reason.ROOT_NOT_PINNED, lambda: nitro.verify(made(), pinned_roots=set(), now=NOW))


BROKEN: list[tuple[str, int, dict[str, Any]]] = [
    ("a CA by name, with another key", 2, {"issuer_key": new_key()}),
    ("a leaf that another key signed", 4, {"issuer_key": new_key()}),
    ("a root that another key signed", 0, {"issuer_key": new_key()}),
    ("another issuer's name", 3, {"issuer": "elsewhere"}),
    ("a CA that is none", 2, {"ca": False}),
    ("a CA that may not sign certificates", 1, {"may_sign_certificates": False}),
    ("a CA below its path length", 1, {"path_length": 1}),
    ("a root with too short a path", 0, {"path_length": 2}),
    ("a leaf that is a CA", 4, {"ca": True}),
    ("a leaf that may not sign", 4, {"may_sign_data": False}),
    ("SHA-256", 3, {"algorithm": hashes.SHA256()}),
    ("a critical extension that nobody knows", 2, {"critical_extension": True}),
]


@pytest.mark.parametrize(("what", "index", "change"), BROKEN, ids=[each[0] for each in BROKEN])
def test_a_chain_with_a_link_out_of_place_is_refused(what: str, index: int, change: dict[str, Any]) -> None:
    chain = links()
    chain[index] = replace(chain[index], **change)
    vendor = NitroVendor(chain)
    refused(Reason.CHAIN, lambda: verify(vendor.document(), vendor=vendor))


def test_a_key_on_another_curve_is_refused() -> None:
    chain = links()
    chain[3] = replace(chain[3], key=ec.generate_private_key(ec.SECP256R1()))
    vendor = NitroVendor(chain)
    refused(Reason.MALFORMED, lambda: verify(vendor.document(), vendor=vendor))


def test_certificates_left_out_or_in_another_order_are_refused() -> None:
    certificates = nitro_vendor().certificates
    for bundle in (certificates[:-2], [certificates[0], certificates[2], certificates[1], certificates[3]]):
        refused(Reason.CHAIN, lambda bundle=bundle: verify(made(cabundle=bundle)))  # type: ignore[misc]
    refused(Reason.ROOT_NOT_PINNED, lambda: verify(made(cabundle=certificates[1:-1])))
    refused(Reason.CHAIN, lambda: verify(made(certificate=certificates[-2])))


# Time


@pytest.mark.parametrize(
    ("index", "change", "reason"),
    [
        (4, {"not_after": NOW - 1}, Reason.EXPIRED),
        (2, {"not_after": NOW - 1}, Reason.EXPIRED),
        (0, {"not_after": NOW - 1}, Reason.EXPIRED),
        (4, {"not_before": NOW + 1}, Reason.NOT_YET_VALID),
        (1, {"not_before": NOW + 1}, Reason.NOT_YET_VALID),
    ],
)
def test_a_certificate_outside_its_window_is_refused(index: int, change: dict[str, int], reason: Reason) -> None:
    chain = links()
    chain[index] = replace(chain[index], **change)  # type: ignore[arg-type]
    vendor = NitroVendor(chain)
    refused(reason, lambda: verify(vendor.document(), vendor=vendor))


def test_the_certificates_must_be_valid_when_the_document_was_made_and_now() -> None:
    refused(Reason.NOT_YET_VALID, lambda: verify(made(timestamp=(NOW - 2 * HOUR) * 1000)))
    refused(Reason.EXPIRED, lambda: verify(now=NOW + 2 * HOUR + 1))
    verify(now=NOW + 2 * HOUR)


def test_a_document_from_the_future_is_refused_but_for_a_minute() -> None:
    verify(now=NOW - nitro.CLOCK_SKEW)
    refused(Reason.NOT_YET_VALID, lambda: verify(now=NOW - nitro.CLOCK_SKEW - 1))
    refused(Reason.MALFORMED, lambda: verify(now=-1))


# Signature


def test_a_document_that_another_key_signed_is_refused() -> None:
    refused(Reason.SIGNATURE, lambda: verify(made(key=new_key())))
    refused(Reason.SIGNATURE, lambda: verify(cose(signature=bytes(96))))
    refused(Reason.SIGNATURE, lambda: verify(cose(signature=b"\xff" * 96)))
    payload = cbor2.loads(made())[2].replace(b"\xd0" * 48, b"\xd9" * 48)
    refused(Reason.SIGNATURE, lambda: verify(cose(payload=payload)))
    assert parse_document(made()).to_be_signed() == cbor2.dumps(
        ["Signature1", PROTECTED, b"", parse_document(made()).payload]
    )


# Appraisal


def hex_of(byte: int) -> str:
    return bytes([byte] * 48).hex()


def image(**changes: object) -> dict[str, object]:
    return {"name": "worker 1.0", "pcrs": {"0": hex_of(0xD0), "1": hex_of(0xD1), "2": hex_of(0xD2)}, **changes}


def values(**changes: object) -> dict[str, object]:
    return {
        "roots": [],
        "development_roots": [nitro_vendor().fingerprint],
        "images": [image()],
        "max_document_age": 300,
        **changes,
    }


def accept(
    document: bytes | None = None,
    *,
    now: int = NOW,
    data: bytes = REPORT_DATA,
    challenge: bytes = CHALLENGE,
    **changes: object,
) -> AppraisedDocument:
    reference = NitroReferenceValues.parse(values(**changes))
    verified = verify(document, now=now)
    return appraise(verified, reference, expected_report_data=data, challenge=challenge, now=now)


def test_a_document_that_meets_everything_is_accepted() -> None:
    appraised = accept()
    assert (appraised.image, appraised.hardware_id) == ("worker 1.0", INSTANCE)
    assert (verify(made()).not_before, appraised.not_after) == (NOW - HOUR, NOW + 300)
    assert accept(max_document_age=3 * HOUR).not_after == NOW + 2 * HOUR


@pytest.mark.parametrize("changed", [{"PCR0": bytes(48)}, {"PCR1": bytes(48)}, {"PCR2": bytes(48)}])
def test_zero_pcrs_are_those_of_debug_mode(changed: dict[str, bytes]) -> None:
    refused(Reason.DEBUG_ENABLED, lambda: accept(made(pcrs=pcrs(**changed))))


@pytest.mark.parametrize("member", ["public_key", "nonce"])
@pytest.mark.parametrize("value", [None, b""])
def test_a_document_that_can_bind_nothing_is_refused(member: str, value: bytes | None) -> None:
    document = made(**{member: value})
    refused(Reason.BINDING, lambda: accept(document))
    refused(Reason.BINDING, lambda: accept(document, data=b"", challenge=b""))
    reference = NitroReferenceValues.parse(values())
    refused(Reason.BINDING, lambda: require(evaluate(verify(document), reference, now=NOW)[0]))


def test_a_document_bound_to_anything_else_is_refused() -> None:
    for data in (bytes(64), REPORT_DATA[:63], b""):
        refused(Reason.BINDING, lambda data=data: accept(data=data))  # type: ignore[misc]
    for challenge in (bytes(32), CHALLENGE + b"\0", b""):
        refused(Reason.BINDING, lambda challenge=challenge: accept(challenge=challenge))  # type: ignore[misc]


def test_a_root_counts_as_what_the_reference_values_name_it() -> None:
    refused(Reason.ROOT_NOT_PINNED, lambda: accept(roots=[AWS], development_roots=[]))


def test_a_document_older_than_accepted_is_stale() -> None:
    accept(now=NOW + 300)
    refused(Reason.STALE, lambda: accept(now=NOW + 301))


@pytest.mark.parametrize("index", [0, 1, 2, 4])
def test_each_pcr_that_an_image_names_counts(index: int) -> None:
    named = image(pcrs={"0": hex_of(0xD0), "1": hex_of(0xD1), "2": hex_of(0xD2), "4": hex_of(0xD4)})
    assert accept(images=[named]).image == "worker 1.0"
    other = made(pcrs=pcrs(**{f"PCR{index}": b"\x01" * 48}))
    error = refused(Reason.MEASUREMENT, lambda: accept(other, images=[named]))
    assert error.message.startswith(f"PCR{index} ")
    if index == 4:
        refused(Reason.MEASUREMENT, lambda: accept(made(pcrs=pcrs(PCR4=None)), images=[named]))


def test_pcrs_of_two_images_are_not_mixed() -> None:
    other = image(name="worker 2.0", pcrs={"0": hex_of(0xE0), "1": hex_of(0xE1), "2": hex_of(0xE2)})
    mixed = made(pcrs=pcrs(PCR2=b"\xe2" * 48))
    refused(Reason.MEASUREMENT, lambda: accept(mixed, images=[image(), other]))


def test_an_older_image_is_accepted_until_its_grace_period_ends() -> None:
    assert accept(images=[image(until=NOW + 60)]).not_after == NOW + 60
    error = refused(Reason.MEASUREMENT, lambda: accept(images=[image(until=NOW - 1)]))
    assert "grace period" in error.message


def test_a_document_that_names_no_instance_is_refused() -> None:
    refused(Reason.PROVENANCE, lambda: accept(made(module_id="somewhere")))


@pytest.mark.parametrize("member", values())
def test_reference_values_need_every_member(member: str) -> None:
    document = values()
    del document[member]
    with pytest.raises(MalformedError):
        NitroReferenceValues.parse(document)


@pytest.mark.parametrize(
    "change",
    [
        {"images": []},
        {"images": [image(), image()]},
        {"images": [image(name="")]},
        {"images": [image(until=0)]},
        {"images": [image(pcrs={})]},
        {"images": [image(pcrs={"0": hex_of(1), "1": hex_of(1)})]},
        {"images": [image(pcrs={"0": hex_of(0), "1": hex_of(1), "2": hex_of(1)})]},
        {"images": [image(pcrs={"0": hex_of(1), "1": hex_of(1), "2": hex_of(1), "8": hex_of(0)})]},
        {"images": [image(pcrs={"0": hex_of(1), "1": hex_of(1), "2": hex_of(1), "32": hex_of(1)})]},
        {"roots": [], "development_roots": []},
        {"roots": ["ab" * 32]},
        {"development_roots": [AWS]},
        {"max_document_age": 0},
        {"max_document_age": 3 * HOUR + 1},
        {"unknown": 1},
    ],
)
def test_reference_values_that_say_less_or_other_do_not_load(change: dict[str, object]) -> None:
    with pytest.raises(MalformedError):
        NitroReferenceValues.parse(values(**change))


def test_a_verdict_tells_genuine_from_acceptable() -> None:
    reference = NitroReferenceValues.parse(values())

    def reason(document: bytes, **options: Any) -> tuple[bool, bool, str]:
        verdict = judge_nitro(document, now=NOW, **({"reference": reference} | options))
        return verdict.ok, verdict.verified, verdict.reason

    assert reason(made(), expected_report_data=REPORT_DATA) == (True, True, "")
    assert reason(made(), expected_report_data=bytes(64)) == (False, True, "BINDING")
    assert reason(made(pcrs=pcrs(PCR0=bytes(48)))) == (False, True, "DEBUG_ENABLED")
    assert reason(made(pcrs=pcrs(PCR1=b"\x01" * 48))) == (False, True, "MEASUREMENT")
    assert reason(made(key=new_key())) == (False, False, "SIGNATURE")
    assert reason(made(), reference=None) == (False, False, "ROOT_NOT_PINNED")


# Anything at all


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_raise_nothing_but_ours(data: bytes) -> None:
    for document in (data, PREFIX + data):
        with pytest.raises(KeyquorumError):
            verify(document)


PREFIX = cbor2.dumps([PROTECTED, {}])[:1].replace(b"\x82", b"\x84") + cbor2.dumps(PROTECTED) + b"\xa0"
ITEMS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=60) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.integers(0, 40) | st.text(max_size=6), inner),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(nitro_vendor().members())), ITEMS)
def test_any_member_raises_nothing_but_ours(member: str, value: Any) -> None:
    try:
        verify(made(**{member: value}))
    except KeyquorumError:
        return
    assert member in ("public_key", "user_data", "nonce", "module_id")
