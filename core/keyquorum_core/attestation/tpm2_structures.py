"""TPM 2.0 structures as bytes (TCG TPM 2.0 Library, Part 2; section numbers of revision 1.59). Big-endian throughout.

``TPMS_ATTEST`` of a quote (§10.12), ``TPML_PCR_SELECTION`` (§10.9.7), ``TPMT_SIGNATURE`` (§11.3.4) and
``TPM2B_PUBLIC`` (§12.2.5). A sized field (``TPM2B_…``) is a 16-bit size and as many bytes. Parsing is strict: every
byte is accounted for, sizes are bounded, reserved bits are zero. Nothing is verified here, and no algorithm is judged
but for those whose form is not known.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = [
    "AES",
    "CFB",
    "ECC",
    "HASHES",
    "RSA",
    "Attributes",
    "HashAlgorithm",
    "PcrSelection",
    "Public",
    "Quote",
    "Scheme",
    "Signature",
    "hash_by_id",
    "hash_by_name",
    "parse_public",
    "parse_quote",
    "parse_signature",
    "sized",
]

TPM_GENERATED = 0xFF544347
ATTEST_QUOTE = 0x8018
_ATTEST_TYPES = range(0x8014, 0x801E)  # the TPMI_ST_ATTEST of all commands that attest

RSA = 0x0001
ECC = 0x0023
AES = 0x0006
CFB = 0x0043
_NULL = 0x0010

_HEAD = struct.Struct(">IH")  # magic, type
_CLOCK_AND_FIRMWARE = struct.Struct(">QIIBQ")  # clock, reset and restart counts, safe, firmware version
_MAX_QUOTE_BYTES = 1024
_MAX_SIGNATURE_BYTES = 1024
_MAX_PUBLIC_BYTES = 1024
_MAX_NAME_BYTES = 2 + 64  # an algorithm and its digest
_MAX_DATA_BYTES = 2 + 64  # TPM2B_DATA holds as much as a TPMT_HA
_MAX_DIGEST_BYTES = 64
_MAX_RSA_BYTES = 512
_MAX_ECC_BYTES = 66
_MAX_SELECTIONS = 16
_MAX_SELECT_BYTES = 4


@dataclass(frozen=True, slots=True)
class HashAlgorithm:
    """A hash by its ``TPM_ALG_ID``; ``size`` in bytes."""

    name: str
    id: int
    size: int
    strong: bool
    """At least SHA-256. The others are known so as to be named when they are refused."""

    def digest(self, data: bytes) -> bytes:
        return hashlib.new(self.name, data).digest()


HASHES: tuple[HashAlgorithm, ...] = (
    HashAlgorithm("sha1", 0x0004, 20, strong=False),
    HashAlgorithm("sha256", 0x000B, 32, strong=True),
    HashAlgorithm("sha384", 0x000C, 48, strong=True),
    HashAlgorithm("sha512", 0x000D, 64, strong=True),
)
_BY_ID = {each.id: each for each in HASHES}
_BY_NAME = {each.name: each for each in HASHES}


def hash_by_id(algorithm: int) -> HashAlgorithm | None:
    return _BY_ID.get(algorithm)


def hash_by_name(name: str) -> HashAlgorithm | None:
    return _BY_NAME.get(name)


class Scheme(IntEnum):
    """Signature schemes, by ``TPM_ALG_ID``."""

    RSASSA = 0x0014
    RSAPSS = 0x0016
    ECDSA = 0x0018


_SCHEMES = {int(each): each for each in Scheme}


class Attributes(IntFlag):
    """``TPMA_OBJECT`` (§8.3)."""

    FIXED_TPM = 1 << 1
    ST_CLEAR = 1 << 2
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    USER_WITH_AUTH = 1 << 6
    ADMIN_WITH_POLICY = 1 << 7
    FIRMWARE_LIMITED = 1 << 8
    SVN_LIMITED = 1 << 9
    NO_DA = 1 << 10
    ENCRYPTED_DUPLICATION = 1 << 11
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18
    X509_SIGN = 1 << 19

    def names(self) -> str:
        return ", ".join(str(each.name) for each in self) or "none"


_KNOWN_ATTRIBUTES = sum(Attributes)


@dataclass(frozen=True, slots=True)
class PcrSelection:
    """PCRs of one bank, as selected; ``indices`` ascending, 0 … 31."""

    bank: int
    """``TPM_ALG_ID`` of the bank's hash."""
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Quote:
    """A ``TPMS_ATTEST`` of type ``TPM_ST_ATTEST_QUOTE``."""

    qualified_signer: bytes
    extra_data: bytes
    clock: int
    """Milliseconds that the TPM has been powered, over its life."""
    reset_count: int
    restart_count: int
    safe: bool
    """Whether no greater ``clock`` was reported before."""
    firmware_version: int
    selections: tuple[PcrSelection, ...]
    pcr_digest: bytes
    signed: bytes
    """The bytes that are signed: all of them."""


