"""What driving any ceremony takes: asking custodians, keeping their answers, going from step to step, giving up.

The coordinator carries sealed parts and signed statements between custodians and is trusted with none of it; it checks
what it carries so that a stop names the right custodian. The answers to a step are stored with the move to the next, in
one write, so that a killed coordinator goes on from the step that it was at; asked again, a custodian repeats what it
answered. And every step can be repeated, so that another coordinator can go on as well.
The steps and where they may lead are :mod:`keyquorum_core.ceremony_states`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeVar

import grpc.aio
import structlog
from google.protobuf.message import DecodeError, Message
from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import CeremonyAnswerRow, CeremonyRow, Database
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.link import Link
from keyquorum_coordinator.outbox import enter
from keyquorum_coordinator.stored_errors import dump_error
from keyquorum_core.ceremony import MAX_CERTIFICATE
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.ceremony_states import APPROVAL_PATIENCE, POSITIONS, Step, phase
from keyquorum_core.errors import KeyquorumError, Reason, StateError, UnavailableError
from keyquorum_core.ledger.leaves import NOTHING, Ceremony
from keyquorum_core.signing import open_envelope
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.wire.errors import from_rpc_error

__all__ = ["APPROVAL_POLL", "ENDED", "Asked", "Driver", "OvertakenError", "Progress", "blaming", "parse", "stopped"]

ENDED = (Step.DONE, Step.CANCELLED)
APPROVAL_POLL = 2.0
"""Seconds between two looks at whether a custodian's operator has approved."""
GRACE = 5.0
"""Seconds that the silent have, at least, once the others' answers are enough: :meth:`Driver.ask`."""
_GRACE_TIMES = 3.0
_CANCEL_TIMEOUT = 5.0
_RETRIES = (0.5, 1.0, 2.0)  # seconds between attempts on a custodian that cannot be reached

M = TypeVar("M", bound=Message)
Call = Callable[[Link], Awaitable[Message]]

_log = structlog.get_logger("ceremonies")


@dataclass(frozen=True, slots=True)
class Progress:
    """``done`` of ``total`` custodians are through ``step``; ``custodian`` is who just got through, empty for the step
    itself. ``waiting``: whose operators have to approve. ``certificate``: DSSE envelope, with step ``done`` where the
    ceremony is about one. ``note``: what the operator should know, at the end."""

    ceremony_id: str
    step: Step
    custodian: str
    done: int
    total: int
    certificate: bytes = b""
    waiting: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """What custodians answered at a step, serialised, and why others did not."""

    answers: Mapping[str, bytes]
    errors: Mapping[str, KeyquorumError]


class OvertakenError(StateError):
    """Another coordinator drove the ceremony further; what is stored says where it is."""


