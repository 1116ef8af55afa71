"""Evidence as a TPM would make it, by keys in software, so that a fresh clone tests every check without a TPM.

Structures are written here by hand and not through the code under test: two readings of the specification, not one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keyquorum_core.attestation.tpm2 import Tpm2Evidence

__all__ = [
    "AK_ATTRIBUTES",
    "EK_ATTRIBUTES",
    "PCRS",
    "QuoteFields",
    "SoftKey",
    "event_log",
    "evidence",
    "secure_boot_log",
    "soft_key",
    "tpm2b",
    "variable",
]

AK_ATTRIBUTES = 0x00050072
"""fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, restricted, sign."""
EK_ATTRIBUTES = 0x000300B2
"""fixedTPM, fixedParent, sensitiveDataOrigin, adminWithPolicy, restricted, decrypt."""
PCRS = {0: b"\x10" * 32, 4: b"\x14" * 32, 7: b"\x17" * 32}

_IDS = {"sha1": 0x4, "sha256": 0xB, "sha384": 0xC, "sha512": 0xD, "sm3": 0x12}
_SCHEMES = {"rsassa": 0x14, "rsapss": 0x16, "ecdsa": 0x18}
_CURVES: dict[str, tuple[int, ec.EllipticCurve]] = {"p256": (3, ec.SECP256R1()), "p384": (4, ec.SECP384R1())}
_HASHES: dict[str, hashes.HashAlgorithm] = {
    "sha1": hashes.SHA1(),  # noqa: S303 - what must be refused
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}


def tpm2b(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


@dataclass(frozen=True)
class QuoteFields:
    """A ``TPMS_ATTEST`` to be, each field as it will be written."""

    magic: int = 0xFF544347
    type: int = 0x8018
    qualified_signer: bytes = b"\x00\x0b" + b"\x51" * 32
    extra_data: bytes = bytes(range(32))
    clock: int = 1_000_000
    reset_count: int = 5
    restart_count: int = 2
    safe: int = 1
    firmware_version: int = 0x2019102300163636
    selections: Sequence[tuple[str, Sequence[int]]] = (("sha256", tuple(PCRS)),)
    pcrs: Mapping[int, bytes] = field(default_factory=lambda: dict(PCRS))
    select_bytes: int = 3
    digest_hash: str = "sha256"

    def to_bytes(self) -> bytes:
        selection = struct.pack(">I", len(self.selections))
        for bank, indices in self.selections:
            bits = sum(1 << index for index in indices)
            selection += struct.pack(">HB", _IDS[bank], self.select_bytes) + bits.to_bytes(self.select_bytes, "little")
        digest = hashlib.new(self.digest_hash, b"".join(value for _, value in sorted(self.pcrs.items()))).digest()
        return b"".join(
            (
                struct.pack(">IH", self.magic, self.type),
                tpm2b(self.qualified_signer),
                tpm2b(self.extra_data),
                struct.pack(">QIIB", self.clock, self.reset_count, self.restart_count, self.safe),
                struct.pack(">Q", self.firmware_version),
                selection,
                tpm2b(digest),
            )
        )


@dataclass(frozen=True)
class SoftKey:
    """A key of a TPM that is none."""

    private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

    @property
    def spki(self) -> bytes:
        return self.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @property
    def pem(self) -> str:
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.spki).hexdigest()

    def area(
        self,
        attributes: int = AK_ATTRIBUTES,
        *,
        scheme: str | None = "",
        scheme_hash: str = "sha256",
        name_hash: str = "sha256",
        symmetric: tuple[int, int, int] | None = None,
    ) -> bytes:
        """``TPM2B_PUBLIC``; ``scheme`` empty: RSASSA or ECDSA, ``None``: none."""
        is_rsa = isinstance(self.private, rsa.RSAPrivateKey)
        if scheme == "":
            scheme = "rsassa" if is_rsa else "ecdsa"
        out = struct.pack(">HHI", 1 if is_rsa else 0x23, _IDS[name_hash], attributes) + tpm2b(b"")
        out += struct.pack(">HHH", *symmetric) if symmetric else b"\x00\x10"
        out += struct.pack(">HH", _SCHEMES[scheme], _IDS[scheme_hash]) if scheme else b"\x00\x10"
        if isinstance(self.private, rsa.RSAPrivateKey):
            bits = self.private.key_size
            modulus = self.private.public_key().public_numbers().n
            out += struct.pack(">HI", bits, 0) + tpm2b(modulus.to_bytes(bits // 8, "big"))
        else:
            point = self.private.public_key().public_numbers()
            size = (self.private.key_size + 7) // 8
            curve = next(number for number, each in _CURVES.values() if each.name == self.private.curve.name)
            out += struct.pack(">HH", curve, 0x10)
            out += tpm2b(point.x.to_bytes(size, "big")) + tpm2b(point.y.to_bytes(size, "big"))
        return tpm2b(out)

    def sign(self, message: bytes, scheme: str = "", hash_name: str = "sha256", *, form: str = "tss") -> bytes:
        """``TPMT_SIGNATURE`` (``tss``), or bare: ``plain`` for RSA and DER, ``fixed`` for r ‖ s."""
        chosen = _HASHES[hash_name]
        if isinstance(self.private, rsa.RSAPrivateKey):
            scheme = scheme or "rsassa"
            pad: padding.AsymmetricPadding = padding.PKCS1v15()
            if scheme == "rsapss":
                pad = padding.PSS(padding.MGF1(chosen), padding.PSS.DIGEST_LENGTH)
            plain = self.private.sign(message, pad, chosen)
            body = tpm2b(plain)
        else:
            scheme = "ecdsa"
            plain = self.private.sign(message, ec.ECDSA(chosen))
            size = (self.private.key_size + 7) // 8
            parts = [each.to_bytes(size, "big") for each in decode_dss_signature(plain)]
            body = b"".join(tpm2b(each) for each in parts)
            if form == "fixed":
                return b"".join(parts)
        return plain if form == "plain" else struct.pack(">HH", _SCHEMES[scheme], _IDS[hash_name]) + body


def soft_key(kind: str = "rsa", number: int = 0) -> SoftKey:
    """``rsa`` (2048), ``rsa3072``, ``rsa1024``, ``p256``, ``p384``; one for each number in a test run."""
    return _soft_key(kind, number)


@cache
def _soft_key(kind: str, _number: int) -> SoftKey:
    if kind.startswith("rsa"):
        return SoftKey(rsa.generate_private_key(65537, int(kind[3:] or "2048")))
    return SoftKey(ec.generate_private_key(_CURVES[kind][1]))


def evidence(
    key: SoftKey | None = None,
    fields: QuoteFields | None = None,
    *,
    scheme: str = "",
    hash_name: str = "sha256",
    form: str = "tss",
    **changes: object,
) -> Tpm2Evidence:
    """Genuine evidence by ``key``, with ``changes`` made after it was signed."""
    key = key or soft_key()
    fields = fields or QuoteFields(digest_hash=hash_name)
    quote = fields.to_bytes()
    made = Tpm2Evidence(
        ak_public=key.pem,
        quote=quote,
        signature=key.sign(quote, scheme, hash_name, form=form),
        bank=fields.selections[0][0],
        pcrs=fields.pcrs,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def event_log(
    events: Sequence[tuple[int, int, bytes | None, bytes]],
    banks: Sequence[str] = ("sha1", "sha256"),
    *,
    vendor_info: bytes = b"",
) -> bytes:
    """A crypto-agile log of (PCR, type, what was measured, data); ``None``: the data itself was measured."""
    sizes = {each: hashlib.new(each).digest_size for each in banks}
    specification = struct.pack("<16sI4BI", b"Spec ID Event03\0", 0, 0, 2, 0, 2, len(banks))
    specification += b"".join(struct.pack("<HH", _IDS[each], sizes[each]) for each in banks)
    specification += bytes([len(vendor_info)]) + vendor_info
    out = struct.pack("<II20sI", 0, 3, bytes(20), len(specification)) + specification
    for pcr, kind, measured, data in events:
        out += struct.pack("<III", pcr, kind, len(banks))
        for each in banks:
            digest = bytes(sizes[each]) if kind == 3 else hashlib.new(each, data if measured is None else measured)
            out += struct.pack("<H", _IDS[each]) + (digest if isinstance(digest, bytes) else digest.digest())
        out += struct.pack("<I", len(data)) + data
    return out


def variable(name: str, value: bytes, vendor: str = "61dfe48bca93d211aa0d00e098032b8c") -> bytes:
    """``UEFI_VARIABLE_DATA``; the vendor is the GUID of EFI's global variables, as stored."""
    return bytes.fromhex(vendor) + struct.pack("<QQ", len(name), len(value)) + name.encode("utf-16-le") + value


