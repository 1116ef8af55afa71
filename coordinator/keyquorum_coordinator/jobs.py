"""The job table: every change is one transaction with the event that tells of it.

What was answered to an owner or a worker is in the database before the answer leaves, so that a coordinator killed at
any moment goes on, after a restart, from what its callers know. Legal moves are in :mod:`job_states`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakValueDictionary

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import Database, EventRow, JobRow, QuarantineRow
from keyquorum_coordinator.job_states import (
    FINAL,
    HELD,
    MAX_ATTEMPTS,
    WAITING,
    JobState,
    after_silence,
    check_move,
    illegal,
    is_legal,
)
from keyquorum_coordinator.leaf_records import result_leaf
from keyquorum_coordinator.outbox import enter
from keyquorum_coordinator.stored_errors import dump_error, load_error
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.ledger.leaves import JobSubmitted

__all__ = ["Job", "JobEvent", "JobStore", "NewJob", "quarantine_of"]

MAX_EVENTS_PER_READ = 200
MAX_DETAIL = 1024
MAX_EVENTS_PER_ATTEMPT = 1000
"""Above this many events for each attempt so far, reports are signs of life only; moves are always written down."""
# A worker's reports go through these; "downloading" is part of attesting's end, and shown as its detail.
_REPORTED = {
    "attesting": JobState.ATTESTING,
    "downloading": JobState.ATTESTING,
    "running": JobState.RUNNING,
    "uploading": JobState.UPLOADING,
}


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a checked manifest says, and the leaf that tells of it. ``not_after`` is unix seconds."""

    job_id: str
    owner: str
    owner_fingerprint: str
    key_id: str
    epoch: int
    manifest: bytes
    not_after: int
    leaf: JobSubmitted


