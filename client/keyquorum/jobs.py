"""Jobs as the coordinator reports them: what it says about a job is compared with what the owner signed.

States are the coordinator's word and nothing else. They decide when to look for a result, never whether one is good.
"""

from __future__ import annotations

from dataclasses import dataclass

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.manifest import Manifest, job_id, open_manifest
from keyquorum_core.signing import PublicIdentity
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.wire.errors import from_status

__all__ = ["FINAL_STATES", "STATES", "Job", "JobEvent", "event_from_wire", "job_from_wire", "own_manifest"]

FINAL_STATES = frozenset({"completed", "failed", "cancelled", "expired"})
STATES = FINAL_STATES | {"submitted", "opened", "ready", "claimed", "attesting", "running", "uploading"}


@dataclass(frozen=True, slots=True)
class Job:
    """One job. ``manifest`` is verified (signed by the caller's own identity); the rest is the coordinator's word.

    Times are unix seconds; ``worker`` is empty before one claimed the job.
    """

    id: str
    state: str
    owner: str
    key_id: str
    epoch: int
    created_at: int
    updated_at: int
    worker: str
    manifest: Manifest
    error: KeyquorumError | None = None

    @property
    def final(self) -> bool:
        return self.state in FINAL_STATES

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return {
            "job_id": self.id,
            "state": self.state,
            "owner": self.owner,
            "key_id": self.key_id,
            "epoch": self.epoch,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
            "worker": self.worker,
            "classification": self.manifest.classification,
            "regions": list(self.manifest.regions),
            "error": None if self.error is None else self.error.as_dict(),
        }


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of a job's history; ``time`` in unix seconds. The coordinator's word."""

    sequence: int
    time: int
    state: str
    detail: str
    error: KeyquorumError | None = None

    @property
    def final(self) -> bool:
        return self.state in FINAL_STATES

    def as_dict(self) -> dict[str, object]:
        return {
            "sequence": self.sequence,
            "time": self.time,
            "state": self.state,
            "detail": self.detail,
            "error": None if self.error is None else self.error.as_dict(),
        }


def own_manifest(envelope: bytes, owner: PublicIdentity, expected_id: str | None) -> tuple[Manifest, bytes]:
    """The manifest and its exact payload, signed by ``owner`` and, unless ``None``, of job ``expected_id``.

    Raises :class:`RefusedError`: ``SIGNATURE…`` for what this owner didn't sign, ``WRONG_JOB`` for another of its jobs.
    """
    manifest, payload = open_manifest(envelope, owner)
    if expected_id is not None and job_id(payload) != expected_id:
        raise RefusedError(
            Reason.WRONG_JOB,
            "the coordinator gave another job's manifest",
            expected=expected_id,
            actual=job_id(payload),
        )
    return manifest, payload


def job_from_wire(message: pb.Job, owner: PublicIdentity, expected_id: str | None = None) -> Job:
    """Raises :class:`RefusedError` as :func:`own_manifest`, and where id or key aren't what the manifest says."""
    manifest, payload = own_manifest(message.manifest, owner, expected_id)
    identifier = job_id(payload)
    said = (message.job_id, message.owner, message.key_id, message.epoch)
    signed = (identifier, manifest.owner, manifest.key_id, manifest.epoch)
    if said != signed:
        raise RefusedError(
            Reason.WRONG_JOB,
            "the coordinator says something else about the job than its manifest",
            expected=signed,
            actual=str(said)[:300],
        )
    if message.state not in STATES:
        raise MalformedError(
            Reason.STATE,
            "the coordinator reports an unknown state",
            expected=", ".join(sorted(STATES)),
            actual=message.state[:40],
        )
    return Job(
        id=identifier,
        state=message.state,
        owner=manifest.owner,
        key_id=manifest.key_id,
        epoch=manifest.epoch,
        created_at=message.created_at,
        updated_at=message.updated_at,
        worker=message.worker[:128],
        manifest=manifest,
        error=from_status(message.error) if message.HasField("error") else None,
    )


def event_from_wire(message: pb.JobEvent, after: int) -> JobEvent:
    """The event that follows sequence number ``after``. Raises (``STATE``) for a history that goes backwards."""
    if message.sequence <= after:
        raise RefusedError(
            Reason.STATE,
            "the coordinator's history of the job goes backwards",
            expected=f"an event after {after}",
            actual=message.sequence,
        )
    if message.state not in STATES:
        raise MalformedError(
            Reason.STATE,
            "the coordinator reports an unknown state",
            expected=", ".join(sorted(STATES)),
            actual=message.state[:40],
        )
    error = from_status(message.error) if message.HasField("error") else None
    return JobEvent(message.sequence, message.time, message.state, message.detail[:1024], error)
