"""The coordinator's ceremonies: started by operators' plans or by a key's own policy, watched, resumed, listed,
cancelled.

How each kind is driven is in :mod:`making`, :mod:`rebuilding` and :mod:`destroying`. A ceremony belongs to nobody's
call: it goes on when the caller hangs up, when this process is killed and comes back, and when another coordinator
takes over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import Session, aliased, defer

from keyquorum_coordinator.certificates import keep_roster
from keyquorum_coordinator.database import CeremonyReceiptRow, CeremonyRow, Database, KeyRow, StaleRow
from keyquorum_coordinator.destroying import Destroying
from keyquorum_coordinator.driving import ENDED, Driver, OvertakenError, Progress
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.following import Followed
from keyquorum_coordinator.making import Making
from keyquorum_coordinator.rebuilding import Rebuilding
from keyquorum_coordinator.stored_errors import load_error
from keyquorum_core.ceremony_plan import CeremonyPlan, OrderedPlan, check_plan, open_plan
from keyquorum_core.ceremony_states import MAKING, PHASES, POSITIONS, Kind, Step
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError, UnavailableError

__all__ = ["Ceremonies", "CeremonyRecord", "KeyEpoch", "Progress", "Spared", "nothing_spared"]

Spared = Callable[[], Awaitable[Collection[str]]]
"""Keys that nobody but a drill makes or resumes ceremonies of now."""

_MAX_RUNNING = 32
_MAX_EPOCHS = 10_000
_OVERTAKEN_PAUSE = 0.5
_DRIVERS: Final[Mapping[Kind, type[Driver]]] = {
    Kind.GENERATE: Making,
    Kind.ROTATE: Making,
    Kind.REPAIR: Rebuilding,
    Kind.REPLACE: Rebuilding,
    Kind.DESTROY: Destroying,
}

_log = structlog.get_logger("ceremonies")


async def nothing_spared() -> Collection[str]:
    return ()


@dataclass(frozen=True, slots=True)
class KeyEpoch:
    """An epoch whose certificate is whole. Times in unix seconds; ``stale``: who lacks it, as far as is known here.
    ``certificate`` is empty where it was not asked for: there may be megabytes of it."""

    key_id: str
    epoch: int
    state: str
    certificate: bytes
    ceremony_id: str
    created_at: int
    retired_at: int = 0
    ended_at: int = 0
    stale: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CeremonyRecord:
    """Where a ceremony is, for people: ``waiting`` for whose operators, ``error``: why it was given up, or what keeps
    it where it is. ``receipts``: DSSE envelopes by custodian."""

    ceremony_id: str
    kind: str
    key_id: str
    epoch: int
    step: str
    present: tuple[str, ...]
    waiting: tuple[str, ...]
    error: KeyquorumError | None
    plan: bytes
    created_at: int
    updated_at: int
    receipts: Mapping[str, bytes]


class _Run(Followed[Progress]):
    """A ceremony being driven."""

    def __init__(self, plan_envelope: bytes) -> None:
        super().__init__()
        self.plan_envelope = plan_envelope


class Ceremonies:
    """``clock`` gives unix seconds; ``on_end`` hears when one has ended, and its leaf is in the outbox. ``spared``:
    keys whose ceremonies are not resumed here now, since a drill rehearses that."""

    def __init__(
        self,
        database: Database,
        fanout: Fanout,
        *,
        clock: Callable[[], float] = time.time,
        on_end: Callable[[], None] = lambda: None,
        spared: Spared = nothing_spared,
    ) -> None:
        self._spared = spared
        self._database = database
        self._fanout = fanout
        self._clock = clock
        self._on_end = on_end
        self._runs: dict[str, _Run] = {}

    # -- keys ---------------------------------------------------------------------------------------------------------

    async def keys(
        self, key_id: str = "", *, certificates: bool = False, newest: bool = False, epoch: int = 0
    ) -> list[KeyEpoch]:
        """All epochs, or those of one key, or the newest of each, or one; by key id, newest epoch first. Certificates
        are long: they are read where they are asked for, and are empty otherwise."""
        return await self._database.read(
            lambda session: _epochs(session, key_id, epoch, certificates=certificates, newest=newest)
        )

    async def certificate(self, key_id: str, epoch: int) -> bytes:
        """Raises :class:`StateError` (``UNKNOWN_KEY``)."""
        row = await self._database.read(lambda session: session.get(KeyRow, (key_id, epoch)))
        if row is None:
            raise StateError(Reason.UNKNOWN_KEY, "no such epoch", actual=f"{key_id[:64]} epoch {epoch}")
        return row.certificate

    async def key(self, key_id: str, epoch: int = 0) -> KeyEpoch:
        """The newest epoch, or this one. Raises :class:`StateError` (``UNKNOWN_KEY``, ``EPOCH``)."""
        found = await self.keys(key_id, certificates=True, newest=not epoch, epoch=epoch) if key_id else []
        if found:
            return found[0]
        known = await self.keys(key_id) if epoch and key_id else []
        if not known:
            raise StateError(Reason.UNKNOWN_KEY, "no such key", actual=key_id[:64])
        raise StateError(
            Reason.EPOCH,
            f"key {key_id} has no such epoch",
            expected=", ".join(str(each.epoch) for each in known)[:200],
            actual=epoch,
        )

    # -- ceremonies ---------------------------------------------------------------------------------------------------

    async def records(self, key_id: str = "") -> list[CeremonyRecord]:
        """All ceremonies, or those of one key; the latest first."""
        return await self._database.read(lambda session: _records(session, key_id))

    async def run(self, plan_envelope: bytes) -> AsyncGenerator[Progress]:
        """Start, resume or join the ceremony of a plan, and follow it to its end.

        Raises what stopped it, naming custodian, step and cause; for a plan that is not in order, before anything is
        asked. One that the key's policy orders is for custodians to judge.
        """
        ordered = await asyncio.to_thread(self._open_plan, plan_envelope)
        plan = ordered.plan
        run = self._runs.get(plan.ceremony_id)
        if run is None:
            finished = await self._enter(plan, plan_envelope)
            if finished is not None:
                yield finished
                return
            run = self._runs.get(plan.ceremony_id) or self._start(plan, plan_envelope)
        if run.plan_envelope != plan_envelope:
            self._check_same(plan, run.plan_envelope)
        async for progress in run.follow():
            yield progress

    async def resume(self, key_id: str = "") -> int:
        """Go on with what a stopped or killed coordinator left, of all keys or one; returns how many ceremonies."""
        query = select(CeremonyRow.plan).where(CeremonyRow.step.not_in(ENDED)).order_by(CeremonyRow.number)
        if key_id:
            query = query.where(CeremonyRow.key_id == key_id)
        plans = await self._database.read(lambda session: list(session.scalars(query)))
        spared = await self._spared()  # after the plans: a drill is stored before the ceremonies it makes
        count = 0
        for envelope in plans:
            try:
                plan = self._open(envelope).plan
            except KeyquorumError as error:  # its operator is not in the roster any more
                _log.error("ceremony.not_resumed", reason=str(error.reason))
                continue
            if plan.ceremony_id not in self._runs and plan.key_id not in spared:
                self._start(plan, envelope)
                count += 1
        return count

    async def cancel(self, ceremony_id: str, why: str = "") -> CeremonyRecord:
        """Give a ceremony up, here and at every custodian. Raises ``NOT_FOUND``, or ``STATE`` once it is over or can
        only go forward."""
        row = await self._database.read(lambda session: _record(session, ceremony_id))
        if row is None:
            raise StateError(Reason.NOT_FOUND, "no such ceremony", actual=ascii(ceremony_id[:40]))
        kind = Kind(row.kind)
        if row.step == Step.CANCELLED:
            return row
        if Step.CANCELLED not in POSITIONS[kind].get(Step(row.step), ()):
            last = next((each.step for each in PHASES[kind] if each.binding), Step.DONE)
            raise StateError(
                Reason.STATE,
                f"ceremony {ceremony_id} can no longer be cancelled",
                expected=f"before it comes to {last}",
                actual=row.step,
            )
        error = RefusedError(Reason.CEREMONY, f"an operator cancelled it{': ' + why[:200] if why else ''}")
        run = self._runs.get(ceremony_id)
        if run is not None and run.task is not None:
            run.error = error
            run.task.cancel()
            await asyncio.gather(run.task, return_exceptions=True)
        plan = CeremonyPlan.parse(self._open(row.plan).payload)
        driver = _DRIVERS[kind](self._database, self._fanout, plan, row.plan, lambda _: None, self._clock)
        await driver.cancel(error)
        if run is not None:
            run.wake()
        self._on_end()
        found = await self._database.read(lambda session: _record(session, ceremony_id))
        assert found is not None  # noqa: S101 - ceremonies are never deleted
        return found

    async def remember_roster(self, envelope: bytes) -> None:
        """The roster in force, for custodians that join under a later one."""
        roster = self._fanout.roster
        await self._database.write(lambda session: keep_roster(session, roster, envelope))

    @property
    def running(self) -> int:
        return sum(run.task is not None and not run.task.done() for run in self._runs.values())

    def drives(self, ceremony_id: str) -> bool:
        """Whether it is being driven here right now."""
        return ceremony_id in self._runs

    async def close(self) -> None:
        """Stop driving; what is under way stays as it is stored."""
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _open(self, envelope: bytes) -> OrderedPlan:
        roster = self._fanout.roster
        return open_plan(envelope, roster.operator_identities(), roster.operator_threshold)

    def _open_plan(self, envelope: bytes) -> OrderedPlan:
        roster, ordered = self._fanout.roster, self._open(envelope)
        quorum = self._fanout.quorum if ordered.plan.kind in MAKING else ordered.plan.quorum
        check_plan(ordered.plan, cluster=roster.cluster, roster_digest=roster.digest, quorum=quorum)
        return ordered

    def _check_same(self, plan: CeremonyPlan, known: bytes) -> None:
        # Signatures are randomised: what counts is the payload.
        if self._open(known).payload != plan.to_payload():
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
                self._check_same(plan, row.plan)
                if row.step == Step.DONE:
                    return Progress(plan.ceremony_id, Step.DONE, "", total, total, row.certificate or b"")
                if row.step == Step.CANCELLED:
                    raise load_error(row.error) or StateError(Reason.CEREMONY, "the ceremony was cancelled")
                return None
            _refuse_rivals(session, plan)
            newest = session.scalar(select(func.max(CeremonyRow.number))) or 0
            session.add(
                CeremonyRow(
                    ceremony_id=plan.ceremony_id,
                    number=newest + 1,
                    kind=plan.kind,
                    plan=envelope,
                    key_id=plan.key_id,
                    epoch=plan.epoch,
                    step=Step.PROPOSE,
                    created_at=now,
                    updated_at=now,
                )
            )
            return None

        if self.running >= _MAX_RUNNING:
            raise RefusedError(Reason.QUOTA, "too many ceremonies at once", expected=f"at most {_MAX_RUNNING}")
        return await self._database.write(work)

    def _start(self, plan: CeremonyPlan, envelope: bytes) -> _Run:
        run = self._runs[plan.ceremony_id] = _Run(envelope)
        run.task = asyncio.create_task(self._drive(plan, run))
        return run

    async def _drive(self, plan: CeremonyPlan, run: _Run) -> None:
        make = _DRIVERS[plan.kind]
        log = _log.bind(ceremony=plan.ceremony_id, kind=str(plan.kind), key=plan.key_id, epoch=plan.epoch)
        try:
            while True:
                driver = make(self._database, self._fanout, plan, run.plan_envelope, run.add, self._clock)
                try:
                    await driver.drive()
                    break
                except OvertakenError:  # by another coordinator: go on from where it is by now
                    if await self._over(plan, run):
                        break
                    await asyncio.sleep(_OVERTAKEN_PAUSE)
            log.info("ceremony.done")
        except KeyquorumError as error:
            run.error = error
            log.warning("ceremony.stopped", reason=str(error.reason), message=error.message)
        except Exception as error:
            run.error = KeyquorumError(Reason.INTERNAL, "the ceremony stopped in a way nobody foresaw")
            log.error("ceremony.unforeseen", error=type(error).__name__)
        except asyncio.CancelledError:
            run.error = run.error or UnavailableError(
                Reason.UNAVAILABLE, "the coordinator is stopping; the ceremony goes on when it is back"
            )
            raise
        finally:
            self._runs.pop(plan.ceremony_id, None)
            self._on_end()
            # The task is done once this returns; those who watch look again then.
            asyncio.get_running_loop().call_soon(run.wake)

    async def _over(self, plan: CeremonyPlan, run: _Run) -> bool:
        """Whether another coordinator ended it; raises why, when it was given up."""
        finished = await self._enter(plan, run.plan_envelope)
        if finished is not None:
            run.add(finished)
        return finished is not None


def _refuse_rivals(session: Session, plan: CeremonyPlan) -> None:
    """One ceremony at a time makes an epoch, and one destroys it. Raises ``EXISTS``."""
    kinds = sorted(MAKING) if plan.kind in MAKING else [plan.kind]
    others = select(CeremonyRow.ceremony_id).where(
        CeremonyRow.key_id == plan.key_id,
        CeremonyRow.epoch == plan.epoch,
        CeremonyRow.kind.in_(kinds),
        CeremonyRow.step != Step.CANCELLED,
    )
    if plan.kind not in MAKING:
        others = others.where(CeremonyRow.step != Step.DONE)
        if plan.kind is not Kind.DESTROY:
            return  # co-holders may rebuild several at once
    rival = session.scalars(others.limit(1)).first()
    made = plan.kind in MAKING and session.get(KeyRow, (plan.key_id, plan.epoch)) is not None
    if rival or made:
        raise StateError(
            Reason.EXISTS,
            f"key {plan.key_id} epoch {plan.epoch} exists or is being {_DOING[plan.kind]} by another ceremony",
            actual=rival or "",
            next_step=f"Finish or cancel ceremony {rival}" if rival else "",
        )


_DOING: Final[Mapping[Kind, str]] = {Kind.GENERATE: "made", Kind.ROTATE: "made", Kind.DESTROY: "destroyed"}


def _epochs(session: Session, key_id: str, epoch: int, *, certificates: bool, newest: bool) -> list[KeyEpoch]:
    rows = select(KeyRow).order_by(KeyRow.key_id, KeyRow.epoch.desc()).limit(_MAX_EPOCHS)
    stale = select(StaleRow).order_by(StaleRow.custodian)
    if not certificates:
        rows = rows.options(defer(KeyRow.certificate))
    if key_id:
        rows, stale = rows.where(KeyRow.key_id == key_id), stale.where(StaleRow.key_id == key_id)
    if epoch:
        rows, stale = rows.where(KeyRow.epoch == epoch), stale.where(StaleRow.epoch == epoch)
    if newest:
        other = aliased(KeyRow)
        last = select(func.max(other.epoch)).where(other.key_id == KeyRow.key_id).scalar_subquery()
        rows = rows.where(KeyRow.epoch == last)
    lacking: dict[tuple[str, int], list[str]] = {}
    for each in session.scalars(stale):
        lacking.setdefault((each.key_id, each.epoch), []).append(each.custodian)
    return [
        KeyEpoch(
            row.key_id,
            row.epoch,
            row.state,
            row.certificate if certificates else b"",
            row.ceremony_id,
            row.created_at,
            row.retired_at or 0,
            row.ended_at or 0,
            tuple(lacking.get((row.key_id, row.epoch), ())),
        )
        for row in session.scalars(rows)
    ]


def _records(session: Session, key_id: str) -> list[CeremonyRecord]:
    query = select(CeremonyRow).order_by(CeremonyRow.number.desc(), CeremonyRow.ceremony_id).limit(1000)
    return [
        _of(session, row) for row in session.scalars(query.where(CeremonyRow.key_id == key_id) if key_id else query)
    ]


def _record(session: Session, ceremony_id: str) -> CeremonyRecord | None:
    row = session.get(CeremonyRow, ceremony_id)
    return None if row is None else _of(session, row)


def _of(session: Session, row: CeremonyRow) -> CeremonyRecord:
    receipts = session.scalars(select(CeremonyReceiptRow).where(CeremonyReceiptRow.ceremony_id == row.ceremony_id))
    return CeremonyRecord(
        row.ceremony_id,
        row.kind,
        row.key_id,
        row.epoch,
        row.step,
        tuple(row.present.split()),
        tuple(row.waiting.split()),
        load_error(row.error),
        row.plan,
        row.created_at,
        row.updated_at,
        {each.custodian: each.receipt for each in receipts},
    )
