"""An opened data key: it encrypts, decrypts and rewraps any number of files until it is closed (docs/spec/data.md).

Each file has a key of its own, wrapped under the data key; memory is two buffers of 1 MiB at any size. A file that is
written comes into being whole, with mode 0600, or not at all; nothing is replaced but by :meth:`DataKey.rewrap`, and
then by a whole file. Everything here blocks: in asyncio, call it in a thread.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from keyquorum.atomic import sync_file
from keyquorum.outputs import outputs
from keyquorum.progress import Progress, ProgressCallback, Stage, silent
from keyquorum_core.artifact import KEY_BYTES, decrypt_stream, encrypt_stream, plaintext_size
from keyquorum_core.data_file import PREAMBLE_BYTES, PURPOSE, DataHeader, Preamble, read_preamble, wrap_key
from keyquorum_core.derivation import DerivedKey
from keyquorum_core.errors import Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.streams import Sink, Source, write_all

__all__ = ["DEFAULT_NAME", "DataFile", "DataKey", "DataSink", "DataSource", "read_header"]

DEFAULT_NAME = "files"
DataSource = str | os.PathLike[str] | Source
"""A path, or an open binary file, which is read to its end and not closed."""
DataSink = str | os.PathLike[str] | Sink
"""A path where nothing is yet, or an open binary file. What an open file got before an error is to be discarded."""
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file: its header, and the bytes that it holds decrypted (0 where its size isn't known)."""

    header: DataHeader
    size: int
    rewrap_before: int = 0
    """Unix seconds from which on its epoch may be destroyed, by the key's policy; 0: its epoch is the newest, or
    nobody was asked."""

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        members = ("cluster", "owner", "key_id", "epoch", "name", "classification", "export_control", "file_id")
        return {each: getattr(self.header, each) for each in members} | {
            "key_check": self.header.key_check,
            "size": self.size,
            "rewrap_before": self.rewrap_before,
        }


class DataKey:
    """An owner's data key in one epoch. Use it in ``with``; :meth:`close` wipes it. Safe to share between threads."""

    def __init__(
        self,
        derived: DerivedKey,
        *,
        cluster: str,
        owner: str,
        key_id: str,
        epoch: int,
        name: str,
        classification: str,
        export_control: str,
        rewrap_before: int = 0,
    ) -> None:
        self._header = DataHeader(
            cluster=cluster,
            owner=owner,
            key_id=key_id,
            epoch=epoch,
            name=name,
            classification=classification,
            export_control=export_control,
            file_id="00" * 32,
            key_check=derived.key_check.hex(),
        )
        self._key = bytearray(derived.purpose_key(PURPOSE))
        self._closed = False
        self.rewrap_before = rewrap_before
        """As :attr:`DataFile.rewrap_before`."""

    def __repr__(self) -> str:
        return f"DataKey({self.key_id}, {self.epoch}, {self._header.name})"

    @property
    def key_id(self) -> str:
        return self._header.key_id

    @property
    def epoch(self) -> int:
        return self._header.epoch

    def close(self) -> None:
        """Wipe the key. Idempotent."""
        self._closed = True
        self._key[:] = bytes(len(self._key))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def encrypt(self, source: DataSource, sink: DataSink, *, progress: ProgressCallback = silent) -> DataFile:
        """Encrypt ``source`` to its end into ``sink``.

        Raises :class:`StateError` (``EXISTS``) where the path is taken, ``UnavailableError`` (``NOT_FOUND``,
        ``STORAGE``).
        """
        self._check_open()
        header = self._new_header()
        file_key = secrets.token_bytes(KEY_BYTES)
        preamble = wrap_key(header, file_key, self._key)
        with _reading(source) as opened, _writing(sink) as out:
            total = max(0, _size(opened))
            write_all(out, memoryview(preamble.to_bytes()))
            done = encrypt_stream(
                file_key, opened, out, header.binding(), progress=_counting(progress, Stage.ENCRYPT, total)
            )
        return DataFile(header, done, self.rewrap_before)

    def decrypt(self, source: DataSource, sink: DataSink, *, progress: ProgressCallback = silent) -> DataFile:
        """Decrypt the data file that ``source`` is, to its end, into ``sink``: at a path, all of it or nothing.

        Raises as :meth:`encrypt`, :class:`MalformedError` for what is no data file, and :class:`RefusedError`:
        ``UNKNOWN_KEY``, ``EPOCH`` (it is another key's), ``UNSEAL`` (its header was changed), ``ARTIFACT`` (the rest
        was, or is cut short).
        """
        self._check_open()
        with _reading(source) as opened:
            total = max(0, _size(opened) - PREAMBLE_BYTES)
            preamble = read_preamble(opened)
            file_key = self._unwrap(preamble)
            with _writing(sink) as out:
                report = _counting(progress, Stage.DECRYPT, total)
                done = decrypt_stream(file_key, opened, out, preamble.header.binding(), progress=report)
        return DataFile(preamble.header, done, self.rewrap_before)

    def rewrap(self, path: str | os.PathLike[str], new: DataKey, *, progress: ProgressCallback = silent) -> DataFile:
        """Put the data file at ``path``, which this key opens, under ``new``, the same key in another epoch.

        The file is replaced by a copy with another preamble: at every moment one or the other is there, whole. The
        encrypted rest is copied as it is, by the file system where it can, and is not verified. Raises as
        :meth:`decrypt`.
        """
        self._check_open()
        new._check_open()
        place = Path(path)
        with _file(place) as opened:
            preamble = read_preamble(opened)
            file_key = self._unwrap(preamble)
            header = preamble.header.at(new.epoch, bytes.fromhex(new._header.key_check))
            new._check_names(header)
            payload = max(0, _size(opened))
            size = plaintext_size(payload)
            made = wrap_key(header, file_key, new._key)
            _replace(place, made, opened, payload, progress)
        return DataFile(header, size, new.rewrap_before)

    def _check_open(self) -> None:
        if self._closed:
            raise StateError(Reason.STATE, "this data key is closed", next_step="Open it again.")

    def _new_header(self) -> DataHeader:
        own = self._header
        return DataHeader(
            cluster=own.cluster,
            owner=own.owner,
            key_id=own.key_id,
            epoch=own.epoch,
            name=own.name,
            classification=own.classification,
            export_control=own.export_control,
            file_id=secrets.token_hex(32),
            key_check=own.key_check,
        )

    def _unwrap(self, preamble: Preamble) -> bytes:
        self._check_names(preamble.header)
        return preamble.unwrap(self._key)

    def _check_names(self, header: DataHeader) -> None:
        own = self._header
        for what, reason in (
            ("cluster", Reason.UNKNOWN_KEY),
            ("owner", Reason.UNKNOWN_OWNER),
            ("key_id", Reason.UNKNOWN_KEY),
            ("name", Reason.UNKNOWN_KEY),
            ("epoch", Reason.EPOCH),
        ):
            if getattr(own, what) != getattr(header, what):
                raise RefusedError(
                    reason,
                    f"the file is encrypted under another {what.replace('_', ' ')}",
                    expected=getattr(own, what),
                    actual=getattr(header, what),
                    next_step="Open the key that the file's header names: keyquorum data show FILE",
                )
        if not hmac.compare_digest(own.key_check, header.key_check):
            raise RefusedError(
                Reason.UNSEAL,
                "the file names another key check than this key's",
                expected=own.key_check,
                actual=header.key_check,
                next_step="Restore the file from a backup; its header was changed.",
            )


