"""Is this the result? Everything an owner checks about a finished job, as one pure function over bytes (DESIGN §6).

The chain, each link signed: the owner's manifest names the job → custodians of the roster, enough for its quorum,
signed that they released the job's key for one leaf → the leaf stands in the ledger, under a checkpoint that a quorum
cosigned, and names the digests of one worker's evidence and HPKE key → the evidence holds the worker's signing key →
that key signed the result statement → the statement names the artifacts, always a log and, where the job completed, a
result. Those decrypt only under the job's key and bound to that signing key, so that no statement holds that was made
without the job's key. The coordinator carried all of it and appears nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keyquorum.jobs import own_manifest
from keyquorum_core.answers import JobBinding, check_leaf
from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.attestation.naming import claims_development
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.ledger.log_trust import LogTrust, QuorumCheckpoint
from keyquorum_core.ledger.merkle import verify_inclusion
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_core.manifest import (
    Manifest,
    Opening,
    ResultStatement,
    check_window,
    open_opening,
    open_result,
    subject,
)
from keyquorum_core.quorum import Quorum
from keyquorum_core.release import Leaf, Receipt, Window, open_window, verify_receipt
from keyquorum_core.roster import Roster
from keyquorum_core.signing import PublicIdentity

__all__ = [
    "MadeFor",
    "OutcomeBytes",
    "VerifiedOutcome",
    "VerifiedRelease",
    "open_job",
    "verify_outcome",
    "verify_release",
]

_LEAF_SKEW = (
    150  # seconds: a custodian takes a leaf within 120 s of its clock, and its own window's edges are 30 s away
)


@dataclass(frozen=True, slots=True)
class OutcomeBytes:
    """What the coordinator handed over. ``receipts`` come with the window statement that certifies their key."""

    manifest: bytes
    opening: bytes
    leaf: bytes
    leaf_proof: bytes
    evidence: bytes
    receipts: tuple[tuple[Receipt, bytes], ...]
    statement: bytes


@dataclass(frozen=True, slots=True)
class VerifiedOutcome:
    """What follows from it. ``custodians``: those whose receipts verify, sorted. ``doubts``: why others' don't.
    ``proof`` shows the leaf in the ledger's checkpoint ``logged``."""

    manifest: Manifest
    binding: JobBinding
    opening: Opening
    leaf: Leaf
    proof: TlogProof
    logged: QuorumCheckpoint
    evidence: EvidenceDocument
    statement: ResultStatement
    custodians: tuple[str, ...]
    doubts: dict[str, KeyquorumError]


@dataclass(frozen=True, slots=True)
class VerifiedRelease:
    """That a quorum released the job's key to one worker: what of an outcome is known before the job is over."""

    manifest: Manifest
    binding: JobBinding
    opening: Opening
    leaf: Leaf
    proof: TlogProof
    logged: QuorumCheckpoint
    evidence: EvidenceDocument
    custodians: tuple[str, ...]
    doubts: dict[str, KeyquorumError]

    @property
    def signer(self) -> PublicIdentity:
        """The worker's signing key, which its evidence binds."""
        return PublicIdentity.from_bytes(self.evidence.signing_key)


def open_job(manifest: bytes, opening: bytes, owner: PublicIdentity, job: str) -> tuple[Manifest, JobBinding, Opening]:
    """The owner's own two documents about a job. Raises :class:`RefusedError`: ``SIGNATURE…``, ``WRONG_JOB``."""
    parsed, data = own_manifest(manifest, owner, job)
    return parsed, JobBinding(job, subject(data), parsed.key_id, parsed.epoch), open_opening(opening, owner, job)


@dataclass(frozen=True, slots=True)
class MadeFor:
    """The committee that a key's epoch was certified for: its rule, and the roster that names its custodians."""

    quorum: Quorum
    roster: Roster


def verify_outcome(
    outcome: OutcomeBytes, *, job: str, owner: PublicIdentity, roster: Roster, made_for: MadeFor, now: int
) -> VerifiedOutcome:
    """The release as :func:`verify_release`, then the statement of the worker that got the key."""
    found = verify_release(outcome, job=job, owner=owner, roster=roster, made_for=made_for, now=now)
    statement = open_result(outcome.statement, found.signer, job)
    _check_artifacts(statement)
    return VerifiedOutcome(
        found.manifest,
        found.binding,
        found.opening,
        found.leaf,
        found.proof,
        found.logged,
        found.evidence,
        statement,
        found.custodians,
        found.doubts,
    )


