"""A log of any size, made without a sequencer: its tiles hashed and written in one pass, its databases made to match.

What it makes opens, appends, proves and verifies like any other. Entry bundles are left out: nothing measured on it
reads leaves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from keyquorum_coordinator.config import CoordinatorConfig
from keyquorum_coordinator.ledger.checkpoint_store import CheckpointStore
from keyquorum_coordinator.ledger.leaf_store import LeafStore
from keyquorum_coordinator.ledger.log import Log
from keyquorum_coordinator.ledger.setup import create_ledger, open_log
from keyquorum_coordinator.log_key import encode_log_key
from keyquorum_core.ledger.compact import CompactRange
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.ledger.tiles import TILE_WIDTH, Tile, hash_tile

NOW = 1_800_000_000


def _config(folder: Path) -> CoordinatorConfig:
    return CoordinatorConfig(folder, "main", "bench", "127.0.0.1:1", "")


def build(folder: Path, size: int, leaf: Callable[[int], bytes]) -> None:
    """A log of ``size`` leaves in ``folder``."""
    config = _config(folder)
    folder.mkdir(parents=True)
    signer = LogSigner.from_seeds("bench/ledger", *(hashlib.sha256(seed).digest() for seed in (b"a", b"b")))
    key = config.path(config.log_key)
    key.write_bytes(encode_log_key(signer))
    key.chmod(0o600)
    create_ledger(config, signer, now=NOW)
    tiled = size // TILE_WIDTH * TILE_WIDTH
    edge, tree = _write_tiles(Path(config.ledger_tiles_place), tiled, leaf)
    leaves = LeafStore(config.ledger_database_url, signer.origin)
    if tiled:
        leaves.retire(0, tiled, edge)
    rest = [leaf(number) for number in range(tiled, size)]
    if rest:
        leaves.append(tiled, 0, [(b"built %d" % number, data) for number, data in enumerate(rest, tiled)])
    leaves.close()
    for data in rest:
        tree.append(leaf_hash(data))
    checkpoints = CheckpointStore(config.ledger_checkpoint_url, signer.origin)
    if size and not checkpoints.swap(checkpoints.read()[0], signer.sign(size, tree.root(), NOW)):
        raise RuntimeError("the checkpoint of a log just made has changed")
    checkpoints.close()


def _write_tiles(folder: Path, tiled: int, leaf: Callable[[int], bytes]) -> tuple[dict[int, bytes], CompactRange]:
    """Full tiles of all levels; the partial ones above the leaves, and the tree, of ``tiled`` leaves."""
    rows: list[list[bytes]] = [[]]
    counts = [0]
    tree = CompactRange()

    def push(level: int, value: bytes) -> None:
        if level == len(rows):
            rows.append([])
            counts.append(0)
        rows[level].append(value)
        if len(rows[level]) == TILE_WIDTH:
            path = folder / Tile(level, counts[level]).path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"".join(rows[level]))
            whole = hash_tile(rows[level])
            if level == 0:
                tree.merge(CompactRange.restore(tree.end, tree.end + TILE_WIDTH, [whole]))
            rows[level], counts[level] = [], counts[level] + 1
            push(level + 1, whole)

    for number in range(tiled):
        push(0, leaf_hash(leaf(number)))
    return {level: b"".join(row) for level, row in enumerate(rows) if level and row}, tree


def open_built(folder: Path) -> Log:
    return open_log(_config(folder))
