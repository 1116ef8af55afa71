"""OCSP responses (RFC 6960) for the certificates of GPUs and RIMs: that a certificate was not revoked, and when.

Responses travel with the evidence, so that nobody has to be asked. Which certificates need one is the caller's policy;
one that is there is always verified. Checks of :func:`verify_revocation`, in order:

1. each response is one successful response about one certificate                           ``MALFORMED``
2. it is about a certificate of the chains at hand, by serial number and the issuer's name and key; no two are about
   one certificate                                                                          ``PROVENANCE``
3. it is signed by that certificate's issuer, or by a responder that the issuer certified for it: issued directly,
   extended key usage OCSP signing, valid at ``now``, no CA                                 ``SIGNATURE``
4. now is between this update and next update; without a next update an hour is assumed, as NVIDIA's verifier does; no
   update is older than ``max_age``                                      ``NOT_YET_VALID``, ``STALE``
5. the certificate is good                                                ``REVOKED``, ``PROVENANCE``

A request's nonce is not looked at: a custodian asks for nothing, and the times bound the age. The certificate ids may
be SHA-1, as RFC 5019 wants them: they say which certificate is meant, and the signature says who says so. A delegated
responder's own revocation is not asked about; its certificate is short-lived instead, as RFC 6960 §4.2.2.2.1 allows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, SignatureAlgorithmOID

from keyquorum_core.attestation.nvidia_certificates import Certificate
from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = ["MAX_AGE", "Revocation", "looks_like_ocsp", "require_responses", "verify_revocation"]

MAX_AGE = 7 * 86400
"""Seconds: no response is believed longer than this after its update."""

_MAX_BYTES = 16 << 10
_MAX_RESPONSES = 128
_ASSUMED_NEXT_UPDATE = 3600
_FOREVER = 253402300799  # 9999-12-31T23:59:59Z, as certificates say it
_SIGNATURE_TAG = b"\x03"  # BIT STRING
_HASHES = (hashes.SHA1, hashes.SHA256, hashes.SHA384)


@dataclass(frozen=True, slots=True)
class Revocation:
    """The certificates that responses call good, and how long they do."""

    good: frozenset[bytes]
    """DER of the certificates."""
    not_before: int
    not_after: int
    """Unix seconds: the window common to all responses; without bounds where there are none."""


def looks_like_ocsp(data: bytes) -> bool:
    """Whether DER begins as an OCSP response does, with a status: for sorting, never a decision."""
    header = 4 if data[1:2] == b"\x82" else 3 if data[1:2] == b"\x81" else 2
    return data[:1] == b"\x30" and data[header : header + 2] == b"\x0a\x01"


def verify_revocation(
    responses: Sequence[bytes],
    chains: Iterable[Sequence[Certificate]],
    *,
    now: int,
    max_age: int = MAX_AGE,
) -> Revocation:
    """Verify responses (DER) about certificates of these chains, each leaf first, at ``now`` (unix seconds).

    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    if len(responses) > _MAX_RESPONSES:
        raise _malformed(f"at most {_MAX_RESPONSES} responses", len(responses))
    pairs: dict[bytes, tuple[Certificate, Certificate]] = {
        certificate.x509.public_bytes(Encoding.DER): (certificate, issuer)
        for chain in chains
        for certificate, issuer in pairwise(chain)
    }
    good: set[bytes] = set()
    not_before, not_after = 0, _FOREVER
    for data in responses:
        response, der = _parse(data, pairs)
        if der in good:
            raise RefusedError(
                Reason.PROVENANCE,
                "two OCSP responses are about one certificate",
                expected="one for each",
                actual=pairs[der][0].common_name,
            )
        certificate, issuer = pairs[der]
        _check_signature(response, issuer, now)
        start, end = _check_times(response, certificate, now, max_age)
        _check_status(response, certificate)
        good.add(der)
        not_before, not_after = max(not_before, start), min(not_after, end)
    return Revocation(frozenset(good), not_before, not_after)


def require_responses(revocation: Revocation, certificates: Iterable[Certificate]) -> None:
    """Raises :class:`RefusedError` ``PROVENANCE`` where a certificate has no response that calls it good."""
    for each in certificates:
        if each.x509.public_bytes(Encoding.DER) not in revocation.good:
            raise RefusedError(
                Reason.PROVENANCE,
                "a certificate comes without an OCSP response, and the reference values require one",
                expected="a response for every certificate but the firmware's and the root's",
                actual=each.common_name,
                next_step="fetch OCSP responses and send them with the endorsements",
            )


