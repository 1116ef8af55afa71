"""Reference values for TPM 2.0: the section ``tpm2`` (docs/spec/evidence-tpm2.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from keyquorum_core.attestation.reference_members import bad, hex_values
from keyquorum_core.attestation.tpm2_structures import HashAlgorithm, hash_by_name
from keyquorum_core.strictjson import Fields

__all__ = ["Tpm2ReferenceValues"]

_WHAT = "TPM reference values"
_MAX_VALUES = 256
_MAX_VERSIONS = 256
_MAX_GRACE = 256
_PCRS = 24
_PCR_INDEX = re.compile(r"0|[1-9]|1[0-9]|2[0-3]", re.ASCII)
_VERSION_BYTES = 8

Until = int | None
"""The end of a grace period, unix seconds and included; ``None``: no end is set."""


@dataclass(frozen=True, slots=True)
class Tpm2ReferenceValues:
    """Loaded by :meth:`parse`, which is what checks them."""

    bank: HashAlgorithm
    pcrs: Mapping[int, Mapping[bytes, Until]]
    """The PCRs that must be quoted, these and no others, with the values that each may have."""
    firmware_versions: Mapping[int, Until]
    event_log_required: bool
    secure_boot_required: bool

    @classmethod
    def parse(cls, value: object) -> Tpm2ReferenceValues:
        """Read the section, as :func:`~keyquorum_core.strictjson.loads` left it.

        Raises :class:`MalformedError` naming the member, also for one that is absent or empty, and for a PCR value of
        all zeros or ones: nothing was measured into such a PCR.
        """
        fields = Fields(value, _WHAT)
        name = fields.text("bank", max_length=16)
        bank = hash_by_name(name)
        if bank is None or not bank.strong:
            raise bad(_WHAT, "bank", "sha256, sha384 or sha512", name)
        listed = fields.object("pcrs")
        pcrs: dict[int, dict[bytes, Until]] = {}
        for index in listed.names():
            if not _PCR_INDEX.fullmatch(index):
                raise bad(_WHAT, "pcrs", f"PCRs 0 … {_PCRS - 1} in decimal", index[:20])
            values = hex_values(listed, _WHAT, index, bank.size, minimum=1, maximum=_MAX_VALUES)
            pcrs[int(index)] = dict.fromkeys(map(_measured, values))
        if not pcrs:
            raise bad(_WHAT, "pcrs", "at least one PCR", "none")
        versions: dict[int, Until] = dict.fromkeys(
            int.from_bytes(each, "big")
            for each in hex_values(fields, _WHAT, "firmware_versions", _VERSION_BYTES, minimum=1, maximum=_MAX_VERSIONS)
        )
        for each in fields.list("grace", max_items=_MAX_GRACE):
            _grace(each, bank, pcrs, versions)
        event_log = fields.boolean("event_log_required")
        secure_boot = fields.boolean("secure_boot_required")
        fields.done()
        if secure_boot and not (event_log and 7 in pcrs):
            raise bad(_WHAT, "secure_boot_required", "true only with event_log_required and PCR 7 in pcrs", "true")
        return cls(
            bank=bank,
            pcrs=MappingProxyType({index: MappingProxyType(values) for index, values in pcrs.items()}),
            firmware_versions=MappingProxyType(versions),
            event_log_required=event_log,
            secure_boot_required=secure_boot,
        )


def _measured(value: bytes) -> bytes:
    if value.strip(value[:1]) == b"" and value[0] in (0x00, 0xFF):
        raise bad(_WHAT, "pcrs", "no value of all zeros or ones", value.hex())
    return value


def _grace(value: object, bank: HashAlgorithm, pcrs: dict[int, dict[bytes, Until]], versions: dict[int, Until]) -> None:
    """One entry: an older PCR value or firmware version, with the end of its time."""
    what = f"{_WHAT}.grace"
    fields = Fields(value, what)
    end = fields.integer("until", 1)
    if "firmware_version" in fields:
        known: dict[int, Until] | dict[bytes, Until] = versions
        entry: int | bytes = int.from_bytes(fields.hex("firmware_version", _VERSION_BYTES), "big")
    else:
        index = fields.integer("pcr", 0, _PCRS - 1)
        if index not in pcrs:
            raise bad(what, "pcr", "a PCR that pcrs names", index)
        known, entry = pcrs[index], _measured(fields.hex("value", bank.size))
    fields.done()
    if entry in known:
        raise bad(_WHAT, "grace", "values that are not listed otherwise", "a repetition")
    known[entry] = end  # type: ignore[index]
