"""One error base for the product, one reason code per failed check.

Four kinds, because a caller reacts to them differently: the input is not what it claims to be
(:class:`MalformedError`), a check said no (:class:`RefusedError`), the check could not be made or nobody
could be asked (:class:`UnavailableError`), the operation does not fit the present state (:class:`StateError`).
On the wire a kind becomes a gRPC status and the rest a ``google.rpc.ErrorInfo`` (``keyquorum_protos.wire.errors``).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import ClassVar

__all__ = [
    "KeyquorumError",
    "MalformedError",
    "Reason",
    "RefusedError",
    "StateError",
    "UnavailableError",
    "printable",
]


def printable(text: str) -> str:
    """``text``, some of which others may have written, safe for a terminal: control characters, which begin escape
    sequences, become U+FFFD; line feeds and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


class Reason(StrEnum):
    """Reason codes: stable, part of the API. One per check."""

    # input
    MALFORMED = "MALFORMED"
    TOO_LARGE = "TOO_LARGE"
    UNSUPPORTED = "UNSUPPORTED"
    # signatures and identities
    SIGNATURE = "SIGNATURE"
    SIGNATURE_MISSING = "SIGNATURE_MISSING"
    SIGNATURE_EXTRA = "SIGNATURE_EXTRA"
    UNKNOWN_OWNER = "UNKNOWN_OWNER"
    UNKNOWN_CUSTODIAN = "UNKNOWN_CUSTODIAN"
    UNKNOWN_OPERATOR = "UNKNOWN_OPERATOR"
    ROSTER = "ROSTER"
    BULLETIN = "BULLETIN"
    ROLLBACK = "ROLLBACK"
    ROLE = "ROLE"
    # manifest and job
    NOT_YET_VALID = "NOT_YET_VALID"
    EXPIRED = "EXPIRED"
    WRONG_JOB = "WRONG_JOB"
    DIGEST = "DIGEST"
    LEAF = "LEAF"
    BUNDLE = "BUNDLE"
    # keys and epochs
    UNKNOWN_KEY = "UNKNOWN_KEY"
    KEY_STATE = "KEY_STATE"
    EPOCH = "EPOCH"
    QUORUM_RULE = "QUORUM_RULE"
    NO_QUORUM = "NO_QUORUM"
    BLAME = "BLAME"
    CEREMONY = "CEREMONY"
    APPROVAL = "APPROVAL"
    CANARY = "CANARY"
    # sealing and artifacts
    UNSEAL = "UNSEAL"
    ARTIFACT = "ARTIFACT"
    PASSPHRASE = "PASSPHRASE"  # noqa: S105 - a reason code
    # recipient and evidence
    RECIPIENT = "RECIPIENT"
    EVIDENCE_TYPE = "EVIDENCE_TYPE"
    CHAIN = "CHAIN"
    ROOT_NOT_PINNED = "ROOT_NOT_PINNED"
    TCB = "TCB"
    CHIP_ID = "CHIP_ID"
    DEBUG_ENABLED = "DEBUG_ENABLED"
    VMPL = "VMPL"
    PLATFORM = "PLATFORM"
    MEASUREMENT = "MEASUREMENT"
    BINDING = "BINDING"
    STALE = "STALE"
    PROVENANCE = "PROVENANCE"
    REGION = "REGION"
    REVOKED = "REVOKED"
    POLICY = "POLICY"
    # service
    QUOTA = "QUOTA"
    SEALED = "SEALED"
    ATTEMPTS = "ATTEMPTS"
    RESTORED = "RESTORED"
    STATE = "STATE"
    NOT_FOUND = "NOT_FOUND"
    EXISTS = "EXISTS"
    UNAVAILABLE = "UNAVAILABLE"
    TIMEOUT = "TIMEOUT"
    STORAGE = "STORAGE"
    SANDBOX = "SANDBOX"
    JOB_FAILED = "JOB_FAILED"
    LEASE = "LEASE"
    QUARANTINED = "QUARANTINED"
    INTERNAL = "INTERNAL"
    # ledger
    LEDGER_ORIGIN = "LEDGER_ORIGIN"
    LEDGER_PROOF = "LEDGER_PROOF"
    LEDGER_FORK = "LEDGER_FORK"
    LEDGER_ROLLBACK = "LEDGER_ROLLBACK"
    LEDGER_CONFLICT = "LEDGER_CONFLICT"
    LEDGER_UNWITNESSED = "LEDGER_UNWITNESSED"


class KeyquorumError(Exception):
    """What failed, what was expected, what came, and what to do next.

    ``expected``, ``actual`` and every detail are shown to people and written to logs: never put a secret there.
    """

    kind: ClassVar[str] = "error"

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        expected: object = None,
        actual: object = None,
        next_step: str = "",
        details: Mapping[str, str] | None = None,
    ) -> None:
        self.reason = reason
        self.message = message
        self.expected = "" if expected is None else str(expected)
        self.actual = "" if actual is None else str(actual)
        self.next_step = next_step
        self.details: dict[str, str] = dict(details or {})
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.reason}: {self.message}"
        if self.expected or self.actual:
            text += f" (expected {self.expected or 'nothing'}, got {self.actual or 'nothing'})"
        if self.next_step:
            text += f". {self.next_step}"
        return text

    def for_people(self) -> str:
        """The error on a terminal: what was refused, then each part that there is on a line of its own."""
        parts = [("expected", self.expected), ("got", self.actual), ("next step", self.next_step)]
        lines = [f"refused: {self.reason}: {self.message}"]
        lines += [f"  {label}: {text}" for label, text in [*parts, *sorted(self.details.items())] if text]
        return printable("\n".join(lines))

    def as_dict(self) -> dict[str, object]:
        """The error for ``--json`` output and structured logs."""
        return {
            "kind": self.kind,
            "reason": str(self.reason),
            "message": self.message,
            "expected": self.expected,
            "actual": self.actual,
            "next_step": self.next_step,
            "details": self.details,
        }


class MalformedError(KeyquorumError):
    """The bytes are not a well-formed instance of what they claim to be."""

    kind = "malformed"


class RefusedError(KeyquorumError):
    """A check was made and said no."""

    kind = "refused"


class UnavailableError(KeyquorumError):
    """The check could not be made, or nobody could be asked; trying again may help."""

    kind = "unavailable"


class StateError(KeyquorumError):
    """The request is well-formed and allowed, but does not fit the present state: missing, there already, too soon."""

    kind = "state"
