"""The real coordinator process, killed (SIGKILL) in the middle of each step and started again: nothing is forgotten
that was told, nothing half-done is believed, and every call can simply be made again."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest

from keyquorum_coordinator.artifacts import PART
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.coordinator import Caller, Owner, Process, Worker, claim, make_folder, plan_envelope
from tests.support.fake_ceremonies import FakeCeremonies, start_committee
from tests.support.fake_custodian import FakeCommittee

T = TypeVar("T")
BUNDLE = os.urandom(200_000)


class Scene:
    def __init__(self, folder: Path, committee: FakeCommittee, ceremonies: dict[str, FakeCeremonies]) -> None:
        self.committee = committee
        self.ceremonies = ceremonies
        self.config = make_folder(folder, committee)
        self.process = Process(self.config)
        self.owner = Owner()
        self.kills = 0
        self.call_anew()

    def call_anew(self) -> None:
        """Callers with connections of their own: the old ones would wait out their pause before they try again."""
        self.alice = Caller(self.config, "owner", "alice")
        self.worker = Caller(self.config, "worker", "w1")
        self.operator = Caller(self.config, "operator", "root")

    async def kill_and_restart(self) -> None:
        self.kills += 1
        await self.process.kill()
        await self.process.start()
        await self.hang_up()
        self.call_anew()

    async def again(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat while the coordinator is away, as every client does."""
        until = time.monotonic() + 15
        while True:
            try:
                return await asyncio.wait_for(call(), 10)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > until:
                    raise
                await asyncio.sleep(0.05)

    async def interrupted(self, call: Callable[[], Awaitable[T]], after: float) -> T:
        """Make a call, kill the coordinator so many seconds into it, start it again, and repeat the call."""
        first = asyncio.ensure_future(call())
        await asyncio.sleep(after)
        await self.kill_and_restart()
        await asyncio.gather(first, return_exceptions=True)
        return await self.again(call)

    def slow_down(self, seconds: float) -> None:
        for custodian in self.committee.custodians.values():
            custodian.behaviour.delay = seconds

    async def hang_up(self) -> None:
        for caller in (self.alice, self.worker, self.operator):
            await caller.close()

    async def close(self) -> None:
        await self.hang_up()
        await self.process.kill()
        await self.committee.stop()


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    committee, ceremonies = await start_committee()
    scene = Scene(tmp_path / "coordinator", committee, ceremonies)
    await scene.process.start()
    yield scene
    await scene.close()


async def test_killed_in_every_step_of_a_job_it_goes_on_from_where_it_was(scene: Scene) -> None:
    after = 0.004  # seconds: most calls are under way then
    job, manifest = scene.owner.manifest()
    submitted = await scene.interrupted(lambda: scene.alice.jobs.Submit(pb.SubmitRequest(manifest=manifest)), after)
    assert submitted.job_id == job
    scene.slow_down(0.2)
    assert len(await scene.interrupted(lambda: scene.alice.open(job), 0.1)) == 5  # while custodians think
    scene.slow_down(0)
    await scene.interrupted(lambda: scene.alice.upload(job, "bundle", BUNDLE), after)
    opening = scene.owner.opening(job, BUNDLE)
    committed = await scene.interrupted(
        lambda: scene.alice.jobs.Commit(pb.CommitRequest(job_id=job, opening=opening)), after
    )
    assert (committed.state, committed.opening) == ("ready", opening)

    assert (await scene.interrupted(lambda: claim(scene.worker), after)).job_id == job
    enclave = Worker()

    async def release() -> list[pb.AnswerEvent]:
        challenge = await scene.worker.workers.GetChallenge(pb.GetChallengeRequest())
        return await scene.worker.release(job, enclave.evidence(challenge.window_statements))

    answers = await scene.interrupted(release, 5 * after)
    assert {event.answer.custodian for event in answers} == set(scene.committee.custodians)
    assert await scene.interrupted(lambda: scene.worker.download(job, "bundle"), after) == BUNDLE
    assert await scene.interrupted(lambda: scene.worker.report(job, "running"), after)
    await scene.interrupted(lambda: scene.worker.upload(job, "result", b"result"), after)
    statement = enclave.statement(job, result=b"result")
    done = await scene.interrupted(
        lambda: scene.worker.workers.Complete(pb.CompleteRequest(job_id=job, statement=statement)), after
    )
    assert done.state == "completed"

    await scene.kill_and_restart()
    outcome = await scene.again(lambda: scene.alice.jobs.GetOutcome(pb.GetOutcomeRequest(job_id=job)))
    assert (outcome.statement, outcome.leaf) == (statement, answers[0].leaf)
    assert len(outcome.receipts) >= 3
    assert await scene.alice.download(job, "result") == b"result"
    events = await scene.alice.watch(job)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert events[-1].state == "completed"
    assert scene.kills >= 11


