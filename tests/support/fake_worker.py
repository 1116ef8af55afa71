"""The worker of :mod:`tests.support.fake_coordinator`: a job from the release of its key to its signed results."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from keyquorum_core.artifact import binding, decrypt_stream, encrypt_stream
from keyquorum_core.attestation.evidence import EvidenceDocument, EvidenceItem, WindowNonce
from keyquorum_core.bundle import read_bundle, write_bundle
from keyquorum_core.derivation import Combiner, context
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError
from keyquorum_core.manifest import (
    ArtifactDigest,
    ResultStatement,
    open_opening,
    sign_result,
    subject,
)
from keyquorum_core.release import Answer, open_share
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_core.telemetry import (
    NO_BATCH,
    Batch,
    Record,
    seal_records,
    sign_batch,
    worker_digest,
)
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.client_world import id_of
from tests.support.vendor import development_chip

if TYPE_CHECKING:
    from tests.support.fake_coordinator import FakeCoordinator, JobRecord


class Worker:
    """An attested worker, as far as its owner can tell: real keys, real releases, evidence of no hardware."""

    def __init__(self, coordinator: FakeCoordinator, job: JobRecord) -> None:
        self.coordinator = coordinator
        self.job = job
        self.recipient = RecipientKey.generate()
        self.identity = Identity.generate()

    def work(self) -> None:
        job, coordinator = self.job, self.coordinator
        job_id = id_of(job.manifest_envelope)
        job.evidence = self.evidence()
        leaf = coordinator.leaf_for_worker(job, self)
        job.leaf = leaf.to_bytes()
        opening = open_opening(job.opening, job.manifest.owner_identity, job_id)
        job_context = context(job.manifest.key_id, job.manifest.epoch, "job", subject(job.payload))
        combiner = Combiner(coordinator.world.quorum, job_context, opening.key_check_bytes)
        for event in coordinator.answers(job, leaf, self.recipient.public):
            coordinator.seen.append(event.SerializeToString())
            if event.answer.WhichOneof("outcome") != "share":
                continue
            got = event.answer.share
            answer = Answer(event.answer.custodian, got.key_id, got.epoch, got.window, got.sealed, got.signature)
            try:
                opened = open_share(answer, self.recipient, leaf.hash(), coordinator.world.quorum)
            except KeyquorumError as error:
                combiner.reject(answer.custodian, str(error.reason))
            else:
                combiner.add(answer.custodian, opened.contributions)
            job.receipts.append(
                pb.Receipt(
                    custodian=answer.custodian,
                    key_id=got.key_id,
                    epoch=got.epoch,
                    window=got.window,
                    sealed_sha256=hashlib.sha256(got.sealed).digest(),
                    signature=got.signature,
                    window_statement=event.window_statement,
                )
            )
        key = combiner.conclude().key
        plain = io.BytesIO()
        decrypt_stream(key.purpose_key("bundle"), io.BytesIO(job.artifacts["bundle"]), plain, binding(job_id, "bundle"))
        plain.seek(0)
        files = {file.name: file.reader.read(file.size) or b"" for file in read_bundle(plain)}
        if {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} != {
            each.name: each.sha256 for each in job.manifest.subjects
        }:
            raise RefusedError(Reason.BUNDLE, "the bundle is not the manifest's")
        code, results, log = coordinator.run(files)
        tar = io.BytesIO()
        write_bundle([(name, len(data), io.BytesIO(data)) for name, data in results.items()], tar)
        self._store(job_id, "result", key.purpose_key("result"), tar.getvalue())
        self._store(job_id, "log", key.purpose_key("telemetry"), log)
        job.statement = self.statement(job_id, code)
        job.telemetry = self.tell(job_id, key.purpose_key("telemetry"), 3)
        coordinator._move(job, "completed" if code == 0 else "failed")

    def tell(self, job_id: str, key: bytes, count: int) -> list[pb.TelemetryBatch]:
        """A whole chain."""
        out: list[pb.TelemetryBatch] = []
        now, maker = int(self.coordinator.clock()), self.identity.public.to_bytes()
        for sequence in range(count):
            record = Record(now, "usage" if sequence < count - 1 else "ended", {"number": sequence})
            content = seal_records(key, [record], job_id, maker, sequence)
            batch = Batch(
                job_id=job_id,
                worker=worker_digest(self.identity.public),
                sequence=sequence,
                previous_sha256=hashlib.sha256(out[-1].statement).hexdigest() if out else NO_BATCH,
                first_at=now,
                last_at=now,
                records=1,
                content_sha256=hashlib.sha256(content).hexdigest(),
                content_size=len(content),
                last=sequence == count - 1,
            )
            out.append(pb.TelemetryBatch(statement=sign_batch(batch, self.identity), content=content))
        return out

    def evidence(self) -> bytes:
        nonces = tuple(
            WindowNonce(name, each.window(0).window, each.window(0).nonce_bytes)
            for name, each in sorted(self.coordinator.world.custodians.items())
        )
        items = (EvidenceItem("sev-snp", b"a report", tuple(development_chip().endorsements)),)
        return EvidenceDocument(nonces, self.recipient.public, self.identity.public.to_bytes(), items).to_bytes()

    def _store(self, job_id: str, kind: str, key: bytes, data: bytes) -> None:
        out = io.BytesIO()
        encrypt_stream(key, io.BytesIO(data), out, binding(job_id, kind, self.identity.public.to_bytes()))
        self.job.artifacts[kind] = bytearray(out.getvalue())

    def statement(self, job_id: str, code: int, named: Mapping[str, bytes | bytearray] | None = None) -> bytes:
        artifacts = {
            kind: ArtifactDigest(hashlib.sha256(data).hexdigest(), len(data))
            for kind, data in (self.job.artifacts if named is None else named).items()
            if kind != "bundle"
        }
        return sign_result(
            ResultStatement(
                job_id=job_id,
                worker=self.identity.public.fingerprint,
                exit_code=code,
                outcome="completed" if code == 0 else "failed",
                reason="" if code == 0 else f"exit code {code}",
                artifacts=artifacts,
                started_at=10,
                finished_at=11,
            ),
            self.identity,
        )