def read_header(source: DataSource) -> DataFile:
    """What a data file says of itself, UNVERIFIED: whose it is, and which key opens it. Reads the preamble only.

    Raises :class:`MalformedError` for what is no data file, ``ARTIFACT`` included: no data file has its size.
    """
    with _reading(source) as opened:
        size = _size(opened)
        header = read_preamble(opened).header
        return DataFile(header, plaintext_size(size - PREAMBLE_BYTES) if size >= 0 else 0)


def _counting(progress: ProgressCallback, stage: Stage, total: int) -> Callable[[int], None]:
    return lambda done: progress(Progress(stage, done, max(done, total) if total else 0))


def _size(source: Source) -> int:
    """Bytes from here to the end of a regular file; -1 where that is not to be known."""
    try:
        found = os.fstat(source.fileno())  # type: ignore[attr-defined]
        return found.st_size - source.tell() if stat.S_ISREG(found.st_mode) else -1  # type: ignore[attr-defined]
    except (AttributeError, OSError):
        return -1


@contextmanager
def _reading(source: DataSource) -> Iterator[Source]:
    if isinstance(source, str | os.PathLike):
        with _file(source) as file:
            yield file
    else:
        yield source


@contextmanager
def _file(source: str | os.PathLike[str]) -> Iterator[FileIO]:
    try:
        file = FileIO(os.open(source, os.O_RDONLY | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise UnavailableError(Reason.NOT_FOUND, f"{source} can't be read", actual=error.strerror) from None
    with file:
        try:
            yield file
        except OSError as error:
            raise UnavailableError(Reason.STORAGE, f"{source} can't be read", actual=error.strerror) from None


@contextmanager
def _writing(sink: DataSink) -> Iterator[Sink]:
    """At a path, the file is there once this is left well."""
    if not isinstance(sink, str | os.PathLike):
        yield sink
        return
    with outputs() as files:
        try:
            yield files.create(Path(sink))
        except OSError as error:
            raise UnavailableError(
                Reason.STORAGE, f"{sink} can't be written, or its source not read", actual=error.strerror
            ) from None
        files.publish()


def _replace(place: Path, preamble: Preamble, source: FileIO, payload: int, progress: ProgressCallback) -> None:
    """A copy with another preamble takes the place of the file that ``source`` is, read as far as its artifact."""
    temporary = ""
    try:
        if not stat.S_ISREG(os.lstat(place).st_mode):
            raise RefusedError(
                Reason.STORAGE, f"{place} is no regular file", expected="the file itself, not a link to it"
            )
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.", suffix=".partial")
        with FileIO(handle, "wb") as file:
            write_all(file, memoryview(preamble.to_bytes()))
            _copy(source, file, payload, progress)
            os.fsync(handle)
        os.replace(temporary, place)
        temporary = ""
        sync_file(place.parent)
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"{place} can't be rewritten", actual=error.strerror) from None
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _copy(source: FileIO, target: FileIO, total: int, progress: ProgressCallback) -> None:
    """``total`` bytes from where ``source`` is to where ``target`` is; shared between them where a file system can."""
    done = 0
    while done < total:
        size = min(_COPY_BYTES, total - done)
        try:
            count = os.copy_file_range(source.fileno(), target.fileno(), size)
        except OSError:  # between some file systems, or where they lack it
            data = source.read(size) or b""
            write_all(target, memoryview(data))
            count = len(data)
        if count == 0:
            raise UnavailableError(
                Reason.STORAGE, "the file became shorter while it was copied", expected=total, actual=done
            )
        done += count
        progress(Progress(Stage.REWRAP, done, total))
