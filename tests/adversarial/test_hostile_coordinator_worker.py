"""A hostile coordinator, and hostile custodians behind it, against the worker.

Each twin owns everything that the worker's one connection reaches. None gets the worker to run what the owner did not
sign, to believe a share that its custodian did not sign, or to keep quiet about who lied.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.errors import Reason, RefusedError, UnavailableError
from keyquorum_core.manifest import Opening, open_opening, sign_manifest, sign_opening
from keyquorum_core.release import WINDOW_SECONDS, Answer, Leaf, encode_share, share_info, sign_answer, window_of
from keyquorum_core.sealing import seal
from keyquorum_core.signing import Identity
from keyquorum_gpu_worker.config import load_config
from keyquorum_gpu_worker.ending import JobEnd
from keyquorum_gpu_worker.job import Surroundings
from keyquorum_gpu_worker.worker import Worker
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.fake_worker_service import EPOCH, KEY, Custodian, FakeCluster, FakeJob


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks once and gives up, instead of waiting half a minute for custodians to come back."""
    monkeypatch.setattr(
        "keyquorum_gpu_worker.worker.Surroundings", lambda **parts: Surroundings(**parts, release_patience=0.0)
    )


async def attack(twin: type[FakeCluster], tmp_path: Path, others: int = 0) -> tuple[FakeCluster, FakeJob, JobEnd]:
    """One job, claimed by a worker of the twin's; ``others`` jobs are there besides."""
    cluster = twin()
    await cluster.start()
    scratch = tmp_path / "scratch"
    os.mkdir(scratch)
    worker = None
    try:
        job = cluster.submit({"main.py": b"print('ran')"})
        for number in range(others):
            cluster.submit({"main.py": f"print('other {number}')".encode()})
        worker = Worker(load_config(cluster.worker_dir(tmp_path / "worker", scratch=scratch)))
        end = await worker.one(job.id)
    finally:
        if worker is not None:
            await worker.close()
        await cluster.stop()
    assert os.listdir(scratch) == []
    return cluster, job, end


def refusal(job: FakeJob, reason: Reason) -> str:
    """Why the worker gave up before it held the key."""
    assert job.error is not None
    assert job.error.reason is reason, job.error
    assert job.statement == b""
    return str(job.error)


# -- what is handed over at the claim ---------------------------------------------------------------------------------


class SwapsManifest(FakeCluster):
    def claimed(self, job: FakeJob) -> pb.Job:
        other = next(each for each in self.jobs.values() if each is not job)
        return pb.Job(job_id=job.id, manifest=other.envelope, opening=job.opening)


class SignsManifestItself(FakeCluster):
    """Its own identity in an otherwise equal manifest: another job, then."""

    def claimed(self, job: FakeJob) -> pb.Job:
        mine = Identity.generate()
        changed = replace(job.manifest, owner_identity=mine.public)
        return pb.Job(job_id=job.id, manifest=sign_manifest(changed, mine), opening=job.opening)


class ChangesAByte(FakeCluster):
    def claimed(self, job: FakeJob) -> pb.Job:
        at = job.envelope.index(b'"payload":"') + 200
        flipped = b"A" if job.envelope[at : at + 1] != b"A" else b"B"
        return pb.Job(job_id=job.id, manifest=job.envelope[:at] + flipped + job.envelope[at + 1 :], opening=job.opening)


class SignsOpeningItself(FakeCluster):
    def claimed(self, job: FakeJob) -> pb.Job:
        opening = open_opening(job.opening, self.owner.public, job.id)
        forged = sign_opening(replace(opening, key_check="00" * 16), Identity.generate())
        return pb.Job(job_id=job.id, manifest=job.envelope, opening=forged)


class GivesAnotherJobsOpening(FakeCluster):
    def claimed(self, job: FakeJob) -> pb.Job:
        other = next(each for each in self.jobs.values() if each is not job)
        return pb.Job(job_id=job.id, manifest=job.envelope, opening=other.opening)


