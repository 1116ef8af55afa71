"""Bundles: a job's files, or its results, as one canonical tar (docs/spec/bundle.md).

POSIX ustar with regular files only, no compression, and nothing left to choice: names sorted by their UTF-8 bytes,
modification time 0, owner 0, mode 0644 or 0755, zero padding, exactly two zero blocks at the end. A set of files has
one bundle, any ``tar`` can list it, and the reader can insist: it parses name, size and mode, makes the header they
must have, and refuses the block if a bit differs. What a tar can smuggle otherwise (links, devices, sparse maps, PAX
and GNU long-name records, base-256 sizes, a second archive behind the first) has no way in.

Both directions stream: a bundle is never held in memory, and the source need not be seekable.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from keyquorum_core.bundle_names import NameSet, split_name
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError
from keyquorum_core.streams import Sink, Source, fill, write_all

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["BundleFile", "BundleLimits", "FileDigest", "bundle_size", "digests", "read_bundle", "write_bundle"]

BLOCK_BYTES = 512
_COPY_BYTES = 1 << 20
_LARGEST_FILE = 8**11 - 1  # eleven octal digits
_END = bytes(2 * BLOCK_BYTES)

_OTHER_FORMATS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress",
    b"LZIP": "lzip",
    b"PK": "zip",
    b"7z\xbc\xaf": "7-Zip",
}
_OTHER_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a directory",
    b"6": "a FIFO",
    b"7": "a contiguous file",
    b"g": "a PAX global header",
    b"x": "a PAX header",
    b"D": "a GNU directory dump",
    b"K": "a GNU long link name",
    b"L": "a GNU long name",
    b"M": "a GNU continuation",
    b"S": "a GNU sparse file",
    b"V": "a GNU volume label",
    b"\x00": "a pre-POSIX file",
}


@dataclass(frozen=True, slots=True)
class BundleLimits:
    """The most a bundle may hold. The bytes are those of the files, without headers and padding."""

    max_files: int = 10_000
    max_file_bytes: int = 4 << 30
    max_total_bytes: int = 8 << 30


@dataclass(frozen=True, slots=True)
class FileDigest:
    """One file of a bundle: a manifest's subject. ``sha256`` is lower-case hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class BundleFile:
    """One file while a bundle is read. ``reader`` gives exactly ``size`` bytes, until the next file is asked for."""

    name: str
    size: int
    executable: bool
    reader: io.RawIOBase


FileSource = Source | Callable[[], BinaryIO]
"""An open stream, or what opens one when its turn comes; that one is closed after. For more files than may be open."""


def bundle_size(files: Iterable[tuple[str, int]]) -> int:
    """Bytes of the bundle of files with these names and sizes."""
    return sum(BLOCK_BYTES + size + _padding(size) for _, size in files) + len(_END)


def write_bundle(
    files: Iterable[tuple[str, int, FileSource]],
    sink: Sink,
    *,
    executable: Collection[str] = (),
    limits: BundleLimits | None = None,
) -> tuple[FileDigest, ...]:
    """Write the bundle of ``(name, size in bytes, source)`` to ``sink``; returns the digests of what was written.

    The order of ``files`` does not matter. ``executable`` names those of mode 0755. Names are checked and limits
    applied before the first byte is written. Raises :class:`RefusedError` (``BUNDLE``) for a name or a number that a
    bundle cannot hold, :class:`MalformedError` (``BUNDLE``) for a source that is not as long as was said.
    """
    guard = _Guard(limits or BundleLimits())
    ordered = sorted(files, key=lambda item: _sort_key(item[0]))
    headers = []
    for name, size, _ in ordered:
        guard.admit(name, size)
        headers.append(_header(name, size, executable=name in executable))
    out: list[FileDigest] = []
    buffer = memoryview(bytearray(_COPY_BYTES))
    for header, (name, size, source) in zip(headers, ordered, strict=True):
        write_all(sink, memoryview(header))
        if callable(source):
            with closing(source()) as opened:
                out.append(_copy_in(name, size, opened, sink, buffer))
        else:
            out.append(_copy_in(name, size, source, sink, buffer))
        write_all(sink, memoryview(bytes(_padding(size))))
    write_all(sink, memoryview(_END))
    return tuple(out)


