"""Drills by the clock: a kind is due when its last run is as long ago as coordinator.toml says, or it never ran."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from contextlib import aclosing

import structlog

from keyquorum_coordinator.drills.engine import Drills
from keyquorum_coordinator.drills.rehearsal import Order
from keyquorum_coordinator.drills.store import KindRecord
from keyquorum_core.errors import KeyquorumError

__all__ = ["Schedule", "due"]

_LOOK_SECONDS = 5.0
_AFTER_REFUSAL = 600

_log = structlog.get_logger("drills")


def due(schedule: Mapping[str, int], records: Mapping[str, KindRecord], now: int) -> str:
    """The kind that has been due longest, empty where none is. Times in unix seconds."""
    never = KindRecord()
    waiting = [
        (records.get(kind, never).last_run + every, kind)
        for kind, every in schedule.items()
        if records.get(kind, never).last_run + every <= now
    ]
    return min(waiting)[1] if waiting else ""


class Schedule:
    """What is undone, and run, without anybody asking. ``clock`` gives unix seconds."""

    def __init__(self, drills: Drills, clock: Callable[[], float]) -> None:
        self._drills = drills
        self._clock = clock
        self._refused: dict[str, int] = {}

    async def forever(self) -> None:
        """Look every few seconds."""
        while True:
            try:
                await self.look(int(self._clock()))
            except KeyquorumError as error:
                _log.error("drill.schedule_failed", reason=str(error.reason), message=error.message)
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self, now: int) -> str:
        """Undo what a dead coordinator left of a drill; then run what is due, to its end; returns its kind, empty where
        none is. What could not begin is tried again ten minutes later. Raises ``STORAGE``."""
        await self._drills.resume()
        schedule = self._drills.settings.schedule
        waiting = {kind: every for kind, every in schedule.items() if self._refused.get(kind, now) <= now}
        if not waiting or self._drills.running:
            return ""
        kind = due(waiting, await self._drills.kinds(), now)
        if not kind:
            return ""
        order = Order(secrets.token_hex(16), kind, self._drills.settings.key, scheduled=True)
        try:
            async with aclosing(self._drills.run(order)) as events:
                async for _ in events:
                    pass
        except KeyquorumError as error:
            self._refused[kind] = now + _AFTER_REFUSAL
            _log.error("drill.refused", kind=kind, reason=str(error.reason), message=error.message)
        return kind
