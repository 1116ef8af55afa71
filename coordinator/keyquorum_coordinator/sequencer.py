"""The sequencer: leaves in, positions in a signed log out.

Appends that come together share one checkpoint. In this order, and nothing is told before the end of it:

1. leaves and request ids become durable in the leaf store, one transaction;
2. the checkpoint over them is signed;
3. it replaces the one it extends in the checkpoint store, by compare-and-swap;
4. callers get their entries; later, full tiles go to the object store, and then their leaves leave the leaf store.

Killed after 1, the leaves are found again and come into the next checkpoint, at the same places. A second sequencer on
the same stores, on this machine or another, meets the primary key in 1 or the compare-and-swap in 3, takes over what
the first one wrote, and goes on from there: there is one order of leaves, and every checkpoint handed out is of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from keyquorum_coordinator.ledger.log import Entry, Log
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, UnavailableError
from keyquorum_core.ledger.log_keys import LogKeys, SignedCheckpoint
from keyquorum_core.ledger.notes import NoteSignature
from keyquorum_core.ledger.tiles import MAX_ENTRY, Bundle, Tile

__all__ = ["MAX_REQUEST_ID", "Entry", "Sequencer"]

MAX_REQUEST_ID = 64
_MAX_BATCH = 1024
_MAX_WAITING = 16_384
_MAX_UNSEALED = 1 << 16  # leaves: two megabytes of hashes
_SEAL_RETRY = 1.0  # seconds
_FOLLOW = 1.0  # seconds: how old what is known of other coordinators' checkpoints may be

T = TypeVar("T")

_log = structlog.get_logger("ledger")


@dataclass(slots=True)
class _Waiting:
    request_id: bytes
    leaf: bytes
    since: float
    done: asyncio.Future[Entry] = field(repr=False)


class Sequencer:
    """A log for the event loop; nothing here waits for a disk.

    ``batch_window``: tells how many seconds to wait for more leaves before the next commit. At 0 a batch is what came
    during the commit before it. ``on_batch`` hears, after each, how many leaves it had and how many seconds the oldest
    waited in all.
    """

    def __init__(
        self,
        log: Log,
        *,
        batch_window: Callable[[], float] = lambda: 0.0,
        on_batch: Callable[[int, float], None] = lambda count, seconds: None,
    ) -> None:
        self._ledger = log
        self._window = batch_window
        self._on_batch = on_batch
        self._waiting: list[_Waiting] = []
        self._running: asyncio.Task[None] | None = None
        self._sealing: asyncio.Task[None] | None = None
        self._closed = False
        self._followed = time.monotonic()
        # Sealing and reading never wait for a commit, nor a commit for them.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger-writer")
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="ledger-sealer")
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="ledger-reader")

    # -- what it knows ------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> LogKeys:
        return self._ledger.keys

    @property
    def latest(self) -> SignedCheckpoint:
        """The newest checkpoint, with the cosignatures it has so far."""
        return self._ledger.latest

    @property
    def witnessed(self) -> SignedCheckpoint | None:
        """The newest checkpoint that was cosigned, as :meth:`add_cosignatures` was told."""
        return self._ledger.witnessed

    async def published(self) -> SignedCheckpoint:
        """What readers are shown: the newest cosigned checkpoint, or the newest one while none was ever cosigned. What
        other coordinators wrote is in it after a second at the latest."""
        if time.monotonic() - self._followed > _FOLLOW:
            self._followed = time.monotonic()
            await self._run(self._readers, self._ledger.follow)
        return self.witnessed or self.latest

    async def reach(self, size: int) -> SignedCheckpoint:
        """The newest checkpoint; unless it has ``size`` leaves, after a look at what other coordinators wrote."""
        if self.latest.checkpoint.size < size:
            await self._run(self._readers, self._ledger.follow)
        return self.latest

    # -- writing ------------------------------------------------------------------------------------------------------

    async def append(self, leaf: bytes, request_id: bytes) -> Entry:
        """Enter ``leaf`` (1 … 65 535 bytes) once: the same ``request_id`` (1 … 64 bytes) again gives the same place,
        under the newest checkpoint. Leaf and checkpoint are durable when this returns.

        Raises :class:`MalformedError` (``TOO_LARGE``, ``MALFORMED``); :class:`StateError` (``EXISTS``) for a request id
        that came with another leaf; :class:`UnavailableError` when stores fail: ask again with the same request id.
        """
        if not 1 <= len(leaf) <= MAX_ENTRY:
            raise MalformedError(
                Reason.TOO_LARGE if leaf else Reason.MALFORMED,
                "a leaf has the wrong size",
                expected=f"1…{MAX_ENTRY} bytes",
                actual=f"{len(leaf)} bytes",
            )
        if not 1 <= len(request_id) <= MAX_REQUEST_ID:
            raise MalformedError(
                Reason.MALFORMED,
                "a request id has the wrong size",
                expected=f"1…{MAX_REQUEST_ID} bytes",
                actual=f"{len(request_id)} bytes",
            )
        if self._closed:
            raise UnavailableError(Reason.UNAVAILABLE, "the coordinator is stopping", next_step="Ask again later")
        if len(self._waiting) >= _MAX_WAITING:
            raise RefusedError(
                Reason.QUOTA,
                "too many leaves wait for the ledger",
                expected=f"at most {_MAX_WAITING}",
                next_step="Ask again later",
            )
        if self._ledger.unsealed >= _MAX_UNSEALED:
            raise UnavailableError(
                Reason.STORAGE,
                "the ledger's tiles cannot be written, and too many leaves wait for theirs",
                expected=f"fewer than {_MAX_UNSEALED} leaves",
                next_step="Check the object store in ledger_tiles",
            )
        done: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(request_id, leaf, time.perf_counter(), done))
        if self._running is None:
            self._running = asyncio.create_task(self._batches())
        return await done

    async def _batches(self) -> None:
        try:
            while self._waiting:
                window = self._window()
                if window:
                    await asyncio.sleep(window)
                batch, self._waiting = self._waiting[:_MAX_BATCH], self._waiting[_MAX_BATCH:]
                await self._commit(batch)
        finally:
            self._running = None

    async def _commit(self, batch: list[_Waiting]) -> None:
        try:
            entries = await self._run(self._writer, self._ledger.add, [(each.request_id, each.leaf) for each in batch])
        except KeyquorumError as error:
            _log.error("ledger.append_failed", count=len(batch), reason=str(error.reason), message=error.message)
            entries = [error] * len(batch)
        except Exception as error:
            _log.error("ledger.unforeseen", count=len(batch), error=type(error).__name__)
            entries = [KeyquorumError(Reason.INTERNAL, "the ledger failed in a way nobody foresaw")] * len(batch)
        for each, entry in zip(batch, entries, strict=True):
            if each.done.done():  # its caller went away
                continue
            if isinstance(entry, Entry):
                each.done.set_result(entry)
            else:
                each.done.set_exception(entry)
        self._on_batch(len(batch), time.perf_counter() - batch[0].since)
        self._seal_soon()

    async def add_cosignatures(
        self, checkpoint: SignedCheckpoint, signatures: Sequence[NoteSignature]
    ) -> SignedCheckpoint:
        """Keep ``checkpoint``, which the caller found cosigned by enough witnesses, with these verified lines; durable
        when this returns. Lines for the same checkpoint add up. Returns the newest witnessed one.

        Raises :class:`RefusedError` (``LEDGER_FORK``) for a checkpoint that is not this log's, :class:`MalformedError`
        (``TOO_LARGE``) past sixteen lines.
        """
        return await self._run(self._readers, self._ledger.add_cosignatures, checkpoint, signatures)

    # -- reading ------------------------------------------------------------------------------------------------------

    async def inclusion(self, index: int, size: int) -> tuple[bytes, ...]:
        """The inclusion proof of leaf ``index`` in the first ``size`` leaves. Raises :class:`MalformedError`
        (``LEDGER_PROOF``) for what the log does not have."""
        return await self._run(self._readers, self._ledger.inclusion, index, size)

    async def consistency(self, old: int, new: int) -> tuple[bytes, ...]:
        """The proof that the first ``new`` leaves extend the first ``old``. Raises as :meth:`inclusion`."""
        kept = self._ledger.kept_consistency(old, new)
        return kept if kept is not None else await self._run(self._readers, self._ledger.consistency, old, new)

    async def tile(self, name: Tile | Bundle) -> bytes:
        """A tile or entry bundle. Raises :class:`StateError` (``NOT_FOUND``) past the last leaf."""
        return await self._run(self._readers, self._ledger.tile, name)

    # -- sealing ------------------------------------------------------------------------------------------------------

    def _seal_soon(self) -> None:
        if self._sealing is None and not self._closed and self._ledger.unsealed >= 256:
            self._sealing = asyncio.create_task(self._seal())

    async def _seal(self) -> None:
        try:
            while True:
                try:
                    if not await self._run(self._sealer, self._ledger.seal):
                        return
                except KeyquorumError as error:
                    _log.error("ledger.not_sealed", reason=str(error.reason), message=error.message)
                    await asyncio.sleep(_SEAL_RETRY)
        finally:
            self._sealing = None

    async def close(self) -> None:
        """Finish what was asked for, then let go of the stores."""
        self._closed = True
        if self._running is not None:
            await asyncio.wait([self._running])
        if self._sealing is not None:
            self._sealing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sealing
        for pool in (self._writer, self._sealer, self._readers):
            await asyncio.to_thread(pool.shutdown)
        await asyncio.to_thread(self._ledger.close)

    @staticmethod
    async def _run(pool: ThreadPoolExecutor, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)
