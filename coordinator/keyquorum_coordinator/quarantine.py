"""Workers that get no more jobs, since custodians found that they are not any more what they were.

Custodians decide for themselves whom they quarantine (docs/spec/release.md, Leases), and say so in their refusals. The
coordinator believes it when so many say it that the rest are no quorum: fewer could take any worker out of service.
Then, in one transaction, the worker is entered here, loses the jobs it holds, and an alarm is on its way into the
ledger. An entry ends only when an operator lifts it. One made by hand does the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Final

import structlog
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import Database, QuarantineRow
from keyquorum_coordinator.fanout import Arrival
from keyquorum_coordinator.jobs import Job, JobStore, quarantine_of
from keyquorum_coordinator.outbox import enter
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError
from keyquorum_core.ledger.leaves import NOTHING, Alarm
from keyquorum_core.quorum import Quorum
from keyquorum_core.revocations import Revocation
from keyquorum_protos.wire.errors import from_status

__all__ = ["ALARM", "Quarantined", "Verdicts", "WorkerQuarantine", "entries", "let_out", "lift", "withdraw"]

ALARM: Final = "worker-quarantined"
_MAX_TEXT: Final = 400
_log = structlog.get_logger("quarantine")


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An entry. Times are unix seconds; ``lifted_at`` is 0 while it is in force. One without ``custodians`` was made by
    hand, or follows from the revocation that ``revoked`` names (target and subject)."""

    number: int
    worker: str
    reason: str
    message: str
    job_id: str
    evidence_sha256: str
    custodians: tuple[str, ...]
    raised_at: int
    lifted_at: int
    why: str
    revoked: str


class Verdicts:
    """What custodians say of one worker's evidence."""

    def __init__(self, job: Job, evidence: bytes) -> None:
        self.job = job
        self.evidence = evidence
        self.against: dict[str, KeyquorumError] = {}

    def hear(self, arrival: Arrival) -> None:
        if arrival.answer.HasField("refusal"):
            error = from_status(arrival.answer.refusal)
            if error.reason is Reason.QUARANTINED or "quarantine" in error.details:
                self.against[arrival.custodian] = error


