"""The table of job states, and the job store driven at random against a model of it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sqlalchemy import select

from keyquorum_coordinator import migrations
from keyquorum_coordinator.database import Database, OutboxRow, make_engine
from keyquorum_coordinator.job_states import (
    FINAL,
    HELD,
    MAX_ATTEMPTS,
    MOVES,
    WAITING,
    JobState,
    after_silence,
    check_move,
    is_legal,
)
from keyquorum_coordinator.jobs import Job, JobStore
from keyquorum_core.errors import Reason, RefusedError, StateError
from tests.support.coordinator import new_job

JOB = "a" * 26
NOT_AFTER = 10_000
TIMEOUT = 30


def test_every_state_is_in_exactly_one_phase_and_has_its_moves() -> None:
    assert sorted(WAITING + HELD + FINAL) == sorted(JobState)
    assert set(MOVES) == set(JobState)


def test_nothing_leaves_a_final_state_and_every_other_can_be_cancelled() -> None:
    for state in JobState:
        assert (MOVES[state] == frozenset()) == (state in FINAL)
        assert (JobState.CANCELLED in MOVES[state]) == (state not in FINAL)


def test_a_final_state_can_be_reached_from_everywhere() -> None:
    for start in JobState:
        seen, todo = {start}, [start]
        while todo:
            todo += [state for state in MOVES[todo.pop()] if state not in seen and not seen.add(state)]  # type: ignore[func-returns-value]
        assert seen & set(FINAL)


def test_no_job_runs_before_its_bundle_is_there() -> None:
    assert not any(is_legal(JobState.SUBMITTED, state) for state in (JobState.READY, *HELD))
    assert not any(is_legal(JobState.OPENED, state) for state in HELD)


def test_an_illegal_move_says_what_would_have_been_legal() -> None:
    with pytest.raises(StateError) as caught:
        check_move(JOB, JobState.COMPLETED, JobState.READY)
    assert caught.value.reason is Reason.STATE
    assert caught.value.actual == "completed"


def test_silence_gives_a_job_back_until_attempts_or_time_are_used_up() -> None:
    assert [after_silence(n, False) for n in range(1, MAX_ATTEMPTS + 1)] == ["ready"] * (MAX_ATTEMPTS - 1) + ["failed"]
    assert after_silence(1, True) is JobState.EXPIRED


class JobStoreMachine(RuleBasedStateMachine):
    """Random calls, restarts between them, and time going by; the event log must be a legal walk through the table."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.now = 1000.0
        self.loop = asyncio.new_event_loop()
        engine = make_engine(f"sqlite:///{Path(self.folder.name) / 'jobs.db'}")
        migrations.upgrade(engine)
        self.database = Database(engine)
        self.restart()
        self.call(self.jobs.submit(new_job(JOB, not_after=NOT_AFTER)))

    def teardown(self) -> None:
        self.database.close()
        self.loop.close()
        self.folder.cleanup()

    def call(self, work: Any) -> Any:
        try:
            return self.loop.run_until_complete(work)
        except (StateError, RefusedError):  # the only kinds that say no
            return None

    def leaves(self) -> list[str]:
        """Types of the leaves that wait for the ledger."""
        query = select(OutboxRow.leaf).order_by(OutboxRow.number)
        found = self.loop.run_until_complete(self.database.read(lambda session: list(session.scalars(query))))
        return [json.loads(leaf)["type"] for leaf in found]

    def job(self) -> Job:
        job: Job = self.loop.run_until_complete(self.jobs.get(JOB))
        return job

    @rule()
    def restart(self) -> None:
        self.jobs = JobStore(self.database, clock=lambda: self.now, worker_timeout=TIMEOUT)

    @rule(seconds=st.sampled_from([1, 10, 29, 31, 400, 4000]))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def opened(self) -> None:
        self.call(self.jobs.opened(JOB))

    @rule(opening=st.sampled_from([b"one", b"two"]))
    def commit(self, opening: bytes) -> None:
        job = self.call(self.jobs.commit(JOB, opening))
        assert job is None or job.opening == opening

    @rule()
    def cancel(self) -> None:
        self.call(self.jobs.cancel(JOB, "no longer wanted"))

    @rule(worker=st.sampled_from(["w1", "w2"]), named=st.booleans())
    def claim(self, worker: str, named: bool) -> None:
        job = self.call(self.jobs.claim(worker, JOB if named else ""))
        assert job is None or (job.state is JobState.CLAIMED and job.worker == worker and job.attempts <= MAX_ATTEMPTS)

    @rule(
        worker=st.sampled_from(["w1", "w2"]),
        state=st.sampled_from(["attesting", "downloading", "running", "uploading"]),
    )
    def report(self, worker: str, state: str) -> None:
        before = self.job()
        proceed = self.call(self.jobs.report(JOB, worker, state, ""))
        assert proceed == (before.state in HELD and before.worker == worker)

    @rule(worker=st.sampled_from(["w1", "w2"]), state=st.sampled_from([JobState.COMPLETED, JobState.FAILED]))
    def finish(self, worker: str, state: JobState) -> None:
        before = self.job()
        job = self.call(self.jobs.finish(JOB, worker, state, b"statement", None))
        if before.state in HELD and before.worker == worker:
            assert job is not None
            assert job.state is state

    @rule()
    def sweep(self) -> None:
        before = self.job()
        for job in self.loop.run_until_complete(self.jobs.sweep()):
            assert is_legal(before.state, job.state)

    @invariant()
    def events_are_a_legal_walk_that_ends_in_the_present_state(self) -> None:
        events = self.loop.run_until_complete(self.jobs.events(JOB, 0))
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        states = [event.state for event in events]
        assert states[0] is JobState.SUBMITTED
        for before, after in itertools.pairwise(states):
            assert before == after or is_legal(before, after)
        job = self.job()
        assert states[-1] is job.state
        assert (job.state in HELD) <= bool(job.worker)
        assert job.attempts <= MAX_ATTEMPTS
        assert self.leaves() == ["job.submitted"] + ["result"] * (job.state in FINAL)
        assert (job.state in (JobState.READY, *HELD)) <= bool(job.opening)


