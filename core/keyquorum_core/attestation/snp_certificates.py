"""AMD's endorsements of a SEV-SNP signing key: VCEK or VLEK, ASK (or ASVK), ARK (57230, §2 and §3).

Checks of :func:`verify_endorsements`, in order; each one refuses, none can be turned off:

1. three certificates, one of each role                                             ``MALFORMED``, ``CHAIN``
2. the ARK's key is pinned, by SHA-256 of its SubjectPublicKeyInfo                  ``ROOT_NOT_PINNED``
3. ARK and ASK hold RSA-4096 keys, are CAs and may sign certificates               ``CHAIN``
4. each issuer name is the subject name above it, and the common names fit together ``CHAIN``
5. RSASSA-PSS with SHA-384 on all three, the ARK's by itself, named alike inside and outside what is signed
                                                                                    ``CHAIN``
6. the signing key is on P-384, and its certificate holds exactly AMD's extensions  ``CHAIN``
7. product name, names in the chain and the pinned root agree on one product        ``CHAIN``

The time does not enter here, so that a verified chain can be kept; the caller makes :meth:`Endorsement.check_validity`
anew each time.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from keyquorum_core.attestation.roots import AMD_ROOTS
from keyquorum_core.attestation.snp_products import Product
from keyquorum_core.attestation.snp_revocation import Issued
from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = [
    "AMD_ARC",
    "CHAIN_PADDING",
    "DEVELOPMENT_PREFIX",
    "Endorsement",
    "SigningKey",
    "Validity",
    "verify_endorsements",
]

AMD_ARC = "1.3.6.1.4.1.3704.1"
DEVELOPMENT_PREFIX = "keyquorum DEVELOPMENT "
"""Begins every common name under a development root, and none under AMD's: neither passes for the other."""

CHAIN_PADDING = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
_MAX_ENDORSEMENTS_BYTES = 64 << 10


class SigningKey(StrEnum):
    """Whose key signs reports: the chip's own, or one that AMD gave a provider for its fleet."""

    VCEK = "VCEK"
    VLEK = "VLEK"


@dataclass(frozen=True, slots=True)
class Validity:
    """A certificate's window in unix seconds, both ends included."""

    certificate: str
    not_before: int
    not_after: int


@dataclass(frozen=True, slots=True)
class Endorsement:
    """What a verified chain says of the key that signs reports."""

    signing_key: SigningKey
    public_key: ec.EllipticCurvePublicKey
    product: Product
    tcb: bytes
    """The 8 bytes of ``TCB_VERSION`` that the key was derived for."""
    hardware_id: bytes
    """The chip's hwID, 64 bytes or 8 on Turin; empty for a VLEK, which names no chip."""
    csp_id: str
    """The provider a VLEK was given to; empty for a VCEK."""
    root: str
    """SHA-256 of the root's SubjectPublicKeyInfo, hex."""
    development: bool
    """The root is none of AMD's."""
    validity: tuple[Validity, ...]
    authorities: tuple[Issued, ...]
    """ARK and ASK, for revocation lists."""

    def check_validity(self, now: int) -> None:
        """Raises :class:`RefusedError` ``NOT_YET_VALID`` or ``EXPIRED`` naming the certificate."""
        for window in self.validity:
            if now < window.not_before:
                raise RefusedError(
                    Reason.NOT_YET_VALID,
                    f"the {window.certificate} certificate is not valid yet",
                    expected=f"at or after {window.not_before}",
                    actual=now,
                )
            if now > window.not_after:
                raise RefusedError(
                    Reason.EXPIRED,
                    f"the {window.certificate} certificate has expired",
                    expected=f"at or before {window.not_after}",
                    actual=now,
                    next_step="fetch the certificates anew from the vendor",
                )


