"""Malicious coordinators, one class for each lie, over real TLS: about a job that ran. Each is told by its reason code.

What came before is in ``test_lying_coordinator.py``.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.release import Leaf
from keyquorum_core.signing import Identity, sign_many
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.client_world import World, id_of, job_folder, the_world
from tests.support.deceit import deceived, reason_of_believing, submit
from tests.support.fake_coordinator import FakeCoordinator, JobRecord
from tests.support.fake_worker import Worker


@pytest.fixture
def world() -> World:
    return the_world().honest()


class ForgesTheStatement(FakeCoordinator):
    """Signs a result statement itself."""

    def outcome(self, job: JobRecord) -> pb.Outcome:
        out = super().outcome(job)
        impostor = Worker(self, job)
        out.statement = impostor.statement(out.job.job_id, 0)
        return out


class ForgesWorkerAndEvidence(FakeCoordinator):
    """Brings a worker of its own: evidence with its keys, a statement to match, the old leaf and receipts."""

    relabel = False

    def outcome(self, job: JobRecord) -> pb.Outcome:
        out = super().outcome(job)
        impostor = Worker(self, job)
        genuine = EvidenceDocument.parse(job.evidence)
        evidence = replace(
            genuine, hpke_key=impostor.recipient.public, signing_key=impostor.identity.public.to_bytes()
        ).to_bytes()
        out.evidence = evidence
        out.statement = impostor.statement(out.job.job_id, 0)
        if self.relabel:
            out.leaf = replace(
                Leaf.parse(job.leaf),
                evidence_sha256=hashlib.sha256(evidence).hexdigest(),
                recipient_sha256=hashlib.sha256(impostor.recipient.public).hexdigest(),
            ).to_bytes()
            out.leaf_proof = self.leaf_proof(out.leaf, cosigned=True)
        return out


class ForgesWorkerEvidenceAndLeaf(ForgesWorkerAndEvidence):
    relabel = True


class SwapsTheSigningKeyOnly(ForgesWorkerAndEvidence):
    """Keeps the worker's sealing key in the evidence and puts in a signing key of its own."""

    def outcome(self, job: JobRecord) -> pb.Outcome:
        out = super().outcome(job)
        forged = EvidenceDocument.parse(out.evidence)
        out.evidence = replace(forged, hpke_key=EvidenceDocument.parse(job.evidence).hpke_key).to_bytes()
        return out


class HidesReceipts(FakeCoordinator):
    def outcome(self, job: JobRecord) -> pb.Outcome:
        out = super().outcome(job)
        del out.receipts[2:]
        return out


class RepeatsOneReceipt(FakeCoordinator):
    def outcome(self, job: JobRecord) -> pb.Outcome:
        out = super().outcome(job)
        first = out.receipts[0]
        del out.receipts[:]
        out.receipts.extend([first] * 5)
        return out


class ForgesReceipts(FakeCoordinator):
    def outcome(self, job: JobRecord) -> pb.Outcome:
        out = super().outcome(job)
        for receipt in out.receipts:
            receipt.signature = secrets.token_bytes(64)
        return out


class ShowsReceiptsOfTheOwnersOpening(FakeCoordinator):
    """Real receipts of the same job, but for the release to its owner."""

    def outcome(self, job: JobRecord) -> pb.Outcome:
        out = super().outcome(job)
        del out.receipts[:]
        for event in job.open_answers:
            if event.answer.WhichOneof("outcome") == "share":
                got = event.answer.share
                out.receipts.append(
                    pb.Receipt(
                        custodian=event.answer.custodian,
                        key_id=got.key_id,
                        epoch=got.epoch,
                        window=got.window,
                        sealed_sha256=hashlib.sha256(got.sealed).digest(),
                        signature=got.signature,
                        window_statement=event.window_statement,
                    )
                )
        return out


class ShowsTheOwnersReleaseAsTheWorkers(ShowsReceiptsOfTheOwnersOpening):
    """And its leaf."""

    def outcome(self, job: JobRecord) -> pb.Outcome:
        out = super().outcome(job)
        out.leaf = next(event.leaf for event in job.open_answers if event.leaf)
        return out


class NamesNoArtifacts(FakeCoordinator):
    """With a worker's signing key, but not the job's key: a statement without ciphertext."""

    kinds: tuple[str, ...] = ()
    code = 0

    def outcome(self, job: JobRecord) -> pb.Outcome:
        out = super().outcome(job)
        kept = {kind: job.artifacts[kind] for kind in self.kinds}
        out.statement = self.workers[-1].statement(out.job.job_id, self.code, kept)
        return out


class NamesNoResult(NamesNoArtifacts):
    kinds = ("log",)


class NamesNoLog(NamesNoArtifacts):
    kinds = ("result",)


