"""A log in memory, with its witnesses: the real signatures and proofs, without a coordinator around them.

A malicious one is made by :meth:`MemoryLog.fork`: the same keys, another history from some size on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from keyquorum_core.ledger.compact import CompactRange
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogSigner, SignedCheckpoint
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.ledger.proofs import consistency_proof, inclusion_proof, reader_of, tree_root
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_custodian.witness import CheckpointUpdate, Inclusion, Witness
from keyquorum_protos.v1 import custodian_pb2 as pb

__all__ = ["MemoryLog", "update_message"]


class MemoryLog:
    """``clock`` gives unix seconds; ``witnesses`` are those whose cosignatures :meth:`cosigned` collects."""

    def __init__(self, signer: LogSigner, clock: Callable[[], float], witnesses: Mapping[str, Cosigner] = {}) -> None:
        self.signer = signer
        self.clock = clock
        self.witnesses = dict(witnesses)
        self._range = CompactRange()
        self._nodes: dict[tuple[int, int], bytes] = {}
        self._leaves: list[bytes] = []

    @property
    def size(self) -> int:
        return self._range.end

    def append(self, leaf: bytes) -> Inclusion:
        """Where the leaf is, in the tree that ends with it."""
        self._leaves.append(leaf)
        self._range.append(leaf_hash(leaf), lambda level, index, value: self._nodes.update({(level, index): value}))
        return self.inclusion(self.size - 1)

    def fill(self, count: int) -> None:
        for number in range(count):
            self.append(b"filler %d" % number)

    def inclusion(self, index: int, size: int = 0) -> Inclusion:
        size = size or self.size
        return Inclusion(index, size, inclusion_proof(index, size, reader_of(self._nodes)))

    def consistency(self, old: int, new: int = -1) -> tuple[bytes, ...]:
        return consistency_proof(old, self.size if new < 0 else new, reader_of(self._nodes))

    def root(self, size: int = -1) -> bytes:
        return tree_root(self.size if size < 0 else size, reader_of(self._nodes))

    def checkpoint(self, size: int = -1) -> SignedCheckpoint:
        """Signed by the log alone."""
        size = self.size if size < 0 else size
        return self.signer.sign(size, self.root(size), int(self.clock()))

    def cosigned(self, size: int = -1, by: Iterable[str] | None = None, at: int = 0) -> SignedCheckpoint:
        """Cosigned by all its witnesses, or by those named."""
        signed = self.checkpoint(size)
        names = self.witnesses if by is None else by
        for name in names:
            signed = signed.with_signatures(*self.witnesses[name].cosign(signed.checkpoint, at or int(self.clock())))
        return signed

    def update(self, old: int, *, size: int = -1, cosigned: SignedCheckpoint | None = None) -> CheckpointUpdate:
        """What an honest coordinator sends to a custodian that is at ``old``."""
        size = self.size if size < 0 else size
        checkpoint = self.checkpoint(size).encode()
        if cosigned is None:
            return CheckpointUpdate(old, self.consistency(old, size), checkpoint)
        proof = self.consistency(cosigned.checkpoint.size, size)
        return CheckpointUpdate(old, self.consistency(old, size), checkpoint, cosigned.encode(), proof)

    def bring(self, *witnesses: Witness) -> None:
        """Have custodians see the newest checkpoint, and then that all witnesses cosigned it."""
        for witness in witnesses:
            witness.update(self.update(witness.size))
        cosigned = self.cosigned()
        for witness in witnesses:
            witness.update(self.update(witness.size, cosigned=cosigned))

    def shown(self, leaf: bytes, *, cosigned: bool = False) -> bytes:
        """A C2SP tlog-proof of a leaf that is here already, or else is entered now."""
        index = self._leaves.index(leaf) if leaf in self._leaves else self.append(leaf).index
        place = self.inclusion(index)
        checkpoint = self.cosigned() if cosigned else self.checkpoint()
        return TlogProof(index, place.proof, checkpoint.encode()).encode()

    def fork(self, size: int) -> MemoryLog:
        """Another log under the same keys that shares the first ``size`` leaves."""
        twin = MemoryLog(self.signer, self.clock, self.witnesses)
        for leaf in self._leaves[:size]:
            twin.append(leaf)
        twin.append(b"only in the fork")
        return twin


def update_message(update: CheckpointUpdate) -> pb.CheckpointUpdate:
    return pb.CheckpointUpdate(
        checkpoint=update.checkpoint,
        old_size=update.old_size,
        consistency_proof=update.proof,
        cosigned=update.cosigned,
        cosigned_proof=update.cosigned_proof,
    )
