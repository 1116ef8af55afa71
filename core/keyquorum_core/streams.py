"""Byte streams at core's edge: what artifacts and bundles are read from and written to.

Core opens nothing itself. A role hands in an open file, a socket's file object, or anything else with ``read`` (and,
better, ``readinto``: then no intermediate ``bytes`` are made) or ``write``. An :class:`OSError` of the stream (a full
disk, a lost connection) passes through unchanged: it is the caller's stream.
"""

from __future__ import annotations

from typing import Protocol

from keyquorum_core.errors import Reason, UnavailableError

__all__ = ["Sink", "Source", "fill", "write_all"]


class Source(Protocol):
    """A blocking binary stream to read; ``b""`` means the end. If it also has ``readinto``, that is used."""

    def read(self, size: int, /) -> bytes | None: ...


class Sink(Protocol):
    """A blocking binary stream to write. It must not keep ``data`` after returning: the buffer is used again."""

    def write(self, data: memoryview, /) -> int | None: ...


def fill(source: Source, view: memoryview) -> int:
    """Read until ``view`` is full or the source ends; returns the bytes read. Raises :class:`UnavailableError`."""
    readinto = getattr(source, "readinto", None)
    filled = 0
    while filled < len(view):
        rest = view[filled:]
        count: int | None
        if readinto is not None:
            count = readinto(rest)
        else:
            data = source.read(len(rest))
            count = None if data is None else len(data)
            if data is not None and len(data) <= len(rest):
                rest[: len(data)] = data
        if count is None or not 0 <= count <= len(rest):
            raise UnavailableError(
                Reason.UNAVAILABLE, "the source does not block until it has data", expected="bytes", actual=repr(count)
            )
        if count == 0:
            break
        filled += count
    return filled


def write_all(sink: Sink, view: memoryview) -> None:
    """Write all of ``view``, however little the sink takes at a time. Raises :class:`UnavailableError`."""
    while len(view):
        count = sink.write(view)
        if count is None or not 0 < count <= len(view):
            raise UnavailableError(
                Reason.STORAGE, "the sink did not take the bytes", expected=f"1…{len(view)} taken", actual=repr(count)
            )
        view = view[count:]