class FailsWithoutALog(NamesNoArtifacts):
    code = 1

    def __init__(self, world: World) -> None:
        super().__init__(world, run=lambda files: (1, {}, b""))


class CallsDevelopmentHardwareGenuine(FakeCoordinator):
    """With custodians that sign for it."""

    def leaf_for_worker(self, job: JobRecord, worker: Worker) -> Leaf:
        return replace(super().leaf_for_worker(job, worker), development=False)


class ReleasesBeforeTheManifest(FakeCoordinator):
    """With custodians that sign for it."""

    def leaf_for_worker(self, job: JobRecord, worker: Worker) -> Leaf:
        return replace(super().leaf_for_worker(job, worker), time=job.manifest.not_before - 1)


class ReleasesAfterTheManifest(FakeCoordinator):
    def leaf_for_worker(self, job: JobRecord, worker: Worker) -> Leaf:
        return replace(super().leaf_for_worker(job, worker), time=job.manifest.not_after)


class PresentsAnothersArtifacts(FakeCoordinator):
    """Has the job released to a second worker, which signs for the real ciphertext of the first as its own."""

    theirs: tuple[str, ...] = ()

    def work(self, job: JobRecord) -> None:
        super().work(job)
        real = dict(job.artifacts)
        super().work(job)
        for kind in self.theirs:
            job.artifacts[kind] = real[kind]
        job.statement = self.workers[-1].statement(id_of(job.manifest_envelope), 0)


class PresentsAnothersLog(PresentsAnothersArtifacts):
    theirs = ("log",)


class PresentsAnothersResult(PresentsAnothersArtifacts):
    theirs = ("result",)


class ShowsNoStatement(FakeCoordinator):
    def outcome(self, job: JobRecord) -> pb.Outcome:
        out = super().outcome(job)
        out.statement = b""
        return out


class ShowsNoOpening(FakeCoordinator):
    def outcome(self, job: JobRecord) -> pb.Outcome:
        out = super().outcome(job)
        out.job.opening = b""
        return out


class CallsItFailed(FakeCoordinator):
    """The worker signed that the job completed."""

    def history(self, job: JobRecord) -> list[pb.JobEvent]:
        events = super().history(job)
        events[-1] = pb.JobEvent(sequence=events[-1].sequence, state="failed")
        return events

    def job_message(self, job: JobRecord) -> pb.Job:
        message = super().job_message(job)
        if message.state == "completed":
            message.state = "failed"
        return message


class CallsItCompleted(FakeCoordinator):
    """The worker signed that the job failed."""

    def __init__(self, world: World) -> None:
        super().__init__(world, run=lambda files: (1, {}, b""))

    def job_message(self, job: JobRecord) -> pb.Job:
        message = super().job_message(job)
        if message.state == "failed":
            message.state = "completed"
        return message


class InventsAState(FakeCoordinator):
    def history(self, job: JobRecord) -> list[pb.JobEvent]:
        return [*super().history(job)[:-1], pb.JobEvent(sequence=99, state="nearly-done")]


class RewritesHistory(FakeCoordinator):
    def history(self, job: JobRecord) -> list[pb.JobEvent]:
        events = super().history(job)
        return [*events[:3], *events[:2]]

    async def Watch(self, request: pb.WatchRequest, context: object) -> AsyncIterator[pb.JobEvent]:
        for event in self.history(self._job(request.job_id)):
            yield event


@pytest.mark.parametrize(
    ("liar", "reason"),
    [
        (ForgesTheStatement, Reason.SIGNATURE),
        (ForgesWorkerAndEvidence, Reason.RECIPIENT),
        (SwapsTheSigningKeyOnly, Reason.LEAF),
        (ForgesWorkerEvidenceAndLeaf, Reason.SIGNATURE),
        (HidesReceipts, Reason.NO_QUORUM),
        (RepeatsOneReceipt, Reason.NO_QUORUM),
        (ForgesReceipts, Reason.SIGNATURE),
        (ShowsReceiptsOfTheOwnersOpening, Reason.SIGNATURE),
        (ShowsTheOwnersReleaseAsTheWorkers, Reason.RECIPIENT),
        (NamesNoArtifacts, Reason.ARTIFACT),
        (NamesNoResult, Reason.ARTIFACT),
        (NamesNoLog, Reason.ARTIFACT),
        (FailsWithoutALog, Reason.ARTIFACT),
        (CallsDevelopmentHardwareGenuine, Reason.LEAF),
        (ReleasesBeforeTheManifest, Reason.NOT_YET_VALID),
        (ReleasesAfterTheManifest, Reason.EXPIRED),
        (PresentsAnothersLog, Reason.ARTIFACT),
        (PresentsAnothersResult, Reason.ARTIFACT),
        (ShowsNoStatement, Reason.SIGNATURE_MISSING),
        (ShowsNoOpening, Reason.MALFORMED),
        (CallsItFailed, Reason.STATE),
        (CallsItCompleted, Reason.STATE),
        (InventsAState, Reason.STATE),
        (RewritesHistory, Reason.STATE),
    ],
)
async def test_a_result_that_does_not_verify_is_refused(
    world: World, tmp_path: Path, liar: type[FakeCoordinator], reason: Reason
) -> None:
    assert await reason_of_believing(liar(world), tmp_path) is reason


