"""Telling whether a file is still the one that was read, by one ``stat`` call."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["Stamp", "settled", "stamp_of"]

_SETTLED_NS = 1_000_000_000

Stamp = tuple[int, int, int, int]
"""Modification time and change time (nanoseconds), inode and size: what tells one version of a file from another."""


def stamp_of(path: str | Path) -> Stamp:
    """Raises :class:`OSError`."""
    found = os.stat(path)
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def settled(stamp: Stamp) -> Stamp | None:
    """The stamp, or None, which equals no stamp: file times are coarse, and what changed a moment ago may change again
    without looking newer."""
    return stamp if time.time_ns() - max(stamp[0], stamp[1]) > _SETTLED_NS else None
