"""A copy of the log in a folder, which verifies offline: the read side's files under the read side's names.

Every file is verified on its way. The checkpoint is written last, so that a folder with a checkpoint holds all that it
signs; a copy that was interrupted goes on where it stopped, and one made earlier is brought up to date, provided that
the log extends it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from keyquorum.atomic import make_folder, replace_file, sync_file
from keyquorum.ledger.source import CHECKPOINT, DirectorySource, LogSource, read_checkpoint
from keyquorum.ledger.verification import QUORUM_SECONDS, latest_checkpoint, verify_since
from keyquorum.progress import ProgressCallback, silent
from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_core.ledger.log_trust import LogTrust, QuorumCheckpoint
from keyquorum_core.ledger.replay import plan

__all__ = ["Exported", "export"]


@dataclass(frozen=True, slots=True)
class Exported:
    """A finished copy; ``files`` were fetched, the others were there."""

    latest: QuorumCheckpoint
    folder: Path
    files: int


class _Mirror:
    """The folder's files where they are there, and the log's, which are then kept in the folder."""

    def __init__(self, folder: Path, log: LogSource) -> None:
        self._folder, self._log = folder, log
        self._local = DirectorySource(folder)
        self.fetched: list[Path] = []

    @property
    def where(self) -> str:
        return f"{self._log.where}, copied to {self._folder}"

    async def read(self, path: str, max_bytes: int) -> bytes:
        try:
            return await self._local.read(path, max_bytes)
        except KeyquorumError as error:
            if error.reason not in (Reason.NOT_FOUND, Reason.TOO_LARGE):
                raise
        data = await self._log.read(path, max_bytes)
        file = self._folder / path
        await asyncio.to_thread(_keep, file, data)
        self.fetched.append(file)
        return data

    async def close(self) -> None:
        """The log's connections are their owner's."""


def _keep(file: Path, data: bytes) -> None:
    make_folder(file.parent)
    replace_file(file, data, durable=False)


async def export(
    source: LogSource,
    trust: LogTrust,
    folder: Path,
    *,
    progress: ProgressCallback = silent,
    patience: float = QUORUM_SECONDS,
) -> Exported:
    """Copy the log into ``folder``, made if it is missing, and verify all of it, what was there before included.

    Raises as :func:`verify_log`; a file that does not fit is deleted, so that the next try fetches it again.
    """
    make_folder(folder)
    past = None
    with contextlib.suppress(UnavailableError):
        past = trust.open(await read_checkpoint(DirectorySource(folder))).checkpoint
    latest = await latest_checkpoint(source, trust, patience=patience)
    mirror = _Mirror(folder, source)
    try:
        await verify_since(mirror, latest.checkpoint, past, progress=progress, scratch=True)
    except KeyquorumError as error:
        if "file" in error.details:
            with contextlib.suppress(OSError):
                (folder / error.details["file"]).unlink()
        raise
    await asyncio.to_thread(_finish, folder, mirror.fetched, latest)
    return Exported(latest, folder, len(mirror.fetched))


def _finish(folder: Path, fetched: Iterable[Path], latest: QuorumCheckpoint) -> None:
    try:
        for path in fetched:
            sync_file(path)
        for path in {path.parent for path in fetched}:
            sync_file(path)
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"{folder} can't be written", actual=error.strerror) from None
    replace_file(folder / CHECKPOINT, latest.signed.encode())
    _drop_old_partials(folder, latest.checkpoint.size)


def _drop_old_partials(folder: Path, size: int) -> None:
    """Partial tiles of smaller trees, which no checkpoint in the folder names any more, and what a killed copy left."""
    for stray in folder.glob("tile/**/.*"):
        with contextlib.suppress(OSError):
            stray.unlink()
    wanted = {folder / name.path for name in plan(0, size)}
    for partial in folder.glob("tile/**/*.p/*"):
        if partial not in wanted:
            with contextlib.suppress(OSError):
                partial.unlink()
                partial.parent.rmdir()
