"""Every ceremony as this custodian takes part in it: what is ordered, whether it may be, and who does which step.

A plan enters here, is judged by whoever ordered it, by what this custodian remembers and by its own operator, and then
belongs to :mod:`making`, :mod:`rebuilding` or :mod:`destroying`. The table of moves is
:mod:`keyquorum_core.ceremony_states`; nothing moves otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final
from weakref import WeakValueDictionary

from keyquorum_core.ceremony_plan import CeremonyPlan, OrderedBy, OrderedPlan, check_date, open_plan
from keyquorum_core.ceremony_states import MAKING, PLAN_SKEW, REBUILDING, Kind, State, Step
from keyquorum_core.errors import Reason, RefusedError, StateError
from keyquorum_core.parts import SealedPart
from keyquorum_core.succession import earlier_rosters
from keyquorum_custodian.approvals import Approvals, category
from keyquorum_custodian.ceremony_policy import CeremonyPolicy, OwnPolicy
from keyquorum_custodian.ceremony_seat import CeremonySeat, another_request, check_move, wrong_state
from keyquorum_custodian.config import AUTOMATIC
from keyquorum_custodian.destroying import Destroying
from keyquorum_custodian.differences import asked_by, difference
from keyquorum_custodian.making import Making, Proposal
from keyquorum_custodian.pacing import Work, at_once, on_the_spot
from keyquorum_custodian.rebuilding import Rebuilding
from keyquorum_custodian.seed_records import CeremonyRow

__all__ = ["Ceremonies", "Proposed", "SealedPart", "Steps"]

_MAX_ROSTERS: Final = 64


@dataclass(frozen=True, slots=True)
class Proposed:
    """What *propose* answers: a making's proposal; or a signed statement (DSSE envelope), the rebuild request of the
    one to be rebuilt, a consent to destruction, or nothing from a co-holder."""

    ceremony_id: str
    proposal: Proposal | None = None
    statement: bytes = b""


class Steps:
    """The steps of every ceremony, as coroutines that leave others their turns where ``seat.work`` does; used from the
    keystore's thread. One step of a key's ceremonies at a time, so that nothing that a step looked at changes while it
    waits."""

    def __init__(self, seat: CeremonySeat, approvals: Approvals, own_policy: OwnPolicy) -> None:
        self._seat = seat
        self._keystore = seat.keystore
        self._approvals = approvals
        self._own_policy = own_policy
        self._making = Making(seat)
        self._rebuilding = Rebuilding(seat)
        self._destroying = Destroying(seat)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def _turn(self, key_id: str) -> AsyncIterator[None]:
        lock = self._turns.get(key_id)
        if lock is None:
            lock = self._turns[key_id] = asyncio.Lock()
        async with lock:
            yield

    # -- propose ---------------------------------------------------------------------------------------------------

    async def propose(self, envelope: bytes, certificate: bytes = b"", rosters: Sequence[bytes] = ()) -> Proposed:
        """Take part in the ceremony of a plan, or say why not.

        ``certificate`` (rebuilding only): the envelope that the plan goes by; ``rosters``: envelopes of earlier
        rosters, down to the one it was certified under. Raises ``SIGNATURE…``, ``CEREMONY`` (a plan for another
        cluster, roster, quorum or certificate, or another plan of this id), ``STALE`` (an old plan), ``APPROVAL``
        (waits for this custodian's operator, or was rejected), ``UNSUPPORTED`` (suite), ``EXISTS``, ``KEY_STATE``
        (stale, destroyed), ``RESTORED``, ``STATE`` (cancelled, too soon), ``POLICY`` (its own policies do not
        permit it), ``STORAGE``.
        """
        self._seat.standing.require_proved()
        roster = self._seat.roster
        ordered = await self._seat.work(open_plan, envelope, roster.operator_identities(), roster.operator_threshold)
        async with self._turn(ordered.plan.key_id):
            return await self._propose(ordered, certificate, rosters)

    async def _propose(self, ordered: OrderedPlan, certificate: bytes, rosters: Sequence[bytes]) -> Proposed:
        plan = ordered.plan
        row = self._keystore.ceremony(plan.ceremony_id)
        if row is not None:
            if row.plan != ordered.payload:
                raise another_request(
                    row, Step.PROPOSE, hashlib.sha256(row.plan).digest(), hashlib.sha256(ordered.payload).digest()
                )
            if row.state is State.CANCELLED:
                raise wrong_state(row, State.PROPOSED)
            stored = self._keystore.answer(plan.ceremony_id, Step.PROPOSE)
            if stored is not None:
                return self._proposed(row, plan, stored[1])
        self._check_date(plan, waiting=row is not None)
        if rosters:
            self._learn_rosters(rosters)
        await self._check(plan, certificate)
        self._own_policy.check(plan, ordered.signers)
        kind = category(plan)
        if not self._approvals.automatic(kind):
            if row is None:
                self._ask(ordered, kind)
            self._approvals.require(plan.ceremony_id, plan.digest)
        fresh = row is None and self._approvals.automatic(kind)
        row = _row(ordered, State.PROPOSED)
        if plan.kind in MAKING:
            answer = await self._making.propose(row, plan, fresh=fresh)
        elif plan.kind in REBUILDING:
            answer = await self._rebuilding.propose(row, plan, certificate, fresh=fresh)
        else:
            answer = self._destroying.propose(row, plan, fresh=fresh)
        return self._proposed(row, plan, answer)

    def _check_date(self, plan: CeremonyPlan, *, waiting: bool) -> None:
        now = self._seat.now()
        check_date(plan, now)
        if plan.ordered_by is OrderedBy.POLICY and not waiting and plan.created_at < now - PLAN_SKEW:
            # Its date is nobody's word but the coordinator's, and epochs are as old as their plans say.
            raise RefusedError(
                Reason.STALE,
                "a plan that the key's policy orders is of this moment",
                expected=f"{now - PLAN_SKEW}…{now + PLAN_SKEW}",
                actual=plan.created_at,
            )

    async def _check(self, plan: CeremonyPlan, certificate: bytes) -> None:
        if plan.kind in MAKING:
            await self._making.check(plan)
        elif plan.kind in REBUILDING:
            await self._rebuilding.check(plan, certificate)
        else:
            self._destroying.check(plan)

    def _ask(self, ordered: OrderedPlan, kind: str) -> None:
        plan = ordered.plan
        lines = difference(self._seat, plan)
        with self._keystore.transaction():
            self._keystore.insert_ceremony(_row(ordered, State.PENDING), self._seat.now())
            self._approvals.ask(plan.ceremony_id, kind, plan.digest, asked_by(ordered.signers), lines)

    def _proposed(self, row: CeremonyRow, plan: CeremonyPlan, answer: bytes) -> Proposed:
        if plan.kind in MAKING:
            return Proposed(plan.ceremony_id, self._making.proposal(row, answer))
        return Proposed(plan.ceremony_id, statement=answer)

    def _learn_rosters(self, envelopes: Sequence[bytes]) -> None:
        """Earlier rosters than the one in force, each known by the digest that a later one names. Raises ``ROSTER``."""
        known = earlier_rosters(self._seat.roster, list(envelopes)[:_MAX_ROSTERS])
        if len(known) != len(envelopes):
            raise RefusedError(
                Reason.ROSTER,
                "some earlier rosters are not those that the later ones name",
                expected=f"at most {_MAX_ROSTERS}, without a gap before version {self._seat.roster.version}",
                actual=f"{len(known)} of {len(envelopes)}",
            )
        for digest, roster in known.items():
            self._keystore.keep_roster(digest, roster.version, roster.payload())

    # -- the other steps -------------------------------------------------------------------------------------------

    async def deliver(self, ceremony_id: str, headers: list[bytes], parts: list[SealedPart]) -> bytes:
        """See :meth:`Making.deliver`."""
        async with self._step(ceremony_id, MAKING, State.DELIVERED):
            return await self._making.deliver(ceremony_id, headers, parts)

    async def confirm(self, ceremony_id: str, commitments: list[bytes]) -> bytes:
        """See :meth:`Making.confirm`."""
        async with self._step(ceremony_id, MAKING, State.CONFIRMED):
            self._still_permitted(ceremony_id, State.DELIVERED)
            return await self._making.confirm(ceremony_id, commitments)

    async def activate(self, ceremony_id: str, certificate: bytes) -> None:
        """See :meth:`Making.activate`."""
        async with self._step(ceremony_id, MAKING, State.ACTIVE):
            await self._making.activate(ceremony_id, certificate)

    async def give(self, ceremony_id: str, request: bytes) -> tuple[bytes, bytes]:
        """See :meth:`Rebuilding.give`."""
        async with self._step(ceremony_id, REBUILDING, State.GIVEN):
            self._still_permitted(ceremony_id, State.PROPOSED)
            return await self._rebuilding.give(ceremony_id, request)

    async def restore(self, ceremony_id: str, certificate: bytes, gifts: Sequence[tuple[bytes, SealedPart]]) -> bytes:
        """See :meth:`Rebuilding.restore`."""
        async with self._step(ceremony_id, REBUILDING, State.RESTORED):
            return await self._rebuilding.restore(ceremony_id, certificate, gifts)

    async def erase(self, ceremony_id: str, consents: list[bytes]) -> bytes:
        """See :meth:`Destroying.erase`."""
        async with self._step(ceremony_id, {Kind.DESTROY}, State.ERASED):
            self._still_permitted(ceremony_id, State.PROPOSED)
            return self._destroying.erase(ceremony_id, consents)

    def _still_permitted(self, ceremony_id: str, before: State) -> None:
        """Ask the policies again before the step that binds: they may be others than when this custodian agreed. A step
        that was done already is only repeated."""
        row = self._seat.row(ceremony_id)
        if row.state is before:
            self._own_policy.check(CeremonyPlan.parse(row.plan), row.signers)

    @contextlib.asynccontextmanager
    async def _step(self, ceremony_id: str, kinds: Iterable[Kind], target: State) -> AsyncIterator[None]:
        """The turn of a ceremony that has such a step. Raises ``NOT_FOUND``, ``STATE``."""
        self._seat.standing.require_proved()
        row = self._seat.row(ceremony_id)
        if row.kind not in kinds:
            raise StateError(
                Reason.STATE,
                f"ceremony {row.ceremony_id} is to {row.kind}, and has no such step",
                expected=" or ".join(sorted(kinds)),
                actual=str(target),
            )
        async with self._turn(row.key_id):
            yield

    async def cancel(self, ceremony_id: str, cause: str = "") -> str:
        """Give a ceremony up; returns the state it was in, or ``unknown``. Raises ``STATE`` for one that is over."""
        row = self._keystore.ceremony(ceremony_id)
        if row is None:
            return "unknown"
        async with self._turn(row.key_id):
            return self._cancel(self._seat.row(ceremony_id), cause)

    def _cancel(self, row: CeremonyRow, cause: str) -> str:
        if row.state is State.CANCELLED:
            return str(row.cancelled_from or "unknown")
        check_move(row, State.CANCELLED)
        with self._keystore.transaction():
            self._keystore.move_ceremony(row.ceremony_id, State.CANCELLED, self._seat.now(), cause[:500])
            self._approvals.withdraw(row.ceremony_id)
            if row.state is not State.CONFIRMED:
                self._keystore.drop_secrets(row.ceremony_id)
        return str(row.state)


class Ceremonies:
    """One custodian's part in ceremonies; used from the keystore's thread. Its steps are those of :class:`Steps`, done
    on the spot; :meth:`steps` are for a server."""

    def __init__(self, seat: CeremonySeat, policy: CeremonyPolicy, automatic: Collection[str] = AUTOMATIC) -> None:
        self._seat = seat
        self._own_policy = OwnPolicy(policy, seat)
        self._keystore = seat.keystore
        self.approvals = Approvals(seat.keystore, automatic, seat.clock)
        self._steps = self.steps(on_the_spot)

    def steps(self, work: Work) -> Steps:
        """The steps, with what takes long left to ``work``."""
        return Steps(replace(self._seat, work=work), self.approvals, self._own_policy)

    def resume(self) -> int:
        """On start-up: finish what a death left half erased; returns how many epochs."""
        half = [row for row in self._keystore.ceremonies() if row.state is State.ERASED]
        for row in half:
            Destroying(self._seat).finish(row)
        return len(half)

    def propose(self, envelope: bytes, certificate: bytes = b"", rosters: Sequence[bytes] = ()) -> Proposed:
        return at_once(self._steps.propose(envelope, certificate, rosters))

    def deliver(self, ceremony_id: str, headers: list[bytes], parts: list[SealedPart]) -> bytes:
        return at_once(self._steps.deliver(ceremony_id, headers, parts))

    def confirm(self, ceremony_id: str, commitments: list[bytes]) -> bytes:
        return at_once(self._steps.confirm(ceremony_id, commitments))

    def activate(self, ceremony_id: str, certificate: bytes) -> None:
        at_once(self._steps.activate(ceremony_id, certificate))

    def give(self, ceremony_id: str, request: bytes) -> tuple[bytes, bytes]:
        return at_once(self._steps.give(ceremony_id, request))

    def restore(self, ceremony_id: str, certificate: bytes, gifts: Sequence[tuple[bytes, SealedPart]]) -> bytes:
        return at_once(self._steps.restore(ceremony_id, certificate, gifts))

    def erase(self, ceremony_id: str, consents: list[bytes]) -> bytes:
        return at_once(self._steps.erase(ceremony_id, consents))

    def cancel(self, ceremony_id: str, cause: str = "") -> str:
        return at_once(self._steps.cancel(ceremony_id, cause))

    def certificate(self, key_id: str, epoch: int) -> bytes:
        """The certificate (DSSE envelope) of an epoch, also of one that is no longer. Raises ``UNKNOWN_KEY``."""
        row = self._keystore.epoch(key_id, epoch)
        if row is None:
            raise StateError(
                Reason.UNKNOWN_KEY,
                "this custodian knows no such epoch",
                expected=", ".join(str(each.epoch) for each in self._keystore.epochs(key_id)) or "a key it holds",
                actual=f"{key_id[:64]} epoch {epoch}",
            )
        return row.certificate


def _row(ordered: OrderedPlan, state: State) -> CeremonyRow:
    plan = ordered.plan
    return CeremonyRow(
        plan.ceremony_id, plan.kind, plan.key_id, plan.epoch, state, None, ordered.payload, ordered.signers
    )
