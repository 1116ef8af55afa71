"""Inclusion proofs for single leaves of a log, from its tiles: each verified before it is handed out."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Final

from keyquorum.ledger.source import LogSource
from keyquorum.ledger.verification import fetch
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.log_trust import LogTrust, QuorumCheckpoint
from keyquorum_core.ledger.merkle import leaf_hash, verify_inclusion
from keyquorum_core.ledger.tile_tree import TileTree
from keyquorum_core.ledger.tiles import TILE_WIDTH, Tile, tile_width
from keyquorum_core.ledger.tlog_proof import TlogProof

__all__ = ["LoggedLeaf", "proof_file", "prove", "verify_proof_file"]

_AT_ONCE: Final = 64
"""Leaves whose tiles are held together: memory is bounded by these, not by the log."""


@dataclass(frozen=True, slots=True)
class LoggedLeaf:
    """A leaf and where it stands."""

    index: int
    leaf: bytes


def _tiles(indices: Iterable[int], size: int) -> list[Tile]:
    """The tiles on the paths of these leaves and at the tree's right edge: what proofs are made of."""
    wanted: dict[tuple[int, int], None] = {}
    for index in (*indices, size - 1):
        level = 0
        while count := size >> (8 * level):
            # At the edge the last complete subtree of a level may lie before the leaf's own, incomplete one.
            at = min(index >> (8 * level), count - 1)
            wanted[level, at // TILE_WIDTH] = None
            level += 1
    return [Tile(level, index, tile_width(level, index, size)) for level, index in wanted]


async def prove(
    source: LogSource, checkpoint: Checkpoint, leaves: Iterable[LoggedLeaf]
) -> AsyncGenerator[tuple[LoggedLeaf, tuple[bytes, ...]]]:
    """Each leaf with its inclusion proof under ``checkpoint``, in the order given; ascending order reads least.

    Raises as :func:`verify_inclusion`, when leaf, tiles and checkpoint don't fit, and as :meth:`LogSource.read`.
    """
    held: dict[Tile, bytes] = {}
    rest = iter(leaves)
    while chunk := list(itertools.islice(rest, _AT_ONCE)):
        names = _tiles((each.index for each in chunk), checkpoint.size)
        held = {name: data for name, data in held.items() if name in set(names)}
        async for name, data in fetch(source, [name for name in names if name not in held]):
            if isinstance(name, Tile):
                held[name] = data
        tree = TileTree(checkpoint.size, held.__getitem__, tiles_kept=len(names))
        for each in chunk:
            proof = tree.inclusion_proof(each.index)
            verify_inclusion(leaf_hash(each.leaf), each.index, checkpoint.size, proof, checkpoint.root)
            yield each, proof


def verify_proof_file(
    data: bytes, trust: LogTrust, now: int, leaf: bytes | None = None
) -> tuple[LoggedLeaf, QuorumCheckpoint]:
    """The leaf that a ``.tlog-proof`` proves, under a checkpoint cosigned by a quorum at any time up to ``now``.

    The leaf is the proof's extra data unless it is given: nobody signed that, but the tree has no place for another.
    Raises :class:`MalformedError` and :class:`RefusedError` as :meth:`TlogProof.parse`, :meth:`TlogProof.verify` and
    :meth:`LogTrust.check`; ``LEAF`` where there is no leaf.
    """
    proof = TlogProof.parse(data)
    content = proof.extra if leaf is None else leaf
    if content is None:
        raise MalformedError(
            Reason.LEAF, "the proof does not hold its leaf", expected="a line extra <base64>", actual="none"
        )
    return LoggedLeaf(proof.index, content), trust.check(proof.verify(leaf_hash(content), trust.log), now=now)


def proof_file(
    each: LoggedLeaf, proof: tuple[bytes, ...], latest: QuorumCheckpoint, trust: LogTrust, now: int
) -> bytes:
    """A ``.tlog-proof`` of leaf, proof and cosigned checkpoint, verified as its readers will, from its bytes."""
    data = TlogProof(each.index, proof, latest.signed.encode(), each.leaf or None).encode()
    verify_proof_file(data, trust, now, each.leaf)
    return data
