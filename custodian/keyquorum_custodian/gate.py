"""The release gate: what this custodian checks, by itself, before it answers (DESIGN §6; guarantees G2, G3, G8).

:data:`CHECKS` is the whole list, in order. Each check either returns or raises one typed error; the first that raises
ends the request, and nothing has changed then. There is no way to leave one out. What a check has established stands in
the :class:`_Case` for those after it. Only when all have passed is anything computed from a seed.

Two verdicts are kept, because their inputs cannot change: on a manifest envelope (by its SHA-256, under the present
owners) and on evidence (``appraisals.py``). All else is looked at again for every request.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from keyquorum_core import manifest
from keyquorum_core.attestation.appraisal import Appraisal
from keyquorum_core.attestation.evidence import MAX_DOCUMENT_BYTES
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.key_request import KeyRequest, open_asked, peek_asked
from keyquorum_core.manifest import Manifest
from keyquorum_core.policy.engine import Decision
from keyquorum_core.policy.facts import JobFacts
from keyquorum_core.release import (
    NO_LEASE,
    WINDOW_LIFETIME,
    Answer,
    Leaf,
    LeaseTerms,
    encode_share,
    share_info,
    sign_answer,
)
from keyquorum_core.revocations import Revocations
from keyquorum_core.sealing import seal, suite_of
from keyquorum_core.signing import MAX_ENVELOPE, PublicIdentity
from keyquorum_custodian.appraisals import Appraisals
from keyquorum_custodian.canary import CanaryFaults, spoilt
from keyquorum_custodian.epochs import Epochs, HeldEpoch
from keyquorum_custodian.keystore import Keystore, ReleaseRecord
from keyquorum_custodian.leases import Lease, Leases
from keyquorum_custodian.policy import CustodianPolicy
from keyquorum_custodian.quota import Quota
from keyquorum_custodian.standing import Standing
from keyquorum_custodian.trust import Owners
from keyquorum_custodian.vault import Group
from keyquorum_custodian.windows import Windows
from keyquorum_custodian.withdrawn import Withdrawn
from keyquorum_custodian.witness import NOWHERE, CheckpointUpdate, Inclusion, Witness

__all__ = ["CHECKS", "LEAF_SKEW", "Gate", "ReleaseRequest"]

LEAF_SKEW: Final = 120
"""Seconds that a leaf's time may differ from this custodian's clock, either way."""
_KEPT_MANIFESTS = 512


@dataclass(frozen=True, slots=True)
class ReleaseRequest:
    """The exact bytes that came: envelope of a manifest or key request, evidence document (empty: the recipient is the
    owner), leaf; where the ledger shows the leaf, and the checkpoint that says so when this custodian may not have seen
    it yet; with evidence, the worker's word that it hands it in."""

    manifest: bytes
    evidence: bytes
    leaf: bytes
    inclusion: Inclusion = NOWHERE
    update: CheckpointUpdate | None = None
    presentation: bytes = b""


@dataclass(frozen=True, slots=True)
class _Verified:
    """A manifest or key request whose signatures were verified, and what follows from its payload."""

    manifest: Manifest | KeyRequest
    owner: PublicIdentity
    job_id: str
    subject: bytes
    subject_hex: str
    owner_hpke_sha256: str
    context: bytes
    facts: JobFacts


class _Case:
    """One request and what the checks so far have established about it."""

    __slots__ = (
        "appraisal",
        "decision",
        "development",
        "epoch",
        "leaf",
        "leaf_hash",
        "no_update",
        "now",
        "recipient",
        "request",
        "revocations",
        "verified",
    )

    def __init__(self, request: ReleaseRequest, now: int) -> None:
        self.request = request
        self.now = now
        self.development = False
        self.verified: _Verified
        self.leaf: Leaf
        self.leaf_hash: bytes
        self.no_update: KeyquorumError | None = None
        self.epoch: HeldEpoch
        self.recipient: bytes
        self.appraisal: Appraisal | None = None
        self.decision: Decision
        self.revocations: Revocations


