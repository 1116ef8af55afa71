"""The page of a virtual CPU's state (VMSA) as hypervisors hand it to the SEV firmware (AMD APM 24593, vol. 2, B.4).

Only what is not zero is here, at its offset; the reset state of an x86 CPU, and what KVM adds to it. Everything in the
page is measured, so that it must be what the hypervisor writes, to the bit.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["HYPERVISORS", "RESET_ADDRESS", "vmsa_page"]

RESET_ADDRESS = 0xFFFFFFF0
"""Where the first CPU begins."""

_PAGE_BYTES = 4096
_SEGMENT = struct.Struct("<HHIQ")  # selector, attributes, limit, base
_LIMIT = 0xFFFF
_DATA, _LDT = 0x93, 0x82


@dataclass(frozen=True, slots=True)
class Hypervisor:
    """In what hypervisors differ."""

    code: tuple[int, int]
    """Attributes of CS on the first CPU, and on the others."""
    stack: int
    task: int
    pat: int
    mxcsr: int
    fcw: int
    rdx: int | None
    """``None``: the CPU's signature."""


HYPERVISORS: Mapping[str, Hypervisor] = MappingProxyType(
    {
        "qemu": Hypervisor((0x9B, 0x9B), 0x93, 0x8B, 0x0007040600070406, 0x1F80, 0x37F, None),
        "ec2": Hypervisor((0x9A, 0x9B), 0x92, 0x83, 0x0007040600070406, 0, 0, 0x600),
        "gce": Hypervisor((0x9B, 0x9B), 0x93, 0x8B, 0x00070106, 0, 0, 0x600),
    }
)
"""QEMU with KVM, Amazon EC2, Google Compute Engine."""


def vmsa_page(start: int, signature: int, guest_features: int, hypervisor: str) -> bytes:
    """The page of a CPU that begins at ``start``; ``signature`` is EAX of CPUID leaf 1."""
    which = HYPERVISORS[hypervisor]
    page = bytearray(_PAGE_BYTES)
    first = start == RESET_ADDRESS
    segments = {
        0x00: (0, _DATA, 0),  # ES
        0x10: (0xF000, which.code[not first], start & 0xFFFF0000),  # CS
        0x20: (0, which.stack, 0),  # SS
        0x30: (0, _DATA, 0),  # DS
        0x40: (0, _DATA, 0),  # FS
        0x50: (0, _DATA, 0),  # GS
        0x60: (0, 0, 0),  # GDTR
        0x70: (0, _LDT, 0),  # LDTR
        0x80: (0, 0, 0),  # IDTR
        0x90: (0, which.task, 0),  # TR
    }
    for offset, (selector, attributes, base) in segments.items():
        _SEGMENT.pack_into(page, offset, selector, attributes, _LIMIT, base)
    for offset, value, size in (
        (0x0D0, 0x1000, 8),  # EFER: SVM on
        (0x148, 0x40, 8),  # CR4: machine check on
        (0x158, 0x10, 8),  # CR0
        (0x160, 0x400, 8),  # DR7
        (0x168, 0xFFFF0FF0, 8),  # DR6
        (0x170, 0x2, 8),  # RFLAGS
        (0x178, start & 0xFFFF, 8),  # RIP
        (0x268, which.pat, 8),  # PAT
        (0x310, signature if which.rdx is None else which.rdx, 8),  # RDX
        (0x3B0, guest_features, 8),  # SEV_FEATURES
        (0x3E8, 0x1, 8),  # XCR0
        (0x408, which.mxcsr, 4),  # MXCSR
        (0x410, which.fcw, 2),  # x87 control word
    ):
        page[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(page)
