"""What the ledger says, by type (DESIGN §8): one small JSON object a leaf, of digests, numbers and fixed words.

No leaf names a person, an owner or a file: an owner is the digest of its public identity, a document the digest of its
bytes. Leaves are RFC 8785 JSON, each with its ``type`` and, but for ``release.intent`` (:mod:`keyquorum_core.release`),
the ``version`` of that type; a reader refuses a version it does not know. Exact members: docs/spec/leaves.md.

Digests are lower-case hex of a SHA-256, :data:`NOTHING` where there was nothing to take it of. Times are unix seconds.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Final, Self, get_type_hints

from keyquorum_core import jcs, release
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.ledger.leaf_members import (
    Bool,
    Count,
    Integer,
    JobId,
    KeyId,
    Kind,
    MaybeReason,
    ReasonCode,
    Seat,
    Sha256,
    Texts,
    Time,
    Word,
    text,
)
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.strictjson import Fields, loads

__all__ = [
    "LEAF_TYPES",
    "MAX_LEAF",
    "NOTHING",
    "NO_POLICY",
    "Alarm",
    "Ceremony",
    "Drill",
    "JobDenied",
    "JobSubmitted",
    "LedgerLeaf",
    "PolicyDecision",
    "Result",
    "Revocation",
    "RosterInUse",
    "Telemetry",
    "custodian_seat",
    "parse_leaf",
]

NOTHING: Final = hashlib.sha256(b"").hexdigest()
"""The digest of nothing."""
MAX_LEAF: Final = 8192
"""Bytes in the largest leaf of any type here."""


# -- leaves ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLeaf:
    """What all leaves of a type share. Raises :class:`MalformedError` (``LEAF``) when made with anything that does not
    fit its members' kinds."""

    TYPE: ClassVar[str]
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name, kind in _members(type(self)).items():
            if not kind.fits(getattr(self, name)):
                raise _bad(self.TYPE, f"bad member {name!r}", kind.words, getattr(self, name))

    def to_bytes(self) -> bytes:
        """RFC 8785 JSON."""
        members = {name: getattr(self, name) for name in _members(type(self))}
        return jcs.dumps({**members, "type": self.TYPE, "version": self.VERSION})

    def hash(self) -> bytes:
        """RFC 6962 §2.1 leaf hash, 32 bytes."""
        return leaf_hash(self.to_bytes())

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Strict: exactly the bytes that :meth:`to_bytes` makes. Raises :class:`MalformedError`: ``LEAF``, and
        ``UNSUPPORTED`` for another version of the type."""
        what = f"{cls.TYPE} leaf"
        members = Fields(loads(data, what, max_bytes=MAX_LEAF, max_depth=2), what)
        members.literal("type", cls.TYPE)
        version = members.integer("version", 1)
        if version != cls.VERSION:
            raise MalformedError(
                Reason.UNSUPPORTED, f"a {what} of another version", expected=cls.VERSION, actual=version
            )
        values = {name: members.raw(name) for name in _members(cls)}
        members.done()
        leaf = cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        if leaf.to_bytes() != data:
            raise MalformedError(Reason.LEAF, f"a {what} is not canonical", expected="RFC 8785 JSON")
        return leaf


_kinds: dict[str, dict[str, Kind]] = {}


def _members(leaf: type[LedgerLeaf]) -> dict[str, Kind]:
    if leaf.TYPE not in _kinds:
        hints = get_type_hints(leaf, include_extras=True)
        _kinds[leaf.TYPE] = {field.name: hints[field.name].__metadata__[0] for field in fields(leaf)}
    return _kinds[leaf.TYPE]


def _bad(what: str, message: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.LEAF, f"{what} leaf: {message}", expected=expected, actual=ascii(actual)[:80])


@dataclass(frozen=True, slots=True)
class PolicyDecision:
    """What a seat decided by: digest and version of the policy bundle, and the digest of the decision's record."""

    policy_sha256: str
    policy_version: int
    decision_sha256: str

    def members(self) -> dict[str, str | int]:
        """As a leaf has them."""
        return {
            "policy_sha256": self.policy_sha256,
            "policy_version": self.policy_version,
            "decision_sha256": self.decision_sha256,
        }


