"""Building inclusion and consistency proofs (RFC 6962 §2.1.1, §2.1.2) from the hashes of perfect subtrees.

Whoever can give the hash of any perfect subtree, named by (level, index), can have any proof: a tree of tiles
(:mod:`keyquorum_core.ledger.tile_tree`), a mapping filled by a compact range's visitor, or two compact ranges. Every
proof takes O(log n) hashes. Nothing here says that the hashes are right: a proof is worth what its verification says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from keyquorum_core.errors import MalformedError, Reason, UnavailableError
from keyquorum_core.ledger.compact import CompactRange, decompose, fold
from keyquorum_core.ledger.merkle import EMPTY_ROOT, MAX_SIZE

__all__ = [
    "NodeReader",
    "consistency_proof",
    "inclusion_proof",
    "ranges_consistency_proof",
    "ranges_inclusion_proof",
    "reader_of",
    "tree_root",
]

NodeReader = Callable[[int, int], bytes]
"""(level, index) → the 32-byte hash of the perfect subtree over leaves index·2^level … (index + 1)·2^level - 1."""


def tree_root(size: int, node: NodeReader) -> bytes:
    """The root of the first ``size`` leaves."""
    return _span(0, size, node) if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, node: NodeReader) -> tuple[bytes, ...]:
    """The proof that leaf ``index`` is in the tree of the first ``size`` leaves, sibling first.

    Raises :class:`MalformedError` (``LEDGER_PROOF``) for an index outside the tree, and what ``node`` raises.
    """
    if not 0 <= index < size <= MAX_SIZE:
        raise MalformedError(
            Reason.LEDGER_PROOF,
            "no inclusion proof for a leaf outside the tree",
            expected=f"0 ≤ index < {size}",
            actual=index,
        )
    return tuple(_siblings(0, index, size, node))


def consistency_proof(size1: int, size2: int, node: NodeReader) -> tuple[bytes, ...]:
    """The proof that the first ``size2`` leaves extend the first ``size1``; empty from 0 and between equal sizes.

    Raises :class:`MalformedError` (``LEDGER_PROOF``) for sizes that decrease, and what ``node`` raises.
    """
    if not 0 <= size1 <= size2 <= MAX_SIZE:
        raise MalformedError(
            Reason.LEDGER_PROOF,
            "no consistency proof between these sizes",
            expected=f"0 ≤ first ≤ second ≤ {MAX_SIZE}",
            actual=f"{size1} and {size2}",
        )
    if size1 in (0, size2):
        return ()
    level = (size1 & -size1).bit_length() - 1
    index = (size1 - 1) >> level
    first = [node(level, index)] if index else []  # a perfect old tree is known by its root
    return (*first, *_siblings(level, index, size2, node))


def _siblings(level: int, index: int, size: int, node: NodeReader) -> list[bytes]:
    """Hashes beside the path from subtree (level, index) to the root of the tree of ``size``, lowest first."""
    out = []
    while 1 << level < size:
        sibling = index ^ 1
        start = sibling << level
        if start + (1 << level) <= size:
            out.append(node(level, sibling))
        elif start < size:
            out.append(_span(start, size, node))
        level, index = level + 1, index >> 1
    return out


def _span(begin: int, end: int, node: NodeReader) -> bytes:
    return fold([node(level, index) for level, index in decompose(begin, end)])


def reader_of(nodes: Mapping[tuple[int, int], bytes]) -> NodeReader:
    """A reader of known subtrees; one that is not there raises :class:`UnavailableError` (``NOT_FOUND``)."""

    def read(level: int, index: int) -> bytes:
        try:
            return nodes[level, index]
        except KeyError:
            raise UnavailableError(
                Reason.NOT_FOUND, "the hash of a subtree is not at hand", expected=f"level {level}, index {index}"
            ) from None

    return read


def ranges_inclusion_proof(before: CompactRange, after: CompactRange) -> tuple[bytes, ...]:
    """The inclusion proof of the one leaf between ``before`` = [0, i) and ``after`` = [i + 1, size).

    For the last leaf of a tree ``after`` is empty, so a log that appends can prove each leaf from what it holds anyway.
    Raises :class:`MalformedError` (``LEDGER_PROOF``) for other ranges.
    """
    if before.begin != 0 or after.begin != before.end + 1:
        raise MalformedError(
            Reason.LEDGER_PROOF,
            "ranges that do not leave out one leaf",
            expected="[0, i) and [i + 1, size)",
            actual=f"{before} and {after}",
        )
    return inclusion_proof(before.end, after.end, reader_of({**before.nodes(), **after.nodes()}))


def ranges_consistency_proof(old: CompactRange, added: CompactRange) -> tuple[bytes, ...]:
    """The consistency proof from ``old`` = [0, size1) to size2, from ``added`` = [size1, size2).

    Raises :class:`MalformedError` (``LEDGER_PROOF``) for other ranges.
    """
    if old.begin != 0 or added.begin != old.end:
        raise MalformedError(
            Reason.LEDGER_PROOF,
            "ranges that are not an old tree and what was added to it",
            expected="[0, first) and [first, second)",
            actual=f"{old} and {added}",
        )
    return consistency_proof(old.end, added.end, reader_of({**old.nodes(), **added.nodes()}))
