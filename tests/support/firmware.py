"""A small firmware image of the shape of OVMF, and a small PE image: made here, so that both can be published."""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Mapping, Sequence

__all__ = ["CODE", "SEV_SECTIONS", "TDVF_SECTIONS", "firmware", "pe_image"]

SIZE = 16 * 4096
SEV_METADATA_AT, TDX_METADATA_AT = 0x800, 0x700
"""Bytes before the end."""
SEV_SECTIONS = (
    (0x800000, 0x9000, 1),
    (0x80A000, 0x3000, 1),
    (0x80D000, 0x1000, 2),
    (0x80E000, 0x1000, 3),
    (0x80F000, 0x1000, 4),
    (0x810000, 0x1000, 0x10),
    (0x811000, 0xF000, 1),
)
"""Address, size, kind."""
HASH_TABLE = 0x810400
RESET = 0x80B004
TDVF_SECTIONS = (
    (0x2000, 0xE000, 0xFFC02000, 0xE000, 0, 1),
    (0x0000, 0x2000, 0xFFC00000, 0x2000, 1, 0),
    (0, 0, 0x80A000, 0x3000, 3, 0),
    (0, 0, 0x809000, 0x1000, 2, 0),
    (0, 0, 0x1000000, 0x2000, 3, 3),
)
"""Data offset, data size, address, memory size, kind, attributes."""
CODE = b"".join(hashlib.sha256(f"firmware {number}".encode()).digest() for number in range(SIZE // 32))


def _entry(guid: str, data: bytes) -> bytes:
    return data + struct.pack("<H", len(data) + 18) + uuid.UUID(guid).bytes_le


def firmware(
    *,
    sev: Sequence[tuple[int, int, int]] = SEV_SECTIONS,
    tdvf: Sequence[tuple[int, int, int, int, int, int]] = TDVF_SECTIONS,
    entries: Mapping[str, bytes] | None = None,
    patch: Mapping[int, bytes] | None = None,
) -> bytes:
    """An image of 64 KiB; ``entries`` replaces the table's, ``patch`` overwrites bytes at offsets."""
    image = bytearray(CODE)
    sev_metadata = struct.pack("<4sIII", b"ASEV", 16 + 12 * len(sev), 1, len(sev))
    sev_metadata += b"".join(struct.pack("<III", *each) for each in sev)
    tdx_metadata = struct.pack("<4sIII", b"TDVF", 16 + 32 * len(tdvf), 1, len(tdvf))
    tdx_metadata += b"".join(struct.pack("<IIQQII", *each) for each in tdvf)
    for at, data in ((SEV_METADATA_AT, sev_metadata), (TDX_METADATA_AT, tdx_metadata)):
        image[SIZE - at : SIZE - at + len(data)] = data
    table = {
        "dc886566-984a-4798-a75e-5585a7bf67cc": struct.pack("<I", SEV_METADATA_AT),
        "e47a6535-984a-4798-865e-4685a7bf8ec2": struct.pack("<I", TDX_METADATA_AT),
        "7255371f-3a3b-4b04-927b-1da6efa8d454": struct.pack("<II", HASH_TABLE, 0x400),
        "00f771de-1a7e-4fcb-890e-68c77e2fb44e": struct.pack("<I", RESET),
    }
    body = b"".join(_entry(guid, data) for guid, data in (table if entries is None else entries).items())
    body += struct.pack("<H", len(body) + 18) + uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    image[SIZE - 32 - len(body) : SIZE - 32] = body
    for at, data in (patch or {}).items():
        image[at : at + len(data)] = data
    return bytes(image)


def pe_image(certificates: bytes = b"", *, plus: bool = True, trailing: bytes = b"after") -> bytes:
    """A program of three sections, listed in another order than they lie in the file; one of them empty."""
    directories = 16
    optional_bytes = (112 if plus else 96) + 8 * directories
    headers = 0x400
    parts = ((0x800, b"second" * 40), (0x400, b"first" * 204 + b"\0\0\0\0"), (0, b""))
    out = bytearray(headers)
    out[:2] = b"MZ"
    out[0x3C:0x40] = (0x80).to_bytes(4, "little")
    out[0x80:0x84] = b"PE\0\0"
    out[0x84:0x98] = struct.pack("<HHIIIHH", 0x8664, len(parts), 0, 0, 0, optional_bytes, 0x22)
    optional = 0x98
    out[optional : optional + 2] = struct.pack("<H", 0x20B if plus else 0x10B)
    out[optional + 60 : optional + 68] = struct.pack("<II", headers, 0xC0FFEE)
    count = optional + (108 if plus else 92)
    out[count : count + 4] = struct.pack("<I", directories)
    table = optional + optional_bytes
    for number, (at, data) in enumerate(parts):
        struct.pack_into("<8sIIIIIIHHI", out, table + 40 * number, b".s", 0, 0, len(data), at, 0, 0, 0, 0, 0)
    body = bytes(out) + parts[1][1] + parts[0][1] + trailing
    entry = count + 4 + 8 * 4
    body = body[:entry] + struct.pack("<II", len(body) if certificates else 0, len(certificates)) + body[entry + 8 :]
    return body + certificates
