"""What an appraisal compared: field, expected and actual value of every check, met or not.

Appraisals make lists of these. A custodian refuses at the first one that is not met (:func:`require`); whoever wants to
know why, or how far off, reads them all (``keyquorum attest verify --explain``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from keyquorum_core.errors import KeyquorumError, Reason, RefusedError

__all__ = ["Finding", "attempt", "finding", "require"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. ``refusal`` is the error it refuses with; ``None`` where it is met."""

    field: str
    expected: str
    actual: str
    refusal: KeyquorumError | None = None

    @property
    def ok(self) -> bool:
        return self.refusal is None

    def as_dict(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "field": self.field,
            "expected": self.expected,
            "actual": self.actual,
            "ok": self.ok,
            "reason": "" if self.refusal is None else str(self.refusal.reason),
        }


def finding(
    ok: bool,
    field: str,
    reason: Reason,
    message: str,
    *,
    expected: object,
    actual: object,
    next_step: str = "",
    details: Mapping[str, str] | None = None,
) -> Finding:
    """A check with its outcome; ``reason`` and ``message`` are what it refuses with where it is not met."""
    refusal = None
    if not ok:
        refusal = RefusedError(reason, message, expected=expected, actual=actual, next_step=next_step, details=details)
    return Finding(field, str(expected), str(actual), refusal)


def attempt(field: str, expected: str, check: Callable[[], str]) -> Finding:
    """A check that raises where it is not met, and otherwise says what it found."""
    try:
        return Finding(field, expected, check())
    except KeyquorumError as error:
        return Finding(field, error.expected or expected, error.actual or error.message, error)


def require(findings: Iterable[Finding]) -> None:
    """Raises the refusal of the first finding that is not met."""
    for each in findings:
        if each.refusal is not None:
            raise each.refusal
