"""The log itself, blocking: places leaves under signed checkpoints, proves them, and seals what is full into tiles.

The order of writes is :mod:`keyquorum_coordinator.sequencer`'s promise; it is kept here. What is on disk is checked
before anything is signed: leaves without a hole, the tree's root against the latest checkpoint, the checkpoint against
the log's keys, and nothing in the object store that the checkpoint does not cover.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keyquorum_coordinator.ledger.checkpoint_store import CheckpointStore
from keyquorum_coordinator.ledger.edge import Addition, Edge
from keyquorum_coordinator.ledger.leaf_store import LeafStore, MovedError, Stored
from keyquorum_coordinator.ledger.tile_store import TileStore
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.ledger import merkle
from keyquorum_core.ledger.log_keys import LogKeys, LogSigner, SignedCheckpoint, open_checkpoint
from keyquorum_core.ledger.notes import NoteSignature
from keyquorum_core.ledger.proofs import consistency_proof, inclusion_proof, reader_of
from keyquorum_core.ledger.tile_tree import TileTree
from keyquorum_core.ledger.tiles import (
    TILE_WIDTH,
    Bundle,
    Tile,
    check_bundle,
    decode_bundle,
    decode_tile,
    encode_bundle,
    tiles_between,
)

__all__ = ["Entry", "Log", "check_root", "check_sizes"]

_ATTEMPTS = 16
_SEALED_AT_ONCE = 16
_KEPT_PROOFS = 256


@dataclass(frozen=True, slots=True)
class Entry:
    """A leaf's place in the log: ``proof`` shows ``leaf_hash`` at ``index`` in the tree of ``checkpoint``."""

    index: int
    leaf_hash: bytes
    checkpoint: SignedCheckpoint
    proof: tuple[bytes, ...]