async def test_an_upload_goes_on_from_its_last_stored_part(scene: Scene) -> None:
    job, manifest = scene.owner.manifest()
    await scene.alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    bundle = os.urandom(2 * PART + 1234)
    halfway = asyncio.Event()

    async def chunks() -> AsyncIterator[pb.UploadChunk]:
        yield pb.UploadChunk(start=pb.UploadStart(job_id=job, kind="bundle"))
        for start in range(0, PART + (3 << 20), 1 << 20):
            yield pb.UploadChunk(data=bundle[start : start + (1 << 20)])
        halfway.set()
        await asyncio.sleep(30)

    call = asyncio.ensure_future(scene.alice.artifacts.Upload(chunks()))
    await halfway.wait()
    for _ in range(200):
        if (await scene.alice.stat(job, "bundle")).committed:
            break
        await asyncio.sleep(0.02)
    await scene.kill_and_restart()
    await asyncio.gather(call, return_exceptions=True)
    state = await scene.again(lambda: scene.alice.stat(job, "bundle"))
    assert (state.committed, state.complete) == (PART, False)
    done = await scene.alice.upload(job, "bundle", bundle, offset=state.committed)
    assert (done.complete, done.sha256) == (True, hashlib.sha256(bundle).digest())


async def test_a_watch_goes_on_after_the_last_event_seen(scene: Scene) -> None:
    job, manifest = scene.owner.manifest()
    await scene.alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    call = scene.alice.jobs.Watch(pb.WatchRequest(job_id=job))
    first = await call.read()
    assert isinstance(first, pb.JobEvent)
    await scene.process.kill()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await scene.kill_and_restart()
    watching = asyncio.ensure_future(scene.again(lambda: scene.alice.watch(job, first.sequence)))
    await scene.again(lambda: scene.alice.open(job))
    await scene.alice.jobs.Cancel(pb.CancelJobRequest(job_id=job))
    assert [(event.sequence, event.state) for event in await watching] == [(2, "opened"), (3, "cancelled")]


STEPS = ["propose", "deliver", "confirm", "activate"]


@pytest.mark.parametrize("step", STEPS)
async def test_killed_in_each_step_of_a_ceremony_the_same_plan_makes_the_key(scene: Scene, step: str) -> None:
    slow = scene.ceremonies["jp-1"]
    slow.hold[step] = asyncio.Event()
    plan = plan_envelope(scene.committee)

    async def create() -> list[Any]:
        return [event async for event in scene.operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan))]

    first = asyncio.ensure_future(create())
    for _ in range(400):
        if step in slow.calls and all(step in each.calls for each in scene.ceremonies.values()):
            break
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    slow.hold.clear()
    await scene.kill_and_restart()
    await asyncio.gather(first, return_exceptions=True)
    events = await scene.again(create)
    assert events[-1].step == "done"
    assert all(each.active for each in scene.ceremonies.values())
    assert not any("cancel" in each.calls for each in scene.ceremonies.values())
    # A step's answers are stored together once enough are in: those of the steps before are not asked for again,
    # and the step that was broken off is asked for again, of everyone.
    others = [each.calls for name, each in scene.ceremonies.items() if name != "jp-1"]
    before = STEPS[: STEPS.index(step)]
    assert [[calls.count(each) for each in before] for calls in others] == [[1] * len(before)] * 4
    assert [calls.count(step) for calls in others] == [2] * 4


async def test_a_graceful_stop_exits_cleanly_and_only_one_process_serves_a_folder(scene: Scene) -> None:
    second = Process(scene.config)
    with pytest.raises(AssertionError, match="another coordinator"):
        await second.start()
    assert await second.terminate() == 1
    assert await scene.process.terminate() == 0
    await scene.process.start()
