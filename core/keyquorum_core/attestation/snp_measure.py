"""The launch measurement of an SEV-SNP guest, from what it is launched with (SEV-SNP firmware ABI, 56860, §8.17).

The firmware keeps a digest of 48 bytes, at first zero. For every page that the hypervisor puts into the guest before it
runs, the digest becomes SHA-384 of PAGE_INFO, 112 bytes, little-endian::

    digest 48 ‖ contents 48 ‖ u16 112 ‖ u8 page type ‖ u8 IMI page ‖ u8 reserved ‖ 3 × u8 VMPL permissions ‖ u64 address

where contents is SHA-384 of the page for types 1 (normal) and 2 (VMSA), and zero for 3 (zero), 4 (unmeasured),
5 (secrets) and 6 (CPUID). Permissions and IMI flag are zero here, as hypervisors have them.

The order: the firmware image; the sections of its SEV metadata, each in turn, kernel hashes among them; one VMSA for
each virtual CPU. What is not covered: guests under an SVSM or from an IGVM file (Hyper-V's, too), memory that a
hypervisor adds by itself, and hypervisors other than those in :data:`HYPERVISORS`.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from keyquorum_core.attestation.firmware_image import (
    PAGE_BYTES,
    SEV_ES_RESET,
    SEV_HASH_TABLE,
    Firmware,
    SevSection,
    parse_firmware,
)
from keyquorum_core.attestation.snp_vmsa import HYPERVISORS, RESET_ADDRESS, vmsa_page
from keyquorum_core.errors import MalformedError, Reason

__all__ = ["CPU_MODELS", "DirectBoot", "cpu_signature", "snp_measurement"]

_PAGE_INFO = struct.Struct("<48s48sHB5xQ")
_ZEROS = bytes(48)
_VMSA_ADDRESS = 0xFFFFFFFFF000
_NORMAL, _VMSA, _ZERO, _UNMEASURED, _SECRETS, _CPUID = range(1, 7)
_SEC_MEM, _SECRETS_SECTION, _CPUID_SECTION, _SVSM_CAA, _KERNEL_HASHES = 1, 2, 3, 4, 0x10
_MAX_CPUS = 4096

_TABLE = uuid.UUID("9438d606-4f22-4cc9-b479-a793d411fd21")
_CMDLINE = uuid.UUID("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
_INITRD = uuid.UUID("44baf731-3a2f-4bd7-9af1-41e29169781d")
_KERNEL = uuid.UUID("4de79437-abd2-427f-b835-d5b172d2045b")

CPU_MODELS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "EPYC": (0x17, 1, 2),
        "EPYC-Rome": (0x17, 49, 0),
        "EPYC-Milan": (0x19, 1, 1),
        "EPYC-Genoa": (0x19, 17, 0),
        "EPYC-Turin": (0x1A, 0, 0),
    }
)
"""QEMU's CPU models by family, model and stepping; their versions (``-v2``) have the same."""


