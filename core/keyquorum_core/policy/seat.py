"""A seat: one bundle of policies, the lists they read, and the questions that are put to them.

Both seats, the coordinator's and every custodian's, are this same code over documents of their own. Where those come
from, and how the last good one is kept, is each role's affair; here is what may be decided with them, and when nothing
may: no bundle, a bundle or a list that is needed out of date, a clock that was set back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from keyquorum_core.errors import Reason, RefusedError, StateError
from keyquorum_core.policy.engine import Decision, PolicyEngine
from keyquorum_core.policy.explain import refusal
from keyquorum_core.policy.facts import (
    Entity,
    JobFacts,
    QuorumFacts,
    Request,
    Seat,
    WorkerFacts,
    cluster_entity,
    custodian_entity,
    key_entity,
)
from keyquorum_core.policy.lists import LIST_KINDS, ControlledList
from keyquorum_core.policy.requests import Situation

__all__ = ["CLOCK_TOLERANCE", "Documents", "PolicySeat", "SteadyTime"]

CLOCK_TOLERANCE: Final = 120
"""Seconds that a clock may step back, as when it is corrected: time then stands still until it has caught up."""


class Documents(Protocol):
    """Where a seat's documents come from. Each raises :class:`RefusedError` (``EXPIRED``, ``NOT_YET_VALID``) for one
    that is not in date, and returns ``None`` where there never was one."""

    def engine(self) -> PolicyEngine | None: ...

    def list_named(self, name: str) -> ControlledList | None:
        """``export`` or ``sanctions``."""


@dataclass(slots=True)
class SteadyTime:
    """A clock that does not go back: ``clock`` gives unix seconds, ``highest`` is the latest it ever showed."""

    clock: Callable[[], float]
    highest: int = 0

    def now(self) -> int:
        """Never less than before."""
        self.highest = max(self.highest, int(self.clock()))
        return self.highest

    def check(self) -> int:
        """:meth:`now`, unless the clock is behind it by more than :data:`CLOCK_TOLERANCE`: then what has expired would
        count again. Raises :class:`StateError` (``STATE``)."""
        shown = int(self.clock())
        if shown < self.highest - CLOCK_TOLERANCE:
            raise StateError(
                Reason.STATE,
                "the clock was set back, so that what has expired would count again",
                expected=f"at least {self.highest - CLOCK_TOLERANCE}",
                actual=shown,
                next_step="Set the clock right. If it was ahead before, tell the role so (docs/operators.md).",
            )
        return self.now()


class PolicySeat:
    """Used from one thread. ``how_to_install`` tells an operator what to do where there is no policy."""

    def __init__(
        self, seat: Seat, quorum: QuorumFacts, documents: Documents, time: SteadyTime, *, how_to_install: str
    ) -> None:
        self.seat = seat
        self._quorum = quorum
        self._documents = documents
        self._time = time
        self._how_to_install = how_to_install

    def check_submission(self, job: JobFacts) -> Decision:
        """May this job be submitted? Raises what :meth:`decide` raises."""
        return self.decide(lambda situation: situation.submit(job))

    def check_release(self, job: JobFacts, worker: WorkerFacts | None, *, logged: bool) -> Decision:
        """May the job's key go to its owner (``worker`` is ``None``), or to this worker?"""
        return self.decide(lambda situation: situation.release(job, worker, logged=logged))

    def check_ceremony(
        self,
        action: str,
        key_id: str,
        epoch: int,
        age_seconds: int,
        operators: Iterable[str],
        *,
        scheduled: bool = False,
    ) -> Decision:
        """May this custodian ``rotate`` from, or ``destroy``, this epoch of a key, on the word of ``operators``, or
        because the key's certified policy has it ``scheduled``?"""
        who = custodian_entity(self.seat.id, self.seat.jurisdiction)
        key = key_entity(key_id, epoch, age_seconds)
        names = tuple(operators)
        return self.decide(lambda situation: situation.ceremony(action, who, key, names, scheduled=scheduled))

    def check_enrolment(self, enrolled: Entity, cluster: str, operators: Iterable[str]) -> Decision:
        """May this custodian (:func:`custodian_entity`) or machine (:attr:`WorkerFacts.entity`) be enrolled?"""
        names = tuple(operators)
        return self.decide(lambda situation: situation.enrol(enrolled, cluster_entity(cluster), names))

    def decide(self, ask: Callable[[Situation], Request]) -> Decision:
        """The decision on the request that ``ask`` makes. Returns only permits.

        Raises :class:`RefusedError` ``POLICY`` for a denial, with the policy, the condition and the values, and in
        ``details`` the bundle (``policy_sha256``, ``policy_version``) and the decision (``decision_sha256``), and for
        want of a policy or list; ``EXPIRED`` or ``NOT_YET_VALID`` for one that is not in date; :class:`StateError` for
        a clock set back.
        """
        now = self._time.check()
        engine = self._documents.engine()
        if engine is None:
            raise RefusedError(
                Reason.POLICY,
                f"{self.seat} has no policy, so it permits nothing",
                expected="a signed policy bundle",
                actual="none",
                next_step=self._how_to_install,
            )
        request = ask(Situation(self.seat, self._quorum, now, self._lists(engine)))
        decision = engine.decide(request)
        if not decision.permitted:
            raise refusal(self.seat, engine.policies, request, decision)
        return decision

    def _lists(self, engine: PolicyEngine) -> Mapping[str, ControlledList]:
        """The lists that the policies read; all of them there, and in date."""
        out = {}
        for name in engine.lists:
            found = self._documents.list_named(name)
            if found is None:
                raise RefusedError(
                    Reason.POLICY,
                    f"the policy of {self.seat} reads the {name} list, and there is none",
                    expected=f"a signed {LIST_KINDS[name]}",
                    actual="none",
                    next_step="Have the policy's signers sign one, and install it.",
                    details={"field": f"context.{name}"},
                )
            out[name] = found
        return out
