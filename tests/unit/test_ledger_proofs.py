"""Compact ranges and tiles give the tree's own roots and proofs, whatever way they were put together."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, StateError, UnavailableError
from keyquorum_core.ledger.compact import CompactRange, decompose
from keyquorum_core.ledger.merkle import (
    EMPTY_ROOT,
    MAX_SIZE,
    leaf_hash,
    node_hash,
    verify_consistency,
    verify_inclusion,
)
from keyquorum_core.ledger.proofs import (
    consistency_proof,
    inclusion_proof,
    ranges_consistency_proof,
    ranges_inclusion_proof,
    reader_of,
    tree_root,
)
from keyquorum_core.ledger.tile_tree import TileTree
from keyquorum_core.ledger.tiles import Tile, encode_tile, hash_tile, tiles_between

LEAVES = [leaf_hash(b"leaf %d" % number) for number in range(70_000)]


@cache
def perfect(level: int, index: int) -> bytes:
    """The perfect subtree, from its leaves, by recursion."""
    if level == 0:
        return LEAVES[index]
    return node_hash(perfect(level - 1, 2 * index), perfect(level - 1, 2 * index + 1))


def naive_root(begin: int, end: int) -> bytes:
    """RFC 6962 §2.1 over leaves [begin, end)."""
    if begin == end:
        return EMPTY_ROOT
    if end - begin == 1:
        return LEAVES[begin]
    k = 1 << ((end - begin - 1).bit_length() - 1)
    return node_hash(naive_root(begin, begin + k), naive_root(begin + k, end))


def grown(begin: int, end: int) -> CompactRange:
    out = CompactRange(begin)
    for leaf in LEAVES[begin:end]:
        out.append(leaf)
    return out


class Store:
    """A log's tiles in memory, written as the log grows; counts what is read."""

    def __init__(self) -> None:
        self.tiles: dict[str, bytes] = {}
        self.reads = 0

    def grow(self, old: int, new: int) -> None:
        for tile in tiles_between(old, new):
            start = tile.index * 256
            hashes = [perfect(8 * tile.level, n) for n in range(start, start + tile.width)]
            self.tiles[tile.path] = encode_tile(hashes)

    def read(self, tile: Tile) -> bytes:
        self.reads += 1
        try:
            return self.tiles[tile.path]
        except KeyError:
            raise UnavailableError(Reason.NOT_FOUND, f"no {tile.path}") from None


@pytest.fixture(scope="module")
def store() -> Store:
    out = Store()
    out.grow(0, 70_000)
    return out


# Compact ranges


@pytest.mark.parametrize("begin", range(18))
def test_a_range_holds_the_subtrees_of_its_decomposition(begin: int) -> None:
    for end in range(begin, 40):
        nodes = grown(begin, end).nodes()
        assert nodes == {(level, index): perfect(level, index) for level, index in decompose(begin, end)}
        assert sum(1 << level for level, _ in nodes) == end - begin


def test_roots_of_every_size_up_to_300() -> None:
    tree = CompactRange()
    for size in range(300):
        assert tree.root() == naive_root(0, size)
        assert tree.end == size
        assert len(tree.hashes) == size.bit_count()
        tree.append(LEAVES[size])


@given(st.lists(st.integers(0, 400), min_size=3, max_size=3).map(sorted))
@settings(max_examples=60, deadline=None)
def test_ranges_that_touch_merge_into_the_same_as_appending(points: list[int]) -> None:
    begin, middle, end = points
    merged, following = grown(begin, middle), grown(middle, end)
    merged.merge(following)
    assert merged == grown(begin, end)
    assert following == grown(middle, end)
    again = CompactRange.restore(begin, end, merged.hashes)
    assert again == merged
    again.append(LEAVES[end])
    assert again == grown(begin, end + 1) != merged


def test_ranges_that_do_not_touch_do_not_merge() -> None:
    tree = grown(0, 5)
    for begin, end in ((4, 6), (6, 8), (0, 5)):
        with pytest.raises(StateError):
            tree.merge(grown(begin, end))
    assert tree == grown(0, 5)


def test_a_copy_grows_by_itself() -> None:
    tree = grown(0, 5)
    other = tree.copy()
    other.append(LEAVES[5])
    assert (tree.end, other.end) == (5, 6)
    assert tree.root() == naive_root(0, 5)


def test_only_a_range_from_the_first_leaf_has_a_root() -> None:
    with pytest.raises(StateError):
        grown(1, 4).root()


