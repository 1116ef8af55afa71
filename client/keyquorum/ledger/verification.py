"""Verifying a log as served: its checkpoint, then every leaf and every tile, fetched in parallel, hashed in order.

At most :data:`WINDOW` files are on their way or waiting at any time, so that memory does not grow with the log.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from keyquorum.ledger.source import LogSource, read_checkpoint, read_name
from keyquorum.progress import Progress, ProgressCallback, Stage, silent
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.log_trust import LogTrust, QuorumCheckpoint
from keyquorum_core.ledger.replay import Replay, check_growth, edge_tiles, plan
from keyquorum_core.ledger.tiles import Bundle, Tile

__all__ = ["WINDOW", "Leaves", "Verified", "fetch", "latest_checkpoint", "verify_log", "verify_since", "verify_tree"]

WINDOW: Final = 32
_KEEP: Final = "Read again from another place; if it stays so, the log is not what it should be: keep what was served."
QUORUM_SECONDS: Final = 15.0
"""How long to wait for the custodians to cosign a checkpoint that they have not got to yet."""

Leaves = Callable[[int, tuple[bytes, ...]], None]
"""Called with consecutive leaves and the index of the first, in order. None of them is shown to be in the log before
the verification has returned."""


def _nobody(first: int, leaves: tuple[bytes, ...]) -> None:
    """Leaves that nobody wants to see."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A log that holds what its checkpoint signs. ``begin`` is the first leaf that was read, 0 for all of them."""

    latest: QuorumCheckpoint
    begin: int

    @property
    def size(self) -> int:
        return self.latest.checkpoint.size


async def latest_checkpoint(
    source: LogSource, trust: LogTrust, *, now: int | None = None, oldest: int = 0, patience: float = QUORUM_SECONDS
) -> QuorumCheckpoint:
    """The checkpoint served, under the log's two signatures and a quorum's cosignatures not older than ``oldest``.

    One that lacks a quorum is read again for ``patience`` seconds: custodians cosign after the log has signed. ``now``
    is POSIX seconds, by default the clock. Raises as :meth:`LogTrust.verify` and :meth:`LogSource.read`.
    """
    deadline = time.monotonic() + patience
    while True:
        data = await read_checkpoint(source)
        try:
            return trust.verify(data, now=int(time.time()) if now is None else now, oldest=oldest)
        except RefusedError as error:
            if error.reason is not Reason.NO_QUORUM or time.monotonic() + 0.5 > deadline:
                raise
        await asyncio.sleep(0.5)


async def fetch(
    source: LogSource, names: Iterable[Bundle | Tile], window: int = WINDOW
) -> AsyncGenerator[tuple[Bundle | Tile, bytes]]:
    """Files in the order of their names, up to ``window`` of them asked for ahead. Raises as :meth:`LogSource.read`."""
    ahead = iter(names)
    waiting: deque[tuple[Bundle | Tile, asyncio.Task[bytes]]] = deque()
    try:
        while True:
            while len(waiting) < window and (name := next(ahead, None)) is not None:
                waiting.append((name, asyncio.create_task(read_name(source, name))))
            if not waiting:
                return
            name, task = waiting[0]
            data = await task
            waiting.popleft()
            yield name, data
    finally:
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)


async def verify_tree(
    source: LogSource,
    checkpoint: Checkpoint,
    past: Checkpoint | None = None,
    *,
    scratch: bool = False,
    leaves: Leaves = _nobody,
    progress: ProgressCallback = silent,
) -> int:
    """Whether the source serves the tree of ``checkpoint``, all of it, or with ``past`` what was added since; the first
    leaf read. With ``scratch`` all of it even so, which tells a fork from tiles that were served wrong.

    Raises as :class:`Replay` and :meth:`LogSource.read`.
    """
    size = checkpoint.size
    edge = None
    if past is not None and not scratch:
        edge = {tile: data async for tile, data in fetch(source, edge_tiles(past.size, size)) if isinstance(tile, Tile)}
    run = Replay(size, past, edge)
    begin = at = past.size if past is not None and edge is not None else 0
    progress(Progress(Stage.VERIFY, at, size))
    async with aclosing(fetch(source, plan(begin, size))) as files:
        async for name, data in files:
            try:
                given = run.accept(name, data)
            except KeyquorumError as error:
                error.details["file"] = name.path
                error.next_step = error.next_step or _KEEP
                raise
            if given:
                leaves(at, given)
                at += len(given)
                progress(Progress(Stage.VERIFY, at, size))
    run.finish(checkpoint.root)
    return begin


async def verify_log(
    source: LogSource,
    trust: LogTrust,
    past: Checkpoint | None = None,
    *,
    now: int | None = None,
    oldest: int = 0,
    leaves: Leaves = _nobody,
    progress: ProgressCallback = silent,
    patience: float = QUORUM_SECONDS,
) -> Verified:
    """Verify the latest checkpoint and the log under it, from the first leaf, or from ``past``, whose log signatures
    the caller has verified.

    Raises as :func:`latest_checkpoint` and :func:`verify_tree`; :class:`RefusedError` with ``LEDGER_ROLLBACK`` for a
    smaller tree than ``past``, and with ``LEDGER_FORK`` when both checkpoints are proven to contradict each other.
    """
    latest = await latest_checkpoint(source, trust, now=now, oldest=oldest, patience=patience)
    return Verified(latest, await verify_since(source, latest.checkpoint, past, leaves=leaves, progress=progress))


async def verify_since(
    source: LogSource,
    checkpoint: Checkpoint,
    past: Checkpoint | None,
    *,
    scratch: bool = False,
    leaves: Leaves = _nobody,
    progress: ProgressCallback = silent,
) -> int:
    """:func:`verify_tree`, and where it is not shown to extend ``past``, the whole log again, to say why."""
    if past is not None:
        check_growth(past, checkpoint)
    try:
        return await verify_tree(source, checkpoint, past, scratch=scratch, leaves=leaves, progress=progress)
    except RefusedError as error:
        if "past" not in error.details:
            raise
        refused = error
    # Leaves are not handed out a second time: whatever this pass finds, the verification fails.
    await verify_tree(source, checkpoint, past, scratch=True, progress=progress)
    raise refused
