"""Names and contents of tiles: one spelling each, nothing cut short, nothing left over."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.ledger.merkle import MAX_SIZE, leaf_hash
from keyquorum_core.ledger.tiles import (
    MAX_ENTRY,
    Bundle,
    Tile,
    check_bundle,
    decode_bundle,
    decode_tile,
    encode_bundle,
    encode_tile,
    parse_path,
    tile_width,
    tiles_between,
)

PATHS: dict[str, Tile | Bundle] = {
    "tile/0/000": Tile(0, 0),
    "tile/0/000.p/1": Tile(0, 0, 1),
    "tile/63/999.p/255": Tile(63, 999, 255),
    "tile/1/x001/000": Tile(1, 1000),
    "tile/0/x001/x234/067": Tile(0, 1_234_067),
    "tile/0/x036/x028/x797/x018/x963/967": Tile(0, MAX_SIZE >> 8),
    "tile/entries/x001/x234/067.p/8": Bundle(1_234_067, 8),
    "tile/entries/005": Bundle(5),
}


@pytest.mark.parametrize("path", PATHS)
def test_paths(path: str) -> None:
    assert parse_path(path) == PATHS[path]
    assert PATHS[path].path == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "tile/0/0",
        "tile/0/00",
        "tile/0/0000",
        "tile/0/x000/000",
        "tile/0/x000/x001/000",
        "tile/0/001/000",
        "tile/0/x001",
        "tile/00/000",
        "tile/64/000",
        "tile/-1/000",
        "tile/0/000.p/0",
        "tile/0/000.p/256",
        "tile/0/000.p/01",
        "tile/0/000.p/",
        "tile/0/000.p",
        "tile/0/000/p/1",
        "/tile/0/000",
        "tile/0/000/",
        "tile/0/000\n",
        "tile/0/٠٠٠",
        "tile/0/x001/x001/x001/x001/x001/x001/x001/001",
        "tile/0/x999/x999/x999/x999/x999/999",
        "tile/Entries/000",
        "tile/0/../000",
        "tile/0/%30%30%30",
    ],
)
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(MalformedError) as caught:
        parse_path(path)
    assert caught.value.reason is Reason.MALFORMED


@given(st.integers(0, 63), st.integers(0, MAX_SIZE >> 8), st.integers(1, 256))
@settings(deadline=None)
def test_every_name_has_one_path(level: int, index: int, width: int) -> None:
    for name in (Tile(level, index, width), Bundle(index, width)):
        assert parse_path(name.path) == name


@given(st.text(alphabet="tile/entris0123456789xp.\n", max_size=40))
@settings(max_examples=120, deadline=None)
def test_any_path_is_read_or_refused(path: str) -> None:
    with contextlib.suppress(MalformedError):
        assert parse_path(path).path == path


@pytest.mark.parametrize(("level", "index", "width"), [(64, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0, 0), (0, 0, 257)])
def test_impossible_names(level: int, index: int, width: int) -> None:
    with pytest.raises(MalformedError):
        Tile(level, index, width)


def test_widths_of_a_tree_of_70_000() -> None:
    """The example in C2SP tlog-tiles."""
    assert [tile_width(0, i, 70_000) for i in (0, 272, 273, 274)] == [256, 256, 112, 0]
    assert [tile_width(1, i, 70_000) for i in (0, 1, 2)] == [256, 17, 0]
    assert [tile_width(2, i, 70_000) for i in (0, 1)] == [1, 0]
    assert (tile_width(0, 0, 256), tile_width(1, 0, 256)) == (256, 1)


@given(st.integers(0, 140_000), st.integers(0, 140_000))
@settings(max_examples=40, deadline=None)
def test_tiles_between_two_sizes_are_the_difference(first: int, second: int) -> None:
    def tiles(size: int) -> set[Tile]:
        return {
            Tile(level, index, tile_width(level, index, size))
            for level in range(4)
            for index in range((size >> (8 * level)) // 256 + 1)
            if tile_width(level, index, size)
        }

    old, new = sorted((first, second))
    listed = list(tiles_between(old, new))
    assert set(listed) == tiles(new) - tiles(old)
    assert len(set(listed)) == len(listed)


def test_a_tree_that_shrinks_has_no_new_tiles() -> None:
    with pytest.raises(MalformedError):
        list(tiles_between(5, 4))


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=256))
@settings(max_examples=50, deadline=None)
def test_bundles_round_trip(entries: list[bytes]) -> None:
    assert decode_bundle(encode_bundle(entries), len(entries)) == tuple(entries)


def test_layout_of_a_bundle_is_pinned() -> None:
    assert encode_bundle([b"abc", b"", b"\xff"]).hex() == "0003616263" + "0000" + "0001ff"


def test_the_longest_leaf_fits_and_no_longer() -> None:
    assert decode_bundle(encode_bundle([b"x" * MAX_ENTRY]), 1) == (b"x" * MAX_ENTRY,)
    with pytest.raises(MalformedError) as caught:
        encode_bundle([b"x" * (MAX_ENTRY + 1)])
    assert caught.value.reason is Reason.TOO_LARGE


@pytest.mark.parametrize("count", [0, 257])
def test_bundles_and_tiles_of_impossible_widths(count: int) -> None:
    for make in (encode_bundle, encode_tile):
        with pytest.raises(MalformedError):
            make([b"\0" * 32] * count)
    for read in (decode_bundle, decode_tile):
        with pytest.raises(MalformedError):
            read(b"", count)


def test_a_bundle_cut_anywhere_or_with_more_is_refused() -> None:
    whole = encode_bundle([b"abc", b"", b"defg"])
    for cut in range(len(whole)):
        with pytest.raises(MalformedError):
            decode_bundle(whole[:cut], 3)
    for data, width in ((whole + b"\0", 3), (whole, 2), (whole, 4), (whole + whole, 3)):
        with pytest.raises(MalformedError):
            decode_bundle(data, width)


def test_a_tile_is_exactly_its_width() -> None:
    hashes = tuple(bytes([n]) * 32 for n in range(5))
    assert decode_tile(encode_tile(hashes), 5) == hashes
    for data, width in ((b"\0" * 160, 4), (b"\0" * 159, 5), (b"\0" * 161, 5), (b"", 1)):
        with pytest.raises(MalformedError):
            decode_tile(data, width)
    with pytest.raises(MalformedError):
        encode_tile([b"\0" * 31])


@given(st.binary(max_size=200), st.integers(-1, 300))
@settings(max_examples=80, deadline=None)
def test_any_bundle_is_read_or_refused(data: bytes, width: int) -> None:
    with contextlib.suppress(MalformedError):
        assert encode_bundle(decode_bundle(data, width)) == data


def test_a_bundle_must_be_the_leaves_of_its_tile() -> None:
    entries = [b"a", b"b", b"c"]
    hashes = [leaf_hash(entry) for entry in entries]
    check_bundle(entries, hashes, 512)
    with pytest.raises(RefusedError, match="leaf 513"):
        check_bundle([b"a", b"c", b"b"], hashes, 512)
    for wrong in (entries[:2], [*entries, b"c"]):
        with pytest.raises(KeyquorumError):
            check_bundle(wrong, hashes, 512)
