"""The right edge of the log's tree in memory: what has to be known of it to go on, and to serve what no tile holds.

At most one partial tile for each level, the leaf hashes since the last full tile was stored, and a compact range:
memory does not grow with the log. What lies left of the edge is in full tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keyquorum_core.errors import MalformedError, Reason, StateError
from keyquorum_core.ledger.compact import CompactRange, decompose
from keyquorum_core.ledger.merkle import HASH_SIZE, leaf_hash
from keyquorum_core.ledger.tile_tree import TileTree
from keyquorum_core.ledger.tiles import TILE_WIDTH, Tile, decode_tile, tile_width

__all__ = ["Addition", "Edge"]


class Addition:
    """Leaves that are about to follow an edge: the tree with them, not yet part of it."""

    def __init__(self, start: CompactRange, leaves: Sequence[bytes]) -> None:
        """``start`` is copied."""
        self.start = start
        self.range = start.copy()
        self.hashes: list[bytes] = []
        self.added: list[tuple[int, int, bytes]] = []
        for leaf in leaves:
            value = leaf_hash(leaf)
            self.hashes.append(value)
            self.range.append(value, self._visit)

    def _visit(self, level: int, index: int, value: bytes) -> None:
        self.added.append((level, index, value))

    def nodes(self) -> dict[tuple[int, int], bytes]:
        """Every subtree that proofs of the new leaves, and of the old tree in the new one, are made of."""
        nodes = self.start.nodes()
        nodes.update({(level, index): value for level, index, value in self.added})
        return nodes


class Edge:
    """Not safe to share between threads while it grows."""

    def __init__(self, tiled: int, partial: Mapping[int, bytes]) -> None:
        """The tree of ``tiled`` leaves, all in full tiles of level 0, from its partial tiles of the levels above.

        Raises :class:`MalformedError` when those are not what a tree of that size has.
        """
        expected = {level: width for level in range(1, 8) if (width := (tiled >> (8 * level)) % TILE_WIDTH)}
        if tiled % TILE_WIDTH or {level: len(data) // HASH_SIZE for level, data in partial.items()} != expected:
            raise MalformedError(
                Reason.LEDGER_PROOF,
                "the stored edge of the ledger's tree does not fit its size",
                expected=f"hashes by level {expected}, for {tiled} leaves",
                actual=f"{ {level: len(data) / HASH_SIZE for level, data in partial.items()} }",
            )
        self._tiled = tiled
        self._levels: dict[int, list[bytes]] = {
            level: list(decode_tile(data, expected[level])) for level, data in partial.items()
        }
        tree = TileTree(tiled, lambda tile: partial[tile.level])
        self._range = CompactRange.restore(0, tiled, [tree.node(*name) for name in decompose(0, tiled)])

    @property
    def tiled(self) -> int:
        """Leaves below it are in full tiles."""
        return self._tiled

    @property
    def size(self) -> int:
        return self._range.end

    @property
    def range(self) -> CompactRange:
        """The tree so far; not to be changed."""
        return self._range

    def extend(self, addition: Addition) -> None:
        """Take leaves in for good; they must follow."""
        for level, _, value in addition.added:
            if level % 8 == 0:
                self._levels.setdefault(level // 8, []).append(value)
        self._range = addition.range

    def holds(self, tile: Tile) -> bool:
        """Whether the tile is here, or will be; otherwise the object store has it, with the whole tile around it."""
        return tile.index * TILE_WIDTH >= self._base(tile.level)

    def tile(self, tile: Tile) -> bytes:
        """The hashes of a tile that :meth:`holds` names, in the tree as it is or any smaller one."""
        start = tile.index * TILE_WIDTH - self._base(tile.level)
        hashes = self._levels.get(tile.level, [])[start : start + tile.width]
        if start < 0 or len(hashes) != tile.width:
            raise StateError(Reason.NOT_FOUND, "no such tile", expected=f"one of {self.size} leaves", actual=tile.path)
        return b"".join(hashes)

    def partial(self, tiled: int) -> dict[int, bytes]:
        """Partial tiles of levels 1 and above in the tree of ``tiled`` leaves: what the constructor takes."""
        out = {}
        for level in range(1, 8):
            index, width = divmod(tiled >> (8 * level), TILE_WIDTH)
            if width:
                out[level] = self.tile(Tile(level, index, tile_width(level, index, tiled)))
        return out

    def retire(self, tiled: int) -> None:
        """Forget what is in full tiles by now: ``tiled`` leaves."""
        before = {level: self._base(level) for level in self._levels}
        self._tiled = tiled
        for level, hashes in self._levels.items():
            del hashes[: self._base(level) - before[level]]

    def _base(self, level: int) -> int:
        """The number of the first hash held of a level: where the last tile of the tree of ``tiled`` leaves begins."""
        return (self._tiled >> (8 * level)) // TILE_WIDTH * TILE_WIDTH