class SwapsOutcomes(FakeCoordinator):
    """Gives the first job's outcome for every job; ``relabelled``: with the right job's own documents around it."""

    relabelled = False

    def outcome(self, job: JobRecord) -> pb.Outcome:
        out = super().outcome(next(iter(self.jobs.values())))
        if self.relabelled:
            out.job.CopyFrom(self.job_message(job))
        return out


@pytest.mark.parametrize("relabelled", [False, True])
async def test_the_outcome_of_another_job_is_caught(world: World, tmp_path: Path, relabelled: bool) -> None:
    coordinator = SwapsOutcomes(world)
    coordinator.relabelled = relabelled
    async with deceived(coordinator, tmp_path) as client:
        await submit(client, tmp_path)
        second = await client.submit(job_folder(tmp_path / "second", {"main.py": b"2"}), key="demo")
        with pytest.raises(KeyquorumError) as caught:
            await client.result(second.id)
    assert caught.value.reason is Reason.WRONG_JOB


class ChangesTheResult(FakeCoordinator):
    def artifact(self, job: JobRecord, kind: str) -> bytes:
        data = super().artifact(job, kind)
        return data[:-1] + bytes([data[-1] ^ 1])


class CutsTheResult(FakeCoordinator):
    def artifact(self, job: JobRecord, kind: str) -> bytes:
        return super().artifact(job, kind)[:-1]


class PadsTheResult(FakeCoordinator):
    def artifact(self, job: JobRecord, kind: str) -> bytes:
        return super().artifact(job, kind) + b"x"


class SendsWithoutEnd(FakeCoordinator):
    """Would fill the owner's disk."""

    async def Download(self, request: pb.DownloadRequest, context: object) -> AsyncIterator[pb.DownloadChunk]:
        while True:
            yield pb.DownloadChunk(data=bytes(1 << 16))


class SwapsResultAndLog(FakeCoordinator):
    def artifact(self, job: JobRecord, kind: str) -> bytes:
        return super().artifact(job, {"result": "log", "log": "result"}[kind])


@pytest.mark.parametrize(
    ("liar", "reason"),
    [
        (ChangesTheResult, Reason.DIGEST),
        (CutsTheResult, Reason.ARTIFACT),
        (PadsTheResult, Reason.ARTIFACT),
        (SendsWithoutEnd, Reason.ARTIFACT),
        (SwapsResultAndLog, Reason.ARTIFACT),
    ],
)
async def test_an_artifact_that_the_worker_did_not_sign_is_refused(
    world: World, tmp_path: Path, liar: type[FakeCoordinator], reason: Reason
) -> None:
    assert await reason_of_believing(liar(world), tmp_path) is reason


async def test_what_a_second_worker_made_itself_opens(world: World, tmp_path: Path) -> None:
    """So that it is the ciphertext of the first that the tests above refuse."""
    async with deceived(PresentsAnothersArtifacts(world), tmp_path) as client:
        job = await submit(client, tmp_path)
        assert (await client.result(job)).log == b"ran\n"


async def test_the_result_of_another_job_is_refused(world: World, tmp_path: Path) -> None:
    class SwapsArtifacts(FakeCoordinator):
        def artifact(self, job: JobRecord, kind: str) -> bytes:
            return super().artifact(next(iter(self.jobs.values())), kind)

    async with deceived(SwapsArtifacts(world), tmp_path) as client:
        await submit(client, tmp_path)
        second = await client.submit(job_folder(tmp_path / "second"), key="demo")
        with pytest.raises(KeyquorumError) as caught:
            await client.result(second.id)
    assert caught.value.reason is Reason.DIGEST


async def test_a_job_listed_that_the_owner_did_not_sign_is_refused(world: World, tmp_path: Path) -> None:
    class ListsAStrangersJob(FakeCoordinator):
        async def List(self, request: object, context: object) -> Any:
            job = next(iter(self.jobs.values()))
            message = self.job_message(job)
            message.manifest = sign_many([Identity.generate()], "application/vnd.in-toto+json", job.payload)
            return pb.ListJobsResponse(jobs=[message])

    async with deceived(ListsAStrangersJob(world), tmp_path) as client:
        await submit(client, tmp_path)
        with pytest.raises(KeyquorumError) as caught:
            await client.jobs()
    assert caught.value.reason is Reason.SIGNATURE
