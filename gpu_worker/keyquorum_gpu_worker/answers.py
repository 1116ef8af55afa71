"""Custodians' answers to one job as the coordinator passes them on: each is verified before it counts.

An answer that does not verify is recorded and skipped, since the coordinator could have made it up; one that its
custodian signed and that is wrong blames that custodian by name. The key must meet the key check that the owner signed.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from keyquorum_core.derivation import Combination, Combiner, context
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.manifest import Manifest, Opening, subject
from keyquorum_core.quorum import Quorum
from keyquorum_core.release import Answer, Leaf, Window, open_share, open_window, verify_answer
from keyquorum_core.roster import Roster
from keyquorum_gpu_worker.keys import JobKeys

__all__ = ["Answers", "Challenge", "JobDocuments"]

_AGAIN = frozenset({Reason.STALE, Reason.UNAVAILABLE, Reason.TIMEOUT})
"""Refusals that a new challenge, or a little time, may cure."""


@dataclass(frozen=True, slots=True)
class JobDocuments:
    """A job's verified documents. ``payload`` is the manifest's, exactly as signed."""

    job_id: str
    manifest: Manifest
    payload: bytes
    opening: Opening

    @property
    def subject(self) -> bytes:
        """SHA-256 of the manifest payload, 32 bytes."""
        return subject(self.payload)


@dataclass(frozen=True, slots=True)
class Challenge:
    """Current, verified windows by custodian, and why others' statements do not count."""

    windows: dict[str, Window]
    doubts: dict[str, KeyquorumError]