class WorkerQuarantine:
    """The coordinator's entries. ``on_entry`` hears of each new one, ``on_leaf`` that its alarm is in the outbox."""

    def __init__(
        self,
        database: Database,
        jobs: JobStore,
        quorum: Quorum,
        *,
        clock: Callable[[], float] = time.time,
        on_entry: Callable[[], None] = lambda: None,
        on_leaf: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._quorum = quorum
        self._clock = clock
        self._on_entry = on_entry
        self._on_leaf = on_leaf
        self._tasks: set[asyncio.Task[None]] = set()

    def judge(self, verdicts: Verdicts) -> None:
        """All answers that come have come: quarantine the worker, in the background, if custodians say so."""
        rest = [each for each in self._quorum.ids if each not in verdicts.against]
        if verdicts.against and not self._quorum.is_qualified(rest):
            task = asyncio.create_task(self._believe(verdicts))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def settled(self) -> None:
        """Wait for what is being entered."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def put(
        self,
        worker: str,
        reason: Reason,
        message: str,
        *,
        job_id: str = "",
        evidence_sha256: str = NOTHING,
        custodians: tuple[str, ...] = (),
    ) -> None:
        """No more jobs for this worker; those it holds go to others, or have failed. Once for as long as it is in
        force. Raises ``STORAGE``."""
        now = int(self._clock())

        def work(session: Session) -> list[Job] | None:
            return _put(session, worker, reason, message, job_id, evidence_sha256, custodians, now)

        taken = await self._database.write(work)
        if taken is None:
            return
        _log.error("worker.quarantined", worker=worker, reason=str(reason), message=message, custodians=custodians)
        self._on_entry()
        self._on_leaf()
        self._jobs.heard(taken)

    async def _believe(self, verdicts: Verdicts) -> None:
        first = verdicts.against[min(verdicts.against)]
        try:
            await self.put(
                verdicts.job.worker,
                first.reason,
                first.message,
                job_id=verdicts.job.job_id,
                evidence_sha256=hashlib.sha256(verdicts.evidence).hexdigest(),
                custodians=tuple(sorted(verdicts.against)),
            )
        except KeyquorumError as error:  # custodians refuse the worker in any case
            _log.error("worker.not_quarantined", worker=verdicts.job.worker, reason=str(error.reason))


def _put(
    session: Session,
    worker: str,
    reason: Reason,
    message: str,
    job_id: str,
    evidence_sha256: str,
    custodians: tuple[str, ...],
    now: int,
) -> list[Job] | None:
    """None: it is in quarantine already."""
    if quarantine_of(session, worker) is not None:
        return None
    row = QuarantineRow(
        worker=worker,
        reason=str(reason),
        message=message[:_MAX_TEXT],
        job_id=job_id,
        evidence_sha256=evidence_sha256,
        custodians=",".join(custodians),
        raised_at=now,
    )
    session.add(row)
    session.flush()
    why = RefusedError(
        Reason.QUARANTINED,
        f"worker {worker} was put in quarantine: {reason}: {message[:_MAX_TEXT]}",
        next_step="Another worker may take the job; operators look into this one",
        details={"worker": worker, "refused_with": str(reason)},
    )
    alarm = Alarm(alarm=ALARM, seat="coordinator", evidence_sha256=evidence_sha256, time=now)
    enter(session, alarm, ALARM, str(row.number))
    return JobStore.take_all(session, worker, why, now)


def withdraw(session: Session, worker: str, entry: Revocation, evidence_sha256: str, now: int) -> list[Job]:
    """Inside a transaction: the worker showed evidence of something that the operators revoked. It gets no jobs until
    they lift that; those it holds go to others, or have failed. The revocation itself is what the ledger shows."""
    if quarantine_of(session, worker) is not None:
        return []
    revoked = f"{entry.target} {entry.subject}"
    session.add(
        QuarantineRow(
            worker=worker,
            reason=str(Reason.REVOKED),
            message=f"the operators revoked its {entry.target}: {entry.reason}"[:_MAX_TEXT],
            job_id="",
            evidence_sha256=evidence_sha256,
            custodians="",
            raised_at=now,
            revoked=revoked,
        )
    )
    why = RefusedError(
        Reason.REVOKED,
        f"the operators revoked the {entry.target} of worker {worker}: {entry.reason}",
        next_step="Another worker may take the job",
        details={"worker": worker, "target": entry.target},
    )
    return JobStore.take_all(session, worker, why, now)


def let_out(session: Session, revoked: Set[str], version: int, now: int) -> None:
    """Inside a transaction: lift entries that follow from a revocation which ``version`` lists no longer."""
    rows = select(QuarantineRow).where(QuarantineRow.lifted_at.is_(None), QuarantineRow.revoked != "")
    for row in session.scalars(rows):
        if row.revoked not in revoked:
            row.lifted_at, row.why = now, f"lifted in version {version} of the revocations"


def entries(session: Session) -> list[Quarantined]:
    """All of them, lifted ones too, oldest first."""
    return [
        Quarantined(
            row.number,
            row.worker,
            row.reason,
            row.message,
            row.job_id,
            row.evidence_sha256,
            tuple(filter(None, row.custodians.split(","))),
            row.raised_at,
            row.lifted_at or 0,
            row.why or "",
            row.revoked,
        )
        for row in session.scalars(select(QuarantineRow).order_by(QuarantineRow.number))
    ]


def put_by_hand(session: Session, worker: str, why: str, now: int) -> None:
    """Inside a transaction: an operator takes a worker out of service. Raises ``MALFORMED``, ``EXISTS``."""
    _check_why(why)
    if _put(session, worker, Reason.QUARANTINED, why, "", NOTHING, (), now) is None:
        raise StateError(Reason.EXISTS, f"worker {worker[:256]} is in quarantine already")


def lift(session: Session, number: int, why: str, now: int) -> None:
    """Inside a transaction: the worker may claim jobs again. Raises ``MALFORMED`` without a reason, ``NOT_FOUND``."""
    _check_why(why)
    in_force = (QuarantineRow.number == number) & QuarantineRow.lifted_at.is_(None)
    if session.scalar(select(QuarantineRow.number).where(in_force)) is None:
        raise StateError(Reason.NOT_FOUND, "there is no such quarantine entry in force", actual=number)
    session.execute(update(QuarantineRow).where(in_force).values(lifted_at=now, why=why))


def _check_why(why: str) -> None:
    if not 1 <= len(why.strip()) <= _MAX_TEXT or not why.isprintable():
        raise MalformedError(
            Reason.MALFORMED,
            "a quarantine is made and lifted with a reason",
            expected=f"1…{_MAX_TEXT} printable characters",
            actual=f"{len(why)} characters",
        )
