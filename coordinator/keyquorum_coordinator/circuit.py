"""A circuit breaker per custodian: after a few failures in a row it is left alone, then tried with one request.

Pure: times are seconds on any clock that does not go back, passed in. A refusal is an answer, not a failure.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Circuit", "CircuitState"]


class CircuitState(StrEnum):
    CLOSED = "closed"
    HALF_OPEN = "half-open"
    OPEN = "open"


class Circuit:
    """``threshold`` failures in a row open it, for ``first_rest`` seconds, doubling up to ``longest_rest`` while trials
    fail. A rest that is over, or :meth:`recovered`, makes it half-open: one request may try."""

    def __init__(self, *, threshold: int = 3, first_rest: float = 1.0, longest_rest: float = 30.0) -> None:
        self._threshold = threshold
        self._first_rest = first_rest
        self._longest_rest = longest_rest
        self._failures = 0
        self._rest = first_rest
        self._open_until: float | None = None  # None: closed
        self._trial_since: float | None = None

    def state(self, now: float) -> CircuitState:
        if self._open_until is None:
            return CircuitState.CLOSED
        return CircuitState.OPEN if now < self._open_until else CircuitState.HALF_OPEN

    def admit(self, now: float) -> bool:
        """Whether a request may be sent now. When half-open, admitting makes that request the trial; a trial that was
        never concluded gives way to the next after ``longest_rest``."""
        if self._open_until is None:
            return True
        if now < self._open_until:
            return False
        if self._trial_since is not None and now - self._trial_since < self._longest_rest:
            return False
        self._trial_since = now
        return True

    def succeeded(self) -> None:
        """An answer came: closed."""
        self._failures = 0
        self._rest = self._first_rest
        self._open_until = None
        self._trial_since = None

    def failed(self, now: float) -> None:
        """No answer came: unreachable, broken off, late or senseless."""
        self._failures += 1
        if self._open_until is not None:
            if now < self._open_until:
                return  # requests sent before it opened are failing still: that says nothing new
            self._rest = min(2 * self._rest, self._longest_rest)
        elif self._failures < self._threshold:
            return
        self._open_until = now + self._rest
        self._trial_since = None

    def recovered(self, now: float) -> None:
        """It can be reached again, seen by other means than a request: end the rest, so that one may try at once."""
        if self._open_until is not None and now < self._open_until:
            self._open_until = now
            self._trial_since = None

    def __repr__(self) -> str:
        return f"Circuit(failures={self._failures}, open_until={self._open_until})"
