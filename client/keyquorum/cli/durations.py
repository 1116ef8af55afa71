"""Durations on a command line: ``90``, ``90s``, ``30m``, ``12h``, ``30d``, ``2w``, ``1y``, or ``never`` for 0."""

from __future__ import annotations

import re

import typer

__all__ = ["duration", "in_words"]

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
_DURATION = re.compile(r"([0-9]{1,10})([smhdwy]?)", re.ASCII)


def duration(text: str) -> int:
    """Seconds. Raises :class:`typer.BadParameter`, which ends the command as wrong usage."""
    if text == "never":
        return 0
    match = _DURATION.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a duration: write 90s, 30m, 12h, 30d, 2w, 1y or never")
    return int(match[1]) * _UNITS[match[2]]


def in_words(seconds: int) -> str:
    """The duration in the largest unit that divides it."""
    if seconds == 0:
        return "never"
    unit = next(name for name, size in reversed(_UNITS.items()) if name and seconds % size == 0)
    return f"{seconds // _UNITS[unit]}{unit}"
