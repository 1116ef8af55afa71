"""Reference values for TDX: the section ``tdx`` (docs/spec/evidence-tdx.md)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from keyquorum_core.attestation.reference_members import bad, hex_values, pinned_roots, unique, until
from keyquorum_core.attestation.roots import INTEL_ROOTS
from keyquorum_core.strictjson import Fields

__all__ = ["EXCEPTABLE", "TcbException", "TdxImage", "TdxReferenceValues"]

EXCEPTABLE = frozenset(
    {
        "SWHardeningNeeded",
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDate",
        "OutOfDateConfigurationNeeded",
        "TDRelaunchAdvised",
        "TDRelaunchAdvisedConfigurationNeeded",
    }
)
"""The statuses that an exception may name; ``Revoked`` is none of them."""

_WHAT = "TDX reference values"
_ADVISORY = re.compile(r"[A-Z][A-Z0-9]{0,15}(-[A-Z0-9]{1,16}){1,4}", re.ASCII)
_MAX_IMAGES = 1024
_MAX_VALUES = 256
_MAX_EXCEPTIONS = 256
_MAX_COLLATERAL_AGE = 400 * 86400
_MEASUREMENT_BYTES = 48
_RTMRS = 4


@dataclass(frozen=True, slots=True)
class TcbException:
    """A TCB status or an advisory that is accepted up to and including ``until`` (unix seconds)."""

    name: str
    until: int


@dataclass(frozen=True, slots=True)
class TdxImage:
    """One image and what it may measure as; measurements of different images are never mixed."""

    name: str
    mrtd: bytes
    rtmrs: tuple[frozenset[bytes], ...]
    """What each of RTMR0–3 may be: it depends on the machine's shape, and so there may be several."""
    mrconfigid: frozenset[bytes]
    until: int | None
    """Unix seconds, included: the end of the image's grace period."""


@dataclass(frozen=True, slots=True)
class TdxReferenceValues:
    """Loaded by :meth:`parse`, which is what checks them."""

    roots: frozenset[str]
    """Intel roots, SHA-256 of SubjectPublicKeyInfo in hex."""
    development_roots: frozenset[str]
    images: tuple[TdxImage, ...]
    minimum_tcb_evaluation_data_number: int
    max_collateral_age: int
    """Seconds."""
    tcb_exceptions: tuple[TcbException, ...]

    @property
    def pinned_roots(self) -> frozenset[str]:
        return self.roots | self.development_roots

    @property
    def trusts_development(self) -> bool:
        """Whether evidence that no hardware made could be accepted: say so loudly."""
        return bool(self.development_roots)

    @classmethod
    def parse(cls, value: object) -> TdxReferenceValues:
        """Read the section, as :func:`~keyquorum_core.strictjson.loads` left it.

        Raises :class:`MalformedError` naming the member, also for one that is absent or empty.
        """
        fields = Fields(value, _WHAT)
        lists, development = pinned_roots(fields, _WHAT, "Intel", roots=INTEL_ROOTS)
        images = tuple(_image(each) for each in fields.list("images", min_items=1, max_items=_MAX_IMAGES))
        minimum = fields.integer("minimum_tcb_evaluation_data_number", 1, 0xFFFFFFFF)
        max_collateral_age = fields.integer("max_collateral_age", 1, _MAX_COLLATERAL_AGE)
        exceptions = tuple(_exception(each) for each in fields.list("tcb_exceptions", max_items=_MAX_EXCEPTIONS))
        fields.done()
        unique(_WHAT, "images", [each.name for each in images])
        unique(_WHAT, "tcb_exceptions", [each.name for each in exceptions])
        return cls(lists["roots"], development, images, minimum, max_collateral_age, exceptions)


def _image(value: object) -> TdxImage:
    what = f"{_WHAT}.images"
    fields = Fields(value, what)
    image = TdxImage(
        name=fields.text("name", max_length=128),
        mrtd=fields.hex("mrtd", _MEASUREMENT_BYTES),
        rtmrs=tuple(
            hex_values(fields, what, f"rtmr{index}", _MEASUREMENT_BYTES, minimum=1, maximum=_MAX_VALUES)
            for index in range(_RTMRS)
        ),
        mrconfigid=hex_values(fields, what, "mrconfigid", _MEASUREMENT_BYTES, minimum=1, maximum=_MAX_VALUES),
        until=until(fields),
    )
    fields.done()
    if not any(image.mrtd):
        raise bad(what, "mrtd", "no value of zeros", "zeros")
    return image


def _exception(value: object) -> TcbException:
    fields = Fields(value, f"{_WHAT}.tcb_exceptions")
    status = "status" in fields
    name = fields.text("status" if status else "advisory", max_length=64)
    end = fields.integer("until", 1)
    fields.done()
    if status and name not in EXCEPTABLE:
        raise bad(_WHAT, "tcb_exceptions", f"a status out of {', '.join(sorted(EXCEPTABLE))}", ascii(name))
    if not status and not _ADVISORY.fullmatch(name):
        raise bad(_WHAT, "tcb_exceptions", "an advisory id such as INTEL-SA-00615", ascii(name))
    return TcbException(name, end)
