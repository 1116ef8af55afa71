"""What a policy is asked about: typed facts in, one :class:`Request` out, in exactly the schema's form.

A worker's facts come from an appraisal, a job's from a verified manifest, a custodian's from the roster. Nobody's claim
about itself has a way in. Sets are sorted tuples; integers are those of JSON (at most 2⁵³ - 1), well inside Cedar's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Final

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.key_request import KeyRequest
from keyquorum_core.manifest import Manifest, job_id, payload
from keyquorum_core.policy.schema import PRINCIPALS, RESOURCES
from keyquorum_core.quorum import Quorum

__all__ = [
    "MISSING",
    "Entity",
    "JobFacts",
    "Path",
    "QuorumFacts",
    "Request",
    "Seat",
    "WorkerFacts",
    "cluster_entity",
    "custodian_entity",
    "encode",
    "key_entity",
    "owner_entity",
]

Path = tuple[str, ...]
"""Where a value stands in a request, as ``("resource", "classification")``; ``("principal", "#uid")`` is the entity
itself, ``("principal", "#tags", name)`` one of its tags."""


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING: Final = _Missing()
"""What :meth:`Request.value` gives where there is nothing."""


def encode(value: object) -> str:
    """Compact JSON with sorted members: one spelling for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Entity:
    """A principal or resource. ``text`` is its canonical JSON, made once."""

    type: str
    id: str
    attrs: Mapping[str, object]
    tags: Mapping[str, int] = field(default_factory=dict)
    text: str = field(init=False, compare=False, repr=False)
    uid: Mapping[str, str] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", encode([self.type, self.id, self.attrs, self.tags]))
        object.__setattr__(self, "uid", {"type": self.type, "id": self.id})


def _sorted(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(values)))


def owner_entity(name: str) -> Entity:
    return Entity("Owner", name, {"name": name})


def custodian_entity(custodian_id: str, jurisdiction: str) -> Entity:
    return Entity("Custodian", custodian_id, {"id": custodian_id, "jurisdiction": jurisdiction})


def key_entity(name: str, epoch: int, age_seconds: int) -> Entity:
    return Entity("Key", name, {"name": name, "epoch": epoch, "age_seconds": max(age_seconds, 0)})


def cluster_entity(name: str) -> Entity:
    return Entity("Cluster", name, {"name": name})


@dataclass(frozen=True)
class WorkerFacts:
    """A worker as it was appraised. ``hardware`` is the attested identity that region and provider were found by;
    ``tcb`` is by ``TYPE.COMPONENT``."""

    hardware: str
    region: str
    provider: str
    evidence: tuple[str, ...]
    machine: str = ""
    model: str = ""
    products: tuple[str, ...] = ()
    gpu_models: tuple[str, ...] = ()
    tcb: Mapping[str, int] = field(default_factory=dict)
    development: bool = False

    @cached_property
    def entity(self) -> Entity:
        return Entity(
            "Worker",
            self.hardware,
            {
                "region": self.region,
                "provider": self.provider,
                "machine": self.machine,
                "model": self.model,
                "evidence": _sorted(self.evidence),
                "products": _sorted(self.products),
                "gpu_models": _sorted(self.gpu_models),
                "development": self.development,
            },
            dict(self.tcb),
        )


