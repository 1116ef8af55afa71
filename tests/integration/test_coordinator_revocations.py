"""The coordinator goes by what operators revoked, keeps it, hands it to every custodian, and tells the ledger."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_coordinator.quarantine import entries
from keyquorum_coordinator.withdrawals import MAX_RELAYED
from keyquorum_core.bulletin import Bulletin, peek_bulletin, sign_bulletin
from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_core.ledger.leaves import Revocation, parse_leaf
from keyquorum_core.signing import Identity
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.coordinator import Caller, Owner, Running, Worker, claim, refusal, run_job
from tests.support.fake_ceremonies import start_committee
from tests.support.fake_custodian import CLUSTER, FakeCommittee
from tests.support.ledger_log import all_leaves
from tests.support.vendor import MEASUREMENT, development_chip

HARDWARE = f"sev-snp:{development_chip().chip_id.hex()}"
JOB = "a" * 26


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    committee, _ = await start_committee()
    made = await Running.start(tmp_path / "coordinator", committee)
    yield made
    await made.stop()
    await committee.stop()


def entry(target: str, subject: str, reason: str = "stolen") -> dict[str, object]:
    return {"target": target, "subject": subject, "reason": reason, "at": int(time.time())}


def signed(
    running: Running,
    version: int,
    *revoked: dict[str, object],
    lifted: tuple[dict[str, object], ...] = (),
    signer: Identity | None = None,
    **changes: Any,
) -> bytes:
    now = int(time.time())
    members: dict[str, Any] = {
        "cluster": CLUSTER,
        "kind": "revocations",
        "version": version,
        "issued_at": now - 5,
        "expires_at": now + 3600,
        "body": {"revoked": list(revoked), "lifted": list(lifted)},
    }
    assert isinstance(running.committee, FakeCommittee)
    return sign_bulletin(Bulletin(**(members | changes)), [signer or running.committee.operator])


async def accept(operator: Caller, document: bytes) -> pb.RevocationsState:
    return await operator.revocations.Accept(pb.AcceptRevocationsRequest(document=document))


async def leaves(running: Running) -> list[Revocation]:
    await running.server.outbox._some()
    found = [parse_leaf(leaf) for leaf in all_leaves(running.server.sequencer._ledger)]
    return [leaf for leaf in found if isinstance(leaf, Revocation)]


def has(running: Running) -> dict[str, int]:
    assert isinstance(running.committee, FakeCommittee)
    return {each.id: each.revocations[0] for each in running.committee.custodians.values()}


async def test_a_revoked_job_ends_and_its_worker_is_told_to_stop(running: Running) -> None:
    alice, w1, ops = running.caller("owner", "alice"), running.caller("worker", "w1"), running.caller("operator", "ops")
    job = await run_job(Owner(), alice)
    await claim(w1, job)
    assert await w1.report(job, "running")
    document = signed(running, 1, entry("job", job))
    state = await accept(ops, document)
    assert (list(state.jobs), state.document) == ([job], document)
    assert not await w1.report(job, "running")
    stored = await running.server.jobs.get(job)
    assert stored.state == "cancelled"
    assert stored.error is not None
    assert stored.error.reason is Reason.REVOKED
    # Every custodian has it, and the ledger shows it once, also when the same document comes again.
    assert set(has(running).values()) == {1}
    assert not (await accept(ops, document)).jobs
    (leaf,) = await leaves(running)
    assert (leaf.target, leaf.subject_sha256) == ("job", hashlib.sha256(job.encode()).hexdigest())
    assert (leaf.document_sha256, leaf.document_version) == (peek_bulletin(document).digest, 1)


async def test_a_revoked_owner_loses_its_jobs_and_submits_none(running: Running) -> None:
    alice, bob, ops = (
        running.caller("owner", "alice"),
        running.caller("owner", "bob"),
        running.caller("operator", "ops"),
    )
    owner, other = Owner(), Owner("bob")
    mine, theirs = await run_job(owner, alice), await run_job(other, bob)
    state = await accept(ops, signed(running, 1, entry("owner", owner.identity.public.fingerprint)))
    assert list(state.jobs) == [mine]
    assert (await running.server.jobs.get(theirs)).state == "ready"
    error = await refusal(alice.jobs.Submit(pb.SubmitRequest(manifest=owner.manifest()[1])))
    assert error.reason is Reason.REVOKED
    # It is the identity that is revoked, not the name.
    anew = await alice.jobs.Submit(pb.SubmitRequest(manifest=Owner().manifest()[1]))
    assert anew.state == "submitted"
    # Lifted, it may submit again; what was ended stays so.
    lifted = (entry("owner", owner.identity.public.fingerprint, "it was a mistake"),)
    await accept(ops, signed(running, 2, lifted=lifted))
    again = await alice.jobs.Submit(pb.SubmitRequest(manifest=owner.manifest()[1]))
    assert again.state == "submitted"
    assert (await running.server.jobs.get(mine)).state == "cancelled"


async def test_a_job_revoked_before_it_is_submitted_is_refused(running: Running) -> None:
    alice, ops = running.caller("owner", "alice"), running.caller("operator", "ops")
    job, manifest = Owner().manifest()
    await accept(ops, signed(running, 1, entry("job", job)))
    assert (await refusal(alice.jobs.Submit(pb.SubmitRequest(manifest=manifest)))).reason is Reason.REVOKED
    assert (await refusal(alice.jobs.Get(pb.GetJobRequest(job_id=job)))).reason is Reason.NOT_FOUND


@pytest.mark.parametrize("target", ["hardware", "measurement", "worker"])
async def test_what_a_worker_showed_is_revoked_and_it_gets_no_jobs_until_that_is_lifted(
    running: Running, target: str
) -> None:
    alice, w1, w2 = running.caller("owner", "alice"), running.caller("worker", "w1"), running.caller("worker", "w2")
    ops, worker = running.caller("operator", "ops"), Worker()
    job = await run_job(Owner(), alice)
    await claim(w1, job)
    statements = (await w1.workers.GetChallenge(pb.GetChallengeRequest())).window_statements
    await w1.release(job, worker.evidence(statements))
    subject = {
        "hardware": HARDWARE,
        "measurement": f"sev-snp:{MEASUREMENT.hex()}",
        "worker": hashlib.sha256(worker.recipient.public).hexdigest(),
    }[target]
    state = await accept(ops, signed(running, 1, entry(target, subject)))
    assert list(state.jobs) == [job]
    assert not await w1.report(job, "running")
    assert (await running.server.jobs.get(job)).state == "ready"  # another worker may take it
    assert (await refusal(claim(w1))).reason is Reason.QUARANTINED
    (made,) = await running.server.database.read(entries)
    assert (made.worker, made.revoked, made.reason) == ("w1", f"{target} {subject}", "REVOKED")
    # Whoever comes with evidence of the same is put beside it.
    await claim(w2, job)
    error = await refusal(_release(w2, job, worker.evidence(statements)))
    assert error.reason is Reason.REVOKED
    assert (await refusal(claim(w2))).reason is Reason.QUARANTINED
    await accept(ops, signed(running, 2, lifted=(entry(target, subject, "it was found"),)))
    assert (await claim(w1, job)).job_id == job
    assert all(each.lifted_at and "version 2" in each.why for each in await running.server.database.read(entries))
    assert [leaf.target for leaf in await leaves(running)] == [target]


async def _release(worker: Caller, job: str, evidence: bytes) -> Any:
    return await worker.release(job, evidence)


@pytest.mark.parametrize("role", ["owner", "worker"])
async def test_only_operators_hand_it_over(running: Running, role: str) -> None:
    document = signed(running, 1, entry("job", JOB))
    assert (await refusal(accept(running.caller(role, "alice"), document))).reason is Reason.ROLE
    assert await running.server.withdrawals.document() == b""


async def test_what_custodians_would_refuse_is_refused_and_changes_nothing(running: Running) -> None:
    ops = running.caller("operator", "ops")
    good = signed(running, 2, entry("job", JOB), entry("owner", "b" * 64))
    await accept(ops, good)
    past = int(time.time()) - 100
    for document, reason in (
        (signed(running, 3, entry("job", JOB), signer=Identity.generate()), Reason.SIGNATURE),
        (signed(running, 3, entry("job", JOB)), Reason.ROLLBACK),  # leaves the owner out
        (signed(running, 1, entry("job", JOB)), Reason.ROLLBACK),
        (signed(running, 2, entry("job", JOB)), Reason.ROLLBACK),
        (signed(running, 3, entry("job", "x")), Reason.MALFORMED),
        (signed(running, 3, issued_at=past - 1, expires_at=past), Reason.EXPIRED),
        (signed(running, 3, kind="inventory"), Reason.BULLETIN),
        (signed(running, 3, cluster="elsewhere"), Reason.BULLETIN),
        (b"{}", Reason.MALFORMED),
        (b" " * (MAX_RELAYED + 1), Reason.TOO_LARGE),
    ):
        found = (await refusal(accept(ops, document))).reason
        assert found is reason or (reason is Reason.SIGNATURE and found.startswith("SIGNATURE")), (found, reason)
        assert await running.server.withdrawals.document() == good
    assert len(await leaves(running)) == 2


async def test_a_custodian_that_was_away_is_given_the_present_version(running: Running) -> None:
    assert isinstance(running.committee, FakeCommittee)
    first = next(iter(running.committee.custodians.values()))
    first.behaviour.revoke_error = UnavailableError(Reason.UNAVAILABLE, "it is being restarted")
    ops = running.caller("operator", "ops")
    state = await accept(ops, signed(running, 1, entry("job", JOB)))
    problems = {each.custodian: each.problem for each in state.custodians if each.problem}
    assert list(problems) == [first.id]
    assert "UNAVAILABLE" in problems[first.id]
    first.behaviour.revoke_error = None
    await running.server.withdrawals.relay_once()
    assert set(has(running).values()) == {1}
    # One that lost what it had says so when it describes itself, and is given it again.
    first.revocations = (0, "")
    await running.server.fanout.links[first.id].probe()
    await running.server.withdrawals.relay_once()
    assert set(has(running).values()) == {1}
    assert not running.server.withdrawals.problems


async def test_a_custodian_with_a_newer_version_is_left_alone_and_said(running: Running) -> None:
    assert isinstance(running.committee, FakeCommittee)
    first = next(iter(running.committee.custodians.values()))
    first.revocations = (7, "7" * 64)
    await running.server.fanout.links[first.id].probe()
    state = await accept(running.caller("operator", "ops"), signed(running, 1, entry("job", JOB)))
    (problem,) = [each.problem for each in state.custodians if each.custodian == first.id]
    assert "version 7" in problem
    assert first.revocations == (7, "7" * 64)


async def test_killed_between_storing_and_handing_on_it_goes_on_from_there(running: Running) -> None:
    """The transaction is all that counts: a coordinator that starts on it relays, refuses, and tells the ledger."""
    assert isinstance(running.committee, FakeCommittee)
    for custodian in running.committee.custodians.values():
        custodian.behaviour.revoke_error = UnavailableError(Reason.UNAVAILABLE, "the coordinator died before")
    job, manifest = Owner().manifest()
    await accept(running.caller("operator", "ops"), signed(running, 1, entry("job", job)))
    assert set(has(running).values()) == {0}
    await running.stop()
    for custodian in running.committee.custodians.values():
        custodian.behaviour.revoke_error = None
    again = await Running.again(running.config, running.committee)
    try:
        await again.server.withdrawals.relay_once()
        assert set(has(again).values()) == {1}
        alice = again.caller("owner", "alice")
        assert (await refusal(alice.jobs.Submit(pb.SubmitRequest(manifest=manifest)))).reason is Reason.REVOKED
        assert len(await leaves(again)) == 1
    finally:
        await again.stop()


async def test_operators_see_who_has_which_version(running: Running) -> None:
    ops = running.caller("operator", "ops")
    assert (await ops.revocations.Get(pb.GetRevocationsRequest())).document == b""
    document = signed(running, 4, entry("policy", "c" * 64))
    await accept(ops, document)
    state = await ops.revocations.Get(pb.GetRevocationsRequest())
    assert {(each.version, each.digest) for each in state.custodians} == {(4, peek_bulletin(document).digest)}
