"""A keystore's file before it is unsealed: what may be read of it, and how often somebody guessed."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from keyquorum_core.errors import Reason, StateError, UnavailableError
from keyquorum_custodian import schema
from keyquorum_custodian.sealing.attempts import Attempts
from keyquorum_custodian.sealing.record import Scheme, scheme_of
from keyquorum_custodian.vault import blob, connect, number, storage

__all__ = ["ATTEMPTS", "RECORD", "TOKEN_KEYS", "TOKEN_SEEDS", "UNSCRUBBED", "SealedKeystore", "peek_scheme"]

RECORD: Final = "kek"
"""Where the sealing record is kept among the keystore's values."""
ATTEMPTS: Final = "unseal-attempts"
TOKEN_SEEDS: Final = "token-seeds"  # noqa: S105 - where it is kept
"""The random name by which a token's keys are known as this keystore's seeds."""
TOKEN_KEYS: Final = "token-keys-to-go"  # noqa: S105 - where they are named
"""Wrapping keys in tokens that are no longer, or not yet, of use (:mod:`keyquorum_custodian.token_leftovers`)."""
UNSCRUBBED: Final = "sealing-changed"
"""There while the scheme was changed and what was sealed before may still be in the file or its log."""


@dataclass(slots=True)
class SealedKeystore:
    """One open file without its key; used from one thread, and from one process. Make it with :meth:`open`."""

    path: Path
    custodian_id: str
    record: bytes
    _db: sqlite3.Connection | None = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> SealedKeystore:
        """Raises ``NOT_FOUND``, ``UNSUPPORTED`` (newer schema), ``STATE`` (in use) or ``STORAGE``."""
        if not path.is_file():
            raise StateError(
                Reason.NOT_FOUND, f"there is no keystore at {path}", next_step="Run `keyquorum-custodian init` first."
            )
        db = connect(path)
        try:
            with storage(path):
                schema.refuse_empty(db, str(path))
                schema.migrate(db, str(path))
                meta = dict(db.execute("SELECT name, value FROM meta").fetchall())
                if not {"custodian", RECORD} <= meta.keys():
                    raise UnavailableError(Reason.STORAGE, f"{path} has no key-encryption key: it was never completed")
                if UNSCRUBBED in meta:
                    _scrub(db, path)
            return cls(path, blob(meta["custodian"]).decode(), blob(meta[RECORD]), db)
        except BaseException:
            db.close()
            raise

    @property
    def scheme(self) -> Scheme:
        """What opens it. Raises :class:`MalformedError` for a record that nobody wrote."""
        return scheme_of(self.record)

    def hand_over(self) -> sqlite3.Connection:
        """The connection, which is the caller's from now on."""
        db, self._db = self._connection, None
        return db

    def take_back(self, db: sqlite3.Connection) -> None:
        """What was handed over could not be used."""
        self._db = db

    def token_instance(self) -> bytes:
        """The name under which a token knows its seeds; empty where it has none."""
        with storage(self.path):
            row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (TOKEN_SEEDS,)).fetchone()
        return blob(row[0]) if row else b""

    def close(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise StateError(Reason.STATE, f"{self.path} is not open here any more")
        return self._db

    def newest_roster(self) -> tuple[int, str] | None:
        """``(version, digest)`` of the newest roster this custodian served under."""
        with storage(self.path):
            row = self._connection.execute(
                "SELECT version, digest FROM rosters ORDER BY version DESC LIMIT 1"
            ).fetchone()
        return (number(row[0]), str(row[1])) if row else None

    def attempts(self) -> Attempts:
        with storage(self.path):
            row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (ATTEMPTS,)).fetchone()
        return Attempts.parse(blob(row[0])) if row else Attempts()

    def save_attempts(self, attempts: Attempts) -> None:
        """On the disk when this returns."""
        with storage(self.path):
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (ATTEMPTS, attempts.to_bytes()))


def peek_scheme(path: Path) -> Scheme:
    """What opens the keystore of a custodian that isn't running. Raises as :meth:`SealedKeystore.open`."""
    sealed = SealedKeystore.open(path)
    try:
        return sealed.scheme
    finally:
        sealed.close()


def _scrub(db: sqlite3.Connection, path: Path) -> None:
    """What a death after a change of scheme left undone."""
    (busy, _, _) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise StateError(Reason.STATE, f"{path} is being read, so that its old key cannot be overwritten yet")
    db.execute("DELETE FROM meta WHERE name = ?", (UNSCRUBBED,))
