"""A worker whose lease is not renewed: the job stops at the deadline, and plaintext and key are gone (G5).

The lease's clock is the test's, so that nothing here waits for a lease to run out by itself. The coordinator is real
gRPC over mTLS, and hostile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.release import LeaseTerms
from keyquorum_gpu_worker.config import load_config
from keyquorum_gpu_worker.ending import LAPSED, JobEnd
from keyquorum_gpu_worker.job import Surroundings, run_one
from keyquorum_gpu_worker.lease import boottime
from keyquorum_gpu_worker.worker import Worker
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.fake_worker_service import FakeCluster, FakeJob

WAITS = b"""
import os, pathlib, time
(pathlib.Path(os.environ["KEYQUORUM_OUTPUT"]) / "secret").write_text("plaintext")
print("working", flush=True)
end = pathlib.Path("go-on")
time.sleep(300)
"""
SHORT = b"""
import time
time.sleep(3)
print("done")
"""
LEASE = LeaseTerms(600, 300)


class Clock:
    """CLOCK_BOOTTIME, and what a test adds to it."""

    ahead = 0.0

    def __call__(self) -> float:
        return boottime() + self.ahead


class Scene:
    """One worker with one job."""

    def __init__(self, cluster: FakeCluster, folder: Path) -> None:
        self.cluster = cluster
        self.clock = Clock()
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.said: list[str] = []
        for custodian in cluster.custodians.values():
            custodian.lease = LEASE
        self.worker = Worker(load_config(cluster.worker_dir(folder / "worker", scratch=self.scratch)))

    async def run(self, job: FakeJob, **changes: Any) -> JobEnd:
        surroundings = Surroundings(
            link=self.worker._connect(),
            roster=self.worker._roster,
            sources=self.worker._sources,
            scratch=self.scratch,
            said=lambda event, values: self.said.append(event),
            lease_clock=self.clock,
            telling_seconds=5,
        )
        async with asyncio.timeout(120):
            return await run_one(replace(surroundings, **changes), self.cluster.claimed(job))

    def left(self) -> list[str]:
        return [path.name for path in self.scratch.iterdir()]

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not what():  # noqa: ASYNC110 - of another process, or of what it said
                await asyncio.sleep(0.02)

    async def close(self) -> None:
        await self.worker.close()


@contextlib.asynccontextmanager
async def scene(twin: type[FakeCluster], folder: Path) -> AsyncIterator[Scene]:
    cluster = twin()
    await cluster.start()
    made = Scene(cluster, folder)
    try:
        yield made
    finally:
        await made.close()
        await cluster.stop()


def lapsed(scene: Scene, job: FakeJob, end: JobEnd) -> None:
    """The job is over, nothing of it is left, and the coordinator was told why, after that."""
    assert (end.outcome, end.exit_code) == (LAPSED, 126)
    assert end.reason.startswith("LEASE: ")
    assert scene.left() == []
    assert job.statement == b""
    assert job.artifacts == {}
    assert job.error is not None
    assert job.error.reason is Reason.LEASE
    # It says so itself, signed with the key that its evidence binds, to the owner alone.
    chain, records = job.records()
    assert chain.complete
    assert chain.last is not None
    assert chain.last.reason == Reason.LEASE
    assert records[0].event == "key-released"
    assert records[-1].event == "wiped"


async def test_g5_a_job_longer_than_its_lease_is_renewed_with_new_evidence_and_ends_well(tmp_path: Path) -> None:
    async with scene(FakeCluster, tmp_path) as here:
        job = here.cluster.submit({"main.py": SHORT})
        run = asyncio.create_task(here.run(job))
        for renewals in (2, 3):
            await here.until(lambda: "job confined" in here.said)
            here.clock.ahead += 290
            await here.until(lambda count=renewals: len(job.evidence) >= count)  # type: ignore[misc]
        end = await run
        assert (end.outcome, end.exit_code) == ("completed", 0)
        assert len(set(job.evidence)) == len(job.evidence) >= 3
        assert "lease renewed" in here.said
        assert job.log() == "done\n"
        chain, records = job.records()
        assert chain.complete
        assert [each.event for each in records].count("lease-renewed") >= 2
        assert (records[-1].event, records[-1].values["outcome"]) == ("ended", "completed")


class Withholds(FakeCluster):
    """Answers the first release, and no challenge after it."""

    async def GetChallenge(self, request: pb.GetChallengeRequest, context: Any) -> pb.GetChallengeResponse:
        if "Release" in self.calls:
            await asyncio.sleep(3600)
        return await super().GetChallenge(request, context)


class Replays(FakeCluster):
    """Sends the answers to the first release again, whatever is asked."""

    kept: list[pb.AnswerEvent]

    async def Release(self, request: pb.WorkerReleaseRequest, context: Any) -> AsyncIterator[pb.AnswerEvent]:
        if hasattr(self, "kept"):
            self.jobs[request.job_id].evidence.append(request.evidence)
            for event in self.kept:
                yield event
            return
        self.kept = []
        async for event in super().Release(request, context):
            self.kept.append(event)
            yield event


@pytest.mark.parametrize("twin", [Withholds, Replays])
async def test_g5_a_coordinator_that_keeps_renewals_back_ends_the_job_at_the_deadline(
    twin: type[FakeCluster], tmp_path: Path
) -> None:
    async with scene(twin, tmp_path) as here:
        job = here.cluster.submit({"main.py": WAITS})
        run = asyncio.create_task(here.run(job))
        await job.reaches("running")
        await here.until(lambda: "job confined" in here.said)
        assert here.left() != []
        here.clock.ahead += 599 if twin is Withholds else 400
        await here.until(lambda: here.cluster.calls.count("GetChallenge") > 1 or twin is Withholds)
        assert not run.done()
        here.clock.ahead += 300
        lapsed(here, job, await run)


async def test_g5_a_coordinator_that_is_gone_ends_the_job_at_the_deadline(tmp_path: Path) -> None:
    async with scene(FakeCluster, tmp_path) as here:
        job = here.cluster.submit({"main.py": WAITS})
        run = asyncio.create_task(here.run(job, heartbeat_seconds=3600))
        await here.until(lambda: "job confined" in here.said)
        await here.cluster.stop()
        here.clock.ahead += 601
        end = await run
        assert end.outcome == LAPSED
        assert here.left() == []
        assert "the coordinator was not told that the lease is over" in here.said


async def test_the_lease_goes_on_when_the_coordinator_is_back_in_time(tmp_path: Path) -> None:
    async with scene(FakeCluster, tmp_path) as here:
        job = here.cluster.submit({"main.py": SHORT})
        run = asyncio.create_task(here.run(job, heartbeat_seconds=3600))
        await here.until(lambda: "job confined" in here.said)
        await here.cluster.stop()
        here.clock.ahead += 400
        await asyncio.sleep(0.5)
        await here.cluster.start()
        assert (await run).outcome == "completed"
        assert len(job.evidence) >= 2


@pytest.mark.parametrize("reason", [Reason.QUARANTINED, Reason.DEBUG_ENABLED, Reason.REVOKED])
async def test_g5_a_worker_that_every_custodian_refuses_stops_at_once(reason: Reason, tmp_path: Path) -> None:
    async with scene(FakeCluster, tmp_path) as here:
        job = here.cluster.submit({"main.py": WAITS})
        run = asyncio.create_task(here.run(job))
        await here.until(lambda: "job confined" in here.said)
        for custodian in here.cluster.custodians.values():
            custodian.refusal = RefusedError(reason, "no more")
        here.clock.ahead += 290
        lapsed(here, job, await run)
        assert job.error is not None
        assert job.error.details["refused_with"] == reason


async def test_one_custodian_cannot_make_the_lease_longer(tmp_path: Path) -> None:
    """All but one custodian of the fastest quorum grant a week."""
    async with scene(FakeCluster, tmp_path) as here:
        first, *others = here.cluster.custodians.values()
        for custodian in others:
            custodian.lease = LeaseTerms(604800, 604800)
        job = here.cluster.submit({"main.py": WAITS})
        run = asyncio.create_task(here.run(job))
        await here.until(lambda: "job confined" in here.said)
        for custodian in here.cluster.custodians.values():
            custodian.refusal = RefusedError(Reason.STALE, "not now")
        here.clock.ahead += LEASE.seconds + 1
        lapsed(here, job, await run)
        assert first.lease == LEASE


async def test_an_owner_s_terms_are_no_worker_s(tmp_path: Path) -> None:
    """A custodian that grants no lease at all answers for it: its share does not count."""
    async with scene(FakeCluster, tmp_path) as here:
        here.cluster.custodians["ch-1"].lease = LeaseTerms(0, 0)
        job = here.cluster.submit({"main.py": SHORT})
        end = await here.run(job)
        assert end.outcome == "completed"
        assert end.blamed == ("ch-1",)
