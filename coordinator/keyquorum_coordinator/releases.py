"""Releases of a job's key: to its owner, or to the worker that holds the job, by a quorum of custodians.

The coordinator enters the leaf in the ledger, asks everybody and passes answers on as they come. It keeps, of a release
to a worker, what the owner needs to check it later (leaf, evidence, and the answers without their shares), and writes
that after the answers have left, once a quorum is there and once more when late answers came.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from keyquorum_coordinator.admission import AdmittedRequest, facts_of
from keyquorum_coordinator.certified import CertifiedEpochs
from keyquorum_coordinator.database import Database, JobRow, ReceiptRow, ReleaseRow
from keyquorum_coordinator.fanout import Arrival, Fanout, Release
from keyquorum_coordinator.job_states import JobState
from keyquorum_coordinator.jobs import Job, JobStore
from keyquorum_coordinator.sequencer import Entry, Sequencer
from keyquorum_coordinator.witnesses import Witnesses
from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.attestation.naming import claims_development
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_core.presentation import MAX_PRESENTATION
from keyquorum_core.quorum import Quorum
from keyquorum_core.release import Leaf
from keyquorum_protos.v1 import custodian_pb2 as pb

__all__ = ["ReceiptRecord", "ReleaseRecord", "Releases", "Shown"]

_log = structlog.get_logger("releases")


@dataclass(frozen=True, slots=True)
class ReceiptRecord:
    custodian: str
    key_id: str
    epoch: int
    window: int
    sealed_sha256: bytes
    signature: bytes
    window_statement: bytes


@dataclass(frozen=True, slots=True)
class Shown:
    """A release's leaf, and where the ledger shows it: a C2SP tlog-proof with the checkpoint it was entered under."""

    leaf: bytes
    proof: bytes


@dataclass(frozen=True, slots=True)
class ReleaseRecord:
    worker: str
    leaf: bytes
    leaf_index: int
    evidence: bytes
    receipts: tuple[ReceiptRecord, ...]