@dataclass(frozen=True, slots=True)
class Job:
    """One job as stored; times are unix seconds, envelopes are exact bytes and empty where there is none yet."""

    job_id: str
    owner: str
    key_id: str
    epoch: int
    state: JobState
    manifest: bytes
    opening: bytes
    statement: bytes
    error: KeyquorumError | None
    worker: str
    attempts: int
    created_at: int
    updated_at: int


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Sequence numbers of a job run 1, 2, … without gaps."""

    sequence: int
    time: int
    state: JobState
    detail: str
    error: KeyquorumError | None


class JobStore:
    """``worker_timeout``: seconds without a sign of life after which a worker loses its job. ``on_leaf`` hears when a
    job's end was put into the outbox."""

    def __init__(
        self,
        database: Database,
        *,
        clock: Callable[[], float] = time.time,
        worker_timeout: int = 30,
        max_open_jobs_per_owner: int = 256,
        on_leaf: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._clock = clock
        self._timeout = worker_timeout
        self._max_open = max_open_jobs_per_owner
        self._on_leaf = on_leaf
        # While this process was down no worker could be heard, so silence counts from here at the earliest.
        self._started = clock()
        self._seen: dict[tuple[str, str], float] = {}  # by job and worker: only its holder's signs of life count
        # Weak: an event is gone with the last one who waits for it, also of a job that never changes again.
        self._changes: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()

    # -- reading ------------------------------------------------------------------------------------------------------

    async def get(self, job_id: str) -> Job:
        """Raises :class:`StateError` (``NOT_FOUND``)."""
        return await self._database.read(lambda session: _job(_row(session, job_id)))

    async def of_owner(self, owner: str, limit: int) -> list[Job]:
        """The owner's jobs, newest first."""
        query = select(JobRow).where(JobRow.owner == owner).order_by(JobRow.created_at.desc(), JobRow.job_id)
        return await self._database.read(lambda session: [_job(row) for row in session.scalars(query.limit(limit))])

    async def events(self, job_id: str, after: int) -> list[JobEvent]:
        """Events with a sequence number above ``after``, in order, a bounded number at a time."""
        query = (
            select(EventRow)
            .where(EventRow.job_id == job_id, EventRow.sequence > after)
            .order_by(EventRow.sequence)
            .limit(MAX_EVENTS_PER_READ)
        )
        return await self._database.read(lambda session: [_event(row) for row in session.scalars(query)])

    def changes(self, job_id: str) -> asyncio.Event:
        """Set at the next change of the job (``""``: at the next job that gets ready). Take it, read, then wait for it:
        no change falls in between."""
        return self._changes.setdefault(job_id, asyncio.Event())

    def count_by_state(self, session: Session) -> dict[str, int]:
        rows = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state))
        return {state: count for state, count in rows}  # noqa: C416 - rows are not tuples to the type checker

    # -- the owner ----------------------------------------------------------------------------------------------------

    async def submit(self, new: NewJob, may: Callable[[Session], None] = lambda session: None) -> Job:
        """Store a job; the same one again is returned as it stands. ``may`` is asked in the transaction, and raises for
        a job that may not be. Raises :class:`RefusedError` (``QUOTA``)."""
        now = self._now()

        def work(session: Session) -> Job:
            row = session.get(JobRow, new.job_id)
            if row is not None:
                return _job(row)
            may(session)
            still_open = session.scalar(
                select(func.count()).where(JobRow.owner == new.owner, JobRow.state.not_in(FINAL))
            )
            if still_open is not None and still_open >= self._max_open:
                raise RefusedError(
                    Reason.QUOTA,
                    f"owner {new.owner} has too many unfinished jobs",
                    expected=f"at most {self._max_open}",
                    actual=still_open,
                    next_step="Wait for jobs to end, or cancel some",
                )
            row = JobRow(
                job_id=new.job_id,
                owner=new.owner,
                key_id=new.key_id,
                epoch=new.epoch,
                state=JobState.SUBMITTED,
                manifest=new.manifest,
                attempts=0,
                created_at=now,
                updated_at=now,
                not_after=new.not_after,
                last_event=0,
            )
            session.add(row)
            session.flush()
            _append(session, row, now, "", None)
            enter(session, new.leaf, new.job_id)
            return _job(row)

        return await self._changed(new.job_id, work)

    async def opened(self, job_id: str) -> Job:
        """A quorum has answered the owner. Opening again later, to read the result, changes nothing."""

        def work(session: Session) -> Job:
            row = _row(session, job_id)
            if row.state == JobState.SUBMITTED:
                _move(session, row, JobState.OPENED, self._now())
            return _job(row)

        return await self._changed(job_id, work)

    async def commit(self, job_id: str, opening: bytes) -> Job:
        """The checked opening makes the job ready. Idempotent; another opening is refused (``EXISTS``)."""
        now = self._now()

        def work(session: Session) -> Job:
            row = _row(session, job_id)
            state = JobState(row.state)
            if row.opening is not None:
                if row.opening == opening:
                    return _job(row)
                raise StateError(Reason.EXISTS, f"job {job_id} has an opening already", actual=f"state {state}")
            if row.not_after <= now and is_legal(state, JobState.EXPIRED):
                raise _expired(row, now)
            if state is JobState.SUBMITTED:  # killed between the last answer and its record: the owner has the key
                _move(session, row, JobState.OPENED, now)
            row.opening = opening
            row.ready_at = now
            _move(session, row, JobState.READY, now)
            return _job(row)

        return await self._changed(job_id, work)

    async def cancel(self, job_id: str, why: str) -> Job:
        """Raises :class:`StateError` (``STATE``) for a job that ended otherwise."""

        def work(session: Session) -> Job:
            row = _row(session, job_id)
            if row.state != JobState.CANCELLED:
                _move(session, row, JobState.CANCELLED, self._now(), why)
            return _job(row)

        return await self._changed(job_id, work)

    # -- the worker ---------------------------------------------------------------------------------------------------

    async def claim(self, worker: str, job_id: str = "") -> Job | None:
        """The job the worker holds already, or ``job_id``, or the one that waited longest; None when there is none yet.

        A worker that claims again a job it had gone on with was restarted: that is a new attempt. Raises
        :class:`StateError` for a ``job_id`` that is not there, has ended, or is another worker's; :class:`RefusedError`
        (``QUARANTINED``).
        """
        now = self._now()

        def work(session: Session) -> Job | None:
            shut_out = quarantine_of(session, worker)
            if shut_out is not None:
                raise RefusedError(
                    Reason.QUARANTINED,
                    f"worker {worker} is in quarantine and gets no jobs",
                    expected="a worker whose attestation never failed, or a quarantine that was lifted",
                    actual=f"entry {shut_out.number}: {shut_out.reason}",
                    next_step="Have the coordinator's operator look into it: `keyquorum-coordinator worker list`",
                )
            for row in session.scalars(
                select(JobRow).where(JobRow.worker == worker, JobRow.state.in_(HELD)).order_by(JobRow.job_id)
            ):
                if job_id in ("", row.job_id) and self._claim_again(session, row, now):
                    return _job(row)
            if job_id:
                row = _row(session, job_id)
                if row.state in FINAL or row.state in HELD:
                    raise illegal(job_id, JobState(row.state), [JobState.READY], "be claimed")
                wanted: JobRow | None = row if row.state == JobState.READY else None
            else:
                wanted = session.scalars(
                    select(JobRow)
                    .where(JobRow.state == JobState.READY, JobRow.not_after > now)
                    .order_by(JobRow.ready_at, JobRow.job_id)
                    .limit(1)
                    .with_for_update(skip_locked=True)
                ).first()
            if wanted is None:
                return None
            if wanted.not_after <= now:
                raise _expired(wanted, now)
            wanted.worker = worker
            wanted.attempts += 1
            wanted.heartbeat_at = now
            _move(session, wanted, JobState.CLAIMED, now, f"by {worker}, attempt {wanted.attempts} of {MAX_ATTEMPTS}")
            return _job(wanted)

        job = await self._database.write(work)
        self._on_leaf()  # a job that it held before may have failed
        if job is not None:
            self.touch(job.job_id, worker)
            self._notify(job.job_id)
        return job

    def _claim_again(self, session: Session, row: JobRow, now: int) -> bool:
        """Whether the worker goes on with the job; otherwise its attempts are used up and it has failed."""
        row.heartbeat_at = now
        if row.state == JobState.CLAIMED:
            return True
        if row.attempts >= MAX_ATTEMPTS:
            _move(session, row, JobState.FAILED, now, "", _gave_up(row, "was restarted"))
            return False
        row.attempts += 1
        _move(session, row, JobState.CLAIMED, now, f"by {row.worker} again, attempt {row.attempts} of {MAX_ATTEMPTS}")
        return True

    async def held(self, job_id: str, worker: str) -> Job:
        """The job, if this worker holds it; a sign of life. Raises :class:`RefusedError` (``ROLE``)."""
        job = await self.get(job_id)
        if job.worker != worker or job.state not in HELD:
            raise _not_held(job_id, job.state, job.worker, worker)
        self.touch(job_id, worker)
        return job

    def touch(self, job_id: str, worker: str) -> None:
        """This worker gave a sign of life about the job; it counts if the worker holds the job."""
        self._seen[job_id, worker] = self._clock()

    # -- artifacts ----------------------------------------------------------------------------------------------------

    def check_bundle_write(self, session: Session, job_id: str) -> None:
        """Inside a transaction: the bundle may still change. Raises :class:`StateError` (``STATE``)."""
        state = JobState(_row(session, job_id).state)
        if state not in (JobState.SUBMITTED, JobState.OPENED):
            raise illegal(job_id, state, (JobState.SUBMITTED, JobState.OPENED), "take another bundle")

    def check_output_write(self, session: Session, job_id: str, worker: str) -> None:
        """Inside a transaction: this worker holds the job, so that its output may change. Raises
        :class:`RefusedError` (``ROLE``)."""
        row = _row(session, job_id)
        if row.worker != worker or row.state not in HELD:
            raise _not_held(job_id, JobState(row.state), row.worker or "", worker)

    # -- reports ------------------------------------------------------------------------------------------------------

    async def report(self, job_id: str, worker: str, state: str, detail: str) -> bool:
        """Whether the worker is to go on. News of a step behind the job's is a sign of life and nothing more."""
        reported = _REPORTED.get(state)
        if reported is None:
            raise StateError(
                Reason.STATE, "not a state that a worker reports", expected=", ".join(_REPORTED), actual=state[:32]
            )
        now = self._now()
        text = detail if reported == state else f"{state}: {detail}" if detail else state

        def work(session: Session) -> tuple[bool, bool]:
            row = _row(session, job_id)
            if row.worker != worker or row.state not in HELD:
                return False, False
            row.heartbeat_at = now
            current = JobState(row.state)
            if is_legal(current, reported):
                _move(session, row, reported, now, text)
                return True, True
            if current == reported and text and _is_news(session, row, text):
                _append(session, row, now, text, None)
                return True, True
            return True, False

        proceed, changed = await self._database.write(work)
        if proceed:
            self.touch(job_id, worker)
        if changed:
            self._notify(job_id)
        return proceed

    async def finish(
        self, job_id: str, worker: str, state: JobState, statement: bytes, error: KeyquorumError | None
    ) -> Job:
        """End the job with the worker's checked statement, or with the error it gave up with. Idempotent."""
        now = self._now()

        def work(session: Session) -> Job:
            row = _row(session, job_id)
            if row.worker == worker and row.state == state and (row.statement or b"") == statement:
                return _job(row)
            if row.worker != worker or row.state not in HELD:
                raise _not_held(job_id, JobState(row.state), row.worker or "", worker)
            row.statement = statement or None
            _move(session, row, state, now, "", error)
            return _job(row)

        return await self._changed(job_id, work)

    # -- time ---------------------------------------------------------------------------------------------------------

    async def sweep(self) -> list[Job]:
        """Take jobs from silent workers and expire those whose time is over; returns the jobs that changed."""
        now = self._now()
        silent_since = now - self._timeout
        self._seen = {each: at for each, at in self._seen.items() if at > silent_since}
        if self._started > silent_since:
            silent_since = -1

        seen = frozenset(self._seen)

        def work(session: Session) -> list[Job]:
            out = []
            for row in session.scalars(select(JobRow).where(JobRow.state.in_(WAITING), JobRow.not_after <= now)):
                _move(session, row, JobState.EXPIRED, now, "", _expired(row, now))
                out.append(_job(row))
            query = select(JobRow).where(JobRow.state.in_(HELD), JobRow.heartbeat_at < silent_since)
            for row in session.scalars(query):
                if (row.job_id, row.worker) in seen:
                    continue
                self._take_away(session, row, now)
                out.append(_job(row))
            return out

        if not await self._database.read(lambda session: self._anything_due(session, now, silent_since)):
            return []
        changed = await self._database.write(work)
        self.heard(changed)
        return changed

    def _anything_due(self, session: Session, now: int, silent_since: int) -> bool:
        waiting = (JobRow.state.in_(WAITING)) & (JobRow.not_after <= now)
        silent = (JobRow.state.in_(HELD)) & (JobRow.heartbeat_at < silent_since)
        return session.scalar(select(JobRow.job_id).where(waiting | silent).limit(1)) is not None

    def _take_away(self, session: Session, row: JobRow, now: int) -> None:
        worker = row.worker
        to = after_silence(row.attempts, row.not_after <= now)
        if to is JobState.READY:
            row.worker = None
            row.heartbeat_at = None
            detail = f"worker {worker} fell silent for {self._timeout} s; attempt {row.attempts} of {MAX_ATTEMPTS} lost"
            _move(session, row, to, now, detail)
        else:
            error = _expired(row, now) if to is JobState.EXPIRED else _gave_up(row, "fell silent")
            _move(session, row, to, now, "", error)

    @staticmethod
    def take_all(session: Session, worker: str, why: KeyquorumError, now: int) -> list[Job]:
        """Inside a transaction: the worker loses every job that it holds, to the queue if it may be tried again."""
        held = session.scalars(select(JobRow).where(JobRow.worker == worker, JobRow.state.in_(HELD)))
        out = []
        for row in held:
            to = after_silence(row.attempts, row.not_after <= now)
            if to is JobState.READY:
                row.worker = None
                row.heartbeat_at = None
            _move(session, row, to, now, why.message, why if to is JobState.FAILED else None)
            out.append(_job(row))
        return out

    @staticmethod
    def end_all(session: Session, why_of: Callable[[str, bytes], KeyquorumError | None], now: int) -> list[Job]:
        """Inside a transaction: cancel the jobs that have not ended and for which ``why_of``, of a job's id and
        manifest, says why."""
        out = []
        for row in session.scalars(select(JobRow).where(JobRow.state.not_in(FINAL))):
            why = why_of(row.job_id, row.manifest)
            if why is not None:
                _move(session, row, JobState.CANCELLED, now, why.message, why)
                out.append(_job(row))
        return out

    def heard(self, changed: Iterable[Job]) -> None:
        """Wake those who wait for these jobs, which changed in somebody else's transaction."""
        for job in changed:
            self._notify(job.job_id)
            if job.state is JobState.READY:
                self._notify("")
        self._on_leaf()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _now(self) -> int:
        return int(self._clock())

    async def _changed(self, job_id: str, work: Callable[[Session], Job]) -> Job:
        job = await self._database.write(work)
        self._notify(job_id)
        if job.state is JobState.READY:
            self._notify("")
        if job.state in FINAL:
            self._seen.pop((job_id, job.worker), None)
            self._on_leaf()
        return job

    def _notify(self, job_id: str) -> None:
        waiting = self._changes.pop(job_id, None)
        if waiting is not None:
            waiting.set()


