"""Workers' telemetry: signed batches taken in order, kept with their encrypted records, told to the ledger.

A batch is taken from the worker that the coordinator knows to have got the job's key, under the key that its evidence
binds, and only as the next of its chain. It may come after the worker lost the job or the job ended: that is when a
worker says that it wiped. What the coordinator checks here keeps its store in order; owners check all of it again.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import Database, TelemetryRow
from keyquorum_coordinator.jobs import JobStore
from keyquorum_coordinator.outbox import enter, request_id
from keyquorum_coordinator.releases import Releases
from keyquorum_coordinator.sequencer import Sequencer
from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.attestation.naming import claims_development
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError
from keyquorum_core.ledger.leaves import Telemetry as TelemetryLeaf
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_core.signing import PublicIdentity
from keyquorum_core.telemetry import MAX_CONTENT, NO_BATCH, Batch, check_content, open_batch

__all__ = ["StoredBatch", "TelemetryStore"]

MAX_JOB_BYTES = 64 << 20
"""Encrypted records kept of one job, of all its workers."""
_READ = 32


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """As the owner gets it. ``leaf_proof`` is empty until a quorum cosigned the ledger so far."""

    worker: str
    statement: bytes
    content: bytes
    leaf: bytes
    leaf_proof: bytes


class TelemetryStore:
    """``on_leaf`` hears that a batch's leaf is in the outbox."""

    def __init__(
        self,
        database: Database,
        jobs: JobStore,
        releases: Releases,
        sequencer: Sequencer,
        *,
        clock: Callable[[], float] = time.time,
        on_leaf: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._releases = releases
        self._sequencer = sequencer
        self._clock = clock
        self._on_leaf = on_leaf

    async def take(self, peer: str, job_id: str, statement: bytes, content: bytes) -> None:
        """Keep the next batch of this worker's chain; one that is kept already again.

        Raises ``TOO_LARGE``, ``STATE`` (no release to this worker is on record: try again), ``ROLE`` (another
        worker's job), as :func:`open_batch`, ``DIGEST`` (not the next, or other records), ``QUOTA``.
        """
        if len(content) > MAX_CONTENT:
            raise MalformedError(
                Reason.TOO_LARGE, "a telemetry batch is too large", expected=MAX_CONTENT, actual=len(content)
            )
        evidence = await self._evidence(peer, job_id)
        signer = PublicIdentity.from_bytes(EvidenceDocument.parse(evidence).signing_key)
        batch = await asyncio.to_thread(open_batch, statement, signer, job_id)
        check_content(content, batch)
        now = int(self._clock())
        await self._database.write(lambda s: _store(s, peer, batch, statement, content, evidence, now))
        self._on_leaf()

    async def batches(self, job_id: str) -> AsyncGenerator[StoredBatch]:
        """All of a job's, worker by worker in the order they began, each chain in order."""
        after = 0
        while True:
            query = select(TelemetryRow).where(TelemetryRow.job_id == job_id, TelemetryRow.number > after)
            rows = await self._database.read(
                lambda s, q=query: [  # type: ignore[misc]
                    (r.number, r.peer, r.worker_sha256, r.sequence, r.statement, r.content, r.leaf)
                    for r in s.scalars(q.order_by(TelemetryRow.number).limit(_READ))
                ]
            )
            for number, peer, worker, sequence, statement, content, leaf in rows:
                after = number
                yield StoredBatch(peer, statement, content, leaf, await self._proof(job_id, worker, sequence, leaf))
            if len(rows) < _READ:
                return

    async def _proof(self, job_id: str, worker: str, sequence: int, leaf: bytes) -> bytes:
        entry = await self._sequencer.append(leaf, request_id(TelemetryLeaf.TYPE, job_id, worker, str(sequence)))
        vouched = self._sequencer.witnessed
        if vouched is None or vouched.checkpoint.size <= entry.index:
            return b""
        path = await self._sequencer.inclusion(entry.index, vouched.checkpoint.size)
        return TlogProof(entry.index, path, vouched.encode()).encode()

    async def _evidence(self, peer: str, job_id: str) -> bytes:
        """The evidence whose key this worker's batches are signed with."""
        begun = select(TelemetryRow.evidence).where(TelemetryRow.job_id == job_id, TelemetryRow.peer == peer)
        latest = begun.where(TelemetryRow.sequence == 0).order_by(TelemetryRow.number.desc()).limit(1)
        job = await self._jobs.get(job_id)
        if job.worker == peer:
            record = await self._releases.recorded(job_id)
            if record is not None and record.worker == peer:
                return record.evidence
        known = await self._database.read(lambda s: s.scalar(latest))
        if known is not None:
            return known
        if job.worker != peer:
            raise RefusedError(Reason.ROLE, f"worker {peer} does not hold job {job_id}", actual=job.state)
        raise StateError(
            Reason.STATE, f"no release of job {job_id} to worker {peer} is on record", next_step="Try again later"
        )


def _store(
    session: Session, peer: str, batch: Batch, statement: bytes, content: bytes, evidence: bytes, now: int
) -> None:
    chain = (TelemetryRow.job_id == batch.job_id) & (TelemetryRow.worker_sha256 == batch.worker)
    digest = hashlib.sha256(statement).hexdigest()
    newest = session.scalars(select(TelemetryRow).where(chain).order_by(TelemetryRow.sequence.desc()).limit(1)).first()
    if newest is not None and batch.sequence <= newest.sequence:
        same = session.scalar(select(TelemetryRow.statement).where(chain, TelemetryRow.sequence == batch.sequence))
        if same == statement:
            return
        raise RefusedError(Reason.DIGEST, "another telemetry batch is stored at this place", actual=batch.sequence)
    expected = (0, NO_BATCH) if newest is None else (newest.sequence + 1, _sha256(newest.statement))
    if (batch.sequence, batch.previous_sha256) != expected or (newest is not None and newest.last):
        raise RefusedError(
            Reason.DIGEST,
            "the telemetry batch is not the next of its chain",
            expected=f"batch {expected[0]} after {expected[1]}",
            actual=f"batch {batch.sequence} after {batch.previous_sha256}",
        )
    kept = session.scalar(
        select(func.coalesce(func.sum(TelemetryRow.size), 0)).where(TelemetryRow.job_id == batch.job_id)
    )
    if (kept or 0) + len(content) > MAX_JOB_BYTES:
        raise RefusedError(
            Reason.QUOTA, "the job has too much telemetry", expected=f"at most {MAX_JOB_BYTES} bytes", actual=kept
        )
    leaf = TelemetryLeaf(
        job_id=batch.job_id,
        worker_sha256=batch.worker,
        evidence_sha256=_sha256(evidence),
        sequence=batch.sequence,
        previous_sha256=batch.previous_sha256,
        statement_sha256=digest,
        content_sha256=batch.content_sha256,
        records=batch.records,
        last=batch.last,
        development=claims_development(EvidenceDocument.parse(evidence)),
        time=now,
    )
    session.add(
        TelemetryRow(
            job_id=batch.job_id,
            worker_sha256=batch.worker,
            sequence=batch.sequence,
            peer=peer,
            statement=statement,
            content=content,
            size=len(content),
            leaf=leaf.to_bytes(),
            last=batch.last,
            evidence=evidence if batch.sequence == 0 else None,
        )
    )
    session.flush()
    enter(session, leaf, batch.job_id, batch.worker, str(batch.sequence))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
