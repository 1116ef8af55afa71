"""A log's stores as the configuration names them: made once by ``ledger init``, opened by everybody else.

Making takes its steps in an order that can be gone through again after a kill, the checkpoint last: until that is there
nothing serves the log, and once it is, nothing makes one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from keyquorum_coordinator.config import CoordinatorConfig
from keyquorum_coordinator.ledger.checkpoint_store import CheckpointStore
from keyquorum_coordinator.ledger.edge import Addition, Edge
from keyquorum_coordinator.ledger.leaf_store import LeafStore
from keyquorum_coordinator.ledger.log import Log, check_root, check_sizes
from keyquorum_coordinator.ledger.tile_store import TileObjects, TileStore
from keyquorum_coordinator.log_key import LOG_VKEY, load_log_key
from keyquorum_coordinator.objects import open_objects
from keyquorum_core.errors import Reason, RefusedError, StateError
from keyquorum_core.ledger.compact import CompactRange
from keyquorum_core.ledger.log_keys import LogKeys, LogSigner, SignedCheckpoint, open_checkpoint
from keyquorum_core.ledger.replay import Replay
from keyquorum_core.ledger.tile_tree import TileTree
from keyquorum_core.ledger.tiles import Tile

__all__ = ["check_log_key", "create_ledger", "open_log", "restore_checkpoint", "verify_log"]


def create_ledger(config: CoordinatorConfig, signer: LogSigner, *, now: int) -> None:
    """Make an empty log for these keys. Raises :class:`StateError`: ``EXISTS`` when it has a checkpoint, ``STATE`` when
    it lost the one that it had."""
    with _stores(config, signer.origin) as (leaves, checkpoints, _):
        if checkpoints.exists():
            raise _exists(signer.origin)
        if not leaves.create() and (head := leaves.stored().head):
            raise _lost(f"{head} leaves in ledger_database")
        if TileStore(open_objects(config.ledger_tiles_place)).holds(Tile(0, 0)):
            raise _lost("tiles in ledger_tiles")
        checkpoints.create(signer.sign(0, CompactRange().root(), now))


def _lost(actual: str) -> StateError:
    return StateError(
        Reason.STATE,
        "this log had a checkpoint and lost it: a new one would fork the log",
        expected="a log that never had a leaf",
        actual=actual,
        next_step="Restore it from its newest backup, or from a witness's copy: keyquorum-coordinator ledger restore",
    )


def open_log(
    config: CoordinatorConfig,
    *,
    clock: Callable[[], float] = time.time,
    objects: TileObjects | None = None,
    read_only: bool = False,
) -> Log:
    """The log, checked. Blocking. Raises as :class:`Log`, and as :func:`load_log_key`."""
    signer = load_log_key(config.path(config.log_key))
    with _stores(config, signer.origin) as (leaves, checkpoints, keep):
        tiles = TileStore(objects or open_objects(config.ledger_tiles_place))
        log = Log(signer, leaves, checkpoints, tiles, clock=clock, read_only=read_only)
        keep()
    return log


def verify_log(config: CoordinatorConfig, progress: Callable[[int, int], None]) -> SignedCheckpoint:
    """Hash every leaf again, compare every tile, and the root with the latest checkpoint, which is returned. Beside a
    running coordinator, too. ``progress`` hears leaves done and leaves in all.

    Raises as :func:`open_log`, and as :class:`Replay`."""
    log = open_log(config, read_only=True)
    try:
        signed = log.latest
        replay = Replay(signed.checkpoint.size)
        while (name := replay.expected) is not None:
            replay.accept(name, log.tile(name))
            progress(replay.leaves, signed.checkpoint.size)
        replay.finish(signed.checkpoint.root)
    finally:
        log.close()
    return signed


def restore_checkpoint(config: CoordinatorConfig, note: bytes) -> SignedCheckpoint:
    """Put a lost checkpoint back: the newest that anybody has, such as a custodian's or an auditor's copy. It must be
    this log's, cover no more leaves than there are, and be their root; what came after it is signed for at the next
    start.

    Raises ``EXISTS`` when there is one, ``STATE`` for one that is older than the ledger's database knows of, and as
    :func:`open_checkpoint`; ``LEDGER_FORK`` for one of another tree.
    """
    signer = load_log_key(config.path(config.log_key))
    signed = open_checkpoint(note, signer.keys)
    with _stores(config, signer.origin) as (leaves, checkpoints, _):
        leaves.check()
        if checkpoints.exists():
            raise _exists(signer.origin)
        stored = leaves.stored()
        check_sizes(signed.checkpoint.size, stored)
        edge = Edge(stored.tiled, stored.edge)
        edge.extend(Addition(edge.range, leaves.leaves(stored.tiled, stored.head)))
        check_root(signed, TileTree(edge.size, edge.tile))
        checkpoints.create(signed)
    return signed


@contextlib.contextmanager
def _stores(
    config: CoordinatorConfig, origin: str
) -> Iterator[tuple[LeafStore, CheckpointStore, Callable[[], object]]]:
    """Both databases, closed at the end unless the third value was called."""
    leaves = LeafStore(config.ledger_database_url, origin)
    checkpoints = CheckpointStore(config.ledger_checkpoint_url, origin)
    with contextlib.ExitStack() as stack:
        stack.callback(leaves.close)
        stack.callback(checkpoints.close)
        yield leaves, checkpoints, stack.pop_all


def _exists(origin: str) -> StateError:
    return StateError(
        Reason.EXISTS,
        f"log {origin} has a checkpoint already; nothing was changed",
        next_step="Serve it, or name other places in coordinator.toml for another log",
    )


def check_log_key(keys: LogKeys, roster: LogKeys | None) -> None:
    """Raises :class:`RefusedError` (``ROSTER``) unless the roster names this log: custodians would refuse another."""
    if roster != keys:
        raise RefusedError(
            Reason.ROSTER,
            "the roster names another log key than this coordinator has",
            expected=keys.encode()[:100],
            actual=roster.encode()[:100] if roster is not None else "none",
            next_step=f"Have the operators sign a roster with the log key in {LOG_VKEY}, or use the one that it names",
        )