def quarantine_of(session: Session, worker: str) -> QuarantineRow | None:
    """The entry in force about a worker."""
    in_force = (QuarantineRow.worker == worker) & QuarantineRow.lifted_at.is_(None)
    return session.scalars(select(QuarantineRow).where(in_force).limit(1)).first()


def _row(session: Session, job_id: str) -> JobRow:
    row = session.get(JobRow, job_id)
    if row is None:
        raise StateError(Reason.NOT_FOUND, "no such job", actual=job_id[:26])
    return row


def _move(
    session: Session, row: JobRow, to: JobState, now: int, detail: str = "", error: KeyquorumError | None = None
) -> None:
    check_move(row.job_id, JobState(row.state), to)
    row.state = to
    row.updated_at = now
    if error is not None:
        row.error = dump_error(error)
    _append(session, row, now, detail, error)
    if to in FINAL:
        enter(session, result_leaf(session, row, now, error), row.job_id)


def _is_news(session: Session, row: JobRow, detail: str) -> bool:
    """A report is written down when it says something new, and while its attempts have not said too much."""
    if row.last_event >= MAX_EVENTS_PER_ATTEMPT * row.attempts:
        return False
    last = session.get(EventRow, (row.job_id, row.last_event))
    return last is None or (last.state, last.detail) != (row.state, detail[:MAX_DETAIL])


