"""Enrolment of a TPM's attestation key: proof, once, that it lives in a genuine TPM (docs/spec/evidence-tpm2.md).

A quote proves that the holder of an AK made it, and nothing in it says who that is. So an AK is enrolled first::

    worker    → custodian   Candidate: EK certificate and issuers, EK and AK public areas
    custodian → worker      Credential: a fresh secret that only that TPM opens, and only if it holds that very AK
    worker    → custodian   the secret

:func:`challenge` makes the checks before the credential, :meth:`PendingEnrolment.confirm` those after it:

1. both public areas parse; the AK may attest, the EK may receive credentials
                                                               ``MALFORMED``, ``PROVENANCE``, ``SIGNATURE``
2. the EK's certificates chain to a pinned root, are valid at ``now``; reasons of :mod:`.tpm2_endorsement`
3. the certificate is for the EK's public area                                                ``CHAIN``
4. the answer came within ``ENROLMENT_SECONDS``                                               ``STALE``
5. it is the secret                                                                      ``PROVENANCE``

The AK's attributes need no signature: its Name, a digest over them, is what the TPM compares.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from keyquorum_core.attestation.tpm2_credential import Credential, make_credential
from keyquorum_core.attestation.tpm2_endorsement import EkCertificate, verify_ek_certificates
from keyquorum_core.attestation.tpm2_keys import check_ak, check_ek
from keyquorum_core.attestation.tpm2_structures import parse_public
from keyquorum_core.errors import Reason, RefusedError

__all__ = ["ENROLMENT_SECONDS", "Candidate", "EnrolledKey", "PendingEnrolment", "challenge"]

ENROLMENT_SECONDS = 300
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a worker shows of its TPM."""

    ek_certificates: tuple[bytes, ...]
    """The EK's certificate and its issuers', DER or PEM."""
    ek_public: bytes
    """``TPM2B_PUBLIC``."""
    ak_public: bytes
    """``TPM2B_PUBLIC``."""


@dataclass(frozen=True, slots=True)
class EnrolledKey:
    """An AK that was proven to live in a genuine TPM: an entry for the inventory."""

    ak_fingerprint: str
    """SHA-256 of the AK's SubjectPublicKeyInfo, hex: what quotes are looked up by."""
    ak_name: str
    """The AK's Name, hex."""
    ek: EkCertificate
    enrolled_at: int


@dataclass(frozen=True, slots=True)
class PendingEnrolment:
    """What the custodian keeps between challenge and answer. It is for one answer: forget it after either outcome."""

    ak_fingerprint: str
    ak_name: bytes
    ek: EkCertificate
    secret: bytes = field(repr=False)
    asked_at: int

    def confirm(self, answer: bytes, *, now: int) -> EnrolledKey:
        """Raises :class:`RefusedError` ``STALE`` and ``PROVENANCE``."""
        if not self.asked_at <= now <= self.asked_at + ENROLMENT_SECONDS:
            raise RefusedError(
                Reason.STALE,
                "the answer to the credential came too late",
                expected=f"a time in {self.asked_at} … {self.asked_at + ENROLMENT_SECONDS}",
                actual=now,
                next_step="enrol again",
            )
        if not hmac.compare_digest(self.secret, answer):
            raise RefusedError(
                Reason.PROVENANCE,
                "the attestation key is not in the TPM that the endorsement key's certificate names",
                expected="the secret in the credential",
                actual="another answer",
            )
        return EnrolledKey(self.ak_fingerprint, self.ak_name.hex(), self.ek, now)


def challenge(
    candidate: Candidate,
    *,
    pinned_roots: Collection[str],
    now: int,
    rng: Callable[[int], bytes] = secrets.token_bytes,
) -> tuple[Credential, PendingEnrolment]:
    """Check a candidate, and make the credential that proves it.

    ``pinned_roots`` are the TPM makers' root keys, SHA-256 of SubjectPublicKeyInfo in lower-case hex.
    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    ak_area = parse_public(candidate.ak_public)
    ek_area = parse_public(candidate.ek_public)
    ak = check_ak(ak_area)
    ek = check_ek(ek_area)
    certificate = verify_ek_certificates(candidate.ek_certificates, pinned_roots=pinned_roots, now=now)
    if not hmac.compare_digest(certificate.fingerprint, ek.fingerprint):
        raise RefusedError(
            Reason.CHAIN,
            "the certificate is for another endorsement key than the public area",
            expected=certificate.fingerprint,
            actual=ek.fingerprint,
        )
    secret = rng(_SECRET_BYTES)
    credential = make_credential(ek_area, ak_area.name, secret, rng)
    return credential, PendingEnrolment(ak.fingerprint, ak_area.name, certificate, secret, now)
