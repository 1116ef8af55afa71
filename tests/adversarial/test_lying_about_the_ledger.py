"""Coordinators that lie about the log to owners and workers, one class for each lie, over real TLS.

What they try on custodians is in ``test_forking_log.py``: together, no key and no result without its leaf (G3).
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from pathlib import Path

import pytest

from keyquorum_core.errors import Reason
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.ledger.notes import Note
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_gpu_worker.config import load_config
from keyquorum_gpu_worker.job import Surroundings
from keyquorum_gpu_worker.worker import Worker
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.client_world import World, the_world
from tests.support.deceit import deceived, reason_of_believing, reason_of_submitting_to, submit
from tests.support.fake_coordinator import FakeCoordinator, JobRecord
from tests.support.fake_worker_service import FakeCluster
from tests.support.ledger import MemoryLog


@pytest.fixture
def world() -> World:
    return the_world().honest()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a quorum that does not come."""
    monkeypatch.setattr("keyquorum.aio.COSIGNED_SECONDS", 0.2)
    monkeypatch.setattr(
        "keyquorum_gpu_worker.worker.Surroundings", lambda **parts: Surroundings(**parts, release_patience=0.0)
    )


# -- about the release behind a result ---------------------------------------------------------------------------------


class Liar(FakeCoordinator, ABC):
    """Lies about where the leaf of a finished job is; :meth:`proof` is the lie."""

    def leaf_proof(self, leaf: bytes, *, cosigned: bool = False) -> bytes:
        return self.proof(leaf) if cosigned else super().leaf_proof(leaf)

    @abstractmethod
    def proof(self, leaf: bytes) -> bytes:
        """Instead of the honest one."""


class HidesTheRelease(Liar):
    """Says that cosignatures are still to come, for ever."""

    def proof(self, leaf: bytes) -> bytes:
        return b""


class ShowsAnotherLeaf(Liar):
    """Shows a leaf that is in the log: not this job's."""

    def proof(self, leaf: bytes) -> bytes:
        self.ledger.append(leaf)
        return self.ledger.shown(b"another leaf", cosigned=True)


class ShowsAnUncosignedCheckpoint(Liar):
    """A log that only its owner has seen."""

    def proof(self, leaf: bytes) -> bytes:
        return self.ledger.shown(leaf)


class LacksAQuorum(Liar):
    """Two custodians cosigned; three are a quorum."""

    def proof(self, leaf: bytes) -> bytes:
        proof = TlogProof.parse(self.ledger.shown(leaf))
        return dataclasses.replace(proof, checkpoint=self.ledger.cosigned(by=["ch-1", "de-1"]).encode()).encode()


class LacksThePostQuantumCosignatures(Liar):
    """All custodians cosigned, with Ed25519 alone: what a quantum computer could make up."""

    def proof(self, leaf: bytes) -> bytes:
        proof = TlogProof.parse(self.ledger.shown(leaf))
        signed = self.ledger.cosigned()
        lines = [line for line in signed.note.signatures[2:] if len(line.signature) == 72]
        note = Note(signed.note.text, (*signed.note.signatures[:2], *lines))
        return dataclasses.replace(proof, checkpoint=note.encode()).encode()


class ForgesCosignatures(Liar):
    """Signs for the custodians itself."""

    def proof(self, leaf: bytes) -> bytes:
        proof = TlogProof.parse(self.ledger.shown(leaf))
        signed = self.ledger.cosigned()
        forged = [
            line if number < 2 else dataclasses.replace(line, signature=bytes(len(line.signature)))
            for number, line in enumerate(signed.note.signatures)
        ]
        return dataclasses.replace(proof, checkpoint=Note(signed.note.text, tuple(forged)).encode()).encode()


class RunsALogOfItsOwn(Liar):
    """The same name, other keys, and even the custodians' real cosignatures."""

    def proof(self, leaf: bytes) -> bytes:
        own = MemoryLog(LogSigner.generate(self.ledger.signer.origin), self.clock, self.ledger.witnesses)
        return own.shown(leaf, cosigned=True)


class NamesAnotherLog(Liar):
    def proof(self, leaf: bytes) -> bytes:
        own = MemoryLog(LogSigner.generate("elsewhere/ledger"), self.clock, self.ledger.witnesses)
        return own.shown(leaf, cosigned=True)


class CutsTheProof(Liar):
    def proof(self, leaf: bytes) -> bytes:
        for number in range(5):
            self.ledger.append(b"%d" % number)
        whole = self.ledger.shown(leaf, cosigned=True)
        lines = whole.split(b"\n")
        del lines[2]
        return b"\n".join(lines)


class SendsRubbish(Liar):
    def proof(self, leaf: bytes) -> bytes:
        return b"rubbish"