@dataclass(frozen=True, slots=True)
class Signature:
    """A ``TPMT_SIGNATURE``; ``hash_id`` is a ``TPM_ALG_ID``."""

    scheme: Scheme
    hash_id: int
    parts: tuple[bytes, ...]
    """The signature for RSA; r and s for ECDSA, unsigned, big-endian."""


@dataclass(frozen=True, slots=True)
class Public:
    """A ``TPMT_PUBLIC`` of an asymmetric key."""

    type: int
    """:data:`RSA` or :data:`ECC`."""
    name_hash: HashAlgorithm
    attributes: Attributes
    auth_policy: bytes
    symmetric: tuple[int, int, int] | None
    """Algorithm, key bits, mode, of the keys that a parent wraps its children with."""
    scheme: int | None
    """``TPM_ALG_ID`` of the signature scheme; ``None`` where the key's user may choose."""
    scheme_hash_id: int | None
    key_bits: int
    """RSA: the size of the modulus; 0 for ECC."""
    exponent: int
    """RSA: with the default (0) read as 65537."""
    curve: int
    """ECC: ``TPM_ECC_CURVE``."""
    unique: tuple[bytes, ...]
    """The modulus, or x and y, big-endian."""
    area: bytes
    """The ``TPMT_PUBLIC`` itself."""

    @property
    def name(self) -> bytes:
        """The object's Name (Part 1, §16): its algorithm, then the digest of the public area."""
        return self.name_hash.id.to_bytes(2, "big") + self.name_hash.digest(self.area)


def sized(data: bytes) -> bytes:
    """``data`` as a ``TPM2B_…``. Raises :class:`OverflowError` from 64 KiB on."""
    return len(data).to_bytes(2, "big") + data


def parse_quote(data: bytes) -> Quote:
    """Parse exactly one ``TPMS_ATTEST`` of a quote.

    Raises :class:`MalformedError` ``MALFORMED``, also where the TPM did not make it (the magic value), and
    :class:`RefusedError` ``EVIDENCE_TYPE`` for an attestation of another type.
    """
    reader = _Reader(data, "TPMS_ATTEST", _MAX_QUOTE_BYTES)
    magic, kind = reader.unpack(_HEAD)
    if magic != TPM_GENERATED:
        raise reader.bad("magic", f"{TPM_GENERATED:#x}: made inside the TPM", f"{magic:#x}")
    if kind != ATTEST_QUOTE:
        if kind not in _ATTEST_TYPES:
            raise reader.bad("type", f"{ATTEST_QUOTE:#x}", f"{kind:#x}")
        raise RefusedError(
            Reason.EVIDENCE_TYPE,
            "the TPM attests to something else than PCRs",
            expected=f"a quote, type {ATTEST_QUOTE:#x}",
            actual=f"type {kind:#x}",
        )
    qualified_signer = reader.sized(_MAX_NAME_BYTES)
    extra_data = reader.sized(_MAX_DATA_BYTES)
    clock, reset_count, restart_count, safe, firmware_version = reader.unpack(_CLOCK_AND_FIRMWARE)
    if safe > 1:
        raise reader.bad("TPMI_YES_NO", "0 or 1", safe)
    quote = Quote(
        qualified_signer=qualified_signer,
        extra_data=extra_data,
        clock=clock,
        reset_count=reset_count,
        restart_count=restart_count,
        safe=bool(safe),
        firmware_version=firmware_version,
        selections=_selections(reader),
        pcr_digest=reader.sized(_MAX_DIGEST_BYTES),
        signed=data,
    )
    reader.done()
    return quote


def parse_signature(data: bytes) -> Signature:
    """Parse exactly one ``TPMT_SIGNATURE`` by RSA or ECDSA. Raises :class:`MalformedError` ``MALFORMED``."""
    reader = _Reader(data, "TPMT_SIGNATURE", _MAX_SIGNATURE_BYTES)
    algorithm = reader.integer(2)
    scheme = _SCHEMES.get(algorithm)
    if scheme is None:
        raise reader.bad("algorithm", "RSASSA, RSAPSS or ECDSA", f"{algorithm:#06x}")
    hash_id = reader.integer(2)
    parts: tuple[bytes, ...]
    if scheme is Scheme.ECDSA:
        parts = (reader.sized(_MAX_ECC_BYTES, 1), reader.sized(_MAX_ECC_BYTES, 1))
    else:
        parts = (reader.sized(_MAX_RSA_BYTES, 1),)
    reader.done()
    return Signature(scheme, hash_id, parts)