def _append(session: Session, row: JobRow, now: int, detail: str, error: KeyquorumError | None) -> None:
    row.last_event += 1
    session.add(
        EventRow(
            job_id=row.job_id,
            sequence=row.last_event,
            time=now,
            state=row.state,
            detail=detail[:MAX_DETAIL],
            error=dump_error(error),
        )
    )


def _job(row: JobRow) -> Job:
    return Job(
        job_id=row.job_id,
        owner=row.owner,
        key_id=row.key_id,
        epoch=row.epoch,
        state=JobState(row.state),
        manifest=row.manifest,
        opening=row.opening or b"",
        statement=row.statement or b"",
        error=load_error(row.error),
        worker=row.worker or "",
        attempts=row.attempts,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def _event(row: EventRow) -> JobEvent:
    return JobEvent(row.sequence, row.time, JobState(row.state), row.detail, load_error(row.error))


def _expired(row: JobRow, now: int) -> RefusedError:
    return RefusedError(
        Reason.EXPIRED,
        f"the time window of job {row.job_id} ended",
        expected=f"before {row.not_after}",
        actual=now,
        next_step="Submit the job again with a new time window",
    )


def _gave_up(row: JobRow, what: str) -> UnavailableError:
    return UnavailableError(
        Reason.JOB_FAILED,
        f"worker {row.worker} {what} and the attempts are used up",
        expected=f"at most {MAX_ATTEMPTS} attempts",
        actual=row.attempts,
        next_step="Look at the workers' logs, then submit the job again",
    )


def _not_held(job_id: str, state: JobState, holder: str, worker: str) -> RefusedError:
    return RefusedError(
        Reason.ROLE,
        f"worker {worker} does not hold job {job_id}",
        expected="the worker that claimed it and still has it",
        actual=f"{state}, {'held by ' + holder if holder and state in HELD else 'held by nobody'}",
        next_step="Stop, wipe what belongs to the job, and claim again",
    )
