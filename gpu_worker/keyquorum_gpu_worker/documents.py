"""A job's documents as the coordinator hands them over, verified before anything is done about the job."""

from __future__ import annotations

from dataclasses import dataclass

from keyquorum_core.answers import JobBinding
from keyquorum_core.certified import open_certificate
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
from keyquorum_core.quorum import Quorum
from keyquorum_core.roster import Roster
from keyquorum_core.signing import peek_payload
from keyquorum_core.succession import earlier_rosters
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["JobDocuments", "open_documents"]

_MAX_ROSTERS = 64


@dataclass(frozen=True, slots=True)
class JobDocuments:
    """A job's verified documents. ``payload`` is the manifest's, exactly as signed; ``quorum`` the rule that the key's
    epoch was certified with."""

    job_id: str
    manifest: Manifest
    payload: bytes
    opening: Opening
    quorum: Quorum

    @property
    def binding(self) -> JobBinding:
        """What every statement about this job must name."""
        return JobBinding(self.job_id, subject(self.payload), self.manifest.key_id, self.manifest.epoch)


def open_documents(job: pb.Job, roster: Roster, now: int) -> JobDocuments:
    """Verify what the coordinator handed over about a job.

    The manifest vouches for its own owner here: whether that owner may use the key is for the custodians, each of whom
    knows its owners. What the worker makes sure of is that all it acts on was signed by that one owner. Raises
    :class:`MalformedError`, and :class:`RefusedError`: ``SIGNATURE…``, ``WRONG_JOB``, ``NOT_YET_VALID``, ``EXPIRED``;
    ``ROSTER``, ``CEREMONY``, ``QUORUM_RULE``, ``EPOCH`` for the certificate of the key's epoch.
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
    quorum = _certified(job, manifest, roster) if job.certificate else roster.quorum_of()
    return JobDocuments(job.job_id, manifest, payload, opening, quorum)


def _certified(job: pb.Job, manifest: Manifest, roster: Roster) -> Quorum:
    """The rule in the epoch's certificate, which custodians of an earlier roster signed; the pinned one vouches for
    that roster by its digest."""
    known = earlier_rosters(roster, list(job.rosters)[:_MAX_ROSTERS])
    plan = open_certificate(job.certificate, [roster, *known.values()]).plan
    if (plan.key_id, plan.epoch) != (manifest.key_id, manifest.epoch):
        raise RefusedError(
            Reason.EPOCH,
            "the coordinator gave another epoch's certificate",
            expected=f"{manifest.key_id} epoch {manifest.epoch}",
            actual=f"{plan.key_id} epoch {plan.epoch}",
        )
    return plan.quorum
