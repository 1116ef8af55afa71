"""The inventory: which hardware stands where, and whose it is; a document that operators sign (docs/spec/evidence.md).

Hardware is known by the identity that it proves: a chip id, a PPID, a TPM's attestation key, the serial number in a
GPU's device certificate, an instance id. A TPM's key is listed once an operator saw it proven to live in a genuine TPM
(:mod:`~keyquorum_core.attestation.tpm2_enrolment`). Each identity belongs to one machine, and a worker's region,
provider, model and owner are those of its machine, looked up here and nowhere else. All evidence of one document must
come from one machine: two genuine pieces of hardware that stand apart do not make a worker.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from keyquorum_core.attestation.reference_members import bad
from keyquorum_core.bulletin import Bulletin, Kind
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.strictjson import Fields

__all__ = ["HARDWARE", "INVENTORY", "HardwareId", "Inventory", "Machine"]

_WHAT = "inventory"
_MAX_MACHINES = 32768
_MAX_IDS = 64
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?", re.ASCII)

HARDWARE: Final[Mapping[str, re.Pattern[str]]] = MappingProxyType(
    {
        "sev-snp": re.compile(r"[0-9a-f]{128}", re.ASCII),
        "tdx": re.compile(r"[0-9a-f]{32}", re.ASCII),
        "tpm2": re.compile(r"[0-9a-f]{64}", re.ASCII),
        "nvidia-gpu": re.compile(r"(?:[0-9a-f]{2}){1,20}", re.ASCII),
        "nitro": re.compile(r"i-[0-9a-f]{8,17}", re.ASCII),
    }
)
"""Kinds of hardware identity and how each is written. ``sev-snp``: the report's chip id, 64 bytes; ``tdx``: the PPID;
``tpm2``: SHA-256 of the attestation key's SubjectPublicKeyInfo; ``nvidia-gpu``: the serial number of the device
certificate; ``nitro``: the EC2 instance id."""


@dataclass(frozen=True, slots=True)
class HardwareId:
    """One identity that hardware proved, of a kind of :data:`HARDWARE`."""

    kind: str
    id: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.id}"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a machine stands (``region``, compared with those that manifests allow), who runs it, what it is, whose."""

    name: str
    region: str
    provider: str
    model: str
    owner: str


@dataclass(frozen=True, slots=True)
class Inventory:
    """Loaded by :meth:`read`, which is what checks it."""

    version: int
    digest: str
    """SHA-256 of the bulletin's payload, hex."""
    machines: Mapping[HardwareId, Machine]

    @classmethod
    def read(cls, bulletin: Bulletin) -> Inventory:
        """The body: ``{"machines": [{"name", "region", "provider", "model", "owner", "hardware": {kind: [id]}}]}``.

        Raises :class:`MalformedError`, also for a machine without hardware, and for an identity or a name there twice.
        """
        fields = Fields(bulletin.body, _WHAT)
        listed = fields.list("machines", min_items=1, max_items=_MAX_MACHINES)
        fields.done()
        machines: dict[HardwareId, Machine] = {}
        names: set[str] = set()
        for each in listed:
            machine, ids = _machine(each)
            if machine.name in names:
                raise bad(_WHAT, "machines", "each name once", machine.name)
            names.add(machine.name)
            for identity in ids:
                if identity in machines:
                    raise bad(_WHAT, "hardware", "each identity once", f"{identity} in {machine.name} again"[:200])
                machines[identity] = machine
        return cls(bulletin.version, bulletin.digest, MappingProxyType(machines))

    def machine_of(self, hardware: Iterable[HardwareId]) -> Machine:
        """The one machine that all of this hardware belongs to.

        Raises :class:`RefusedError`: ``PROVENANCE`` where a piece is not listed or the pieces are of several machines,
        ``REGION`` where those even stand in several regions.
        """
        found: dict[HardwareId, Machine] = {}
        for each in hardware:
            machine = self.machines.get(each)
            if machine is None:
                raise RefusedError(
                    Reason.PROVENANCE,
                    f"this hardware ({each.kind}) is not in the inventory",
                    expected="an identity that the inventory lists",
                    actual=each.id,
                    next_step="add it with its machine to the inventory, once you know where it stands",
                )
            found[each] = machine
        if not found:
            raise RefusedError(
                Reason.PROVENANCE, "no hardware names itself", expected="at least one identity", actual="none"
            )
        first, machine = next(iter(found.items()))
        for each, other in found.items():
            if other is not machine:
                apart = other.region != machine.region
                raise RefusedError(
                    Reason.REGION if apart else Reason.PROVENANCE,
                    "the evidence comes from hardware in several regions"
                    if apart
                    else "the evidence comes from hardware of several machines",
                    expected=f"all in {machine.name} ({machine.region}), as {first}",
                    actual=f"{each} in {other.name} ({other.region})",
                )
        return machine


def _machine(value: object) -> tuple[Machine, list[HardwareId]]:
    fields = Fields(value, f"{_WHAT}.machines")
    name = fields.text("name", max_length=64)
    if not _NAME.fullmatch(name):
        raise bad(_WHAT, "name", _NAME.pattern, ascii(name))
    machine = Machine(
        name=name,
        region=fields.text("region", max_length=64),
        provider=fields.text("provider", max_length=128),
        model=fields.text("model", max_length=128),
        owner=fields.text("owner", max_length=128),
    )
    ids = list(_hardware(fields.object("hardware")))
    fields.done()
    if not ids:
        raise bad(_WHAT, "hardware", "at least one identity", f"none of {name}")
    return machine, ids


def _hardware(fields: Fields) -> Iterator[HardwareId]:
    for kind in fields.names():
        pattern = HARDWARE.get(kind)
        if pattern is None:
            raise bad(_WHAT, "hardware", f"kinds out of {', '.join(HARDWARE)}", ascii(kind)[:80])
        for each in fields.texts(kind, min_items=1, max_items=_MAX_IDS, max_length=128):
            if not pattern.fullmatch(each) or not each.strip("0"):
                raise MalformedError(
                    Reason.MALFORMED,
                    f"{_WHAT}: bad identity of kind {kind!r}",
                    expected=f"{pattern.pattern}, not zero",
                    actual=ascii(each)[:160],
                )
            yield HardwareId(kind, each)


INVENTORY: Final = Kind("inventory", Inventory.read)
