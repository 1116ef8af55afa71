"""When the next secret may be tried: three at once, then after waits that double.

An attempt is written down as failed, on the disk, before the secret is tried, and struck out when it was right; so
killing the process in between counts as a wrong one. The wait is kept by the wall clock across restarts and, so that a
clock once set ahead does not lock officers out for ever, by the running process's own clock as well: whichever ends
first. Setting the clock back buys nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = ["FREE", "MOST_SECONDS", "Attempts"]

FREE: Final = 3
_FIRST_WAIT: Final = 30
MOST_SECONDS: Final = 3600
_SIZE: Final = 12


@dataclass(frozen=True, slots=True)
class Attempts:
    """Wrong secrets since the last right one, and when the latest was tried, unix seconds."""

    failed: int = 0
    last: int = 0

    @property
    def wait(self) -> int:
        """Seconds between the latest attempt and the next."""
        return 0 if self.failed < FREE else min(_FIRST_WAIT << min(self.failed - FREE, 16), MOST_SECONDS)

    def next_at(self, now: int, idle: float) -> int:
        """When the next may be made, unix seconds; 0: now. ``idle``: seconds without an attempt that the process that
        asks saw pass by itself."""
        left = min(self.wait - (now - self.last), self.wait - idle)
        return now + max(1, round(left)) if left > 0 else 0

    def check(self, now: int, idle: float) -> None:
        """Raise ``ATTEMPTS`` while it is too soon."""
        at = self.next_at(now, idle)
        if at:
            raise RefusedError(
                Reason.ATTEMPTS,
                f"{self.failed} wrong attempts to unseal were made",
                expected=f"the next one in {at - now} seconds",
                actual="one now",
                next_step="Wait, then try again. If nobody here made them, find out who did.",
            )

    def another(self, now: int) -> Attempts:
        return Attempts(min(self.failed + 1, 1 << 30), now)

    def to_bytes(self) -> bytes:
        """u32be(failed) ‖ u64be(last)."""
        return self.failed.to_bytes(4, "big") + self.last.to_bytes(8, "big")

    @classmethod
    def parse(cls, data: bytes) -> Attempts:
        if len(data) != _SIZE:
            raise MalformedError(
                Reason.STORAGE, "the count of attempts is damaged", expected=f"{_SIZE} bytes", actual=len(data)
            )
        return cls(int.from_bytes(data[:4], "big"), int.from_bytes(data[4:], "big"))
