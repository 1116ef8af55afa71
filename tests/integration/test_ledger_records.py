"""What the coordinator tells the ledger of what it does: submitted, denied, ended, made, in use. Once each, also after
a kill or with a ledger that was away, and never a name."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from sqlalchemy import func, select

from keyquorum_coordinator.database import OutboxRow
from keyquorum_core.bulletin import peek_bulletin
from keyquorum_core.errors import Reason, RefusedError, UnavailableError
from keyquorum_core.ledger.leaves import (
    NOTHING,
    Ceremony,
    JobDenied,
    JobSubmitted,
    LedgerLeaf,
    Result,
    RosterInUse,
    parse_leaf,
)
from keyquorum_core.manifest import MANIFEST_TYPE
from keyquorum_core.release import Leaf
from keyquorum_core.signing import peek_payload
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.coordinator import Owner, Running, Worker, claim, plan_envelope, run_job
from tests.support.fake_ceremonies import start_committee
from tests.support.fake_custodian import FakeCommittee
from tests.support.ledger_log import all_leaves

BUNDLE = b"bundle" * 1000


class Scene:
    def __init__(self, running: Running) -> None:
        self.running = running
        self.owner = Owner()
        self.alice = running.caller("owner", "alice")
        self.worker = running.caller("worker", "w1")
        self.operator = running.caller("operator", "root")

    async def leaves(self, count: int = 0) -> list[LedgerLeaf | Leaf]:
        """All leaves of the ledger, once there are ``count`` and nothing waits in the outbox."""
        server = self.running.server
        for _ in range(500):
            waiting = await server.database.read(lambda s: s.scalar(select(func.count()).select_from(OutboxRow)))
            if not waiting and server.sequencer.latest.checkpoint.size >= count:
                break
            await asyncio.sleep(0.01)
        return [parse_leaf(leaf) for leaf in all_leaves(server.sequencer._ledger)]

    async def of(self, kind: type[Any], count: int = 0) -> list[Any]:
        return [leaf for leaf in await self.leaves(count) if isinstance(leaf, kind)]


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    committee, _ = await start_committee()
    running = await Running.start(tmp_path / "coordinator", committee)
    yield Scene(running)
    await running.stop()
    await committee.stop()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def test_the_roster_in_use_is_told_once(scene: Scene) -> None:
    roster = scene.running.committee.roster
    (leaf,) = await scene.of(RosterInUse)
    assert (leaf.roster_sha256, leaf.roster_version, leaf.custodians) == (roster.digest, 1, 5)
    await scene.running.server.stop(0)
    again = await Running.again(scene.running.config, scene.running.committee)
    assert [leaf] == await Scene(again).of(RosterInUse)
    scene.running.server = again.server
    scene.running.callers += again.callers


async def test_a_job_is_in_the_ledger_before_its_owner_hears_that_it_was_taken(scene: Scene) -> None:
    job, manifest = scene.owner.manifest()
    await scene.alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    at_once = [parse_leaf(leaf) for leaf in all_leaves(scene.running.server.sequencer._ledger)]
    (leaf,) = [leaf for leaf in at_once if isinstance(leaf, JobSubmitted)]
    payload = peek_payload(manifest, MANIFEST_TYPE, "manifest")
    assert (leaf.job_id, leaf.manifest_sha256, leaf.key_id, leaf.epoch) == (job, sha256(payload), "k1", 1)
    assert (leaf.classification, leaf.regions) == ("internal", ("CH",))
    assert leaf.owner_sha256 == sha256(scene.owner.identity.public.to_bytes())
    bundle = peek_bulletin((scene.running.server.config.path("bulletins") / "policy.json").read_bytes())
    assert (leaf.policy_sha256, leaf.policy_version) == (bundle.digest, bundle.version)
    assert leaf.decision_sha256 != NOTHING
    await scene.alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))  # the same again
    assert len(await scene.of(JobSubmitted)) == 1


async def test_a_ledger_that_is_away_delays_the_answer_and_loses_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.leaves()
    append = scene.running.server.sequencer.append

    async def away(leaf: bytes, request_id: bytes) -> Any:
        raise UnavailableError(Reason.STORAGE, "the ledger's database failed")

    monkeypatch.setattr(scene.running.server.sequencer, "append", away)
    job, manifest = scene.owner.manifest()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await scene.alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    monkeypatch.setattr(scene.running.server.sequencer, "append", append)
    done = await scene.alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    assert done.job_id == job
    assert [leaf.job_id for leaf in await scene.of(JobSubmitted, 2)] == [job]


async def test_what_a_killed_coordinator_left_in_the_outbox_comes_into_the_ledger(scene: Scene) -> None:
    await scene.leaves()
    server = scene.running.server
    for task in server._tasks:  # nothing empties the outbox any more, as after a kill
        task.cancel()
    job, manifest = scene.owner.manifest()
    await scene.alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    await scene.alice.jobs.Cancel(pb.CancelJobRequest(job_id=job))
    assert len(all_leaves(server.sequencer._ledger)) == 2, "the roster and the submission"
    await server.stop(0)
    again = await Running.again(scene.running.config, scene.running.committee)
    scene.running.server = again.server
    (leaf,) = await Scene(again).of(Result, 3)
    assert (leaf.job_id, leaf.outcome, leaf.reason) == (job, "cancelled", "CANCELLED")
    scene.running.callers += again.callers


async def test_a_denial_is_told_once_with_its_reason_and_its_seat(scene: Scene) -> None:
    job, manifest = scene.owner.manifest(key_id="unknown")
    for _ in range(3):
        with pytest.raises(grpc.aio.AioRpcError):
            await scene.alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    (leaf,) = await scene.of(JobDenied, 2)
    assert (leaf.job_id, leaf.seat, leaf.reason, leaf.intent_sha256) == (job, "coordinator", "UNKNOWN_KEY", NOTHING)
    assert (leaf.key_id, leaf.policy_version) == ("unknown", 0)
    assert await scene.of(JobSubmitted) == []


async def test_a_custodians_refusal_is_told_with_the_release_that_it_refused(scene: Scene) -> None:
    committee = scene.running.committee
    assert isinstance(committee, FakeCommittee)
    decided = {"policy_sha256": "a" * 64, "policy_version": "3", "decision_sha256": "b" * 64}
    committee.custodians["ch-1"].behaviour.refusal = RefusedError(Reason.REGION, "not there", details=decided)
    committee.custodians["de-1"].behaviour.refusal = RefusedError(Reason.STALE, "alice is late")
    committee.custodians["jp-1"].behaviour.refusal = UnavailableError(Reason.SEALED, "nobody could be asked")
    job, manifest = scene.owner.manifest()
    await scene.alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    with contextlib.suppress(grpc.aio.AioRpcError):  # two shares are no quorum
        await scene.alice.open(job)
    denials = {leaf.seat: leaf for leaf in await scene.of(JobDenied, 5)}
    (intent,) = await scene.of(Leaf)
    assert sorted(denials) == ["custodian/ch-1", "custodian/de-1"]
    assert {leaf.intent_sha256 for leaf in denials.values()} == {intent.hash().hex()}
    assert {leaf.job_id for leaf in denials.values()} == {job}
    region, stale = denials["custodian/ch-1"], denials["custodian/de-1"]
    assert (region.reason, region.policy_version, region.decision_sha256) == ("REGION", 3, "b" * 64)
    assert (stale.reason, stale.policy_version) == ("STALE", 0)


async def test_manifests_of_others_and_unsigned_ones_fill_no_ledger(scene: Scene) -> None:
    before = len(await scene.leaves())
    envelope = json.loads(Owner().manifest()[1])
    envelope["signatures"][0]["sig"] = envelope["signatures"][1]["sig"]
    for manifest in (Owner("bob").manifest()[1], json.dumps(envelope).encode(), b"{}", b"no manifest"):
        with pytest.raises(grpc.aio.AioRpcError):
            await scene.alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    assert len(await scene.leaves()) == before


async def _run(scene: Scene, outcome: str = "completed") -> tuple[str, bytes, bytes]:
    job = await run_job(scene.owner, scene.alice, BUNDLE)
    assert (await claim(scene.worker)).job_id == job
    enclave = Worker()
    challenge = await scene.worker.workers.GetChallenge(pb.GetChallengeRequest())
    evidence = enclave.evidence(challenge.window_statements)
    await scene.worker.release(job, evidence)
    await scene.worker.upload(job, "result", b"sealed result")
    await scene.worker.upload(job, "log", b"sealed log")
    statement = enclave.statement(job, outcome, result=b"sealed result", log=b"sealed log")
    await scene.worker.workers.Complete(pb.CompleteRequest(job_id=job, statement=statement))
    return job, evidence, statement


async def test_a_result_is_told_by_digests(scene: Scene) -> None:
    job, evidence, statement = await _run(scene)
    (leaf,) = await scene.of(Result, 3)
    assert (leaf.job_id, leaf.outcome, leaf.reason, leaf.development) == (job, "completed", "", True)
    assert (leaf.statement_sha256, leaf.evidence_sha256) == (sha256(statement), sha256(evidence))
    assert (leaf.result_sha256, leaf.log_sha256) == (sha256(b"sealed result"), sha256(b"sealed log"))
    await scene.worker.workers.Complete(pb.CompleteRequest(job_id=job, statement=statement))  # the same again
    assert len(await scene.of(Result)) == 1


async def test_a_job_that_failed_is_told_with_its_reason(scene: Scene) -> None:
    _, _, statement = await _run(scene, "failed")
    (leaf,) = await scene.of(Result, 3)
    assert (leaf.outcome, leaf.reason, leaf.statement_sha256) == ("failed", "JOB_FAILED", sha256(statement))


async def test_a_ceremony_is_told_when_it_ends(scene: Scene) -> None:
    committee = scene.running.committee
    assert isinstance(committee, FakeCommittee)
    plan = plan_envelope(committee)
    events = [event async for event in scene.operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan))]
    (leaf,) = await scene.of(Ceremony, 2)
    payload = peek_payload(plan, "application/vnd.keyquorum.ceremony-plan.v1+json", "plan")
    assert (leaf.kind, leaf.key_id, leaf.epoch, leaf.reason) == ("generate", "k2", 1, "")
    assert (leaf.plan_sha256, leaf.roster_sha256) == (sha256(payload), scene.running.committee.roster.digest)
    certificate = json.loads(events[-1].certificate)["payloadType"]
    signed = peek_payload(events[-1].certificate, certificate, "certificate", max_bytes=1 << 20)
    assert leaf.certificate_sha256 == sha256(signed)


async def test_a_ceremony_that_is_given_up_is_told_with_the_reason(tmp_path: Path) -> None:
    committee, ceremonies = await start_committee()
    ceremonies["jp-1"].lie = True
    running = await Running.start(tmp_path / "coordinator", committee)
    scene = Scene(running)
    with pytest.raises(grpc.aio.AioRpcError):
        [event async for event in scene.operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan_envelope(committee)))]
    (leaf,) = await scene.of(Ceremony, 2)
    assert leaf.certificate_sha256 == NOTHING
    assert leaf.reason == "CEREMONY"
    await running.stop()
    await committee.stop()


async def test_no_name_of_a_person_or_a_file_is_in_any_leaf(scene: Scene) -> None:
    await _run(scene)
    _, denied = scene.owner.manifest(key_id="unknown")
    with pytest.raises(grpc.aio.AioRpcError):
        await scene.alice.jobs.Submit(pb.SubmitRequest(manifest=denied))
    data = b"".join(leaf.to_bytes() for leaf in await scene.leaves(5))
    for name in (b"alice", b"job.py", b"python", b"w1", b"root"):
        assert name not in data


async def test_metrics_tell_of_the_ledger(scene: Scene) -> None:
    await _run(scene)
    size = len(await scene.leaves(3))
    registry = scene.running.server.metrics.registry
    assert registry.get_sample_value("keyquorum_coordinator_ledger_size") == size
    appended = registry.get_sample_value("keyquorum_coordinator_ledger_append_seconds_count")
    assert appended is not None
    assert 0 < appended <= size
    assert (registry.get_sample_value("keyquorum_coordinator_ledger_checkpoint_time") or 0) > 1_700_000_000
