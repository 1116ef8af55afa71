"""AWS Nitro Enclaves attestation documents: verification (docs/spec/evidence-nitro.md).

Is the document genuine? :func:`verify` makes these checks, in this order, and refuses at the first that fails:

1. form: exactly one COSE_Sign1 under ES384, a payload of exactly AWS's nine members within their bounds, SHA-384,
   PCR0, PCR1 and PCR2 present (:mod:`~keyquorum_core.attestation.nitro_document`)              ``MALFORMED``
2. the root, first in the bundle, is pinned by SHA-256 of its SubjectPublicKeyInfo         ``ROOT_NOT_PINNED``
3. each key is on P-384, and each certificate is signed with ECDSA and SHA-384 by the one before it, the root by
   itself; names, CA flag, path length, key usage and critical extensions agree with the place          ``CHAIN``
4. all certificates are valid at the document's own time                      ``NOT_YET_VALID``, ``EXPIRED``
5. the signature, by the key of the last certificate                                               ``SIGNATURE``
6. the document's time is not after ``now``, but for a minute between clocks                   ``NOT_YET_VALID``
7. all certificates are valid at ``now``; the one that signs is for three hours      ``NOT_YET_VALID``, ``EXPIRED``

Whether a genuine document is acceptable is :mod:`~keyquorum_core.attestation.nitro_appraisal`'s question.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import SignatureAlgorithmOID

from keyquorum_core.attestation.nitro_document import Document, parse_document
from keyquorum_core.attestation.roots import AWS_NITRO_ROOTS
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.names import within

__all__ = ["CLOCK_SKEW", "Document", "VerifiedDocument", "parse_document", "verify"]

CLOCK_SKEW = 60
"""Seconds by which a document may be ahead of this clock."""

_SCALAR_BYTES = 48


@dataclass(frozen=True, slots=True)
class VerifiedDocument:
    """A genuine document with what its certificates add."""

    document: Document
    root: str
    """SHA-256 of the root's SubjectPublicKeyInfo, hex."""
    development: bool
    """The root is none of AWS's."""
    not_before: int
    not_after: int
    """Unix seconds: when all certificates are valid."""

    def claims(self) -> dict[str, object]:
        """What the document says, for people and ``--json``."""
        document = self.document
        return {
            "root": self.root,
            "development": self.development,
            "module_id": document.module_id,
            "instance_id": document.instance_id,
            "timestamp": document.timestamp,
            "debug": not any(document.pcrs[0]),
            "measurement": document.pcrs[0].hex(),
            "pcrs": {str(index): value.hex() for index, value in sorted(document.pcrs.items()) if any(value)},
            "public_key": _shown(document.public_key),
            "user_data": _shown(document.user_data),
            "nonce": _shown(document.nonce),
            "certificates_not_after": self.not_after,
        }