class Answers:
    """Collects the custodians' answers to one job until they give its key.

    What counted goes on counting over several requests: contributions belong to the job, not to the request.
    """

    def __init__(
        self, documents: JobDocuments, roster: Roster, quorum: Quorum, keys: JobKeys, clock: Callable[[], float]
    ) -> None:
        manifest = documents.manifest
        self._documents = documents
        self._roster = roster
        self._quorum = quorum
        self._keys = keys
        self._clock = clock
        self._combiner = Combiner(
            quorum,
            context(manifest.key_id, manifest.epoch, "job", documents.subject),
            documents.opening.key_check_bytes,
        )
        self._leaf: tuple[bytes, bytes] | None = None
        self._evidence_sha256 = ""
        self._windows: dict[tuple[str, int], Window] = {}
        self.answered: list[str] = []
        """Custodians whose answer counted, in order of arrival."""
        self.refused: dict[str, KeyquorumError] = {}
        """By the coordinator's word."""
        self.rejected: dict[str, KeyquorumError] = {}
        """In whose name an answer came that does not verify."""

    def ask(self, challenge: Challenge, evidence: bytes) -> None:
        """A new request begins, with these windows and this evidence; a new leaf comes with its answers."""
        self._leaf = None
        self._evidence_sha256 = hashlib.sha256(evidence).hexdigest()
        self._windows |= {(name, window.window): window for name, window in challenge.windows.items()}
        self.refused.clear()
        self.rejected.clear()
        for name, error in challenge.doubts.items():
            self.rejected[name] = error

    def take_leaf(self, data: bytes) -> None:
        """Raises :class:`RefusedError` or :class:`MalformedError` unless it is this release's: then nothing counts."""
        if self._leaf is not None:
            if not hmac.compare_digest(self._leaf[0], data):
                raise RefusedError(Reason.LEAF, "the coordinator changed the leaf between two answers")
            return
        leaf = Leaf.parse(data)
        manifest = self._documents.manifest
        for reason, what, expected, actual in (
            (Reason.WRONG_JOB, "job", self._documents.job_id, leaf.job_id),
            (Reason.WRONG_JOB, "manifest", self._documents.subject.hex(), leaf.manifest_sha256),
            (Reason.UNKNOWN_KEY, "key", manifest.key_id, leaf.key_id),
            (Reason.EPOCH, "epoch", str(manifest.epoch), str(leaf.epoch)),
            (Reason.RECIPIENT, "kind of recipient", "worker", leaf.recipient),
            (
                Reason.RECIPIENT,
                "recipient key",
                hashlib.sha256(self._keys.recipient.public).hexdigest(),
                leaf.recipient_sha256,
            ),
            (Reason.LEAF, "evidence", self._evidence_sha256, leaf.evidence_sha256),
        ):
            if not hmac.compare_digest(expected.encode(), actual.encode()):
                raise RefusedError(reason, f"the release names another {what}", expected=expected, actual=actual)
        self._leaf = (data, leaf.hash())

    def take_refusal(self, custodian: str, error: KeyquorumError) -> None:
        if custodian in self._quorum.ids and custodian not in self.answered:
            self.refused[custodian] = error

    def take(self, answer: Answer, window_statement: bytes) -> None:
        """Verify and count one answer; one that does not verify is recorded, not raised."""
        if self._leaf is None:
            raise RefusedError(Reason.LEAF, "an answer came before the leaf that it answers to")
        if answer.custodian in self.answered:
            return
        try:
            window = self._window_of(answer, window_statement)
            manifest = self._documents.manifest
            verify_answer(
                answer,
                window,
                self._documents.subject,
                self._leaf[1],
                key_id=manifest.key_id,
                epoch=manifest.epoch,
            )
        except KeyquorumError as error:
            self.rejected[answer.custodian[:32]] = error
            return
        try:
            contributions = open_share(answer, self._keys.recipient, self._leaf[1], self._quorum)
        except KeyquorumError as error:
            # Its custodian signed exactly this ciphertext: nobody else can have spoilt it.
            self._combiner.reject(answer.custodian, f"{error.reason}: {error.message}")
        else:
            self._combiner.add(answer.custodian, contributions)
        self.answered.append(answer.custodian)
        self.rejected.pop(answer.custodian, None)
        self.refused.pop(answer.custodian, None)

    def _window_of(self, answer: Answer, statement: bytes) -> Window:
        custodian = self._roster.custodian(answer.custodian)
        place = (custodian.id, answer.window)
        if statement and place not in self._windows:
            window = open_window(
                statement,
                custodian.identity,
                custodian=custodian.id,
                cluster=self._roster.cluster,
                now=int(self._clock()),
            )
            self._windows[custodian.id, window.window] = window
        if place not in self._windows:
            raise RefusedError(
                Reason.STALE,
                f"{custodian.id} answered in a window that nobody showed",
                expected="a window of the challenge, or a statement with the answer",
                actual=f"window {answer.window}",
            )
        return self._windows[place]

    def combination(self) -> Combination | None:
        return self._combiner.result()

    @property
    def blamed(self) -> tuple[str, ...]:
        return self._combiner.blamed

    def worth_asking_again(self) -> bool:
        """Whether a new challenge, or time, may bring answers that did not come."""
        errors = [*self.refused.values(), *self.rejected.values()]
        silent = set(self._quorum.ids) - set(self.answered) - set(self.refused) - set(self.rejected)
        return bool(silent) or any(error.reason in _AGAIN for error in errors)

    def failure(self) -> KeyquorumError:
        """Why there is no key, naming everyone who did not contribute and why.

        Where all who were asked refused for one and the same reason, that is the reason; ``BLAME`` where enough
        answered but contradict the key check; otherwise ``NO_QUORUM``.
        """
        missing: dict[str, KeyquorumError | None] = dict.fromkeys(self._quorum.ids)
        missing |= self.refused
        missing |= self.rejected
        for name in self.answered:
            missing.pop(name, None)
        details = {
            name: "no answer" if error is None else f"{error.reason}: {error.message}"
            for name, error in missing.items()
        }
        details |= dict.fromkeys(self.blamed, f"{Reason.BLAME}: its contributions are wrong")
        told = [error for error in missing.values() if error is not None]
        reasons = {error.reason for error in told}
        if not self.answered and len(told) == len(missing) and len(reasons) == 1 and not reasons & _AGAIN:
            first = told[0]
            return type(first)(
                first.reason,
                f"every custodian refused this worker: {first.message}",
                expected=first.expected,
                actual=first.actual,
                next_step=first.next_step,
                details=details,
            )
        contradicted = self._quorum.is_qualified(self.answered)
        kind = RefusedError if contradicted else UnavailableError
        lacking = str(self._combiner.missing())
        return kind(
            Reason.BLAME if contradicted else Reason.NO_QUORUM,
            "no quorum of custodians gave the job's key: "
            + ("; ".join(f"{name} ({text})" for name, text in sorted(details.items())) or lacking),
            expected=self._quorum.words(),
            actual=f"answers of {', '.join(sorted(self.answered)) or 'nobody'}: {lacking}",
            next_step="Submit the job again when those named are back.",
            details=details,
        )