class Log:
    """One thread may :meth:`add`, one :meth:`seal`, any read. ``clock``: unix seconds.

    Making one checks what is stored and goes on from there. Raises, and nothing may be served then: ``NOT_FOUND`` (no
    checkpoint or no database), ``STATE`` and ``LEDGER_FORK`` (one of them was rolled back, or is another log's).
    """

    def __init__(
        self,
        signer: LogSigner,
        leaves: LeafStore,
        checkpoints: CheckpointStore,
        tiles: TileStore,
        *,
        clock: Callable[[], float] = time.time,
        read_only: bool = False,
    ) -> None:
        """``read_only``: look beside the coordinator that writes, and leave what it wrote last to it."""
        self._signer = signer
        self._leaves = leaves
        self._checkpoints = checkpoints
        self._tiles = tiles
        self._clock = clock
        self._writing = threading.Lock()  # held by whoever follows the stores
        self._state = threading.Lock()  # held for moments: edge, latest and witnessed change together
        self._reading = threading.Lock()  # the tree's, which is not safe to share
        self._witnessing = threading.Lock()
        self._steps: OrderedDict[tuple[int, int], tuple[bytes, ...]] = OrderedDict()
        self._failure: KeyquorumError | None = None
        self._edge = Edge(0, {})
        self._latest, self._witnessed = self._signed()
        with self._writing:
            self._take_up()
            self._check_tiles()
            if not read_only:
                with self._leaves.exclusive():
                    self._commit_rest()

    # -- what is stored -----------------------------------------------------------------------------------------------

    def _signed(self) -> tuple[SignedCheckpoint, SignedCheckpoint | None]:
        note, witnessed = self._checkpoints.read()
        return open_checkpoint(note, self.keys), open_checkpoint(witnessed, self.keys) if witnessed else None

    def _take_up(self) -> None:
        """Follow the stores to where they are. Under ``_writing``."""
        for _ in range(_ATTEMPTS):
            latest, witnessed = self._signed()
            stored = self._leaves.stored()
            try:
                check_sizes(latest.checkpoint.size, stored)
            except StateError:
                if self._signed()[0].checkpoint == latest.checkpoint:
                    raise
                continue  # another coordinator went on between the two looks
            edge = self._edge
            if edge.tiled != stored.tiled or edge.size > stored.head:
                edge = Edge(stored.tiled, stored.edge)
            leaves = self._leaves.leaves(edge.size, stored.head)
            if len(leaves) == stored.head - edge.size:
                break
        else:  # another coordinator seals tiles faster than this one can look
            raise _busy()
        with self._state:
            edge.extend(Addition(edge.range, leaves))
        try:
            tree = TileTree(edge.size, lambda tile: self._read_hashes(tile, edge))
            for signed in (self._latest, latest):
                check_root(signed, tree)
        except (RefusedError, MalformedError) as error:
            self._failure = error
            raise
        with self._state:
            self._edge, self._latest, self._witnessed = edge, latest, witnessed
        with self._reading:
            self._tree = TileTree(edge.size, self._read_hashes)

    def _check_tiles(self) -> None:
        """Tiles are written after the checkpoint that covers them: one past it was made by a log that went on."""
        size = self.latest.checkpoint.size
        following = Tile(0, size // TILE_WIDTH)
        if not self._tiles.holds(following):
            return
        self._take_up()  # another coordinator may have gone on this very moment
        if self.latest.checkpoint.size // TILE_WIDTH == following.index:
            raise StateError(
                Reason.STATE,
                "the ledger's database and its checkpoint were rolled back: the object store is ahead of them",
                expected=f"no tile past {size} leaves",
                actual=f"a full tile {following.path}",
                next_step="Restore the newest backup of both; serving these would fork the log",
            )

    # -- what it knows ------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> LogKeys:
        return self._signer.keys

    @property
    def latest(self) -> SignedCheckpoint:
        """The newest checkpoint, with the cosignatures it has so far."""
        with self._state:
            if self._witnessed is not None and self._witnessed.checkpoint == self._latest.checkpoint:
                return self._witnessed
            return self._latest

    @property
    def witnessed(self) -> SignedCheckpoint | None:
        """The newest checkpoint that :meth:`add_cosignatures` was given cosignatures for."""
        with self._state:
            return self._witnessed

    @property
    def unsealed(self) -> int:
        """Leaves that wait for their tiles."""
        with self._state:
            return self._edge.size - self._edge.tiled

    # -- writing ------------------------------------------------------------------------------------------------------

    def add(self, requests: Sequence[tuple[bytes, bytes]]) -> list[Entry | KeyquorumError]:
        """The entry of each (request id, leaf), all under one checkpoint that is durable and theirs; or why not:
        :class:`StateError` (``EXISTS``) for a request id that came with another leaf before.

        Raises :class:`UnavailableError` when the stores fail. Then it is not known whether the leaves were written;
        the same requests again find out, and write none twice.
        """
        if self._failure is not None:
            raise self._failure
        with self._writing, self._leaves.exclusive():
            for _ in range(_ATTEMPTS):
                size = self._latest.checkpoint.size
                try:
                    numbers = self._leaves.append(self._edge.size, size, requests)
                except MovedError:
                    self._take_up()
                    continue
                begin = self._edge.size
                new = {number: leaf for number, (_, leaf) in zip(numbers, requests, strict=True) if number >= begin}
                addition = Addition(self._edge.range, [new[number] for number in sorted(new)])
                if self._commit(addition):
                    return self._entries(requests, numbers, addition)
                self._take_up()
        raise _busy()

    def _commit(self, addition: Addition) -> bool:
        """Sign and store the checkpoint over ``addition``, whose leaves are durable; whether nobody came before."""
        old, size = self._latest, addition.range.end
        if size > old.checkpoint.size:
            signed = self._signer.sign(size, addition.range.root(), max(int(self._clock()), 1))
            if not self._checkpoints.swap(old.encode(), signed):
                return False
        else:
            signed = old
        with self._state:
            self._edge.extend(addition)
            self._latest = signed
        return True

    def _commit_rest(self) -> None:
        """Leaves that were written before a kill, and no checkpoint covers yet: they come into one now."""
        for _ in range(_ATTEMPTS):
            if self._commit(Addition(self._edge.range, [])):
                return
            self._take_up()
        raise _busy()

    def _entries(
        self, requests: Sequence[tuple[bytes, bytes]], numbers: Sequence[int], addition: Addition
    ) -> list[Entry | KeyquorumError]:
        signed, begin, size = self._latest, addition.start.end, addition.range.end
        node = reader_of(addition.nodes())
        if 0 < begin < size:
            self._keep((begin, size), consistency_proof(begin, size, node))
        out: list[Entry | KeyquorumError] = []
        for number, (_, leaf) in zip(numbers, requests, strict=True):
            value = merkle.leaf_hash(leaf)
            if number >= begin:
                known, proof = addition.hashes[number - begin], inclusion_proof(number, size, node)
            else:
                known, proof = self.leaf_hash(number), self.inclusion(number, size)
            if known != value:
                out.append(
                    StateError(
                        Reason.EXISTS,
                        "this request id was used for another leaf",
                        expected=f"the leaf at {number}, hash {known.hex()}",
                        actual=f"hash {value.hex()}",
                        next_step="Ask with a request id of its own for each leaf",
                    )
                )
            else:
                out.append(Entry(number, value, signed, proof))
        return out

    def add_cosignatures(self, checkpoint: SignedCheckpoint, signatures: Sequence[NoteSignature]) -> SignedCheckpoint:
        """Keep ``checkpoint`` with these lines, which the caller verified and found enough, as the latest witnessed
        one; further lines for the same one are added. Returns the latest witnessed one, which may be a newer one.

        Raises :class:`RefusedError` (``LEDGER_FORK``) for a checkpoint that is not this log's.
        """
        with self._witnessing:
            with self._reading:
                self._grow()
                check_root(checkpoint, self._tree)
            for _ in range(_ATTEMPTS):
                present = self.witnessed
                if present is not None and present.checkpoint.size > checkpoint.checkpoint.size:
                    return present
                same = present is not None and present.checkpoint == checkpoint.checkpoint
                new = checkpoint.with_signatures(*signatures)
                if same and present is not None:
                    # A note has room for so many: where they do not all fit, those that are new are enough.
                    with contextlib.suppress(MalformedError):
                        new = present.with_signatures(*signatures)
                if self._checkpoints.set_witnessed(b"" if present is None else present.encode(), new):
                    with self._state:
                        self._witnessed = new
                    return new
                _, witnessed = self._signed()
                with self._state:
                    self._witnessed = witnessed
        raise _busy()

    def follow(self) -> SignedCheckpoint:
        """Look whether another coordinator went on; the newest checkpoint there is."""
        with self._writing:
            if self._signed()[0].checkpoint != self._latest.checkpoint:
                self._take_up()
        return self.latest

    # -- sealing ------------------------------------------------------------------------------------------------------

    def seal(self) -> bool:
        """Write full tiles of what a checkpoint covers, and forget their leaves; whether there is more to do.

        Raises :class:`UnavailableError` when a store fails: everything stays where it is, and is served from there.
        """
        with self._state:
            edge, tiled, size = self._edge, self._edge.tiled, self._latest.checkpoint.size
            end = min(size // TILE_WIDTH * TILE_WIDTH, tiled + _SEALED_AT_ONCE * TILE_WIDTH)
            if end == tiled:
                return False
            full = [tile for tile in tiles_between(tiled, end) if tile.width == TILE_WIDTH]
            tiles: list[tuple[Tile | Bundle, bytes]] = [(tile, edge.tile(tile)) for tile in full]
            partial = edge.partial(end)
        try:
            self._tiles.write([(bundle, self._full_bundle(bundle, hashes)) for bundle, hashes in _bundles(tiles)])
            self._tiles.write(tiles)
            self._leaves.retire(tiled, end, partial)
        except MovedError:  # another coordinator did it
            with self._writing:
                self._take_up()
            return True
        with self._state:
            if self._edge is edge:
                edge.retire(end)
        return size - end >= TILE_WIDTH

    def _full_bundle(self, bundle: Bundle, hashes: Sequence[bytes]) -> bytes:
        first = bundle.index * TILE_WIDTH
        leaves = self._leaves.leaves(first, first + TILE_WIDTH)
        if len(leaves) != TILE_WIDTH:
            raise MovedError
        check_bundle(leaves, hashes, first)
        return encode_bundle(leaves)

    # -- reading ------------------------------------------------------------------------------------------------------

    def inclusion(self, index: int, size: int) -> tuple[bytes, ...]:
        """The inclusion proof of leaf ``index`` in the first ``size`` leaves. Raises :class:`MalformedError`."""
        with self._reading:
            self._grow()
            return self._tree.inclusion_proof(index, size)

    def kept_consistency(self, old: int, new: int) -> tuple[bytes, ...] | None:
        """The consistency proof where it needs no tile: between checkpoints that followed each other lately."""
        return () if old in (0, new) else self._steps.get((old, new))

    def consistency(self, old: int, new: int) -> tuple[bytes, ...]:
        """The consistency proof from ``old`` to ``new`` leaves. Raises :class:`MalformedError`."""
        with self._reading:
            self._grow()
            proof = self._tree.consistency_proof(old, new)
            self._keep((old, new), proof)
            return proof

    def tile(self, name: Tile | Bundle) -> bytes:
        """A tile or entry bundle, full or partial. Raises :class:`StateError` (``NOT_FOUND``) past the last leaf."""
        size = self.latest.checkpoint.size
        level = name.level if isinstance(name, Tile) else 0
        if name.index * TILE_WIDTH + name.width > size >> (8 * level):
            raise StateError(
                Reason.NOT_FOUND, "the log has no such tile", expected=f"one of {size} leaves", actual=name.path
            )
        return self._read_hashes(name) if isinstance(name, Tile) else self._read_bundle(name)

    def _read_hashes(self, tile: Tile, edge: Edge | None = None) -> bytes:
        with self._state:
            edge = edge or self._edge
            if edge.holds(tile):
                return edge.tile(tile)
        whole = decode_tile(self._tiles.read(Tile(tile.level, tile.index)), TILE_WIDTH)
        return b"".join(whole[: tile.width])

    def _read_bundle(self, bundle: Bundle) -> bytes:
        first = bundle.index * TILE_WIDTH
        with self._state:
            sealed = first < self._edge.tiled
        if not sealed:
            leaves = self._leaves.leaves(first, first + bundle.width)
            if len(leaves) == bundle.width:
                return encode_bundle(leaves)
        whole = self._tiles.read(Bundle(bundle.index))
        return whole if bundle.width == TILE_WIDTH else encode_bundle(decode_bundle(whole, TILE_WIDTH)[: bundle.width])

    def leaf_hash(self, index: int) -> bytes:
        """Of leaf ``index``. Raises :class:`MalformedError` past the last one."""
        with self._reading:
            self._grow()
            return self._tree.node(0, index)

    def root(self, size: int) -> bytes:
        """Of the first ``size`` leaves. Raises :class:`MalformedError` for more than there are."""
        with self._reading:
            self._grow()
            return self._tree.root(size)

    def _grow(self) -> None:
        """Under ``_reading``."""
        with self._state:
            size = self._edge.size
        if size > self._tree.size:
            self._tree.grow(size)

    def _keep(self, sizes: tuple[int, int], proof: tuple[bytes, ...]) -> None:
        with self._state:
            self._steps[sizes] = proof
            while len(self._steps) > _KEPT_PROOFS:
                self._steps.popitem(last=False)

    def close(self) -> None:
        self._leaves.close()
        self._checkpoints.close()


def _bundles(tiles: Sequence[tuple[Tile | Bundle, bytes]]) -> list[tuple[Bundle, tuple[bytes, ...]]]:
    """The bundle beside each tile of level 0, and the hashes of its leaves."""
    return [
        (Bundle(name.index), decode_tile(data, TILE_WIDTH))
        for name, data in tiles
        if isinstance(name, Tile) and name.level == 0
    ]


def check_sizes(size: int, stored: Stored) -> None:
    """Raises :class:`StateError` when one of the two stores is older than the other knows."""
    if stored.head < size:
        raise StateError(
            Reason.STATE,
            "the ledger's database was rolled back: its latest checkpoint covers more leaves",
            expected=f"at least {size} leaves",
            actual=f"{stored.head} leaves",
            next_step="Restore the database's newest backup; serving this one would fork the log",
        )
    known = max(stored.checkpointed, stored.tiled)
    if size < known:
        raise StateError(
            Reason.STATE,
            "the ledger's checkpoint store was rolled back: its database knows of a later checkpoint",
            expected=f"a checkpoint of at least {known} leaves",
            actual=f"one of {size} leaves",
            next_step="Restore the newest backup of ledger_checkpoint; serving this one would fork the log",
        )


def check_root(signed: SignedCheckpoint, tree: TileTree) -> None:
    """Raises :class:`RefusedError` (``LEDGER_FORK``) unless the tree is the one that was signed."""
    size = signed.checkpoint.size
    root = tree.root(size) if size <= tree.size else b""
    if root != signed.checkpoint.root:
        raise RefusedError(
            Reason.LEDGER_FORK,
            "the log is not the one of a checkpoint that it signed",
            expected=f"root {signed.checkpoint.root.hex()} at {size} leaves",
            actual=f"root {root.hex()}" if root else f"{tree.size} leaves",
            next_step="Restore the newest backup of the ledger's database, its checkpoint and its object store",
        )


def _busy() -> UnavailableError:
    return UnavailableError(
        Reason.UNAVAILABLE,
        "other coordinators write to the ledger faster than this one can follow",
        next_step="Ask again with the same request id",
    )
