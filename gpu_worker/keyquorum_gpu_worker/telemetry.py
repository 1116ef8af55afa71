"""What the worker tells the job's owner while it works: records, made into signed batches, handed to the coordinator.

Telemetry never holds a job up and never fails one: a batch that cannot be handed over waits, in memory, for the next
try; records above the rate are counted instead of kept. The key that encrypts them is let go of with :meth:`close`,
which makes the last batch; what was sealed until then is still sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.signing import Identity
from keyquorum_core.telemetry import (
    MAX_BATCHES,
    MAX_RECORDS,
    NO_BATCH,
    Batch,
    Record,
    seal_records,
    sign_batch,
    worker_digest,
)
from keyquorum_gpu_worker.link import Link
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["TELEMETRY_SECONDS", "Telemetry"]

TELEMETRY_SECONDS: Final = 30.0
_USAGE_SECONDS: Final = 10.0
_MAX_WAITING: Final = 256
"""Batches that wait to be handed over; beyond that no new one is made until there is room, but for the last."""
_RETRY_SECONDS: Final = 2.0


class Telemetry:
    """Of one job. :meth:`note` and :meth:`usage` from any thread, the rest from the event loop."""

    def __init__(
        self,
        link: Link,
        job_id: str,
        *,
        clock: Callable[[], float] = time.time,
        every: float = TELEMETRY_SECONDS,
        said: Callable[[str, dict[str, object]], None] = lambda event, values: None,
    ) -> None:
        self._link = link
        self._job = job_id
        self._clock = clock
        self._every = every
        self._said = said
        self._lock = threading.Lock()
        self._records: list[Record] = []
        self._dropped = 0
        self._used_at = -_USAGE_SECONDS
        self._identity: Identity | None = None
        self._key = b""
        self._sequence = 0
        self._previous = NO_BATCH
        self._waiting: list[pb.TelemetryRequest] = []
        self._closed = False

    def begin(self, identity: Identity, key: bytes) -> None:
        """The worker has the job's key; ``key`` is its telemetry key, ``identity`` what its evidence binds."""
        self._identity, self._key = identity, key

    def note(self, event: str, values: Mapping[str, str | int] | None = None, *, end: bool = False) -> None:
        """Something happened."""
        with self._lock:
            if self._closed:
                return
            if len(self._records) >= MAX_RECORDS - 2 and not end:  # room for what was dropped, and for the end
                self._dropped += 1
                return
            shown = {name: _printable(value) for name, value in (values or {}).items()}
            self._records.append(Record(int(self._clock()), event, shown))

    def usage(self, values: Mapping[str, int]) -> None:
        """What the job uses; written down every ten seconds."""
        now = time.monotonic()
        if now - self._used_at >= _USAGE_SECONDS:
            self._used_at = now
            self.note("usage", values)

    def close(self, event: str, values: Mapping[str, str | int], reason: str = "") -> None:
        """The end: the last batch is made, and the keys are let go of. Without keys there is nothing to tell."""
        self.note(event, values, end=True)
        if self._identity is not None and not self._closed:
            self._make(last=True, reason=reason)
        self._closed = True
        self._identity, self._key = None, b""

    async def run(self) -> None:
        """Make a batch of what there is, every so often, and hand it over; until cancelled."""
        while True:
            await asyncio.sleep(self._every)
            if self._identity is not None and self._records and len(self._waiting) < _MAX_WAITING:
                self._make()
            await self._hand_over()

    async def drain(self, seconds: float) -> None:
        """Hand over what waits, for at most ``seconds``."""
        try:
            async with asyncio.timeout(seconds):
                while not await self._hand_over():  # noqa: ASYNC110 - it is the coordinator that is waited for
                    await asyncio.sleep(_RETRY_SECONDS)
        except TimeoutError:
            self._said("telemetry was not handed over", {"batches": len(self._waiting)})

    def _make(self, *, last: bool = False, reason: str = "") -> None:
        with self._lock:
            records, self._records = self._records, []
            if self._dropped:
                dropped = {"records": self._dropped}
                records.append(Record(int(self._clock()), "dropped", dropped))
                self._dropped = 0
        identity = self._identity
        if identity is None or not records or self._sequence >= MAX_BATCHES - (0 if last else 1):
            return
        content = seal_records(self._key, records, self._job, identity.public.to_bytes(), self._sequence)
        times = [record.time for record in records]
        batch = Batch(
            job_id=self._job,
            worker=worker_digest(identity.public),
            sequence=self._sequence,
            previous_sha256=self._previous,
            first_at=min(times),
            last_at=max(times),
            records=len(records),
            content_sha256=hashlib.sha256(content).hexdigest(),
            content_size=len(content),
            last=last,
            reason=reason,
        )
        statement = sign_batch(batch, identity)
        self._sequence += 1
        self._previous = hashlib.sha256(statement).hexdigest()
        self._waiting.append(pb.TelemetryRequest(job_id=self._job, statement=statement, content=content))

    async def _hand_over(self) -> bool:
        """In order. Whether nothing waits any more, or nothing can be done about it."""
        while self._waiting:
            try:
                await self._link.once(self._link.workers.Telemetry, self._waiting[0], timeout=10)
            except KeyquorumError as error:
                if error.reason in (Reason.UNAVAILABLE, Reason.TIMEOUT, Reason.STORAGE, Reason.STATE):
                    return False  # it may be restarting, or not have written the release down yet
                self._said("the coordinator does not take telemetry", error.as_dict())
                self._waiting.clear()
                return True
            del self._waiting[0]
        return True


def _printable(value: str | int) -> str | int:
    if isinstance(value, int):
        return value
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)[:200]
