"""What keeps keys in order without anybody asking: due rotations, stale custodians, retired epochs.

None of it is this coordinator's to decide. A rotation is due, and a retired epoch may go, by the policy that operators
signed into the key's plan; custodians work it out for themselves and refuse whatever comes too soon. What failed is
tried again, less and less often.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import aclosing
from functools import partial

import grpc.aio
import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from keyquorum_coordinator.ceremonies import Ceremonies, KeyEpoch, Spared, nothing_spared
from keyquorum_coordinator.certificates import fetch_certificate, older_rosters
from keyquorum_coordinator.database import Database, JobRow, KeyRow, StaleRow
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.job_states import FINAL
from keyquorum_coordinator.orders import Certified, policy_plan, read_certificate
from keyquorum_coordinator.vouching import Vouching
from keyquorum_core.ceremony_plan import unsigned_plan
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.certified import open_certificate
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.roster import MAX_ROSTER, ROSTER_TYPE, Roster
from keyquorum_core.signing import peek_payload
from keyquorum_protos.v1 import custodian_pb2 as pb

__all__ = ["Tending"]

_FIRST_PAUSE = 30.0
_LONGEST_PAUSE = 3600.0
_ACTIVATE_TIMEOUT = 30.0

_log = structlog.get_logger("ceremonies")


class Tending:
    """``clock`` gives unix seconds. :meth:`look` is one round; :meth:`forever` makes them. ``spared``: keys of which no
    epoch is rotated or destroyed now, since a drill is doing that."""

    def __init__(
        self,
        database: Database,
        fanout: Fanout,
        ceremonies: Ceremonies,
        *,
        every: float = 10.0,
        clock: Callable[[], float] = time.time,
        spared: Spared = nothing_spared,
    ) -> None:
        self._database = database
        self._fanout = fanout
        self._ceremonies = ceremonies
        self._every = every
        self._clock = clock
        self._spared = spared
        self._vouching = Vouching(fanout)
        self._wake = asyncio.Event()
        self._certificates: dict[str, Certified] = {}
        self._active: dict[tuple[str, int], float] = {}
        """Since when each active epoch is known here."""
        self._mended: dict[tuple[str, int, str], float] = {}
        """When a custodian was seen to again: what it said before says nothing of that."""
        self._pauses: dict[Hashable, tuple[float, float]] = {}

    def wake(self) -> None:
        """There is something to do now."""
        self._wake.set()

    async def forever(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self.look()
            except KeyquorumError as error:
                _log.error("tending.failed", reason=str(error.reason), message=error.message)
            try:
                async with asyncio.timeout(self._every):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def look(self) -> None:
        """One round: learn what is not known, then do what is due."""
        for name in self._vouching.waiting():
            await self._attempt(("restored", name), partial(self._vouch, name))
        await self._learn()
        epochs = await self._notice(await self._ceremonies.keys())
        newest = {each.key_id: each.epoch for each in reversed(epochs)}
        drilled = await self._spared()
        for each in epochs:
            where = (each.key_id, each.epoch)
            spared = each.key_id in drilled
            if not spared and each.state == "active" and newest[each.key_id] == each.epoch:
                await self._attempt(("rotate", *where), partial(self._rotate, each))
            for name in each.stale if each.state != "destroyed" else ():
                await self._attempt(("repair", *where, name), partial(self._repair, each, name))
                self._mended[each.key_id, each.epoch, name] = self._clock()
            if not spared and each.state == "retired":
                await self._attempt(("destroy", *where), partial(self._retire, each))
        await self._attempt("resume", self._resume)

    # -- what is due --------------------------------------------------------------------------------------------------

    async def _rotate(self, epoch: KeyEpoch) -> None:
        plan = (await self._certified(epoch)).plan
        due = plan.policy.rotate_after_seconds
        if due and self._now() >= plan.created_at + due and plan.quorum == self._fanout.quorum:
            await self._order(epoch, Kind.ROTATE, epoch.epoch + 1)

    async def _retire(self, epoch: KeyEpoch) -> None:
        """Once it was kept as long as the policy says, and nothing runs on it any more."""
        policy = (await self._certified(epoch)).plan.policy
        if self._now() < epoch.retired_at + policy.retain_seconds:
            return
        running = select(JobRow.job_id).where(
            JobRow.key_id == epoch.key_id, JobRow.epoch == epoch.epoch, JobRow.state.not_in(FINAL)
        )
        if await self._database.read(lambda session: session.scalars(running.limit(1)).first()) is None:
            await self._order(epoch, Kind.DESTROY, epoch.epoch)

    async def _repair(self, epoch: KeyEpoch, name: str) -> None:
        """Tell it of the certificate, if it had a part in it and only missed the end; have it rebuilt otherwise.

        One that says by now that it holds the epoch was rebuilt before, and its answer lost.
        """
        link = self._fanout.links.get(name)
        if link is None or not link.connected:
            return
        if (epoch.key_id, epoch.epoch) in link.keys:
            await self._not_stale(epoch, name)
            return
        if name in (await self._certified(epoch)).signers:
            envelope = await self._ceremonies.certificate(epoch.key_id, epoch.epoch)
            request = pb.ActivateRequest(ceremony_id=epoch.ceremony_id, certificate=envelope)
            try:
                await link.ceremonies.Activate(request, timeout=_ACTIVATE_TIMEOUT)
            except (grpc.aio.AioRpcError, KeyquorumError):
                pass
            else:
                await self._not_stale(epoch, name)
                return
        await self._order(epoch, Kind.REPAIR, epoch.epoch, target=name)

    async def _order(self, epoch: KeyEpoch, kind: Kind, number: int, target: str = "") -> None:
        """What the key's policy has anybody order. Custodians judge it."""
        plan = policy_plan(
            await self._certified(epoch),
            kind,
            number,
            roster_digest=self._fanout.roster.digest,
            now=self._now(),
            target=target,
        )
        async with aclosing(self._ceremonies.run(unsigned_plan(plan))) as steps:
            async for _ in steps:
                pass

    async def _resume(self) -> None:
        await self._ceremonies.resume()

    async def _not_stale(self, epoch: KeyEpoch, name: str) -> None:
        def work(session: Session) -> None:
            row = session.get(StaleRow, (epoch.key_id, epoch.epoch, name))
            if row is not None:
                session.delete(row)

        await self._database.write(work)

    async def _notice(self, epochs: Sequence[KeyEpoch]) -> Sequence[KeyEpoch]:
        """Custodians that should hold an active epoch and say that they don't: they lost it, and are stale from now on.
        What one said before the epoch was active here says nothing."""
        now = self._clock()
        active = {(each.key_id, each.epoch): each for each in epochs if each.state == "active"}
        self._active = {where: self._active.get(where, now) for where in active}
        lost = [
            (each, link.id)
            for where, each in active.items()
            for link in self._fanout.links.values()
            if link.held_at > max(self._active[where], self._mended.get((*where, link.id), 0.0))
            and where not in link.keys
            and link.id not in each.stale
            and link.id in (await self._certified(each)).plan.quorum.ids
        ]
        if not lost:
            return epochs
        since = int(now)

        def work(session: Session) -> None:
            for each, name in lost:
                cause = "it says that it does not hold the epoch any more"
                session.merge(StaleRow(key_id=each.key_id, epoch=each.epoch, custodian=name, since=since, cause=cause))

        await self._database.write(work)
        for each, name in lost:
            _log.warning("key.lost", key=each.key_id, epoch=each.epoch, custodian=name)
        return await self._ceremonies.keys()

    async def _vouch(self, name: str) -> None:
        """Carry a restored custodian's question and its peers' answers; what it lacks is then known."""
        lacking = await self._vouching.vouch(name)
        if not lacking:
            return
        now = self._now()

        def work(session: Session) -> None:
            for key_id, number in lacking:
                row = session.get(KeyRow, (key_id, number))
                if row is not None and row.state != "destroyed":
                    cause = "made after the backup that it was restored from"
                    session.merge(StaleRow(key_id=key_id, epoch=number, custodian=name, since=now, cause=cause))

        await self._database.write(work)

    # -- what is known ------------------------------------------------------------------------------------------------

    async def _learn(self) -> None:
        """Epochs that custodians serve and this coordinator has never heard of."""
        known = {(each.key_id, each.epoch) for each in await self._ceremonies.keys()}
        described = {key for link in self._fanout.links.values() for key in link.keys}
        for key_id, number in sorted(described - known):
            await self._attempt(("learn", key_id, number), partial(self._learn_one, key_id, number))

    async def _learn_one(self, key_id: str, number: int) -> None:
        rosters = [self._fanout.roster, *await self._database.read(self._older)]
        envelope = await fetch_certificate(self._fanout.links, key_id, number)
        plan = (await asyncio.to_thread(open_certificate, envelope, rosters)).plan

        def work(session: Session) -> None:
            later = session.scalars(
                select(KeyRow).where(KeyRow.key_id == key_id, KeyRow.epoch > number).order_by(KeyRow.epoch)
            ).first()
            session.merge(
                KeyRow(
                    key_id=key_id,
                    epoch=number,
                    state="active" if later is None else "retired",
                    certificate=envelope,
                    ceremony_id=plan.ceremony_id,
                    created_at=plan.created_at,
                    retired_at=None if later is None else later.created_at,
                )
            )
            for earlier in session.scalars(
                select(KeyRow).where(KeyRow.key_id == key_id, KeyRow.epoch < number, KeyRow.state == "active")
            ):
                earlier.state, earlier.retired_at = "retired", plan.created_at

        await self._database.write(work)
        _log.info("key.learned", key=key_id, epoch=number)

    def _older(self, session: Session) -> list[Roster]:
        envelopes = older_rosters(session, self._fanout.roster)
        return [Roster.parse(peek_payload(each, ROSTER_TYPE, "roster", 2 * MAX_ROSTER)) for each in envelopes]

    # -- patience -----------------------------------------------------------------------------------------------------

    async def _attempt(self, what: Hashable, work: Callable[[], Awaitable[None]]) -> None:
        """Unless it failed a moment ago; a failure is logged, and makes the next pause longer."""
        until, pause = self._pauses.get(what, (0.0, _FIRST_PAUSE))
        if time.monotonic() < until:
            return
        try:
            await work()
        except KeyquorumError as error:
            self._pauses[what] = (time.monotonic() + pause, min(2 * pause, _LONGEST_PAUSE))
            _log.warning("tending.postponed", what=str(what), reason=str(error.reason), message=error.message)
        else:
            self._pauses.pop(what, None)

    async def _certified(self, epoch: KeyEpoch) -> Certified:
        known = self._certificates.get(epoch.ceremony_id)
        if known is None:
            envelope = await self._ceremonies.certificate(epoch.key_id, epoch.epoch)
            known = self._certificates[epoch.ceremony_id] = await asyncio.to_thread(read_certificate, envelope)
        return known

    def _now(self) -> int:
        return int(self._clock())
