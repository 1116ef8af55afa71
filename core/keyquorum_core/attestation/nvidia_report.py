"""The NVIDIA GPU attestation report as bytes (DMTF DSP0274, SPDM 1.1, §10.11, and NVIDIA's opaque data).

What the GPU hands out is the exchange that was signed: the 37-byte ``GET_MEASUREMENTS`` request, the ``MEASUREMENTS``
response, and at its end a 96-byte ECDSA P-384 signature, r ‖ s, big-endian, over all before it. Integers are
little-endian. Nothing may follow the signature.

===========================  ====================================================================================
request, 37 bytes            ``11 e0``, attributes 01 (signature wanted), operation ff (all blocks), nonce 32, slot
response                     ``11 60``, 0, slot, number of blocks, record length (3 bytes), record, nonce 32,
                             opaque length (2 bytes), opaque data, signature 96
block of the record          index from 1, specification 01 (DMTF), size (2), then value type, value size (2), value
field of the opaque data     type (2), size (2), value
===========================  ====================================================================================

The parser refuses what no GPU says: blocks out of order, a field twice, a field that is not known, padding that is not
zero. Only the signed bytes are looked at, and nothing is verified.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

from keyquorum_core.errors import MalformedError, Reason

__all__ = [
    "DIGEST_BYTES",
    "MAX_REPORT_BYTES",
    "NONCE_BYTES",
    "REQUEST_BYTES",
    "SIGNATURE_BYTES",
    "Block",
    "Field",
    "Report",
    "parse_report",
    "read_report",
]

MAX_REPORT_BYTES = 0x2000
"""What the driver's interface holds at most (``NVML_CC_GPU_ATTESTATION_REPORT_SIZE``)."""
REQUEST_BYTES = 37
NONCE_BYTES = 32
SIGNATURE_BYTES = 96
DIGEST_BYTES = 48

_REQUEST = struct.Struct("<BBBB32sB")
_RESPONSE = struct.Struct("<BBBBB3s")
_BLOCK = struct.Struct("<BBHBH")
_FIELD = struct.Struct("<HH")
_SPDM_1_1 = 0x11
_GET_MEASUREMENTS = 0xE0
_MEASUREMENTS = 0x60
_SIGNATURE_WANTED = 1
_ALL_BLOCKS = 0xFF
_DMTF = 1
_KNOWN_DATA_VERSIONS = range(2)
_TEXT = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_ON, _OFF = 0xAA, 0x55  # how NVIDIA's firmware writes a boolean, so that no single bit turns it


class Field(IntEnum):
    """The types of NVIDIA's opaque data fields; those that are only named are carried and not read."""

    CERT_ISSUER_NAME = 1
    CERT_AUTHORITY_KEY_IDENTIFIER = 2
    DRIVER_VERSION = 3
    GPU_INFO = 4
    SKU = 5
    VBIOS_VERSION = 6
    MANUFACTURER_ID = 7
    TAMPER_DETECTION = 8
    SMC = 9
    VPR = 10
    NVDEC0_STATUS = 11
    MEASUREMENT_COUNTS = 12
    CPR_INFO = 13
    BOARD_ID = 14
    CHIP_SKU = 15
    CHIP_SKU_MOD = 16
    PROJECT = 17
    PROJECT_SKU = 18
    PROJECT_SKU_MOD = 19
    FWID = 20
    PROTECTED_PCIE_STATUS = 21
    SWITCH_PDI = 22
    FLOORSWEPT_PORTS = 23
    POSITION_ID = 24
    LOCK_SWITCH_STATUS = 25
    GPU_LINK_CONN = 32
    SYS_ENABLE_STATUS = 33
    DATA_VERSION = 34
    CHIP_INFO = 35
    FEATURE_FLAG = 36


_REQUIRED = (
    Field.DRIVER_VERSION,
    Field.GPU_INFO,
    Field.VBIOS_VERSION,
    Field.NVDEC0_STATUS,
    Field.BOARD_ID,
    Field.CHIP_SKU,
    Field.PROJECT,
    Field.PROJECT_SKU,
)


