"""How each kind of request is put together, whoever decides it: in one place, so that seats cannot differ in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from keyquorum_core.policy.facts import Entity, JobFacts, QuorumFacts, Request, Seat, WorkerFacts, owner_entity
from keyquorum_core.policy.lists import LIST_KINDS, NO_LISTING, ControlledList

__all__ = ["Situation"]


@dataclass(frozen=True, slots=True)
class Situation:
    """Who decides, when (unix seconds), and with which lists at hand (by their name in a policy's context)."""

    seat: Seat
    quorum: QuorumFacts
    now: int
    lists: Mapping[str, ControlledList] = field(default_factory=dict)

    def submit(self, job: JobFacts) -> Request:
        """May this job be submitted?"""
        return Request("submit", owner_entity(job.owner), job.entity, self._about(job, None))

    def release(self, job: JobFacts, worker: WorkerFacts | None, *, logged: bool) -> Request:
        """May the job's key be released to its owner (``worker`` is ``None``), or to this worker? ``logged``: the
        ledger was seen to show this release."""
        principal = owner_entity(job.owner) if worker is None else worker.entity
        return Request("release", principal, job.entity, {**self._about(job, worker), "logged": logged})

    def enrol(self, enrolled: Entity, cluster: Entity, operators: Iterable[str]) -> Request:
        """May this machine, or custodian, be enrolled on the word of ``operators``?"""
        region, provider = (str(enrolled.attrs.get(name, "")) for name in ("region", "provider"))
        listings = {
            name: self.lists[name].listing(region=region, provider=provider, export_control="")
            if name in self.lists
            else dict(NO_LISTING)
            for name in LIST_KINDS
        }
        return Request("enrol", enrolled, cluster, {**self._ordered(operators), **listings})

    def ceremony(
        self, action: str, custodian: Entity, key: Entity, operators: Iterable[str], *, scheduled: bool = False
    ) -> Request:
        """May this custodian take part in rotating or destroying an epoch of ``key``? ``scheduled``: its own certified
        policy orders it."""
        return Request(action, custodian, key, {**self._ordered(operators), "scheduled": scheduled})

    def _base(self) -> dict[str, object]:
        return {"now": self.now, "seat": self.seat.attrs(), "quorum": self.quorum.attrs()}

    def _ordered(self, operators: Iterable[str]) -> dict[str, object]:
        names = tuple(sorted(set(operators)))
        return {**self._base(), "operators": names, "operator_count": len(names)}

    def _about(self, job: JobFacts, worker: WorkerFacts | None) -> dict[str, object]:
        out = self._base()
        for name in LIST_KINDS:
            known = self.lists.get(name)
            out[name] = (
                dict(NO_LISTING)
                if known is None
                else known.listing(
                    owner=job.owner,
                    region="" if worker is None else worker.region,
                    provider="" if worker is None else worker.provider,
                    regions=job.regions,
                    export_control=job.export_control,
                )
            )
        return out
