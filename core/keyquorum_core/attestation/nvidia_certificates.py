"""NVIDIA's certificate chains: a GPU's device chain, and the chain in a reference integrity manifest.

Checks of :func:`verify_chain`, in order; each one refuses, none can be turned off:

1. certificates that parse, as many as the chain has                                       ``MALFORMED``, ``CHAIN``
2. the last one's key is pinned, by SHA-256 of its SubjectPublicKeyInfo                    ``ROOT_NOT_PINNED``
3. all keys are on P-384, all signatures ECDSA with SHA-384, named alike inside and outside what is signed
                                                                                           ``CHAIN``
4. all but the first are CAs that may sign certificates, within their path lengths; the first is no CA and may sign
   data; no critical extension is unknown                                                  ``CHAIN``
5. each issuer name and authority key id is the subject name and key id above it           ``CHAIN``
6. each signature verifies with the key above it, the root's with its own                  ``CHAIN``

:func:`verify_device` goes on with what a GPU's chain says of the GPU: five certificates, from the firmware's key, which
signs reports, over the device's own, which is burnt in, to NVIDIA's root:

7. the firmware certificate names the device: chip and identifier, as DMTF's device info   ``CHAIN``
8. it holds the FWID, the digest of the firmware that the key was derived for, exactly once, in DICE form
                                                                                           ``PROVENANCE``
9. in the Hopper form, the device key named beside the FWID is that of the device certificate ``CHAIN``
10. in the Blackwell form, the firmware is not in debug mode                               ``DEBUG_ENABLED``
11. the device certificate's serial number is the one in its subject                       ``CHAIN``

The time does not enter here, so that a verified chain can be kept; the caller makes :func:`check_validity` anew each
time.
"""

from __future__ import annotations

import hashlib
import hmac
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, ObjectIdentifier, SignatureAlgorithmOID

from keyquorum_core.attestation.roots import NVIDIA_DEVICE_ROOTS
from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = [
    "DEVICE_INFO",
    "FWID_COMPOSITE",
    "FWID_TCB_INFO",
    "Certificate",
    "Device",
    "check_validity",
    "read_certificates",
    "verify_chain",
    "verify_device",
]

DEVICE_CHAIN = range(5, 6)
DEVICE_INFO = "1.3.6.1.4.1.412.274.1"
"""DMTF's other name (DSP0274 §10.8): ``Manufacturer:Product:SerialNumber``."""
FWID_COMPOSITE = "2.23.133.5.4.1"
"""TCG's arc, on Hopper with the older CompositeDeviceID: version, device key, FWID."""
FWID_TCB_INFO = "2.23.133.5.4.1.1"
"""TCG's arc, on Blackwell with DiceTcbInfo (DICE Attestation Architecture, §6.1.1)."""

_MAX_BYTES = 64 << 10
_SHA_384 = bytes.fromhex("0609608648016503040202")
_FWID_BYTES = 48
_SEQUENCE, _INTEGER, _OCTET_STRING, _OID = 0x30, 0x02, 0x04, 0x06
_FWIDS, _FLAGS = 0xA6, 0x87  # [6] and [7] in DiceTcbInfo
_DEBUG_FLAG = 0x10  # bit 3 of OperationalFlags, the first bit being the highest


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the checks need of one certificate."""

    x509: x509.Certificate
    common_name: str
    key: ec.EllipticCurvePublicKey
    spki_sha256: str
    is_ca: bool
    path_length: int | None
    signs_certificates: bool
    signs_data: bool
    key_id: bytes
    issuer_key_id: bytes
    other_names: tuple[tuple[str, bytes], ...]
    unknown: Mapping[str, bytes]
    """Extensions that the parser does not know, by dotted OID."""
    unknown_critical: bool
    not_before: int
    not_after: int
    """Unix seconds, both ends included."""

    @property
    def serial(self) -> str:
        """The serial number in lower-case hex."""
        number = self.x509.serial_number
        return number.to_bytes((number.bit_length() + 7) // 8, "big").hex()


@dataclass(frozen=True, slots=True)
class Device:
    """What a verified chain says of a GPU and of the firmware whose key signs its reports."""

    chip: str
    """``GH100``, ``GB100`` …"""
    serial: str
    """The device certificate's serial number, hex: the GPU's identity, which firmware does not change."""
    device_info: str
    """``NVIDIA:chip:identifier``, in which the identifier is the GPU's, too."""
    fwid: bytes
    device_key: str
    """SHA-256 of the device key's SubjectPublicKeyInfo, hex."""
    public_key: ec.EllipticCurvePublicKey
    """The firmware's key."""
    root: str
    """SHA-256 of the root's SubjectPublicKeyInfo, hex."""
    development: bool
    """The root is not NVIDIA's."""
    chain: tuple[Certificate, ...]
    """The firmware's certificate first, the root last."""


