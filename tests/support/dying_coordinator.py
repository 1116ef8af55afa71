"""A coordinator that is killed at a chosen moment of a drill: ``python -m tests.support.dying_coordinator …``.

It is the real code, which sends SIGKILL to its own process just before, or just after, the n-th of these: a write that
moves a drill or one of its ceremonies, a fault injected, shown or lifted at a custodian, a document of the operators'
taken. Nothing in the product knows of it. What a dead coordinator left is taken at once, since there is no other here.

Arguments: DIR, PHASE, N, WHEN. PHASE ``drill`` counts from the order of one, ``undo`` from finding one that was left.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from keyquorum_coordinator import ceremonies, logs
from keyquorum_coordinator.database import Database
from keyquorum_coordinator.drills import schedule, store
from keyquorum_coordinator.driving import Driver
from keyquorum_coordinator.link import Link
from keyquorum_coordinator.server import serve
from keyquorum_coordinator.withdrawals import Withdrawals

_MARKED = "a write of these is counted"


class Fate:
    """``number`` 0: it lives."""

    def __init__(self, phase: str, number: int, when: str) -> None:
        self.first = {"drill": "begin", "undo": "take"}[phase]
        self.number, self.when = number, when
        self.armed = False
        self.count = 0

    def counted(self, name: str) -> bool:
        """Whether this one is it. The first of its phase arms it."""
        self.armed |= name == self.first
        self.count += self.armed
        return self.armed and self.count == self.number

    @staticmethod
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    async def around(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        mine = self.counted(name)
        if mine and self.when == "before":
            self.die()
        found = await call()
        if mine:
            self.die()
        return found


def _mark(owner: Any, name: str) -> None:
    """Have a transaction in which this is called counted, under its name."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def marked(first: Any, *arguments: Any, **named: Any) -> Any:
        session = first if isinstance(first, Session) else arguments[0]
        session.info.setdefault(_MARKED, name)
        return real(first, *arguments, **named)

    setattr(owner, name, marked)


class _Canary:
    """The hooks of a custodian, as the real stub calls them."""

    def __init__(self, stub: Any, fate: Fate) -> None:
        self._stub, self._fate = stub, fate

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        def call(request: Any, timeout: float) -> Awaitable[Any]:
            return self._fate.around(name, lambda: getattr(self._stub, name)(request, timeout=timeout))

        return call


def _lay(fate: Fate) -> None:
    """Have every one of these counted."""
    for name in ("begin", "take", "end", "mark_undone"):
        _mark(store, name)
    _mark(Driver, "move")
    _mark(ceremonies, "_refuse_rivals")
    real_write, real_canary, real_accept = Database.run_write, Link.canary, Withdrawals.accept

    def run_write(self: Database, work: Callable[[Session], Any]) -> Any:
        mine: list[bool] = []

        def both(session: Session) -> Any:
            found = work(session)
            if _MARKED in session.info:
                mine.append(fate.counted(session.info[_MARKED]))
                if mine[-1] and fate.when == "before":
                    fate.die()
            return found

        found = real_write(self, both)
        if any(mine):
            fate.die()
        return found

    async def accept(self: Withdrawals, envelope: bytes) -> Any:
        return await fate.around("accept", lambda: real_accept(self, envelope))

    Database.run_write = run_write  # type: ignore[method-assign]
    Withdrawals.accept = accept  # type: ignore[method-assign]
    Link.canary = property(lambda self: _Canary(real_canary.fget(self), fate))  # type: ignore[assignment, attr-defined]


def main(directory: str, phase: str, number: str, when: str) -> None:
    store.LEASE_SECONDS = 0  # type: ignore[misc]
    schedule._LOOK_SECONDS = 0.1
    _lay(Fate(phase, int(number), when))
    logs.configure()
    asyncio.run(serve(Path(directory)))


if __name__ == "__main__":
    main(*sys.argv[1:])
