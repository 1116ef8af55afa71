"""The file beneath a keystore: SQLite, opened by one process, in which every secret is sealed under one key.

A sealed column holds nonce (12 bytes) ‖ ciphertext ‖ tag of AES-256-GCM, with the associated data
``transcript("keyquorum/v1/keystore", table, name or ceremony id, key id, u64be(epoch), u64be(index))``: a ciphertext
moved to another row does not open.

Changes happen in transactions: all of one or nothing, and callers touch their own memory only after the commit. A disk
that is full or failing raises ``STORAGE`` and leaves the file as it was.

Releases that were asked for together are kept in one *group*: a transaction that stays open from one to the next, and
that whoever begins another transaction closes first. What is read meanwhile shows what the group changed. Whoever kept
memory of it (:attr:`Vault.on_lost`) forgets it when the group could not be kept.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, StateError, UnavailableError
from keyquorum_core.transcript import transcript, u64be
from keyquorum_custodian.sealing.token import Token
from keyquorum_custodian.sealing.token_seeds import TokenSeeds

__all__ = ["Group", "Vault", "blob", "connect", "number", "storage"]

_NONCE = 12


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """SQLite's errors as typed ones, saying whether trying again may help."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "locked" in text or "busy" in text:
            raise StateError(
                Reason.STATE,
                f"{path} is in use by another process",
                next_step="Stop the other custodian process; one keystore is served by one process.",
            ) from None
        raise UnavailableError(
            Reason.STORAGE,
            f"{path} could not be read or written; nothing was changed",
            actual=text,
            next_step="Free space on the disk or repair it, then try again.",
        ) from None
    except sqlite3.IntegrityError as error:
        raise StateError(
            Reason.STATE, f"{path} already holds what must be there only once; nothing was changed", actual=str(error)
        ) from None
    except sqlite3.DatabaseError as error:
        raise UnavailableError(
            Reason.STORAGE,
            f"{path} is damaged or not a keystore",
            expected="a keystore made by `keyquorum-custodian init`",
            actual=str(error),
        ) from None


@dataclass(eq=False, slots=True)
class Group:
    """Changes that are kept or lost together. ``error``: why they were lost. Nothing of them may be told before
    :meth:`Vault.settle`."""

    error: KeyquorumError | None = None


