"""Reference values for NVIDIA GPUs: the section ``nvidia-gpu`` (docs/spec/evidence-nvidia.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from keyquorum_core.attestation.reference_members import bad, one_of, pinned_roots, unique
from keyquorum_core.attestation.roots import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS
from keyquorum_core.strictjson import Fields

__all__ = ["NvidiaReferenceValues"]

_WHAT = "NVIDIA reference values"
_MAX_VERSIONS = 1024
_MAX_GRACE = 256
_MAX_REVOCATION_AGE = 7 * 86400
_CHIP = re.compile(r"G[A-Z][0-9]{3}|G[A-Z][0-9A-Z]{3}", re.ASCII)
_DRIVER = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,4}){1,3}", re.ASCII)
_VBIOS = re.compile(r"[0-9A-F]{2}(?:\.[0-9A-F]{2}){4}", re.ASCII)

Versions = Mapping[str, int | None]
"""Versions as reports state them, each with the end of its grace period (unix seconds, included) or ``None``."""


@dataclass(frozen=True, slots=True)
class NvidiaReferenceValues:
    """Loaded by :meth:`parse`, which is what checks them."""

    roots: frozenset[str]
    """NVIDIA roots of device certificates, SHA-256 of SubjectPublicKeyInfo in hex."""
    rim_roots: frozenset[str]
    development_roots: frozenset[str]
    """Of either kind."""
    chips: frozenset[str]
    driver_versions: Versions
    vbios_versions: Versions
    require_revocation: bool
    max_revocation_age: int
    """Seconds since an OCSP response's update."""

    @property
    def pinned_roots(self) -> frozenset[str]:
        return self.roots | self.development_roots

    @property
    def pinned_rim_roots(self) -> frozenset[str]:
        return self.rim_roots | self.development_roots

    @property
    def trusts_development(self) -> bool:
        """Whether evidence that no hardware made could be accepted: say so loudly."""
        return bool(self.development_roots)

    @classmethod
    def parse(cls, value: object) -> NvidiaReferenceValues:
        """Read the section, as :func:`~keyquorum_core.strictjson.loads` left it.

        Raises :class:`MalformedError` naming the member, also for one that is absent or empty.
        """
        fields = Fields(value, _WHAT)
        lists, development = pinned_roots(
            fields, _WHAT, "NVIDIA", roots=NVIDIA_DEVICE_ROOTS, rim_roots=NVIDIA_RIM_ROOTS
        )
        chips = frozenset(_versions(fields, "chips", _CHIP))
        versions: dict[str, dict[str, int | None]] = {
            "driver_version": dict.fromkeys(_versions(fields, "driver_versions", _DRIVER)),
            "vbios_version": dict.fromkeys(_versions(fields, "vbios_versions", _VBIOS)),
        }
        for each in fields.list("grace", max_items=_MAX_GRACE):
            _grace(each, versions)
        revocation = one_of(fields, _WHAT, "revocation", "required", "when-given")
        max_revocation_age = fields.integer("max_revocation_age", 60, _MAX_REVOCATION_AGE)
        fields.done()
        return cls(
            roots=lists["roots"],
            rim_roots=lists["rim_roots"],
            development_roots=development,
            chips=chips,
            driver_versions=MappingProxyType(versions["driver_version"]),
            vbios_versions=MappingProxyType(versions["vbios_version"]),
            require_revocation=revocation == "required",
            max_revocation_age=max_revocation_age,
        )


def _versions(fields: Fields, name: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
    values = fields.texts(name, min_items=1, max_items=_MAX_VERSIONS, max_length=32)
    unique(_WHAT, name, values)
    return tuple(_checked(name, each, pattern) for each in values)


def _checked(name: str, value: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(value):
        raise bad(_WHAT, name, "versions as reports state them", ascii(value))
    return value


def _grace(value: object, versions: dict[str, dict[str, int | None]]) -> None:
    """One entry: an older version of driver or VBIOS, with the end of its time."""
    fields = Fields(value, f"{_WHAT}.grace")
    name = "vbios_version" if "vbios_version" in fields else "driver_version"
    version = _checked(name, fields.text(name, max_length=32), _VBIOS if name == "vbios_version" else _DRIVER)
    end = fields.integer("until", 1)
    fields.done()
    if version in versions[name]:
        raise bad(_WHAT, "grace", "versions that are not listed otherwise", "a repetition")
    versions[name][version] = end