@pytest.mark.parametrize(
    ("twin", "reasons"),
    [
        (SwapsManifest, {Reason.WRONG_JOB}),
        (SignsManifestItself, {Reason.WRONG_JOB}),
        (ChangesAByte, {Reason.SIGNATURE, Reason.MALFORMED}),
        (SignsOpeningItself, {Reason.SIGNATURE}),
        (GivesAnotherJobsOpening, {Reason.WRONG_JOB}),
    ],
)
async def test_documents_that_the_owner_did_not_sign_for_this_job_are_refused(
    tmp_path: Path, twin: type[FakeCluster], reasons: set[Reason]
) -> None:
    cluster, job, end = await attack(twin, tmp_path, others=1)
    assert end.outcome == "refused"
    assert job.error is not None
    assert job.error.reason in reasons
    assert "Release" not in cluster.calls


# -- the bundle -------------------------------------------------------------------------------------------------------


class SendsAnotherJobsBundle(FakeCluster):
    def bundle_of(self, job: FakeJob) -> bytes:
        return next(each.bundle for each in self.jobs.values() if each is not job)


class SendsAnotherJobsBundleOfTheSameSize(FakeCluster):
    def bundle_of(self, job: FakeJob) -> bytes:
        return next(each.bundle for each in self.jobs.values() if each is not job)[: len(job.bundle)].ljust(
            len(job.bundle), b"\0"
        )


class FlipsAByteOfTheBundle(FakeCluster):
    def bundle_of(self, job: FakeJob) -> bytes:
        return job.bundle[:-1] + bytes([job.bundle[-1] ^ 1])


class CutsTheBundle(FakeCluster):
    def bundle_of(self, job: FakeJob) -> bytes:
        return job.bundle[:-20]


class AddsToTheBundle(FakeCluster):
    def bundle_of(self, job: FakeJob) -> bytes:
        return job.bundle + bytes(4096)


@pytest.mark.parametrize(
    "twin",
    [
        SendsAnotherJobsBundle,
        SendsAnotherJobsBundleOfTheSameSize,
        FlipsAByteOfTheBundle,
        CutsTheBundle,
        AddsToTheBundle,
    ],
)
async def test_any_other_bundle_is_refused_in_a_signed_statement(tmp_path: Path, twin: type[FakeCluster]) -> None:
    _, job, end = await attack(twin, tmp_path, others=1)
    assert end.outcome == "refused"
    statement = job.result()
    assert (statement.outcome, set(statement.artifacts), job.log()) == ("refused", {"log"}, "")
    assert statement.reason.startswith(("ARTIFACT", "DIGEST"))


# -- windows and leaves -----------------------------------------------------------------------------------------------


class GivesStaleWindows(FakeCluster):
    def windows(self) -> list[bytes]:
        return [each.window(self.now() - 10 * WINDOW_SECONDS) for each in self.custodians.values()]


class MakesUpWindows(FakeCluster):
    def windows(self) -> list[bytes]:
        made_up = [Custodian(each.name, each.jurisdiction) for each in self.custodians.values()]
        return [each.window(self.now()) for each in made_up]


@pytest.mark.parametrize(("twin", "words"), [(GivesStaleWindows, "not current"), (MakesUpWindows, "no custodian's")])
async def test_windows_that_are_stale_or_made_up_give_no_challenge(
    tmp_path: Path, twin: type[FakeCluster], words: str
) -> None:
    cluster, job, _ = await attack(twin, tmp_path)
    assert words in refusal(job, Reason.NO_QUORUM)
    assert "Release" not in cluster.calls


class HidesTwoWindows(FakeCluster):
    def windows(self) -> list[bytes]:
        return super().windows()[2:]


async def test_custodians_missing_from_the_challenge_refuse_and_the_rest_suffice(tmp_path: Path) -> None:
    _, job, end = await attack(HidesTwoWindows, tmp_path)
    assert end.outcome == "completed"
    assert end.custodians == ("de-1", "is-1", "jp-1")
    assert [each.custodian for each in EvidenceDocument.parse(job.evidence[0]).nonces] == ["de-1", "is-1", "jp-1"]


class AsksForAnotherRecipient(FakeCluster):
    """The coordinator has the shares sealed to a key of its own and shows the worker that leaf."""

    def leaf(self, job: FakeJob, document: EvidenceDocument, evidence: bytes) -> bytes:
        honest = Leaf.parse(super().leaf(job, document, evidence))
        return replace(honest, recipient_sha256="ab" * 32).to_bytes()


