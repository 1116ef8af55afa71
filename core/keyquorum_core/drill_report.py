"""The report of a drill: what was rehearsed on a canary key, what was measured, what was expected and what came.

The coordinator signs it with the drill identity that the profile pins, and enters its digest in the ledger. A report
cannot say that a drill passed whose checks did not: :class:`Part` and :class:`DrillReport` refuse to be made that way,
and so does reading one. Exact bytes: docs/spec/drill-report.md.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from keyquorum_core import jcs
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.names import CLUSTER, CUSTODIAN_ID, KEY_ID, PRINCIPAL, SHA256_HEX, check, within
from keyquorum_core.signing import Identity, PublicIdentity, open_envelope, sign
from keyquorum_core.strictjson import Fields, canonical

__all__ = [
    "ABOUT",
    "DRILL_ID",
    "DRILL_REPORT_TYPE",
    "FULL",
    "KINDS",
    "MAX_CHECKS",
    "MAX_MOMENTS",
    "MAX_TEXT",
    "MAY_BE_SKIPPED",
    "Check",
    "DrillReport",
    "Moment",
    "Outcome",
    "Part",
    "clip",
    "open_report",
    "sign_report",
]

DRILL_REPORT_TYPE: Final = "application/vnd.keyquorum.drill-report.v1+json"
DRILL_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
ABOUT: Final = {
    "rotation": "rotate the canary key while it is released, then destroy the epoch before",
    "custodian-loss": "a custodian gives no answer",
    "slow-custodian": "a custodian answers late",
    "lying-custodian": "a custodian gives wrong contributions, and commits to wrong seeds in a rotation",
    "repair": "a custodian loses its seeds and gets them back from its co-holders",
    "restore": "a custodian's seeds are erased and restored from an encrypted backup",
    "revocation": "operators revoke the drill's owner, and lift it again",
    "forged-evidence": "a worker asks with forged evidence",
    "split-view": "a log shows two histories",
    "coordinator-loss": "what drives a ceremony is dropped in the middle, and a coordinator's start goes on with it",
}
"""Each kind of drill in the order in which ``full`` runs them, and what it rehearses."""
KINDS: Final = tuple(ABOUT)
FULL: Final = "full"
MAY_BE_SKIPPED: Final = frozenset({"revocation"})
"""Parts of a full drill that take somebody who need not be there: operators who sign."""
MAX_TEXT: Final = 400
MAX_CHECKS: Final = 64
MAX_MOMENTS: Final = 1000
_MAX_MS: Final = 7 * 24 * 3600 * 1000
_MAX_REPORT: Final = 700 << 10
_STEPS: Final = re.compile(r"[a-z]{2,16}", re.ASCII)
_REASON: Final = re.compile(r"(?:[A-Z][A-Z0-9_]{1,39})?", re.ASCII)


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """It was cancelled, or its coordinator died: what it injected was undone."""
    SKIPPED = "skipped"
    """A part of a full drill that could not be rehearsed this time; its reason says why."""


def clip(text: str) -> str:
    """``text`` as a report can hold it: printable, on one line, of at most 400 characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "…"