@pytest.mark.parametrize(
    ("begin", "end", "count", "size"),
    [(0, 5, 1, 32), (0, 5, 3, 32), (0, 4, 0, 32), (0, 0, 1, 32), (5, 4, 0, 32), (0, 1, 1, 31), (-1, 1, 1, 32)],
)
def test_a_range_is_restored_only_from_as_many_hashes_as_it_has(begin: int, end: int, count: int, size: int) -> None:
    with pytest.raises(MalformedError):
        CompactRange.restore(begin, end, [b"\0" * size] * count)


def test_a_range_refuses_what_is_no_hash_and_a_full_tree() -> None:
    with pytest.raises(MalformedError):
        CompactRange().append(b"short")
    with pytest.raises(MalformedError):
        CompactRange(MAX_SIZE).append(LEAVES[0])


def test_a_visitor_sees_every_completed_subtree_once() -> None:
    seen: dict[tuple[int, int], bytes] = {}

    def visit(level: int, index: int, value: bytes) -> None:
        assert (level, index) not in seen
        seen[level, index] = value

    tree = CompactRange()
    for leaf in LEAVES[:100]:
        tree.append(leaf, visit)
    assert seen == {(k, i): perfect(k, i) for k in range(7) for i in range(100 >> k)}


# Proofs


def test_proofs_between_ranges_are_those_of_the_tree() -> None:
    for size in range(1, 36):
        root = naive_root(0, size)
        for at in range(size):
            proof = ranges_inclusion_proof(grown(0, at), grown(at + 1, size))
            assert proof == inclusion_proof(at, size, perfect)
            verify_inclusion(LEAVES[at], at, size, proof, root)
        for at in range(size + 1):
            proof = ranges_consistency_proof(grown(0, at), grown(at, size))
            assert proof == consistency_proof(at, size, perfect)
            verify_consistency(at, naive_root(0, at), size, root, proof)


def test_the_last_leaf_is_proven_from_what_appending_holds() -> None:
    tree = CompactRange()
    for at, leaf in enumerate(LEAVES[:70]):
        proof = ranges_inclusion_proof(tree, CompactRange(at + 1))
        tree.append(leaf)
        verify_inclusion(leaf, at, tree.end, proof, tree.root())


def test_ranges_that_are_not_around_one_leaf_prove_nothing() -> None:
    for before, after in (((0, 3), (3, 8)), ((0, 3), (5, 8)), ((1, 3), (4, 8))):
        with pytest.raises(MalformedError):
            ranges_inclusion_proof(grown(*before), grown(*after))
    for old, added in (((0, 3), (4, 8)), ((1, 3), (3, 8))):
        with pytest.raises(MalformedError):
            ranges_consistency_proof(grown(*old), grown(*added))


def test_a_missing_subtree_is_not_a_proof() -> None:
    with pytest.raises(UnavailableError):
        inclusion_proof(3, 8, reader_of(grown(0, 3).nodes()))


@pytest.mark.parametrize(("first", "second"), [(8, 8), (9, 8), (-1, 8), (0, 0), (0, MAX_SIZE + 1)])
def test_no_inclusion_proof_outside_the_tree(first: int, second: int) -> None:
    with pytest.raises(MalformedError):
        inclusion_proof(first, second, perfect)


@pytest.mark.parametrize(("first", "second"), [(9, 8), (-1, 8), (0, MAX_SIZE + 1)])
def test_no_consistency_proof_between_impossible_sizes(first: int, second: int) -> None:
    with pytest.raises(MalformedError):
        consistency_proof(first, second, perfect)


def test_proofs_stay_logarithmic_in_ten_million_leaves() -> None:
    """Every leaf alike, so that the subtree of each level has one hash and the tree needs no building."""
    same = [LEAVES[0]]
    while len(same) < 25:
        same.append(node_hash(same[-1], same[-1]))
    size, asked = 10_000_000, []

    def node(level: int, index: int) -> bytes:
        assert (index + 1) << level <= size
        asked.append((level, index))
        return same[level]

    root = tree_root(size, node)
    for index in (0, 1, 4_999_999, 8_388_607, 8_388_608, 9_999_998, 9_999_999):
        asked.clear()
        proof = inclusion_proof(index, size, node)
        assert len(proof) <= 24
        assert len(asked) <= 48
        verify_inclusion(LEAVES[0], index, size, proof, root)
    for old in (1, 255, 65_536, 8_388_608, 9_999_999):
        asked.clear()
        proof = consistency_proof(old, size, node)
        assert len(proof) <= 25
        assert len(asked) <= 48
        verify_consistency(old, tree_root(old, node), size, root, proof)


# Tiles


@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 257, 511, 512, 700])
def test_a_tree_of_tiles_has_the_same_roots_and_proofs(size: int) -> None:
    store = Store()
    store.grow(0, size)
    tree = TileTree(size, store.read)
    assert tree.root() == naive_root(0, size)
    for at in {*range(0, size, 37), size - 1} if size else set():
        assert tree.inclusion_proof(at) == inclusion_proof(at, size, perfect)
        assert tree.consistency_proof(at) == consistency_proof(at, size, perfect)
        assert tree.root(at) == naive_root(0, at)


