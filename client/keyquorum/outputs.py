"""Files that come into being whole, or not at all: written beside their place, synced, then linked into it.

They appear in the order in which they were asked for, so that the last one, the data, stands for all. Nothing is ever
replaced.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path

from keyquorum.atomic import sync_file
from keyquorum_core.errors import Reason, StateError, UnavailableError

__all__ = ["Outputs", "outputs"]


class Outputs:
    """Files being written; :meth:`publish` puts them in their places."""

    def __init__(self) -> None:
        self._open: list[tuple[Path, Path, BufferedRandom]] = []

    def create(self, path: Path) -> BufferedRandom:
        """A new file for ``path``, readable and writable. Raises ``EXISTS`` where there is one, ``STORAGE``."""
        if os.path.lexists(path):
            raise _exists(path)
        try:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
            file = os.fdopen(handle, "w+b")
        except OSError as error:
            raise _unwritable(path, error) from None
        self._open.append((path, Path(name), file))
        return file

    def publish(self) -> None:
        """Sync all, then link each into its place, in order."""
        for path, _, file in self._open:
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise _unwritable(path, error) from None
        for path, partial, _ in self._open:
            try:
                os.link(partial, path)
                sync_file(path.parent)
            except FileExistsError:
                raise _exists(path) from None
            except OSError as error:
                raise _unwritable(path, error) from None

    def discard(self) -> None:
        """Close, and remove what is beside the places."""
        for _, partial, file in self._open:
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(OSError):
                partial.unlink()
        self._open.clear()


@contextmanager
def outputs() -> Iterator[Outputs]:
    """What was not published by the end is gone."""
    made = Outputs()
    try:
        yield made
    finally:
        made.discard()


def _exists(path: Path) -> StateError:
    return StateError(Reason.EXISTS, f"{path} is there already", expected="a new file", next_step="Move it away first.")


def _unwritable(path: Path, error: OSError) -> UnavailableError:
    return UnavailableError(Reason.STORAGE, f"{path} can't be written", actual=error.strerror)
