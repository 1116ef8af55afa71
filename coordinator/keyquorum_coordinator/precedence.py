"""Releases come first: what may wait waits for those that are under way, and not for ever."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

__all__ = ["Precedence"]


class Precedence:
    """Counts releases from the moment that they begin; used from the event loop."""

    def __init__(self) -> None:
        self._under_way = 0
        self._nobody: asyncio.Future[None] | None = None

    def begin(self) -> None:
        self._under_way += 1

    def end(self) -> None:
        self._under_way -= 1
        if self._under_way == 0 and self._nobody is not None:
            self._nobody.set_result(None)
            self._nobody = None

    @contextlib.contextmanager
    def release(self) -> Iterator[None]:
        """A release, or a part of one, is under way."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    async def quiet(self, patience: float) -> None:
        """Returns once no release is under way, and after ``patience`` seconds in any case."""
        if self._under_way == 0:
            return
        if self._nobody is None:
            self._nobody = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._nobody], timeout=patience)