def read_bundle(source: Source, limits: BundleLimits | None = None) -> Iterator[BundleFile]:
    """The files of the bundle that ``source`` is, in order; what of a file was not read is skipped.

    Raises :class:`MalformedError` (``BUNDLE``) for bytes that are no bundle and :class:`RefusedError` (``BUNDLE``) for
    a bundle that the rules or ``limits`` forbid. That the bundle is whole, and ends where the source ends, is known
    only once the iterator is exhausted: after an error, discard the files that came before it.
    """
    guard = _Guard(limits or BundleLimits())
    block = memoryview(bytearray(BLOCK_BYTES))
    skipped = memoryview(bytearray(_COPY_BYTES))
    previous = b""
    while True:
        _read_block(source, block)
        if not any(block):
            break
        name, size, executable = _parse_header(bytes(block))
        key = _sort_key(name)
        if key <= previous:
            raise RefusedError(
                Reason.BUNDLE,
                "the bundle names a file twice" if key == previous else "the bundle's names are not in order",
                expected=f"a name after {_shown(previous)}",
                actual=_shown(key),
            )
        previous = key
        guard.admit(name, size)
        reader = _FileReader(source, size, name)
        yield BundleFile(name, size, executable, reader)
        reader.finish(skipped)
        padding = block[: _padding(size)]
        _read_exactly(source, padding, "in a file's padding")
        if any(padding):
            raise MalformedError(Reason.BUNDLE, "the padding after a file is not zero", actual=name)
    _read_block(source, block)
    if any(block) or fill(source, block[:1]):
        raise MalformedError(
            Reason.BUNDLE, "something follows the bundle's end", expected="two zero blocks and the end of the stream"
        )


def digests(source: Source, limits: BundleLimits | None = None) -> tuple[FileDigest, ...]:
    """Name, size and SHA-256 of every file in the bundle that ``source`` is. Raises as :func:`read_bundle` does."""
    out = []
    buffer = memoryview(bytearray(_COPY_BYTES))
    for file in read_bundle(source, limits):
        digest = hashlib.sha256()
        while count := file.reader.readinto(buffer):
            digest.update(buffer[:count])
        out.append(FileDigest(file.name, file.size, digest.hexdigest()))
    return tuple(out)


class _Guard:
    """What has been admitted so far, against the limits and the rules for names."""

    def __init__(self, limits: BundleLimits) -> None:
        self._limits = limits
        self._names = NameSet()
        self._files = 0
        self._total = 0

    def admit(self, name: str, size: int) -> None:
        self._files += 1
        self._total += size
        for what, most, actual in (
            ("files", self._limits.max_files, self._files),
            ("bytes in one file", min(self._limits.max_file_bytes, _LARGEST_FILE), size),
            ("bytes in all", self._limits.max_total_bytes, self._total),
        ):
            if actual > most:
                raise RefusedError(
                    Reason.BUNDLE,
                    "the bundle is over its limits",
                    expected=f"at most {most} {what}",
                    actual=f"{actual} {what}",
                )
        if size < 0:
            raise MalformedError(Reason.BUNDLE, "a file's size is negative", actual=size)
        self._names.add(name)


class _FileReader(io.RawIOBase):
    """The bytes of one file inside the bundle's source."""

    def __init__(self, source: Source, size: int, name: str) -> None:
        self._source = source
        self._left = size
        self._name = name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        if self.closed:
            raise StateError(Reason.BUNDLE, "this file's turn in the bundle is over", actual=self._name)
        return self._next(memoryview(buffer).cast("B"))

    def finish(self, scratch: memoryview) -> None:
        """Skip what was not read."""
        self.close()
        while self._next(scratch):
            pass

    def _next(self, view: memoryview) -> int:
        out = view[: self._left]
        _read_exactly(self._source, out, f"in the file {self._name}")
        self._left -= len(out)
        return len(out)


