"""The worker's lease: a deadline that nobody can move but a quorum, and the task that renews it (G5)."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.release import LeaseTerms
from keyquorum_gpu_worker.lease import Grant, Lease, Stop, boottime, keep

TERMS = LeaseTerms(60, 20)


class Clock:
    """Goes on by a step whenever it is read, so that nothing waits for real time."""

    def __init__(self, step: float = 0.0) -> None:
        self.now = 1000.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_g5_the_lease_ends_at_its_deadline_and_stays_over() -> None:
    clock = Clock()
    lease = Lease(Grant(clock.now, TERMS), clock)
    seen = []
    for step in (59.9, 0.1, -3600.0):
        clock.now += step
        seen.append(lease.over)
    assert seen == [False, True, True]


def test_what_comes_after_the_deadline_changes_nothing() -> None:
    clock = Clock()
    lease = Lease(Grant(clock.now, TERMS), clock)
    clock.now += 60
    lease.renew(Grant(clock.now, TERMS))
    clock.now -= 3600
    assert lease.over
    assert lease.renewals == 0
    why = lease.why
    assert why is not None
    assert why.reason is Reason.LEASE


def test_the_wall_clock_set_back_buys_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = boottime()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    lease = Lease(Grant(before - 61, TERMS))
    assert lease.over
    assert boottime() >= before
    monotonic = time.clock_gettime(time.CLOCK_MONOTONIC)
    assert boottime() >= monotonic  # it counts suspensions too


def test_an_answer_kept_back_gives_no_time() -> None:
    """A renewal counts from when its challenge was asked for, however late the answers come."""
    clock = Clock()
    lease = Lease(Grant(clock.now, TERMS), clock)
    asked_at = clock.now + 10
    clock.now += 55
    lease.renew(Grant(asked_at, TERMS))
    assert lease.left == 15


def test_an_older_or_shorter_grant_never_takes_time_away_or_adds_any() -> None:
    clock = Clock()
    lease = Lease(Grant(clock.now, TERMS), clock)
    lease.renew(Grant(clock.now - 5, TERMS))
    assert (lease.left, lease.renewals) == (60, 0)


@given(seconds=st.integers(5, 7 * 86400), share=st.floats(0, 1), jitter=st.floats(0.75, 0.95))
def test_a_worker_attests_anew_by_the_policy_and_with_time_to_spare(seconds: int, share: float, jitter: float) -> None:
    terms = LeaseTerms(seconds, max(1, int(seconds * share)))
    grant = Grant(0.0, terms)
    at = grant.renew_at(jitter)
    assert 0 < at <= terms.reattest_seconds
    assert grant.until - at >= seconds / 3


def test_a_lease_that_is_over_stops_the_job_without_anybody_setting_the_event() -> None:
    clock = Clock()
    stop = Stop()
    assert not stop.is_set()
    stop.lease = Lease(Grant(clock.now, TERMS), clock)
    assert not stop.is_set()
    clock.now += 60
    assert stop.is_set()


async def kept(lease: Lease, clock: Clock, renew: Callable[[], object]) -> tuple[KeyquorumError, list[str]]:
    events: list[str] = []

    async def asked() -> Grant:
        made = renew()
        assert isinstance(made, Grant)
        return made

    async with asyncio.timeout(30):
        why = await keep(lease, asked, lambda event, values: events.append(event), clock=clock, jitter=lambda: 0.9)
    return why, events


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keyquorum_gpu_worker.lease._LOOK_SECONDS", 0.001)


@pytest.mark.usefixtures("quick")
async def test_it_is_renewed_again_and_again_and_ends_with_the_quorum() -> None:
    clock = Clock(0.5)
    lease = Lease(Grant(clock.now, TERMS), clock)
    asked: list[float] = []

    def renew() -> Grant:
        if len(asked) == 5:
            raise UnavailableError(Reason.NO_QUORUM, "nobody is there")
        asked.append(clock.now)
        return Grant(clock.now, TERMS)

    why, events = await kept(lease, clock, renew)
    assert why.reason is Reason.LEASE
    assert "lapsed" in why.message
    assert events.count("lease renewed") == 5 == lease.renewals
    assert events.count("the lease was not renewed") >= 3  # tried until the end
    assert all(later - earlier < TERMS.reattest_seconds + 5 for earlier, later in itertools.pairwise(asked))
    assert clock.now - asked[-1] >= TERMS.seconds


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("reason", [Reason.QUARANTINED, Reason.DEBUG_ENABLED, Reason.REVOKED, Reason.LEASE])
async def test_a_refusal_that_time_does_not_cure_ends_it_at_once(reason: Reason) -> None:
    clock = Clock(0.5)
    lease = Lease(Grant(clock.now, TERMS), clock)

    def renew() -> Grant:
        raise RefusedError(reason, "every custodian's answer was no")

    why, _ = await kept(lease, clock, renew)
    assert why.reason is Reason.LEASE
    assert why.details["refused_with"] == reason
    assert lease.left > 30


@pytest.mark.usefixtures("quick")
async def test_a_renewal_that_hangs_does_not_outlive_the_lease() -> None:
    clock = Clock(0.5)
    lease = Lease(Grant(clock.now, TERMS), clock)
    cancelled = asyncio.Event()

    async def hang() -> Grant:
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()
        raise AssertionError

    async with asyncio.timeout(30):
        why = await keep(lease, hang, lambda event, values: None, clock=clock)
    assert why.reason is Reason.LEASE
    assert cancelled.is_set()
