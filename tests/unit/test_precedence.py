"""A ceremony's step waits for nothing where nobody asks for keys, and for a bounded time where many do."""

from __future__ import annotations

import asyncio

import pytest

from keyquorum_coordinator import precedence
from keyquorum_coordinator.precedence import Precedence


class Clock:
    """Time that passes only where something waits for it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def made(clock: Clock) -> Precedence:
    return Precedence(clock=clock.monotonic, sleep=clock.sleep)


async def step(of: Precedence, clock: Clock, seconds: float) -> None:
    async with of.step():
        clock.now += seconds


async def cancelled(of: Precedence, clock: Clock, seconds: float) -> None:
    async with of.step():
        clock.now += seconds
        raise asyncio.CancelledError


async def test_steps_follow_one_another_where_nobody_asks_for_a_key(clock: Clock) -> None:
    of = made(clock)
    for _ in range(4):
        await step(of, clock, 0.04)
    assert clock.slept == []


async def test_a_step_leaves_releases_as_long_as_the_one_before_it_took(clock: Clock) -> None:
    of = made(clock)
    with of.release():
        await step(of, clock, 0.04)
        await step(of, clock, 0.01)
    await step(of, clock, 0.02)  # a moment later, more are expected
    assert clock.slept == pytest.approx([0.0, 0.04, 0.01])
    clock.now += 1
    await step(of, clock, 0.02)
    assert len(clock.slept) == 3


async def test_however_long_a_step_took_and_however_many_releases_there_are_the_next_one_comes(clock: Clock) -> None:
    of = made(clock)
    with of.release(), of.release():
        await step(of, clock, 3600)  # somebody's operator was asleep
        await step(of, clock, 0.01)
    assert clock.slept == pytest.approx([0.0, precedence._LONGEST])


async def test_a_step_that_failed_counts_as_well(clock: Clock) -> None:
    of = made(clock)
    with of.release():
        with pytest.raises(asyncio.CancelledError):
            await cancelled(of, clock, 0.03)
        await step(of, clock, 0.01)
    assert clock.slept == pytest.approx([0.0, 0.03])
