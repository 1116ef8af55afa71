"""The two moments at which plaintext crosses the cipher: a bundle into the private folder, results out of it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from keyquorum_core.artifact import DecryptingReader, EncryptingWriter
from keyquorum_core.bundle import BundleLimits, FileDigest, read_bundle, write_bundle
from keyquorum_core.errors import Reason, RefusedError, UnavailableError
from keyquorum_core.manifest import Manifest
from keyquorum_core.streams import Sink, Source
from keyquorum_gpu_worker.keys import wipe
from keyquorum_gpu_worker.scratch import MAX_DEPTH, JobFolder

__all__ = ["Sealed", "collect_output", "seal_log", "seal_output", "unpack"]

_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Sealed:
    """An artifact's ciphertext, in a file without a name. ``sha256`` is 32 bytes."""

    file: BinaryIO
    size: int
    sha256: bytes


def unpack(
    key: bytes, source: Source, associated_data: bytes, folder: JobFolder, manifest: Manifest, user: int | None
) -> None:
    """Decrypt the bundle and write its files into ``folder.work``, 0600 or 0700, the job's user's.

    Raises :class:`RefusedError`: ``ARTIFACT`` for ciphertext that is not this job's bundle, ``BUNDLE`` for a bundle
    that is not safe to unpack, ``DIGEST`` unless its files are exactly the manifest's subjects; and
    :class:`UnavailableError` (``STORAGE``) when the folder is full. What was written until then is removed with the
    folder: nothing of it has run.
    """
    expected = {each.name: each.sha256 for each in manifest.subjects}
    # Bytes that fit beside what the job may write; memory is all there is on a tmpfs.
    room = max(0, folder.free_bytes() - (manifest.resources.output_mib << 20))
    limits = BundleLimits(max_files=len(expected), max_file_bytes=room, max_total_bytes=room)
    with DecryptingReader(key, source, associated_data) as reader:
        for file in read_bundle(reader, limits):
            digest = _write_file(folder.work, file.name, file.executable, file.reader, user)
            _check_subject(expected, file.name, digest)
        if not reader.finished:  # read_bundle reads to the verified end; this is what says so
            raise RefusedError(Reason.ARTIFACT, "the bundle's end was not met")
    if expected:
        raise RefusedError(
            Reason.DIGEST,
            "the bundle lacks files that the manifest names",
            expected=", ".join(sorted(expected))[:200],
            actual="nothing of that name",
        )


def _check_subject(expected: dict[str, str], name: str, digest: str) -> None:
    wanted = expected.pop(name, None)
    if wanted is None:
        raise RefusedError(
            Reason.DIGEST, "the bundle holds a file that the manifest does not name", actual=ascii(name)[:80]
        )
    if wanted != digest:
        raise RefusedError(
            Reason.DIGEST, f"the file {ascii(name)[:80]} is not the manifest's", expected=wanted, actual=digest
        )


def _write_file(root: Path, name: str, executable: bool, reader: Source, user: int | None) -> str:
    """Write one file below ``root``; returns its SHA-256, hex. The name was checked by the bundle's reader."""
    path = root / name
    made = []
    digest = hashlib.sha256()
    try:
        for parent in reversed(path.parents):
            if parent.is_relative_to(root) and not parent.exists():
                parent.mkdir(mode=0o700)
                made.append(parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o700 if executable else 0o600), "wb") as out:
            while piece := reader.read(_COPY_BYTES):
                digest.update(piece)
                out.write(piece)
        if user is not None:
            for each in (*made, path):
                os.chown(each, user, user)
    except OSError as error:
        raise UnavailableError(
            Reason.STORAGE,
            "the bundle could not be unpacked",
            expected=f"room in the scratch folder {root.parent.parent}",
            actual=error.strerror,
            next_step="Give the worker more memory or another scratch folder.",
        ) from None
    return digest.hexdigest()


def collect_output(output: Path, most_bytes: int) -> dict[str, tuple[Path, int, bool]]:
    """The files that the job left: relative name → path, bytes, executable. Nobody writes there any more.

    Raises :class:`RefusedError` (``BUNDLE``) for anything but files of one name each, and (``TOO_LARGE``) over the
    limit.
    """
    out: dict[str, tuple[Path, int, bool]] = {}
    total = 0
    pending = [(output, 0)]
    while pending:
        folder, depth = pending.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise _not_a_result(folder, output, f"a closed folder: {error.strerror}") from None
        for entry in entries:
            path = Path(entry.path)
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode) and depth < MAX_DEPTH:
                pending.append((path, depth + 1))
            elif stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
                total += found.st_size
                name = path.relative_to(output).as_posix()
                out[name] = (path, found.st_size, bool(found.st_mode & 0o100))
            else:
                raise _not_a_result(path, output, _kind(found))
    if total > most_bytes:
        raise RefusedError(
            Reason.TOO_LARGE,
            "the job's output is too large",
            expected=f"at most {most_bytes} bytes",
            actual=f"{total} bytes",
        )
    return out


def _kind(found: os.stat_result) -> str:
    for test, what in (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISDIR, f"a folder over {MAX_DEPTH} deep"),
    ):
        if test(found.st_mode):
            return what
    return f"a file of {found.st_nlink} names"


def _not_a_result(path: Path, output: Path, what: str) -> RefusedError:
    return RefusedError(
        Reason.BUNDLE,
        "the job's output holds something that is not a plain file",
        expected="regular files and folders",
        actual=f"{ascii(path.relative_to(output).as_posix())[:80]}: {what}",
    )


def _open_plain(path: Path) -> BinaryIO:
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, "the job's output cannot be read", actual=error.strerror) from None


def seal_output(
    key: bytes, files: Mapping[str, tuple[Path, int, bool]], associated_data: bytes, sink: BinaryIO
) -> tuple[Sealed, tuple[FileDigest, ...]]:
    """The result bundle's ciphertext, written to ``sink``. Raises :class:`RefusedError` (``BUNDLE``) for a name that a
    bundle cannot hold."""
    limits = BundleLimits(max_files=max(1, len(files)), max_file_bytes=1 << 50, max_total_bytes=1 << 50)
    hashing = _Hashing(sink)
    with EncryptingWriter(key, hashing, associated_data) as writer:
        digests = write_bundle(
            [(name, size, lambda path=path: _open_plain(path)) for name, (path, size, _) in files.items()],  # type: ignore[misc]
            writer,
            executable=[name for name, (_, _, executable) in files.items() if executable],
            limits=limits,
        )
    return hashing.sealed(sink), digests


def seal_log(key: bytes, log: bytearray, associated_data: bytes, sink: BinaryIO) -> Sealed:
    """The log's ciphertext, written to ``sink``; the log is wiped."""
    hashing = _Hashing(sink)
    with EncryptingWriter(key, hashing, associated_data) as writer:
        writer.write(log)
    wipe(log)
    return hashing.sealed(sink)


class _Hashing(Sink):
    """Passes bytes on and digests them."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: memoryview, /) -> int:
        count = self._sink.write(data)
        self._digest.update(data[:count])
        self._size += count
        return count

    def sealed(self, sink: BinaryIO) -> Sealed:
        return Sealed(sink, self._size, self._digest.digest())
