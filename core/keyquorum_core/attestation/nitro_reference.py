"""Reference values for AWS Nitro Enclaves: the section ``nitro`` (docs/spec/evidence-nitro.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from keyquorum_core.attestation.reference_members import bad, pinned_roots, unique, until
from keyquorum_core.attestation.roots import AWS_NITRO_ROOTS
from keyquorum_core.strictjson import Fields

__all__ = ["REQUIRED_PCRS", "NitroImage", "NitroReferenceValues"]

REQUIRED_PCRS = (0, 1, 2)

_WHAT = "Nitro reference values"
_PCR_BYTES = 48
_FURTHER_PCRS = range(3, 32)
_MAX_IMAGES = 1024
_MAX_DOCUMENT_AGE = 3 * 3600


@dataclass(frozen=True, slots=True)
class NitroImage:
    """One image and its PCRs, 48 bytes each: 0, 1 and 2, and those of 3 … 31 that are to be met too."""

    name: str
    pcrs: Mapping[int, bytes]
    until: int | None
    """Unix seconds, included: the end of the image's grace period."""


@dataclass(frozen=True, slots=True)
class NitroReferenceValues:
    """Loaded by :meth:`parse`, which is what checks them."""

    roots: frozenset[str]
    """AWS roots, SHA-256 of SubjectPublicKeyInfo in hex."""
    development_roots: frozenset[str]
    images: tuple[NitroImage, ...]
    max_document_age: int
    """Seconds."""

    @property
    def pinned_roots(self) -> frozenset[str]:
        return self.roots | self.development_roots

    @property
    def trusts_development(self) -> bool:
        """Whether evidence that no hardware made could be accepted: say so loudly."""
        return bool(self.development_roots)

    @classmethod
    def parse(cls, value: object) -> NitroReferenceValues:
        """Read the section, as :func:`~keyquorum_core.strictjson.loads` left it.

        Raises :class:`MalformedError` naming the member, also for one that is absent or empty.
        """
        fields = Fields(value, _WHAT)
        lists, development = pinned_roots(fields, _WHAT, "AWS", roots=AWS_NITRO_ROOTS)
        images = tuple(_image(each) for each in fields.list("images", min_items=1, max_items=_MAX_IMAGES))
        max_document_age = fields.integer("max_document_age", 1, _MAX_DOCUMENT_AGE)
        fields.done()
        unique(_WHAT, "images", [each.name for each in images])
        return cls(lists["roots"], development, images, max_document_age)


def _image(value: object) -> NitroImage:
    what = f"{_WHAT}.images"
    fields = Fields(value, what)
    name = fields.text("name", max_length=128)
    given = fields.object("pcrs")
    end = until(fields)
    fields.done()
    pcrs = {index: given.hex(str(index), _PCR_BYTES) for index in REQUIRED_PCRS}
    pcrs |= {index: given.hex(str(index), _PCR_BYTES) for index in _FURTHER_PCRS if str(index) in given}
    given.done()
    if not all(any(value) for value in pcrs.values()):
        raise bad(what, "pcrs", "no value of zeros", "zeros")
    return NitroImage(name, MappingProxyType(pcrs), end)