def parse_public(data: bytes) -> Public:
    """Parse exactly one ``TPM2B_PUBLIC`` of an RSA or ECC key. Raises :class:`MalformedError` ``MALFORMED``."""
    outer = _Reader(data, "TPM2B_PUBLIC", _MAX_PUBLIC_BYTES)
    area = outer.sized(_MAX_PUBLIC_BYTES)
    outer.done()
    reader = _Reader(area, "TPMT_PUBLIC", _MAX_PUBLIC_BYTES)
    kind = reader.integer(2)
    if kind not in (RSA, ECC):
        raise reader.bad("type", "RSA or ECC", f"{kind:#06x}")
    name_id = reader.integer(2)
    name_hash = hash_by_id(name_id)
    if name_hash is None:
        raise reader.bad("name algorithm", "a hash that is known", f"{name_id:#06x}")
    attributes = reader.integer(4)
    if attributes & ~_KNOWN_ATTRIBUTES:
        raise reader.bad("attributes", "reserved bits zero", f"{attributes:#x}")
    auth_policy = reader.sized(_MAX_DIGEST_BYTES)
    symmetric_id = reader.integer(2)
    symmetric = None if symmetric_id == _NULL else (symmetric_id, reader.integer(2), reader.integer(2))
    scheme = reader.integer(2)
    scheme_hash_id = None
    if scheme in _SCHEMES:
        scheme_hash_id = reader.integer(2)
    elif scheme != _NULL:
        raise reader.bad("scheme", "RSASSA, RSAPSS, ECDSA or none", f"{scheme:#06x}")
    key_bits = exponent = curve = 0
    if kind == RSA:
        key_bits = reader.integer(2)
        exponent = reader.integer(4) or 65537
        unique: tuple[bytes, ...] = (reader.sized(_MAX_RSA_BYTES, 1),)
    else:
        curve = reader.integer(2)
        kdf = reader.integer(2)
        if kdf != _NULL:
            raise reader.bad("key derivation scheme", "none", f"{kdf:#06x}")
        unique = (reader.sized(_MAX_ECC_BYTES, 1), reader.sized(_MAX_ECC_BYTES, 1))
    reader.done()
    return Public(
        type=kind,
        name_hash=name_hash,
        attributes=Attributes(attributes),
        auth_policy=auth_policy,
        symmetric=symmetric,
        scheme=None if scheme == _NULL else scheme,
        scheme_hash_id=scheme_hash_id,
        key_bits=key_bits,
        exponent=exponent,
        curve=curve,
        unique=unique,
        area=area,
    )


def _selections(reader: _Reader) -> tuple[PcrSelection, ...]:
    """``TPML_PCR_SELECTION``: each bank once. Bit b of byte B selects PCR 8·B + b."""
    count = reader.integer(4)
    if count > _MAX_SELECTIONS:
        raise reader.bad("PCR selection", f"at most {_MAX_SELECTIONS} banks", count)
    out: list[PcrSelection] = []
    for _ in range(count):
        bank = reader.integer(2)
        size = reader.integer(1)
        if not 1 <= size <= _MAX_SELECT_BYTES:
            raise reader.bad("PCR selection", f"1 … {_MAX_SELECT_BYTES} bytes for each bank", size)
        bits = int.from_bytes(reader.take(size), "little")
        out.append(PcrSelection(bank, tuple(index for index in range(8 * size) if bits >> index & 1)))
    if len({each.bank for each in out}) != len(out):
        raise reader.bad("PCR selection", "each bank once", "a repetition")
    return tuple(out)


class _Reader:
    """Reads one structure from its beginning to its end; every error names it."""

    def __init__(self, data: bytes, what: str, max_bytes: int) -> None:
        self._data = data
        self._what = what
        self._at = 0
        if len(data) > max_bytes:
            raise self.bad("size", f"at most {max_bytes} bytes", f"{len(data)} bytes")

    def bad(self, field: str, expected: str, actual: object) -> MalformedError:
        return MalformedError(Reason.MALFORMED, f"{self._what}: {field}", expected=expected, actual=actual)

    def take(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        if len(part) != size:
            raise self.bad(f"it ends at byte {len(self._data)}", f"{size} bytes at {self._at}", f"{len(part)} bytes")
        self._at += size
        return part

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def sized(self, max_bytes: int, min_bytes: int = 0) -> bytes:
        size = self.integer(2)
        if not min_bytes <= size <= max_bytes:
            raise self.bad(f"sized field at {self._at - 2}", f"{min_bytes} … {max_bytes} bytes", f"{size} bytes")
        return self.take(size)

    def done(self) -> None:
        if self._at != len(self._data):
            raise self.bad("bytes after its end", f"{self._at} bytes", f"{len(self._data)} bytes")