@dataclass(frozen=True, slots=True)
class DirectBoot:
    """What the hypervisor boots without a boot loader, with ``kernel-hashes=on``."""

    kernel: bytes
    initrd: bytes = b""
    cmdline: str = ""

    def table(self) -> bytes:
        """The table of SHA-256 digests that the firmware compares with what it is given; padded to 16 bytes."""
        entries = b"".join(
            guid.bytes_le + (50).to_bytes(2, "little") + hashlib.sha256(data).digest()
            for guid, data in (
                (_CMDLINE, self.cmdline.encode() + b"\0"),
                (_INITRD, self.initrd),
                (_KERNEL, self.kernel),
            )
        )
        table = _TABLE.bytes_le + (18 + len(entries)).to_bytes(2, "little") + entries
        return table.ljust(-(-len(table) // 16) * 16, b"\0")


def cpu_signature(family: int, model: int, stepping: int) -> int:
    """EAX of CPUID leaf 1 (AMD 25481): what a virtual CPU finds in RDX. Raises :class:`MalformedError`."""
    if not (0 <= family <= 0xF + 0xFF and 0 <= model <= 0xFF and 0 <= stepping <= 0xF):
        raise MalformedError(
            Reason.MALFORMED, "no such CPU", expected="family 0 … 270, model 0 … 255, stepping 0 … 15", actual=family
        )
    extended = max(family - 0xF, 0)
    return extended << 20 | model >> 4 << 16 | min(family, 0xF) << 8 | (model & 0xF) << 4 | stepping


def snp_measurement(
    image: bytes,
    *,
    cpus: int,
    signature: int,
    guest_features: int = 1,
    hypervisor: str = "qemu",
    boot: DirectBoot | None = None,
) -> bytes:
    """The 48 bytes that a report of this guest has as its measurement.

    ``signature`` is that of :func:`cpu_signature`; ``guest_features`` is SEV_FEATURES in each VMSA, whose bit 0 says
    SEV-SNP. Raises :class:`MalformedError` for an image that is not for SEV-SNP, or that measures no kernel where
    ``boot`` gives one.
    """
    if not 1 <= cpus <= _MAX_CPUS or hypervisor not in HYPERVISORS:
        raise MalformedError(
            Reason.MALFORMED,
            "no such guest",
            expected=f"1 … {_MAX_CPUS} CPUs under {', '.join(HYPERVISORS)}",
            actual=f"{cpus} under {hypervisor}",
        )
    firmware = parse_firmware(image)
    sections = firmware.sev_sections()
    if boot is not None and not any(each.kind == _KERNEL_HASHES for each in sections):
        raise MalformedError(
            Reason.UNSUPPORTED,
            "this firmware does not measure kernel, initrd and command line",
            expected="a section for kernel hashes in its SEV metadata",
            actual="none",
            next_step="build OVMF for AmdSev, or leave the kernel to a boot loader inside the measured image",
        )
    digest = _Digest()
    digest.normal(firmware.address, image)
    for section in sections:
        if section.kind != _CPUID_SECTION or hypervisor != "ec2":
            _section(digest, firmware, section, boot, hypervisor)
    for section in sections:
        if section.kind == _CPUID_SECTION and hypervisor == "ec2":  # which adds this page last
            _section(digest, firmware, section, boot, hypervisor)
    reset = int.from_bytes(firmware.entry(SEV_ES_RESET, 4, "where further CPUs start"), "little") if cpus > 1 else 0
    for number in range(cpus):
        page = vmsa_page(RESET_ADDRESS if number == 0 else reset, signature, guest_features, hypervisor)
        digest.page(_VMSA, _VMSA_ADDRESS, hashlib.sha384(page).digest())
    return digest.value


class _Digest:
    """The launch digest so far."""

    def __init__(self) -> None:
        self.value = _ZEROS

    def page(self, kind: int, address: int, contents: bytes = _ZEROS) -> None:
        self.value = hashlib.sha384(_PAGE_INFO.pack(self.value, contents, _PAGE_INFO.size, kind, address)).digest()

    def normal(self, address: int, data: bytes) -> None:
        for offset in range(0, len(data), PAGE_BYTES):
            self.page(_NORMAL, address + offset, hashlib.sha384(data[offset : offset + PAGE_BYTES]).digest())

    def pages(self, kind: int, section: SevSection) -> None:
        for address in _addresses(section):
            self.page(kind, address)


def _addresses(section: SevSection) -> Iterator[int]:
    yield from range(section.address, section.address + section.size, PAGE_BYTES)


def _section(
    digest: _Digest, firmware: Firmware, section: SevSection, boot: DirectBoot | None, hypervisor: str
) -> None:
    if section.kind == _SEC_MEM:
        digest.pages(_UNMEASURED if hypervisor == "gce" else _ZERO, section)
    elif section.kind == _SECRETS_SECTION:
        digest.page(_SECRETS, section.address)
    elif section.kind == _CPUID_SECTION:
        digest.page(_CPUID, section.address)
    elif section.kind == _SVSM_CAA or (section.kind == _KERNEL_HASHES and boot is None):
        digest.pages(_ZERO, section)
    elif section.kind == _KERNEL_HASHES and boot is not None:
        base = int.from_bytes(firmware.entry(SEV_HASH_TABLE, 4, "where kernel hashes go"), "little")
        table = boot.table()
        offset = base % PAGE_BYTES
        if section.size != PAGE_BYTES or offset + len(table) > PAGE_BYTES:
            raise MalformedError(
                Reason.MALFORMED, "firmware image: kernel hashes", expected="one page that holds them", actual=offset
            )
        digest.normal(section.address, (bytes(offset) + table).ljust(PAGE_BYTES, b"\0"))
    else:
        raise MalformedError(
            Reason.UNSUPPORTED,
            "firmware image: a section of a kind that is not known",
            expected="1, 2, 3, 4 or 16",
            actual=section.kind,
        )