@dataclass(slots=True)
class Vault:
    """One open file, used from one thread."""

    path: Path
    custodian_id: str
    _db: sqlite3.Connection
    _kek: AESGCM = field(repr=False)
    _synchronous: str = "FULL"
    _group: Group | None = None
    on_lost: list[Callable[[], None]] = field(default_factory=list)
    """Called when a group is lost."""
    token: Token | None = field(default=None, repr=False)
    """The PKCS#11 token that keeps the keystore's own key, logged in to."""
    token_seeds: TokenSeeds | None = field(default=None, repr=False)
    """Where seeds are, if they are keys of the token."""

    def close(self) -> None:
        """Checkpoint and close. The file is whole without it too."""
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        if self.token is not None:
            self.token.close()

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[None]:
        """All the changes made inside, or none. ``durable``: on the disk before this returns."""
        self.settle()
        with storage(self.path):
            self._synchronise("FULL" if durable else "NORMAL")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._commit()
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def joined(self) -> Iterator[Group]:
        """Changes made inside join the group under way, or begin one; it survives the process once :meth:`settle`
        returned. What is raised inside loses all of the group."""
        group = self._group
        try:
            with storage(self.path):
                if group is None:
                    self._synchronise("NORMAL")
                    self._db.execute("BEGIN IMMEDIATE")
                    group = self._group = Group()
                yield group
        except BaseException as error:
            self._lose(error)
            raise

    def settle(self) -> None:
        """Keep the group under way, or say in it why it is lost."""
        group = self._group
        if group is None:
            return
        try:
            with storage(self.path):
                self._commit()
            self._group = None
        except BaseException as error:
            self._lose(error)
            if not isinstance(error, KeyquorumError):
                raise

    def _lose(self, error: BaseException) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        group.error = (
            error
            if isinstance(error, KeyquorumError)
            else UnavailableError(Reason.STORAGE, f"{self.path} could not be written", actual=type(error).__name__)
        )
        try:
            with contextlib.suppress(sqlite3.Error):  # what cannot be rolled back was never committed either
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        finally:
            for forget in self.on_lost:
                forget()

    def _synchronise(self, mode: str) -> None:
        if mode != self._synchronous:
            self._db.execute(f"PRAGMA synchronous={mode}")
            self._synchronous = mode

    def _commit(self) -> None:
        self._db.execute("COMMIT")

    def _seal(self, secret: bytes, table: str, name: str, key_id: str = "", epoch: int = 0, index: int = 0) -> bytes:
        nonce = os.urandom(_NONCE)
        return nonce + self._kek.encrypt(nonce, secret, _associated(table, name, key_id, epoch, index))

    def _unseal(self, sealed: bytes, table: str, name: str, key_id: str = "", epoch: int = 0, index: int = 0) -> bytes:
        try:
            return self._kek.decrypt(sealed[:_NONCE], sealed[_NONCE:], _associated(table, name, key_id, epoch, index))
        except (InvalidTag, ValueError):
            raise UnavailableError(
                Reason.STORAGE,
                f"{self.path}: a sealed value was changed or moved",
                expected=f"the row written as {table} {name} {key_id} {epoch} {index}".rstrip(),
                next_step="Restore the keystore from a backup, or have the custodian repaired.",
            ) from None

    def _seal_each(
        self, table: str, name: str, key_id: str, epoch: int, secrets: Mapping[int, bytes]
    ) -> Iterator[bytes]:
        """:meth:`_seal` for each of many, by index."""
        begun = _associated_before_index(table, name, key_id, epoch)
        nonces = os.urandom(_NONCE * len(secrets))
        for number, (index, secret) in enumerate(secrets.items()):
            nonce = nonces[_NONCE * number : _NONCE * (number + 1)]
            yield nonce + self._kek.encrypt(nonce, secret, begun + u64be(index))

    def _unseal_each(
        self, table: str, name: str, key_id: str, epoch: int, sealed: Mapping[int, bytes]
    ) -> Iterator[bytes]:
        """:meth:`_unseal` for each of many, by index."""
        begun = _associated_before_index(table, name, key_id, epoch)
        for index, value in sealed.items():
            try:
                yield self._kek.decrypt(value[:_NONCE], value[_NONCE:], begun + u64be(index))
            except (InvalidTag, ValueError):
                yield self._unseal(value, table, name, key_id, epoch, index)  # says which one it is

    def reseal_row(
        self, kek: AESGCM, table: str, key: Sequence[str], row: Sequence[object], into: TokenSeeds | None = None
    ) -> None:
        """Inside a transaction: seal one value under another key. ``row``: the values of the ``key`` columns, then
        name, key id, epoch and index, then what is sealed. Raises ``STORAGE`` for what the present key does not open.
        ``into``: the value is a seed and goes into a token.
        """
        name, key_id, epoch, index, sealed = row[len(key) :]
        bound = (table, str(name), str(key_id), number(epoch), number(index))
        secret = self._unseal(blob(sealed), *bound)
        if into is not None:
            secret = into.put(*bound[1:], secret)
        nonce = os.urandom(_NONCE)
        again = nonce + kek.encrypt(nonce, secret, _associated(*bound))
        where = " AND ".join(f"{column} = ?" for column in key)
        self._db.execute(f"UPDATE {table} SET sealed = ? WHERE {where}", (again, *row[: len(key)]))  # noqa: S608

    def take_key(self, kek: AESGCM, token: Token | None, seeds: TokenSeeds | None) -> Token | None:
        """From now on everything is sealed under ``kek``; returns the token of the key before."""
        before, self._kek, self.token, self.token_seeds = self.token, kek, token, seeds
        return before

    def _rows(self, query: str, *values: object) -> list[tuple[object, ...]]:
        with storage(self.path):
            return self._db.execute(query, values).fetchall()

    def scrub(self) -> None:
        """Leave nothing of what was deleted in the file or beside it.

        ``secure_delete`` has overwritten it in the pages that the log (WAL) holds; they are written back over the
        file's own, and the log, which still has them as they were before, is cut to nothing. Raises ``STORAGE``.
        """
        self.settle()
        with storage(self.path):
            self._synchronise("FULL")
            (busy, _, _) = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StateError(
                Reason.STATE, f"{self.path} is being read, so that what was deleted cannot be overwritten yet"
            )


def connect(path: Path) -> sqlite3.Connection:
    with storage(path):
        db = sqlite3.connect(path, timeout=0.5, isolation_level=None, cached_statements=64)
        # Exclusive: one process serves a keystore, and with it the WAL index stays in that process's memory.
        for pragma in (
            "locking_mode=EXCLUSIVE",
            "journal_mode=WAL",
            "synchronous=FULL",
            "secure_delete=ON",
            "foreign_keys=ON",
            "trusted_schema=OFF",
            "cache_size=-2000",
        ):
            db.execute(f"PRAGMA {pragma}")
    return db


def _associated(table: str, name: str, key_id: str, epoch: int, index: int) -> bytes:
    return transcript(
        "keyquorum/v1/keystore", table.encode(), name.encode(), key_id.encode(), u64be(epoch), u64be(index)
    )


def _associated_before_index(table: str, name: str, key_id: str, epoch: int) -> bytes:
    return _associated(table, name, key_id, epoch, 0)[:-8]


def blob(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise MalformedError(Reason.STORAGE, "the keystore holds a value of the wrong type", expected="bytes")
    return value


def number(value: object) -> int:
    if not isinstance(value, int):
        raise MalformedError(Reason.STORAGE, "the keystore holds a value of the wrong type", expected="an integer")
    return value
