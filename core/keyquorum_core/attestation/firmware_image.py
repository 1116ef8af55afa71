"""A guest firmware image (OVMF, TDVF) as bytes: the table at its end that says where things are in it.

The table ends 32 bytes before the image does. It is read backwards: each entry is its data, then a u16 with the entry's
whole size, then a GUID (OvmfPkg/ResetVector, "OVMF GUIDed structure"). The last entry is the footer and says how large
the table is. Little-endian throughout. SEV and TDX metadata are found through it, as offsets from the image's end.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from keyquorum_core.errors import MalformedError, Reason

__all__ = ["FOUR_GIB", "PAGE_BYTES", "Firmware", "SevSection", "TdvfSection", "parse_firmware"]

FOUR_GIB = 1 << 32
PAGE_BYTES = 4096

_MAX_IMAGE = 64 << 20
_MAX_ENTRIES = 64
_MAX_SECTIONS = 64
_MAX_SECTION_BYTES = 256 << 20
_AFTER_TABLE = 32
_ENTRY = struct.Struct("<H16s")
_SEV_HEADER = struct.Struct("<4sIII")  # ASEV, size, version, number of sections
_SEV_SECTION = struct.Struct("<III")  # guest physical address, size, type
_TDVF_HEADER = struct.Struct("<4sIII")  # TDVF, size, version, number of sections
_TDVF_SECTION = struct.Struct("<IIQQII")  # data offset, data size, address, memory size, type, attributes

_FOOTER = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
SEV_METADATA = uuid.UUID("dc886566-984a-4798-a75e-5585a7bf67cc")
SEV_HASH_TABLE = uuid.UUID("7255371f-3a3b-4b04-927b-1da6efa8d454")
SEV_ES_RESET = uuid.UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
TDX_METADATA = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2")


@dataclass(frozen=True, slots=True)
class SevSection:
    """Memory that the hypervisor prepares before an SEV-SNP guest runs; ``kind`` as in OVMF's metadata."""

    address: int
    size: int
    kind: int


@dataclass(frozen=True, slots=True)
class TdvfSection:
    """Memory that the hypervisor adds before a TD runs (TDVF design guide, §11)."""

    data: bytes
    """What the image holds for it; empty: zeros."""
    address: int
    size: int
    kind: int
    attributes: int


@dataclass(frozen=True, slots=True)
class Firmware:
    """An image of whole pages, and the table at its end: GUID to data."""

    image: bytes
    table: Mapping[uuid.UUID, bytes]

    @property
    def address(self) -> int:
        """Where the image lies: it ends at 4 GiB."""
        return FOUR_GIB - len(self.image)

    def entry(self, guid: uuid.UUID, size: int, what: str) -> bytes:
        """The first ``size`` bytes of an entry. Raises :class:`MalformedError`."""
        data = self.table.get(guid)
        if data is None or len(data) < size:
            raise _malformed(
                f"it says nothing of {what}", f"{size} bytes under {guid}", "none" if data is None else data.hex()
            )
        return data[:size]

    def sev_sections(self) -> tuple[SevSection, ...]:
        """The sections of the SEV metadata, in their order. Raises :class:`MalformedError`."""
        start, count = self._metadata(SEV_METADATA, "SEV", _SEV_HEADER, b"ASEV", _SEV_SECTION.size)
        sections = [
            SevSection(*_SEV_SECTION.unpack_from(self.image, start + each * _SEV_SECTION.size)) for each in range(count)
        ]
        for section in sections:
            if section.address % PAGE_BYTES or section.size % PAGE_BYTES or not 0 < section.size <= _MAX_SECTION_BYTES:
                raise _malformed("a section of the SEV metadata", "whole pages", f"{section.size} bytes")
        return tuple(sections)

    def tdvf_sections(self) -> tuple[TdvfSection, ...]:
        """The sections of the TDX metadata, in their order. Raises :class:`MalformedError`."""
        start, count = self._metadata(TDX_METADATA, "TDX", _TDVF_HEADER, b"TDVF", _TDVF_SECTION.size)
        sections = []
        for each in range(count):
            offset, size, address, memory, kind, attributes = _TDVF_SECTION.unpack_from(
                self.image, start + each * _TDVF_SECTION.size
            )
            if address % PAGE_BYTES or memory % PAGE_BYTES or size > memory or memory > _MAX_SECTION_BYTES:
                raise _malformed("a section of the TDX metadata", "whole pages, no more data than memory", f"{each}")
            if offset + size > len(self.image):
                raise _malformed("a section of the TDX metadata", "data inside the image", f"{offset} + {size}")
            sections.append(TdvfSection(self.image[offset : offset + size], address, memory, kind, attributes))
        return tuple(sections)

    def _metadata(
        self, guid: uuid.UUID, what: str, header: struct.Struct, signature: bytes, section_bytes: int
    ) -> tuple[int, int]:
        """Where the sections begin, and how many there are."""
        offset = int.from_bytes(self.entry(guid, 4, f"{what} metadata"), "little")
        at = len(self.image) - offset
        if at < 0 or at + header.size > len(self.image):
            raise _malformed(f"{what} metadata", "inside the image", f"{offset} bytes before its end")
        found, size, version, count = header.unpack_from(self.image, at)
        if found != signature or version != 1 or count > _MAX_SECTIONS:
            raise _malformed(
                f"{what} metadata", f"{signature.decode()}, version 1, at most {_MAX_SECTIONS} sections", f"{found!r}"
            )
        start = at + header.size
        if size < header.size + count * section_bytes or start + count * section_bytes > len(self.image):
            raise _malformed(f"{what} metadata", f"{count} sections", f"{size} bytes")
        return start, count


def parse_firmware(image: bytes) -> Firmware:
    """Read an image of at most 64 MiB. Raises :class:`MalformedError`; where it stands, only the table counts."""
    if not image or len(image) % PAGE_BYTES or len(image) > _MAX_IMAGE:
        raise _malformed("size", f"whole pages of {PAGE_BYTES} bytes, at most {_MAX_IMAGE}", f"{len(image)} bytes")
    end = len(image) - _AFTER_TABLE
    size, guid = _ENTRY.unpack_from(image, end - _ENTRY.size)
    if guid != _FOOTER.bytes_le or not _ENTRY.size <= size <= end:
        raise _malformed("table", f"one that ends with {_FOOTER}", "none")
    start, at = end - size, end - _ENTRY.size
    table: dict[uuid.UUID, bytes] = {}
    while at > start:
        if at - start < _ENTRY.size or len(table) >= _MAX_ENTRIES:
            raise _malformed("table", f"at most {_MAX_ENTRIES} whole entries", "others")
        size, guid = _ENTRY.unpack_from(image, at - _ENTRY.size)
        if not _ENTRY.size <= size <= at - start or uuid.UUID(bytes_le=guid) in table:
            raise _malformed("table", "entries within it, each GUID once", f"an entry of {size} bytes")
        table[uuid.UUID(bytes_le=guid)] = image[at - size : at - _ENTRY.size]
        at -= size
    return Firmware(image, MappingProxyType(table))


def _malformed(what: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"firmware image: {what}", expected=expected, actual=actual)