def _copy_in(name: str, size: int, source: Source, sink: Sink, buffer: memoryview) -> FileDigest:
    digest = hashlib.sha256()
    left = size
    while left:
        piece = buffer[: min(left, len(buffer))]
        piece = piece[: fill(source, piece)]
        if not len(piece):
            break
        digest.update(piece)
        write_all(sink, piece)
        left -= len(piece)
    if left or fill(source, buffer[:1]):
        raise MalformedError(
            Reason.BUNDLE,
            f"the file {name} changed its size while it was read",
            expected=f"{size} bytes",
            actual=f"{size - left} bytes" if left else "more",
            next_step="Write the bundle again when nothing writes to the folder.",
        )
    return FileDigest(name, size, digest.hexdigest())


def _header(name: str, size: int, *, executable: bool) -> bytes:
    """The one header block (POSIX.1-2017, pax, "ustar Interchange Format") that a file has in a bundle."""
    prefix, rest = split_name(name)
    block = bytearray(BLOCK_BYTES)
    block[0 : len(rest)] = rest
    block[100:108] = b"0000755\x00" if executable else b"0000644\x00"
    block[108:116] = block[116:124] = b"0000000\x00"  # uid, gid
    block[124:136] = b"%011o\x00" % size
    block[136:148] = b"00000000000\x00"  # mtime
    block[148:156] = b" " * 8
    block[156:157] = b"0"
    block[257:265] = b"ustar\x0000"
    block[329:337] = block[337:345] = b"0000000\x00"  # device numbers
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b"%06o\x00 " % sum(block)
    return bytes(block)


def _parse_header(block: bytes) -> tuple[str, int, bool]:
    """Name, size and executable bit, if the block is exactly the header that those make."""
    for magic, what in _OTHER_FORMATS.items():
        if block.startswith(magic) and block[257:263] != b"ustar\x00":
            raise RefusedError(Reason.BUNDLE, "a bundle is not compressed", expected="ustar", actual=what)
    if block[257:265] != b"ustar\x0000":
        raise MalformedError(
            Reason.BUNDLE, "this is no ustar header", expected="the magic ustar, version 00", actual=block[257:265]
        )
    actual_sum = sum(block) - sum(block[148:156]) + 8 * 0x20
    if block[148:156] != b"%06o\x00 " % actual_sum:
        raise MalformedError(
            Reason.BUNDLE, "a header's checksum is wrong", expected=f"{actual_sum:o}", actual=block[148:156]
        )
    if block[156:157] != b"0":
        what = _OTHER_TYPES.get(block[156:157], f"type {block[156:157]!r}")
        raise RefusedError(Reason.BUNDLE, "a bundle holds regular files only", expected="a file", actual=what)
    size_field = block[124:136]
    if size_field[11:] != b"\x00" or any(digit not in b"01234567" for digit in size_field[:11]):
        raise MalformedError(
            Reason.BUNDLE, "a file's size is badly written", expected="eleven octal digits", actual=size_field
        )
    size = int(size_field[:11], 8)
    prefix, rest = (field.split(b"\x00", 1)[0] for field in (block[345:500], block[0:100]))
    try:
        name = (prefix + b"/" + rest if prefix else rest).decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedError(Reason.BUNDLE, "a file's name is not UTF-8", actual=(prefix + rest)[:80]) from None
    executable = block[100:108] == b"0000755\x00"
    expected = _header(name, size, executable=executable)
    if block != expected:
        at = next(i for i in range(BLOCK_BYTES) if block[i] != expected[i])
        raise RefusedError(
            Reason.BUNDLE,
            f"the header of {name} is not in the bundle's form",
            expected=f"byte {expected[at]:#04x} at {at}",
            actual=f"{block[at]:#04x}",
            next_step="Make bundles with keyquorum; tar's mode, owner, time and link fields are fixed in them.",
        )
    return name, size, executable


def _sort_key(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def _shown(key: bytes) -> str:
    return ascii(key.decode("utf-8", "replace"))[:80] if key else "nothing"


def _padding(size: int) -> int:
    return -size % BLOCK_BYTES


def _read_block(source: Source, block: memoryview) -> None:
    _read_exactly(source, block, "in a header or before its two zero blocks")


def _read_exactly(source: Source, view: memoryview, where: str) -> None:
    got = fill(source, view)
    if got < len(view):
        raise MalformedError(
            Reason.BUNDLE, f"the bundle ends {where}", expected=f"{len(view)} bytes more", actual=f"{got} bytes"
        )