class Releases:
    """``on_release``: hears the seconds to a quorum, or None, and the recipient of each release."""

    def __init__(
        self,
        fanout: Fanout,
        sequencer: Sequencer,
        witnesses: Witnesses,
        jobs: JobStore,
        database: Database,
        certified: CertifiedEpochs,
        *,
        clock: Callable[[], float] = time.time,
        on_release: Callable[[str, float | None], None] = lambda recipient, seconds: None,
    ) -> None:
        self._fanout = fanout
        self._sequencer = sequencer
        self._witnesses = witnesses
        self._jobs = jobs
        self._database = database
        self._certified = certified
        self._clock = clock
        self._on_release = on_release
        self._tasks: set[asyncio.Task[None]] = set()
        self._recording: dict[str, asyncio.Task[None]] = {}

    async def to_owner(self, job: Job) -> AsyncGenerator[tuple[Shown, Arrival]]:
        """(leaf, answer) from every custodian. Raises ``NO_QUORUM`` at the end when there was no quorum, ``QUOTA``, and
        as :meth:`Sequencer.append` when the ledger does not take the leaf: then nobody was asked."""
        facts = facts_of(job)
        leaf = self._leaf(job, facts.manifest_sha256, "owner", facts.owner_recipient_sha256, Leaf.NO_EVIDENCE)
        entry, shown = await self._enter(leaf)
        quorum = await self._rule(job.key_id, job.epoch)
        release = await self._witnesses.release(entry, pb.ReleaseRequest(manifest=job.manifest, leaf=leaf), quorum)
        opened: asyncio.Task[None] | None = None
        try:
            async with release:
                async for arrival in release:
                    yield shown, arrival
        finally:
            self._on_release("owner", release.quorum_after)
            if release.quorum_after is not None and job.state is JobState.SUBMITTED:
                opened = self._spawn(self._opened(job.job_id))
        if opened is not None:
            await asyncio.wait([opened])
        release.conclude()

    async def of_key(self, admitted: AdmittedRequest) -> AsyncGenerator[tuple[Shown, Arrival]]:
        """As :meth:`to_owner`, for the key that a key request asks for."""
        recipient = hashlib.sha256(admitted.request.owner_hpke).hexdigest()
        leaf = self._leaf(admitted, admitted.payload_sha256, "owner", recipient, Leaf.NO_EVIDENCE)
        entry, shown = await self._enter(leaf)
        quorum = await self._rule(admitted.request.key_id, admitted.request.epoch)
        release = await self._witnesses.release(entry, pb.ReleaseRequest(manifest=admitted.envelope, leaf=leaf), quorum)
        try:
            async with release:
                async for arrival in release:
                    yield shown, arrival
        finally:
            self._on_release("owner", release.quorum_after)
        release.conclude()

    async def to_worker(self, job: Job, evidence: bytes, presentation: bytes) -> AsyncGenerator[tuple[Shown, Arrival]]:
        """As :meth:`to_owner`, for the worker that holds the job and signed ``presentation``, which is for custodians
        to judge. Raises also for a malformed evidence document, or a presentation that is too large."""
        facts = facts_of(job)
        document = EvidenceDocument.parse(evidence)
        if len(presentation) > MAX_PRESENTATION:
            raise MalformedError(
                Reason.TOO_LARGE,
                "the presentation is too large",
                expected=f"at most {MAX_PRESENTATION} bytes",
                actual=len(presentation),
            )
        leaf = self._leaf(
            job,
            facts.manifest_sha256,
            "worker",
            hashlib.sha256(document.hpke_key).hexdigest(),
            hashlib.sha256(evidence).hexdigest(),
            development=claims_development(document),
        )
        entry, shown = await self._enter(leaf)
        request = pb.ReleaseRequest(manifest=job.manifest, evidence=evidence, leaf=leaf, presentation=presentation)
        quorum = await self._rule(job.key_id, job.epoch)
        release = await self._witnesses.release(entry, request, quorum)
        record = _Record(job, leaf, entry.index, evidence, quorum)
        try:
            async for arrival in release:
                # Begun before the answer that may complete the worker's quorum leaves, and not waited for.
                if record.take(arrival) and self._qualified(record) and not record.begun:
                    self._write_soon(record)
                yield shown, arrival
        finally:
            self._on_release("worker", release.quorum_after)
            if self._qualified(record):
                release.close()
                self._write_soon(record)
            else:
                # A worker that asked before counts those answers too, and hangs up sooner than a quorum is here: the
                # owner still has to see one.
                self._write_soon(record, release)
        pending = self._recording.get(job.job_id)
        if pending is not None:  # who stays to the end may rely on the record
            await asyncio.wait([pending])
        release.conclude()

    async def recorded(self, job_id: str) -> ReleaseRecord | None:
        """The latest release to a worker, once its record is written."""
        pending = self._recording.get(job_id)
        if pending is not None:
            await asyncio.wait([pending])
        return await self._database.read(lambda session: _load(session, job_id))

    async def proof(self, record: ReleaseRecord) -> bytes:
        """That the ledger shows the release, in the newest checkpoint that a quorum cosigned: a C2SP tlog-proof. Empty
        while that one is older than the leaf."""
        vouched = self._sequencer.witnessed
        if vouched is None or vouched.checkpoint.size <= record.leaf_index:
            return b""
        path = await self._sequencer.inclusion(record.leaf_index, vouched.checkpoint.size)
        return TlogProof(record.leaf_index, path, vouched.encode()).encode()

    async def settled(self) -> None:
        """Wait for records being written."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _enter(self, leaf: bytes) -> tuple[Entry, Shown]:
        self._fanout.require_room()
        with self._fanout.precedence.release():
            entry = await self._sequencer.append(leaf, b"release:" + hashlib.sha256(leaf).digest())
        return entry, Shown(leaf, TlogProof(entry.index, entry.proof, entry.checkpoint.encode()).encode())

    def _leaf(
        self,
        job: Job | AdmittedRequest,
        manifest_sha256: str,
        recipient: str,
        recipient_sha256: str,
        evidence: str,
        *,
        development: bool = False,
    ) -> bytes:
        named = job.request if isinstance(job, AdmittedRequest) else job
        return Leaf(
            job_id=job.job_id,
            manifest_sha256=manifest_sha256,
            recipient_sha256=recipient_sha256,
            evidence_sha256=evidence,
            key_id=named.key_id,
            epoch=named.epoch,
            time=int(self._clock()),
            recipient=recipient,
            development=development,
        ).to_bytes()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _opened(self, job_id: str) -> None:
        try:
            await self._jobs.opened(job_id)
        except KeyquorumError as error:  # committing the opening makes up for it
            _log.warning("release.opened_not_recorded", job=job_id, reason=str(error.reason))

    def _qualified(self, record: _Record) -> bool:
        return record.quorum.is_qualified(record.receipts)

    async def _rule(self, key_id: str, epoch: int) -> Quorum:
        """The rule that the epoch was certified with; the roster's while the certificate is not here yet."""
        certified = await self._certified.of(key_id, epoch)
        return self._fanout.quorum if certified is None else certified.quorum

    def _write_soon(self, record: _Record, rest: Release | None = None) -> None:
        """Write what came, and what still comes from ``rest`` until it makes a quorum, after earlier writes."""
        record.begun = True
        job_id = record.job.job_id
        task = self._spawn(self._write(record, rest, self._recording.get(job_id)))
        self._recording[job_id] = task

        def forget(done: asyncio.Task[None]) -> None:
            if self._recording.get(job_id) is done:
                del self._recording[job_id]

        task.add_done_callback(forget)

    async def _write(self, record: _Record, rest: Release | None, before: asyncio.Task[None] | None) -> None:
        if rest is not None:
            async with rest:
                async for arrival in rest:
                    if record.take(arrival) and self._qualified(record):
                        break
        if before is not None:
            await asyncio.wait([before])
        receipts = list(record.receipts.values())
        if not self._qualified(record) or len(receipts) == record.written:
            return  # nothing an owner could check (an earlier release, if there is one, still counts), or nothing new
        now = int(self._clock())
        try:
            await self._database.write(lambda session: _store(session, record, receipts, now))
            record.written = len(receipts)
        except KeyquorumError as error:
            _log.error("release.not_recorded", job=record.job.job_id, reason=str(error.reason))


