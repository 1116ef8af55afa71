"""Reading the small files that a role is given: bounded, and with one typed error for each thing that can be wrong."""

from __future__ import annotations

import stat
from pathlib import Path

from keyquorum_core.errors import MalformedError, Reason, RefusedError, UnavailableError

__all__ = ["read_bytes", "read_private"]

_MAX_FILE = 16 << 20


def read_bytes(path: Path, what: str, max_bytes: int = _MAX_FILE) -> bytes:
    """A file's bytes; ``what`` names it in errors, as "the roster".

    Raises :class:`UnavailableError` (``NOT_FOUND``, ``STORAGE``), :class:`MalformedError` (``TOO_LARGE``).
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UnavailableError(Reason.NOT_FOUND, f"{what} is missing", expected=f"a file {path}") from None
    except OSError as error:
        raise UnavailableError(
            Reason.STORAGE, f"{what} cannot be read", expected=f"a readable file {path}", actual=error.strerror
        ) from None
    if len(data) > max_bytes:
        raise MalformedError(
            Reason.TOO_LARGE, f"{what} is too large", expected=f"at most {max_bytes} bytes", actual=f"more in {path}"
        )
    return data


def read_private(path: Path, what: str, max_bytes: int, harm: str) -> bytes:
    """As :func:`read_bytes`, of a file that holds private keys. ``harm``: what others who read it can do.

    Raises ``ROLE``, too, for a file that others may read.
    """
    data = read_bytes(path, what, max_bytes)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise RefusedError(
            Reason.ROLE,
            f"others may read {what} in {path}",
            expected="mode 0600",
            actual=f"mode {mode:04o}",
            next_step=f"chmod 600 {path}; whoever did read it can {harm}",
        )
    return data