def _parse(data: bytes, pairs: Mapping[bytes, tuple[Certificate, Certificate]]) -> tuple[ocsp.OCSPResponse, bytes]:
    """Checks 1 and 2."""
    if len(data) > _MAX_BYTES:
        raise _malformed(f"at most {_MAX_BYTES} bytes", len(data))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            response = ocsp.load_der_ocsp_response(data)
            if response.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
                raise _malformed("a successful response", response.response_status.name)
            if len(list(response.responses)) != 1:
                raise _malformed("a response about one certificate", "about several")
            algorithm = response.hash_algorithm
            if not isinstance(algorithm, _HASHES):
                raise _malformed("a certificate id by SHA-1, SHA-256 or SHA-384", algorithm.name)
            named = (response.serial_number, response.issuer_name_hash, response.issuer_key_hash)
            unknown_critical = any(each.critical for each in (*response.extensions, *response.single_extensions))
            # Nobody signs how many bits of the signature's BIT STRING are unused, and the parser takes several numbers
            # where the last ones are zero; DER (X.690 §11.2) has the one number 0 for whole bytes.
            whole = _SIGNATURE_TAG + bytes([len(response.signature) + 1, 0]) + response.signature
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension) as error:
        raise _malformed("an OCSP response in DER", type(error).__name__) from None
    if unknown_critical:
        raise _malformed("no critical extension", "one")
    if whole not in data:
        raise _malformed("a signature of whole bytes", "another encoding")
    for der, (certificate, issuer) in pairs.items():
        if named == (certificate.x509.serial_number, *_issuer_hashes(issuer, algorithm)):
            return response, der
    raise RefusedError(
        Reason.PROVENANCE,
        "an OCSP response is about a certificate that is not in the chains",
        expected="a certificate of the evidence or of a RIM",
        actual=f"serial number {named[0]:x}",
    )


def _issuer_hashes(issuer: Certificate, algorithm: hashes.HashAlgorithm) -> tuple[bytes, bytes]:
    """Of the issuer's name, and of its key as the bits inside SubjectPublicKeyInfo (RFC 6960 §4.1.1)."""
    digests = []
    for value in (
        issuer.x509.subject.public_bytes(),
        issuer.key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
    ):
        digest = hashes.Hash(algorithm)
        digest.update(value)
        digests.append(digest.finalize())
    return digests[0], digests[1]


def _check_signature(response: ocsp.OCSPResponse, issuer: Certificate, now: int) -> None:
    """Check 3."""
    refusal = RefusedError(
        Reason.SIGNATURE,
        "an OCSP response is not signed by who may",
        expected=f"{issuer.common_name}, or a responder that it certified for OCSP signing",
        actual="another, or a signature that does not verify",
    )
    if response.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA384:
        raise refusal
    keys = [issuer.key]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            responders = response.certificates
            keys += [key for each in responders if (key := _responder_key(each, issuer, now)) is not None]
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion):
            raise refusal from None
    for key in keys:
        try:
            key.verify(response.signature, response.tbs_response_bytes, ec.ECDSA(hashes.SHA384()))
        except InvalidSignature:
            continue
        return
    raise refusal


def _responder_key(responder: x509.Certificate, issuer: Certificate, now: int) -> ec.EllipticCurvePublicKey | None:
    """The key of a delegated responder (RFC 6960 §4.2.2.2), or ``None`` where the certificate makes it none."""
    try:
        responder.verify_directly_issued_by(issuer.x509)
        usage = responder.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        key = responder.public_key()
    except (InvalidSignature, x509.ExtensionNotFound, ValueError, TypeError, UnsupportedAlgorithm):
        return None
    try:
        is_ca = responder.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_ca = False
    in_time = responder.not_valid_before_utc.timestamp() <= now <= responder.not_valid_after_utc.timestamp()
    if ExtendedKeyUsageOID.OCSP_SIGNING not in usage or is_ca or not in_time:
        return None
    return key if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp384r1" else None


def _check_times(response: ocsp.OCSPResponse, certificate: Certificate, now: int, max_age: int) -> tuple[int, int]:
    """Check 4. Returns the response's window."""
    start = int(response.this_update_utc.timestamp())
    next_update = response.next_update_utc
    end = int(next_update.timestamp()) if next_update is not None else start + _ASSUMED_NEXT_UPDATE
    end = min(end, start + max_age)
    if now < start:
        raise RefusedError(
            Reason.NOT_YET_VALID,
            f"the OCSP response for {certificate.common_name} is from the future",
            expected=f"an update at or before {now}",
            actual=start,
        )
    if now > end:
        raise RefusedError(
            Reason.STALE,
            f"the OCSP response for {certificate.common_name} is out of date",
            expected=f"a time at or before {end}",
            actual=now,
            next_step="fetch OCSP responses anew",
        )
    return start, end


def _check_status(response: ocsp.OCSPResponse, certificate: Certificate) -> None:
    """Check 5."""
    status = response.certificate_status
    if status is ocsp.OCSPCertStatus.REVOKED:
        because = response.revocation_reason
        raise RefusedError(
            Reason.REVOKED,
            f"the certificate {certificate.common_name!r} is revoked",
            expected="good",
            actual=f"revoked, {because.name if because is not None else 'no reason given'}",
        )
    if status is not ocsp.OCSPCertStatus.GOOD:
        raise RefusedError(
            Reason.PROVENANCE,
            f"the responder does not know the certificate {certificate.common_name!r}",
            expected="good",
            actual=status.name.lower(),
        )


def _malformed(expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, "not an OCSP response to go by", expected=expected, actual=actual)
