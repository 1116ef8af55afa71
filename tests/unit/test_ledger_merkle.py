"""RFC 6962 trees: proofs verify exactly when a tree built naively says so, and every change to one is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.ledger.compact import CompactRange
from keyquorum_core.ledger.merkle import (
    EMPTY_ROOT,
    MAX_PROOF,
    MAX_SIZE,
    consistency_length,
    inclusion_length,
    leaf_hash,
    node_hash,
    verify_consistency,
    verify_inclusion,
)

# The leaves and roots that Certificate Transparency implementations have tested against since the first of them.
CT_LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
CT_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]

Proof = list[bytes]
LEAVES = [leaf_hash(b"leaf %d" % number) for number in range(70)]


def split(count: int) -> int:
    """The largest power of two smaller than ``count``."""
    return 1 << ((count - 1).bit_length() - 1)


def naive_root(leaves: Sequence[bytes]) -> bytes:
    """RFC 6962 §2.1, as written."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = split(len(leaves))
    return node_hash(naive_root(leaves[:k]), naive_root(leaves[k:]))


def naive_inclusion(index: int, leaves: Sequence[bytes]) -> Proof:
    """RFC 6962 §2.1.1, as written."""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if index < k:
        return [*naive_inclusion(index, leaves[:k]), naive_root(leaves[k:])]
    return [*naive_inclusion(index - k, leaves[k:]), naive_root(leaves[:k])]


def naive_consistency(size: int, leaves: Sequence[bytes], whole: bool = True) -> Proof:
    """RFC 6962 §2.1.2, as written."""
    if size == len(leaves):
        return [] if whole else [naive_root(leaves)]
    k = split(len(leaves))
    if size <= k:
        return [*naive_consistency(size, leaves[:k], whole), naive_root(leaves[k:])]
    return [*naive_consistency(size - k, leaves[k:], False), naive_root(leaves[:k])]


ROOTS = [naive_root(LEAVES[:size]) for size in range(len(LEAVES) + 1)]


def directions(index: int, size: int) -> list[bool]:
    """For each hash of an inclusion proof, whether it stands left of the path."""
    if size == 1:
        return []
    k = split(size)
    return [*directions(index, k), False] if index < k else [*directions(index - k, size - k), True]


def holds(check: object, *arguments: object) -> bool:
    assert callable(check)
    try:
        assert check(*arguments) is None
    except KeyquorumError as refusal:
        if refusal.reason in (Reason.LEDGER_PROOF, Reason.LEDGER_FORK):
            return False
        raise
    return True


def mutations(proof: Proof) -> list[Proof]:
    """Proofs of other lengths, with one bit changed, and with two hashes swapped."""
    other = hashlib.sha256(b"other").digest()
    out = [[*proof, other], [other, *proof], [*proof, *proof[-1:], other]]
    for at in range(len(proof)):
        flipped = bytes([proof[at][0] ^ 1]) + proof[at][1:]
        out.append([*proof[:at], flipped, *proof[at + 1 :]])
        out.append(proof[:at] + proof[at + 1 :])
        out.append([*proof[:at], proof[at], *proof[at:]])
        out.append([*proof[:at], proof[at][:-1], *proof[at + 1 :]])
        if at and proof[at - 1] != proof[at]:
            out.append([*proof[: at - 1], proof[at], proof[at - 1], *proof[at + 1 :]])
    return out


def test_known_roots() -> None:
    leaves = [leaf_hash(bytes.fromhex(leaf)) for leaf in CT_LEAVES]
    grown = CompactRange()
    for size, root in enumerate(CT_ROOTS):
        assert naive_root(leaves[:size]).hex() == root
        assert grown.root().hex() == root
        if size < len(leaves):
            grown.append(leaves[size])


def test_hashes_are_domain_separated() -> None:
    assert leaf_hash(b"x") == hashlib.sha256(b"\0x").digest()
    assert node_hash(b"a" * 32, b"b" * 32) == hashlib.sha256(b"\1" + b"a" * 32 + b"b" * 32).digest()
    assert hashlib.sha256(b"").digest() == EMPTY_ROOT


def test_every_inclusion_proof_up_to_size_70_verifies() -> None:
    for size in range(1, len(LEAVES) + 1):
        for index in range(size):
            proof = naive_inclusion(index, LEAVES[:size])
            assert len(proof) == inclusion_length(index, size)
            verify_inclusion(LEAVES[index], index, size, proof, ROOTS[size])


def test_every_consistency_proof_up_to_size_70_verifies() -> None:
    for size2 in range(1, len(LEAVES) + 1):
        verify_consistency(0, EMPTY_ROOT, size2, ROOTS[size2], [])
        for size1 in range(1, size2 + 1):
            proof = naive_consistency(size1, LEAVES[:size2])
            assert len(proof) == consistency_length(size1, size2)
            verify_consistency(size1, ROOTS[size1], size2, ROOTS[size2], proof)


