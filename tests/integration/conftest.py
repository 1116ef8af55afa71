"""A coordinator over mTLS with fake custodians behind it, and its callers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.coordinator import Caller, Owner, Running
from tests.support.fake_custodian import FakeCommittee

BUNDLE = os.urandom(300_000)


@pytest.fixture
async def committee() -> AsyncIterator[FakeCommittee]:
    committee = await FakeCommittee.start()
    yield committee
    await committee.stop()


@pytest.fixture
async def running(tmp_path: Path, committee: FakeCommittee) -> AsyncIterator[Running]:
    running = await Running.start(tmp_path / "coordinator", committee)
    yield running
    await running.stop()


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
async def alice(running: Running) -> Caller:
    return running.caller("owner", "alice")


@pytest.fixture
async def worker(running: Running) -> Caller:
    return running.caller("worker", "w1")