def verify_endorsements(endorsements: Sequence[bytes], pinned_roots: Collection[str]) -> Endorsement:
    """Verify a chain of three certificates (DER, or PEM with one or more in it; in any order) to a pinned root.

    ``pinned_roots`` are SHA-256 digests of SubjectPublicKeyInfo in lower-case hex. A chain that verified is kept, keyed
    by the very bytes of the endorsements and the set of pinned roots; one that did not is not.
    Raises :class:`MalformedError` ``MALFORMED`` and :class:`RefusedError` ``ROOT_NOT_PINNED``, ``CHAIN``.
    """
    if sum(len(each) for each in endorsements) > _MAX_ENDORSEMENTS_BYTES:
        raise MalformedError(
            Reason.MALFORMED, "endorsements are too large", expected=f"at most {_MAX_ENDORSEMENTS_BYTES} bytes"
        )
    return _verify(tuple(endorsements), frozenset(pinned_roots))


@dataclass(frozen=True, slots=True)
class _Certificate:
    common_name: str
    serial_number: int
    subject: bytes
    issuer: bytes
    key: CertificatePublicKeyTypes
    signed: bytes
    signature: bytes
    pss_sha384: bool
    not_before: int
    not_after: int
    is_ca: bool
    may_sign: bool
    extensions: Mapping[str, bytes]
    """Extensions that the parser does not know, by dotted OID, with their values."""
    other_extensions: tuple[str, ...]
    unknown_critical: bool


# RSA and parsing cost a millisecond, a fleet has few distinct chains, and only chains to pinned roots are kept.
@lru_cache(maxsize=128)
def _verify(endorsements: tuple[bytes, ...], pinned_roots: frozenset[str]) -> Endorsement:
    vek, ask, ark = _roles(_parse(endorsements))
    root = _fingerprint(ark)
    if root not in pinned_roots:
        raise RefusedError(
            Reason.ROOT_NOT_PINNED,
            "the endorsements chain to a root that is not pinned",
            expected=", ".join(sorted(pinned_roots)) or "no root is pinned",
            actual=f"{ark.common_name} with key {root}",
        )
    development = root not in AMD_ROOTS
    prefix = DEVELOPMENT_PREFIX if development else ""
    _check_authority(ark, "ARK")
    _check_authority(ask, "ASK")
    signing_key = next((each for each in SigningKey if vek.common_name == f"{prefix}SEV-{each}"), None)
    if signing_key is None:
        raise _broken("signing key", f"{prefix}SEV-VCEK or {prefix}SEV-VLEK", vek.common_name)
    line = ark.common_name.removeprefix(f"{prefix}ARK-")
    intermediate = f"{prefix}SEV-VLEK-{line}" if signing_key is SigningKey.VLEK else f"{prefix}SEV-{line}"
    for name, expected, certificate in (("ARK", f"{prefix}ARK-{line}", ark), ("ASK", intermediate, ask)):
        if certificate.common_name != expected:
            raise _broken(name, expected, certificate.common_name)
    for name, certificate, issuer in (("ARK", ark, ark), ("ASK", ask, ark), (signing_key, vek, ask)):
        if certificate.issuer != issuer.subject:
            raise _broken(name, f"issued by {issuer.common_name}", "another issuer name")
        _check_signature(name, certificate, issuer)
    product, tcb = _product_and_tcb(vek, signing_key)
    if product.value != line or AMD_ROOTS.get(root, line) != line:
        raise _broken("product", f"{line}, as the chain says", f"{product} in the {signing_key} certificate")
    if not isinstance(vek.key, ec.EllipticCurvePublicKey) or vek.key.curve.name != "secp384r1":
        raise _broken(signing_key, "a key on P-384", "another key")
    return Endorsement(
        signing_key=signing_key,
        public_key=vek.key,
        product=product,
        tcb=tcb,
        hardware_id=vek.extensions.get(f"{AMD_ARC}.4", b""),
        csp_id=_ia5(vek.extensions[f"{AMD_ARC}.5"]) if signing_key is SigningKey.VLEK else "",
        root=root,
        development=development,
        validity=tuple(
            Validity(name, each.not_before, each.not_after)
            for name, each in ((str(signing_key), vek), ("ASK", ask), ("ARK", ark))
        ),
        authorities=tuple(
            Issued(name, each.subject, each.key, serials)
            for name, each, serials in (
                ("ARK", ark, (("ARK", ark.serial_number), ("ASK", ask.serial_number))),
                ("ASK", ask, ((str(signing_key), vek.serial_number),)),
            )
            if isinstance(each.key, rsa.RSAPublicKey)
        ),
    )