def check_validity(chain: Sequence[Certificate], now: int) -> None:
    """Raises :class:`RefusedError` ``NOT_YET_VALID`` or ``EXPIRED`` naming the certificate."""
    for each in chain:
        if now < each.not_before:
            raise RefusedError(
                Reason.NOT_YET_VALID,
                f"the certificate {each.common_name!r} is not valid yet",
                expected=f"at or after {each.not_before}",
                actual=now,
            )
        if now > each.not_after:
            raise RefusedError(
                Reason.EXPIRED,
                f"the certificate {each.common_name!r} has expired",
                expected=f"at or before {each.not_after}",
                actual=now,
                next_step="fetch it anew from the vendor",
            )


def read_certificates(files: Sequence[bytes]) -> tuple[bytes, ...]:
    """The DER of each certificate, in order, from DER or from PEM with one or more in it.

    Raises :class:`MalformedError`.
    """
    if sum(len(each) for each in files) > _MAX_BYTES:
        raise MalformedError(Reason.TOO_LARGE, "certificates are too large", expected=f"at most {_MAX_BYTES} bytes")
    ders: list[bytes] = []
    for each in files:
        if not each.lstrip().startswith(b"-----BEGIN"):
            ders.append(each)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ders += [pem.public_bytes(Encoding.DER) for pem in x509.load_pem_x509_certificates(each)]
        except (ValueError, TypeError, x509.InvalidVersion) as error:
            raise _malformed(error) from None
    return tuple(ders)


def verify_chain(
    ders: tuple[bytes, ...], pinned_roots: Collection[str], *, what: str, sizes: range
) -> tuple[Certificate, ...]:
    """Checks 1 to 6 on a chain in order, the root last. Chains that verified are kept.

    ``pinned_roots`` are SHA-256 digests of SubjectPublicKeyInfo in lower-case hex.
    Raises :class:`MalformedError` ``MALFORMED`` and :class:`RefusedError` ``ROOT_NOT_PINNED``, ``CHAIN``.
    """
    if len(ders) not in sizes:
        raise _broken(what, f"{sizes[0]} … {sizes[-1]} certificates", f"{len(ders)} certificates")
    return _verify_chain(ders, frozenset(pinned_roots), what)


def verify_device(ders: tuple[bytes, ...], pinned_roots: Collection[str]) -> Device:
    """All checks on a GPU's chain of five. Raises as :func:`verify_chain`, and ``PROVENANCE``, ``DEBUG_ENABLED``."""
    return _verify_device(ders, frozenset(pinned_roots))


# Five P-384 signatures cost milliseconds, a GPU's chain changes with its firmware only, and only chains to pinned roots
# are kept, here and below.
@lru_cache(maxsize=256)
def _verify_device(ders: tuple[bytes, ...], pinned_roots: frozenset[str]) -> Device:
    chain = verify_chain(ders, pinned_roots, what="device chain", sizes=DEVICE_CHAIN)
    firmware, device, root = chain[0], chain[1], chain[-1]
    info = [value for oid, value in firmware.other_names if oid == DEVICE_INFO]
    text = _utf8(info[0]) if len(info) == 1 else ""
    manufacturer, _, rest = text.partition(":")
    chip, _, identifier = rest.partition(":")
    if manufacturer != "NVIDIA" or not chip.isalnum() or not identifier.isalnum():
        raise _broken("device info", "NVIDIA:chip:identifier, once", ascii(text)[:80] if text else "none")
    if not all(each.common_name.startswith(f"{chip} ") for each in (firmware, device)):
        raise _broken("device chain", f"certificates of a {chip}", f"{firmware.common_name}, {device.common_name}")
    if device.serial != _subject_serial(device).lower():
        raise _broken("device certificate", "its serial number in its subject", _subject_serial(device)[:80])
    return Device(
        chip=chip,
        serial=device.serial,
        device_info=text,
        fwid=_fwid(firmware, device),
        device_key=device.spki_sha256,
        public_key=firmware.key,
        root=root.spki_sha256,
        development=root.spki_sha256 not in NVIDIA_DEVICE_ROOTS,
        chain=chain,
    )


