"""Replacing a file: readers, and whoever comes after a crash, see the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_core.streams import write_all

__all__ = ["make_folder", "replace_file", "sync_file"]


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write or replace ``path``, mode 0644. Unless ``durable``, a power cut may still leave it empty or cut short.

    Raises :class:`UnavailableError` (``STORAGE``); then nothing has changed.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            # Without a buffer, so that closing writes nothing more to a full disk.
            with os.fdopen(handle, "wb", buffering=0) as file:
                write_all(file, memoryview(data))
                os.fchmod(handle, 0o644)
                if durable:
                    os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        if durable:
            sync_file(path.parent)
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"{path} can't be written", actual=error.strerror) from None


def sync_file(path: Path) -> None:
    """Have a file or folder on the disk before going on. Raises :class:`OSError`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raises :class:`UnavailableError` (``STORAGE``)."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"{path} can't be made", actual=error.strerror) from None