@dataclass(frozen=True, slots=True)
class Check:
    """One assertion: what was looked at, what was expected, what came."""

    what: str
    expected: str
    actual: str
    passed: bool

    def __post_init__(self) -> None:
        for text in (self.what, self.expected, self.actual):
            _check_text(text, "a check's text")
        if not self.what:
            raise _bad("a check of nothing", "what was looked at", "")

    def as_json(self) -> dict[str, object]:
        return {"actual": self.actual, "expected": self.expected, "passed": self.passed, "what": self.what}

    @classmethod
    def read(cls, value: object) -> Check:
        fields = Fields(value, "check")
        found = cls(
            what=fields.text("what", max_length=MAX_TEXT),
            expected=fields.text("expected", max_length=MAX_TEXT, allow_empty=True),
            actual=fields.text("actual", max_length=MAX_TEXT, allow_empty=True),
            passed=fields.boolean("passed"),
        )
        fields.done()
        return found


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of drill as it was run. Times in milliseconds; ``at_ms`` since the drill began, ``detect_ms`` and
    ``recover_ms`` as docs/drills.md says for the kind, None where it did not come to that. ``custodians``: at whom the
    fault was injected. ``reason`` and ``cause``: what stopped it, or why it was skipped.

    Raises :class:`MalformedError` when it claims to have passed without checks that all did, or with a cause."""

    kind: str
    at_ms: int
    duration_ms: int
    outcome: Outcome
    custodians: tuple[str, ...] = ()
    detect_ms: int | None = None
    recover_ms: int | None = None
    reason: str = ""
    cause: str = ""
    checks: tuple[Check, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ABOUT:
            raise _bad("no such kind of drill", ", ".join(KINDS), self.kind)
        for value in (self.at_ms, self.duration_ms, self.detect_ms or 0, self.recover_ms or 0):
            within(value, "a drill's milliseconds", 0, _MAX_MS)
        for name in self.custodians:
            check(CUSTODIAN_ID, name, "custodian id")
        check(_REASON, self.reason, "reason code")
        _check_text(self.cause, "a part's cause")
        if len(self.checks) > MAX_CHECKS:
            raise _bad("too many checks", f"at most {MAX_CHECKS}", len(self.checks))
        sound = bool(self.checks) and all(each.passed for each in self.checks) and not (self.reason or self.cause)
        if self.outcome is Outcome.PASSED and not sound:
            raise _bad("a drill that did not pass says that it did", "checks that all passed, and no cause", self.kind)
        if self.outcome is Outcome.FAILED and sound:
            raise _bad("a drill that passed says that it failed", "a check that failed, or a cause", self.kind)
        if self.outcome is Outcome.SKIPPED and (self.checks or not self.cause):
            raise _bad("a part that was skipped", "no checks, and a cause", self.kind)

    def as_json(self) -> dict[str, object]:
        measured = {"detect_ms": self.detect_ms, "recover_ms": self.recover_ms}
        return {
            "at_ms": self.at_ms,
            "cause": self.cause,
            "checks": [each.as_json() for each in self.checks],
            "custodians": list(self.custodians),
            "duration_ms": self.duration_ms,
            "kind": self.kind,
            "outcome": str(self.outcome),
            "reason": self.reason,
        } | {name: value for name, value in measured.items() if value is not None}

    @classmethod
    def read(cls, value: object) -> Part:
        fields = Fields(value, "part of a drill")
        found = cls(
            kind=fields.text("kind", max_length=32),
            at_ms=fields.integer("at_ms"),
            duration_ms=fields.integer("duration_ms"),
            outcome=_outcome(fields),
            custodians=fields.texts("custodians", max_items=64, max_length=32),
            detect_ms=fields.integer("detect_ms") if "detect_ms" in fields else None,
            recover_ms=fields.integer("recover_ms") if "recover_ms" in fields else None,
            reason=fields.text("reason", max_length=40, allow_empty=True),
            cause=fields.text("cause", max_length=MAX_TEXT, allow_empty=True),
            checks=tuple(Check.read(each) for each in fields.list("checks", max_items=MAX_CHECKS)),
        )
        fields.done()
        return found


@dataclass(frozen=True, slots=True)
class Moment:
    """One entry of the timeline: ``step`` is start, inject, detect, recover, undo, check, note or done."""

    at_ms: int
    kind: str
    step: str
    custodian: str
    text: str

    def __post_init__(self) -> None:
        within(self.at_ms, "a drill's milliseconds", 0, _MAX_MS)
        if self.kind not in (*KINDS, FULL):
            raise _bad("no such kind of drill", ", ".join((*KINDS, FULL)), self.kind)
        check(_STEPS, self.step, "step of a drill")
        if self.custodian:
            check(CUSTODIAN_ID, self.custodian, "custodian id")
        _check_text(self.text, "a moment's text")

    def as_json(self) -> dict[str, object]:
        return {
            "at_ms": self.at_ms,
            "custodian": self.custodian,
            "kind": self.kind,
            "step": self.step,
            "text": self.text,
        }

    @classmethod
    def read(cls, value: object) -> Moment:
        fields = Fields(value, "moment of a drill")
        found = cls(
            at_ms=fields.integer("at_ms"),
            kind=fields.text("kind", max_length=32),
            step=fields.text("step", max_length=16),
            custodian=fields.text("custodian", max_length=32, allow_empty=True),
            text=fields.text("text", max_length=MAX_TEXT, allow_empty=True),
        )
        fields.done()
        return found


@dataclass(frozen=True, slots=True)
class DrillReport:
    """``kind``: one of :data:`KINDS`, or ``full``; ``started_at``: unix seconds; ``roster_sha256``: of the roster that
    was in force. It passed when each part did, but for those of :data:`MAY_BE_SKIPPED` in a full one.

    Raises :class:`MalformedError` for an outcome that its parts don't give, for a part that was skipped and may not be,
    and for one that passed and of which the timeline tells nothing."""

    drill_id: str
    kind: str
    cluster: str
    coordinator: str
    key_id: str
    roster_sha256: str
    started_at: int
    duration_ms: int
    outcome: Outcome
    parts: tuple[Part, ...]
    timeline: tuple[Moment, ...]

    def __post_init__(self) -> None:
        check(DRILL_ID, self.drill_id, "drill id")
        check(CLUSTER, self.cluster, "cluster name")
        check(PRINCIPAL, self.coordinator, "coordinator name")
        check(KEY_ID, self.key_id, "key id")
        check(SHA256_HEX, self.roster_sha256, "roster digest")
        within(self.started_at, "started_at", 1)
        within(self.duration_ms, "duration_ms", 0, _MAX_MS)
        if self.kind not in (*KINDS, FULL):
            raise _bad("no such kind of drill", ", ".join((*KINDS, FULL)), self.kind)
        if len(self.timeline) > MAX_MOMENTS:
            raise _bad("too long a timeline", f"at most {MAX_MOMENTS} moments", len(self.timeline))
        if list(self.timeline) != sorted(self.timeline, key=lambda each: each.at_ms):
            raise _bad("a timeline out of order", "moments in the order of their time", "another")
        kinds = [part.kind for part in self.parts]
        wanted = list(KINDS) if self.kind == FULL else [self.kind]
        if self.outcome is Outcome.INTERRUPTED:
            wanted = wanted[: len(kinds)]
        if kinds != wanted:
            raise _bad("the parts are not the drill's", ", ".join(wanted), ", ".join(kinds))
        skipped = {part.kind for part in self.parts if part.outcome is Outcome.SKIPPED}
        if skipped - (MAY_BE_SKIPPED if self.kind == FULL else frozenset()):
            raise _bad("a part was skipped", f"none but {', '.join(MAY_BE_SKIPPED)} of a full drill", sorted(skipped))
        told = {moment.kind for moment in self.timeline}
        untold = [part.kind for part in self.parts if part.outcome is Outcome.PASSED and part.kind not in told]
        if untold:
            raise _bad("a part that passed, and nothing happened", "moments in the timeline", ", ".join(untold))
        if self.outcome is not Outcome.INTERRUPTED and self.outcome is not self.outcome_of(self.parts):
            raise _bad("an outcome that the parts don't give", self.outcome_of(self.parts), self.outcome)

    @staticmethod
    def outcome_of(parts: tuple[Part, ...]) -> Outcome:
        """What the parts together come to: ``passed`` or ``failed``."""
        outcomes = {part.outcome for part in parts}
        return Outcome.PASSED if Outcome.PASSED in outcomes <= {Outcome.PASSED, Outcome.SKIPPED} else Outcome.FAILED

    @property
    def passed(self) -> bool:
        return self.outcome is Outcome.PASSED

    @property
    def digest(self) -> str:
        """Lower-case hex SHA-256 of the payload: what the ledger's leaf names."""
        return hashlib.sha256(self.payload()).hexdigest()

    def as_json(self) -> dict[str, object]:
        return {
            "cluster": self.cluster,
            "coordinator": self.coordinator,
            "drill_id": self.drill_id,
            "duration_ms": self.duration_ms,
            "key_id": self.key_id,
            "kind": self.kind,
            "outcome": str(self.outcome),
            "parts": [each.as_json() for each in self.parts],
            "roster_sha256": self.roster_sha256,
            "started_at": self.started_at,
            "timeline": [each.as_json() for each in self.timeline],
            "v": 1,
        }

    def payload(self) -> bytes:
        """RFC 8785 JSON."""
        return jcs.dumps(self.as_json())

    @classmethod
    def parse(cls, data: bytes) -> DrillReport:
        """Strict inverse of :meth:`payload`; raises :class:`MalformedError`."""
        fields = canonical(data, "drill report", _MAX_REPORT)
        fields.integer("v", 1, 1)
        report = cls(
            drill_id=fields.text("drill_id", max_length=32),
            kind=fields.text("kind", max_length=32),
            cluster=fields.text("cluster", max_length=64),
            coordinator=fields.text("coordinator", max_length=64),
            key_id=fields.text("key_id", max_length=64),
            roster_sha256=fields.text("roster_sha256", max_length=64),
            started_at=fields.integer("started_at"),
            duration_ms=fields.integer("duration_ms"),
            outcome=_outcome(fields),
            parts=tuple(Part.read(each) for each in fields.list("parts", max_items=len(KINDS))),
            timeline=tuple(Moment.read(each) for each in fields.list("timeline", max_items=MAX_MOMENTS)),
        )
        fields.done()
        return report


def sign_report(report: DrillReport, identity: Identity) -> bytes:
    """DSSE envelope under the coordinator's drill identity."""
    return sign(identity, DRILL_REPORT_TYPE, report.payload())


def open_report(envelope: bytes, drill: PublicIdentity) -> DrillReport:
    """A report that ``drill`` signed. Raises :class:`MalformedError`, and :class:`RefusedError` (``SIGNATURE…``)."""
    return DrillReport.parse(open_envelope(envelope, DRILL_REPORT_TYPE, drill, "drill report"))


def _outcome(fields: Fields) -> Outcome:
    value = fields.text("outcome", max_length=16)
    if value not in list(Outcome):
        raise _bad("no such outcome", ", ".join(Outcome), value)
    return Outcome(value)


def _check_text(text: str, what: str) -> None:
    if clip(text) != text:
        raise _bad(what, f"one printable line of at most {MAX_TEXT} characters", text[:40])


def _bad(what: str, expected: object, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"drill report: {what}", expected=expected, actual=ascii(str(actual)[:80]))
