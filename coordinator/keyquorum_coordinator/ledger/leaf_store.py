"""Leaves that no tile holds yet, the request ids of all, and the tree's right edge where the tiles end.

A leaf is durable here before any checkpoint covers it. Leaves have the numbers ``tiled`` … ``head`` - 1 without a hole:
``append`` is one transaction that goes on exactly where the last one ended, on whatever machine that was. Leaves leave
once the object store holds their tiles; request ids stay for ever, so that no leaf is written twice.

One log a database: SQLite in a file of its own, or PostgreSQL, where an advisory lock keeps coordinators from doing
each other's work. The lock is not what keeps the log whole: the primary key here, and the compare-and-swap on the
checkpoint, are.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import BigInteger, Connection, Integer, LargeBinary, String, delete, func, insert, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from keyquorum_coordinator.ledger.sql_store import SqlStore
from keyquorum_core.errors import Reason, StateError

__all__ = ["FORMAT", "LeafStore", "MovedError", "Stored"]

FORMAT = 1
_IDS_PER_QUERY = 500
_LOCK_WAIT_MS = 2000


class LedgerBase(DeclarativeBase):
    """Tables of the log; no migration makes them, only ``ledger init``."""


class LogRow(LedgerBase):
    """The log. ``tiled``: leaves below it are in full tiles; ``checkpointed``: a size that a checkpoint was known to
    have when the last leaves were written, so that a checkpoint store that fell back is noticed."""

    __tablename__ = "ledger_log"

    origin: Mapped[str] = mapped_column(String(255), primary_key=True)
    format: Mapped[int] = mapped_column(Integer)
    tiled: Mapped[int] = mapped_column(BigInteger)
    checkpointed: Mapped[int] = mapped_column(BigInteger)


class LeafRow(LedgerBase):
    __tablename__ = "ledger_leaves"

    number: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False
    )
    leaf: Mapped[bytes] = mapped_column(LargeBinary)


class RequestRow(LedgerBase):
    __tablename__ = "ledger_requests"

    request_id: Mapped[bytes] = mapped_column(LargeBinary(64), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger)


class EdgeRow(LedgerBase):
    """The partial tile of ``level`` 1 and above in the tree of the first ``tiled`` leaves."""

    __tablename__ = "ledger_edge"

    level: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    hashes: Mapped[bytes] = mapped_column(LargeBinary)


class _LogRow(NamedTuple):
    origin: str
    format: int
    tiled: int
    checkpointed: int


class MovedError(Exception):
    """Somebody else wrote leaves meanwhile: what was about to be done must be looked at again. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What the store holds: leaves ``tiled`` … ``head`` - 1, and the edge by level (1 and above, concatenated hashes)
    of the tree of ``tiled`` leaves."""

    tiled: int
    head: int
    checkpointed: int
    edge: dict[int, bytes]


class LeafStore(SqlStore):
    """Blocking; at most one thread writes. Raises :class:`UnavailableError` (``STORAGE``) where the database fails."""

    def __init__(self, url: str, origin: str) -> None:
        """Raises :class:`MalformedError` for a URL that cannot be used. Opens nothing yet."""
        super().__init__(url, origin, "the ledger's database")
        self._lock_key = int.from_bytes(hashlib.sha256(b"keyquorum ledger " + origin.encode()).digest()[:8], "big") >> 1

    # -- making -------------------------------------------------------------------------------------------------------

    def create(self) -> bool:
        """Make the log's tables and enter the log, once; whether it is new. Only ``ledger init`` calls this."""
        with self._errors(), self._write_engine.begin() as connection:
            LedgerBase.metadata.create_all(connection)
            if self._log(connection) is not None:
                return False
            connection.execute(insert(LogRow).values(origin=self._origin, format=FORMAT, tiled=0, checkpointed=0))
        return True

    def check(self) -> None:
        """The log is here, and of this format. Raises :class:`StateError` (``NOT_FOUND``, ``STATE``)."""
        self._check_file()
        with self._errors(), self._engine.begin() as connection:
            if not self._engine.dialect.has_table(connection, LogRow.__tablename__):
                raise self._absent()
            if self._log(connection) is None:
                raise self._absent()

    # -- reading ------------------------------------------------------------------------------------------------------

    def stored(self) -> Stored:
        """A consistent view. Raises :class:`StateError`: ``NOT_FOUND``; ``STATE`` when leaves are missing between."""
        self._check_file()
        with self._errors(), self._engine.begin() as connection:
            row = self._log(connection)
            if row is None:
                raise self._absent()
            count, first, last = connection.execute(
                select(func.count(), func.min(LeafRow.number), func.max(LeafRow.number))
            ).one()
            edge = {level: bytes(hashes) for level, hashes in connection.execute(select(EdgeRow.level, EdgeRow.hashes))}
        head = row.tiled + count
        if count and (first, last) != (row.tiled, head - 1):
            raise StateError(
                Reason.STATE,
                "the ledger's database has a hole",
                expected=f"leaves {row.tiled}…{head - 1}",
                actual=f"{count} of {first}…{last}",
                next_step="Restore the database from its latest backup; serve nothing from this one",
            )
        return Stored(row.tiled, head, row.checkpointed, edge)

    def leaves(self, first: int, last: int) -> list[bytes]:
        """Leaves ``first`` … ``last`` - 1; fewer when they are in tiles already, or not there yet."""
        query = select(LeafRow.leaf).where(LeafRow.number >= first, LeafRow.number < last).order_by(LeafRow.number)
        with self._errors(), self._engine.begin() as connection:
            return [bytes(leaf) for leaf in connection.scalars(query)]

    # -- writing ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """On PostgreSQL, wait a little until no other coordinator is at work on this log. Going on without the lock, as
        when its holder hangs, or losing it harms nothing."""
        if self._engine.dialect.name != "postgresql":
            yield
            return
        with self._errors(), self._engine.connect() as connection:
            connection.exec_driver_sql(f"SET lock_timeout = {_LOCK_WAIT_MS}")
            try:
                connection.exec_driver_sql("SELECT pg_advisory_lock(%s)", (self._lock_key,))
                connection.commit()
            except OperationalError:
                connection.rollback()
            try:
                yield
            finally:
                # The session may be gone, and the lock with it.
                with contextlib.suppress(DBAPIError):
                    connection.exec_driver_sql("SELECT pg_advisory_unlock_all()")
                    connection.commit()

    def append(self, head: int, checkpointed: int, requests: Sequence[tuple[bytes, bytes]]) -> list[int]:
        """One transaction: the number of each (request id, leaf), in order. Those whose id is known keep the number
        they have (*whatever* leaf they come with: compare it); the rest get ``head``, ``head`` + 1, … and are durable
        when this returns.

        Raises :class:`MovedError` unless the log ends at ``head``.
        """
        try:
            with self._errors(), self._write_engine.begin() as connection:
                known = self._find(connection, [request_id for request_id, _ in requests])
                if any(number >= head for number in known.values()):
                    raise MovedError
                new: dict[bytes, tuple[int, bytes]] = {}
                for request_id, leaf in requests:
                    if request_id not in known and request_id not in new:
                        new[request_id] = (head + len(new), leaf)
                if new:
                    self._check_head(connection, head)
                    leaves = [{"number": number, "leaf": leaf} for number, leaf in new.values()]
                    ids = [{"request_id": request_id, "number": number} for request_id, (number, _) in new.items()]
                    connection.execute(insert(LeafRow), leaves)
                    connection.execute(insert(RequestRow), ids)
                    connection.execute(update(LogRow).values(checkpointed=checkpointed))
        except IntegrityError:  # two sequencers at once, and this one came second
            raise MovedError from None
        return [known[request_id] if request_id in known else new[request_id][0] for request_id, _ in requests]

    def retire(self, old: int, tiled: int, edge: dict[int, bytes]) -> None:
        """Leaves ``old`` … ``tiled`` - 1 are in tiles now. Raises :class:`MovedError` unless tiles ended at ``old``."""
        with self._errors(), self._write_engine.begin() as connection:
            done = connection.execute(update(LogRow).where(LogRow.tiled == old).values(tiled=tiled))
            if done.rowcount != 1:
                raise MovedError
            connection.execute(delete(LeafRow).where(LeafRow.number < tiled))
            connection.execute(delete(EdgeRow))
            if edge:
                connection.execute(
                    insert(EdgeRow), [{"level": level, "hashes": hashes} for level, hashes in edge.items()]
                )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _check_head(self, connection: Connection, head: int) -> None:
        # On PostgreSQL other coordinators write too, one of them perhaps after its lock was lost.
        last = connection.scalar(select(func.max(LeafRow.number)))
        end = connection.scalar(select(LogRow.tiled)) if last is None else last + 1
        if end != head:
            raise MovedError

    def _find(self, connection: Connection, request_ids: Sequence[bytes]) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for start in range(0, len(request_ids), _IDS_PER_QUERY):
            some = request_ids[start : start + _IDS_PER_QUERY]
            query = select(RequestRow.request_id, RequestRow.number).where(RequestRow.request_id.in_(some))
            found.update({bytes(request_id): number for request_id, number in connection.execute(query)})
        return found

    def _log(self, connection: Connection) -> _LogRow | None:
        query = select(LogRow.origin, LogRow.format, LogRow.tiled, LogRow.checkpointed)
        rows = [_LogRow(*row) for row in connection.execute(query)]
        if not rows:
            return None
        row = rows[0]
        if len(rows) != 1 or row.origin != self._origin or row.format != FORMAT:
            raise StateError(
                Reason.STATE,
                "the ledger's database belongs to another log, or to another version of keyquorum-coordinator",
                expected=f"log {self._origin}, format {FORMAT}",
                actual=", ".join(f"log {each.origin}, format {each.format}" for each in rows)[:400],
                next_step="Check ledger_database and ledger_key in coordinator.toml",
            )
        return row

    def _check_file(self) -> None:
        if not self._has_file():
            raise self._absent()

    @staticmethod
    def _absent() -> StateError:
        return StateError(
            Reason.NOT_FOUND,
            "the ledger's database is missing",
            expected="the one that `ledger init` made",
            next_step="Restore it from its latest backup. Only for a log that never had a leaf: "
            "keyquorum-coordinator ledger init",
        )
