"""Verifying a log from its leaves: every file served of a tree, recomputed and compared, in O(log n) of memory.

The leaves under a checkpoint's root are hashed again, one entry bundle after the other, and each tile on each level
must be what they hash to. The last word has the checkpoint's root: until :meth:`Replay.finish` has compared it, nothing
that was read is shown to be in the log. Whoever verified a smaller tree before replays only the leaves added since,
from the hashes at its right edge; that these are the old tree's is shown by its own root.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping, Sequence

from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.compact import CompactRange, decompose
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.ledger.tile_tree import TileTree
from keyquorum_core.ledger.tiles import TILE_WIDTH, Bundle, Tile, decode_bundle, decode_tile, tile_width

__all__ = ["Replay", "check_growth", "edge_tiles", "plan"]


def _aligned(size: int) -> int:
    """Where a replay after ``size`` leaves begins: bundles are read whole."""
    return size - size % TILE_WIDTH


def edge_tiles(past: int, size: int) -> tuple[Tile, ...]:
    """The tiles of the tree of ``size`` that hold the right edge of its first ``past`` leaves (0 < past ≤ size), as far
    as a replay of the rest does not recompute it: those that :class:`Replay` takes as ``edge``."""
    begin = _aligned(past)
    # Level 0 is read again from the last bundle's leaves, so that only levels above hold anything older.
    levels = ((level, begin >> (8 * level)) for level in range(1, (begin.bit_length() + 7) // 8))
    return tuple(
        Tile(level, count // TILE_WIDTH, tile_width(level, count // TILE_WIDTH, size))
        for level, count in levels
        if count % TILE_WIDTH
    )


def plan(past: int, size: int) -> Iterator[Bundle | Tile]:
    """Every file that a replay from ``past`` leaves (0 for all) to ``size`` reads, in its order: each bundle, then the
    tiles that it completes, lowest level first, and at the end the partial tiles above level 0."""
    for index in range(_aligned(past) // TILE_WIDTH, -(-size // TILE_WIDTH)):
        width = tile_width(0, index, size)
        yield Bundle(index, width)
        yield Tile(0, index, width)
        count, level = index + 1, 1
        while width == TILE_WIDTH and count % TILE_WIDTH == 0:
            count //= TILE_WIDTH
            yield Tile(level, count - 1)
            level += 1
    level = 1
    while count := size >> (8 * level):
        if (width := count % TILE_WIDTH) and count != _aligned(past) >> (8 * level):
            yield Tile(level, count // TILE_WIDTH, width)
        level += 1


class Replay:
    """One pass over the tree of ``size`` leaves. Give :meth:`accept` each file that :attr:`expected` names, then call
    :meth:`finish`. Not safe to share between threads, and of no use after an error."""

    def __init__(self, size: int, past: Checkpoint | None = None, edge: Mapping[Tile, bytes] | None = None) -> None:
        """From the first leaf, or with ``edge``, the contents of :func:`edge_tiles`, from those that ``past`` had.

        ``past`` is an earlier checkpoint of the same log, whose signatures the caller has verified. Raises
        :class:`MalformedError` for tiles of the wrong size, :class:`StateError` for a tree smaller than the past one,
        :class:`RefusedError` (``LEDGER_PROOF``, with the detail ``past``) for an edge that is not the past tree's.
        """
        if past is not None and past.size > size:
            raise StateError(
                Reason.STATE, "a tree smaller than the one it should extend", expected=past.size, actual=size
            )
        self._size, self._past = size, past
        self._rows: list[list[bytes]] = [[]]
        self._full: dict[int, list[bytes]] = {}
        self._forked: bytes | None = None
        self._resumed = past is not None and edge is not None
        self._range = CompactRange()
        if past is not None and edge is not None:
            self._resume(past.size, edge)
        self._plan = plan(self._range.end, size)
        self._next: Bundle | Tile | None = next(self._plan, None)
        self._look_at_past()

    def _resume(self, past: int, edge: Mapping[Tile, bytes]) -> None:
        begin, names = _aligned(past), edge_tiles(past, self._size)
        if missing := [tile.path for tile in names if tile not in edge]:
            raise StateError(Reason.STATE, "tiles of the edge are not at hand", expected=", ".join(missing))
        tree = TileTree(self._size, lambda tile: edge[tile])
        self._range = CompactRange.restore(0, begin, [tree.node(level, n) for level, n in decompose(0, begin)])
        for tile in names:
            self._rows += [[] for _ in range(tile.level + 1 - len(self._rows))]
            held = (begin >> (8 * tile.level)) % TILE_WIDTH
            # The range's subtrees on these levels are made of exactly these hashes: the past root vouches for both.
            self._rows[tile.level] = list(decode_tile(edge[tile], tile.width))[:held]

    @property
    def expected(self) -> Bundle | Tile | None:
        """The file that :meth:`accept` takes next; nothing once all were read."""
        return self._next

    @property
    def leaves(self) -> int:
        """Leaves hashed so far, those of the past included."""
        return self._range.end

    def accept(self, name: Bundle | Tile, data: bytes) -> tuple[bytes, ...]:
        """Check the next file. The leaves of a bundle that are in no past tree, and nothing for a tile.

        Raises :class:`MalformedError` for a file that is not of its kind and width, :class:`RefusedError`
        (``LEDGER_PROOF``) for a tile that the leaves do not hash to or leaves that are not the past tree's,
        :class:`StateError` for a file out of turn.
        """
        if name != self._next:
            raise StateError(
                Reason.STATE,
                "a file out of turn",
                expected="nothing more" if self._next is None else self._next.path,
                actual=name.path,
            )
        out: tuple[bytes, ...] = ()
        if isinstance(name, Bundle):
            begin = self._range.end
            entries = decode_bundle(data, name.width)
            for entry in entries:
                self._range.append(leaf_hash(entry), self._visit)
                if self._past is not None and self._range.end == self._past.size:
                    self._look_at_past()
            known = 0 if self._past is None or not self._resumed else self._past.size
            out = entries[max(0, known - begin) :]
        else:
            self._compare(name, data)
        self._next = next(self._plan, None)
        return out

    def _visit(self, level: int, index: int, value: bytes) -> None:
        if level & 7:
            return
        level >>= 3
        if level == len(self._rows):
            self._rows.append([])
        row = self._rows[level]
        row.append(value)
        if len(row) == TILE_WIDTH:
            self._full[level], self._rows[level] = row, []

    def _compare(self, tile: Tile, data: bytes) -> None:
        served = decode_tile(data, tile.width)
        row: Sequence[bytes] = self._full.pop(tile.level) if tile.width == TILE_WIDTH else self._rows[tile.level]
        for number, (ours, theirs) in enumerate(zip(row, served, strict=True)):
            if not hmac.compare_digest(ours, theirs):
                raise RefusedError(
                    Reason.LEDGER_PROOF,
                    f"{tile.path} is not what the leaves under it hash to, from its hash {number} on",
                    expected=ours.hex(),
                    actual=theirs.hex(),
                    next_step="Read again from another place; if it stays so, the log serves two trees: keep both.",
                )

    def _look_at_past(self) -> None:
        past = self._past
        if past is None or past.size != self._range.end or hmac.compare_digest(self._range.root(), past.root):
            return
        if self._resumed:
            raise RefusedError(
                Reason.LEDGER_PROOF,
                f"the tree of {self._size} is not shown to extend the tree of {past.size}",
                expected=f"root {past.root.hex()} at {past.size}",
                actual=f"root {self._range.root().hex()}",
                next_step="Verify from the first leaf: that tells a fork from tiles that were served wrong.",
                details={"past": str(past.size)},
            )
        self._forked = self._range.root()

    def finish(self, root: bytes) -> CompactRange:
        """Whether what was read is the tree under ``root``, by a checkpoint; the whole tree as a compact range.

        Raises :class:`RefusedError`: ``LEDGER_PROOF`` for another root; ``LEDGER_FORK`` when the leaves do make
        this root and, on the way, did not make the past one: two trees, signed by one log. Raises :class:`StateError`
        while files are missing.
        """
        if self._next is not None:
            raise StateError(Reason.STATE, "not all files were read", expected=self._next.path)
        if not hmac.compare_digest(self._range.root(), root):
            raise RefusedError(
                Reason.LEDGER_PROOF,
                f"the leaves served do not make the tree of {self._size} that the checkpoint signs",
                expected=f"root {root.hex()}",
                actual=f"root {self._range.root().hex()}",
                next_step="Read again from another place; if it stays so, the log hides leaves: keep what was served.",
            )
        if self._past is not None and self._forked is not None:
            raise RefusedError(
                Reason.LEDGER_FORK,
                f"the tree of {self._size} does not extend the tree of {self._past.size}",
                expected=f"root {self._past.root.hex()} at {self._past.size}",
                actual=f"root {self._forked.hex()}",
                next_step="Keep both signed checkpoints: together they prove the fork.",
            )
        return self._range.copy()


def check_growth(past: Checkpoint, checkpoint: Checkpoint) -> None:
    """What two checkpoints of one log say without any tile: trees do not shrink, and one size has one root.

    Raises :class:`MalformedError` (``LEDGER_ORIGIN``) for two logs, and :class:`RefusedError`: ``LEDGER_ROLLBACK`` for
    a smaller tree, ``LEDGER_FORK`` for two roots of one size.
    """
    if past.origin != checkpoint.origin:
        raise MalformedError(
            Reason.LEDGER_ORIGIN, "checkpoints of two logs", expected=past.origin, actual=ascii(checkpoint.origin)
        )
    if checkpoint.size < past.size:
        raise RefusedError(
            Reason.LEDGER_ROLLBACK,
            "the log shows a smaller tree than before",
            expected=f"{past.size} leaves or more",
            actual=f"{checkpoint.size} leaves",
            next_step="Read again from another place: it may be an old copy. Keep both checkpoints.",
        )
    if checkpoint.size == past.size and not hmac.compare_digest(past.root, checkpoint.root):
        raise RefusedError(
            Reason.LEDGER_FORK,
            f"two trees of {past.size} leaves, signed by one log",
            expected=f"root {past.root.hex()}",
            actual=f"root {checkpoint.root.hex()}",
            next_step="Keep both signed checkpoints: together they prove the fork.",
        )
