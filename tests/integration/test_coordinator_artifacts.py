"""The coordinator's artifact streams over mTLS: full disks, order, bounds, and who may still write."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from keyquorum_coordinator.objects import Objects, open_objects
from keyquorum_core.errors import MalformedError, Reason, UnavailableError
from keyquorum_core.manifest import Resources
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.coordinator import Caller, Owner, Running, claim, refusal, run_job, submit
from tests.support.fake_custodian import FakeCommittee

BUNDLE = os.urandom(300_000)


class FullDisk:
    def __init__(self, inner: Objects) -> None:
        self.inner = inner
        self.full = False
        self.get, self.paths, self.delete = inner.get, inner.paths, inner.delete

    def put(self, path: str, data: bytes) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.inner.put(path, data)


async def test_a_full_disk_stops_an_upload_with_a_storage_error_and_loses_nothing(
    tmp_path: Path, committee: FakeCommittee, owner: Owner
) -> None:
    disk = FullDisk(open_objects(str(tmp_path / "objects")))
    running = await Running.start(tmp_path / "full", committee, objects=disk)
    alice = running.caller("owner", "alice")
    job = await submit(alice, owner)
    bundle = os.urandom(9 << 20)

    async def chunks() -> AsyncIterator[pb.UploadChunk]:
        yield pb.UploadChunk(start=pb.UploadStart(job_id=job, kind="bundle"))
        for start in range(0, 8 << 20, 1 << 20):
            yield pb.UploadChunk(data=bundle[start : start + (1 << 20)])
        for _ in range(500):
            if (await alice.stat(job, "bundle")).committed:
                break
            await asyncio.sleep(0.01)
        disk.full = True
        yield pb.UploadChunk(data=bundle[8 << 20 :])
        yield pb.UploadChunk(finish=pb.UploadFinish(size=len(bundle), sha256=hashlib.sha256(bundle).digest()))

    error = await refusal(alice.artifacts.Upload(chunks()))
    assert isinstance(error, UnavailableError)
    assert error.reason is Reason.STORAGE
    assert (await alice.stat(job, "bundle")).committed == 8 << 20
    disk.full = False
    assert (await alice.upload(job, "bundle", bundle, offset=8 << 20)).complete
    await running.stop()


async def test_an_upload_must_begin_with_a_start_and_end_with_a_finish(owner: Owner, alice: Caller) -> None:
    job = await submit(alice, owner)
    start = pb.UploadChunk(start=pb.UploadStart(job_id=job, kind="bundle"))
    for messages in (
        [pb.UploadChunk(data=b"x")],
        [start, pb.UploadChunk(data=b"x")],
        [start, start],
        [start, pb.UploadChunk()],
    ):
        assert isinstance(await refusal(alice.artifacts.Upload(iter(messages))), MalformedError)


async def test_a_result_over_the_jobs_bound_is_refused(owner: Owner, alice: Caller, worker: Caller) -> None:
    job, manifest = owner.manifest(resources=Resources(1, 256, 0, 60, 1))
    await alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    await alice.open(job)
    await alice.upload(job, "bundle", b"b")
    await alice.jobs.Commit(pb.CommitRequest(job_id=job, opening=owner.opening(job, b"b")))
    await claim(worker)
    assert (await refusal(worker.upload(job, "result", bytes(6 << 20)))).reason is Reason.TOO_LARGE


async def test_an_upload_that_outlives_its_claim_changes_nothing(owner: Owner, alice: Caller, worker: Caller) -> None:
    job = await run_job(owner, alice)
    await claim(worker)
    cancelled = asyncio.Event()

    async def chunks() -> AsyncIterator[pb.UploadChunk]:
        yield pb.UploadChunk(start=pb.UploadStart(job_id=job, kind="result"))
        yield pb.UploadChunk(data=b"late")
        await alice.jobs.Cancel(pb.CancelJobRequest(job_id=job))
        cancelled.set()
        yield pb.UploadChunk(finish=pb.UploadFinish(size=4, sha256=hashlib.sha256(b"late").digest()))

    assert (await refusal(worker.artifacts.Upload(chunks()))).reason is Reason.ROLE
    assert cancelled.is_set()
    state = await alice.stat(job, "result")
    assert (state.committed, state.complete) == (0, False)


async def test_a_bundle_is_not_changed_under_a_committed_job(owner: Owner, alice: Caller) -> None:
    job = await submit(alice, owner)
    await alice.open(job)

    async def chunks() -> AsyncIterator[pb.UploadChunk]:
        yield pb.UploadChunk(start=pb.UploadStart(job_id=job, kind="bundle"))
        for _ in range(500):
            if not (await alice.stat(job, "bundle")).complete:
                break
            await asyncio.sleep(0.01)
        # The opening was signed over the first bundle; it cannot be committed while another one is on its way.
        with pytest.raises(grpc.aio.AioRpcError):
            await alice.jobs.Commit(pb.CommitRequest(job_id=job, opening=owner.opening(job, b"first")))
        yield pb.UploadChunk(data=b"second")
        yield pb.UploadChunk(finish=pb.UploadFinish(size=6, sha256=hashlib.sha256(b"second").digest()))

    await alice.upload(job, "bundle", b"first")
    assert (await alice.artifacts.Upload(chunks())).complete
    await alice.jobs.Commit(pb.CommitRequest(job_id=job, opening=owner.opening(job, b"second")))
    assert (await refusal(alice.upload(job, "bundle", b"third"))).reason is Reason.STATE
