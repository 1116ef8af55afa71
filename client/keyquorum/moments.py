"""Unix seconds as people read them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

__all__ = ["LAST_SECOND", "utc"]

LAST_SECOND: Final = 253_402_300_799
"""The last second of the year 9999, after which there is no calendar."""


def utc(seconds: int) -> str:
    """``2026-11-26 08:15:00``; seconds past :data:`LAST_SECOND`, which a log may have made up, as a number."""
    if seconds > LAST_SECOND:
        return f"{seconds} s after 1970"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