class Gate:
    """One custodian's gate; used from one thread. ``clock`` gives unix seconds."""

    def __init__(
        self,
        custodian_id: str,
        *,
        roster_expires_at: int,
        owners: Owners,
        epochs: Epochs,
        appraisals: Appraisals,
        canary: CanaryFaults,
        leases: Leases,
        withdrawn: Withdrawn,
        roster_digest: str,
        windows: Windows,
        policy: CustodianPolicy,
        quota: Quota,
        witness: Witness,
        keystore: Keystore,
        standing: Standing,
        clock: Callable[[], float],
    ) -> None:
        self._standing = standing
        self.custodian_id = custodian_id
        self._roster_expires_at = roster_expires_at
        self._owners = owners
        self._epochs = epochs
        self._appraisals = appraisals
        self._canary = canary
        self._leases = leases
        self._withdrawn = withdrawn
        self._roster_digest = roster_digest
        self._windows = windows
        self._policy = policy
        self._quota = quota
        self._witness = witness
        self._keystore = keystore
        self._clock = clock
        self._manifests: OrderedDict[bytes, _Verified] = OrderedDict()

    def release(self, request: ReleaseRequest) -> Answer:
        """This custodian's share for the recipient, sealed to it and signed.

        Raises the error of the first check that fails, with ``check`` and ``custodian`` among its details; then nothing
        was computed, recorded or counted. Raises ``STORAGE`` when the release could not be recorded; then the share
        is thrown away. A checkpoint that came along is taken in any case: the requests behind this one rest on it.
        """
        (outcome,) = self.release_together([request])
        if isinstance(outcome, Answer):
            return outcome
        raise outcome

    def release_together(self, requests: Sequence[ReleaseRequest]) -> list[Answer | Exception]:
        """What :meth:`release` returns or raises for each of several requests that arrived together, in their order.

        Each is judged after the releases before it, and fails by itself; what is recorded is committed once for all.
        No answer is there before its record is: where the commit fails, all that are in it have that error.
        """
        outcomes: list[Answer | Exception] = []
        recorded: list[tuple[int, Group, str, int]] = []
        for request in requests:
            case = _Case(request, int(self._clock()))
            try:
                self._judge(case)
                answer = self._answer(case)
                group, new = self._record(case, answer)
            except Exception as error:
                outcomes.append(error)
                continue
            if new:
                self._quota.count(case.verified.manifest.owner, case.now)
            recorded.append((len(outcomes), group, case.verified.manifest.owner if new else "", case.now))
            outcomes.append(answer)
        self._keystore.settle()
        for position, group, owner, now in recorded:
            if group.error is not None:
                outcomes[position] = group.error
                if owner:
                    self._quota.discount(owner, now)
        return outcomes

    def _judge(self, case: _Case) -> None:
        if case.request.update is not None:
            try:
                self._witness.update(case.request.update)
            except KeyquorumError as error:
                case.no_update = error
        for name, check in CHECKS:
            try:
                check(self, case)
            except KeyquorumError as error:
                error.details["check"] = name
                error.details["custodian"] = self.custodian_id
                raise

    def flush(self) -> None:
        """Write what was left for after the answers. Raises ``STORAGE``."""
        self._appraisals.flush(int(self._clock()))
        self._policy.flush()

    # -- the checks, in order --------------------------------------------------------------------------------------

    def _check_standing(self, case: _Case) -> None:
        """This custodian was not restored from a backup, or has proved since that it serves nothing old."""
        self._standing.require_proved()

    def _check_roster(self, case: _Case) -> None:
        """The roster this custodian serves under has not expired since it started."""
        if case.now >= self._roster_expires_at:
            raise RefusedError(
                Reason.EXPIRED,
                "this custodian's roster has expired",
                expected=f"before {self._roster_expires_at}",
                actual=case.now,
                next_step="Have the operators sign a new roster, install it and restart the custodian.",
            )

    def _check_manifest(self, case: _Case) -> None:
        """Signed, both ways and by nobody else, by an owner this custodian knows; canonical, all its members sound."""
        _check_size("manifest", case.request.manifest, MAX_ENVELOPE)
        digest = hashlib.sha256(case.request.manifest).digest()
        verified = self._manifests.get(digest)
        if verified is None or self._owners.identity(verified.manifest.owner) != verified.owner:
            verified = self._verify_manifest(case.request.manifest)
            self._manifests[digest] = verified
            if len(self._manifests) > _KEPT_MANIFESTS:
                self._manifests.popitem(last=False)
        case.verified = verified

    def _verify_manifest(self, envelope: bytes) -> _Verified:
        owner = self._owners.identity(peek_asked(envelope).document.owner)
        asked = open_asked(envelope, owner)
        opened, binding = asked.document, asked.binding()
        return _Verified(
            manifest=opened,
            owner=owner,
            job_id=binding.job_id,
            subject=binding.subject,
            subject_hex=binding.subject.hex(),
            owner_hpke_sha256=hashlib.sha256(opened.owner_hpke).hexdigest(),
            context=binding.context(),
            facts=JobFacts.of(opened, binding.job_id),
        )

    def _check_leaf(self, case: _Case) -> None:
        """The leaf names this job, this manifest, this evidence, this key and epoch, and this moment."""
        case.leaf = leaf = Leaf.parse(case.request.leaf)
        case.leaf_hash = leaf.hash()
        verified = case.verified
        for what, expected, actual in (
            ("job", verified.job_id, leaf.job_id),
            ("manifest", verified.subject_hex, leaf.manifest_sha256),
        ):
            if expected != actual:
                raise RefusedError(
                    Reason.WRONG_JOB,
                    f"the leaf names another {what} than the request",
                    expected=expected,
                    actual=actual,
                )
        evidence = case.request.evidence
        _check_size("evidence", evidence, MAX_DOCUMENT_BYTES)
        for what, wanted, found in (
            ("evidence", hashlib.sha256(evidence).hexdigest() if evidence else Leaf.NO_EVIDENCE, leaf.evidence_sha256),
            ("key", verified.manifest.key_id, leaf.key_id),
            ("epoch", verified.manifest.epoch, leaf.epoch),
        ):
            if wanted != found:
                raise RefusedError(
                    Reason.LEAF, f"the leaf names another {what} than the request", expected=wanted, actual=found
                )
        if not case.now - LEAF_SKEW <= leaf.time <= case.now + LEAF_SKEW:
            raise RefusedError(
                Reason.STALE,
                "the leaf is of another time",
                expected=f"{case.now - LEAF_SKEW}…{case.now + LEAF_SKEW}",
                actual=leaf.time,
                next_step="Ask again with a new leaf; if this goes on, compare clocks.",
            )

    def _check_revocation(self, case: _Case) -> None:
        """The operators revoked neither the roster in force here, nor the owner, nor the job. What they revoked of a
        worker and of policies is looked at where those are known."""
        case.revocations = self._withdrawn.current()
        case.revocations.require_asker(
            job_id=case.verified.job_id, owner=case.verified.owner.fingerprint, roster=self._roster_digest
        )

    def _check_window(self, case: _Case) -> None:
        """The manifest's time window contains this moment by this custodian's clock."""
        manifest.check_window(case.verified.manifest, case.now)

    def _check_key(self, case: _Case) -> None:
        """The epoch is in use here: active, or retired after the manifest was issued. For its owner's own data an
        epoch serves until it is destroyed: what was made under it has to be read to be taken to the next. A canary is
        for those owners only who are for drills, and they for canaries."""
        signed = case.verified.manifest
        self._standing.require_served(signed.key_id, signed.epoch)
        case.epoch = self._epochs.active(signed.key_id, signed.epoch)
        if self._owners.for_drills(signed.owner) is not case.epoch.policy.canary:
            raise _not_for_drills(signed.owner, case.epoch)
        if not isinstance(signed, KeyRequest):
            case.epoch.check_serves(signed.issued_at)

    def _check_ledger(self, case: _Case) -> None:
        """The ledger shows exactly this leaf, in a tree that extends all this custodian saw of it and that a quorum of
        custodians vouched for a short while ago (G3)."""
        if case.no_update is not None:
            raise case.no_update
        self._witness.require_shown(case.leaf_hash, case.request.inclusion)
        if case.epoch.policy.canary:
            self._canary.require_one_history(case.epoch.key_id)

    def _check_recipient(self, case: _Case) -> None:
        """Who gets the share: the owner named in what it signed, or, for a job, a worker on evidence that this
        custodian accepts, that the manifest asks for, that stands where the manifest allows, and that is not in
        quarantine. A worker that has the key already renews its lease: its evidence must be new, and continue what it
        showed before."""
        signed = case.verified.manifest
        if case.request.evidence:
            if isinstance(signed, KeyRequest):
                raise RefusedError(
                    Reason.RECIPIENT,
                    f"a key of purpose {signed.purpose} goes to its owner only",
                    expected="no evidence",
                    actual="a worker's evidence",
                )
            appraisal = self._leases.appraise(
                case.request.evidence,
                bytes.fromhex(case.leaf.evidence_sha256),
                signed.evidence_types,
                case.now,
                job_id=case.verified.job_id,
                recipient_sha256=case.leaf.recipient_sha256,
                policy=case.epoch.policy,
                presentation=case.request.presentation,
            )
            case.revocations.require_worker(appraisal, case.leaf.recipient_sha256)
            appraisal.require_region(signed.regions)
            case.appraisal = appraisal
            case.recipient = appraisal.hpke_key
            case.development = appraisal.development
            digest = hashlib.sha256(case.recipient).hexdigest()
        else:
            case.recipient = signed.owner_hpke
            digest = case.verified.owner_hpke_sha256
        if case.leaf.recipient_sha256 != digest:
            raise RefusedError(
                Reason.RECIPIENT,
                "the leaf names another recipient key than the one that was proven",
                expected=digest,
                actual=case.leaf.recipient_sha256,
            )
        if case.leaf.development != case.development:
            raise RefusedError(
                Reason.LEAF,
                "the leaf is wrong about development hardware",
                expected=f"development {str(case.development).lower()}",
                actual=str(case.leaf.development).lower(),
            )
        suite = suite_of(case.recipient)
        if suite != case.epoch.suite:
            raise RefusedError(
                Reason.RECIPIENT,
                "the recipient's key is of another suite than this key's epoch asks for",
                expected=case.epoch.suite,
                actual=suite,
                next_step=f"Make the recipient's key with suite {case.epoch.suite}.",
            )

    def _check_policy(self, case: _Case) -> None:
        """This custodian's own policies permit it: for this job, to this owner or worker, now. That the ledger shows
        the release was checked before."""
        case.decision = self._policy.check_recipient(case.verified.facts, case.appraisal, logged=True)
        case.revocations.require_standing("policy", case.decision.bundle_digest)

    def _check_quota(self, case: _Case) -> None:
        """The owner has releases left this hour. A leaf that was answered before is not counted twice."""
        try:
            self._quota.check(case.verified.manifest.owner, case.now)
        except RefusedError:
            if not self._keystore.has_release(case.leaf_hash):
                raise

    # -- the answer ------------------------------------------------------------------------------------------------

    def _answer(self, case: _Case) -> Answer:
        verified, epoch = case.verified, case.epoch
        leaf_hash = case.leaf_hash
        window = self._windows.current()
        policy = epoch.policy
        terms = NO_LEASE if case.appraisal is None else LeaseTerms(policy.lease_seconds, policy.reattest_seconds)
        with epoch.lease():
            contributions = epoch.contributions(verified.context)
            if policy.canary and self._canary.lies(epoch.key_id):
                contributions = spoilt(contributions)
            share = encode_share(contributions, terms)
        sealed = seal(case.recipient, share, share_info(leaf_hash, self.custodian_id, case.recipient))
        return sign_answer(
            window.answer_key,
            verified.subject,
            leaf_hash,
            self.custodian_id,
            epoch.key_id,
            epoch.epoch,
            window.number,
            sealed,
        )

    def _record(self, case: _Case, answer: Answer) -> tuple[Group, bool]:
        """Keep the release, and a worker's lease with it, once the group is settled. False: this leaf was answered
        before."""
        record = ReleaseRecord(
            leaf_hash=case.leaf_hash,
            leaf=case.request.leaf,
            owner=case.verified.manifest.owner,
            released_at=case.now,
            window=answer.window,
            development=case.development,
            policy_sha256=case.decision.bundle_digest,
            policy_version=case.decision.bundle_version,
            decision_sha256=case.decision.digest.hex(),
        )
        with self._keystore.joined() as group:
            new = self._keystore.record_release(record)
            if new and case.appraisal is not None:
                leaf, policy = case.leaf, case.epoch.policy
                # Old evidence shown again does not make a lease longer.
                until = min(case.now, case.appraisal.attested_at + WINDOW_LIFETIME) + policy.lease_seconds
                lease = Lease(leaf.job_id, leaf.recipient_sha256, leaf.key_id, leaf.epoch, case.now, until, 0, "")
                self._leases.grant(lease, case.appraisal)
        return group, new