class _Record:
    """A release to a worker, as it comes to be known."""

    def __init__(self, job: Job, leaf: bytes, leaf_index: int, evidence: bytes, quorum: Quorum) -> None:
        self.quorum = quorum
        self.job = job
        self.leaf = leaf
        self.leaf_index = leaf_index
        self.evidence = evidence
        self.receipts: dict[str, ReceiptRecord] = {}
        self.begun = False
        self.written = 0

    def take(self, arrival: Arrival) -> bool:
        """Whether it was a share."""
        if not arrival.answer.HasField("share"):
            return False
        self.receipts[arrival.custodian] = _receipt(arrival)
        return True


def _receipt(arrival: Arrival) -> ReceiptRecord:
    share = arrival.answer.share
    return ReceiptRecord(
        custodian=arrival.custodian,
        key_id=share.key_id[:64],
        epoch=min(share.epoch, 2**53 - 1),
        window=min(share.window, 2**53 - 1),
        sealed_sha256=hashlib.sha256(share.sealed).digest(),
        signature=share.signature[:64],
        window_statement=arrival.window_statement,
    )


def _store(session: Session, record: _Record, receipts: Iterable[ReceiptRecord], now: int) -> None:
    job = record.job
    present = session.get(JobRow, job.job_id)
    if present is None or present.worker != job.worker:
        return  # taken away meanwhile: another worker's release will be the one that counts
    session.execute(delete(ReceiptRow).where(ReceiptRow.job_id == job.job_id))
    session.merge(
        ReleaseRow(
            job_id=job.job_id,
            worker=job.worker,
            leaf=record.leaf,
            leaf_index=record.leaf_index,
            evidence=record.evidence,
            recorded_at=now,
        )
    )
    session.flush()
    for receipt in receipts:
        session.add(
            ReceiptRow(
                job_id=job.job_id,
                custodian=receipt.custodian,
                key_id=receipt.key_id,
                epoch=receipt.epoch,
                window=receipt.window,
                sealed_sha256=receipt.sealed_sha256,
                signature=receipt.signature,
                window_statement=receipt.window_statement,
            )
        )


def _load(session: Session, job_id: str) -> ReleaseRecord | None:
    row = session.get(ReleaseRow, job_id)
    if row is None:
        return None
    return ReleaseRecord(row.worker, row.leaf, row.leaf_index, row.evidence, tuple(_load_receipts(session, job_id)))


def _load_receipts(session: Session, job_id: str) -> list[ReceiptRecord]:
    query = select(ReceiptRow).where(ReceiptRow.job_id == job_id).order_by(ReceiptRow.custodian)
    return [
        ReceiptRecord(
            row.custodian, row.key_id, row.epoch, row.window, row.sealed_sha256, row.signature, row.window_statement
        )
        for row in session.scalars(query)
    ]
