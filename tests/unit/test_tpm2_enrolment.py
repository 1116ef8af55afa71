"""Enrolment: an attestation key is accepted only from the genuine TPM that holds it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ObjectIdentifier
from hypothesis import given
from hypothesis import strategies as st

from keyquorum_core.attestation.tpm2_credential import Credential, activate_credential, kdfa, kdfe, make_credential
from keyquorum_core.attestation.tpm2_endorsement import verify_ek_certificates
from keyquorum_core.attestation.tpm2_enrolment import ENROLMENT_SECONDS, Candidate, challenge
from keyquorum_core.attestation.tpm2_structures import HASHES, Public, parse_public
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from tests.support.soft_tpm import soft_key
from tests.support.tpm_maker import DAY, EK_KINDS, NOW, TPM_NAMES, Maker, ek_area, maker

SHA256 = next(each for each in HASHES if each.name == "sha256")
SECRET = bytes(range(32))


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


# Credentials


def ek(kind: str = "rsa") -> Public:
    return parse_public(ek_area(kind))


NAME = parse_public(soft_key("rsa", 7).area()).name


@pytest.mark.parametrize("kind", EK_KINDS)
def test_only_the_tpm_with_both_keys_opens_a_credential(kind: str) -> None:
    key, area = soft_key(kind).private, ek(kind)
    credential = make_credential(area, NAME, SECRET)
    assert activate_credential(key, area, NAME, credential) == SECRET
    other_name = NAME[:-1] + bytes([NAME[-1] ^ 1])
    refused(Reason.UNSEAL, lambda: activate_credential(key, area, other_name, credential))
    refused(Reason.UNSEAL, lambda: activate_credential(soft_key(kind, 1).private, area, NAME, credential))


@pytest.mark.parametrize("kind", ["rsa", "p256"])
def test_an_altered_credential_does_not_open(kind: str) -> None:
    key, area = soft_key(kind).private, ek(kind)
    credential = make_credential(area, NAME, SECRET)
    for name in ("id_object", "encrypted_secret"):
        raw: bytes = getattr(credential, name)
        for bit in range(0, 8 * len(raw), 7):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            changed = replace(credential, **{name: bytes(flipped)})
            refused(Reason.UNSEAL, lambda changed=changed: activate_credential(key, area, NAME, changed))  # type: ignore[misc]
        for wrong in (b"", raw[:-1], raw + b"\0"):
            changed = replace(credential, **{name: wrong})
            refused(Reason.UNSEAL, lambda changed=changed: activate_credential(key, area, NAME, changed))  # type: ignore[misc]


def test_the_file_of_tpm2_tools_is_pinned() -> None:
    assert Credential(b"\0\1a", b"\0\1b").to_tools_file().hex() == "badcc0de" "00000001" "000161" "000162"  # fmt: skip


def test_a_credential_needs_a_secret_of_the_right_size() -> None:
    for secret, name in ((bytes(15), NAME), (bytes(33), NAME), (SECRET, b""), (SECRET, bytes(67))):
        with pytest.raises(MalformedError):
            make_credential(ek(), name, secret)


@given(st.binary(min_size=16, max_size=32), st.binary(max_size=40), st.binary(max_size=40), st.integers(1, 96))
def test_key_derivation_agrees_with_another_implementation(key: bytes, u: bytes, v: bytes, size: int) -> None:
    counter = KBKDFHMAC(
        algorithm=hashes.SHA256(),
        mode=Mode.CounterMode,
        length=size,
        rlen=4,
        llen=4,
        location=CounterLocation.BeforeFixed,
        label=b"STORAGE",
        context=u + v,
        fixed=None,
    )
    assert kdfa(SHA256, key, "STORAGE", u, v, 8 * size) == counter.derive(key)
    one_step = ConcatKDFHash(hashes.SHA256(), size, b"IDENTITY\0" + u + v)
    assert kdfe(SHA256, key, "IDENTITY", u, v, 8 * size) == one_step.derive(key)


def test_the_rng_gives_the_seed_and_nothing_secret_is_shown() -> None:
    asked: list[int] = []

    def rng(size: int) -> bytes:
        asked.append(size)
        return bytes(size)

    candidate = maker().candidate()
    _, pending = challenge(candidate, pinned_roots={maker().root}, now=NOW, rng=rng)
    assert asked == [32, 32]
    assert pending.secret == bytes(32)
    assert "secret" not in repr(pending)


# The EK's certificates


def verify(one: Maker, *, now: int = NOW, certificates: Sequence[bytes] | None = None, root: str = "") -> object:
    chain = one.certificates() if certificates is None else certificates
    return verify_ek_certificates(chain, pinned_roots={root or one.root}, now=now)


@pytest.mark.parametrize("kind", EK_KINDS)
def test_an_ek_certificate_names_its_tpm(kind: str) -> None:
    one = maker(ek_kind=kind, ek_usage=("key_encipherment" if kind.startswith("rsa") else "key_agreement",))
    ek_certificate, issuing, root = one.certificates()
    verified = verify_ek_certificates((root, ek_certificate, issuing), pinned_roots={one.root}, now=NOW)
    assert verified.fingerprint == soft_key(kind).fingerprint
    assert (verified.manufacturer, verified.model, verified.version) == ("id:4B510000", "soft", "id:00010001")
    assert (verified.root, verified.not_before, verified.not_after) == (one.root, NOW - DAY, NOW + DAY)


def test_certificates_by_an_rsa_authority_in_pem_verify() -> None:
    one = maker(root_key=soft_key("rsa", 9), issuing_key=soft_key("rsa3072", 9), hash=hashes.SHA384)
    pem = b"".join(x509.load_der_x509_certificate(each).public_bytes(Encoding.PEM) for each in one.certificates())
    assert verify(one, certificates=[pem])


@pytest.mark.parametrize(
    "changes",
    [
        {"path_length": 0},
        {"issuing_usage": ("crl_sign",)},
        {"ek_usage": None},
        {"ek_usage": ("key_encipherment", "digital_signature")},
        {"ek_usage": ("crl_sign",)},
        {"ek_extended": None},
        {"ek_extended": ObjectIdentifier("2.23.133.8.3")},
        {"ek_names": ()},
        {"ek_names": tuple(TPM_NAMES.items())[:2]},
        {"ek_extra": x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00")},
        {"issuing_ca": False},
        {"issuing_key": soft_key("rsa1024")},
    ],
)
def test_certificates_that_are_no_ek_chain_are_refused(changes: dict[str, object]) -> None:
    refused(Reason.CHAIN, lambda: verify(maker(**changes)))


def test_a_certificate_signed_over_sha1_is_refused() -> None:
    one = maker(issuing_key=soft_key("rsa", 9))
    leaf, issuing, root = one.certificates()
    by_sha1 = leaf.replace(bytes.fromhex("2a864886f70d01010b"), bytes.fromhex("2a864886f70d010105"))
    error = refused(Reason.CHAIN, lambda: verify(one, certificates=(by_sha1, issuing, root)))
    assert error.expected == "SHA-256 or better"


def test_a_chain_to_a_root_that_is_not_pinned_is_refused() -> None:
    one = maker()
    refused(Reason.ROOT_NOT_PINNED, lambda: verify(one, root=one.issuing_key.fingerprint))
    refused(Reason.ROOT_NOT_PINNED, lambda: verify_ek_certificates(one.certificates(), pinned_roots=(), now=NOW))


def test_a_root_of_the_same_name_and_another_key_is_refused() -> None:
    one, twin = maker(), maker(root_key=soft_key("p384", 10))
    leaf, issuing, _ = one.certificates()
    refused(Reason.ROOT_NOT_PINNED, lambda: verify(one, certificates=(leaf, issuing, twin.certificates()[2])))
    refused(Reason.CHAIN, lambda: verify(one, certificates=(*twin.certificates()[:2], one.certificates()[2])))
    other = maker(issuing_key=soft_key("p256", 10))
    refused(Reason.CHAIN, lambda: verify(one, certificates=(leaf, *other.certificates()[1:])))


def test_too_few_too_many_and_repeated_certificates_are_refused() -> None:
    one = maker()
    leaf, issuing, root = one.certificates()
    for certificates in ((), (leaf,), (leaf, issuing), (leaf, root), (leaf, issuing, root, root), (issuing, root),
                         (leaf, leaf, issuing, root), (leaf, issuing, issuing, root), (leaf,) * 9):  # fmt: skip
        refused(Reason.CHAIN, lambda chain=certificates: verify(one, certificates=chain))  # type: ignore[misc]


def test_certificates_that_do_not_parse_are_malformed() -> None:
    one = maker()
    leaf, issuing, root = one.certificates()
    for certificates in ((leaf[:-1], issuing, root), (leaf + b"\0", issuing, root), (b"", issuing, root)):
        refused(Reason.MALFORMED, lambda chain=certificates: verify(one, certificates=chain))  # type: ignore[misc]
    refused(Reason.TOO_LARGE, lambda: verify(one, certificates=(bytes(1 << 17),)))


def test_expired_and_not_yet_valid_certificates_are_refused() -> None:
    one = maker()
    assert verify(one, now=NOW + DAY)
    refused(Reason.EXPIRED, lambda: verify(one, now=NOW + DAY + 1))
    refused(Reason.NOT_YET_VALID, lambda: verify(one, now=NOW - DAY - 1))


def test_every_flipped_bit_of_an_ek_certificate_is_refused() -> None:
    one = maker()
    leaf, issuing, root = one.certificates()
    for bit in range(0, 8 * len(leaf), 3):
        flipped = bytearray(leaf)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyquorumError):
            verify(one, certificates=(bytes(flipped), issuing, root))


# Enrolment


@pytest.mark.parametrize("kind", ["rsa", "p384"])
def test_an_ak_in_the_tpm_of_its_ek_is_enrolled(kind: str) -> None:
    one = maker(ek_kind=kind, ek_usage=("key_encipherment" if kind == "rsa" else "key_agreement",))
    credential, pending = challenge(one.candidate(), pinned_roots={one.root}, now=NOW)
    answer = activate_credential(soft_key(kind).private, ek(kind), NAME, credential)
    enrolled = pending.confirm(answer, now=NOW + 1)
    assert enrolled.ak_fingerprint == hashlib.sha256(soft_key("rsa", 7).spki).hexdigest()
    assert enrolled.ak_name == NAME.hex()
    assert enrolled.ek.fingerprint == soft_key(kind).fingerprint


def test_another_answer_or_a_late_one_is_refused() -> None:
    one = maker()
    _, pending = challenge(one.candidate(), pinned_roots={one.root}, now=NOW)
    for answer in (b"", bytes(32), pending.secret[:-1], pending.secret + b"\0"):
        refused(Reason.PROVENANCE, lambda answer=answer: pending.confirm(answer, now=NOW))  # type: ignore[misc]
    refused(Reason.STALE, lambda: pending.confirm(pending.secret, now=NOW + ENROLMENT_SECONDS + 1))
    refused(Reason.STALE, lambda: pending.confirm(pending.secret, now=NOW - 1))


def test_a_candidate_whose_parts_do_not_belong_together_is_refused() -> None:
    one = maker()
    genuine = one.candidate()
    for changed, reason in (
        (replace(genuine, ek_public=ek_area("rsa", 1)), Reason.CHAIN),
        (replace(genuine, ek_public=ek_area("p256")), Reason.CHAIN),
        (replace(genuine, ek_public=soft_key().area()), Reason.PROVENANCE),
        (replace(genuine, ak_public=ek_area("rsa", 1)), Reason.PROVENANCE),
        (replace(genuine, ak_public=b""), Reason.MALFORMED),
        (replace(genuine, ek_public=b""), Reason.MALFORMED),
        (replace(genuine, ek_certificates=()), Reason.CHAIN),
    ):
        refused(reason, lambda changed=changed: challenge(changed, pinned_roots={one.root}, now=NOW))  # type: ignore[misc]
    refused(Reason.ROOT_NOT_PINNED, lambda: challenge(genuine, pinned_roots=(), now=NOW))
    refused(Reason.EXPIRED, lambda: challenge(genuine, pinned_roots={one.root}, now=NOW + 2 * DAY))


def test_a_public_area_with_another_keys_attributes_gets_a_credential_that_does_not_open() -> None:
    """A worker that lies about its AK's attributes names another Name, and its TPM refuses."""
    one = maker()
    honest = parse_public(soft_key("rsa", 7).area(0x00040072))  # not restricted: it would sign anything
    credential, _ = challenge(one.candidate(), pinned_roots={one.root}, now=NOW)
    with pytest.raises(RefusedError) as caught:
        activate_credential(soft_key().private, ek(), honest.name, credential)
    assert caught.value.reason is Reason.UNSEAL


@given(st.lists(st.binary(max_size=60), max_size=4), st.binary(max_size=60), st.binary(max_size=60))
def test_any_candidate_is_judged_with_the_typed_error(
    certificates: list[bytes], ek_public: bytes, ak_public: bytes
) -> None:
    with pytest.raises(KeyquorumError):
        challenge(Candidate(tuple(certificates), ek_public, ak_public), pinned_roots={maker().root}, now=NOW)
    with pytest.raises(KeyquorumError):
        verify_ek_certificates(certificates, pinned_roots={maker().root}, now=NOW)
