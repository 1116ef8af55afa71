"""Releases come first: while some are made, a ceremony leaves them as much time as it takes for itself.

A step of a ceremony has every custodian compute at once. One after the other they would keep whoever asks for a key
waiting each time; so a step waits as long as the one before it took, where there were releases lately, and no longer
than is needed to be through in reasonable time however many there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

__all__ = ["Precedence"]

_LATELY = 0.25
"""Seconds after a release for which more are expected."""
_LONGEST = 0.15
"""Seconds that a step waits at most."""


class Precedence:
    """Knows of releases and of ceremonies' steps; used from the event loop. ``clock`` gives seconds."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._under_way = 0
        self._ended = float("-inf")
        self._step = 0.0

    @contextlib.contextmanager
    def release(self) -> Iterator[None]:
        """A release is under way."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self._ended = self._clock()

    @property
    def _busy(self) -> bool:
        return self._under_way > 0 or self._clock() - self._ended < _LATELY

    @contextlib.asynccontextmanager
    async def step(self) -> AsyncIterator[None]:
        """A step of a ceremony, once it is its turn."""
        if self._busy:
            await self._sleep(min(self._step, _LONGEST))
        started = self._clock()
        try:
            yield
        finally:
            self._step = self._clock() - started
