"""A job's documents as the coordinator hands them over, verified before anything is done about the job."""

from __future__ import annotations

from dataclasses import dataclass

from keyquorum_core.answers import JobBinding
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.manifest import (
    MANIFEST_TYPE,
    Manifest,
    Opening,
    check_window,
    job_id,
    open_manifest,
    open_opening,
    parse,
    subject,
)
from keyquorum_core.signing import peek_payload
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["JobDocuments", "open_documents"]


@dataclass(frozen=True, slots=True)
class JobDocuments:
    """A job's verified documents. ``payload`` is the manifest's, exactly as signed."""

    job_id: str
    manifest: Manifest
    payload: bytes
    opening: Opening

    @property
    def binding(self) -> JobBinding:
        """What every statement about this job must name."""
        return JobBinding(self.job_id, subject(self.payload), self.manifest.key_id, self.manifest.epoch)


def open_documents(job: pb.Job, now: int) -> JobDocuments:
    """Verify what the coordinator handed over about a job.

    The manifest vouches for its own owner here: whether that owner may use the key is for the custodians, each of whom
    knows its owners. What the worker makes sure of is that all it acts on was signed by that one owner. Raises
    :class:`MalformedError`, and :class:`RefusedError`: ``SIGNATURE…``, ``WRONG_JOB``, ``NOT_YET_VALID``, ``EXPIRED``.
    """
    claimed = parse(peek_payload(job.manifest, MANIFEST_TYPE, "manifest"))
    manifest, payload = open_manifest(job.manifest, claimed.owner_identity)
    if job_id(payload) != job.job_id:
        raise RefusedError(
            Reason.WRONG_JOB,
            "the coordinator gave another job's manifest",
            expected=job.job_id[:32],
            actual=job_id(payload),
        )
    opening = open_opening(job.opening, manifest.owner_identity, job.job_id)
    check_window(manifest, now)
    return JobDocuments(job.job_id, manifest, payload, opening)
