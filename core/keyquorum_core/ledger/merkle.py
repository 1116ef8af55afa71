"""RFC 6962 Merkle trees over SHA-256: the hashes, and the verification of proofs.

A leaf hashes to SHA-256(0x00 ‖ data), a node to SHA-256(0x01 ‖ left ‖ right), the empty tree to SHA-256 of nothing
(§2.1). A verifier returns nothing when the proof holds and raises otherwise, so that no caller can forget to look at a
result. It takes exactly the number of hashes that the sizes call for: no proof has two spellings.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = [
    "EMPTY_ROOT",
    "HASH_SIZE",
    "MAX_PROOF",
    "MAX_SIZE",
    "check_hash",
    "consistency_length",
    "inclusion_length",
    "leaf_hash",
    "node_hash",
    "verify_consistency",
    "verify_inclusion",
]

HASH_SIZE: Final = 32
MAX_SIZE: Final = 2**63 - 1
"""Leaves in the largest tree: what a C2SP checkpoint, timestamp and a signed 64-bit integer can count."""
MAX_PROOF: Final = 63
"""Hashes in the longest inclusion proof, and the most that C2SP tlog-witness lets a consistency proof have."""
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()

_sha256 = hashlib.sha256


def leaf_hash(data: bytes) -> bytes:
    """SHA-256(0x00 ‖ data), 32 bytes."""
    return _sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 ‖ left ‖ right), 32 bytes."""
    return _sha256(b"\x01" + left + right).digest()


def check_hash(value: bytes, what: str) -> None:
    """Raise :class:`MalformedError` (``LEDGER_PROOF``) unless ``value`` is 32 bytes."""
    if len(value) != HASH_SIZE:
        raise MalformedError(
            Reason.LEDGER_PROOF, f"{what} is not a hash", expected=f"{HASH_SIZE} bytes", actual=f"{len(value)} bytes"
        )


def inclusion_length(index: int, size: int) -> int:
    """Hashes in the inclusion proof of leaf ``index`` in a tree of ``size``, for 0 ≤ index < size.

    Below the level where the leaf's path joins that of the last leaf, every node has a sibling; above it, only right
    children do.
    """
    inner = (index ^ (size - 1)).bit_length()
    return inner + (index >> inner).bit_count()


def consistency_length(size1: int, size2: int) -> int:
    """Hashes in the consistency proof from ``size1`` to ``size2``, for 0 ≤ size1 ≤ size2."""
    if size1 in (0, size2):
        return 0
    node, last = _last_subtree(size1, size2)
    return (node != 0) + inclusion_length(node, last + 1)


def _last_subtree(size1: int, size2: int) -> tuple[int, int]:
    """The index of the rightmost perfect subtree of the old tree, and of the new tree's last node on that level."""
    level = (size1 & -size1).bit_length() - 1
    return (size1 - 1) >> level, (size2 - 1) >> level


def _check_proof(proof: Sequence[bytes], length: int, what: str) -> None:
    if len(proof) != length:
        raise MalformedError(
            Reason.LEDGER_PROOF,
            f"{what} has the wrong length",
            expected=f"{length} hashes",
            actual=f"{len(proof)} hashes",
        )
    for value in proof:
        check_hash(value, f"an element of {what}")


def _check_sizes(size1: int, size2: int) -> None:
    if not 0 <= size1 <= size2 <= MAX_SIZE:
        raise MalformedError(
            Reason.LEDGER_PROOF,
            "no proof can lead between these tree sizes",
            expected=f"0 ≤ first ≤ second ≤ {MAX_SIZE}",
            actual=f"{size1} and {size2}",
        )


def verify_inclusion(leaf_hash: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Whether the tree of ``size`` leaves under ``root`` has ``leaf_hash`` at ``index`` (RFC 6962 §2.1.1).

    ``proof`` runs from the leaf's sibling upwards, 32 bytes each. Returns nothing. Raises :class:`MalformedError`
    (``LEDGER_PROOF``) for an index outside the tree, a proof of the wrong length, or a value that is no hash; and
    :class:`RefusedError` (``LEDGER_PROOF``) when the proof leads to another root.
    """
    if not 0 <= index < size <= MAX_SIZE:
        raise MalformedError(
            Reason.LEDGER_PROOF,
            "a leaf index outside the tree",
            expected=f"0 ≤ index < size ≤ {MAX_SIZE}",
            actual=f"index {index}, size {size}",
        )
    check_hash(leaf_hash, "the leaf hash")
    check_hash(root, "the root")
    _check_proof(proof, inclusion_length(index, size), f"the inclusion proof of leaf {index} in {size}")
    node, last, value = index, size - 1, leaf_hash
    for sibling in proof:
        # The last node of a level has no sibling on it unless it is a right child: it moves up as it is.
        while node == last and not node & 1:
            node, last = node >> 1, last >> 1
        value = node_hash(sibling, value) if node & 1 else node_hash(value, sibling)
        node, last = node >> 1, last >> 1
    if not hmac.compare_digest(value, root):
        raise RefusedError(
            Reason.LEDGER_PROOF,
            f"leaf {index} is not shown to be in the tree of {size}",
            expected=f"root {root.hex()}",
            actual=f"root {value.hex()}",
        )


def verify_consistency(size1: int, root1: bytes, size2: int, root2: bytes, proof: Sequence[bytes]) -> None:
    """Whether the tree (``size2``, ``root2``) extends the tree (``size1``, ``root1``) (RFC 6962 §2.1.2).

    The proof is empty between equal sizes and from the empty tree, whose root must be that of no leaves. Returns
    nothing. Raises :class:`MalformedError` (``LEDGER_PROOF``) for sizes that decrease, a proof of the wrong length, or
    a value that is no hash; :class:`RefusedError` with ``LEDGER_FORK`` for two roots of one size, and with
    ``LEDGER_PROOF`` when the proof leads to other roots.
    """
    _check_sizes(size1, size2)
    check_hash(root1, "the first root")
    check_hash(root2, "the second root")
    _check_proof(proof, consistency_length(size1, size2), f"the consistency proof from {size1} to {size2}")
    for size, root in ((size1, root1), (size2, root2)):
        if size == 0 and not hmac.compare_digest(root, EMPTY_ROOT):
            raise RefusedError(
                Reason.LEDGER_PROOF,
                "a tree of no leaves with another root than the empty one",
                expected=EMPTY_ROOT.hex(),
                actual=root.hex(),
            )
    if size1 == size2:
        if not hmac.compare_digest(root1, root2):
            raise RefusedError(
                Reason.LEDGER_FORK, f"two trees of size {size1}", expected=root1.hex(), actual=root2.hex()
            )
        return
    if size1 == 0:
        return
    node, last = _last_subtree(size1, size2)
    rest = iter(proof)
    # A perfect old tree is itself the first subtree, and its root is not repeated in the proof.
    old = new = next(rest) if node else root1
    for sibling in rest:
        while node == last and not node & 1:
            node, last = node >> 1, last >> 1
        if node & 1:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
        else:
            new = node_hash(new, sibling)
        node, last = node >> 1, last >> 1
    for size, root, value in ((size1, root1, old), (size2, root2, new)):
        if not hmac.compare_digest(value, root):
            raise RefusedError(
                Reason.LEDGER_PROOF,
                f"the tree of {size2} is not shown to extend the tree of {size1}",
                expected=f"root {root.hex()} at {size}",
                actual=f"root {value.hex()}",
            )