@lru_cache(maxsize=64)
def _verify_chain(ders: tuple[bytes, ...], pinned_roots: frozenset[str], what: str) -> tuple[Certificate, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the parser only warns of is judged by signature and fingerprint
        chain = tuple(_parse(each, what) for each in ders)
    root = chain[-1]
    if root.spki_sha256 not in pinned_roots:
        raise RefusedError(
            Reason.ROOT_NOT_PINNED,
            f"the {what} ends in a root that is not pinned",
            expected=", ".join(sorted(pinned_roots)) or "no root is pinned",
            actual=f"{root.common_name} with key {root.spki_sha256}",
        )
    for position, each in enumerate(chain):
        issuer = chain[min(position + 1, len(chain) - 1)]
        if each.unknown_critical:
            raise _broken(each.common_name, "no critical extension that is not known", "one")
        if position == 0 and (each.is_ca or not each.signs_data):
            raise _broken(each.common_name, "no CA, and the key usage digital signature", "others")
        if position and not (each.is_ca and each.signs_certificates):
            raise _broken(each.common_name, "a CA that may sign certificates", "none")
        if position and each.path_length is not None and each.path_length < position - 1:
            raise _broken(each.common_name, f"a path length of at least {position - 1}", str(each.path_length))
        if not issuer.key_id or each.issuer_key_id != issuer.key_id:
            raise _broken(each.common_name, f"the key id of {issuer.common_name} as its issuer's", "another")
        try:
            each.x509.verify_directly_issued_by(issuer.x509)  # names too, and that both algorithm fields are equal
        except (InvalidSignature, ValueError, TypeError):
            raise _broken(each.common_name, f"issued and signed by {issuer.common_name}", "it is not") from None
    return chain


def _parse(der: bytes, what: str) -> Certificate:
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        extensions = list(certificate.extensions)
        canonical = der.endswith(b"\0" + certificate.signature)  # a bit string could leave bits unused
        not_before = int(certificate.not_valid_before_utc.timestamp())
        not_after = int(certificate.not_valid_after_utc.timestamp())
        common_names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (
        ValueError,
        TypeError,
        OverflowError,
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    ) as error:
        raise _malformed(error) from None
    name = str(common_names[0].value) if len(common_names) == 1 else ""
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise _broken(f"{what}: {name}", "a key on P-384", "another key")
    if certificate.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA384 or not canonical:
        raise _broken(f"{what}: {name}", "a signature of ECDSA with SHA-384", "another")
    basic: x509.BasicConstraints | None = None
    usage: x509.KeyUsage | None = None
    key_id = issuer_key_id = b""
    other_names: tuple[tuple[str, bytes], ...] = ()
    unknown: dict[str, bytes] = {}
    unknown_critical = False
    for extension in extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints):
            basic = value
        elif isinstance(value, x509.KeyUsage):
            usage = value
        elif isinstance(value, x509.UnrecognizedExtension):
            unknown[extension.oid.dotted_string] = value.value
            unknown_critical |= extension.critical
        else:
            unknown_critical |= extension.critical
            if isinstance(value, x509.SubjectKeyIdentifier):
                key_id = value.digest
            elif isinstance(value, x509.AuthorityKeyIdentifier):
                issuer_key_id = value.key_identifier or b""
            elif isinstance(value, x509.SubjectAlternativeName):
                other_names = tuple((x.type_id.dotted_string, x.value) for x in value if isinstance(x, x509.OtherName))
    return Certificate(
        x509=certificate,
        common_name=name,
        key=key,
        spki_sha256=hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest(),
        is_ca=basic is not None and basic.ca,
        path_length=basic.path_length if basic is not None else None,
        signs_certificates=usage is not None and usage.key_cert_sign,
        signs_data=usage is not None and usage.digital_signature,
        key_id=key_id,
        issuer_key_id=issuer_key_id,
        other_names=other_names,
        unknown=unknown,
        unknown_critical=unknown_critical,
        not_before=not_before,
        not_after=not_after,
    )


