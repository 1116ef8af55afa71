"""Drills by the clock: a kind is due when its last run is as long ago as coordinator.toml says, or it never ran."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing

import structlog

from keyquorum_coordinator.drills.engine import Drills
from keyquorum_coordinator.drills.rehearsal import Order
from keyquorum_coordinator.drills.store import KindRecord
from keyquorum_core.errors import KeyquorumError

__all__ = ["Schedule", "due"]

_LOOK_SECONDS = 15.0
_AFTER_REFUSAL = 600.0

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
    """``clock`` gives unix seconds."""

    def __init__(self, drills: Drills, clock: Callable[[], float]) -> None:
        self._drills = drills
        self._clock = clock
        self._refused: dict[str, float] = {}

    async def forever(self) -> None:
        """Look every few seconds; run what is due. What could not begin is tried again ten minutes later."""
        schedule = self._drills.settings.schedule
        while schedule:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self.look()
            except KeyquorumError as error:
                _log.error("drill.schedule_failed", reason=str(error.reason), message=error.message)

    async def look(self) -> str:
        """Run what is due, to its end; returns its kind. Raises ``STORAGE``."""
        if self._drills.running:
            return ""
        now = time.monotonic()
        waiting = {
            kind: every for kind, every in self._drills.settings.schedule.items() if self._refused.get(kind, 0.0) <= now
        }
        kind = due(waiting, await self._drills.kinds(), int(self._clock()))
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
