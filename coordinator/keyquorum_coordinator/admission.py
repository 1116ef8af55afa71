"""What the coordinator checks about signed documents before it stores them, so that a mistake is told early.

These checks protect the coordinator's own order and its callers' time, nobody's key: custodians, workers and owners
check everything again for themselves. Reasons are those the custodians would give.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from keyquorum_coordinator.artifacts import ArtifactState
from keyquorum_coordinator.job_states import JobState
from keyquorum_coordinator.jobs import Job, NewJob
from keyquorum_coordinator.leaf_records import decision_of, submission_leaf
from keyquorum_core import manifest as manifests
from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError
from keyquorum_core.key_request import KEY_REQUEST_TYPE, KeyRequest, open_key_request
from keyquorum_core.ledger.leaves import JobSubmitted
from keyquorum_core.manifest import Manifest, ResultStatement
from keyquorum_core.policy import facts as policy_facts
from keyquorum_core.policy.engine import Decision
from keyquorum_core.signing import PublicIdentity, peek_payload

__all__ = [
    "MAX_MANIFEST",
    "AdmittedRequest",
    "JobFacts",
    "admit",
    "admit_key_request",
    "check_opening",
    "check_statement",
    "facts_of",
]

MAX_MANIFEST = 1 << 20
_KEPT_FACTS = 1024


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What leaves and limits need of a stored manifest; digests are lower-case hex."""

    manifest: Manifest
    manifest_sha256: str
    owner_recipient_sha256: str


_facts: OrderedDict[str, JobFacts] = OrderedDict()


def facts_of(job: Job) -> JobFacts:
    """The facts of a job whose manifest was admitted. Kept: parsing is not for the release path."""
    known = _facts.get(job.job_id)
    if known is not None:
        _facts.move_to_end(job.job_id)
        return known
    payload = peek_payload(job.manifest, manifests.MANIFEST_TYPE, "manifest")
    manifest = manifests.parse(payload)
    facts = JobFacts(manifest, hashlib.sha256(payload).hexdigest(), hashlib.sha256(manifest.owner_hpke).hexdigest())
    _facts[job.job_id] = facts
    while len(_facts) > _KEPT_FACTS:
        _facts.popitem(last=False)
    return facts


class Epochs(Protocol):
    """Which epochs there are: the state of one (None: not known), and all that are known, in order."""

    def state(self, key_id: str, epoch: int) -> str | None: ...
    def all(self) -> Sequence[tuple[str, int]]: ...