@dataclass(frozen=True)
class JobFacts:
    """A job as its owner signed it. Raises :class:`MalformedError` (``POLICY``) without a classification: nothing may
    be decided about data of which nobody said what it is."""

    job_id: str
    owner: str
    classification: str
    export_control: str = ""
    regions: tuple[str, ...] = ()
    evidence_types: tuple[str, ...] = ()
    purposes: tuple[str, ...] = ()
    key: str = ""
    epoch: int = 0
    lifetime_seconds: int = 0
    wall_seconds: int = 0
    cpus: int = 0
    gpus: int = 0
    memory_mib: int = 0
    prepared: tuple[str, ...] = ()
    unprepared: tuple[str, ...] = ()
    pipelines: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    epsilon_micro: int = 0

    def __post_init__(self) -> None:
        if not self.classification:
            raise MalformedError(
                Reason.POLICY,
                "the job's classification is absent",
                expected="job.classification",
                actual="nothing",
                next_step="Say what the data is: --classification, or classification in job.toml.",
            )

    @staticmethod
    def of(manifest: Manifest | KeyRequest, known_id: str = "") -> JobFacts:
        """From a manifest; ``known_id`` saves computing the job's id again.

        A key request is a job without files, places or evidence, whose one purpose is the key's. No manifest can name
        that purpose, so a policy that reads it knows what it decides about.
        """
        if isinstance(manifest, KeyRequest):
            return JobFacts(
                job_id=known_id or job_id(manifest.payload()),
                owner=manifest.owner,
                classification=manifest.classification,
                export_control=manifest.export_control,
                purposes=(manifest.purpose,),
                key=manifest.key_id,
                epoch=manifest.epoch,
                lifetime_seconds=manifest.not_after - manifest.not_before,
            )
        prepared = {entry.subject for entry in manifest.provenance}
        return JobFacts(
            job_id=known_id or job_id(payload(manifest)),
            owner=manifest.owner,
            classification=manifest.classification,
            export_control=manifest.export_control,
            regions=manifest.regions,
            evidence_types=manifest.evidence_types,
            purposes=manifest.purposes,
            key=manifest.key_id,
            epoch=manifest.epoch,
            lifetime_seconds=manifest.not_after - manifest.not_before,
            wall_seconds=manifest.resources.wall_seconds,
            cpus=manifest.resources.cpus,
            gpus=manifest.resources.gpus,
            memory_mib=manifest.resources.memory_mib,
            prepared=tuple(prepared),
            unprepared=tuple({subject.name for subject in manifest.subjects} - prepared),
            pipelines=tuple(entry.pipeline_sha256 for entry in manifest.provenance),
            columns=tuple(column for entry in manifest.provenance for column in entry.columns),
            epsilon_micro=min(sum(entry.epsilon_micro for entry in manifest.provenance), 2**53 - 1),
        )

    @cached_property
    def entity(self) -> Entity:
        attrs = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "job_id"}
        return Entity("Job", self.job_id, {k: _sorted(v) if isinstance(v, tuple) else v for k, v in attrs.items()})


@dataclass(frozen=True, slots=True)
class Seat:
    """Who decides: ``coordinator`` without an id, or a ``custodian`` with its own."""

    kind: str
    id: str = ""
    jurisdiction: str = ""

    def attrs(self) -> dict[str, object]:
        return {"kind": self.kind, "id": self.id, "jurisdiction": self.jurisdiction}

    def __str__(self) -> str:
        return f"custodian {self.id}" if self.kind == "custodian" else self.kind


@dataclass(frozen=True, slots=True)
class QuorumFacts:
    """The fewest custodians and jurisdictions that could collude."""

    custodians: int
    jurisdictions: int

    @staticmethod
    def of(quorum: Quorum) -> QuorumFacts:
        found = quorum.resilience()
        return QuorumFacts(found.fewest_custodians_to_collude, found.fewest_jurisdictions_to_collude)

    def attrs(self) -> dict[str, object]:
        return {"custodians": self.custodians, "jurisdictions": self.jurisdictions}


@dataclass(frozen=True, slots=True)
class Request:
    """One question. Raises :class:`MalformedError` for a principal or resource that the action does not know."""

    action: str
    principal: Entity
    resource: Entity
    context: Mapping[str, object]

    def __post_init__(self) -> None:
        if self.principal.type not in PRINCIPALS.get(self.action, ()) or self.resource.type != RESOURCES[self.action]:
            raise MalformedError(
                Reason.POLICY,
                f"{self.principal.type} and {self.resource.type} are not what {self.action} is about",
                expected=f"{' or '.join(PRINCIPALS.get(self.action, ('an action of the schema',)))}",
                actual=f"{self.principal.type}, {self.resource.type}",
            )

    def value(self, path: Path) -> object:
        """What stands at ``path``, or :data:`MISSING`."""
        head, rest = path[0], path[1:]
        if head == "resource" and len(rest) == 1 and rest[0] != "#uid":  # by far the most common
            return self.resource.attrs.get(rest[0], MISSING)
        if head == "context":
            found: object = self.context
        elif head == "action":
            return self.action
        else:
            entity = self.principal if head == "principal" else self.resource
            if rest and rest[0] == "#uid":
                return f'{entity.type}::"{entity.id}"'
            if rest and rest[0] == "#tags":
                return tuple(sorted(entity.tags.items())) if len(rest) == 1 else entity.tags.get(rest[1], MISSING)
            found = entity.attrs
        for name in rest:
            if not isinstance(found, Mapping) or name not in found:
                return MISSING
            found = found[name]
        return found

    def text(self) -> str:
        """Canonical JSON of all of it: what a decision's digest is over."""
        return f'["{self.action}",{self.principal.text},{self.resource.text},{encode(self.context)}]'