def _subject_serial(certificate: Certificate) -> str:
    values = certificate.x509.subject.get_attributes_for_oid(ObjectIdentifier("2.5.4.5"))
    return str(values[0].value) if len(values) == 1 else ""


def _fwid(firmware: Certificate, device: Certificate) -> bytes:
    """Checks 8 to 10."""
    found = [oid for oid in (FWID_COMPOSITE, FWID_TCB_INFO) if oid in firmware.unknown]
    if len(found) != 1:
        raise _no_fwid("one of the extensions that hold it", f"{len(found)} of them")
    outer = list(_elements(firmware.unknown[found[0]]))
    if len(outer) != 1 or outer[0][0] != _SEQUENCE:
        raise _no_fwid("one sequence", "another form")
    members = list(_elements(outer[0][1]))
    if found[0] == FWID_COMPOSITE:
        return _composite(members, device)
    fwids = [value for tag, value, _ in members if tag == _FWIDS]
    if len(fwids) != 1:
        raise _no_fwid("a list of FWIDs", f"{len(fwids)} lists")
    flags = [value for tag, value, _ in members if tag == _FLAGS]
    if any(len(each) > 1 and each[1] & _DEBUG_FLAG for each in flags):
        raise RefusedError(
            Reason.DEBUG_ENABLED,
            "the GPU's firmware runs in debug mode, says its certificate",
            expected="operational flag 3 zero",
            actual=flags[0].hex(),
        )
    entries = [_digest(value) for tag, value, _ in _elements(fwids[0]) if tag == _SEQUENCE]
    if not entries:
        raise _no_fwid("at least one", "an empty list")
    return entries[0]  # the first is the firmware's; NVIDIA's verifier takes it, too


def _composite(members: list[tuple[int, bytes, bytes]], device: Certificate) -> bytes:
    if [tag for tag, _, _ in members] != [_INTEGER, _SEQUENCE, _SEQUENCE] or members[0][1] != b"\x01":
        raise _no_fwid("version 1, device key and FWID", "another form")
    spki = device.key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if not hmac.compare_digest(members[1][2], spki):
        raise _broken("device key beside the FWID", f"that of {device.common_name}", "another key")
    return _digest(members[2][1])


def _digest(value: bytes) -> bytes:
    members = list(_elements(value))
    if [tag for tag, _, _ in members] != [_OID, _OCTET_STRING] or members[0][2] != _SHA_384:
        raise _no_fwid("a SHA-384 digest", "another form")
    digest = members[1][1]
    if len(digest) != _FWID_BYTES:
        raise _no_fwid(f"{_FWID_BYTES} bytes", f"{len(digest)} bytes")
    return digest


def _elements(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """The DER elements of ``data`` one after another: tag, content, and the element whole."""
    position = 0
    while position < len(data):
        start = position
        head = data[position : position + 2]
        size, position = head[-1], position + 2
        if size & 0x80:
            count = size & 0x7F
            size, position = int.from_bytes(data[position : position + count], "big"), position + count
            if count not in (1, 2) or size < 0x80 or (count == 2 and size < 0x100):
                raise _no_fwid("DER", "a length in another form")
        if len(head) < 2 or position + size > len(data):
            raise _no_fwid("DER", "bytes that end too early")
        yield head[0], data[position : position + size], data[start : position + size]
        position += size


def _utf8(value: bytes) -> str:
    """A DER UTF8String of ASCII; empty where it is none."""
    try:
        (tag, text, _) = next(_elements(value), (0, b"", b""))
    except RefusedError:
        return ""
    whole = len(text) + 2 == len(value)
    return text.decode("ascii") if tag == 0x0C and whole and text.isascii() else ""


def _no_fwid(expected: str, actual: str) -> RefusedError:
    return RefusedError(
        Reason.PROVENANCE,
        "the firmware's certificate does not say which firmware its key belongs to (FWID)",
        expected=expected,
        actual=actual,
    )


def _broken(what: str, expected: str, actual: str) -> RefusedError:
    return RefusedError(Reason.CHAIN, f"no chain: {what}", expected=expected, actual=actual[:200])


def _malformed(error: Exception) -> MalformedError:
    return MalformedError(Reason.MALFORMED, "no X.509 certificate", expected="DER or PEM", actual=type(error).__name__)
