"""The worker's side of a release, without a network: windows, evidence, answers, and what is said without a key."""

from __future__ import annotations

import hashlib
import io
import time
from dataclasses import replace
from pathlib import Path

import pytest

from keyquorum_core.answers import Answers
from keyquorum_core.artifact import binding, encrypt_stream
from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.manifest import open_opening, payload
from keyquorum_core.release import WINDOW_SECONDS, Leaf
from keyquorum_gpu_worker.documents import JobDocuments
from keyquorum_gpu_worker.evidence import Collection
from keyquorum_gpu_worker.evidence.development import DevelopmentPlatform
from keyquorum_gpu_worker.keys import JobKeys, wipe
from keyquorum_gpu_worker.plaintext import unpack
from keyquorum_gpu_worker.release import make_evidence, read_windows
from keyquorum_gpu_worker.scratch import JobFolder
from keyquorum_gpu_worker.transfer import ChunkSource
from tests.support.fake_worker_service import FakeCluster, FakeJob
from tests.support.vendor import MEASUREMENT, development_chip


class Release:
    """A committee, a job, and the worker's part of one release, before the first answer."""

    def __init__(self) -> None:
        self.cluster = FakeCluster()
        self.job: FakeJob = self.cluster.submit({"main.py": b""})
        self.keys = JobKeys.generate("MLKEM768_X25519")
        self.challenge = read_windows(self.cluster.windows(), self.cluster.roster, self.cluster.now())
        sources = Collection([DevelopmentPlatform(development_chip(), MEASUREMENT)])
        self.evidence = make_evidence(self.challenge, self.keys, sources)
        self.document = EvidenceDocument.parse(self.evidence)
        opening = open_opening(self.job.opening, self.cluster.owner.public, self.job.id)
        self.documents = JobDocuments(
            self.job.id, self.job.manifest, payload(self.job.manifest), opening, self.cluster.quorum
        )
        self.answers = Answers(
            self.documents.binding,
            self.cluster.roster,
            self.cluster.quorum,
            self.keys.recipient,
            "worker",
            clock=time.time,
            key_check=opening.key_check_bytes,
        )
        self.ask()
        self.leaf = Leaf.parse(self.cluster.leaf(self.job, self.document, self.evidence))

    def ask(self) -> None:
        self.answers.ask(evidence=self.evidence, windows=self.challenge.windows.values())

    def give(self, *names: str) -> None:
        for name in names:
            custodian = self.cluster.custodians[name]
            share = self.cluster.share(custodian, self.job, self.leaf, self.document.hpke_key)
            self.answers.take(share, b"")

    def take(self, leaf: Leaf) -> None:
        self.answers.take_leaf(leaf.to_bytes(), self.cluster.leaf_proof(leaf.to_bytes()))


@pytest.fixture
def release() -> Release:
    return Release()


def test_evidence_holds_every_valid_window_and_passes_every_custodian(release: Release) -> None:
    assert [each.custodian for each in release.document.nonces] == sorted(release.cluster.custodians)
    for custodian in release.cluster.custodians.values():
        appraisal = release.cluster.judge(custodian, release.evidence)
        assert appraisal.hpke_key == release.keys.recipient.public
        assert appraisal.signing_key == release.keys.identity.public.to_bytes()


def test_only_a_custodians_own_signature_makes_its_window_count(release: Release) -> None:
    cluster = release.cluster
    now = cluster.now()
    old = cluster.custodians["ch-1"].window(now - 10 * WINDOW_SECONDS)
    foreign = FakeCluster().custodians["de-1"].window(now)
    found = read_windows([old, foreign, b"rubbish", *cluster.windows()[2:4]], cluster.roster, now)
    assert sorted(found.windows) == ["de-1", "is-1"]
    assert found.doubts["ch-1"].reason is Reason.STALE
    assert "ch-2" not in found.doubts


def test_latest_window_of_a_custodian_counts(release: Release) -> None:
    custodian = release.cluster.custodians["ch-1"]
    now = release.cluster.now()
    for order in ((0, WINDOW_SECONDS), (WINDOW_SECONDS, 0)):
        found = read_windows([custodian.window(now - age) for age in order], release.cluster.roster, now)
        assert found.windows["ch-1"].window == now // WINDOW_SECONDS


def test_quorum_gives_the_key_of_the_opening(release: Release) -> None:
    release.take(release.leaf)
    release.give("ch-1", "ch-2")
    assert release.answers.combination(confirmed=False) is None
    release.give("is-1")
    found = release.answers.combination(confirmed=False)
    assert found is not None
    assert found.key.root == release.job.key.root
    assert (found.used, found.confirmed) == (("ch-1", "ch-2", "is-1"), True)


def test_same_answer_twice_counts_once(release: Release) -> None:
    release.take(release.leaf)
    release.give("ch-1", "ch-1", "ch-1", "de-1", "de-1")
    assert release.answers.answered == ["ch-1", "de-1"]
    assert release.answers.combination(confirmed=False) is None


