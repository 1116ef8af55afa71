"""Compact ranges: what must be remembered of consecutive leaves to go on hashing, in O(log n).

A compact range over leaves [begin, end) holds the hashes of the fewest perfect, aligned subtrees that cover it, left to
right. One that begins at 0 gives the tree's root; two that touch merge into one. Subtrees are named by (level, index):
the leaves index·2^level … (index + 1)·2^level - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from keyquorum_core.errors import MalformedError, Reason, StateError
from keyquorum_core.ledger.merkle import EMPTY_ROOT, MAX_SIZE, check_hash, node_hash

__all__ = ["CompactRange", "Visitor", "decompose", "fold"]

Visitor = Callable[[int, int, bytes], None]
"""Called with (level, index, hash) of every perfect subtree as it is completed, leaves included, children first."""


def _nobody(level: int, index: int, value: bytes) -> None:
    """The visitor that looks away."""


def decompose(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The fewest perfect subtrees (level, index) covering leaves [begin, end), left to right."""
    while begin < end:
        level = (end - begin).bit_length() - 1
        if begin:
            level = min(level, (begin & -begin).bit_length() - 1)
        yield level, begin >> level
        begin += 1 << level


def fold(hashes: Sequence[bytes]) -> bytes:
    """The hash of a tree from those of its perfect subtrees, left to right; at least one."""
    value = hashes[-1]
    for left in reversed(hashes[:-1]):
        value = node_hash(left, value)
    return value


class CompactRange:
    """Leaves [``begin``, ``end``), growing at the end. Not safe to share between threads while it grows."""

    __slots__ = ("_begin", "_end", "_hashes")

    def __init__(self, begin: int = 0) -> None:
        """An empty range at leaf ``begin``. Raises :class:`MalformedError` (``LEDGER_PROOF``) outside 0 … 2⁶³-1."""
        if not 0 <= begin <= MAX_SIZE:
            raise MalformedError(
                Reason.LEDGER_PROOF, "a range outside every tree", expected=f"0…{MAX_SIZE}", actual=begin
            )
        self._begin = self._end = begin
        self._hashes: list[bytes] = []

    @staticmethod
    def restore(begin: int, end: int, hashes: Sequence[bytes]) -> CompactRange:
        """A range from what :attr:`hashes` gave. Raises :class:`MalformedError` (``LEDGER_PROOF``) unless there are
        exactly as many 32-byte hashes as the range has subtrees."""
        out = CompactRange(begin)
        if not begin <= end <= MAX_SIZE:
            raise MalformedError(
                Reason.LEDGER_PROOF, "a range that ends before it begins", expected=f"{begin}…{MAX_SIZE}", actual=end
            )
        count = sum(1 for _ in decompose(begin, end))
        if len(hashes) != count:
            raise MalformedError(
                Reason.LEDGER_PROOF,
                f"wrong number of hashes for leaves {begin}…{end}",
                expected=count,
                actual=len(hashes),
            )
        for value in hashes:
            check_hash(value, "an element of a compact range")
        out._end, out._hashes = end, list(hashes)
        return out

    @property
    def begin(self) -> int:
        return self._begin

    @property
    def end(self) -> int:
        """The leaf after the last one: the tree's size when ``begin`` is 0."""
        return self._end

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """Hashes of the subtrees that :func:`decompose` names, in its order."""
        return tuple(self._hashes)

    def nodes(self) -> dict[tuple[int, int], bytes]:
        """The same by (level, index)."""
        return dict(zip(decompose(self._begin, self._end), self._hashes, strict=True))

    def copy(self) -> CompactRange:
        out = CompactRange(self._begin)
        out._end, out._hashes = self._end, list(self._hashes)
        return out

    def append(self, leaf_hash: bytes, visit: Visitor = _nobody) -> None:
        """Add the leaf with index ``end``. Raises :class:`MalformedError` when it is no hash or the tree is full."""
        check_hash(leaf_hash, "a leaf hash")
        if self._end >= MAX_SIZE:
            raise MalformedError(Reason.LEDGER_PROOF, "the tree is full", expected=f"at most {MAX_SIZE} leaves")
        self._push(0, self._end, leaf_hash, visit)

    def merge(self, following: CompactRange, visit: Visitor = _nobody) -> None:
        """Add the leaves of a range that begins where this one ends; else raises :class:`StateError`.

        ``visit`` sees that range's subtrees and those completed by joining them, not the ones inside.
        """
        if following._begin != self._end:
            raise StateError(
                Reason.STATE,
                "ranges that do not touch",
                expected=f"leaf {self._end}",
                actual=f"leaf {following._begin}",
            )
        for (level, index), value in following.nodes().items():
            self._push(level, index, value, visit)

    def _push(self, level: int, index: int, value: bytes, visit: Visitor) -> None:
        self._end = (index + 1) << level
        visit(level, index, value)
        # A right child whose left sibling lies in the range: that sibling is then the last subtree held.
        while index & 1 and (index - 1) << level >= self._begin:
            value = node_hash(self._hashes.pop(), value)
            level, index = level + 1, index >> 1
            visit(level, index, value)
        self._hashes.append(value)

    def root(self) -> bytes:
        """The root of the tree of ``end`` leaves. Raises :class:`StateError` for a range that does not begin at 0."""
        if self._begin:
            raise StateError(
                Reason.STATE, "only a range from the first leaf has a root", expected=0, actual=self._begin
            )
        return fold(self._hashes) if self._hashes else EMPTY_ROOT

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, CompactRange)
            and (self._begin, self._end) == (other._begin, other._end)
            and self._hashes == other._hashes
        )

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __repr__(self) -> str:
        return f"CompactRange({self._begin}…{self._end})"
