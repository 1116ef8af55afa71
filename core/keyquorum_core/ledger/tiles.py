"""C2SP tlog-tiles: names and contents of the static files that a log is served as.

A tile holds 1 … 256 consecutive hashes of one level in steps of eight (level L counts subtrees of 256^L leaves), 32
bytes each; an entry bundle holds the 1 … 256 leaves under a tile of level 0, each after its length (u16, big-endian).
Fewer than 256 makes it partial, and its width part of its name. Paths: ``tile/<L>/<N>[.p/<W>]`` and
``tile/entries/<N>[.p/<W>]``, N in groups of three digits, all but the last after an ``x``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.ledger.compact import CompactRange
from keyquorum_core.ledger.merkle import HASH_SIZE, MAX_SIZE, check_hash, leaf_hash

__all__ = [
    "MAX_BUNDLE",
    "MAX_ENTRY",
    "MAX_LEVEL",
    "TILE_WIDTH",
    "Bundle",
    "Tile",
    "check_bundle",
    "decode_bundle",
    "decode_tile",
    "encode_bundle",
    "encode_tile",
    "hash_tile",
    "parse_path",
    "tile_width",
    "tiles_between",
]

TILE_WIDTH: Final = 256
MAX_LEVEL: Final = 63
MAX_ENTRY: Final = 65_535
"""Bytes in the longest leaf: what its length field can say."""
MAX_BUNDLE: Final = TILE_WIDTH * (2 + MAX_ENTRY)

_MAX_INDEX: Final = MAX_SIZE >> 8
_PATH: Final = re.compile(
    r"tile/(?P<level>entries|0|[1-9][0-9]?)/(?P<index>(?:x[0-9]{3}/){0,6}[0-9]{3})(?:\.p/(?P<width>[1-9][0-9]{0,2}))?",
    re.ASCII,
)


def _bad(message: str, expected: object, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, message, expected=expected, actual=actual)


def _check(index: int, width: int) -> None:
    if not 0 <= index <= _MAX_INDEX:
        raise _bad("a tile index outside every tree", f"0…{_MAX_INDEX}", index)
    if not 1 <= width <= TILE_WIDTH:
        raise _bad("bad tile width", f"1…{TILE_WIDTH}", width)


def _suffix(index: int, width: int) -> str:
    groups = f"{index:03d}"
    groups = groups.zfill(-(-len(groups) // 3) * 3)
    path = "/".join(("x" if at + 3 < len(groups) else "") + groups[at : at + 3] for at in range(0, len(groups), 3))
    return path if width == TILE_WIDTH else f"{path}.p/{width}"


@dataclass(frozen=True, slots=True)
class Tile:
    """The name of ``width`` hashes of level ``level``, from number 256·``index`` on. Raises :class:`MalformedError`."""

    level: int
    index: int
    width: int = TILE_WIDTH

    def __post_init__(self) -> None:
        if not 0 <= self.level <= MAX_LEVEL:
            raise _bad("bad tile level", f"0…{MAX_LEVEL}", self.level)
        _check(self.index, self.width)

    @property
    def path(self) -> str:
        return f"tile/{self.level}/{_suffix(self.index, self.width)}"


@dataclass(frozen=True, slots=True)
class Bundle:
    """The name of ``width`` leaves, from number 256·``index`` on. Raises :class:`MalformedError`."""

    index: int
    width: int = TILE_WIDTH

    def __post_init__(self) -> None:
        _check(self.index, self.width)

    @property
    def path(self) -> str:
        return f"tile/entries/{_suffix(self.index, self.width)}"


def parse_path(path: str) -> Tile | Bundle:
    """The inverse of ``path``, strict: one spelling for each name. Raises :class:`MalformedError` (``MALFORMED``)."""
    match = _PATH.fullmatch(path)
    if not match:
        raise _bad("not the path of a tile", "tile/<L>/<N>[.p/<W>]", ascii(path[:80]))
    index = int(match["index"].replace("x", "").replace("/", ""))
    width = int(match["width"] or TILE_WIDTH)
    name = Bundle(index, width) if match["level"] == "entries" else Tile(int(match["level"]), index, width)
    if name.path != path:  # leading groups of zeros, or ``.p/256``
        raise _bad("not the canonical path of a tile", name.path, ascii(path[:80]))
    return name


def tile_width(level: int, index: int, size: int) -> int:
    """Hashes that tile ``index`` of ``level`` has in a tree of ``size`` leaves: 0 (it isn't there) … 256."""
    return max(0, min(TILE_WIDTH, (size >> (8 * level)) - index * TILE_WIDTH))


def tiles_between(old: int, new: int) -> Iterator[Tile]:
    """The tiles that a tree of ``new`` leaves has and one of ``old`` leaves hadn't, each in its width, level by level.

    Those of level 0 name the entry bundles too. Raises :class:`MalformedError` for sizes that decrease.
    """
    if not 0 <= old <= new <= MAX_SIZE:
        raise _bad("a tree that shrinks", f"0 ≤ old ≤ new ≤ {MAX_SIZE}", f"{old} and {new}")
    level = 0
    while new >> (8 * level) != old >> (8 * level):
        count = new >> (8 * level)
        for index in range((old >> (8 * level)) // TILE_WIDTH, -(-count // TILE_WIDTH)):
            yield Tile(level, index, tile_width(level, index, new))
        level += 1


def encode_tile(hashes: Sequence[bytes]) -> bytes:
    """1 … 256 hashes, concatenated. Raises :class:`MalformedError`."""
    _check(0, len(hashes))
    for value in hashes:
        check_hash(value, "an element of a tile")
    return b"".join(hashes)


def decode_tile(data: bytes, width: int) -> tuple[bytes, ...]:
    """The hashes of a tile of ``width``. Raises :class:`MalformedError` for any other length."""
    _check(0, width)
    if len(data) != width * HASH_SIZE:
        raise _bad("a tile of the wrong size", f"{width * HASH_SIZE} bytes for width {width}", f"{len(data)} bytes")
    return tuple(data[at : at + HASH_SIZE] for at in range(0, len(data), HASH_SIZE))


def hash_tile(hashes: Sequence[bytes]) -> bytes:
    """The hash of a full tile: what the tile above holds for it. Raises :class:`MalformedError` for a partial one."""
    if len(hashes) != TILE_WIDTH:
        raise _bad("a partial tile has no hash on the level above", f"{TILE_WIDTH} hashes", len(hashes))
    whole = CompactRange()
    for value in hashes:
        whole.append(value)
    return whole.root()


def encode_bundle(entries: Sequence[bytes]) -> bytes:
    """1 … 256 leaves as an entry bundle. Raises :class:`MalformedError`: ``TOO_LARGE`` for a leaf over 65 535 bytes."""
    _check(0, len(entries))
    out = bytearray()
    for entry in entries:
        if len(entry) > MAX_ENTRY:
            raise MalformedError(
                Reason.TOO_LARGE,
                "a leaf is too large",
                expected=f"at most {MAX_ENTRY} bytes",
                actual=f"{len(entry)} bytes",
            )
        out += len(entry).to_bytes(2, "big")
        out += entry
    return bytes(out)


def decode_bundle(data: bytes, width: int) -> tuple[bytes, ...]:
    """The leaves of a bundle of ``width``. Raises :class:`MalformedError` for a bundle cut short or with bytes left."""
    _check(0, width)
    entries = []
    at = 0
    for number in range(width):
        start = at + 2
        at = start + int.from_bytes(data[at:start], "big")
        if start > len(data) or at > len(data):
            raise _bad("an entry bundle is cut short", f"{width} entries", f"{number} whole ones in {len(data)} bytes")
        entries.append(data[start:at])
    if at != len(data):
        raise _bad("bytes after the last entry of a bundle", f"{at} bytes for {width} entries", f"{len(data)} bytes")
    return tuple(entries)


def check_bundle(entries: Sequence[bytes], hashes: Sequence[bytes], first: int) -> None:
    """Whether each leaf has its hash in the tile of level 0 beside it; ``first`` is the first leaf's index.

    Raises :class:`MalformedError` when the numbers differ, :class:`RefusedError` (``LEDGER_PROOF``) naming the leaf.
    """
    if len(entries) != len(hashes):
        raise _bad("a bundle and its tile differ in width", len(hashes), len(entries))
    for number, (entry, value) in enumerate(zip(entries, hashes, strict=True)):
        if leaf_hash(entry) != value:
            raise RefusedError(
                Reason.LEDGER_PROOF,
                f"leaf {first + number} is not the one that its tile holds",
                expected=value.hex(),
                actual=leaf_hash(entry).hex(),
            )