def _broken(what: str, expected: str, actual: str) -> RefusedError:
    return RefusedError(Reason.CHAIN, f"the endorsements are no chain: {what}", expected=expected, actual=actual[:200])


def _parse(endorsements: tuple[bytes, ...]) -> list[_Certificate]:
    """Every fact about each certificate that a check needs, read at once.

    AMD issues VCEKs and VLEKs with serial number 0. RFC 5280 §4.1.2.2 forbids that, the parser warns of it, and where
    warnings are errors the warning would fail genuine evidence. A signing key is known by its key and hwID; serial
    numbers are for revocation lists alone. So the parser's warnings are muted while a chain is parsed, once; the filter
    is process-wide for those microseconds.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ders: list[bytes] = []
            for each in endorsements:
                if each.lstrip().startswith(b"-----BEGIN"):
                    ders += [pem.public_bytes(Encoding.DER) for pem in x509.load_pem_x509_certificates(each)]
                else:
                    ders.append(each)
            if len(ders) != 3:
                raise _broken("certificates", "VCEK or VLEK, ASK and ARK", f"{len(ders)} certificates")
            return [_facts(each) for each in ders]
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
            "an endorsement is not an X.509 certificate",
            expected="DER or PEM",
            actual=type(error).__name__,
        ) from None


# AMD's intermediates and roots come along with every chip of their product line; what is read here is not yet believed.
@lru_cache(maxsize=256)
def _facts(der: bytes) -> _Certificate:
    certificate = x509.load_der_x509_certificate(der)
    key = certificate.public_key()
    unknown: dict[str, bytes] = {}
    others: list[str] = []
    unknown_critical = is_ca = may_sign = False
    for extension in certificate.extensions:
        value = extension.value
        if isinstance(value, x509.UnrecognizedExtension):
            unknown[extension.oid.dotted_string] = value.value
            unknown_critical |= extension.critical
            continue
        others.append(extension.oid.dotted_string)
        if isinstance(value, x509.BasicConstraints):
            is_ca = value.ca
        elif isinstance(value, x509.KeyUsage):
            may_sign = value.key_cert_sign
        else:
            unknown_critical |= extension.critical
    subject = certificate.subject
    common_names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    hash_algorithm = certificate.signature_hash_algorithm
    return _Certificate(
        common_name=str(common_names[0].value) if len(common_names) == 1 else "",
        serial_number=certificate.serial_number,
        subject=subject.public_bytes(),
        issuer=certificate.issuer.public_bytes(),
        key=key,
        signed=certificate.tbs_certificate_bytes,
        signature=certificate.signature,
        pss_sha384=certificate.signature_algorithm_oid == SignatureAlgorithmOID.RSASSA_PSS
        and isinstance(hash_algorithm, hashes.SHA384)
        and _algorithm_is_signed(der, certificate.tbs_certificate_bytes, certificate.signature),
        not_before=int(certificate.not_valid_before_utc.timestamp()),
        not_after=int(certificate.not_valid_after_utc.timestamp()),
        is_ca=is_ca,
        may_sign=may_sign,
        extensions=unknown,
        other_extensions=tuple(others),
        unknown_critical=unknown_critical,
    )


def _fingerprint(certificate: _Certificate) -> str:
    """SHA-256 of the SubjectPublicKeyInfo, hex: what roots are pinned by."""
    spki = certificate.key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def _algorithm_is_signed(der: bytes, signed: bytes, signature: bytes) -> bool:
    """Whether a certificate's only unsigned part, the outer signature algorithm, repeats the signed one.

    RFC 5280 §4.1.1.2 asks for it, and the parser does not check it: without this, those bytes could be changed freely.
    ``signed`` begins with 4 bytes of header, 5 of version 3, and the serial number.
    """
    _, _, after = der.partition(signed)
    tail = b"\x03\x82" + (len(signature) + 1).to_bytes(2, "big") + b"\0" + signature
    outer = after.removesuffix(tail)
    if len(signed) < 11 or signed[4:9] != b"\xa0\x03\x02\x01\x02" or outer == after:
        return False
    start = 4 + 5 + 2 + signed[10]
    return signed[start : start + len(outer)] == outer


def _roles(certificates: list[_Certificate]) -> tuple[_Certificate, _Certificate, _Certificate]:
    """Sort into signing key, intermediate and root; every claim that this rests on is checked afterwards."""
    roots = [each for each in certificates if each.subject == each.issuer]
    authorities = [each for each in certificates if each.subject != each.issuer and each.is_ca]
    leaves = [each for each in certificates if each.subject != each.issuer and not each.is_ca]
    if not len(roots) == len(authorities) == len(leaves) == 1:
        raise _broken(
            "certificates",
            "one VCEK or VLEK, one ASK, one ARK",
            f"{len(leaves)} leaf, {len(authorities)} intermediate, {len(roots)} root",
        )
    return leaves[0], authorities[0], roots[0]


def _check_authority(certificate: _Certificate, name: str) -> None:
    key = certificate.key
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != 4096:
        raise _broken(name, "an RSA key of 4096 bits", "another key")
    if not certificate.is_ca or not certificate.may_sign or certificate.unknown_critical:
        raise _broken(
            name,
            "a CA that may sign certificates, with no unknown critical extension",
            f"CA {certificate.is_ca}, may sign {certificate.may_sign}",
        )


def _check_signature(name: str, certificate: _Certificate, issuer: _Certificate) -> None:
    if not certificate.pss_sha384 or not isinstance(issuer.key, rsa.RSAPublicKey):
        raise _broken(name, "RSASSA-PSS with SHA-384", "another signature algorithm")
    try:
        issuer.key.verify(certificate.signature, certificate.signed, CHAIN_PADDING, hashes.SHA384())
    except InvalidSignature:
        raise _broken(name, f"signed by the key of {issuer.common_name}", "a signature that does not verify") from None


def _product_and_tcb(vek: _Certificate, signing_key: SigningKey) -> tuple[Product, bytes]:
    """Read AMD's extensions: exactly those of the product and kind of key, each of its one size."""
    product = Product.from_certificate(_ia5(vek.extensions.get(f"{AMD_ARC}.2", b"")))
    if product is None:
        raise _broken(signing_key, "the product name Milan, Genoa or Turin", "another or none")
    identity = f"{AMD_ARC}.4" if signing_key is SigningKey.VCEK else f"{AMD_ARC}.5"
    levels = {f"{AMD_ARC}.3.{arc}": index for arc, index in product.patch_level_arcs.items()}
    expected = {f"{AMD_ARC}.1", f"{AMD_ARC}.2", identity, *levels}
    present = {*vek.extensions, *vek.other_extensions}
    if present != expected:
        raise _broken(
            f"extensions of the {signing_key}",
            "exactly AMD's",
            f"missing {sorted(expected - present)}, unexpected {sorted(present - expected)}",
        )
    if _small_integer(vek.extensions[f"{AMD_ARC}.1"]) != product.structure_version:
        raise _broken(signing_key, f"structure version {product.structure_version}", "another")
    if signing_key is SigningKey.VCEK and len(vek.extensions[identity]) != product.hardware_id_bytes:
        raise _broken(
            "hwID", f"{product.hardware_id_bytes} bytes on {product}", f"{len(vek.extensions[identity])} bytes"
        )
    if signing_key is SigningKey.VLEK and not _ia5(vek.extensions[identity]):
        raise _broken("cspID", "the provider's name", "none")
    tcb = bytearray(8)
    for oid, index in levels.items():
        tcb[index] = _small_integer(vek.extensions[oid])
    return product, bytes(tcb)


def _ia5(value: bytes) -> str:
    """A DER IA5String of at most 127 characters; empty where it is none."""
    if len(value) < 2 or value[0] != 0x16 or value[1] != len(value) - 2 or value[1] > 127 or not value[2:].isascii():
        return ""
    return value[2:].decode("ascii")


def _small_integer(value: bytes) -> int:
    """A DER INTEGER in 0 … 255, in its one shortest form."""
    if len(value) == 3 and value[:2] == b"\x02\x01" and value[2] < 0x80:
        return value[2]
    if len(value) == 4 and value[:3] == b"\x02\x02\x00" and value[3] >= 0x80:
        return value[3]
    raise _broken("extension", "an integer in 0 … 255", value[:8].hex())
