"""Malicious coordinators, one class for each lie, over real TLS: about a worker's telemetry. Each is found out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.client_world import World, the_world
from tests.support.deceit import deceived, submit
from tests.support.fake_coordinator import FakeCoordinator, JobRecord
from tests.support.fake_worker import Worker


@pytest.fixture
def world() -> World:
    return the_world().honest()


class DropsTheFirst(FakeCoordinator):
    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        return super().telemetry(job)[1:]


class DropsOneInBetween(FakeCoordinator):
    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        first, _, last = super().telemetry(job)
        return [first, last]


class Reorders(FakeCoordinator):
    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        first, second, last = super().telemetry(job)
        return [second, first, last]


class Repeats(FakeCoordinator):
    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        first, *rest = super().telemetry(job)
        return [first, first, *rest]


class GoesOnAfterTheEnd(FakeCoordinator):
    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        return [*super().telemetry(job), super().telemetry(job)[-1]]


class ChangesTheRecords(FakeCoordinator):
    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        out = super().telemetry(job)
        out[1].content = out[0].content
        return out


class ChangesTheStatement(FakeCoordinator):
    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        out = super().telemetry(job)
        envelope = json.loads(out[1].statement)
        envelope["signatures"] = json.loads(out[0].statement)["signatures"]
        out[1].statement = json.dumps(envelope).encode()
        return out


class LogsAnother(FakeCoordinator):
    """The ledger has a leaf, but of another batch."""

    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        out = super().telemetry(job)
        out[1] = self.told(job.telemetry[1], statement_sha256="11" * 32)
        return out


class LogsAnotherEnd(FakeCoordinator):
    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        out = super().telemetry(job)
        out[1] = self.told(job.telemetry[1], last=True)
        return out


class LogsNothing(FakeCoordinator):
    """Shows the leaf with the proof of another one."""

    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        out = super().telemetry(job)
        out[1].leaf_proof = out[0].leaf_proof
        return out


class AsksNoWitness(FakeCoordinator):
    """The log's own signature alone."""

    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        out = super().telemetry(job)
        for each in out:
            each.leaf_proof = self.leaf_proof(each.leaf, cosigned=False)
        return out


async def reason(coordinator: FakeCoordinator, tmp_path: Path) -> Reason:
    async with deceived(coordinator, tmp_path) as client:
        job = await submit(client, tmp_path)
        await client.wait(job)
        with pytest.raises(KeyquorumError) as caught:
            await client.telemetry(job)
    return caught.value.reason


@pytest.mark.parametrize(
    ("twin", "expected"),
    [
        (DropsTheFirst, Reason.DIGEST),
        (DropsOneInBetween, Reason.DIGEST),
        (Reorders, Reason.DIGEST),
        (Repeats, Reason.DIGEST),
        (GoesOnAfterTheEnd, Reason.DIGEST),
        (ChangesTheRecords, Reason.DIGEST),
        (ChangesTheStatement, Reason.SIGNATURE),
        (LogsAnother, Reason.LEAF),
        (LogsAnotherEnd, Reason.LEAF),
        (LogsNothing, Reason.LEDGER_PROOF),
        (AsksNoWitness, Reason.NO_QUORUM),
    ],
)
async def test_the_lie_is_found(world: World, tmp_path: Path, twin: type[FakeCoordinator], expected: Reason) -> None:
    assert await reason(twin(world), tmp_path) is expected


class ForgesAll(FakeCoordinator):
    """Invents a worker, with a chain of its own and leaves about it."""

    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        out = super().telemetry(job)
        impostor = Worker(self, job)
        return [*out, *(self.told(each) for each in impostor.tell(self.id_of(job), bytes(32), 2))]

    def id_of(self, job: JobRecord) -> str:
        return self.job_message(job).job_id


class CutsShort(FakeCoordinator):
    """Keeps the newest back. It can, but not say that nothing follows."""

    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        return super().telemetry(job)[:-1]


@pytest.mark.parametrize(
    ("twin", "batches", "complete", "others"),
    [(FakeCoordinator, 3, True, 0), (ForgesAll, 3, True, 2), (CutsShort, 2, False, 0)],
)
async def test_what_is_read_is_the_worker_s_and_says_whether_it_is_all(
    world: World, tmp_path: Path, twin: type[FakeCoordinator], batches: int, complete: bool, others: int
) -> None:
    async with deceived(twin(world), tmp_path) as client:
        job = await submit(client, tmp_path)
        await client.wait(job)
        found = await client.telemetry(job)
    assert (found.batches, found.complete, found.others) == (batches, complete, others)
    assert [record.values["number"] for record in found.records] == list(range(batches))
    assert all(record.logged for record in found.records)
