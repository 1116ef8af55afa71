"""Reference values for SEV-SNP: the section ``sev-snp`` (docs/spec/evidence.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from keyquorum_core.attestation.reference_members import bad, hex_values, one_of, pinned_roots, unique, until
from keyquorum_core.attestation.roots import AMD_ROOTS
from keyquorum_core.attestation.snp_products import Product
from keyquorum_core.strictjson import Fields

__all__ = ["PLATFORM_INFO", "SnpImage", "SnpReferenceValues", "TcbGrace"]

PLATFORM_INFO: Mapping[str, int] = MappingProxyType(
    {
        "SMT_EN": 1 << 0,
        "TSME_EN": 1 << 1,
        "ECC_EN": 1 << 2,
        "RAPL_DIS": 1 << 3,
        "CIPHERTEXT_HIDING_DRAM_EN": 1 << 4,
        "ALIAS_CHECK_COMPLETE": 1 << 5,
        "TIO_EN": 1 << 7,
    }
)
"""Bits of PLATFORM_INFO (56860, table 24): how the host configured the machine."""

_WHAT = "SEV-SNP reference values"
_MAX_IMAGES = 1024
_MAX_VALUES = 256
_MAX_GRACE = 64
_MEASUREMENT_BYTES = 48
_MAX_CRL_AGE = 400 * 86400


@dataclass(frozen=True, slots=True)
class SnpImage:
    """One image, and all that a report of it may say of what was launched."""

    name: str
    measurement: bytes
    host_data: frozenset[bytes]
    """32 bytes each; zeros where the host gives none."""
    id_key_digests: frozenset[bytes]
    """48 bytes each, of the key that signed the ID block; zeros for a launch without one."""
    author_key_digests: frozenset[bytes]
    minimum_guest_svn: int
    until: int | None
    """Unix seconds, included: the end of the image's grace period."""


@dataclass(frozen=True, slots=True)
class TcbGrace:
    """A lower minimum that is accepted up to and including ``until`` (unix seconds)."""

    product: Product
    minimum: Mapping[str, int]
    until: int


@dataclass(frozen=True, slots=True)
class SnpReferenceValues:
    """Loaded by :meth:`parse`, which is what checks them."""

    roots: frozenset[str]
    """AMD roots, SHA-256 of SubjectPublicKeyInfo in hex."""
    development_roots: frozenset[str]
    images: tuple[SnpImage, ...]
    minimum_tcb: Mapping[Product, Mapping[str, int]]
    tcb_grace: tuple[TcbGrace, ...]
    vmpl: frozenset[int]
    platform_required: int
    """Bits that PLATFORM_INFO must have."""
    platform_allowed: int
    """Bits that it may have; those it must have among them."""
    require_revocation: bool
    max_revocation_age: int
    """Seconds since a CRL's update."""

    @property
    def pinned_roots(self) -> frozenset[str]:
        return self.roots | self.development_roots

    @property
    def trusts_development(self) -> bool:
        """Whether evidence that no hardware made could be accepted: say so loudly."""
        return bool(self.development_roots)

    @classmethod
    def parse(cls, value: object) -> SnpReferenceValues:
        """Read the section, as :func:`~keyquorum_core.strictjson.loads` left it.

        Raises :class:`MalformedError` naming the member, also for one that is absent or empty.
        """
        fields = Fields(value, _WHAT)
        lists, development = pinned_roots(fields, _WHAT, "AMD", roots=AMD_ROOTS)
        images = tuple(_image(each) for each in fields.list("images", min_items=1, max_items=_MAX_IMAGES))
        minimum = _minimums(fields.object("minimum_tcb"))
        grace = tuple(_grace(each) for each in fields.list("tcb_grace", max_items=_MAX_GRACE))
        vmpl = _vmpl(fields)
        platform = fields.object("platform_info")
        required, allowed = (_bits(platform, name) for name in ("required", "allowed"))
        platform.done()
        revocation = one_of(fields, _WHAT, "revocation", "required", "when-given")
        max_revocation_age = fields.integer("max_revocation_age", 60, _MAX_CRL_AGE)
        fields.done()
        unique(_WHAT, "images", [each.name for each in images])
        without = {AMD_ROOTS[root] for root in lists["roots"]} - {str(product) for product in minimum}
        if without:
            raise bad(
                _WHAT, "minimum_tcb", "a minimum for the product of each root", f"none for {', '.join(sorted(without))}"
            )
        for each in grace:
            floor = minimum.get(each.product)
            if floor is None or any(level > floor[name] for name, level in each.minimum.items()):
                raise bad(_WHAT, "tcb_grace", "levels that are not above the minimum of the product", each.product)
        return cls(
            roots=lists["roots"],
            development_roots=development,
            images=images,
            minimum_tcb=minimum,
            tcb_grace=grace,
            vmpl=vmpl,
            platform_required=required,
            platform_allowed=allowed | required,
            require_revocation=revocation == "required",
            max_revocation_age=max_revocation_age,
        )


def _image(value: object) -> SnpImage:
    what = f"{_WHAT}.images"
    fields = Fields(value, what)
    image = SnpImage(
        name=fields.text("name", max_length=128),
        measurement=fields.hex("measurement", _MEASUREMENT_BYTES),
        host_data=hex_values(fields, what, "host_data", 32, minimum=1, maximum=_MAX_VALUES),
        id_key_digests=hex_values(fields, what, "id_key_digests", 48, minimum=1, maximum=_MAX_VALUES),
        author_key_digests=hex_values(fields, what, "author_key_digests", 48, minimum=1, maximum=_MAX_VALUES),
        minimum_guest_svn=fields.integer("minimum_guest_svn", 0, 0xFFFFFFFF),
        until=until(fields),
    )
    fields.done()
    if not any(image.measurement):
        raise bad(what, "measurement", "no value of zeros", "zeros")
    return image


def _levels(fields: Fields, product: Product) -> Mapping[str, int]:
    levels = {name: fields.integer(name, 0, 255) for name in product.layout}
    fields.done()
    return MappingProxyType(levels)


def _minimums(fields: Fields) -> Mapping[Product, Mapping[str, int]]:
    minimum = {
        product: _levels(fields.object(product.value), product) for product in Product if product.value in fields
    }
    fields.done()
    if not minimum:
        raise bad(_WHAT, "minimum_tcb", f"a minimum for one of {', '.join(Product)}", "none")
    return MappingProxyType(minimum)


def _grace(value: object) -> TcbGrace:
    fields = Fields(value, f"{_WHAT}.tcb_grace")
    name = one_of(fields, f"{_WHAT}.tcb_grace", "product", *Product)
    grace = TcbGrace(Product(name), _levels(fields.object("minimum"), Product(name)), fields.integer("until", 1))
    fields.done()
    return grace


def _vmpl(fields: Fields) -> frozenset[int]:
    levels = fields.list("vmpl", min_items=1, max_items=4)
    allowed = [each for each in levels if isinstance(each, int) and not isinstance(each, bool) and 0 <= each <= 3]
    if len(set(allowed)) != len(levels):
        raise bad(_WHAT, "vmpl", "distinct levels out of 0, 1, 2, 3", levels)
    return frozenset(allowed)


def _bits(fields: Fields, name: str) -> int:
    names = fields.texts(name, max_items=len(PLATFORM_INFO), max_length=32)
    unique(_WHAT, name, names)
    if set(names) - PLATFORM_INFO.keys():
        raise bad(_WHAT, name, f"bits out of {', '.join(PLATFORM_INFO)}", ", ".join(sorted(set(names)))[:200])
    return sum(PLATFORM_INFO[each] for each in names)