def admit(
    envelope: bytes,
    caller: str,
    now: int,
    epochs: Epochs,
    decide: Callable[[policy_facts.JobFacts], Decision],
) -> NewJob:
    """The job that a manifest asks for. ``decide``: the coordinator's policy, which raises for a job that it
    denies.

    Raises ``TOO_LARGE``, ``SIGNATURE…``, ``UNKNOWN_OWNER`` (it names another owner than the caller), ``NOT_YET_VALID``,
    ``EXPIRED``, ``UNKNOWN_KEY``, ``EPOCH``, ``KEY_STATE``.
    """
    _check_size(envelope)
    claimed = manifests.parse(peek_payload(envelope, manifests.MANIFEST_TYPE, "manifest"))
    manifest, payload = manifests.open_manifest(envelope, claimed.owner_identity)
    _check_caller(manifest.owner, caller)
    manifests.check_window(manifest, now)
    _check_epoch(manifest, epochs)
    job_id = manifests.job_id(payload)
    decision = decide(policy_facts.JobFacts.of(manifest, job_id))
    return NewJob(
        job_id=job_id,
        owner=manifest.owner,
        owner_fingerprint=manifest.owner_identity.fingerprint,
        key_id=manifest.key_id,
        epoch=manifest.epoch,
        manifest=envelope,
        not_after=manifest.not_after,
        leaf=submission_leaf(manifest, payload, now, decision_of(decision)),
    )


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A key request that may be put to the custodians. Nothing of it is stored but what the ledger shows."""

    envelope: bytes
    request: KeyRequest
    job_id: str
    payload_sha256: str
    leaf: JobSubmitted


def admit_key_request(
    envelope: bytes,
    caller: str,
    now: int,
    epochs: Epochs,
    decide: Callable[[policy_facts.JobFacts], Decision],
) -> AdmittedRequest:
    """As :func:`admit`, for a key that its owner wants for data of its own."""
    _check_size(envelope)
    claimed = KeyRequest.parse(peek_payload(envelope, KEY_REQUEST_TYPE, "key request"))
    request = open_key_request(envelope, claimed.owner_identity)
    _check_caller(request.owner, caller)
    manifests.check_window(request, now)
    _check_epoch(request, epochs)
    payload = request.payload()
    job_id = manifests.job_id(payload)
    decision = decide(policy_facts.JobFacts.of(request, job_id))
    leaf = submission_leaf(request, payload, now, decision_of(decision))
    return AdmittedRequest(envelope, request, job_id, hashlib.sha256(payload).hexdigest(), leaf)


def _check_size(envelope: bytes) -> None:
    if len(envelope) > MAX_MANIFEST:
        raise MalformedError(
            Reason.TOO_LARGE,
            "the manifest is too large",
            expected=f"at most {MAX_MANIFEST} bytes",
            actual=len(envelope),
        )


def _check_caller(owner: str, caller: str) -> None:
    if owner != caller:
        raise RefusedError(
            Reason.UNKNOWN_OWNER,
            "the manifest names another owner than the caller's certificate",
            expected=caller,
            actual=owner,
        )


def _check_epoch(manifest: Manifest | KeyRequest, epochs: Epochs) -> None:
    state = epochs.state(manifest.key_id, manifest.epoch)
    if state is None:
        raise _unknown(manifest, epochs.all())
    if state not in ("active", "retired"):  # what a retired one still serves is for custodians to say
        raise RefusedError(
            Reason.KEY_STATE,
            f"key {manifest.key_id} epoch {manifest.epoch} is not in use",
            expected="active",
            actual=state,
        )


def _unknown(manifest: Manifest | KeyRequest, known: Sequence[tuple[str, int]]) -> RefusedError:
    numbers = [epoch for key_id, epoch in known if key_id == manifest.key_id]
    if not numbers:
        return RefusedError(
            Reason.UNKNOWN_KEY,
            "no custodian knows this key",
            expected=", ".join(sorted({key_id for key_id, _ in known}))[:200] or "a key made by a ceremony",
            actual=manifest.key_id,
        )
    return RefusedError(
        Reason.EPOCH,
        f"key {manifest.key_id} has no such epoch",
        expected=", ".join(map(str, numbers))[:200],
        actual=manifest.epoch,
    )


def check_opening(job: Job, envelope: bytes, bundle: ArtifactState) -> None:
    """The owner's opening is for this job, and names the bundle that is stored.

    Raises ``SIGNATURE…``, ``WRONG_JOB``, ``STATE`` (the bundle is not complete), ``DIGEST`` (another bundle).
    """
    opening = manifests.open_opening(envelope, facts_of(job).manifest.owner_identity, job.job_id)
    if not bundle.complete:
        raise StateError(
            Reason.STATE,
            f"the bundle of job {job.job_id} is not complete",
            expected=f"{opening.bundle_size} bytes",
            actual=f"{bundle.committed} bytes",
            next_step="Upload the rest, then commit again",
        )
    _check_digest("bundle", bundle, opening.bundle_size, opening.bundle_sha256)


def check_statement(
    job: Job, envelope: bytes, evidence: bytes | None, artifacts: Mapping[str, ArtifactState]
) -> tuple[JobState, KeyquorumError | None]:
    """How the job ends by a worker's result statement, signed with the key that the recorded evidence binds.

    Raises ``SIGNATURE…``, ``WRONG_JOB``, ``DIGEST`` (an artifact is not the one it names, or is missing), ``STATE`` (no
    release to this worker is on record, so that no owner could check the statement).
    """
    if evidence is None:
        raise StateError(
            Reason.STATE,
            f"no release of job {job.job_id} to worker {job.worker} is on record",
            expected="a release before the statement",
            next_step="Ask for the release again with the same evidence, then send the statement again",
        )
    signer = PublicIdentity.from_bytes(EvidenceDocument.parse(evidence).signing_key)
    statement = manifests.open_result(envelope, signer, job.job_id)
    for kind, artifact in statement.artifacts.items():
        stored = artifacts[kind]
        if not stored.complete:
            raise RefusedError(
                Reason.DIGEST,
                f"the {kind} of job {job.job_id} is not complete",
                expected=f"{artifact.size} bytes",
                actual=f"{stored.committed} bytes",
                next_step="Upload the rest, then send the statement again",
            )
        _check_digest(kind, stored, artifact.size, artifact.sha256)
    if statement.outcome == "completed":
        return JobState.COMPLETED, None
    return JobState.FAILED, _failure(statement)


def _failure(statement: ResultStatement) -> RefusedError:
    return RefusedError(
        Reason.JOB_FAILED,
        f"the job ended as {statement.outcome}" + (f": {statement.reason}" if statement.reason else ""),
        expected="completed",
        actual=f"{statement.outcome}, exit code {statement.exit_code}",
        next_step="Read the job's log",
    )


def _check_digest(kind: str, stored: ArtifactState, size: int, sha256: str) -> None:
    if (stored.committed, stored.sha256.hex()) != (size, sha256):
        raise RefusedError(
            Reason.DIGEST,
            f"the stored {kind} is not the one that was signed",
            expected=f"{size} bytes, SHA-256 {sha256}",
            actual=f"{stored.committed} bytes, SHA-256 {stored.sha256.hex()}",
        )