def verify_release(
    outcome: OutcomeBytes, *, job: str, owner: PublicIdentity, roster: Roster, made_for: MadeFor, now: int
) -> VerifiedRelease:
    """The ledger is vouched for by a quorum of ``roster``, the one in force; the release by one of the committee that
    the key's epoch was ``made_for``, whose custodians may have left, or been replaced, since.

    Raises :class:`MalformedError` or :class:`RefusedError` at the first link that doesn't hold.

    A receipt that doesn't verify is a doubt and no more, as long as the others qualify: else one lying custodian could
    take everybody's results away. Reasons: ``SIGNATURE…``, ``WRONG_JOB``, ``LEAF``, ``RECIPIENT``, ``EPOCH``,
    ``NOT_YET_VALID``, ``EXPIRED``, ``ARTIFACT``, ``LEDGER_…``, ``NO_QUORUM``, or that of the first receipt at fault.
    :class:`UnavailableError` (``LEDGER_UNWITNESSED``) while no quorum has cosigned the ledger as far as the release.
    """
    manifest, binding, opening = open_job(outcome.manifest, outcome.opening, owner, job)
    leaf = Leaf.parse(outcome.leaf)
    evidence = EvidenceDocument.parse(outcome.evidence)
    check_leaf(leaf, binding, recipient="worker", recipient_public=evidence.hpke_key, evidence=outcome.evidence)
    check_window(manifest, leaf.time)
    quorum = made_for.quorum
    proof, logged = _check_ledger(outcome.leaf_proof, leaf, roster, roster.quorum_of(), now)
    custodians, doubts = _check_receipts(outcome, binding, leaf, (roster, made_for.roster), quorum)
    if not quorum.is_qualified(custodians):
        first = next(iter(doubts.values()), None)
        raise RefusedError(
            Reason.NO_QUORUM if first is None else first.reason,
            "no quorum of custodians vouches for the worker that made this result",
            expected=quorum.words(),
            actual=f"receipts of {', '.join(custodians) or 'nobody'}",
            details={name: str(error) for name, error in doubts.items()},
        )
    _check_development(leaf, evidence)
    return VerifiedRelease(manifest, binding, opening, leaf, proof, logged, evidence, custodians, doubts)


def _check_ledger(
    data: bytes, leaf: Leaf, roster: Roster, quorum: Quorum, now: int
) -> tuple[TlogProof, QuorumCheckpoint]:
    """No result without its release in the ledger (G3), in a tree that a quorum of custodians has seen."""
    if roster.log_key is None:
        raise RefusedError(Reason.LEDGER_ORIGIN, "the roster names no ledger, so no release can be shown")
    if not data:
        raise UnavailableError(
            Reason.LEDGER_UNWITNESSED,
            "no quorum of custodians has cosigned the ledger as far as the release of this job's key",
            expected="a proof of the release in a cosigned checkpoint",
            actual="none yet",
            next_step="Fetch the result again later; if it stays so, the coordinator may hide the release",
            details={"job": leaf.job_id},
        )
    proof = TlogProof.parse(data)
    logged = LogTrust(roster.log_key, roster.witnesses(), quorum).verify(proof.checkpoint, now=now)
    checkpoint = logged.checkpoint
    verify_inclusion(leaf.hash(), proof.index, checkpoint.size, proof.proof, checkpoint.root)
    return proof, logged


def _check_development(leaf: Leaf, evidence: EvidenceDocument) -> None:
    """Custodians compare the leaf with their appraisal; that it fits the evidence the owner sees for itself."""
    if leaf.development != claims_development(evidence):
        raise RefusedError(
            Reason.LEAF,
            "the release says something else about development hardware than the worker's evidence",
            expected=f"development {not leaf.development}",
            actual=f"development {leaf.development}",
            details={"job": leaf.job_id},
        )


def _check_artifacts(statement: ResultStatement) -> None:
    required = {"log", "result"} if statement.outcome == "completed" else {"log"}
    missing = required - set(statement.artifacts)
    if missing:
        raise RefusedError(
            Reason.ARTIFACT,
            "the worker's statement names no " + " and no ".join(sorted(missing)),
            expected=f"{' and '.join(sorted(required))}, encrypted under the job's key",
            actual=", ".join(sorted(statement.artifacts)) or "nothing",
            details={"job": statement.job_id},
        )


def _check_receipts(
    outcome: OutcomeBytes, job: JobBinding, leaf: Leaf, rosters: Sequence[Roster], quorum: Quorum
) -> tuple[tuple[str, ...], dict[str, KeyquorumError]]:
    good: set[str] = set()
    doubts: dict[str, KeyquorumError] = {}
    leaf_hash = leaf.hash()
    for receipt, statement in outcome.receipts[: 4 * len(quorum.ids)]:
        name = receipt.custodian
        try:
            window = _window(statement, name, rosters, leaf.time)
            verify_receipt(receipt, window, job.subject, leaf_hash, key_id=job.key_id, epoch=job.epoch)
        except KeyquorumError as error:
            doubts.setdefault(name[:32], error)
        else:
            good.add(name)
    for name in good:
        doubts.pop(name, None)
    return tuple(sorted(good)), doubts


def _window(statement: bytes, name: str, rosters: Sequence[Roster], now: int) -> Window:
    """The window that the custodian of that name signed, as one of the rosters knows it. Raises as the first does."""
    first: KeyquorumError | None = None
    for roster in rosters:
        try:
            custodian = roster.custodian(name)
            return open_window(
                statement,
                custodian.identity,
                custodian=custodian.id,
                cluster=roster.cluster,
                now=now,
                skew=_LEAF_SKEW,
            )
        except KeyquorumError as error:
            first = first or error
    raise first or RefusedError(Reason.UNKNOWN_CUSTODIAN, "no roster names this custodian", actual=name[:32])