def test_answer_before_its_leaf_is_refused_and_the_leaf_may_not_change(release: Release) -> None:
    with pytest.raises(RefusedError, match="before the leaf"):
        release.give("ch-1")
    release.take(release.leaf)
    release.take(release.leaf)
    with pytest.raises(RefusedError, match="changed the leaf"):
        release.take(replace(release.leaf, time=release.leaf.time + 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"job_id": "a" * 26}, Reason.WRONG_JOB),
        ({"manifest_sha256": "0" * 64}, Reason.WRONG_JOB),
        ({"key_id": "k2"}, Reason.UNKNOWN_KEY),
        ({"epoch": 2}, Reason.EPOCH),
        ({"recipient_sha256": "0" * 64}, Reason.RECIPIENT),
        ({"recipient": "owner", "evidence_sha256": hashlib.sha256(b"").hexdigest()}, Reason.RECIPIENT),
        ({"evidence_sha256": "0" * 64}, Reason.LEAF),
    ],
)
def test_leaf_of_anything_else_is_refused(release: Release, change: dict[str, object], reason: Reason) -> None:
    with pytest.raises(RefusedError) as caught:
        release.take(replace(release.leaf, **change))  # type: ignore[arg-type]
    assert caught.value.reason is reason


def test_contributions_go_on_counting_over_several_requests(release: Release) -> None:
    release.take(release.leaf)
    release.give("ch-1", "de-1")
    release.ask()
    later = replace(release.leaf, time=release.leaf.time + 3)
    release.take(later)
    release.leaf = later
    release.give("jp-1")
    assert release.answers.combination(confirmed=False) is not None


def test_failure_names_everyone_and_says_whether_asking_again_helps(release: Release) -> None:
    release.take(release.leaf)
    release.give("ch-1")
    release.answers.take_refusal("ch-2", RefusedError(Reason.QUOTA, "too many"))
    release.answers.take_refusal("xx-9", RefusedError(Reason.QUOTA, "of nobody"))
    error = release.answers.failure()
    assert isinstance(error, UnavailableError)
    assert error.reason is Reason.NO_QUORUM
    assert error.details == {
        "ch-2": "QUOTA: too many",
        "de-1": "no answer",
        "is-1": "no answer",
        "jp-1": "no answer",
    }
    assert release.answers.worth_asking_again()
    for name in ("de-1", "is-1", "jp-1"):
        release.answers.take_refusal(name, RefusedError(Reason.REGION, "not here"))
    assert not release.answers.worth_asking_again()
    release.answers.take_refusal("jp-1", RefusedError(Reason.STALE, "old nonce"))
    assert release.answers.worth_asking_again()


def test_no_window_means_no_evidence(release: Release) -> None:
    empty = read_windows([], release.cluster.roster, release.cluster.now())
    with pytest.raises(UnavailableError, match="nothing to attest to"):
        make_evidence(empty, release.keys, Collection([DevelopmentPlatform(development_chip(), MEASUREMENT)]))


def test_keys_show_nothing(release: Release) -> None:
    shown = repr(release.keys)
    assert release.keys.recipient.to_seed_bytes().hex() not in shown
    assert shown == "JobKeys()"
    data = bytearray(b"plaintext")
    wipe(data)
    assert data == b""


def test_bundle_is_unpacked_private_and_whole(tmp_path: Path) -> None:
    cluster = FakeCluster()
    files = {"main.py": b"x", "a/b/c": bytes(3 << 20)}
    job = cluster.submit(files)
    with JobFolder(tmp_path, None) as folder:
        unpack(
            job.key.purpose_key("bundle"),
            io.BytesIO(job.bundle),
            binding(job.id, "bundle"),
            folder,
            job.manifest,
            None,
        )
        found = {path.relative_to(folder.work).as_posix() for path in folder.work.rglob("*") if path.is_file()}
        assert found == set(files)
        assert {path.stat().st_mode & 0o077 for path in folder.work.rglob("*")} == {0}
    assert list(tmp_path.iterdir()) == []


def test_bundle_of_another_kind_or_key_does_not_open(tmp_path: Path) -> None:
    cluster = FakeCluster()
    job = cluster.submit({"main.py": b"x"})
    for ciphertext in (
        _sealed(job.key.purpose_key("result"), binding(job.id, "bundle")),
        _sealed(job.key.purpose_key("bundle"), binding(job.id, "result")),
    ):
        with JobFolder(tmp_path, None) as folder, pytest.raises(RefusedError) as caught:
            unpack(
                job.key.purpose_key("bundle"),
                io.BytesIO(ciphertext),
                binding(job.id, "bundle"),
                folder,
                job.manifest,
                None,
            )
        assert caught.value.reason is Reason.ARTIFACT


def _sealed(key: bytes, bound: bytes) -> bytes:
    out = io.BytesIO()
    encrypt_stream(key, io.BytesIO(b"anything"), out, bound)
    return out.getvalue()


def test_chunks_pass_between_threads_and_errors_with_them() -> None:
    source = ChunkSource()
    for item in (b"abc", b"de", UnavailableError(Reason.UNAVAILABLE, "broken")):
        assert source.feed(item)
    assert [source.read(2), source.read(2), source.read(9)] == [b"ab", b"c", b"de"]
    with pytest.raises(KeyquorumError, match="broken"):
        source.read(1)
    assert source.read(1) == b""
    source.close()
    assert not source.feed(b"more")
