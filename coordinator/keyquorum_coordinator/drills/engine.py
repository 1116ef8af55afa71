"""Runs drills: one at a time, on canary keys and no others, each followed, undone, signed and entered in the ledger.

That a drill began is stored before anything is injected, and every few seconds that it still runs. What a coordinator
that died left is undone by the first of its database's that finds it (:meth:`Drills.resume`), itself, once it is back,
among them; until then faults end by themselves, after two minutes at the latest.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from keyquorum_coordinator.ceremonies import Ceremonies
from keyquorum_coordinator.certificates import older_rosters
from keyquorum_coordinator.certified import CertifiedEpochs
from keyquorum_coordinator.config import DrillSettings
from keyquorum_coordinator.database import Database
from keyquorum_coordinator.drills import store
from keyquorum_coordinator.drills.ceremonial import coordinator_loss, repair, restore, rotation
from keyquorum_coordinator.drills.defences import forged_evidence, revocation, split_view
from keyquorum_coordinator.drills.documents import check_documents, missing
from keyquorum_coordinator.drills.outages import custodian_loss, lying_custodian, slow_custodian
from keyquorum_coordinator.drills.probing import Prober
from keyquorum_coordinator.drills.rehearsal import FAULT_SECONDS, Order, Rehearsal, Tools, lift_everywhere
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.following import Followed
from keyquorum_coordinator.jobs import JobStore
from keyquorum_coordinator.outbox import Outbox, request_id
from keyquorum_coordinator.releases import Releases
from keyquorum_coordinator.sequencer import Sequencer
from keyquorum_coordinator.withdrawals import Withdrawals
from keyquorum_coordinator.witnesses import Witnesses
from keyquorum_core.certified import open_certificate
from keyquorum_core.drill_report import (
    DRILL_ID,
    FULL,
    KINDS,
    MAY_BE_SKIPPED,
    DrillReport,
    Moment,
    Outcome,
    Part,
    sign_report,
)
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.ledger.leaves import Drill
from keyquorum_core.names import KEY_ID, check
from keyquorum_core.policy.engine import Decision
from keyquorum_core.policy.facts import JobFacts
from keyquorum_core.roster import MAX_ROSTER, ROSTER_TYPE, Roster
from keyquorum_core.signing import peek_payload
from keyquorum_protos.wire.tls import TlsIdentity

__all__ = ["PLAYS", "Circumstances", "Drills", "Event"]

PLAYS: Final[Mapping[str, Callable[[Rehearsal], Awaitable[None]]]] = {
    "rotation": rotation,
    "custodian-loss": custodian_loss,
    "slow-custodian": slow_custodian,
    "lying-custodian": lying_custodian,
    "repair": repair,
    "restore": restore,
    "revocation": revocation,
    "forged-evidence": forged_evidence,
    "split-view": split_view,
    "coordinator-loss": coordinator_loss,
}
_DEADLINE: Final = 3.0
_READY_SECONDS: Final = 10.0
_KEPT: Final = 16
_SHOWN_SECONDS: Final = 10.0
_SHOWN_LOOK: Final = 0.1
_UNDO_PAUSE: Final = 2.0
_BEAT: Final = 2.0

_log = structlog.get_logger("drills")


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the coordinator is made of, as far as drills go. ``keys``: the drill identity, None where there is none.
    ``decide``: the coordinator's policy. ``on_leaf`` hears that a leaf is in the outbox."""

    name: str
    keys: LoadedKeys | None
    settings: DrillSettings
    tls: TlsIdentity
    database: Database
    fanout: Fanout
    sequencer: Sequencer
    witnesses: Witnesses
    jobs: JobStore
    ceremonies: Ceremonies
    certified: CertifiedEpochs
    withdrawals: Withdrawals
    outbox: Outbox
    decide: Callable[[JobFacts], Decision]
    clock: Callable[[], float]
    deadline: float = _DEADLINE


@dataclass(frozen=True, slots=True)
class Event:
    """A moment of a drill, ``done`` of ``total`` kinds being through. ``report``: DSSE envelope, with the last."""

    drill_id: str
    moment: Moment
    done: int
    total: int
    report: bytes = b""


