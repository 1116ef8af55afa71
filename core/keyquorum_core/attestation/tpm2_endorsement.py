"""The endorsement key's certificate: what a TPM's maker says of it (TCG EK Credential Profile 2.5; RFC 5280).

Checks of :func:`verify_ek_certificates`, in order; each one refuses, none can be turned off:

1. 2 … 8 certificates that parse, one of them no authority: the EK's               ``MALFORMED``, ``CHAIN``
2. each was issued by exactly one of the others up to one that issued itself, and no certificate is left over  ``CHAIN``
3. the last one's key is pinned, by SHA-256 of its SubjectPublicKeyInfo            ``ROOT_NOT_PINNED``
4. every signature: RSA or ECDSA with SHA-256 or better, keys of at least RSA-2048 or P-256       ``CHAIN``
5. the issuers are CAs that may sign certificates, within their path lengths; no unknown critical extension ``CHAIN``
6. the EK's certificate: not a CA; may be used to encipher or agree on keys; extended key usage
   ``tcg-kp-EKCertificate``; a subject alternative name with the TPM's maker, model and version   ``CHAIN``
7. all are valid at ``now``                                             ``NOT_YET_VALID``, ``EXPIRED``

Revocation lists of TPM makers are not read.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = ["EkCertificate", "root_fingerprint", "verify_ek_certificates"]

_MAX_CERTIFICATES = 8
_MAX_BYTES = 64 << 10
_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_EK_USAGE = "2.23.133.8.1"
_TPM_ATTRIBUTES = {"2.23.133.2.1": "manufacturer", "2.23.133.2.2": "model", "2.23.133.2.3": "version"}
_UNDERSTOOD = (x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage, x509.SubjectAlternativeName)


@dataclass(frozen=True, slots=True)
class EkCertificate:
    """A verified EK certificate."""

    spki: bytes
    """SubjectPublicKeyInfo of the EK, DER."""
    fingerprint: str
    """SHA-256 of ``spki``, hex."""
    root: str
    """SHA-256 of the root's SubjectPublicKeyInfo, hex."""
    manufacturer: str
    """As in the certificate: ``id:`` and the maker's TCG vendor id in hex."""
    model: str
    version: str
    not_before: int
    not_after: int
    """Unix seconds: the window common to all certificates."""


