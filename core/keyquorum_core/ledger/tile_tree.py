"""A log's Merkle tree as read from tiles: root, inclusion proofs and consistency proofs for any size up to its own.

A proof touches one tile in each of the ⌈log₂₅₆ size⌉ levels, and a few more at the right edge; the latest tiles are
kept, a fixed number of them, so memory does not grow with the log.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.ledger import proofs
from keyquorum_core.ledger.merkle import MAX_SIZE, node_hash
from keyquorum_core.ledger.tiles import TILE_WIDTH, Tile, decode_tile, tile_width

__all__ = ["TileReader", "TileTree"]

TileReader = Callable[[Tile], bytes]
"""The contents of a tile by name: it fetches, and raises what its caller expects when it can't."""

_TILES_KEPT: Final = 64


class TileTree:
    """The tree of ``size`` leaves whose tiles ``read`` gives. Not safe to share between threads.

    Tiles are believed: what comes out is worth what its verification against a signed root says.
    """

    def __init__(self, size: int, read: TileReader, *, tiles_kept: int = _TILES_KEPT) -> None:
        """Raises :class:`MalformedError` for a size outside 0 … 2⁶³-1."""
        if not 0 <= size <= MAX_SIZE:
            raise MalformedError(Reason.LEDGER_PROOF, "bad tree size", expected=f"0…{MAX_SIZE}", actual=size)
        self._size = size
        self._read = read
        self._kept: OrderedDict[tuple[int, int], list[list[bytes]]] = OrderedDict()
        self._tiles_kept = max(1, tiles_kept)

    @property
    def size(self) -> int:
        return self._size

    def grow(self, size: int) -> None:
        """The log now has ``size`` leaves: tiles that were partial are read again, full ones stay.

        Raises :class:`MalformedError` for fewer than before.
        """
        if not self._size <= size <= MAX_SIZE:
            raise MalformedError(
                Reason.LEDGER_PROOF, "a tree that shrinks", expected=f"{self._size}…{MAX_SIZE}", actual=size
            )
        for name in [name for name, rows in self._kept.items() if len(rows[0]) < TILE_WIDTH]:
            del self._kept[name]
        self._size = size

    def root(self, size: int | None = None) -> bytes:
        """The root of the first ``size`` leaves, by default of all."""
        return proofs.tree_root(self._up_to(self._size if size is None else size), self.node)

    def inclusion_proof(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """Of leaf ``index`` in the first ``size`` leaves. Raises :class:`MalformedError`, and as the reader does."""
        return proofs.inclusion_proof(index, self._up_to(self._size if size is None else size), self.node)

    def consistency_proof(self, size1: int, size2: int | None = None) -> tuple[bytes, ...]:
        """From the first ``size1`` to the first ``size2`` leaves. Raises as :meth:`inclusion_proof`."""
        return proofs.consistency_proof(size1, self._up_to(self._size if size2 is None else size2), self.node)

    def node(self, level: int, index: int) -> bytes:
        """The hash of the perfect subtree over leaves index·2^level …, all of them in the tree."""
        if level < 0 or index < 0 or (index + 1) << level > self._size:
            raise MalformedError(
                Reason.LEDGER_PROOF,
                "a subtree that is not in the tree",
                expected=f"one within {self._size} leaves",
                actual=f"level {level}, index {index}",
            )
        tile_level, within = divmod(level, 8)
        tile_index, offset = divmod(index, 256 >> within)
        return self._rows(tile_level, tile_index)[within][offset]

    def _rows(self, level: int, index: int) -> list[list[bytes]]:
        """A tile's hashes, and above them the rows of those of its perfect subtrees."""
        rows = self._kept.get((level, index))
        if rows is None:
            width = tile_width(level, index, self._size)
            rows = [list(decode_tile(self._read(Tile(level, index, width)), width))]
            while len(row := rows[-1]) > 1 and len(rows) < 8:
                rows.append([node_hash(row[at], row[at + 1]) for at in range(0, len(row) - 1, 2)])
            self._kept[level, index] = rows
            if len(self._kept) > self._tiles_kept:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end((level, index))
        return rows

    def _up_to(self, size: int) -> int:
        if not 0 <= size <= self._size:
            raise MalformedError(
                Reason.LEDGER_PROOF, "a tree larger than the log", expected=f"0…{self._size}", actual=size
            )
        return size