class _Run(Followed[Event]):
    """The drill under way."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = order
        self.kinds = KINDS if order.kind == FULL else (order.kind,)
        self.done = 0
        self.ending = False

    def tell(self, moment: Moment, report: bytes = b"") -> None:
        self.add(Event(self.order.drill_id, moment, self.done, len(self.kinds), report))

    def stop(self) -> None:
        """Another coordinator took this one for dead: what it injected is undone, and no more is."""
        if self.task is not None and not self.ending:
            self.task.cancel()


class Drills:
    """The coordinator's drills."""

    def __init__(self, circumstances: Circumstances) -> None:
        self._with = circumstances
        self._run: _Run | None = None
        self._runs: dict[str, _Run] = {}
        self._me = secrets.token_hex(16)

    @property
    def settings(self) -> DrillSettings:
        return self._with.settings

    @property
    def running(self) -> str:
        """The id of the one that runs; empty where none does."""
        return self._run.order.drill_id if self._run is not None else ""

    # -- for callers --------------------------------------------------------------------------------------------------

    async def run(self, order: Order) -> AsyncGenerator[Event]:
        """Begin a drill, or join the one with this id, and follow it to its report; it goes on without its caller.

        Raises, before anything is injected: ``MALFORMED``; ``CANARY`` for a key that is not certified to be for drills
        only; ``UNKNOWN_KEY``; ``SIGNATURE_MISSING``, ``BULLETIN`` and what documents are refused for; ``STATE`` without
        a drill identity; ``EXISTS`` while another drill runs."""
        run = self._runs.get(order.drill_id)
        if run is None:
            run = await self._begin(order)
        async for event in run.follow():
            yield event

    async def cancel(self, drill_id: str) -> bool:
        """Stop the drill; what it injected is undone when this returns. False where it does not run."""
        run = self._run
        if run is None or run.task is None or (drill_id and run.order.drill_id != drill_id):
            return False
        run.task.cancel()
        await asyncio.wait([run.task])
        return True

    async def report(self, drill_id: str) -> bytes:
        """DSSE envelope. Raises ``NOT_FOUND``, ``STATE``."""
        return await self._with.database.read(lambda session: store.report(session, drill_id))

    async def runs(self) -> list[store.Summary]:
        """The latest first."""
        return await self._with.database.read(store.latest)

    async def kinds(self) -> Mapping[str, store.KindRecord]:
        """By kind that ever ran."""
        return await self._with.database.read(store.kinds)

    async def close(self) -> None:
        """Stop what runs; it is undone, and reported as interrupted."""
        await self.cancel("")

    # -- beginning ----------------------------------------------------------------------------------------------------

    async def _begin(self, order: Order) -> _Run:
        keys = self._keys()
        order = await self._checked(order, keys)
        now = int(self._with.clock())
        await self._with.database.write(lambda session: store.begin(session, order, self._me, now))
        run = self._run = self._runs[order.drill_id] = _Run(order)
        while len(self._runs) > _KEPT:
            del self._runs[next(iter(self._runs))]
        run.task = asyncio.create_task(self._drive(run, keys, now))
        return run

    def _keys(self) -> LoadedKeys:
        if self._with.keys is None:
            raise StateError(
                Reason.STATE,
                "this coordinator has no drill identity",
                expected="drill-key.json in its folder",
                next_step="keyquorum-coordinator drill-key --dir DIR, then serve again; custodians' operators add the"
                " public file with `keyquorum-custodian owner add --canary`",
            )
        return self._with.keys

    async def _checked(self, order: Order, keys: LoadedKeys) -> Order:
        """The order as it will be run. Nothing was asked of any custodian yet."""
        key_id = order.key_id or self.settings.key
        if order.kind not in (*KINDS, FULL) or not DRILL_ID.fullmatch(order.drill_id):
            raise MalformedError(
                Reason.MALFORMED,
                "no such drill",
                expected=", ".join((*KINDS, FULL)),
                actual=ascii(order.kind[:40]),
            )
        if not key_id:
            raise MalformedError(
                Reason.MALFORMED, "a drill needs a canary key", expected="a key, or drills.key in coordinator.toml"
            )
        check(KEY_ID, key_id, "key id")
        await self._require_canary(key_id)
        if order.revoke or order.lift:
            await self._require_documents(order, keys)
        elif order.kind == "revocation":
            raise missing()
        return Order(order.drill_id, order.kind, key_id, order.revoke, order.lift, order.scheduled)

    async def _require_canary(self, key_id: str) -> None:
        """By the certificate that all custodians signed, under a roster of this cluster: not by our own word."""
        newest = await self._with.ceremonies.key(key_id)
        present = self._with.fanout.roster
        older = await self._with.database.read(lambda session: older_rosters(session, present))
        rosters = [
            present,
            *(Roster.parse(peek_payload(each, ROSTER_TYPE, "roster", 2 * MAX_ROSTER)) for each in older),
        ]
        certificate = await asyncio.to_thread(open_certificate, newest.certificate, rosters)
        if certificate.plan.key_id != key_id or not certificate.plan.policy.canary:
            raise RefusedError(
                Reason.CANARY,
                f"key {key_id} is not for drills: no drill touches it",
                expected="a key whose certified policy says canary",
                actual="one that says it is not",
                next_step="Make a key for drills: keyquorum key create NAME --canary",
            )

    async def _require_documents(self, order: Order, keys: LoadedKeys) -> None:
        now = int(self._with.clock())
        both = [await asyncio.to_thread(self._with.withdrawals.verified, each) for each in (order.revoke, order.lift)]
        for bulletin, _ in both:
            bulletin.check_time(now)
        current = await self._with.database.read(self._with.withdrawals.current)
        check_documents(current, both[0][1], both[1][1], keys.identity.public.fingerprint)

    # -- driving ------------------------------------------------------------------------------------------------------

    async def _drive(self, run: _Run, keys: LoadedKeys, started: int) -> None:
        drill: Rehearsal | None = None
        log = _log.bind(drill=run.order.drill_id, kind=run.order.kind, key=run.order.key_id)
        log.warning("drill.begins")
        cut = False
        try:
            tools = self._tools(keys)
            drill = Rehearsal(tools, run.order, run.tell)
            async with tools.fanout, self._beating(run.order.drill_id, run.stop):
                try:
                    await self._play(drill, run)
                except asyncio.CancelledError:
                    cut = True
                run.ending = True
                await asyncio.shield(self._finish(drill, run, keys, started, cut=cut))
            log.warning("drill.ended", outcome=run.events[-1].moment.text if run.events else "")
        except asyncio.CancelledError:
            run.error = UnavailableError(Reason.UNAVAILABLE, "the coordinator is stopping; the drill was cut off")
        except KeyquorumError as error:
            run.error = error
            log.error("drill.not_recorded", reason=str(error.reason), message=error.message)
        except Exception as error:
            run.error = KeyquorumError(Reason.INTERNAL, "the drill stopped in a way nobody foresaw")
            log.error("drill.unforeseen", error=type(error).__name__)
        finally:
            if self._run is run:
                self._run = None
            asyncio.get_running_loop().call_soon(run.wake)

    async def _play(self, drill: Rehearsal, run: _Run) -> None:
        drill.say("start", f"{run.order.kind} on key {run.order.key_id}")
        try:
            await drill.tools.fanout.ready(_READY_SECONDS)
        except TimeoutError:
            drill.say("note", "not every custodian could be reached")
        for kind in run.kinds:
            if kind in MAY_BE_SKIPPED and not run.order.lift:
                drill.skip(kind, "no operator signed for it: a schedule cannot")
            else:
                await drill.rehearse(kind, PLAYS[kind])
            run.done += 1

    async def _finish(self, drill: Rehearsal, run: _Run, keys: LoadedKeys, started: int, *, cut: bool) -> None:
        await drill.undo()
        parts = tuple(drill.parts)
        outcome = Outcome.INTERRUPTED if cut else DrillReport.outcome_of(parts)
        drill.say("done", f"{run.order.kind}: {outcome}")
        last = drill.timeline[-1]
        report = DrillReport(
            drill_id=run.order.drill_id,
            kind=run.order.kind,
            cluster=self._with.fanout.roster.cluster,
            coordinator=self._with.name,
            key_id=run.order.key_id,
            roster_sha256=self._with.fanout.roster.digest,
            started_at=started,
            duration_ms=drill.now_ms,
            outcome=outcome,
            parts=parts,
            timeline=tuple(drill.timeline),
        )
        envelope = await self._record(report, keys, undone=drill.undone)
        if not cut:
            await self._shown(report)
        run.tell(last, envelope)

    @contextlib.asynccontextmanager
    async def _beating(self, drill_id: str, lost: Callable[[], None]) -> AsyncIterator[None]:
        """Keep the drill this coordinator's; ``lost`` hears that it is another's."""

        async def beat() -> None:
            mine = True
            while mine:
                await asyncio.sleep(_BEAT)
                with contextlib.suppress(UnavailableError):  # if it lasts, the drill is lost
                    mine = await self._still_mine(drill_id, int(self._with.clock()))
            _log.error("drill.lost", drill=drill_id)
            lost()

        task = asyncio.create_task(beat())
        try:
            yield
        finally:
            task.cancel()

    async def _still_mine(self, drill_id: str, now: int) -> bool:
        return await self._with.database.write(lambda session: store.beat(session, drill_id, self._me, now))

    async def _shown(self, report: DrillReport) -> None:
        """Wait a moment for the leaf to be in what readers of the ledger are shown: who hears of the report looks."""
        sequencer = self._with.sequencer
        try:
            await self._with.outbox.settle(request_id(Drill.TYPE, report.drill_id))
        except KeyquorumError as error:  # it is in the outbox, and entered later
            _log.warning("drill.not_shown", drill=report.drill_id, reason=str(error.reason))
            return
        size = sequencer.latest.checkpoint.size
        for _ in range(round(_SHOWN_SECONDS / _SHOWN_LOOK)):
            if sequencer.witnessed is not None and sequencer.witnessed.checkpoint.size >= size:
                return
            await asyncio.sleep(_SHOWN_LOOK)

    async def _record(self, report: DrillReport, keys: LoadedKeys, *, undone: bool) -> bytes:
        envelope = await asyncio.to_thread(sign_report, report, keys.identity)
        now = int(self._with.clock())
        await self._with.database.write(
            lambda session: store.end(session, report, envelope, self._me, now, undone=undone)
        )
        self._with.outbox.wake()
        return envelope

    def _tools(self, keys: LoadedKeys) -> Tools:
        around = self._with
        roster = around.fanout.roster

        def links() -> Fanout:
            return Fanout(roster, around.tls, deadline=around.deadline, clock=around.clock)

        def another() -> tuple[Fanout, Ceremonies]:
            fanout = links()
            return fanout, Ceremonies(around.database, fanout, clock=around.clock, on_end=around.outbox.wake)

        fanout = links()
        witnesses = around.witnesses.beside(fanout)
        releases = Releases(
            fanout, around.sequencer, witnesses, around.jobs, around.database, around.certified, clock=around.clock
        )
        prober = Prober(
            keys,
            roster,
            fanout.quorum,
            releases,
            around.outbox,
            around.decide,
            self.settings.classification,
            around.clock,
        )
        return Tools(
            keys=keys,
            fanout=fanout,
            witnesses=witnesses,
            releases=releases,
            prober=prober,
            ceremonies=around.ceremonies,
            withdrawals=around.withdrawals,
            sequencer=around.sequencer,
            another=another,
            classification=self.settings.classification,
            deadline=around.deadline,
            clock=around.clock,
        )

    # -- what a dead coordinator left ---------------------------------------------------------------------------------

    async def resume(self) -> int:
        """Undo what a coordinator that died, or one that could not reach everybody, left in force, report it as
        interrupted, and go on with the ceremonies it left; returns how many drills. Raises ``STORAGE``."""
        now = int(self._with.clock())
        if not await self._with.database.read(lambda session: store.left_alone(session, self._me, now, self.running)):
            return 0
        left = await self._with.database.write(lambda session: store.take(session, self._me, now, self.running))
        for each in left:
            try:
                async with self._beating(each.drill_id, lambda: None):
                    await self._undo(each)
            except KeyquorumError as error:  # the next look tries again
                _log.error("drill.not_undone", drill=each.drill_id, reason=str(error.reason), message=error.message)
        await self._with.ceremonies.resume()
        return len(left)

    async def _undo(self, left: store.Unfinished) -> None:
        """Until every custodian was reached, or its faults are over anyhow; and the drill's owner is not revoked."""
        deadline = time.monotonic() + FAULT_SECONDS
        missed = await lift_everywhere(self._with.fanout, left.drill_id, left.key_id)
        while missed and time.monotonic() < deadline:
            await asyncio.sleep(_UNDO_PAUSE)
            missed = await lift_everywhere(self._with.fanout, left.drill_id, left.key_id, missed)
        if left.lift and await self._revoked():
            await self._with.withdrawals.accept(left.lift)
            await self._with.withdrawals.relay_once()
        if left.running:
            await self._record(self._interrupted(left), self._keys(), undone=True)
        else:
            await self._with.database.write(lambda session: store.mark_undone(session, left.drill_id))
        _log.warning("drill.undone", drill=left.drill_id, kind=left.kind, key=left.key_id, not_reached=missed)

    def _interrupted(self, left: store.Unfinished) -> DrillReport:
        text = "its coordinator died; what was injected is lifted, and would have ended by itself"
        return DrillReport(
            drill_id=left.drill_id,
            kind=left.kind,
            cluster=self._with.fanout.roster.cluster,
            coordinator=self._with.name,
            key_id=left.key_id,
            roster_sha256=self._with.fanout.roster.digest,
            started_at=left.started_at,
            duration_ms=0,
            outcome=Outcome.INTERRUPTED,
            parts=() if left.kind == FULL else (Part(left.kind, 0, 0, Outcome.INTERRUPTED, cause=text),),
            timeline=(Moment(0, left.kind, "note", "", text),),
        )

    async def _revoked(self) -> bool:
        current = await self._with.database.read(self._with.withdrawals.current)
        return current.find("owner", self._keys().identity.public.fingerprint) is not None