class AsksForAnotherJob(FakeCluster):
    def leaf(self, job: FakeJob, document: EvidenceDocument, evidence: bytes) -> bytes:
        honest = Leaf.parse(super().leaf(job, document, evidence))
        return replace(honest, manifest_sha256="cd" * 32).to_bytes()


class ShowsOldEvidence(FakeCluster):
    def leaf(self, job: FakeJob, document: EvidenceDocument, evidence: bytes) -> bytes:
        honest = Leaf.parse(super().leaf(job, document, evidence))
        return replace(honest, evidence_sha256="ef" * 32).to_bytes()


@pytest.mark.parametrize(
    ("twin", "reason"),
    [
        (AsksForAnotherRecipient, Reason.RECIPIENT),
        (AsksForAnotherJob, Reason.WRONG_JOB),
        (ShowsOldEvidence, Reason.LEAF),
    ],
)
async def test_leaf_must_name_this_release(tmp_path: Path, twin: type[FakeCluster], reason: Reason) -> None:
    _, job, _ = await attack(twin, tmp_path)
    refusal(job, reason)


# -- answers ----------------------------------------------------------------------------------------------------------


class OneLies(FakeCluster):
    """ch-1 signs a share with a contribution of its own making."""

    def share(self, custodian: Custodian, job: FakeJob, leaf: Leaf, recipient: bytes) -> Answer:
        if custodian.name != "ch-1":
            return super().share(custodian, job, leaf, recipient)
        values = custodian.contributions(job.subject)
        values[min(values)] = b"\x66" * 32
        sealed = seal(
            recipient, encode_share(values, custodian.lease), share_info(leaf.hash(), custodian.name, recipient)
        )
        now = window_of(self.now())
        return sign_answer(custodian.answer_key, job.subject, leaf.hash(), "ch-1", KEY, EPOCH, now, sealed)


class OneSendsRubbish(FakeCluster):
    """ch-1 signs a ciphertext that does not open."""

    def share(self, custodian: Custodian, job: FakeJob, leaf: Leaf, recipient: bytes) -> Answer:
        if custodian.name != "ch-1":
            return super().share(custodian, job, leaf, recipient)
        now = window_of(self.now())
        return sign_answer(custodian.answer_key, job.subject, leaf.hash(), "ch-1", KEY, EPOCH, now, bytes(2000))


@pytest.mark.parametrize("twin", [OneLies, OneSendsRubbish])
async def test_g6_lying_custodian_is_blamed_by_name_and_the_job_runs(tmp_path: Path, twin: type[FakeCluster]) -> None:
    _, job, end = await attack(twin, tmp_path)
    assert end.outcome == "completed"
    assert end.blamed == ("ch-1",)
    assert "ch-1" not in end.custodians
    assert job.log() == "ran\n"


class ThreeLie(FakeCluster):
    def share(self, custodian: Custodian, job: FakeJob, leaf: Leaf, recipient: bytes) -> Answer:
        if custodian.name in ("is-1", "jp-1"):
            return super().share(custodian, job, leaf, recipient)
        values = dict.fromkeys(custodian.contributions(job.subject), os.urandom(32))
        sealed = seal(
            recipient, encode_share(values, custodian.lease), share_info(leaf.hash(), custodian.name, recipient)
        )
        now = window_of(self.now())
        return sign_answer(custodian.answer_key, job.subject, leaf.hash(), custodian.name, KEY, EPOCH, now, sealed)


async def test_too_many_liars_give_no_key(tmp_path: Path) -> None:
    _, job, _ = await attack(ThreeLie, tmp_path)
    refusal(job, Reason.BLAME)


class ForgesAnAnswer(FakeCluster):
    """The coordinator changes ch-1's answer on the way: that is no custodian's fault."""

    def share(self, custodian: Custodian, job: FakeJob, leaf: Leaf, recipient: bytes) -> Answer:
        honest = super().share(custodian, job, leaf, recipient)
        forged = honest.sealed[:-1] + bytes([honest.sealed[-1] ^ 1])
        return replace(honest, sealed=forged) if custodian.name == "ch-1" else honest