class Block(NamedTuple):
    """One measurement: DMTF's value type (bit 7 says raw, not a digest) and the value."""

    value_type: int
    value: bytes

    @property
    def is_digest(self) -> bool:
        """A SHA-384 digest, which is what golden values are compared with."""
        return not self.value_type & 0x80 and len(self.value) == DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class Report:
    """An attestation report as parsed."""

    nonce: bytes
    """The 32 bytes of the request: the challenge that was put to the GPU."""
    response_nonce: bytes
    slot: int
    blocks: Mapping[int, Block]
    """By index, from 1."""
    driver_version: str
    vbios_version: str
    """As a RIM writes it: five bytes in upper-case hex with dots."""
    architecture: int
    """0x180 Hopper, 0x1a0 and 0x1b0 Blackwell."""
    project: str
    project_sku: str
    chip_sku: str
    board_id: int
    nvdec0_enabled: bool
    """Where it is not, measurement 35 (of its firmware) means nothing."""
    fwid: bytes
    """The digest of the firmware that the signing key belongs to; empty in reports of early drivers."""
    protected_pcie: bool | None
    """``None`` where the report does not say."""
    feature_flag: int | None
    """0 and 1 are confidential computing, one GPU and several; 2 is protected PCIe. ``None``: not in the report."""
    data_version: int
    signed: bytes
    signature: tuple[int, int]
    """r and s."""

    @property
    def vbios_rim_id(self) -> str:
        """How NVIDIA's RIM service names the manifest of this board's VBIOS."""
        version = self.vbios_version.replace(".", "")
        return f"NV_GPU_VBIOS_{self.project}_{self.project_sku}_{self.chip_sku}_{version}"


def read_report(data: bytes) -> bytes:
    """The raw report from a file that holds it raw, as hex text or as base64. Raises :class:`MalformedError`."""
    if len(data) > 3 * MAX_REPORT_BYTES:
        raise _malformed("it is too large", f"at most {MAX_REPORT_BYTES} bytes", f"{len(data)} bytes in the file")
    if data[:2] == bytes([_SPDM_1_1, _GET_MEASUREMENTS]):
        return data
    text = b"".join(data.split())
    try:
        return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        pass
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _malformed(
            "it is neither raw nor hex nor base64", "a GET_MEASUREMENTS exchange", f"{len(data)} bytes"
        ) from None


def parse_report(data: bytes) -> Report:
    """Parse exactly one report. Raises :class:`MalformedError` ``MALFORMED``, ``TOO_LARGE`` or ``UNSUPPORTED``."""
    if len(data) > MAX_REPORT_BYTES:
        raise MalformedError(
            Reason.TOO_LARGE,
            "NVIDIA report: it is too large",
            expected=f"at most {MAX_REPORT_BYTES} bytes",
            actual=f"{len(data)} bytes",
        )
    body = _Bytes(data)
    version, code, attributes, operation, nonce, slot = _REQUEST.unpack(body.take(_REQUEST.size, "request"))
    if (version, code) != (_SPDM_1_1, _GET_MEASUREMENTS):
        raise _malformed("request", "SPDM 1.1 GET_MEASUREMENTS", f"{version:#x} {code:#x}")
    if (attributes, operation) != (_SIGNATURE_WANTED, _ALL_BLOCKS) or slot > 7:
        raise _malformed("request", "a signature over all blocks from slot 0 … 7", data[2:4].hex())
    version, code, param1, response_slot, count, record_size = _RESPONSE.unpack(body.take(_RESPONSE.size, "response"))
    if (version, code) != (_SPDM_1_1, _MEASUREMENTS):
        raise _malformed("response", "SPDM 1.1 MEASUREMENTS", f"{version:#x} {code:#x}")
    if param1 or response_slot != slot:
        raise _malformed("response", f"parameters 0 and {slot}", f"{param1} and {response_slot}")
    blocks = _blocks(body.take(int.from_bytes(record_size, "little"), "measurement record"), count)
    response_nonce = body.take(NONCE_BYTES, "response nonce")
    opaque_size = int.from_bytes(body.take(2, "opaque length"), "little")
    fields = _fields(body.take(opaque_size, "opaque data"))
    signed_size = body.position
    signature = body.take(SIGNATURE_BYTES, "signature")
    if body.left:
        raise _malformed("bytes after the signature", "none", f"{body.left} bytes")
    return Report(
        nonce=nonce,
        response_nonce=response_nonce,
        slot=slot,
        blocks=blocks,
        driver_version=_text(fields, Field.DRIVER_VERSION),
        vbios_version=_vbios_version(fields),
        architecture=_integer(fields, Field.GPU_INFO, 8),
        project=_text(fields, Field.PROJECT),
        project_sku=_text(fields, Field.PROJECT_SKU),
        chip_sku=_text(fields, Field.CHIP_SKU),
        board_id=_integer(fields, Field.BOARD_ID, 4),
        nvdec0_enabled=_switch(fields, Field.NVDEC0_STATUS),
        fwid=_sized(fields, Field.FWID, DIGEST_BYTES) if Field.FWID in fields else b"",
        protected_pcie=_switch(fields, Field.PROTECTED_PCIE_STATUS) if Field.PROTECTED_PCIE_STATUS in fields else None,
        feature_flag=_integer(fields, Field.FEATURE_FLAG, 2) if Field.FEATURE_FLAG in fields else None,
        data_version=_integer(fields, Field.DATA_VERSION, 2) if Field.DATA_VERSION in fields else 0,
        signed=data[:signed_size],
        signature=(int.from_bytes(signature[:DIGEST_BYTES], "big"), int.from_bytes(signature[DIGEST_BYTES:], "big")),
    )


