"""Says every few seconds that the worker is alive and where it is, and hears whether to go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from keyquorum_core.errors import KeyquorumError, UnavailableError
from keyquorum_gpu_worker.link import Link
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["HEARTBEAT_SECONDS", "Heartbeat"]

HEARTBEAT_SECONDS = 5.0


class Heartbeat:
    """Reports while its ``async with`` block runs; calls ``lost(why)`` once when the job is no longer this worker's.

    A coordinator that cannot be reached is waited for: it may be restarting, and knows the job when it is back.
    """

    def __init__(
        self, link: Link, job_id: str, lost: Callable[[str], None], *, every: float = HEARTBEAT_SECONDS
    ) -> None:
        self._link = link
        self._job_id = job_id
        self._lost = lost
        self._every = every
        self._state = "attesting"
        self._detail = ""
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def enter(self, state: str, detail: str = "") -> None:
        """The job is at another step: attesting, downloading, running or uploading. Reported at once."""
        self._state, self._detail = state, detail
        self._changed.set()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _beat(self) -> None:
        while True:
            self._changed.clear()
            request = pb.ReportRequest(job_id=self._job_id, state=self._state, detail=self._detail)
            try:
                response = await self._link.once(self._link.workers.Report, request, timeout=self._every)
            except UnavailableError:
                pass  # it may be restarting; the next beat tells
            except KeyquorumError as error:
                self._lost(f"the coordinator no longer takes reports of this job: {error.message}")
                return
            else:
                if not response.proceed:
                    self._lost("the job was cancelled or taken away")
                    return
            try:
                await asyncio.wait_for(self._changed.wait(), self._every)
            except TimeoutError:
                continue
