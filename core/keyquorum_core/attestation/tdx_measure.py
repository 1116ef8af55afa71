"""MRTD and RTMRs of a TD from what it is launched with (TDX module ABI, 348551; TDVF design guide, §11).

**MRTD** is SHA-384 over what the hypervisor does before the TD runs. For each page that it adds (TDH.MEM.PAGE.ADD) 128
bytes are hashed: ``MEM.PAGE.ADD``, zeros, and at 16 the guest physical address, u64 little-endian. Where the section
says that its contents are measured, then for each 256 bytes of it (TDH.MR.EXTEND) 128 such bytes with ``MR.EXTEND``
and the 256 bytes themselves. Sections that the TD accepts later (attribute PAGE.AUG) are not added. The order is the
hypervisor's: KVM adds and measures page by page (Linux from 6.16); hypervisors before it added all pages of a section
and then measured them (``two_passes``).

**RTMR1 and RTMR2** are those of QEMU's direct boot of a Linux kernel with an EFI stub under edk2: the kernel's
Authenticode digest and four events of fixed text; then the load options (``initrd=initrd`` and the command line) and
the initrd. **RTMR3** nobody extends.

What is not covered: RTMR0 depends on memory map, ACPI tables and variables that the hypervisor makes for the machine's
shape; boot loaders and other firmware measure otherwise. There the registers come from an event log
(:func:`tdx_rtmrs`) of a machine that you trust, each digest in it compared with what you ship.
"""

from __future__ import annotations

import hashlib

from keyquorum_core.attestation.firmware_image import PAGE_BYTES, TdvfSection, parse_firmware
from keyquorum_core.attestation.pe_image import authenticode_sha384
from keyquorum_core.attestation.tdx_events import Event, parse_event_log, replay
from keyquorum_core.errors import MalformedError, Reason

__all__ = ["direct_boot_rtmrs", "tdx_mrtd", "tdx_rtmrs"]

_CHUNK_BYTES = 256
_EXTEND, _LATER = 1, 2  # section attributes: MR.EXTEND, PAGE.AUG
_BOOT_FIRMWARE = 0
_BOOT_EVENTS = (
    b"Calling EFI Application from Boot Option",
    bytes(4),  # the separator
    b"Exit Boot Services Invocation",
    b"Exit Boot Services Returned with Success",
)


def tdx_mrtd(image: bytes, *, two_passes: bool = False) -> bytes:
    """MRTD, 48 bytes. Raises :class:`MalformedError` for an image that is no TDVF."""
    sections = parse_firmware(image).tdvf_sections()
    if not any(each.kind == _BOOT_FIRMWARE and each.attributes & _EXTEND for each in sections):
        raise MalformedError(
            Reason.MALFORMED,
            "firmware image: no boot firmware volume that is measured",
            expected="a section of type 0 with the attribute MR.EXTEND",
            actual=f"{len(sections)} sections",
        )
    digest = hashlib.sha384()
    for section in sections:
        if section.attributes & _LATER:
            continue
        pages = range(0, section.size, PAGE_BYTES)
        for passes in ((True, False), (False, True)) if two_passes else ((True, True),):
            for offset in pages:
                if passes[0]:
                    digest.update(_record(b"MEM.PAGE.ADD", section.address + offset))
                if passes[1] and section.attributes & _EXTEND:
                    for at in range(offset, offset + PAGE_BYTES, _CHUNK_BYTES):
                        digest.update(_record(b"MR.EXTEND", section.address + at) + _chunk(section, at))
    return digest.digest()


def direct_boot_rtmrs(kernel: bytes, initrd: bytes, cmdline: str) -> tuple[bytes, bytes]:
    """RTMR1 and RTMR2 of a direct boot. Raises :class:`MalformedError` for a kernel that is no PE image."""
    options = f"initrd=initrd {cmdline}".encode("utf-16-le") + bytes(2)
    started = [authenticode_sha384(kernel), *(hashlib.sha384(each).digest() for each in _BOOT_EVENTS)]
    return _extended(started), _extended([hashlib.sha384(each).digest() for each in (options, initrd)])


def _extended(digests: list[bytes]) -> bytes:
    register = bytes(hashlib.sha384().digest_size)
    for each in digests:
        register = hashlib.sha384(register + each).digest()
    return register


def tdx_rtmrs(event_log: bytes) -> tuple[tuple[bytes, bytes, bytes, bytes], tuple[Event, ...]]:
    """RTMR0–3 after the events of a log, and the events. Raises as
    :func:`~keyquorum_core.attestation.tdx_events.parse_event_log`."""
    events = parse_event_log(event_log)
    return replay(events), events


def _record(name: bytes, address: int) -> bytes:
    return (name.ljust(16, b"\0") + address.to_bytes(8, "little")).ljust(128, b"\0")


def _chunk(section: TdvfSection, at: int) -> bytes:
    return section.data[at : at + _CHUNK_BYTES].ljust(_CHUNK_BYTES, b"\0")