@pytest.mark.parametrize("size", range(1, 18))
def test_every_change_to_an_inclusion_proof_is_refused(size: int) -> None:
    for index in range(size):
        leaf, proof, root = LEAVES[index], naive_inclusion(index, LEAVES[:size]), ROOTS[size]
        for changed in mutations(proof):
            assert not holds(verify_inclusion, leaf, index, size, changed, root)
        for other in range(-1, size + 2):
            assert holds(verify_inclusion, leaf, other, size, proof, root) == (other == index)
            if 0 <= other < size and other != index:
                assert not holds(verify_inclusion, LEAVES[other], index, size, proof, root)
        for other in range(24):
            assert holds(verify_inclusion, leaf, index, size, proof, ROOTS[other]) == (other == size)
            # A proof does not name the tree's size: sizes under which it takes the same turns are told apart only by
            # the checkpoint that signs size and root together.
            same = index < other and directions(index, other) == directions(index, size)
            assert holds(verify_inclusion, leaf, index, other, proof, root) == same
        assert not holds(verify_inclusion, leaf[:-1], index, size, proof, root)
        assert not holds(verify_inclusion, leaf, index, size, proof, root + b"\0")


@pytest.mark.parametrize("size2", range(1, 18))
def test_every_change_to_a_consistency_proof_is_refused(size2: int) -> None:
    for size1 in range(1, size2):
        root1, root2 = ROOTS[size1], ROOTS[size2]
        proof = naive_consistency(size1, LEAVES[:size2])
        for changed in mutations(proof):
            assert not holds(verify_consistency, size1, root1, size2, root2, changed)
        for other in range(20):
            assert holds(verify_consistency, size1, ROOTS[other], size2, root2, proof) == (other == size1)
            assert holds(verify_consistency, size1, root1, size2, ROOTS[other], proof) == (other == size2)
            assert holds(verify_consistency, other, root1, size2, root2, proof) == (other == size1)
        assert not holds(verify_consistency, size2, root2, size1, root1, proof)
        assert not holds(verify_consistency, size1, root1[1:], size2, root2, proof)
        assert not holds(verify_consistency, size1, root1, size2, root2[1:], proof)


def test_a_leaf_outside_the_tree_is_malformed() -> None:
    for index, size in ((0, 0), (1, 1), (-1, 1), (5, 4), (0, -1), (0, MAX_SIZE + 1)):
        with pytest.raises(MalformedError) as caught:
            verify_inclusion(LEAVES[0], index, size, [], ROOTS[1])
        assert caught.value.reason is Reason.LEDGER_PROOF


def test_consistency_from_nothing_and_to_itself_takes_no_proof() -> None:
    verify_consistency(0, EMPTY_ROOT, 0, EMPTY_ROOT, [])
    verify_consistency(5, ROOTS[5], 5, ROOTS[5], [])
    for arguments in (
        (0, EMPTY_ROOT, 5, ROOTS[5], [LEAVES[0]]),
        (5, ROOTS[5], 5, ROOTS[5], [LEAVES[0]]),
        (0, ROOTS[1], 5, ROOTS[5], []),
        (0, EMPTY_ROOT, 0, ROOTS[1], []),
        (-1, EMPTY_ROOT, 5, ROOTS[5], []),
        (1, ROOTS[1], MAX_SIZE + 1, ROOTS[5], []),
    ):
        assert not holds(verify_consistency, *arguments)


def test_two_roots_of_one_size_are_a_fork() -> None:
    with pytest.raises(RefusedError) as caught:
        verify_consistency(5, ROOTS[5], 5, ROOTS[6], [])
    assert caught.value.reason is Reason.LEDGER_FORK


def test_a_forked_tree_has_no_consistency_proof() -> None:
    forked = [*LEAVES[:3], leaf_hash(b"another"), *LEAVES[4:9]]
    for proof in (naive_consistency(5, LEAVES[:9]), naive_consistency(5, forked)):
        with pytest.raises(RefusedError) as caught:
            verify_consistency(5, ROOTS[5], 9, naive_root(forked), proof)
        assert caught.value.reason is Reason.LEDGER_PROOF


def test_the_longest_proofs_are_bounded() -> None:
    assert inclusion_length(0, MAX_SIZE) == MAX_PROOF
    assert max(inclusion_length(i, 10_000_000) for i in range(0, 10_000_000, 9973)) == 24
    assert consistency_length(9_999_999, 10_000_000) <= 25


@given(st.integers(0, MAX_SIZE), st.integers(0, MAX_SIZE), st.lists(st.binary(max_size=40), max_size=70))
@settings(max_examples=80, deadline=None)
def test_any_proof_of_any_tree_ends_in_an_answer(first: int, second: int, proof: Proof) -> None:
    assert not holds(verify_inclusion, LEAVES[0], first, second, proof, ROOTS[7])
    if (first, second) != (0, 0) and first:
        assert not holds(verify_consistency, first, ROOTS[7], second, ROOTS[8], proof)
    length = inclusion_length(first, second) if first < second else 0
    assert not holds(verify_inclusion, LEAVES[0], first, second, [LEAVES[1]] * length, ROOTS[7])
    length = consistency_length(first, second) if 0 < first < second else 0
    assert not holds(verify_consistency, first, ROOTS[7], second, ROOTS[8], [LEAVES[1]] * length)