NO_POLICY: Final = PolicyDecision(NOTHING, 0, NOTHING)
"""No policy was consulted: none is installed, or an earlier check refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decided(LedgerLeaf):
    """A leaf about a policy's decision: the three members of a :class:`PolicyDecision`, all or none of them."""

    policy_sha256: Sha256
    policy_version: Count
    decision_sha256: Sha256

    def __post_init__(self) -> None:
        LedgerLeaf.__post_init__(self)
        absent = (self.policy_sha256 == NOTHING, self.policy_version == 0, self.decision_sha256 == NOTHING)
        if len(set(absent)) != 1:
            raise _bad(self.TYPE, "half a policy decision", "policy, version and decision, or none of them", absent)


_REGION: Final = re.compile(r"[A-Z]{2}|[a-z0-9-]{2,32}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSubmitted(_Decided):
    """The coordinator took a job. ``owner_sha256``: digest of the owner's public identity; ``manifest_sha256``: of the
    manifest's payload. Classification, export class and regions are the manifest's."""

    TYPE: ClassVar[str] = "job.submitted"

    job_id: JobId
    manifest_sha256: Sha256
    owner_sha256: Sha256
    key_id: KeyId
    epoch: Count
    classification: Annotated[str, text("[a-z0-9-]{1,32}")]
    export_control: Annotated[str, text("[A-Za-z0-9. -]{0,64}")]
    regions: Annotated[tuple[str, ...], Texts(_REGION, 64)]
    time: Time


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDenied(_Decided):
    """A seat refused: the coordinator a submission, or a custodian the release that the leaf with hash
    ``intent_sha256`` announced (:data:`NOTHING` for a submission). ``reason`` is the reason code."""

    TYPE: ClassVar[str] = "job.denied"

    job_id: JobId
    manifest_sha256: Sha256
    owner_sha256: Sha256
    key_id: KeyId
    epoch: Count
    intent_sha256: Sha256
    seat: Seat
    reason: ReasonCode
    time: Time

    def __post_init__(self) -> None:
        _Decided.__post_init__(self)
        if self.seat == "monitor" or (self.seat == "coordinator") != (self.intent_sha256 == NOTHING):
            raise _bad(self.TYPE, "what was refused does not fit who did", "coordinator, or a release", self.seat)


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry(LedgerLeaf):
    """A batch of a worker's telemetry. ``statement_sha256``: digest of the batch's statement, signed with the attested
    key ``worker_sha256``, which that evidence binds; ``previous_sha256``: of the batch before it, :data:`NOTHING` for
    ``sequence`` 0; ``content_sha256``: of the encrypted records, which are kept beside."""

    TYPE: ClassVar[str] = "telemetry"

    job_id: JobId
    worker_sha256: Sha256
    evidence_sha256: Sha256
    sequence: Count
    previous_sha256: Sha256
    statement_sha256: Sha256
    content_sha256: Sha256
    records: Count
    last: Bool
    development: Bool
    time: Time

    def __post_init__(self) -> None:
        LedgerLeaf.__post_init__(self)
        if (self.sequence == 0) != (self.previous_sha256 == NOTHING):
            raise _bad(self.TYPE, "a broken chain", "a batch before every one but the first", self.sequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(LedgerLeaf):
    """How a job ended: ``completed``, ``failed``, ``cancelled`` or ``expired``, with the reason code unless completed.

    ``statement_sha256``: digest of the worker's signed statement; ``result_sha256`` and ``log_sha256``: of the
    encrypted artifacts that it names; ``evidence_sha256``: of the evidence whose key signed it. Each is
    :data:`NOTHING` where there is none, as for a job that no worker ended."""

    TYPE: ClassVar[str] = "result"

    job_id: JobId
    outcome: Annotated[str, text("completed|failed|cancelled|expired")]
    reason: MaybeReason
    statement_sha256: Sha256
    evidence_sha256: Sha256
    result_sha256: Sha256
    log_sha256: Sha256
    development: Bool
    time: Time

    def __post_init__(self) -> None:
        LedgerLeaf.__post_init__(self)
        completed = self.outcome == "completed"
        if completed != (self.reason == "") or (completed and self.statement_sha256 == NOTHING):
            raise _bad(self.TYPE, "the outcome does not fit", "a reason, or a worker's statement", self.outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceremony(LedgerLeaf):
    """How a ceremony ended. ``certificate_sha256``: digest of the payload of what all custodians signed at its end, an
    epoch certificate or receipts of destruction; :data:`NOTHING`, and a reason, for one that was given up."""

    TYPE: ClassVar[str] = "ceremony"

    ceremony_id: Annotated[str, text("[0-9a-f]{32}")]
    kind: Annotated[str, text("generate|rotate|repair|replace|destroy")]
    key_id: KeyId
    epoch: Count
    plan_sha256: Sha256
    roster_sha256: Sha256
    certificate_sha256: Sha256
    reason: MaybeReason
    time: Time

    def __post_init__(self) -> None:
        LedgerLeaf.__post_init__(self)
        if (self.certificate_sha256 == NOTHING) != (self.reason != ""):
            raise _bad(self.TYPE, "the end does not fit the reason", "a certificate, or a reason", self.reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class RosterInUse(LedgerLeaf):
    """A roster that the coordinator began to use. ``roster_sha256``: digest of its payload."""

    TYPE: ClassVar[str] = "roster"

    roster_sha256: Sha256
    roster_version: Annotated[int, Integer(1)]
    custodians: Annotated[int, Integer(2)]
    expires_at: Time
    time: Time


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation(LedgerLeaf):
    """Operators withdrew something: a ``worker``, ``hardware``, a ``key``, an ``owner``, a ``job`` … ``subject_sha256``
    is the digest of what it is called in the operators' document, whose digest and version stand beside it."""

    TYPE: ClassVar[str] = "revocation"

    target: Word
    subject_sha256: Sha256
    document_sha256: Sha256
    document_version: Count
    time: Time


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill(LedgerLeaf):
    """A rehearsed failure. ``report_sha256``: digest of the signed report; times in milliseconds are those measured."""

    TYPE: ClassVar[str] = "drill"

    drill: Word
    passed: Bool
    report_sha256: Sha256
    duration_ms: Count
    time: Time


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm(LedgerLeaf):
    """Something that must not be. ``alarm``: ``fork``, ``rollback``, ``log-stalled``, ``unlogged-release`` …;
    ``evidence_sha256``: digest of what shows it, for a fork the two signed checkpoints."""

    TYPE: ClassVar[str] = "alarm"

    alarm: Word
    seat: Seat
    evidence_sha256: Sha256
    time: Time


_TYPES: Final[dict[str, type[LedgerLeaf]]] = {
    leaf.TYPE: leaf
    for leaf in (JobSubmitted, JobDenied, Telemetry, Result, Ceremony, RosterInUse, Revocation, Drill, Alarm)
}
LEAF_TYPES: Final = frozenset({*_TYPES, release.LEAF_TYPE})
"""Every ``type`` that a leaf can have."""


def custodian_seat(custodian_id: str) -> str:
    """A custodian as the ``seat`` of a leaf."""
    return f"custodian/{custodian_id}"


def parse_leaf(data: bytes) -> LedgerLeaf | release.Leaf:
    """A leaf of any type. Raises :class:`MalformedError`: ``UNSUPPORTED`` for a type or version that is not known."""
    parsed = loads(data, "leaf", max_bytes=MAX_LEAF, max_depth=2)
    found = Fields(parsed, "leaf").text("type", max_length=40)
    if found == release.LEAF_TYPE:
        return release.Leaf.parse(data)
    if found not in _TYPES:
        raise MalformedError(
            Reason.UNSUPPORTED,
            "a leaf of an unknown type",
            expected=", ".join(sorted(LEAF_TYPES)),
            actual=ascii(found),
        )
    return _TYPES[found].parse(data)
