"""A log's stores as the configuration names them: made once by ``ledger init``, opened by everybody else.

Making takes its steps in an order that can be gone through again after a kill, the checkpoint last: until that is there
nothing serves the log, and once it is, nothing makes one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from keyquorum_coordinator.config import CoordinatorConfig
from keyquorum_coordinator.ledger.checkpoint_store import CheckpointStore
from keyquorum_coordinator.ledger.leaf_store import LeafStore
from keyquorum_coordinator.ledger.log import Log
from keyquorum_coordinator.ledger.tile_store import TileObjects, TileStore
from keyquorum_coordinator.log_key import LOG_VKEY, load_log_key
from keyquorum_coordinator.objects import open_objects
from keyquorum_core.errors import Reason, RefusedError, StateError
from keyquorum_core.ledger.compact import CompactRange
from keyquorum_core.ledger.log_keys import LogKeys, LogSigner
from keyquorum_core.ledger.tiles import Tile

__all__ = ["check_log_key", "create_ledger", "open_log"]


def create_ledger(config: CoordinatorConfig, signer: LogSigner, *, now: int) -> None:
    """Make an empty log for these keys. Raises :class:`StateError`: ``EXISTS`` when it has a checkpoint, ``STATE`` when
    it lost the one that it had."""
    origin = signer.origin
    checkpoints = CheckpointStore(config.ledger_checkpoint_url, origin)
    leaves = LeafStore(config.ledger_database_url, origin)
    try:
        if checkpoints.exists():
            raise StateError(
                Reason.EXISTS,
                f"log {origin} has a checkpoint already; nothing was changed",
                next_step="Serve it, or name other places in coordinator.toml for another log",
            )
        if not leaves.create() and (head := leaves.stored().head):
            raise _lost(f"{head} leaves in ledger_database")
        if TileStore(open_objects(config.ledger_tiles_place)).holds(Tile(0, 0)):
            raise _lost("tiles in ledger_tiles")
        checkpoints.create(signer.sign(0, CompactRange().root(), now))
    finally:
        leaves.close()
        checkpoints.close()


def _lost(actual: str) -> StateError:
    return StateError(
        Reason.STATE,
        "this log had a checkpoint and lost it: a new one would fork the log",
        expected="a log that never had a leaf",
        actual=actual,
        next_step="Restore ledger_checkpoint from its newest backup",
    )


def open_log(
    config: CoordinatorConfig, *, clock: Callable[[], float] = time.time, objects: TileObjects | None = None
) -> Log:
    """The log, checked. Blocking. Raises as :class:`Log`, and as :func:`load_log_key`."""
    signer = load_log_key(config.path(config.log_key))
    leaves = LeafStore(config.ledger_database_url, signer.origin)
    checkpoints = CheckpointStore(config.ledger_checkpoint_url, signer.origin)
    try:
        return Log(
            signer, leaves, checkpoints, TileStore(objects or open_objects(config.ledger_tiles_place)), clock=clock
        )
    except BaseException:
        leaves.close()
        checkpoints.close()
        raise


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
