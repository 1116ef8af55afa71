"""Patience with a peer that is being restarted: which failures may pass, and how long to wait between tries.

Only for calls that are idempotent, and only for failures of the transport: an error that the peer itself gave (it
carries our ErrorInfo) is its answer.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from typing import Final

import grpc

__all__ = ["BROKEN", "Backoff"]

# Without our ErrorInfo these come from the transport: gRPC reports a stream that broke while it wrote as INTERNAL, and
# one whose server shut down as CANCELLED or UNKNOWN.
BROKEN: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)


class Backoff:
    """Waits between tries: 0.1 s doubling up to 5 s, with jitter, until ``seconds`` have passed without a success."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Something got through: the next failure is a first one."""
        self._delay = 0.1
        self._deadline = 0.0
        self._last = -math.inf

    async def wait(self) -> bool:
        """Sleep before the next try; false when the time is used up."""
        now = time.monotonic()
        if now - self._last > self._seconds:  # the call lived for long before it failed
            self._delay = 0.1
            self._deadline = now + self._seconds
        delay = self._delay * random.uniform(0.75, 1.25)  # noqa: S311 - spreads callers, protects nothing
        if now + delay > self._deadline:
            return False
        await asyncio.sleep(delay)
        self._delay = min(5.0, 2 * self._delay)
        self._last = time.monotonic()
        return True
