"""What the coordinator does in a task of its own, while any number of callers follow it, or none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Generic, TypeVar

from keyquorum_core.errors import KeyquorumError

__all__ = ["Followed"]

E = TypeVar("E")


class Followed(Generic[E]):
    """``error``: what ended ``task``; set before the task ends, so that those who follow hear why."""

    def __init__(self) -> None:
        self.events: list[E] = []
        self.task: asyncio.Task[None] | None = None
        self.error: KeyquorumError | None = None
        self._changed = asyncio.Event()

    def add(self, event: E) -> None:
        self.events.append(event)
        self.wake()

    def wake(self) -> None:
        """Have those who follow look again: call it once the task has ended, too."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self) -> AsyncGenerator[E]:
        """All events from the first on, until the task ends. Raises :attr:`error`."""
        position = 0
        while True:
            changed = self._changed
            while position < len(self.events):
                position += 1
                yield self.events[position - 1]
            if self.task is None or self.task.done():
                if self.error is not None:
                    raise self.error
                return
            await changed.wait()