class Driver(ABC):
    """One ceremony, step by step. ``tell`` hears of progress, ``clock`` gives unix seconds."""

    def __init__(
        self,
        database: Database,
        fanout: Fanout,
        plan: CeremonyPlan,
        plan_envelope: bytes,
        tell: Callable[[Progress], None],
        clock: Callable[[], float],
    ) -> None:
        self.database = database
        self.links: Mapping[str, Link] = fanout.links
        self.precedence = fanout.precedence
        self.roster = fanout.roster
        self.identities = {custodian.id: custodian.identity for custodian in fanout.roster.custodians}
        self.plan = plan
        self.envelope = plan_envelope
        self.tell = tell
        self.clock = clock
        self.certificate = b""
        """The certificate that a making came to, once it is whole."""
        self.settled: tuple[str, ...] = ()
        """Who takes part, once that is settled."""
        self._stored: dict[Step, dict[str, bytes]] = {}
        self._unsaved: dict[tuple[Step, str], bytes] = {}

    async def drive(self) -> None:
        """From where it is to its end, or to an error that says where it stopped."""
        try:
            await self.database.read(self._load)
            await self.run()
        except OvertakenError:
            raise
        except KeyquorumError as error:
            step = await self.database.read(lambda session: Step(self.row(session).step))
            if Step.CANCELLED in POSITIONS[self.plan.kind].get(step, ()):
                try:
                    await self.cancel(error)
                except KeyquorumError as failure:  # not recorded: the next start tries again, and cancels then
                    _log.error("ceremony.cancel_not_recorded", reason=str(failure.reason))
            else:
                await self._note(error)
            raise

    @abstractmethod
    async def run(self) -> None:
        """The steps of this kind, from wherever what is stored says it is."""

    # -- asking -------------------------------------------------------------------------------------------------------

    async def ask(
        self,
        step: Step,
        names: Iterable[str],
        call: Call,
        *,
        enough: Callable[[Mapping[str, bytes]], bool] = lambda answers: False,
    ) -> Asked:
        """Ask custodians at once; those whose answers are stored are not asked again.

        Where a custodian's operator has to approve, it is asked again until that happened, or until another's refusal
        makes waiting pointless. Once those that answered are ``enough``, the silent have :data:`GRACE`, or thrice what
        the slowest answer took, to answer as well; who waits for its operator is not silent.
        """
        wanted = [name for name in names if name in self.links]
        stored = self._stored.get(step, {})
        answers = {name: stored[name] for name in wanted if name in stored}
        errors: dict[str, KeyquorumError] = {}
        waiting: set[str] = set()
        hopeless = asyncio.Event()
        total = len(wanted)
        self.tell(Progress(self.plan.ceremony_id, step, "", len(answers), total))

        async def one(link: Link) -> None:
            try:
                answer = await self._until_approved(step, link, call, waiting, hopeless, len(answers), total)
            except KeyquorumError as error:
                errors[link.id] = error
                if not isinstance(error, UnavailableError) and "stale" not in error.details:
                    hopeless.set()
                return
            answers[link.id] = self._unsaved[step, link.id] = answer.SerializeToString()
            self.tell(Progress(self.plan.ceremony_id, step, link.id, len(answers), total))
            if link.id in waiting:
                waiting.discard(link.id)
                await self._waits_for(waiting)

        missing = [self.links[name] for name in wanted if name not in answers]
        if missing:
            async with self.precedence.step():
                await self._gather({link.id: one(link) for link in missing}, answers, errors, waiting, enough)
        return Asked(answers, errors)

    async def _gather(
        self,
        asking: Mapping[str, Coroutine[None, None, None]],
        answers: Mapping[str, bytes],
        errors: dict[str, KeyquorumError],
        waiting: AbstractSet[str],
        enough: Callable[[Mapping[str, bytes]], bool],
    ) -> None:
        """Until all have answered or failed to, or the silent have had their time."""
        under_way = {name: asyncio.create_task(each) for name, each in asking.items()}
        started = time.monotonic()
        try:
            while under_way:
                silent = under_way.keys() - waiting - answers.keys() if enough(answers) else set()
                patience = max(GRACE, _GRACE_TIMES * (time.monotonic() - started)) if silent else None
                await asyncio.wait(under_way.values(), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                done = [name for name, task in under_way.items() if task.done()]
                for name in done:
                    under_way.pop(name).result()
                for name in () if done else silent - waiting - answers.keys():
                    under_way.pop(name).cancel()
                    errors[name] = _silent(name, time.monotonic() - started)
        finally:
            for task in under_way.values():
                task.cancel()

    async def write(self, work: Callable[[Session], object]) -> None:
        """One transaction, and in it the answers that are not stored yet."""
        answers = dict(self._unsaved)

        def both(session: Session) -> None:
            self._save_answers(session, answers)
            work(session)

        await self.database.write(both)
        for key in answers:
            self._unsaved.pop(key, None)  # another write, begun meanwhile, may have taken it along

    async def end(self, work: Callable[[Session], object]) -> None:
        """The ceremony's last transaction. Sealed parts have no use any more, and what is not kept cannot be attacked
        later."""

        def both(session: Session) -> None:
            work(session)
            session.execute(delete(CeremonyAnswerRow).where(CeremonyAnswerRow.ceremony_id == self.plan.ceremony_id))

        await self.database.write(both)
        self._unsaved.clear()

    async def ask_all(self, step: Step, names: Iterable[str], call: Call) -> Mapping[str, bytes]:
        """As :meth:`ask`; raises one error for all that failed."""
        asked = await self.ask(step, names, call)
        if asked.errors:
            raise stopped(step, asked.errors)
        return asked.answers

    async def _until_approved(
        self, step: Step, link: Link, call: Call, waiting: set[str], hopeless: asyncio.Event, done: int, total: int
    ) -> Message:
        patience, heard = phase(self.plan.kind, step).patience, time.monotonic()
        while True:
            try:
                answer = await _attempts(link, call, patience)
            except UnavailableError:
                # Once it put the plan before its operator it remembers it: it may well be restarted meanwhile.
                if link.id not in waiting or hopeless.is_set() or time.monotonic() - heard > patience:
                    raise
                await self._pause(hopeless)
                continue
            except StateError as error:
                if error.reason is not Reason.APPROVAL:
                    raise
                if hopeless.is_set() or self.clock() > self.plan.created_at + APPROVAL_PATIENCE:
                    raise
                heard = time.monotonic()
                if link.id not in waiting:
                    waiting.add(link.id)
                    await self._waits_for(waiting)
                    names = tuple(sorted(waiting))
                    self.tell(Progress(self.plan.ceremony_id, step, "", done, total, waiting=names))
                await self._pause(hopeless)
                continue
            return answer

    @staticmethod
    async def _pause(hopeless: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hopeless.wait(), APPROVAL_POLL)

    def signed(self, envelope: bytes, payload_type: str, custodian: str, what: str) -> bytes:
        """The payload of what a custodian signed."""
        return open_envelope(envelope, payload_type, self.identities[custodian], what, max_bytes=MAX_CERTIFICATE)

    # -- giving up ----------------------------------------------------------------------------------------------------

    async def cancel(self, error: KeyquorumError) -> None:
        """Tell every custodian, as far as they can be reached, and record why. A custodian that was not reached learns
        it when it is asked to go on: it refuses a ceremony that the others gave up."""
        request = pb.CancelRequest(ceremony_id=self.plan.ceremony_id, cause=f"{error.reason}: {error.message}"[:500])

        async def cancel(link: Link) -> None:
            try:
                await link.ceremonies.Cancel(request, timeout=_CANCEL_TIMEOUT)
            except (grpc.aio.AioRpcError, KeyquorumError) as failure:
                _log.warning("ceremony.cancel_failed", custodian=link.id, error=type(failure).__name__)

        await asyncio.gather(*(cancel(link) for link in self.links.values()))

        def work(session: Session) -> None:
            row = self.move(session, Step.CANCELLED)
            row.error = dump_error(error)
            self.enter_leaf(session, NOTHING, str(error.reason))

        await self.end(work)

    async def _note(self, error: KeyquorumError) -> None:
        """What keeps a ceremony that can only go forward where it is."""

        def work(session: Session) -> None:
            self.row(session).error = dump_error(error)

        with contextlib.suppress(KeyquorumError):
            await self.write(work)

    # -- stored -------------------------------------------------------------------------------------------------------

    def row(self, session: Session) -> CeremonyRow:
        return session.get_one(CeremonyRow, self.plan.ceremony_id)

    def move(self, session: Session, step: Step) -> CeremonyRow:
        """Go on to a step that the table allows; one that it is past stays past, for whoever walks through it again.

        Raises :class:`OvertakenError` when it was ended in the meantime, or can no longer be cancelled.
        """
        row = self.row(session)
        here = Step(row.step)
        allowed = POSITIONS[self.plan.kind].get(here, frozenset())
        order = [*POSITIONS[self.plan.kind], Step.DONE]
        if here in order and step in order and order.index(step) <= order.index(here):
            return row
        if step not in allowed:
            raise OvertakenError(
                Reason.STATE,
                f"ceremony {self.plan.ceremony_id} cannot go on to {step}",
                expected=" or ".join(sorted(allowed)) or "nothing: it is over",
                actual=f"{step}, from {here}",
            )
        row.step = step
        row.waiting = ""
        row.updated_at = int(self.clock())
        return row

    async def enter(self, step: Step, *, present: Iterable[str] = (), certificate: bytes | None = None) -> None:
        """Persist the move to ``step``, and what was settled with it."""

        def work(session: Session) -> None:
            row = self.move(session, step)
            row.present = " ".join(sorted(present)) or row.present
            if certificate is not None:
                row.certificate = certificate

        await self.write(work)

    async def _waits_for(self, names: Iterable[str]) -> None:
        def work(session: Session) -> None:
            self.row(session).waiting = " ".join(sorted(names))

        await self.write(work)

    def enter_leaf(self, session: Session, certificate_sha256: str, reason: str = "") -> None:
        """What the ledger shows of the ceremony's end, in the transaction that makes it."""
        leaf = Ceremony(
            ceremony_id=self.plan.ceremony_id,
            kind=str(self.plan.kind),
            key_id=self.plan.key_id,
            epoch=self.plan.epoch,
            plan_sha256=self.plan.digest,
            roster_sha256=self.plan.roster_digest,
            certificate_sha256=certificate_sha256,
            reason=reason,
            time=int(self.clock()),
        )
        enter(session, leaf, self.plan.ceremony_id)

    def _load(self, session: Session) -> None:
        """What an earlier drive left."""
        row = self.row(session)
        self.certificate = row.certificate or b""
        self.settled = tuple(row.present.split())
        query = select(CeremonyAnswerRow).where(CeremonyAnswerRow.ceremony_id == self.plan.ceremony_id)
        for each in session.scalars(query):
            self._stored.setdefault(Step(each.step), {})[each.custodian] = each.answer

    def _save_answers(self, session: Session, answers: Mapping[tuple[Step, str], bytes]) -> None:
        mine = CeremonyAnswerRow.ceremony_id == self.plan.ceremony_id
        for step in {step for step, _ in answers}:  # another coordinator may have stored some
            given = {custodian: data for (at, custodian), data in answers.items() if at is step}
            at_step = (mine, CeremonyAnswerRow.step == step, CeremonyAnswerRow.custodian.in_(given))
            session.execute(delete(CeremonyAnswerRow).where(*at_step))
            session.execute(
                insert(CeremonyAnswerRow),
                [
                    {"ceremony_id": self.plan.ceremony_id, "step": step, "custodian": custodian, "answer": data}
                    for custodian, data in given.items()
                ],
            )


def _silent(custodian: str, seconds: float) -> UnavailableError:
    return UnavailableError(
        Reason.TIMEOUT,
        f"{custodian} has said nothing for {seconds:.1f} s, and the others' answers are enough",
        next_step="See whether it hangs; what it missed can be repaired",
    )


@contextlib.contextmanager
def blaming(step: Step, custodian: str) -> Iterator[None]:
    """An error inside is that custodian's."""
    try:
        yield
    except KeyquorumError as error:
        raise stopped(step, {custodian: error}) from None


def stopped(step: Step, errors: Mapping[str, KeyquorumError]) -> KeyquorumError:
    """One error for a step: kind and reason of the worst custodian's, and everybody's cause."""
    names = sorted(errors)
    first = min((errors[name] for name in names), key=_says_little)
    causes = "; ".join(f"{name}: {errors[name].reason}: {errors[name].message}" for name in names)
    return type(first)(
        first.reason,
        f"the ceremony stopped at {step}: {causes}",
        expected=first.expected or None,
        actual=first.actual or None,
        next_step=first.next_step or "Clear the cause, then run a new ceremony",
        details={**first.details, "step": str(step), "custodian": ",".join(names), "cause": causes},
    )


def _says_little(error: KeyquorumError) -> tuple[bool, bool]:
    """Who is out of reach says less than who waits for its operator, and that one less than who has another reason."""
    return isinstance(error, UnavailableError), error.reason is Reason.APPROVAL


async def _attempts(link: Link, call: Call, patience: float) -> Message:
    started = time.monotonic()
    for pause in (*_RETRIES, None):
        try:
            return await call(link)
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure, link.id)
        except UnavailableError as failure:
            error = failure
        if pause is None or not isinstance(error, UnavailableError) or time.monotonic() - started > patience:
            raise error
        await asyncio.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def parse(step: Step, kind: type[M], answers: Mapping[str, bytes]) -> dict[str, M]:
    """Stored answers as messages."""
    out: dict[str, M] = {}
    for name, data in answers.items():
        message = kind()
        try:
            message.ParseFromString(data)
        except DecodeError:
            raise KeyquorumError(Reason.INTERNAL, f"a stored answer of {name} at {step} cannot be read") from None
        out[name] = message
    return out
