"""A worker's telemetry, verified from the release of the key to the last record, and decrypted.

Each batch must be signed by the key that the worker's evidence binds, be the next of its chain, and stand in the
ledger, under a checkpoint that a quorum cosigned. A coordinator can keep the newest batches back, which shows: a chain
that is cut short has no last batch. It can drop, change, reorder or invent none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import grpc.aio

from keyquorum.session import Connection
from keyquorum.verify import VerifiedRelease
from keyquorum_core.derivation import DerivedKey
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.ledger.leaves import Telemetry as TelemetryLeaf
from keyquorum_core.ledger.log_trust import LogTrust
from keyquorum_core.ledger.merkle import verify_inclusion
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_core.quorum import Quorum
from keyquorum_core.roster import Roster
from keyquorum_core.signing import peek_payload
from keyquorum_core.telemetry import MAX_STATEMENT, TELEMETRY_TYPE, Batch, Chain, Record, open_records, worker_digest
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["BatchBytes", "Telemetry", "TelemetryRecord", "fetch_batches", "verify_telemetry"]

_SECONDS = 120.0
_MOST = 16384
_MOST_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class BatchBytes:
    """What the coordinator handed over. ``leaf_proof`` is empty while no quorum has cosigned the ledger so far."""

    statement: bytes
    content: bytes
    leaf: bytes
    leaf_proof: bytes


@dataclass(frozen=True, slots=True)
class TelemetryRecord:
    """``time``: unix seconds, by the worker's clock. ``logged``: whether the ledger was seen to have its batch."""

    time: int
    event: str
    values: dict[str, str | int]
    batch: int
    logged: bool

    def as_dict(self) -> dict[str, object]:
        return {
            "time": self.time,
            "event": self.event,
            "values": self.values,
            "batch": self.batch,
            "logged": self.logged,
        }


@dataclass(frozen=True, slots=True)
class Telemetry:
    """``complete``: the worker signed that nothing follows; ``reason``: why it had to give the key up, ``LEASE`` or
    empty. ``others``: batches of workers that had the job before, or whose key no release at hand shows: not read."""

    job_id: str
    worker_sha256: str
    records: tuple[TelemetryRecord, ...]
    batches: int
    complete: bool
    reason: str
    others: int

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return {
            "job_id": self.job_id,
            "worker_sha256": self.worker_sha256,
            "batches": self.batches,
            "complete": self.complete,
            "reason": self.reason,
            "others": self.others,
            "records": [record.as_dict() for record in self.records],
        }


async def fetch_batches(connection: Connection, job_id: str) -> list[BatchBytes]:
    """All that the coordinator has of a job's telemetry; nothing is verified. Raises ``TOO_LARGE``, and its errors."""
    out: list[BatchBytes] = []
    total = 0
    request = pb.GetTelemetryRequest(job_id=job_id)
    try:
        async with aclosing(connection.stream(connection.jobs.GetTelemetry, request, timeout=_SECONDS)) as batches:
            async for each in batches:
                total += len(each.statement) + len(each.content)
                if len(out) >= _MOST or total > _MOST_BYTES:
                    raise MalformedError(
                        Reason.TOO_LARGE, "the coordinator sends telemetry without end", expected=f"{_MOST_BYTES} bytes"
                    )
                out.append(BatchBytes(each.statement, each.content, each.leaf, each.leaf_proof))
    except grpc.aio.AioRpcError as error:
        raise connection.error(error) from None
    return out


def verify_telemetry(
    batches: Sequence[BatchBytes],
    release: VerifiedRelease,
    key: DerivedKey,
    *,
    roster: Roster,
    quorum: Quorum,
    now: int,
) -> Telemetry:
    """The records of the worker that ``release`` shows. Raises :class:`RefusedError` or :class:`MalformedError` at the
    first batch of it that does not hold: ``SIGNATURE…``, ``WRONG_JOB``, ``DIGEST``, ``LEAF``, ``LEDGER_…``,
    ``ARTIFACT``."""
    job, signer = release.binding.job_id, release.signer
    maker, worker = signer.to_bytes(), worker_digest(signer)
    purpose = key.purpose_key("telemetry")
    chain = Chain(job, signer)
    records: list[TelemetryRecord] = []
    others = 0
    for each in batches:
        if Batch.parse(peek_payload(each.statement, TELEMETRY_TYPE, "telemetry batch", MAX_STATEMENT)).worker != worker:
            others += 1
            continue
        batch = chain.take(each.statement)
        logged = _check_logged(each, batch, roster, quorum, now)
        opened: tuple[Record, ...] = open_records(purpose, each.content, batch, maker)
        records += [
            TelemetryRecord(record.time, record.event, dict(record.values), batch.sequence, logged) for record in opened
        ]
    reason = chain.last.reason if chain.last is not None else ""
    return Telemetry(job, worker, tuple(records), chain.length, chain.complete, reason, others)


def _check_logged(each: BatchBytes, batch: Batch, roster: Roster, quorum: Quorum, now: int) -> bool:
    """The leaf is of this batch, and stands in the ledger. False: nobody has cosigned that far yet."""
    leaf = TelemetryLeaf.parse(each.leaf)
    for what, expected, actual in (
        ("job", batch.job_id, leaf.job_id),
        ("worker", batch.worker, leaf.worker_sha256),
        ("sequence", str(batch.sequence), str(leaf.sequence)),
        ("batch before", batch.previous_sha256, leaf.previous_sha256),
        ("statement", hashlib.sha256(each.statement).hexdigest(), leaf.statement_sha256),
        ("content", batch.content_sha256, leaf.content_sha256),
        ("end", str(batch.last), str(leaf.last)),
    ):
        if expected != actual:
            raise RefusedError(
                Reason.LEAF, f"the ledger's leaf names another {what} than the batch", expected=expected, actual=actual
            )
    if not each.leaf_proof:
        return False
    if roster.log_key is None:
        raise RefusedError(Reason.LEDGER_ORIGIN, "the roster names no ledger, so nothing can be shown to be in it")
    proof = TlogProof.parse(each.leaf_proof)
    checkpoint = LogTrust(roster.log_key, roster.witnesses(), quorum).verify(proof.checkpoint, now=now).checkpoint
    verify_inclusion(leaf.hash(), proof.index, checkpoint.size, proof.proof, checkpoint.root)
    return True
