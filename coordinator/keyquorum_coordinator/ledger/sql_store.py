"""What the log's two databases share: they are never made by being opened, and their failures are typed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sqlalchemy.exc import DBAPIError, IntegrityError

from keyquorum_coordinator.database import database_file, make_engine
from keyquorum_core.errors import Reason, UnavailableError

__all__ = ["SqlStore"]


class SqlStore:
    """One log in one database, ``what`` for people. Blocking."""

    def __init__(self, url: str, origin: str, what: str) -> None:
        """Raises :class:`MalformedError` for a URL that cannot be used. Opens nothing yet."""
        self._engine = make_engine(url)
        self._write_engine = self._engine.execution_options(keyquorum_write=True)
        self._file = database_file(self._engine)
        self._origin = origin
        self._what = what

    def _has_file(self) -> bool:
        """Whether SQLite would open a database, rather than make an empty one; true of others."""
        return self._file is None or self._file.is_file()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Failures as :class:`UnavailableError` (``STORAGE``); what a constraint forbids is for the caller."""
        try:
            yield
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise UnavailableError(
                Reason.STORAGE,
                f"{self._what} failed",
                actual=str(error.orig)[:200],
                next_step="Check the disk's free space and the database, then ask again with the same request id",
            ) from None

    def close(self) -> None:
        self._engine.dispose()