RESULTS = [
    (HidesTheRelease, Reason.LEDGER_UNWITNESSED),
    (ShowsAnotherLeaf, Reason.LEDGER_PROOF),
    (ShowsAnUncosignedCheckpoint, Reason.NO_QUORUM),
    (LacksAQuorum, Reason.NO_QUORUM),
    (LacksThePostQuantumCosignatures, Reason.NO_QUORUM),
    (ForgesCosignatures, Reason.SIGNATURE),
    (RunsALogOfItsOwn, Reason.SIGNATURE_MISSING),
    (NamesAnotherLog, Reason.LEDGER_ORIGIN),
    (CutsTheProof, Reason.LEDGER_PROOF),
    (SendsRubbish, Reason.MALFORMED),
]


@pytest.mark.parametrize(("liar", "reason"), RESULTS)
async def test_g3_no_result_whose_release_the_ledger_does_not_show(
    world: World, tmp_path: Path, liar: type[Liar], reason: Reason
) -> None:
    assert await reason_of_believing(liar(world), tmp_path) is reason


class CosignsLate(FakeCoordinator):
    """Honest, and its custodians take a moment."""

    asked_for_proof = 0

    def outcome(self, job: JobRecord) -> pb.Outcome:
        out = super().outcome(job)
        self.asked_for_proof += 1
        if self.asked_for_proof < 3:
            out.leaf_proof = b""
        return out


async def test_a_result_waits_for_cosignatures_and_comes_with_its_proof(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyquorum.aio.COSIGNED_SECONDS", 20.0)
    coordinator = CosignsLate(world)
    async with deceived(coordinator, tmp_path) as client:
        result = await client.result(await submit(client, tmp_path))
        assert coordinator.asked_for_proof == 3
        proof = TlogProof.parse(result.proof)
        leaf = next(iter(coordinator.jobs.values())).leaf
        proof.verify(leaf_hash(leaf), world.log.keys)


# -- about a release as it happens -------------------------------------------------------------------------------------


class ShowsOwnersNoProof(FakeCoordinator):
    def leaf_proof(self, leaf: bytes, *, cosigned: bool = False) -> bytes:
        return b""


class ShowsOwnersAnotherLog(FakeCoordinator):
    def leaf_proof(self, leaf: bytes, *, cosigned: bool = False) -> bytes:
        return MemoryLog(LogSigner.generate(self.ledger.signer.origin), self.clock).shown(leaf)


class ShowsOwnersAnotherLeaf(FakeCoordinator):
    def leaf_proof(self, leaf: bytes, *, cosigned: bool = False) -> bytes:
        self.ledger.append(b"before")
        return self.ledger.shown(b"another leaf")


@pytest.mark.parametrize(
    ("liar", "reason"),
    [
        (ShowsOwnersNoProof, Reason.LEDGER_PROOF),
        (ShowsOwnersAnotherLog, Reason.SIGNATURE_MISSING),
        (ShowsOwnersAnotherLeaf, Reason.LEDGER_PROOF),
    ],
)
async def test_g3_no_owner_takes_a_share_whose_leaf_is_not_shown(
    world: World, tmp_path: Path, liar: type[FakeCoordinator], reason: Reason
) -> None:
    assert await reason_of_submitting_to(liar(world), tmp_path) is reason


class ShowsWorkersNoProof(FakeCluster):
    def leaf_proof(self, leaf: bytes) -> bytes:
        return b""


class ShowsWorkersAnotherLog(FakeCluster):
    def leaf_proof(self, leaf: bytes) -> bytes:
        return MemoryLog(LogSigner.generate(self.log.origin), self.now).shown(leaf)


class ShowsWorkersAnotherLeaf(FakeCluster):
    def leaf_proof(self, leaf: bytes) -> bytes:
        self.ledger.append(b"before")
        return self.ledger.shown(b"another leaf")


@pytest.mark.parametrize(
    ("liar", "reason"),
    [
        (ShowsWorkersNoProof, Reason.LEDGER_PROOF),
        (ShowsWorkersAnotherLog, Reason.SIGNATURE_MISSING),
        (ShowsWorkersAnotherLeaf, Reason.LEDGER_PROOF),
    ],
)
async def test_g3_no_worker_takes_a_share_whose_leaf_is_not_shown(
    tmp_path: Path, liar: type[FakeCluster], reason: Reason
) -> None:
    cluster = liar()
    await cluster.start()
    scratch = tmp_path / "scratch"
    os.mkdir(scratch)
    worker = None
    try:
        job = cluster.submit({"main.py": b"print('ran')"})
        worker = Worker(load_config(cluster.worker_dir(tmp_path / "worker", scratch=scratch)))
        await worker.one(job.id)
    finally:
        if worker is not None:
            await worker.close()
        await cluster.stop()
    assert job.error is not None
    assert job.error.reason is reason
    assert job.statement == b"", "it never held the key"