class SpeaksForAnother(FakeCluster):
    def share(self, custodian: Custodian, job: FakeJob, leaf: Leaf, recipient: bytes) -> Answer:
        honest = super().share(custodian, job, leaf, recipient)
        return replace(honest, custodian="ch-2") if custodian.name == "ch-1" else honest


class AnswersForAnotherEpoch(FakeCluster):
    def share(self, custodian: Custodian, job: FakeJob, leaf: Leaf, recipient: bytes) -> Answer:
        if custodian.name != "ch-1":
            return super().share(custodian, job, leaf, recipient)
        honest = super().share(custodian, job, leaf, recipient)
        return sign_answer(
            custodian.answer_key, job.subject, leaf.hash(), "ch-1", KEY, EPOCH + 1, honest.window, honest.sealed
        )


class AnswersInAnOldWindow(FakeCluster):
    def share(self, custodian: Custodian, job: FakeJob, leaf: Leaf, recipient: bytes) -> Answer:
        honest = super().share(custodian, job, leaf, recipient)
        return replace(honest, window=honest.window - 9) if custodian.name == "ch-1" else honest


class InventsACustodian(FakeCluster):
    def share(self, custodian: Custodian, job: FakeJob, leaf: Leaf, recipient: bytes) -> Answer:
        honest = super().share(custodian, job, leaf, recipient)
        return replace(honest, custodian="xx-1") if custodian.name == "ch-1" else honest


@pytest.mark.parametrize(
    "twin", [ForgesAnAnswer, SpeaksForAnother, AnswersForAnotherEpoch, AnswersInAnOldWindow, InventsACustodian]
)
async def test_answer_that_does_not_verify_is_skipped_and_blames_nobody(
    tmp_path: Path, twin: type[FakeCluster]
) -> None:
    _, _, end = await attack(twin, tmp_path)
    assert (end.outcome, end.blamed) == ("completed", ())
    assert "ch-1" not in end.custodians


class ThreeRefuse(FakeCluster):
    def __init__(self) -> None:
        super().__init__()
        self.custodians["ch-1"].refusal = RefusedError(Reason.QUOTA, "alice asked too often")
        self.custodians["ch-2"].refusal = UnavailableError(Reason.UNAVAILABLE, "it is down")
        self.custodians["de-1"].refusal = RefusedError(Reason.REGION, "not allowed in CH")


async def test_no_quorum_names_who_refused_and_why(tmp_path: Path) -> None:
    _, job, end = await attack(ThreeRefuse, tmp_path)
    text = refusal(job, Reason.NO_QUORUM)
    for words in ("ch-1 (QUOTA: alice asked too often)", "ch-2 (UNAVAILABLE: it is down)", "de-1 (REGION: not allowed"):
        assert words in text
    assert job.error is not None
    assert set(job.error.details) >= {"ch-1", "ch-2", "de-1"}
    assert end.outcome == "refused"


class AllRefuse(FakeCluster):
    def __init__(self) -> None:
        super().__init__()
        for each in self.custodians.values():
            each.refusal = RefusedError(Reason.MEASUREMENT, "this measurement is not listed")


async def test_one_reason_of_all_custodians_is_the_jobs(tmp_path: Path) -> None:
    _, job, _ = await attack(AllRefuse, tmp_path)
    assert "every custodian's answer was no" in refusal(job, Reason.MEASUREMENT)


# -- a key that is another --------------------------------------------------------------------------------------------


class OpeningOfAnotherKey(FakeCluster):
    """Even the owner's word does not make a wrong key right: its key check is not met by what the custodians hold."""

    def claimed(self, job: FakeJob) -> pb.Job:
        opening = open_opening(job.opening, self.owner.public, job.id)
        other = Opening(opening.job_id, "11" * 16, opening.bundle_sha256, opening.bundle_size, True)
        return pb.Job(job_id=job.id, manifest=job.envelope, opening=sign_opening(other, self.owner))


async def test_key_that_misses_the_owners_key_check_is_not_used(tmp_path: Path) -> None:
    _, job, _ = await attack(OpeningOfAnotherKey, tmp_path)
    refusal(job, Reason.BLAME)
