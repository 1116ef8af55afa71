"""Drives the generate ceremony: propose, deliver, confirm, activate, each on all custodians at once (DESIGN §9).

The coordinator carries sealed parts and signed statements between custodians and is trusted with none of it; it checks
what it carries so that a stop names the right custodian. Every answer is stored before the next step, so that a killed
coordinator goes on where it was. A stop before the certificate is whole cancels the ceremony everywhere; after that it
only goes forward, because a custodian may have made the epoch active already.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import CeremonyRow, Database, KeyRow
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.generate import ENDED, Generate, Progress, Step
from keyquorum_coordinator.stored_errors import load_error
from keyquorum_core.ceremony import PLAN_TYPE, CeremonyPlan, check_plan
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.signing import open_multi

__all__ = ["Ceremonies", "KeyEpoch", "Progress"]

_MAX_RUNNING = 8

_log = structlog.get_logger("ceremonies")


@dataclass(frozen=True, slots=True)
class KeyEpoch:
    """An epoch whose certificate is whole. ``created_at`` in unix seconds."""

    key_id: str
    epoch: int
    state: str
    certificate: bytes
    ceremony_id: str
    created_at: int


class _Run:
    """A ceremony being driven, and what those who watch it have to know."""

    def __init__(self, plan_envelope: bytes) -> None:
        self.plan_envelope = plan_envelope
        self.events: list[Progress] = []
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.error: KeyquorumError | None = None

    def tell(self, progress: Progress) -> None:
        self.events.append(progress)
        self.wake()

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Ceremonies:
    def __init__(
        self,
        database: Database,
        fanout: Fanout,
        *,
        clock: Callable[[], float] = time.time,
        on_leaf: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_leaf`` hears when a ceremony's end was put into the outbox."""
        self._database = database
        self._fanout = fanout
        self._clock = clock
        self._on_leaf = on_leaf
        self._runs: dict[str, _Run] = {}

    # -- keys ---------------------------------------------------------------------------------------------------------

    async def keys(self) -> list[KeyEpoch]:
        """All epochs, by key id, newest epoch first."""
        query = select(KeyRow).order_by(KeyRow.key_id, KeyRow.epoch.desc()).limit(10_000)
        return await self._database.read(lambda session: [_key(row) for row in session.scalars(query)])

    async def key(self, key_id: str) -> KeyEpoch:
        """The newest epoch. Raises :class:`StateError` (``UNKNOWN_KEY``)."""
        query = select(KeyRow).where(KeyRow.key_id == key_id).order_by(KeyRow.epoch.desc()).limit(1)
        found = await self._database.read(lambda session: [_key(row) for row in session.scalars(query)])
        if not found:
            raise StateError(Reason.UNKNOWN_KEY, "no such key", actual=key_id[:64])
        return found[0]

    # -- ceremonies ---------------------------------------------------------------------------------------------------

    async def create(self, plan_envelope: bytes) -> AsyncGenerator[Progress]:
        """Start, resume or join the ceremony of an operator-signed plan, and follow it to its certificate.

        It goes on when the caller hangs up. Raises what stopped it, naming custodian, step and cause; for a plan that
        is not in order, before anything is asked.
        """
        plan = await asyncio.to_thread(self._open_plan, plan_envelope)
        run = self._runs.get(plan.ceremony_id)
        if run is None:
            finished = await self._enter(plan, plan_envelope)
            if finished is not None:
                yield finished
                return
            run = self._runs.get(plan.ceremony_id) or self._start(plan, plan_envelope)
        self._check_same(plan, plan_envelope, run.plan_envelope)
        position = 0
        while True:
            changed = run.changed
            while position < len(run.events):
                position += 1
                yield run.events[position - 1]
            if run.task is None or run.task.done():
                if run.error is not None:
                    raise run.error
                return
            await changed.wait()

    async def resume(self) -> int:
        """Go on with what a stopped or killed coordinator left; returns how many ceremonies."""
        query = select(CeremonyRow.plan).where(CeremonyRow.step.not_in(ENDED)).order_by(CeremonyRow.created_at)
        plans = await self._database.read(lambda session: list(session.scalars(query)))
        for envelope in plans:
            try:
                plan = CeremonyPlan.parse(_payload_of(envelope, self._fanout))
            except KeyquorumError as error:  # its operator is not in the roster any more
                _log.error("ceremony.not_resumed", reason=str(error.reason))
                continue
            if plan.ceremony_id not in self._runs:
                self._start(plan, envelope)
        return len(plans)

    async def close(self) -> None:
        """Stop driving; what is under way stays as it is stored."""
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _open_plan(self, envelope: bytes) -> CeremonyPlan:
        roster = self._fanout.roster
        plan = CeremonyPlan.parse(_payload_of(envelope, self._fanout))
        check_plan(plan, cluster=roster.cluster, roster_digest=roster.digest, quorum=self._fanout.quorum)
        return plan

    def _check_same(self, plan: CeremonyPlan, given: bytes, known: bytes) -> None:
        # Signatures are randomised: what counts is the payload.
        if _payload_of(known, self._fanout) != _payload_of(given, self._fanout):
            raise StateError(
                Reason.CEREMONY,
                f"ceremony {plan.ceremony_id} has another plan",
                expected="the plan it began with",
                next_step="Make a new plan with a new ceremony id",
            )

    async def _enter(self, plan: CeremonyPlan, envelope: bytes) -> Progress | None:
        """Record a new ceremony. A finished one gives its certificate again; a cancelled one raises why."""
        now = int(self._clock())
        total = len(plan.quorum.ids)

        def work(session: Session) -> Progress | None:
            row = session.get(CeremonyRow, plan.ceremony_id)
            if row is not None:
                self._check_same(plan, envelope, row.plan)
                if row.step == Step.DONE:
                    return Progress(plan.ceremony_id, Step.DONE, "", total, total, row.certificate or b"")
                if row.step == Step.CANCELLED:
                    raise load_error(row.error) or StateError(Reason.CEREMONY, "the ceremony was cancelled")
                return None
            others = select(CeremonyRow.ceremony_id).where(
                CeremonyRow.key_id == plan.key_id, CeremonyRow.epoch == plan.epoch, CeremonyRow.step != Step.CANCELLED
            )
            if session.scalars(others.limit(1)).first() or session.get(KeyRow, (plan.key_id, plan.epoch)):
                raise StateError(
                    Reason.EXISTS, f"key {plan.key_id} epoch {plan.epoch} exists or is being made by another ceremony"
                )
            session.add(
                CeremonyRow(
                    ceremony_id=plan.ceremony_id,
                    plan=envelope,
                    key_id=plan.key_id,
                    epoch=plan.epoch,
                    step=Step.PROPOSE,
                    created_at=now,
                    updated_at=now,
                )
            )
            return None

        if sum(run.task is not None and not run.task.done() for run in self._runs.values()) >= _MAX_RUNNING:
            raise RefusedError(Reason.QUOTA, "too many ceremonies at once", expected=f"at most {_MAX_RUNNING}")
        return await self._database.write(work)

    def _start(self, plan: CeremonyPlan, envelope: bytes) -> _Run:
        run = self._runs[plan.ceremony_id] = _Run(envelope)
        run.task = asyncio.create_task(self._drive(plan, run))
        return run

    async def _drive(self, plan: CeremonyPlan, run: _Run) -> None:
        ceremony = Generate(self._database, self._fanout, plan, run.plan_envelope, run.tell, self._clock)
        log = _log.bind(ceremony=plan.ceremony_id, key=plan.key_id, epoch=plan.epoch)
        try:
            await ceremony.drive()
            log.info("ceremony.done")
        except KeyquorumError as error:
            run.error = error
            log.warning("ceremony.stopped", reason=str(error.reason), message=error.message)
        except Exception as error:
            run.error = KeyquorumError(Reason.INTERNAL, "the ceremony stopped in a way nobody foresaw")
            log.error("ceremony.unforeseen", error=type(error).__name__)
        except asyncio.CancelledError:
            run.error = UnavailableError(
                Reason.UNAVAILABLE, "the coordinator is stopping; the ceremony goes on when it is back"
            )
            raise
        finally:
            self._runs.pop(plan.ceremony_id, None)
            self._on_leaf()
            # The task is done once this returns; those who watch look again then.
            asyncio.get_running_loop().call_soon(run.wake)


def _payload_of(envelope: bytes, fanout: Fanout) -> bytes:
    """The plan's payload, signed by an operator of the roster: at least one; custodians hold to rules of their own."""
    return open_multi(envelope, PLAN_TYPE, fanout.roster.operator_identities(), 1, "ceremony plan")[0]


def _key(row: KeyRow) -> KeyEpoch:
    return KeyEpoch(row.key_id, row.epoch, row.state, row.certificate, row.ceremony_id, row.created_at)