def verify_ek_certificates(certificates: Sequence[bytes], *, pinned_roots: Collection[str], now: int) -> EkCertificate:
    """Verify an EK certificate and its issuers (DER, or PEM with one or more in it; in any order) to a pinned root.

    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    if sum(len(each) for each in certificates) > _MAX_BYTES:
        raise MalformedError(
            Reason.TOO_LARGE, "the EK's certificates are too large", expected=f"at most {_MAX_BYTES} bytes"
        )
    with _malformed():
        found = _parse(certificates)
        if not 2 <= len(found) <= _MAX_CERTIFICATES:
            raise _broken("certificates", f"2 … {_MAX_CERTIFICATES}, the EK's and its issuers'", f"{len(found)}")
        return _verify(found, frozenset(pinned_roots), now)


def root_fingerprint(certificate: bytes) -> str:
    """What ``pinned_roots`` hold of a root certificate (DER or PEM): SHA-256 of its SubjectPublicKeyInfo, hex.

    Raises :class:`MalformedError`, also for more than one certificate.
    """
    with _malformed():
        (found,) = _parse([certificate])
        return hashlib.sha256(_spki(found)).hexdigest()


@contextmanager
def _malformed() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the parser only warns of is judged by key and signature
            yield
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
            "a certificate of the EK is not one",
            expected="X.509 in DER or PEM",
            actual=type(error).__name__,
        ) from None


def _verify(certificates: list[x509.Certificate], pinned_roots: frozenset[str], now: int) -> EkCertificate:
    path = _path(certificates)
    leaf, root = path[0], path[-1]
    root_spki = hashlib.sha256(_spki(root)).hexdigest()
    if root_spki not in pinned_roots:
        raise RefusedError(
            Reason.ROOT_NOT_PINNED,
            "the EK's certificates chain to a root that is not pinned",
            expected=", ".join(sorted(pinned_roots)) or "no root is pinned",
            actual=root_spki,
        )
    for depth, (certificate, issuer) in enumerate(zip(path, [*path[1:], root], strict=True)):
        _check_signature(certificate, issuer)
        _check_extensions(certificate)
        if depth:
            _check_authority(certificate, depth - 1)
    maker = _check_ek(leaf)
    not_before = max(int(each.not_valid_before_utc.timestamp()) for each in path)
    not_after = min(int(each.not_valid_after_utc.timestamp()) for each in path)
    if not not_before <= now <= not_after:
        early = now < not_before
        raise RefusedError(
            Reason.NOT_YET_VALID if early else Reason.EXPIRED,
            f"a certificate of the EK {'is not valid yet' if early else 'has expired'}",
            expected=f"a time in {not_before} … {not_after}",
            actual=now,
        )
    spki = _spki(leaf)
    return EkCertificate(
        spki=spki,
        fingerprint=hashlib.sha256(spki).hexdigest(),
        root=root_spki,
        manufacturer=maker["manufacturer"],
        model=maker["model"],
        version=maker["version"],
        not_before=not_before,
        not_after=not_after,
    )


def _parse(certificates: Sequence[bytes]) -> list[x509.Certificate]:
    out: list[x509.Certificate] = []
    for each in certificates:
        if each.lstrip().startswith(b"-----BEGIN"):
            out += x509.load_pem_x509_certificates(each)
        else:
            out.append(x509.load_der_x509_certificate(each))
    return out


def _path(certificates: list[x509.Certificate]) -> list[x509.Certificate]:
    """Check 2, by names: from the EK's certificate up to the root. The signatures are checked afterwards."""
    leaves = [each for each in certificates if not _is_ca(each)]
    if len(leaves) != 1:
        raise _broken("certificates", "one that is no authority: the EK's", f"{len(leaves)}")
    path = leaves
    left = [each for each in certificates if each is not leaves[0]]
    while path[-1].issuer != path[-1].subject:
        issuers = [each for each in left if each.subject == path[-1].issuer]
        if len(issuers) != 1:
            raise _broken("issuer", f"one certificate of {path[-1].issuer.rfc4514_string()[:80]}", f"{len(issuers)}")
        path.append(issuers[0])
        left.remove(issuers[0])
    if left or len(path) < 2:
        raise _broken("certificates", "no other ones than lead to the root", f"{len(left)} left over")
    return path


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _check_signature(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    key = issuer.public_key()
    strong = key.key_size >= 2048 if isinstance(key, rsa.RSAPublicKey) else isinstance(key, ec.EllipticCurvePublicKey)
    if not strong or (isinstance(key, ec.EllipticCurvePublicKey) and key.key_size < 256):
        raise _broken("issuer's key", "RSA from 2048 bits or ECC from P-256", type(key).__name__)
    if not isinstance(certificate.signature_hash_algorithm, _HASHES):
        raise _broken("signature", "SHA-256 or better", str(certificate.signature_algorithm_oid.dotted_string))
    # The parser lets the signature claim unused bits where those are zero: the one unsigned byte that would be free.
    if not certificate.public_bytes(Encoding.DER).endswith(b"\0" + certificate.signature):
        raise _broken("signature", "a whole number of bytes", "unused bits")
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        raise _broken("signature", f"one by {issuer.subject.rfc4514_string()[:80]}", "another") from None


def _check_extensions(certificate: x509.Certificate) -> None:
    for extension in certificate.extensions:
        if extension.critical and not isinstance(extension.value, _UNDERSTOOD):
            raise _broken("critical extension", "one that is understood", extension.oid.dotted_string)


def _check_authority(certificate: x509.Certificate, below: int) -> None:
    """``below``: how many authorities stand between this one and the EK's certificate."""
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        usage = certificate.issuer == certificate.subject  # some makers' roots state no usage at all
    length = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
    if not usage or (length is not None and length < below):
        raise _broken(
            certificate.subject.rfc4514_string()[:80],
            f"a CA that may sign certificates, {below} authorities deep",
            f"may sign {usage}, path length {length}",
        )


def _check_ek(certificate: x509.Certificate) -> dict[str, str]:
    """Check 6. Returns manufacturer, model and version."""
    extensions = certificate.extensions
    try:
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        extended = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as error:
        raise _broken("EK certificate", "key usage, extended key usage, TPM's name", f"no {error.oid}") from None
    if not (usage.key_encipherment or usage.key_agreement) or usage.digital_signature or usage.key_cert_sign:
        raise _broken("EK certificate", "key encipherment or agreement alone", "another key usage")
    if _EK_USAGE not in [each.dotted_string for each in extended]:
        raise _broken("EK certificate", f"extended key usage {_EK_USAGE}", "none such")
    maker: dict[str, str] = {}
    for name in names.get_values_for_type(x509.DirectoryName):
        for attribute in name:
            known = _TPM_ATTRIBUTES.get(attribute.oid.dotted_string)
            if known is not None and known not in maker:
                maker[known] = str(attribute.value)[:64]
    if maker.keys() != set(_TPM_ATTRIBUTES.values()) or not all(maker.values()):
        raise _broken("EK certificate", "the TPM's manufacturer, model and version", ", ".join(sorted(maker)) or "none")
    return maker


def _spki(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _broken(what: str, expected: str, actual: str) -> RefusedError:
    return RefusedError(Reason.CHAIN, f"the EK's certificates are no chain: {what}", expected=expected, actual=actual)
