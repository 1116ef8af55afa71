"""What the coordinator hands over about a job that is over, as values to verify; and why there may be nothing."""

from __future__ import annotations

from keyquorum.jobs import FINAL_STATES, Job
from keyquorum.verify import OutcomeBytes
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError
from keyquorum_core.release import Receipt
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["no_statement", "outcome_from_wire"]


def outcome_from_wire(message: pb.Outcome) -> OutcomeBytes:
    """Nothing is verified here."""
    receipts = tuple(
        (Receipt(r.custodian, r.key_id, r.epoch, r.window, r.sealed_sha256, r.signature), r.window_statement)
        for r in message.receipts
    )
    return OutcomeBytes(
        message.job.manifest,
        message.job.opening,
        message.leaf,
        message.leaf_proof,
        message.evidence,
        receipts,
        message.statement,
    )


def no_statement(job: Job) -> KeyquorumError:
    """Why there is no result, where no worker signed anything: what is said here is the coordinator's word."""
    if job.state == "completed":
        return RefusedError(
            Reason.SIGNATURE_MISSING,
            "the coordinator reports a completed job and shows no worker's statement",
            expected="a result statement signed by an attested worker",
            actual="nothing",
            details={"job": job.id},
        )
    if job.state not in FINAL_STATES:
        return StateError(Reason.STATE, f"job {job.id} is not over", actual=job.state)
    said = f": {job.error}" if job.error is not None else ""
    return StateError(
        Reason.JOB_FAILED if job.state == "failed" else Reason.STATE,
        f"job {job.id} ended as {job.state} and no worker signed a result (the coordinator's word){said}",
        expected="a result",
        actual=job.state,
        details={"job": job.id} | ({} if job.error is None else {"cause": str(job.error.reason)}),
    )
