"""Domain values as protobuf messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from keyquorum_coordinator.artifacts import ArtifactState
from keyquorum_coordinator.ceremonies import CeremonyRecord, KeyEpoch, Progress
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.jobs import Job, JobEvent
from keyquorum_coordinator.releases import ReleaseRecord
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.wire.errors import to_status

__all__ = [
    "artifact_message",
    "ceremony_message",
    "event_message",
    "health_messages",
    "job_message",
    "key_message",
    "outcome_message",
    "revocations_message",
]


def job_message(job: Job) -> pb.Job:
    message = pb.Job(
        job_id=job.job_id,
        state=job.state,
        owner=job.owner,
        key_id=job.key_id,
        epoch=job.epoch,
        created_at=job.created_at,
        updated_at=job.updated_at,
        worker=job.worker,
        manifest=job.manifest,
        opening=job.opening,
    )
    if job.error is not None:
        message.error.CopyFrom(to_status(job.error))
    return message


def event_message(event: JobEvent) -> pb.JobEvent:
    message = pb.JobEvent(sequence=event.sequence, time=event.time, state=event.state, detail=event.detail)
    if event.error is not None:
        message.error.CopyFrom(to_status(event.error))
    return message


def artifact_message(state: ArtifactState) -> pb.ArtifactState:
    return pb.ArtifactState(
        job_id=state.job_id,
        kind=state.kind,
        committed=state.committed,
        complete=state.complete,
        size=state.committed if state.complete else 0,
        sha256=state.sha256,
    )


def key_message(key: KeyEpoch) -> pb.Key:
    return pb.Key(
        key_id=key.key_id,
        epoch=key.epoch,
        state=key.state,
        certificate=key.certificate,
        ceremony_id=key.ceremony_id,
        created_at=key.created_at,
        retired_at=key.retired_at,
        ended_at=key.ended_at,
        stale=key.stale,
    )


def ceremony_event(progress: Progress) -> pb.CeremonyEvent:
    return pb.CeremonyEvent(
        ceremony_id=progress.ceremony_id,
        step=progress.step,
        custodian=progress.custodian,
        done=progress.done,
        total=progress.total,
        certificate=progress.certificate,
        waiting=progress.waiting,
        note=progress.note,
    )


def ceremony_message(record: CeremonyRecord) -> pb.Ceremony:
    message = pb.Ceremony(
        ceremony_id=record.ceremony_id,
        kind=record.kind,
        key_id=record.key_id,
        epoch=record.epoch,
        step=record.step,
        present=record.present,
        waiting=record.waiting,
        plan=record.plan,
        created_at=record.created_at,
        updated_at=record.updated_at,
        receipts=[
            pb.CeremonyReceipt(custodian=name, receipt=receipt) for name, receipt in sorted(record.receipts.items())
        ],
    )
    if record.error is not None:
        message.error.CopyFrom(to_status(record.error))
    return message


def outcome_message(job: Job, record: ReleaseRecord | None, proof: bytes) -> pb.Outcome:
    message = pb.Outcome(job=job_message(job), statement=job.statement)
    if record is not None:
        message.leaf = record.leaf
        message.leaf_proof = proof
        message.evidence = record.evidence
        for receipt in record.receipts:
            message.receipts.add(
                custodian=receipt.custodian,
                key_id=receipt.key_id,
                epoch=receipt.epoch,
                window=receipt.window,
                sealed_sha256=receipt.sealed_sha256,
                signature=receipt.signature,
                window_statement=receipt.window_statement,
            )
    return message


def health_messages(fanout: Fanout) -> list[pb.CustodianHealth]:
    out = []
    for name in sorted(fanout.links):
        link = fanout.links[name]
        error = link.last_error
        out.append(
            pb.CustodianHealth(
                custodian=name,
                jurisdiction=link.jurisdiction,
                reachable=link.connected,
                circuit=link.circuit_state(),
                latency_ms=1000 * link.latency.mean,
                latency_p95_ms=1000 * link.latency.p95,
                last_error=f"{error.reason}: {error.message}" if error is not None and not link.connected else "",
                clock_skew_ms=int(1000 * link.clock_skew),
            )
        )
    return out


def revocations_message(
    document: bytes, fanout: Fanout, problems: Mapping[str, str], changed: Iterable[Job] = ()
) -> pb.RevocationsState:
    """``problems``: by custodian. ``changed``: the jobs that a new document touched."""
    return pb.RevocationsState(
        document=document,
        custodians=[
            pb.CustodianRevocations(
                custodian=link.id,
                version=link.revocations[0],
                digest=link.revocations[1],
                problem=problems.get(link.id, ""),
            )
            for link in fanout.links.values()
        ],
        jobs=[job.job_id for job in changed],
    )
