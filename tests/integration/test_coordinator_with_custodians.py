"""The coordinator between real custodians, an owner and a worker: keys that come out right, and nobody else's."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from keyquorum_core.answers import Answers
from keyquorum_core.derivation import Combiner, context
from keyquorum_core.errors import Reason
from keyquorum_core.key_request import KeyRequest, peek_asked, sign_key_request
from keyquorum_core.ledger.leaves import JobSubmitted, parse_leaf
from keyquorum_core.manifest import job_id, payload, sign_manifest
from keyquorum_core.manifest import subject as subject_of
from keyquorum_core.release import (
    Answer,
    Leaf,
    Receipt,
    open_share,
    open_window,
    verify_answer,
    verify_receipt,
)
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_custodian.server import CustodianServer
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.wire.errors import from_rpc_error
from tests.support.coordinator import Owner, Running, Worker, claim
from tests.support.custodian import Committee, build_committee
from tests.support.ledger_log import all_leaves

pytestmark = pytest.mark.timeout(60)


class Scene:
    def __init__(self, committee: Committee, running: Running) -> None:
        self.committee = committee
        self.running = running
        self.alice = running.caller("owner", "alice")
        self.worker = running.caller("worker", "w1")
        self.operator = running.caller("operator", "olga")

    def combine(self, manifest: bytes, events: list[pb.AnswerEvent], recipient: RecipientKey) -> bytes:
        """What a client does with the answers; returns the root."""
        quorum, now = self.committee.quorum, int(time.time())
        subject = subject_of(manifest)
        derivation = context("key-1", 1, "job", subject)
        combiner = Combiner(quorum, derivation)
        leaf = Leaf.parse(next(event.leaf for event in events if event.leaf))
        for event in events:
            share = event.answer.share
            answer = Answer(
                event.answer.custodian, share.key_id, share.epoch, share.window, share.sealed, share.signature
            )
            identity = self.committee.roster.custodian(answer.custodian).identity
            window = open_window(event.window_statement, identity, custodian=answer.custodian, cluster="demo", now=now)
            verify_answer(answer, window, subject, leaf.hash(), key_id="key-1", epoch=1)
            combiner.add(answer.custodian, open_share(answer, recipient, leaf.hash(), quorum).contributions)
        found = combiner.result(require_confirmed=True)
        assert found is not None
        return found.key.purpose_key("bundle")


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    committee = build_committee(tmp_path / "custodians")
    servers = []
    for node in committee.open_all().values():
        server = CustodianServer(node)
        await server.start()
        servers.append(server)
    running = await Running.start(tmp_path / "coordinator", committee)
    yield Scene(committee, running)
    await running.stop()
    for server in servers:
        await server.stop(0)
    committee.close()


async def test_a_key_is_made_and_owner_and_worker_derive_the_same_from_it(scene: Scene) -> None:
    plan = scene.committee.sign_plan(scene.committee.plan("key-1"))
    steps = [event.step async for event in scene.operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan))]
    assert steps[-1] == "done"
    again = [event.step async for event in scene.operator.keys.RunCeremony(pb.RunCeremonyRequest(plan=plan))]
    assert again == ["done"]

    committee, keys = scene.committee, scene.committee.owner
    manifest = committee.manifest("key-1")
    data, envelope = payload(manifest), sign_manifest(manifest, keys.identity)
    job = job_id(data)
    await scene.alice.jobs.Submit(pb.SubmitRequest(manifest=envelope))
    opened = scene.combine(data, await scene.alice.open(job), keys.recipient)
    owner = Owner("alice", keys.identity, keys.recipient)
    await scene.alice.upload(job, "bundle", b"ciphertext")
    await scene.alice.jobs.Commit(pb.CommitRequest(job_id=job, opening=owner.opening(job, b"ciphertext")))

    await claim(scene.worker)
    enclave = Worker()
    challenge = await scene.worker.workers.GetChallenge(pb.GetChallengeRequest())
    answers = await scene.worker.release(job, enclave.evidence(challenge.window_statements))
    assert scene.combine(data, answers, enclave.recipient) == opened

    record = await scene.running.server.releases.recorded(job)
    assert record is not None
    leaf = Leaf.parse(record.leaf)
    for each in record.receipts:
        identity = committee.roster.custodian(each.custodian).identity
        window = open_window(each.window_statement, identity, custodian=each.custodian, cluster="demo", now=leaf.time)
        receipt = Receipt(each.custodian, each.key_id, each.epoch, each.window, each.sealed_sha256, each.signature)
        verify_receipt(receipt, window, subject_of(data), leaf.hash(), key_id="key-1", epoch=1)
    assert committee.quorum.is_qualified(each.custodian for each in record.receipts)


async def test_a_worker_that_hangs_up_early_leaves_a_record_an_owner_can_check(scene: Scene) -> None:
    scene.committee.generate("key-1")
    keys = scene.committee.owner
    manifest = scene.committee.manifest("key-1")
    job = job_id(payload(manifest))
    await scene.alice.jobs.Submit(pb.SubmitRequest(manifest=sign_manifest(manifest, keys.identity)))
    await scene.alice.open(job)
    await scene.alice.upload(job, "bundle", b"c")
    opening = Owner("alice", keys.identity, keys.recipient).opening(job, b"c")
    await scene.alice.jobs.Commit(pb.CommitRequest(job_id=job, opening=opening))
    await claim(scene.worker)
    evidence = scene.committee.evidence(RecipientKey.generate(), Identity.generate())
    call = scene.worker.workers.Release(pb.WorkerReleaseRequest(job_id=job, evidence=evidence))
    assert isinstance(await call.read(), pb.AnswerEvent)
    call.cancel()
    record = None
    for _ in range(100):
        record = record or await scene.running.server.releases.recorded(job)
    assert record is not None
    assert scene.committee.quorum.is_qualified(each.custodian for each in record.receipts)


async def test_a_key_request_goes_through_the_ledger_to_its_owner_and_to_nobody_else(scene: Scene) -> None:
    committee = scene.committee
    committee.generate("key-1")
    keys, now = committee.owner, int(time.time())

    def request(**changes: object) -> KeyRequest:
        members: dict[str, object] = {
            "key_id": "key-1",
            "epoch": 1,
            "purpose": "tokenize",
            "name": "patients",
            "classification": "personal",
            "export_control": "",
            "owner": "alice",
            "owner_identity": keys.identity.public,
            "owner_hpke": keys.recipient.public,
            "not_before": now - 60,
            "not_after": now + 600,
            "issued_at": now,
            "nonce": secrets.token_hex(16),
        }
        return KeyRequest(**{**members, **changes})  # type: ignore[arg-type]

    async def root(asked: KeyRequest) -> bytes:
        envelope = sign_key_request(asked, keys.identity)
        binding = peek_asked(envelope).binding()
        answers = Answers(binding, committee.roster, committee.quorum, keys.recipient, "owner", clock=time.time)
        async for event in scene.alice.keys.Derive(pb.DeriveRequest(request=envelope, request_id="r")):
            if event.leaf:
                answers.take_leaf(event.leaf, event.leaf_proof)
            share = event.answer.share
            answer = Answer(
                event.answer.custodian, share.key_id, share.epoch, share.window, share.sealed, share.signature
            )
            answers.take(answer, event.window_statement)
        found = answers.combination(confirmed=True)
        assert found is not None
        return found.key.root

    first = await root(request())
    assert await root(request()) == first
    assert await root(request(purpose="data")) != first

    mallory = scene.running.caller("owner", "mallory")
    stolen = sign_key_request(request(), keys.identity)
    for caller, reason in ((mallory, Reason.UNKNOWN_OWNER), (scene.worker, Reason.ROLE)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.keys.Derive(pb.DeriveRequest(request=stolen)).read()
        assert from_rpc_error(caught.value, "coordinator").reason is reason

    leaves = [parse_leaf(leaf) for leaf in all_leaves(scene.running.server.sequencer._ledger)]
    submitted = [leaf for leaf in leaves if isinstance(leaf, JobSubmitted)]
    intents = [leaf.job_id for leaf in leaves if isinstance(leaf, Leaf)]
    assert len(submitted) == 3
    assert {leaf.job_id for leaf in submitted} == set(intents)
    assert {leaf.regions for leaf in submitted} == {()}
