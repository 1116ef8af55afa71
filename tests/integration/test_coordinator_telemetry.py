"""Workers' telemetry at the coordinator: taken in order from who holds the job's key, told to the ledger, read by the
owner, who finds out whatever is done to it on the way (adversarial: a coordinator that drops, reorders and forges)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.ledger.leaves import Telemetry as TelemetryLeaf
from keyquorum_core.ledger.leaves import parse_leaf
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_core.telemetry import NO_BATCH, Batch, Record, seal_records, sign_batch, worker_digest
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.wire.errors import from_rpc_error
from tests.support.coordinator import Caller, Owner, Running, Worker, claim, run_job
from tests.support.fake_ceremonies import start_committee
from tests.support.ledger_log import all_leaves

KEY = b"\x07" * 32


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    committee, _ = await start_committee()
    made = await Running.start(tmp_path / "coordinator", committee)
    yield made
    await made.stop()
    await committee.stop()


class Teller:
    """A worker that has a job's key, and its chain."""

    def __init__(self, running: Running, name: str = "w1") -> None:
        self.running = running
        self.caller: Caller = running.caller("worker", name)
        self.worker = Worker()
        self.job = ""
        self.made: list[pb.TelemetryRequest] = []

    async def get_key(self, job: str) -> None:
        self.job = job
        await claim(self.caller, job)
        statements = (await self.caller.workers.GetChallenge(pb.GetChallengeRequest())).window_statements
        await self.caller.release(job, self.worker.evidence(statements))

    def batch(self, *, last: bool = False, **changes: Any) -> pb.TelemetryRequest:
        """The next one."""
        now, sequence = int(time.time()), len(self.made)
        maker = self.worker.identity.public.to_bytes()
        content = seal_records(KEY, [Record(now, "usage", {"seconds": sequence})], self.job, maker, sequence)
        members: dict[str, Any] = {
            "job_id": self.job,
            "worker": worker_digest(self.worker.identity.public),
            "sequence": sequence,
            "previous_sha256": hashlib.sha256(self.made[-1].statement).hexdigest() if self.made else NO_BATCH,
            "first_at": now,
            "last_at": now,
            "records": 1,
            "content_sha256": hashlib.sha256(content).hexdigest(),
            "content_size": len(content),
            "last": last,
        }
        statement = sign_batch(Batch(**{**members, **changes}), self.worker.identity)
        self.made.append(pb.TelemetryRequest(job_id=self.job, statement=statement, content=content))
        return self.made[-1]

    async def tell(self, request: pb.TelemetryRequest) -> Reason | None:
        try:
            await self.caller.workers.Telemetry(request)
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error, "coordinator").reason
        return None


@pytest.fixture
async def teller(running: Running) -> Teller:
    made = Teller(running)
    await made.get_key(await run_job(Owner(), running.caller("owner", "alice")))
    return made


async def read(running: Running, job: str) -> list[pb.TelemetryBatch]:
    call = running.caller("owner", "alice").jobs.GetTelemetry(pb.GetTelemetryRequest(job_id=job))
    return [batch async for batch in call]


async def test_batches_are_kept_told_to_the_ledger_and_read_by_the_owner(running: Running, teller: Teller) -> None:
    for last in (False, False, True):
        assert await teller.tell(teller.batch(last=last)) is None
    assert await teller.tell(teller.made[1]) is None  # again: the answer got lost
    await running.server.outbox._some()
    leaves = [parse_leaf(leaf) for leaf in all_leaves(running.server.sequencer._ledger)]
    told = [leaf for leaf in leaves if isinstance(leaf, TelemetryLeaf)]
    assert [leaf.sequence for leaf in told] == [0, 1, 2]
    assert [leaf.last for leaf in told] == [False, False, True]
    assert {leaf.worker_sha256 for leaf in told} == {worker_digest(teller.worker.identity.public)}
    found = await read(running, teller.job)
    assert [(each.statement, each.content) for each in found] == [(m.statement, m.content) for m in teller.made]
    assert [TelemetryLeaf.parse(each.leaf) for each in found] == told
    for each in found:
        if each.leaf_proof:
            assert TlogProof.parse(each.leaf_proof).index >= 0


async def test_a_worker_may_say_that_it_wiped_after_it_lost_the_job(running: Running, teller: Teller) -> None:
    assert await teller.tell(teller.batch()) is None
    await running.server.quarantine.put("w1", Reason.TCB, "old firmware")
    assert await teller.tell(teller.batch(last=True, reason="LEASE")) is None
    assert await teller.tell(teller.batch()) is Reason.DIGEST  # nothing follows the last
    other = Teller(running, "w2")
    other.job = teller.job
    assert await other.tell(other.batch()) is Reason.ROLE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"previous_sha256": "11" * 32}, Reason.DIGEST),
        ({"sequence": 2}, Reason.DIGEST),
        ({"content_sha256": "11" * 32}, Reason.DIGEST),
        ({"job_id": "b" * 26}, Reason.WRONG_JOB),
    ],
)
async def test_what_is_not_the_next_batch_is_refused(teller: Teller, change: dict[str, Any], reason: Reason) -> None:
    assert await teller.tell(teller.batch()) is None
    assert await teller.tell(teller.batch(**change)) is reason


async def test_nobody_else_s_batches_are_taken(running: Running, teller: Teller) -> None:
    stranger = Teller(running)
    stranger.job = teller.job
    assert await stranger.tell(stranger.batch()) is Reason.SIGNATURE
    request = teller.batch()
    large = pb.TelemetryRequest(job_id=teller.job, statement=request.statement, content=bytes((256 << 10) + 1))
    assert await teller.tell(large) is Reason.TOO_LARGE
    assert await read(running, teller.job) == []
    call = running.caller("owner", "mallory").jobs.GetTelemetry(pb.GetTelemetryRequest(job_id=teller.job))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    error: KeyquorumError = from_rpc_error(caught.value, "coordinator")
    assert error.reason is Reason.NOT_FOUND


async def test_batches_and_their_leaves_survive_a_restart(running: Running, teller: Teller) -> None:
    assert await teller.tell(teller.batch()) is None
    config, committee = running.config, running.committee
    await running.stop()
    running.callers.clear()
    again = await Running.again(config, committee)
    try:
        back = Teller(again)
        back.job, back.worker, back.made = teller.job, teller.worker, teller.made
        assert await back.tell(back.batch(last=True)) is None
        assert [each.statement for each in await read(again, teller.job)] == [m.statement for m in back.made]
    finally:
        for caller in again.callers:
            await caller.close()
        again.callers.clear()
        running.server, running.callers = again.server, []
