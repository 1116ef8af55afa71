"""What the coordinator tells the ledger about jobs, made from what it stores of them."""

from __future__ import annotations

import hashlib
import re

from sqlalchemy.orm import Session

from keyquorum_coordinator.database import ArtifactRow, JobRow, ReleaseRow
from keyquorum_coordinator.job_states import JobState
from keyquorum_core import manifest as manifests
from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.attestation.naming import claims_development
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError
from keyquorum_core.key_request import KeyRequest, open_asked, peek_asked
from keyquorum_core.ledger.leaves import (
    NO_POLICY,
    NOTHING,
    JobDenied,
    JobSubmitted,
    PolicyDecision,
    Result,
)
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.manifest import Manifest
from keyquorum_core.names import SHA256_HEX
from keyquorum_core.policy.engine import Decision

__all__ = [
    "decision_of",
    "denial_of_release",
    "denial_of_submission",
    "denying_decision",
    "result_leaf",
    "submission_leaf",
]

_DECIDED = ("policy_sha256", "policy_version", "decision_sha256")
_WITHOUT_ERROR = {
    JobState.COMPLETED: "",
    JobState.FAILED: str(Reason.JOB_FAILED),
    JobState.CANCELLED: "CANCELLED",
    JobState.EXPIRED: str(Reason.EXPIRED),
}


def _sha256(data: bytes | None) -> str:
    return hashlib.sha256(data or b"").hexdigest()


def _job(manifest: Manifest | KeyRequest, payload_sha256: str, job_id: str) -> dict[str, str | int]:
    return {
        "job_id": job_id,
        "manifest_sha256": payload_sha256,
        "owner_sha256": _sha256(manifest.owner_identity.to_bytes()),
        "key_id": manifest.key_id,
        "epoch": manifest.epoch,
    }


def submission_leaf(
    manifest: Manifest | KeyRequest, payload: bytes, now: int, decision: PolicyDecision = NO_POLICY
) -> JobSubmitted:
    """``payload``: of the manifest or key request. ``decision``: of the coordinator's seat. A key request allows no
    regions, since its key goes to no worker."""
    return JobSubmitted(
        **_job(manifest, _sha256(payload), manifests.job_id(payload)),  # type: ignore[arg-type]
        **decision.members(),  # type: ignore[arg-type]
        classification=manifest.classification,
        export_control=manifest.export_control,
        regions=manifest.regions if isinstance(manifest, Manifest) else (),
        time=now,
    )


def decision_of(decision: Decision) -> PolicyDecision:
    """A decision as leaves name it."""
    return PolicyDecision(decision.bundle_digest, decision.bundle_version, decision.digest.hex())


def denying_decision(error: KeyquorumError) -> PolicyDecision:
    """The decision that a refusal's details name; none where another check refused, or nothing sound stands there."""
    policy, version, decision = (error.details.get(name, "") for name in _DECIDED)
    sound = (
        SHA256_HEX.fullmatch(policy) and SHA256_HEX.fullmatch(decision) and re.fullmatch("[1-9][0-9]{0,14}", version)
    )
    return PolicyDecision(policy, int(version), decision) if sound and NOTHING not in (policy, decision) else NO_POLICY


def denial_of_submission(envelope: bytes, caller: str, error: RefusedError, now: int) -> JobDenied | None:
    """The denial of a manifest or key request that its owner signed and handed in; None for any other: whoever may call
    could fill the ledger with refusals in the name of others."""
    try:
        asked = open_asked(envelope, peek_asked(envelope).document.owner_identity)
    except KeyquorumError:
        return None
    manifest, payload = asked.document, asked.payload
    if manifest.owner != caller:
        return None
    return JobDenied(
        **_job(manifest, _sha256(payload), manifests.job_id(payload)),  # type: ignore[arg-type]
        **denying_decision(error).members(),  # type: ignore[arg-type]
        intent_sha256=NOTHING,
        seat="coordinator",
        reason=str(error.reason),
        time=now,
    )


def denial_of_release(
    manifest: Manifest | KeyRequest,
    manifest_sha256: str,
    job_id: str,
    intent: bytes,
    seat: str,
    error: KeyquorumError,
    now: int,
) -> JobDenied:
    """A custodian's refusal of the release that leaf ``intent`` announced, with the policy decision that it names."""
    return JobDenied(
        **_job(manifest, manifest_sha256, job_id),  # type: ignore[arg-type]
        **denying_decision(error).members(),  # type: ignore[arg-type]
        intent_sha256=leaf_hash(intent).hex(),
        seat=seat,
        reason=str(error.reason),
        time=now,
    )


def result_leaf(session: Session, row: JobRow, now: int, error: KeyquorumError | None) -> Result:
    """How a job ended, inside the transaction in which it does."""
    state = JobState(row.state)
    digests = {"result": NOTHING, "log": NOTHING}
    evidence = None
    if row.statement:
        release = session.get(ReleaseRow, row.job_id)
        if release is not None and release.worker == row.worker:
            evidence = release.evidence
        for kind in digests:
            artifact = session.get(ArtifactRow, (row.job_id, kind))
            if artifact is not None and artifact.complete:
                digests[kind] = (artifact.sha256 or b"").hex()
    return Result(
        job_id=row.job_id,
        outcome=str(state),
        reason=str(error.reason) if error is not None and state is not JobState.COMPLETED else _WITHOUT_ERROR[state],
        statement_sha256=_sha256(row.statement),
        evidence_sha256=_sha256(evidence),
        result_sha256=digests["result"],
        log_sha256=digests["log"],
        development=evidence is not None and claims_development(EvidenceDocument.parse(evidence)),
        time=now,
    )
