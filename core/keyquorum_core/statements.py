"""What is signed about a job after its manifest: the owner's opening and the worker's result statement (DESIGN §5, §6).

Both are RFC 8785 JSON in DSSE envelopes and small; objects are valid from the moment they exist. Exact bytes:
docs/spec/manifest.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from keyquorum_core import jcs
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.names import JOB_ID, SHA256_HEX, check, within
from keyquorum_core.signing import Identity, PublicIdentity, open_envelope, sign
from keyquorum_core.strictjson import Fields, loads

__all__ = [
    "ARTIFACT_KINDS",
    "OPENING_TYPE",
    "OUTCOMES",
    "RESULT_TYPE",
    "ArtifactDigest",
    "Opening",
    "ResultStatement",
    "open_opening",
    "open_result",
    "sign_opening",
    "sign_result",
]

OPENING_TYPE: Final = "application/vnd.keyquorum.opening.v1+json"
RESULT_TYPE: Final = "application/vnd.keyquorum.result.v1+json"

ARTIFACT_KINDS: Final = frozenset({"result", "log"})
OUTCOMES: Final = frozenset(
    {
        "completed",
        "failed",
        "timeout",
        "out-of-memory",
        "output-too-large",
        "lease-expired",
        "revoked",
        "cancelled",
        "refused",
    }
)

_KEY_CHECK: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)


def _bad(what: str, expected: str, actual: object = None) -> MalformedError:
    return MalformedError(Reason.MALFORMED, what, expected=expected, actual=actual)


def _canonical(expected: bytes, data: bytes, what: str) -> None:
    if expected != data:
        raise _bad(f"the {what} is not canonical", "RFC 8785 JSON", "the same values written otherwise")


@dataclass(frozen=True, slots=True)
class Opening:
    """What the owner signs once the job's key was first derived and the bundle encrypted: so that workers can tell the
    right key (``key_check``, hex of 16 bytes) and the right ciphertext. ``confirmed``: each seed was reported twice."""

    job_id: str
    key_check: str
    bundle_sha256: str
    bundle_size: int
    confirmed: bool

    def __post_init__(self) -> None:
        check(JOB_ID, self.job_id, "job id")
        check(_KEY_CHECK, self.key_check, "key check")
        check(SHA256_HEX, self.bundle_sha256, "bundle digest")
        within(self.bundle_size, "bundle size", 1)

    @property
    def key_check_bytes(self) -> bytes:
        return bytes.fromhex(self.key_check)

    def payload(self) -> bytes:
        """RFC 8785 JSON."""
        return jcs.dumps(
            {
                "bundle_sha256": self.bundle_sha256,
                "bundle_size": self.bundle_size,
                "confirmed": self.confirmed,
                "job_id": self.job_id,
                "key_check": self.key_check,
            }
        )

    @staticmethod
    def parse(data: bytes) -> Opening:
        """Strict inverse of :meth:`payload`; raises :class:`MalformedError`."""
        fields = Fields(loads(data, "opening", max_bytes=4096, max_depth=1), "opening")
        opening = Opening(
            job_id=fields.text("job_id"),
            key_check=fields.text("key_check"),
            bundle_sha256=fields.text("bundle_sha256"),
            bundle_size=fields.integer("bundle_size"),
            confirmed=fields.boolean("confirmed"),
        )
        fields.done()
        _canonical(opening.payload(), data, "opening")
        return opening


def sign_opening(opening: Opening, identity: Identity) -> bytes:
    """DSSE envelope by the owner."""
    return sign(identity, OPENING_TYPE, opening.payload())


def open_opening(envelope: bytes, owner: PublicIdentity, job: str) -> Opening:
    """The opening of job ``job``, signed by ``owner``. Raises as :func:`open_envelope`, and ``WRONG_JOB``."""
    opening = Opening.parse(open_envelope(envelope, OPENING_TYPE, owner, "opening", max_bytes=32768))
    _check_job(opening.job_id, job, "opening")
    return opening


def _check_job(actual: str, expected: str, what: str) -> None:
    if actual != expected:
        raise RefusedError(Reason.WRONG_JOB, f"the {what} is for another job", expected=expected, actual=actual)


@dataclass(frozen=True, slots=True)
class ArtifactDigest:
    """SHA-256 (lower-case hex) and size in bytes of an artifact's ciphertext."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        check(SHA256_HEX, self.sha256, "artifact digest")
        within(self.size, "artifact size")


