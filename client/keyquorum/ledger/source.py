"""Where a log's files come from: the interface, and a directory such as ``keyquorum ledger export`` writes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from keyquorum_core.errors import MalformedError, Reason, UnavailableError
from keyquorum_core.ledger.merkle import HASH_SIZE
from keyquorum_core.ledger.notes import MAX_NOTE
from keyquorum_core.ledger.tiles import MAX_ENTRY, TILE_WIDTH, Bundle, Tile, decode_bundle, encode_bundle

__all__ = ["CHECKPOINT", "DirectorySource", "LogSource", "largest", "read_checkpoint", "read_name"]

CHECKPOINT = "checkpoint"


class LogSource(Protocol):
    """Files of one log by the paths of C2SP tlog-tiles. Nothing that comes from it is believed."""

    @property
    def where(self) -> str:
        """The URL or folder, for people."""

    async def read(self, path: str, max_bytes: int) -> bytes:
        """One file. Raises :class:`UnavailableError` when it can't be had (``NOT_FOUND`` when it isn't there), and
        :class:`MalformedError` (``TOO_LARGE``) past ``max_bytes``."""

    async def close(self) -> None:
        """Let go of connections. Nothing is read afterwards."""


def largest(name: Bundle | Tile) -> int:
    """Bytes that the file of this name can have."""
    return name.width * (2 + MAX_ENTRY if isinstance(name, Bundle) else HASH_SIZE)


async def read_name(source: LogSource, name: Bundle | Tile) -> bytes:
    """A tile or bundle. A partial one that is gone is cut from the full one, for which logs may drop it (C2SP
    tlog-tiles). Raises as :meth:`LogSource.read`, and :class:`MalformedError` for a full bundle that is none."""
    try:
        return await source.read(name.path, largest(name))
    except UnavailableError as gone:
        if gone.reason is not Reason.NOT_FOUND or name.width == TILE_WIDTH:
            raise
        missing = gone
    full = Bundle(name.index) if isinstance(name, Bundle) else Tile(name.level, name.index)
    try:
        data = await source.read(full.path, largest(full))
    except UnavailableError as error:
        raise missing if error.reason is Reason.NOT_FOUND else error from None
    if isinstance(name, Bundle):
        return encode_bundle(decode_bundle(data, TILE_WIDTH)[: name.width])
    return data[: name.width * HASH_SIZE]


async def read_checkpoint(source: LogSource) -> bytes:
    """The latest checkpoint, unverified. Raises as :meth:`LogSource.read`."""
    return await source.read(CHECKPOINT, MAX_NOTE)


class DirectorySource:
    """A log as files below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def where(self) -> str:
        return str(self._folder)

    async def read(self, path: str, max_bytes: int) -> bytes:
        return await asyncio.to_thread(self._read, path, max_bytes)

    def _read(self, path: str, max_bytes: int) -> bytes:
        file = self._folder / path
        try:
            with file.open("rb") as opened:
                data = opened.read(max_bytes + 1)
        except FileNotFoundError:
            raise UnavailableError(
                Reason.NOT_FOUND,
                f"the log has no {path}",
                expected=f"a file {file}",
                next_step="Copy the log again with 'keyquorum ledger export'",
            ) from None
        except OSError as error:
            raise UnavailableError(Reason.STORAGE, f"{file} can't be read", actual=error.strerror) from None
        if len(data) > max_bytes:
            raise MalformedError(Reason.TOO_LARGE, f"{path} is too large", expected=f"at most {max_bytes} bytes")
        return data

    async def close(self) -> None:
        """Nothing is held."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
