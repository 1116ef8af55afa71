"""A coordinator's log for tests, without a coordinator: stores on disk, and the checks that hold of every log."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keyquorum_coordinator.config import CoordinatorConfig
from keyquorum_coordinator.ledger.log import Entry, Log
from keyquorum_coordinator.ledger.setup import create_ledger, open_log
from keyquorum_coordinator.log_key import encode_log_key, load_log_key
from keyquorum_core.ledger.compact import CompactRange
from keyquorum_core.ledger.log_keys import LogKeys, LogSigner, open_checkpoint
from keyquorum_core.ledger.merkle import leaf_hash, verify_consistency, verify_inclusion
from keyquorum_core.ledger.tiles import TILE_WIDTH, Bundle, Tile, check_bundle, decode_bundle, decode_tile, tile_width

__all__ = ["HandedOut", "add", "all_leaves", "leaf", "make_config", "make_log", "request"]

ORIGIN = "demo/ledger"
NOW = 1_800_000_000


def make_config(folder: Path, **changes: Any) -> CoordinatorConfig:
    """A folder with the log's keys, and no log yet."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CoordinatorConfig(folder, "main", "demo", "127.0.0.1:7000", "", **changes)
    path = config.path(config.log_key)
    path.write_bytes(encode_log_key(LogSigner.generate(ORIGIN)))
    path.chmod(0o600)
    return config


def make_log(folder: Path, **changes: Any) -> tuple[CoordinatorConfig, Log]:
    """A new log."""
    config = make_config(folder, **changes)
    create_ledger(config, load_log_key(config.path(config.log_key)), now=NOW)
    return config, open_log(config)


def leaf(number: int) -> bytes:
    return b'{"number":%d,"type":"test"}' % number


def request(number: int) -> tuple[bytes, bytes]:
    return b"request %d" % number, leaf(number)


def add(log: Log, *numbers: int) -> list[Entry]:
    """Append the leaves with these numbers; each must be given a place."""
    entries = []
    for entry in log.add([request(number) for number in numbers]):
        assert isinstance(entry, Entry), entry
        entries.append(entry)
    return entries


@dataclass
class HandedOut:
    """What a log gave away: places of leaves, and every checkpoint."""

    places: dict[int, int] = field(default_factory=dict)
    roots: dict[int, bytes] = field(default_factory=dict)

    def take(self, number: int, entry: Entry, keys: LogKeys) -> None:
        """An entry verifies, agrees with what came before, and is kept."""
        size, root = entry.checkpoint.checkpoint.size, entry.checkpoint.checkpoint.root
        if size not in self.roots:
            assert open_checkpoint(entry.checkpoint.encode(), keys).checkpoint == entry.checkpoint.checkpoint
        assert entry.leaf_hash == leaf_hash(leaf(number))
        verify_inclusion(entry.leaf_hash, entry.index, size, entry.proof, root)
        assert self.places.setdefault(number, entry.index) == entry.index, "a leaf has two places"
        assert self.roots.setdefault(size, root) == root, "two trees of one size"

    def check(self, log: Log) -> None:
        """The log extends every checkpoint ever handed out, and has every leaf once, where it was said to be."""
        last = log.latest.checkpoint
        for size, root in self.roots.items():
            verify_consistency(size, root, last.size, last.root, log.consistency(size, last.size))
        leaves = all_leaves(log)
        assert len(leaves) == last.size
        for number, index in self.places.items():
            assert leaves[index] == leaf(number)
        assert len(set(leaves)) == len(leaves), "a leaf stands twice"


def all_leaves(log: Log) -> list[bytes]:
    """Every leaf, read as a reader does, from the bundles; verified against tiles and the latest root."""
    last = log.latest.checkpoint
    out: list[bytes] = []
    tree = CompactRange()
    for index in range(-(-last.size // TILE_WIDTH)):
        width = tile_width(0, index, last.size)
        entries = decode_bundle(log.tile(Bundle(index, width)), width)
        check_bundle(entries, decode_tile(log.tile(Tile(0, index, width)), width), len(out))
        for entry in entries:
            tree.append(leaf_hash(entry))
        out += entries
    assert tree.root() == last.root
    return out
