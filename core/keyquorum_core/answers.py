"""Custodians' answers to a recipient, as the coordinator passes them on: each is verified before it counts.

An answer counts when a custodian of the pinned roster signed it for exactly this job, key and epoch, in a current
window, and when it opens with the recipient's key. What doesn't is kept with its reason, so that a failure says who
gave what; an answer with a bad signature blames nobody, since the coordinator could have made it up. Owners and workers
collect the same way: an owner without a key check, since it opens the job; a worker with the one that the owner signed.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from keyquorum_core.derivation import Combination, Combiner, context
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, UnavailableError
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_core.quorum import Quorum
from keyquorum_core.release import NO_LEASE, Answer, Leaf, LeaseTerms, Window, open_share, open_window, verify_answer
from keyquorum_core.roster import Roster
from keyquorum_core.sealing import RecipientKey

__all__ = ["Answers", "JobBinding", "check_leaf", "check_shown"]

_NOT_ASKED = frozenset({Reason.UNAVAILABLE, Reason.TIMEOUT})
_MAY_PASS = _NOT_ASKED | {Reason.STALE, Reason.LEDGER_CONFLICT, Reason.LEDGER_UNWITNESSED}
"""Reasons that a new request, or a little time, may cure."""


@dataclass(frozen=True, slots=True)
class JobBinding:
    """What every statement about a job must name. ``subject`` is the SHA-256 of the manifest payload, 32 bytes.

    A key request is answered like a job: then ``subject`` is that of its payload, and the key's own ``purpose`` and
    what it is ``about`` (32 bytes) come from :mod:`keyquorum_core.key_request`.
    """

    job_id: str
    subject: bytes
    key_id: str
    epoch: int
    purpose: str = "job"
    about: bytes = b""

    def context(self) -> bytes:
        """The derivation context of the key (DESIGN §4)."""
        return context(self.key_id, self.epoch, self.purpose, self.about or self.subject)


def check_leaf(leaf: Leaf, job: JobBinding, *, recipient: str, recipient_public: bytes, evidence: bytes) -> None:
    """Raise :class:`RefusedError` unless the leaf names exactly this job, recipient and evidence.

    ``WRONG_JOB`` for another job or manifest, ``UNKNOWN_KEY``, ``EPOCH``, ``RECIPIENT``; ``LEAF`` for other evidence.
    """
    for reason, what, expected, actual in (
        (Reason.WRONG_JOB, "job", job.job_id, leaf.job_id),
        (Reason.WRONG_JOB, "manifest", job.subject.hex(), leaf.manifest_sha256),
        (Reason.UNKNOWN_KEY, "key", job.key_id, leaf.key_id),
        (Reason.EPOCH, "epoch", str(job.epoch), str(leaf.epoch)),
        (Reason.RECIPIENT, "kind of recipient", recipient, leaf.recipient),
        (Reason.RECIPIENT, "recipient key", hashlib.sha256(recipient_public).hexdigest(), leaf.recipient_sha256),
        (Reason.LEAF, "evidence", hashlib.sha256(evidence).hexdigest(), leaf.evidence_sha256),
    ):
        if not hmac.compare_digest(expected.encode(), actual.encode()):
            raise RefusedError(
                reason,
                f"the release names another {what}",
                expected=expected,
                actual=actual,
                details={"job": job.job_id},
            )


def check_shown(proof: bytes, leaf_hash: bytes, roster: Roster) -> None:
    """Raise unless ``proof`` shows the leaf in a checkpoint that the roster's log signed; whether witnesses cosigned
    it is not asked: a release is newer than their cosignatures."""
    if roster.log_key is None:
        raise RefusedError(Reason.LEDGER_ORIGIN, "the roster names no ledger, so no release can be shown")
    if not proof:
        raise RefusedError(
            Reason.LEDGER_PROOF,
            "the coordinator does not show that the ledger has this release",
            expected="a proof with the leaf",
            actual="none",
        )
    TlogProof.parse(proof).verify(leaf_hash, roster.log_key)


class Answers:
    """Collects answers until they give the job's key. ``role`` is the recipient's: ``owner`` or ``worker``.

    With ``key_check`` (from the opening that the owner signed) the key is the one of the opening or none; without, it
    is confirmed when each seed is reported alike by two custodians. What counted goes on counting over several requests
    (:meth:`ask`): contributions belong to the job, not to the request.
    """

    def __init__(
        self,
        job: JobBinding,
        roster: Roster,
        quorum: Quorum,
        recipient: RecipientKey,
        role: str,
        *,
        clock: Callable[[], float],
        key_check: bytes | None = None,
    ) -> None:
        self._job = job
        self._roster = roster
        self._quorum = quorum
        self._recipient = recipient
        self._role = role
        self._clock = clock
        self._combiner = Combiner(quorum, job.context(), key_check)
        self._evidence = b""
        self._leaf: tuple[bytes, bytes] | None = None
        self._windows: dict[tuple[str, int], Window] = {}
        self.committee = quorum.ids
        self._terms: dict[str, LeaseTerms] = {}
        self.answered: list[str] = []
        """Custodians whose answer counted, in order of arrival."""
        self.refused: dict[str, KeyquorumError] = {}
        """Custodians that refused, by the coordinator's word."""
        self.rejected: dict[str, KeyquorumError] = {}
        """Custodians in whose name an answer came that does not verify."""

    def ask(self, *, evidence: bytes = b"", windows: Iterable[Window] = ()) -> None:
        """A new request begins, and a new leaf comes with it: over ``evidence`` (a worker's document), with verified
        ``windows`` that the recipient knows already."""
        self._leaf = None
        self._evidence = evidence
        self._windows |= {(window.custodian, window.window): window for window in windows}
        self.refused.clear()
        self.rejected.clear()

    def take_leaf(self, data: bytes, proof: bytes) -> None:
        """The leaf of this request, and that the ledger has it by the log's own signatures: a C2SP tlog-proof.

        Raises :class:`RefusedError` (see :func:`check_leaf`; ``LEDGER_ORIGIN``, ``LEDGER_PROOF``, ``SIGNATURE…``) or
        :class:`MalformedError`: nothing then is usable.
        """
        if self._leaf is not None:
            if not hmac.compare_digest(self._leaf[0], data):
                raise RefusedError(Reason.LEAF, "the coordinator changed the leaf between two answers")
            return
        leaf = Leaf.parse(data)
        check_leaf(
            leaf, self._job, recipient=self._role, recipient_public=self._recipient.public, evidence=self._evidence
        )
        leaf_hash = leaf.hash()
        check_shown(proof, leaf_hash, self._roster)
        self._leaf = (data, leaf_hash)

    def take_refusal(self, custodian: str, error: KeyquorumError) -> None:
        if custodian in self._quorum.ids and custodian not in self.answered:
            self.refused[custodian] = error

    def take(self, answer: Answer, window_statement: bytes) -> None:
        """Verify and count one answer; one that does not verify is recorded, not raised."""
        if self._leaf is None:
            raise RefusedError(Reason.LEAF, "an answer came before the leaf it answers to")
        if answer.custodian in self.answered:
            return
        if answer.custodian not in self._quorum.ids:
            return  # nobody's: a name outside the roster says nothing of anybody in it
        try:
            self._verify(answer, window_statement, self._leaf[1])
        except KeyquorumError as error:
            self.rejected[answer.custodian] = error
            return
        try:
            share = open_share(answer, self._recipient, self._leaf[1], self._quorum)
            self._check_terms(share.lease)
        except KeyquorumError as error:
            # Signed by this custodian over exactly this ciphertext: nobody else can have spoilt it.
            self._combiner.reject(answer.custodian, f"{error.reason}: {error.message}")
        else:
            self._combiner.add(answer.custodian, share.contributions)
            self._terms[answer.custodian] = share.lease
        self.answered.append(answer.custodian)
        self.rejected.pop(answer.custodian, None)
        self.refused.pop(answer.custodian, None)

    def _check_terms(self, lease: LeaseTerms) -> None:
        """Workers hold keys under a lease, owners without one."""
        if (lease == NO_LEASE) != (self._role == "owner"):
            raise MalformedError(
                Reason.MALFORMED,
                "a share on the wrong terms",
                expected="no lease for an owner, one for a worker",
                actual=f"{lease.seconds} seconds for a {self._role}",
            )

    def lease(self) -> LeaseTerms:
        """The shortest lease that anybody whose answer counted grants; :data:`NO_LEASE` before the first. A quorum has
        a custodian in it that keeps to the key's policy, so no others can make the lease longer than that."""
        terms = [self._terms[name] for name in self._terms if name not in self.blamed]
        return functools.reduce(LeaseTerms.shortest, terms) if terms else NO_LEASE

    def _verify(self, answer: Answer, window_statement: bytes, leaf_hash: bytes) -> None:
        place = (answer.custodian, answer.window)
        if window_statement and place not in self._windows:
            window = open_window(
                window_statement,
                self._roster.custodian(answer.custodian).identity,
                custodian=answer.custodian,
                cluster=self._roster.cluster,
                now=int(self._clock()),
            )
            self._windows[answer.custodian, window.window] = window
        if place not in self._windows:
            raise RefusedError(
                Reason.STALE,
                f"{answer.custodian} answered in a window that nobody showed",
                expected="a window known before, or a statement with the answer",
                actual=f"window {answer.window}",
            )
        verify_answer(
            answer,
            self._windows[place],
            self._job.subject,
            leaf_hash,
            key_id=self._job.key_id,
            epoch=self._job.epoch,
        )

    def combination(self, *, confirmed: bool) -> Combination | None:
        """The key, once enough agree; with ``confirmed`` only a confirmed one."""
        return self._combiner.result(require_confirmed=confirmed)

    @property
    def blamed(self) -> tuple[str, ...]:
        return self._combiner.blamed

    def worth_asking_again(self) -> bool:
        """Whether a new request, or time, may bring answers that did not come."""
        errors = [*self.refused.values(), *self.rejected.values()]
        silent = set(self._quorum.ids) - set(self.answered) - set(self.refused) - set(self.rejected)
        return bool(silent) or any(error.reason in _MAY_PASS for error in errors)

    def failure(self) -> KeyquorumError:
        """Why there is no key, naming each custodian that didn't contribute.

        Where every custodian said no for one and the same reason, that is the reason; otherwise ``NO_QUORUM``.
        """
        missing: dict[str, KeyquorumError | None] = dict.fromkeys(self._quorum.ids)
        missing.update(self.refused)
        missing.update(self.rejected)
        for name in self.answered:
            missing.pop(name, None)
        details = {
            name: "no answer" if error is None else f"{error.reason}: {error.message}"
            for name, error in missing.items()
        }
        for name in self.blamed:
            details[name] = f"{Reason.BLAME}: gave contributions that contradict the others'"
        reasons = {None if error is None else error.reason for error in missing.values()}
        first = next((error for error in missing.values() if error is not None), None)
        if len(reasons) == 1 and first is not None and first.reason not in _NOT_ASKED and not self.answered:
            return type(first)(
                first.reason,
                f"every custodian's answer was no: {first.message}",
                expected=first.expected,
                actual=first.actual,
                next_step=first.next_step,
                details=details,
            )
        missing_words = str(self._combiner.missing())
        contradicted = self._quorum.is_qualified(self.answered)
        kind = RefusedError if contradicted else UnavailableError
        return kind(
            Reason.BLAME if contradicted else Reason.NO_QUORUM,
            "no quorum of custodians gave the job's key: "
            + ("; ".join(f"{name} ({text})" for name, text in sorted(details.items())) or missing_words),
            expected=self._quorum.words(),
            actual=f"answers of {', '.join(sorted(self.answered)) or 'nobody'}: {missing_words}",
            next_step="Try again when those named are back; 'keyquorum quorum explain' shows which sets suffice",
            details=details,
        )