def verify(document: bytes, *, pinned_roots: Collection[str], now: int) -> VerifiedDocument:
    """Verify a COSE_Sign1 structure at ``now`` (unix seconds).

    ``pinned_roots`` are SHA-256 digests of SubjectPublicKeyInfo in lower-case hex.
    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    within(now, "moment of verification")
    parsed = parse_document(document)
    chain = _verify_chain((*parsed.cabundle, parsed.certificate), frozenset(pinned_roots))
    _check_validity(chain, parsed.timestamp, "when the document was made")
    r = int.from_bytes(parsed.signature[:_SCALAR_BYTES], "big")
    s = int.from_bytes(parsed.signature[_SCALAR_BYTES:], "big")
    try:
        chain.key.verify(encode_dss_signature(r, s), parsed.to_be_signed(), ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        raise RefusedError(
            Reason.SIGNATURE, "the document's signature does not verify with the key of its certificate"
        ) from None
    if parsed.timestamp > now + CLOCK_SKEW:
        raise RefusedError(
            Reason.NOT_YET_VALID,
            "the document is from the future",
            expected=f"at or before {now + CLOCK_SKEW}",
            actual=parsed.timestamp,
        )
    _check_validity(chain, max(now, parsed.timestamp), "now")
    return VerifiedDocument(parsed, chain.root, chain.root not in AWS_NITRO_ROOTS, chain.not_before, chain.not_after)


@dataclass(frozen=True, slots=True)
class _Chain:
    key: ec.EllipticCurvePublicKey
    root: str
    not_before: int
    not_after: int


@dataclass(frozen=True, slots=True)
class _Certificate:
    parsed: x509.Certificate
    key: ec.EllipticCurvePublicKey
    is_ca: bool
    path_length: int | None
    may_sign_certificates: bool
    may_sign_data: bool
    unknown_critical: bool


# An enclave's certificate serves for hours, and five P-384 verifications cost more than the document's own.
@lru_cache(maxsize=128)
def _verify_chain(certificates: tuple[bytes, ...], pinned_roots: frozenset[str]) -> _Chain:
    """Checks 2 and 3; ``certificates`` from the root down."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the parser only warns of is judged by signature and fingerprint
            chain = [_facts(each) for each in certificates]
    except (
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    ) as error:
        raise MalformedError(
            Reason.MALFORMED,
            "a certificate in the document cannot be read",
            expected="X.509 in DER, with a key on P-384",
            actual=type(error).__name__,
        ) from None
    spki = chain[0].key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    root = hashlib.sha256(spki).hexdigest()
    if root not in pinned_roots:
        raise RefusedError(
            Reason.ROOT_NOT_PINNED,
            "the document chains to a root that is not pinned",
            expected=", ".join(sorted(pinned_roots)) or "no root is pinned",
            actual=root,
        )
    below = len(chain) - 1
    for depth, certificate in enumerate(chain):
        issuer = chain[max(depth - 1, 0)]
        leaf = depth == below
        # Intermediates between a certificate and the leaf count against its path length (RFC 5280 §4.2.1.9).
        too_long = certificate.path_length is not None and certificate.path_length < below - depth - 1
        if certificate.unknown_critical or certificate.is_ca is leaf or (not leaf and too_long):
            raise _broken(depth, "a CA within its path length" if not leaf else "no CA", "another, or unknown critical")
        if not (certificate.may_sign_data if leaf else certificate.may_sign_certificates):
            raise _broken(depth, "a key usage that lets it sign here", "another")
        if certificate.parsed.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA384:
            raise _broken(depth, "ECDSA with SHA-384", "another signature algorithm")
        try:
            certificate.parsed.verify_directly_issued_by(issuer.parsed)
        except (InvalidSignature, ValueError, TypeError):
            raise _broken(depth, "issued by the one before it", "a name or signature that differs") from None
    return _Chain(
        key=chain[-1].key,
        root=root,
        not_before=max(int(each.parsed.not_valid_before_utc.timestamp()) for each in chain),
        not_after=min(int(each.parsed.not_valid_after_utc.timestamp()) for each in chain),
    )


def _facts(der: bytes) -> _Certificate:
    certificate = x509.load_der_x509_certificate(der)
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise ValueError
    is_ca = may_sign_certificates = may_sign_data = unknown_critical = False
    path_length = None
    for extension in certificate.extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints):
            is_ca, path_length = value.ca, value.path_length
        elif isinstance(value, x509.KeyUsage):
            may_sign_certificates, may_sign_data = value.key_cert_sign, value.digital_signature
        else:
            unknown_critical |= extension.critical
    return _Certificate(certificate, key, is_ca, path_length, may_sign_certificates, may_sign_data, unknown_critical)


def _check_validity(chain: _Chain, at: int, when: str) -> None:
    if not chain.not_before <= at <= chain.not_after:
        early = at < chain.not_before
        raise RefusedError(
            Reason.NOT_YET_VALID if early else Reason.EXPIRED,
            f"a certificate of the document {'is not valid yet' if early else 'has expired'}, {when}",
            expected=f"a time in {chain.not_before} … {chain.not_after}",
            actual=at,
            next_step="" if early else "have the enclave make a new document",
        )


def _broken(depth: int, expected: str, actual: str) -> RefusedError:
    return RefusedError(
        Reason.CHAIN, f"certificate {depth} below the root is out of place", expected=expected, actual=actual
    )


def _shown(value: bytes | None) -> str | None:
    return None if value is None else value.hex()