def test_three_levels_of_tiles(store: Store) -> None:
    tree = TileTree(70_000, store.read)
    root = tree.root()
    assert root == naive_root(0, 70_000)
    for index in (0, 255, 256, 65_535, 65_536, 69_887, 69_888, 69_999):
        verify_inclusion(LEAVES[index], index, 70_000, tree.inclusion_proof(index), root)
    for old in (1, 256, 65_535, 65_536, 69_999):
        verify_consistency(old, naive_root(0, old), 70_000, root, tree.consistency_proof(old))


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_earlier_tree_is_provable_from_later_tiles(store: Store, data: st.DataObject) -> None:
    tree = TileTree(70_000, store.read)
    size = data.draw(st.integers(1, 70_000))
    index = data.draw(st.integers(0, size - 1))
    old = data.draw(st.integers(0, size))
    root = naive_root(0, size)
    verify_inclusion(LEAVES[index], index, size, tree.inclusion_proof(index, size), root)
    verify_consistency(old, naive_root(0, old), size, root, tree.consistency_proof(old, size))


def test_a_proof_reads_few_tiles_and_keeps_fewer(store: Store) -> None:
    tree = TileTree(70_000, store.read, tiles_kept=2)
    store.reads = 0
    tree.inclusion_proof(40_000)
    assert store.reads <= 6
    for index in range(0, 70_000, 999):
        tree.inclusion_proof(index)
        assert len(tree._kept) <= 2
    held = TileTree(70_000, store.read)
    held.inclusion_proof(40_000)
    store.reads = 0
    held.inclusion_proof(40_001)
    assert store.reads == 0


def test_a_partial_tile_in_another_width_is_refused(store: Store) -> None:
    partial = store.read(Tile(0, 273, 112))
    for data in (partial[:-32], partial + partial[:32], partial[:-1], b""):
        with pytest.raises(MalformedError):
            TileTree(70_000, lambda tile, data=data: data if tile.index == 273 else store.read(tile)).root()  # type: ignore[misc]


def test_exchanged_tiles_give_no_proof_of_the_tree(store: Store) -> None:
    root = naive_root(0, 70_000)

    def swapped(tile: Tile) -> bytes:
        return store.read(Tile(0, 4) if tile == Tile(0, 3) else tile)

    proof = TileTree(70_000, swapped).inclusion_proof(800)
    with pytest.raises(KeyquorumError) as caught:
        verify_inclusion(LEAVES[800], 800, 70_000, proof, root)
    assert caught.value.reason is Reason.LEDGER_PROOF


def test_a_missing_tile_is_the_readers_error(store: Store) -> None:
    with pytest.raises(UnavailableError):
        TileTree(69_000, store.read).root()


def test_nothing_outside_the_log_is_provable(store: Store) -> None:
    tree = TileTree(70_000, store.read)
    for ask in (
        lambda: tree.inclusion_proof(70_000),
        lambda: tree.inclusion_proof(0, 70_001),
        lambda: tree.consistency_proof(5, 4),
        lambda: tree.root(70_001),
        lambda: tree.node(0, 70_000),
        lambda: tree.node(-1, 0),
        lambda: TileTree(-1, store.read),
        lambda: TileTree(MAX_SIZE + 1, store.read),
    ):
        with pytest.raises(MalformedError):
            ask()


def test_a_full_tile_hashes_to_its_place_above(store: Store) -> None:
    hashes = [perfect(0, n) for n in range(256)]
    assert hash_tile(hashes) == perfect(8, 0) == store.tiles["tile/1/000"][:32]
    with pytest.raises(MalformedError):
        hash_tile(hashes[:-1])


def test_a_tree_that_grows_keeps_full_tiles_and_reads_partial_ones_again() -> None:
    store = Store()
    sizes = (1, 255, 256, 300, 512, 70_000)
    store.grow(0, sizes[0])
    tree = TileTree(sizes[0], store.read)
    for old, new in pairwise(sizes):
        store.grow(old, new)
        tree.grow(new)
        assert tree.size == new
        assert tree.root() == tree_root(new, perfect)
        assert tree.root(old) == tree_root(old, perfect)
        verify_consistency(old, tree.root(old), new, tree.root(), tree.consistency_proof(old))
    reads = store.reads
    tree.grow(70_000)
    tree.inclusion_proof(0)
    tree.inclusion_proof(1)
    assert store.reads - reads <= 4, "the first tile of the leaves, and the partial ones above"
    with pytest.raises(MalformedError):
        tree.grow(69_999)