def _not_for_drills(owner: str, epoch: HeldEpoch) -> RefusedError:
    canary = epoch.policy.canary
    return RefusedError(
        Reason.CANARY,
        "a canary key serves drills, and nothing else" if canary else "an owner for drills gets canary keys only",
        expected="an owner added with --canary" if canary else "a canary key",
        actual=owner if canary else epoch.key_id,
        next_step="Use a key that was not made with --canary." if canary else "Use a key made with --canary.",
    )


def _check_size(what: str, data: bytes, limit: int) -> None:
    """Before anything is computed over it: the listener lets far larger messages in, for ceremonies."""
    if len(data) > limit:
        raise MalformedError(
            Reason.TOO_LARGE, f"the {what} is too large", expected=f"at most {limit} bytes", actual=len(data)
        )


CHECKS: Final[tuple[tuple[str, Callable[[Gate, _Case], None]], ...]] = (
    ("standing", Gate._check_standing),
    ("roster", Gate._check_roster),
    ("manifest", Gate._check_manifest),
    ("leaf", Gate._check_leaf),
    ("revocation", Gate._check_revocation),
    ("window", Gate._check_window),
    ("key", Gate._check_key),
    ("ledger", Gate._check_ledger),
    ("recipient", Gate._check_recipient),
    ("policy", Gate._check_policy),
    ("quota", Gate._check_quota),
)
