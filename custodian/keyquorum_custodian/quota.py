"""How many releases an owner may have in an hour, counted by this custodian alone, over a sliding window."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable

from keyquorum_core.errors import Reason, RefusedError

__all__ = ["Quota"]

_HOUR = 3600


class Quota:
    """``limit`` releases per owner in any 3600 seconds; ``past`` is what happened before a restart, oldest first."""

    def __init__(self, limit: int, past: Iterable[tuple[str, int]] = ()) -> None:
        self._limit = limit
        self._times: dict[str, deque[int]] = {}
        for owner, time in past:
            self.count(owner, time)

    def check(self, owner: str, now: int) -> None:
        """Raises :class:`RefusedError` (``QUOTA``) when the owner's hour is full."""
        times = self._times.get(owner)
        if times is None:
            return
        while times and times[0] <= now - _HOUR:
            times.popleft()
        if len(times) >= self._limit:
            raise RefusedError(
                Reason.QUOTA,
                f"owner {owner} has had all the releases of this hour",
                expected=f"fewer than {self._limit} in the last hour",
                actual=len(times),
                next_step=f"Try again in {times[0] + _HOUR - now} s, or have the custodian's operator raise the limit.",
            )

    def count(self, owner: str, now: int) -> None:
        self._times.setdefault(owner, deque()).append(now)

    def discount(self, owner: str, now: int) -> None:
        """Undo :meth:`count` for a release that could not be recorded."""
        with contextlib.suppress(KeyError, ValueError):  # it has left the hour meanwhile
            self._times[owner].remove(now)