class _Bytes:
    """Reads forward; whatever is asked for beyond the end is malformed."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    @property
    def left(self) -> int:
        return len(self._data) - self.position

    def take(self, size: int, what: str) -> bytes:
        if size > self.left:
            raise _malformed(what, f"{size} bytes", f"{self.left} bytes")
        self.position += size
        return self._data[self.position - size : self.position]


def _blocks(record: bytes, count: int) -> Mapping[int, Block]:
    blocks: dict[int, Block] = {}
    position = last = 0
    for _ in range(count):  # inline: there are 64 of them, and a report is parsed for each release
        end = position + _BLOCK.size
        if end > len(record):
            raise _malformed("measurement record", f"{count} blocks", f"{len(blocks)} and a part of one")
        index, specification, size, value_type, value_size = _BLOCK.unpack_from(record, position)
        if specification != _DMTF or size != value_size + 3:
            raise _malformed(f"measurement block {index}", "DMTF's form", f"form {specification}, {size} bytes")
        if index <= last:
            raise _malformed("measurement blocks", "ascending indices from 1, each once", f"{index} after {last}")
        last = index
        position = end + value_size
        blocks[index] = Block(value_type, record[end:position])
    if not blocks or position != len(record):
        raise _malformed(
            "measurement record", f"{count} blocks, at least one, and nothing else", f"{len(record)} bytes"
        )
    return MappingProxyType(blocks)


def _fields(opaque: bytes) -> Mapping[Field, bytes]:
    reader = _Bytes(opaque)
    fields: dict[Field, bytes] = {}
    while reader.left:
        number, size = _FIELD.unpack(reader.take(_FIELD.size, "opaque field"))
        try:
            name = Field(number)
        except ValueError:
            raise MalformedError(
                Reason.UNSUPPORTED,
                "NVIDIA report: an opaque field of a type that is not known",
                expected="a type of opaque data version 0 or 1",
                actual=number,
            ) from None
        if name in fields:
            raise _malformed("opaque data", "each field once", f"{name.name} twice")
        fields[name] = reader.take(size, f"opaque field {name.name}")
    missing = [each.name for each in _REQUIRED if each not in fields]
    if missing:
        raise _malformed("opaque data", "all fields that name the board", f"no {', '.join(missing)}")
    version = _integer(fields, Field.DATA_VERSION, 2) if Field.DATA_VERSION in fields else 0
    if version not in _KNOWN_DATA_VERSIONS:
        raise MalformedError(
            Reason.UNSUPPORTED, "NVIDIA report: a later version of opaque data", expected="0 or 1", actual=version
        )
    if version >= 1 and Field.FEATURE_FLAG not in fields:
        raise _malformed("opaque data", "a feature flag, from version 1 on", "none")
    return MappingProxyType(fields)


def _sized(fields: Mapping[Field, bytes], name: Field, size: int) -> bytes:
    value = fields[name]
    if len(value) != size:
        raise _malformed(f"opaque field {name.name}", f"{size} bytes", f"{len(value)} bytes")
    return value


def _integer(fields: Mapping[Field, bytes], name: Field, size: int) -> int:
    return int.from_bytes(_sized(fields, name, size), "little")


def _switch(fields: Mapping[Field, bytes], name: Field) -> bool:
    value = _sized(fields, name, 1)[0]
    if value not in (_ON, _OFF):
        raise _malformed(f"opaque field {name.name}", f"{_ON:#x} or {_OFF:#x}", f"{value:#x}")
    return value == _ON


def _text(fields: Mapping[Field, bytes], name: Field) -> str:
    """ASCII that ends in a zero byte, and perhaps further ones."""
    value = fields[name]
    text = value.rstrip(b"\0")
    if not _TEXT.fullmatch(text) or len(text) == len(value):
        raise _malformed(f"opaque field {name.name}", "letters, digits, '.', '_', '-' and a final zero", value[:40])
    return text.decode("ascii")


def _vbios_version(fields: Mapping[Field, bytes]) -> str:
    """A 32-bit version, then its OEM byte, then three zero bytes: ``00 5e 00 96 01 …`` is 96.00.5E.00.01."""
    value = _sized(fields, Field.VBIOS_VERSION, 8)
    if any(value[5:]):
        raise _malformed("opaque field VBIOS_VERSION", "five bytes and three zeros", value.hex())
    return bytes([*reversed(value[:4]), value[4]]).hex(".").upper()


def _malformed(what: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"NVIDIA report: {what}", expected=expected, actual=actual)