def secure_boot_log(on: bool = True, banks: Sequence[str] = ("sha1", "sha256")) -> tuple[bytes, dict[int, bytes]]:
    """The log of a short boot, and PCRs 0, 4 and 7 after it (SHA-256)."""
    events: list[tuple[int, int, bytes | None, bytes]] = [
        (0, 0x3, None, b"StartupLocality\0\x03"),
        (0, 0x8, None, b"firmware 1\0"),
        (7, 0x80000001, None, variable("SecureBoot", b"\x01" if on else b"\x00")),
        (7, 0x80000001, None, variable("PK", b"platform key")),
        (7, 0x800000E0, None, variable("db", b"signer", "cbb219d73a3d9645a3bcdad00e67656f")),
        *((pcr, 0x4, None, bytes(4)) for pcr in (0, 4, 7)),
        (4, 0x80000003, b"the boot loader's code", b"where it was loaded"),
        (7, 0x80000001, None, variable("SecureBoot", b"\x00")),
        (9, 0xD, b"kernel", b"/vmlinuz"),
    ]
    pcrs = {0: bytes(31) + b"\x03", 4: bytes(32), 7: bytes(32)}
    for pcr, kind, measured, data in events:
        if kind != 3 and pcr in pcrs:
            digest = hashlib.sha256(data if measured is None else measured).digest()
            pcrs[pcr] = hashlib.sha256(pcrs[pcr] + digest).digest()
    return event_log(events, banks), pcrs
