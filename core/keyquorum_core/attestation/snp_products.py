"""What differs between the processors that speak SEV-SNP: Milan, Genoa (with Bergamo and Siena), Turin.

``TCB_VERSION`` is 8 bytes whose meaning depends on the product (SEV-SNP firmware ABI, 56860, §2.2), and so do the size
of the hardware id and the set of patch-level extensions in a VCEK or VLEK certificate (KDS interface, 57230, §3.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

__all__ = ["CPUID_MODELS", "Product"]


class Product(StrEnum):
    """A product line: one AMD root key, one TCB layout."""

    MILAN = "Milan"
    GENOA = "Genoa"
    TURIN = "Turin"

    @classmethod
    def from_certificate(cls, product_name: str) -> Product | None:
        """From the product name extension, such as ``Milan-B0`` or ``Turin``; ``None`` where it names no known line."""
        match = _PRODUCT_NAME.fullmatch(product_name)
        return cls(match[1]) if match else None

    @classmethod
    def from_cpuid(cls, family: int, model: int) -> Product | None:
        """From the combined family and model of CPUID leaf 1, which reports carry from version 3 on."""
        return next((line for line, known in CPUID_MODELS.items() if model in known.get(family, ())), None)

    @property
    def layout(self) -> Mapping[str, int]:
        """Component name to byte index in ``TCB_VERSION``."""
        return _TURIN_LAYOUT if self is Product.TURIN else _MILAN_LAYOUT

    @property
    def patch_level_arcs(self) -> Mapping[int, int]:
        """Last arc of the extension 1.3.6.1.4.1.3704.1.3.x to byte index in ``TCB_VERSION``, reserved ones included."""
        return _TURIN_ARCS if self is Product.TURIN else _MILAN_ARCS

    @property
    def structure_version(self) -> int:
        """The structure version that certificates of this product state."""
        return 1 if self is Product.TURIN else 0

    @property
    def hardware_id_bytes(self) -> int:
        """Length of the hwID extension; the report's 64-byte chip id is that, followed by zeros."""
        return 8 if self is Product.TURIN else 64

    def components(self, tcb: bytes) -> dict[str, int]:
        """The named patch levels of an 8-byte ``TCB_VERSION``."""
        return {name: tcb[index] for name, index in self.layout.items()}

    def pack(self, components: Mapping[str, int]) -> bytes:
        """The 8 bytes of ``TCB_VERSION`` with these patch levels (0 … 255 each), reserved bytes zero."""
        tcb = bytearray(8)
        for name, index in self.layout.items():
            tcb[index] = components[name]
        return bytes(tcb)


_PRODUCT_NAME = re.compile(r"(Milan|Genoa|Turin)(?:-[A-Z][0-9])?")
_MILAN_LAYOUT: Mapping[str, int] = MappingProxyType({"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7})
_TURIN_LAYOUT: Mapping[str, int] = MappingProxyType({"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7})
_MILAN_ARCS: Mapping[int, int] = MappingProxyType({1: 0, 2: 1, 4: 2, 5: 3, 6: 4, 7: 5, 3: 6, 8: 7})
_TURIN_ARCS: Mapping[int, int] = MappingProxyType({9: 0, 1: 1, 2: 2, 3: 3, 5: 4, 6: 5, 7: 6, 8: 7})

CPUID_MODELS: Mapping[Product, Mapping[int, tuple[int, ...]]] = MappingProxyType(
    {
        Product.MILAN: {0x19: tuple(range(0x10))},
        Product.GENOA: {0x19: (*range(0x10, 0x20), *range(0xA0, 0xB0))},
        Product.TURIN: {0x1A: tuple(range(0x12))},
    }
)
"""Product to combined CPUID family to the models of it."""