@dataclass(frozen=True, slots=True)
class ResultStatement:
    """What the worker signs about a job it ran, with the signing key that its evidence binds.

    ``worker`` is that key's fingerprint; ``exit_code`` is the process's (negative: ended by that signal); ``reason``
    explains an ``outcome`` other than ``completed``; ``artifacts`` has ``result`` and ``log`` where there are any.
    """

    job_id: str
    worker: str
    exit_code: int
    outcome: str
    reason: str
    artifacts: Mapping[str, ArtifactDigest]
    started_at: int
    finished_at: int

    def __post_init__(self) -> None:
        check(JOB_ID, self.job_id, "job id")
        check(SHA256_HEX, self.worker, "worker fingerprint")
        within(self.exit_code, "exit code", -255, 255)
        if self.outcome not in OUTCOMES:
            raise _bad("unknown outcome", ", ".join(sorted(OUTCOMES)), ascii(self.outcome[:40]))
        if len(self.reason) > 1024 or not all(c.isprintable() or c == "\n" for c in self.reason):
            raise _bad("bad reason", "at most 1024 printable characters", f"{len(self.reason)} characters")
        if not set(self.artifacts) <= ARTIFACT_KINDS:
            raise _bad("unknown artifact kind", ", ".join(sorted(ARTIFACT_KINDS)))
        within(self.started_at, "started_at")
        within(self.finished_at, "finished_at", self.started_at)

    def payload(self) -> bytes:
        """RFC 8785 JSON."""
        return jcs.dumps(
            {
                "artifacts": {kind: {"sha256": a.sha256, "size": a.size} for kind, a in self.artifacts.items()},
                "exit_code": self.exit_code,
                "finished_at": self.finished_at,
                "job_id": self.job_id,
                "outcome": self.outcome,
                "reason": self.reason,
                "started_at": self.started_at,
                "worker": self.worker,
            }
        )

    @staticmethod
    def parse(data: bytes) -> ResultStatement:
        """Strict inverse of :meth:`payload`; raises :class:`MalformedError`."""
        fields = Fields(loads(data, "result statement", max_bytes=16384, max_depth=3), "result statement")
        members = fields.object("artifacts")
        artifacts = {}
        for kind in members.names():
            entry = members.object(kind)
            artifacts[kind] = ArtifactDigest(entry.text("sha256"), entry.integer("size"))
            entry.done()
        statement = ResultStatement(
            job_id=fields.text("job_id"),
            worker=fields.text("worker"),
            exit_code=fields.integer("exit_code", minimum=-255, maximum=255),
            outcome=fields.text("outcome"),
            reason=fields.text("reason", max_length=1024, allow_empty=True),
            artifacts=artifacts,
            started_at=fields.integer("started_at"),
            finished_at=fields.integer("finished_at"),
        )
        fields.done()
        _canonical(statement.payload(), data, "result statement")
        return statement


def sign_result(statement: ResultStatement, identity: Identity) -> bytes:
    """DSSE envelope by the worker's signing key, which the statement must name."""
    if statement.worker != identity.public.fingerprint:
        raise _bad("the result statement names another worker key", identity.public.fingerprint, statement.worker)
    return sign(identity, RESULT_TYPE, statement.payload())


def open_result(envelope: bytes, worker: PublicIdentity, job: str) -> ResultStatement:
    """The result statement of job ``job`` by the signing key that ``worker``'s evidence binds.

    Raises as :func:`open_envelope`, and ``WRONG_JOB``, ``DIGEST`` (it names another signing key).
    """
    statement = ResultStatement.parse(open_envelope(envelope, RESULT_TYPE, worker, "result statement", max_bytes=65536))
    _check_job(statement.job_id, job, "result statement")
    if statement.worker != worker.fingerprint:
        raise RefusedError(
            Reason.DIGEST,
            "the result statement names another signing key",
            expected=worker.fingerprint[:16],
            actual=statement.worker[:16],
        )
    return statement