TestJobStore = JobStoreMachine.TestCase
TestJobStore.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[JobStore]:
    """A job that worker w1 holds."""
    engine = make_engine(f"sqlite:///{tmp_path / 'c.db'}")
    migrations.upgrade(engine)
    database = Database(engine)
    jobs = JobStore(database, clock=lambda: 1000)
    await jobs.submit(new_job(JOB, not_after=NOT_AFTER))
    await jobs.commit(JOB, b"opening")
    await jobs.claim("w1")
    yield jobs
    database.close()


async def test_a_report_that_says_nothing_new_is_not_written_down(held: JobStore) -> None:
    for state, detail in (("running", "step 1"), ("running", "step 1"), ("running", "step 2"), ("running", "")):
        assert await held.report(JOB, "w1", state, detail)
    assert [event.detail for event in await held.events(JOB, 4)] == ["step 1", "step 2"]


async def test_a_talkative_worker_fills_no_table_and_still_finishes(
    held: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyquorum_coordinator.jobs.MAX_EVENTS_PER_ATTEMPT", 10)
    for number in range(30):
        assert await held.report(JOB, "w1", "running", f"step {number}")
    assert len(await held.events(JOB, 0)) == 10
    assert await held.report(JOB, "w1", "uploading", "moves are always written down")
    await held.finish(JOB, "w1", JobState.COMPLETED, b"statement", None)
    assert [event.state for event in await held.events(JOB, 10)] == [JobState.UPLOADING, JobState.COMPLETED]


async def test_only_the_holder_s_signs_of_life_keep_a_job(tmp_path: Path) -> None:
    now = 1000
    engine = make_engine(f"sqlite:///{tmp_path / 'c.db'}")
    migrations.upgrade(engine)
    database = Database(engine)
    jobs = JobStore(database, clock=lambda: now, worker_timeout=TIMEOUT)
    await jobs.submit(new_job(JOB, not_after=NOT_AFTER))
    await jobs.commit(JOB, b"opening")
    await jobs.claim("w1")
    now += TIMEOUT + 5
    jobs.touch(JOB, "w1")
    assert await jobs.sweep() == []
    now += TIMEOUT + 5
    jobs.touch(JOB, "w2")
    assert [job.state for job in await jobs.sweep()] == [JobState.READY]
    database.close()


async def test_nothing_is_kept_for_those_who_stopped_waiting(held: JobStore) -> None:
    waiting = [held.changes(JOB), held.changes("")]
    assert held.changes(JOB) is waiting[0]
    await held.finish(JOB, "w1", JobState.COMPLETED, b"statement", None)
    assert waiting[0].is_set()
    for job_id in (JOB, "no such job"):
        held.changes(job_id)
    waiting.clear()
    assert len(held._changes) == 0
