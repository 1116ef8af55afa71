"""The coordinator's services over mTLS, with fake custodians behind it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from keyquorum_core.errors import MalformedError, Reason, RefusedError, UnavailableError
from keyquorum_core.release import Leaf
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.wire.errors import from_rpc_error, from_status, to_status
from tests.support.coordinator import Caller, Owner, Running, Worker, claim, refusal, run_job, submit
from tests.support.fake_custodian import FakeCommittee

BUNDLE = os.urandom(300_000)


# -- a whole job -----------------------------------------------------------------------------------------------------


async def test_a_job_from_submission_to_a_result_its_owner_can_check(
    running: Running, owner: Owner, alice: Caller, worker: Caller
) -> None:
    job = await run_job(owner, alice, BUNDLE)
    claimed = await claim(worker)
    assert (claimed.job_id, claimed.state, claimed.worker) == (job, "claimed", "w1")
    assert await worker.report(job, "attesting")
    enclave = Worker()
    challenge = await worker.workers.GetChallenge(pb.GetChallengeRequest())
    assert len(challenge.window_statements) == 5
    evidence = enclave.evidence(challenge.window_statements)
    answers = await worker.release(job, evidence)
    assert {event.answer.custodian for event in answers} == {each.id for each in running.committee.roster.custodians}
    assert all(event.answer.request_id == "mine" and event.window_statement for event in answers)
    assert await worker.download(job, "bundle") == BUNDLE
    assert await worker.download(job, "bundle", 100_000) == BUNDLE[100_000:]
    for state in ("downloading", "running", "uploading"):
        assert await worker.report(job, state, "going on")
    await worker.upload(job, "result", b"ciphertext of the result")
    await worker.upload(job, "log", b"ciphertext of the log")
    statement = enclave.statement(job, result=b"ciphertext of the result", log=b"ciphertext of the log")
    for _ in range(2):
        done = await worker.workers.Complete(pb.CompleteRequest(job_id=job, statement=statement))
        assert done.state == "completed"

    outcome = await alice.jobs.GetOutcome(pb.GetOutcomeRequest(job_id=job))
    leaf = Leaf.parse(outcome.leaf)
    assert (leaf.job_id, leaf.recipient, leaf.key_id, leaf.epoch) == (job, "worker", "k1", 1)
    assert leaf.evidence_sha256 == hashlib.sha256(evidence).hexdigest()
    assert leaf.recipient_sha256 == hashlib.sha256(enclave.recipient.public).hexdigest()
    assert (outcome.leaf, outcome.evidence, outcome.statement) == (answers[0].leaf, evidence, statement)
    shares = {event.answer.custodian: event.answer.share for event in answers}
    assert {receipt.custodian for receipt in outcome.receipts} == set(shares)
    for receipt in outcome.receipts:
        assert receipt.sealed_sha256 == hashlib.sha256(shares[receipt.custodian].sealed).digest()
        assert receipt.window_statement
    assert await alice.download(job, "result") == b"ciphertext of the result"

    events = await alice.watch(job)
    states = list(dict.fromkeys(event.state for event in events))
    assert states == [
        *("submitted", "opened", "ready", "claimed", "attesting", "running", "uploading", "completed"),
    ]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert [event.sequence for event in await alice.watch(job, after=3)] == list(range(4, len(events) + 1))


async def test_sealed_shares_are_never_stored(running: Running, owner: Owner, alice: Caller, worker: Caller) -> None:
    job = await run_job(owner, alice)
    await claim(worker)
    challenge = await worker.workers.GetChallenge(pb.GetChallengeRequest())
    answers = await alice.open(job) + await worker.release(job, Worker().evidence(challenge.window_statements))
    await running.server.releases.settled()
    stored = b"".join(path.read_bytes() for path in running.config.directory.rglob("*") if path.is_file())
    assert all(event.answer.share.sealed not in stored for event in answers)
    assert answers[-1].answer.share.signature in stored or answers[-1].answer.share.signature == bytes(64)


# -- submitting ------------------------------------------------------------------------------------------------------


async def test_the_same_manifest_again_is_the_same_job(alice: Caller, owner: Owner) -> None:
    job, manifest = owner.manifest()
    first = await alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    again = await alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    assert first == again
    listed = await alice.jobs.List(pb.ListJobsRequest())
    assert [each.job_id for each in listed.jobs] == [job]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"not_before": 1000, "not_after": 2000, "issued_at": 1000}, Reason.EXPIRED),
        ({"not_before": 1 << 40, "not_after": (1 << 40) + 60}, Reason.NOT_YET_VALID),
        ({"key_id": "nobody-knows"}, Reason.UNKNOWN_KEY),
        ({"epoch": 2}, Reason.EPOCH),
        ({"owner": "bob"}, Reason.UNKNOWN_OWNER),
    ],
)
async def test_a_manifest_custodians_would_refuse_is_refused_early(
    alice: Caller, owner: Owner, changes: dict[str, Any], reason: Reason
) -> None:
    _, manifest = owner.manifest(**changes)
    error = await refusal(alice.jobs.Submit(pb.SubmitRequest(manifest=manifest)))
    assert isinstance(error, RefusedError)
    assert error.reason is reason


async def test_a_changed_byte_or_a_strangers_signature_is_refused(alice: Caller, owner: Owner) -> None:
    _, manifest = owner.manifest()
    position = manifest.index(b'"sig":"') + 20
    changed = (
        manifest[:position] + (b"A" if manifest[position : position + 1] != b"A" else b"B") + manifest[position + 1 :]
    )
    error = await refusal(alice.jobs.Submit(pb.SubmitRequest(manifest=bytes(changed))))
    assert error.reason is Reason.SIGNATURE


@pytest.mark.parametrize("manifest", [b"", b"{}", b"\xff" * 100, b"[" * 5000, bytes((1 << 20) + 1)])
async def test_garbage_for_a_manifest_is_malformed(alice: Caller, manifest: bytes) -> None:
    assert isinstance(await refusal(alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))), MalformedError)


async def test_an_owners_unfinished_jobs_are_bounded(tmp_path: Path, committee: FakeCommittee, owner: Owner) -> None:
    running = await Running.start(tmp_path / "small", committee)
    running.server.jobs._max_open = 2
    alice = running.caller("owner", "alice")
    job = await submit(alice, owner)
    await submit(alice, owner)
    _, third = owner.manifest()
    assert (await refusal(alice.jobs.Submit(pb.SubmitRequest(manifest=third)))).reason is Reason.QUOTA
    await alice.jobs.Cancel(pb.CancelJobRequest(job_id=job))
    await alice.jobs.Submit(pb.SubmitRequest(manifest=third))
    await running.stop()


# -- who may what ----------------------------------------------------------------------------------------------------


async def test_roles_are_held_to_their_methods(running: Running, alice: Caller, worker: Caller) -> None:
    operator = running.caller("operator", "root")
    for call in (
        worker.jobs.Submit(pb.SubmitRequest()),
        operator.jobs.List(pb.ListJobsRequest()),
        alice.workers.Claim(pb.ClaimRequest()),
        operator.artifacts.Stat(pb.StatArtifactRequest()),
        worker.keys.List(pb.ListKeysRequest()),
        alice.keys.RunCeremony(pb.RunCeremonyRequest()).read(),
        worker.keys.RunCeremony(pb.RunCeremonyRequest()).read(),
        worker.cluster.Status(pb.ClusterStatusRequest()),
    ):
        assert (await refusal(call)).reason is Reason.ROLE
    for caller in (alice, worker, operator):
        await caller.cluster.Describe(pb.DescribeClusterRequest())
    await operator.keys.List(pb.ListKeysRequest())
    await alice.keys.List(pb.ListKeysRequest())
    status = await alice.cluster.Status(pb.ClusterStatusRequest())
    assert len(status.custodians) == 5
    assert all(each.described.custodian == each.health.custodian for each in status.custodians)
    assert all(each.described_at for each in status.custodians)


async def test_somebody_elses_job_looks_like_none(running: Running, owner: Owner, alice: Caller) -> None:
    job = await submit(alice, owner)
    bob = running.caller("owner", "bob")
    for call in (
        bob.jobs.Get(pb.GetJobRequest(job_id=job)),
        bob.jobs.Cancel(pb.CancelJobRequest(job_id=job)),
        bob.jobs.Commit(pb.CommitRequest(job_id=job)),
        bob.jobs.GetOutcome(pb.GetOutcomeRequest(job_id=job)),
        bob.open(job),
        bob.watch(job),
        bob.stat(job, "bundle"),
        bob.upload(job, "bundle", b"x"),
        bob.download(job, "result"),
    ):
        assert (await refusal(call)).reason is Reason.NOT_FOUND
    assert not (await bob.jobs.List(pb.ListJobsRequest())).jobs


async def test_a_worker_touches_only_the_job_it_holds(
    running: Running, owner: Owner, alice: Caller, worker: Caller
) -> None:
    job = await run_job(owner, alice)
    evidence = Worker().evidence((await worker.workers.GetChallenge(pb.GetChallengeRequest())).window_statements)
    calls: tuple[Callable[[Caller], Awaitable[Any]], ...] = (
        lambda caller: caller.download(job, "bundle"),
        lambda caller: caller.upload(job, "result", b"x"),
        lambda caller: caller.release(job, evidence),
        lambda caller: caller.stat(job, "bundle"),
        lambda caller: caller.workers.Complete(pb.CompleteRequest(job_id=job, statement=b"x")),
    )
    for call in calls:
        assert (await refusal(call(worker))).reason is Reason.ROLE
    await claim(worker, job)
    other = running.caller("worker", "w2")
    for call in calls:
        assert (await refusal(call(other))).reason is Reason.ROLE
    assert not await other.report(job, "running")
    for kind in ("bundle", "result"):
        what = worker.upload(job, kind, b"x") if kind == "bundle" else worker.download(job, kind)
        assert (await refusal(what)).reason is Reason.ROLE


# -- releases --------------------------------------------------------------------------------------------------------


async def test_two_of_five_down_still_opens_and_three_is_a_refusal_naming_them(
    running: Running, committee: FakeCommittee, owner: Owner, alice: Caller
) -> None:
    job = await submit(alice, owner)
    for name in ("de-1", "jp-1"):
        await committee.custodians[name].stop()
    events = await alice.open(job)
    refused = {each.answer.custodian for each in events if each.answer.HasField("refusal")}
    assert refused == {"de-1", "jp-1"}
    assert [bool(each.leaf) for each in events] == [True, False, False, False, False]
    assert (await alice.jobs.Get(pb.GetJobRequest(job_id=job))).state == "opened"

    await committee.custodians["is-1"].stop()
    error = await refusal(alice.open(job))
    assert isinstance(error, UnavailableError)
    assert error.reason is Reason.NO_QUORUM
    assert set(error.details) == {"de-1", "jp-1", "is-1"}
    assert all(why.startswith("UNAVAILABLE") for why in error.details.values())  # not TIMEOUT: nobody waited for them
    assert all(name in error.message for name in ("de-1", "jp-1", "is-1"))
    assert isinstance(error := await refusal(_challenge(running)), UnavailableError)
    assert set(error.details) == {"de-1", "jp-1", "is-1"}


async def _challenge(running: Running) -> pb.GetChallengeResponse:
    for link in running.server.fanout.links.values():
        if not link.connected:
            link._latest = None  # a statement at hand is good until its window ends: as if it had
    return await running.caller("worker", "w1").workers.GetChallenge(pb.GetChallengeRequest())


async def test_refusals_reach_the_owner_one_by_one_and_then_as_one(
    committee: FakeCommittee, owner: Owner, alice: Caller
) -> None:
    job = await submit(alice, owner)
    for name in ("ch-1", "de-1", "de-2"):
        committee.custodians[name].behaviour.refusal = RefusedError(Reason.QUOTA, "enough for this hour")
    call = alice.jobs.Open(pb.OpenRequest(job_id=job))
    seen: dict[str, Reason | None] = {}
    try:
        async for event in call:
            refusal_ = event.answer.refusal
            seen[event.answer.custodian] = from_status(refusal_).reason if event.answer.HasField("refusal") else None
    except grpc.aio.AioRpcError as caught:
        error = from_rpc_error(caught, "coordinator")
    assert seen == {"ch-1": Reason.QUOTA, "de-1": Reason.QUOTA, "de-2": Reason.QUOTA, "is-1": None, "jp-1": None}
    assert isinstance(error, RefusedError)
    assert error.details["de-2"] == "QUOTA: enough for this hour"
    assert (await alice.jobs.Get(pb.GetJobRequest(job_id=job))).state == "submitted"


async def test_an_owner_that_hangs_up_after_a_quorum_has_still_opened(
    committee: FakeCommittee, owner: Owner, alice: Caller
) -> None:
    committee.custodians["ch-1"].behaviour.delay = 5
    job = await submit(alice, owner)
    call = alice.jobs.Open(pb.OpenRequest(job_id=job))
    for _ in range(4):
        await call.read()
    call.cancel()
    for _ in range(100):
        if (await alice.jobs.Get(pb.GetJobRequest(job_id=job))).state == "opened":
            return
        await asyncio.sleep(0.02)
    pytest.fail("the quorum was forgotten")


# -- committing and completing ---------------------------------------------------------------------------------------


async def test_an_opening_must_be_the_owners_and_name_the_stored_bundle(owner: Owner, alice: Caller) -> None:
    job = await submit(alice, owner)
    await alice.open(job)

    async def commit(opening: bytes) -> Reason:
        return (await refusal(alice.jobs.Commit(pb.CommitRequest(job_id=job, opening=opening)))).reason

    assert await commit(owner.opening(job, BUNDLE)) is Reason.STATE
    await alice.upload(job, "bundle", BUNDLE)
    assert await commit(owner.opening(job, BUNDLE + b"x")) is Reason.DIGEST
    assert await commit(Owner().opening(job, BUNDLE)) is Reason.SIGNATURE
    assert await commit(owner.opening(owner.manifest()[0], BUNDLE)) is Reason.WRONG_JOB
    opening = owner.opening(job, BUNDLE)
    for _ in range(2):
        assert (await alice.jobs.Commit(pb.CommitRequest(job_id=job, opening=opening))).state == "ready"
    assert await commit(owner.opening(job, BUNDLE)) is Reason.EXISTS
    assert (await refusal(alice.upload(job, "bundle", b"another"))).reason is Reason.STATE


async def test_a_statement_must_be_by_the_attested_key_and_name_what_is_stored(
    running: Running, owner: Owner, alice: Caller, worker: Caller
) -> None:
    job = await run_job(owner, alice)
    await claim(worker)
    enclave = Worker()

    async def complete(statement: bytes) -> Reason:
        return (await refusal(worker.workers.Complete(pb.CompleteRequest(job_id=job, statement=statement)))).reason

    assert await complete(enclave.statement(job)) is Reason.STATE  # no release on record
    challenge = await worker.workers.GetChallenge(pb.GetChallengeRequest())
    await worker.release(job, enclave.evidence(challenge.window_statements))
    assert await complete(Worker().statement(job)) is Reason.SIGNATURE
    assert await complete(enclave.statement(owner.manifest()[0])) is Reason.WRONG_JOB
    assert await complete(enclave.statement(job, result=b"never uploaded")) is Reason.DIGEST
    await worker.upload(job, "result", b"one")
    assert await complete(enclave.statement(job, result=b"two")) is Reason.DIGEST
    failed = enclave.statement(job, outcome="failed", result=b"one")
    done = await worker.workers.Complete(pb.CompleteRequest(job_id=job, statement=failed))
    assert done.state == "failed"
    error = from_status(done.error)
    assert (error.reason, error.actual) == (Reason.JOB_FAILED, "failed, exit code 1")
    assert (await refusal(alice.jobs.Cancel(pb.CancelJobRequest(job_id=job)))).reason is Reason.STATE


async def test_a_worker_that_cannot_go_on_ends_the_job_with_its_reason(
    owner: Owner, alice: Caller, worker: Caller
) -> None:
    job = await run_job(owner, alice)
    await claim(worker)
    why = to_status(RefusedError(Reason.MEASUREMENT, "nobody knows this image"))
    for _ in range(2):
        done = await worker.workers.Complete(pb.CompleteRequest(job_id=job, error=why))
        assert done.state == "failed"
    events = await alice.watch(job)
    assert from_status(events[-1].error).reason is Reason.MEASUREMENT
    outcome = await alice.jobs.GetOutcome(pb.GetOutcomeRequest(job_id=job))
    assert from_status(outcome.job.error).message == "nobody knows this image"


# -- waiting ---------------------------------------------------------------------------------------------------------


async def test_a_waiting_worker_gets_the_job_as_it_becomes_ready(owner: Owner, alice: Caller, worker: Caller) -> None:
    waiting = asyncio.create_task(claim(worker, wait=10))
    await asyncio.sleep(0.05)
    job = await run_job(owner, alice)
    assert (await asyncio.wait_for(waiting, 2)).job_id == job
    assert (await claim(worker)).job_id == job  # the same worker again: the same job
    assert (await refusal(claim(worker, "b" * 26))).reason is Reason.NOT_FOUND


async def test_nothing_to_run_is_not_found_and_a_named_job_is_waited_for(
    owner: Owner, alice: Caller, worker: Caller
) -> None:
    assert (await refusal(claim(worker))).reason is Reason.NOT_FOUND
    job = await submit(alice, owner)
    assert (await refusal(claim(worker, job))).reason is Reason.NOT_FOUND


async def test_cancelling_tells_the_worker_to_stop(owner: Owner, alice: Caller, worker: Caller) -> None:
    job = await run_job(owner, alice)
    await claim(worker)
    assert await worker.report(job, "running")
    for _ in range(2):
        cancelled = await alice.jobs.Cancel(pb.CancelJobRequest(job_id=job, why="changed my mind"))
        assert cancelled.state == "cancelled"
    assert not await worker.report(job, "running")
    assert (await alice.watch(job))[-1].detail == "changed my mind"


async def test_watching_follows_live_and_ends_with_the_job(owner: Owner, alice: Caller) -> None:
    job = await submit(alice, owner)
    watching = asyncio.create_task(alice.watch(job))
    await asyncio.sleep(0.05)
    await alice.open(job)
    await alice.jobs.Cancel(pb.CancelJobRequest(job_id=job))
    events = await asyncio.wait_for(watching, 2)
    assert [event.state for event in events] == ["submitted", "opened", "cancelled"]


async def test_a_silent_workers_job_is_given_to_another_and_given_up_after_three(
    tmp_path: Path, committee: FakeCommittee, owner: Owner
) -> None:
    now = time.time()
    shift = 0.0
    running = await Running.start(tmp_path / "clock", committee, clock=lambda: now + shift)
    alice = running.caller("owner", "alice")
    job = await run_job(owner, alice)
    for attempt in range(1, 4):
        worker = running.caller("worker", f"w{attempt}")
        assert (await claim(worker)).job_id == job
        shift += 31
        changed = [each for each in await running.server.jobs.sweep() if each.job_id == job]
        assert [each.state for each in changed] == ["ready" if attempt < 3 else "failed"]
        assert not await worker.report(job, "running")
    error = from_status((await alice.jobs.Get(pb.GetJobRequest(job_id=job))).error)
    assert error.reason is Reason.JOB_FAILED
    await running.stop()


async def test_a_job_whose_time_is_over_expires(tmp_path: Path, committee: FakeCommittee, owner: Owner) -> None:
    now = time.time()
    shift = 0.0
    running = await Running.start(tmp_path / "clock", committee, clock=lambda: now + shift)
    alice = running.caller("owner", "alice")
    job = await submit(alice, owner)
    shift = 4000
    await running.server.jobs.sweep()
    events = await alice.watch(job)
    assert events[-1].state == "expired"
    assert from_status(events[-1].error).reason is Reason.EXPIRED
    await running.stop()
