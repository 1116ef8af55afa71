"""The latest checkpoint, in a store of its own, changed by compare-and-swap only.

This is where a log commits itself: a checkpoint leaves the process after it is here, and it gets here only in place of
the one it extends. The store is made by ``ledger init`` and by nothing else. One that is missing, or older than the
leaves say, is a refusal to start: to begin anew would be a fork.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Integer, LargeBinary, String, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from keyquorum_coordinator.ledger.sql_store import SqlStore
from keyquorum_core.errors import Reason, StateError
from keyquorum_core.ledger.log_keys import SignedCheckpoint

__all__ = ["CheckpointStore"]

FORMAT = 1


class CheckpointBase(DeclarativeBase):
    """The one table; no migration makes it, only ``ledger init``."""


class CheckpointRow(CheckpointBase):
    """``note``: the latest checkpoint as the log signed it. ``witnessed``: the latest one with cosignatures, or empty;
    it is never newer."""

    __tablename__ = "ledger_checkpoint"

    origin: Mapped[str] = mapped_column(String(255), primary_key=True)
    format: Mapped[int] = mapped_column(Integer)
    size: Mapped[int] = mapped_column(BigInteger)
    note: Mapped[bytes] = mapped_column(LargeBinary)
    witnessed_size: Mapped[int] = mapped_column(BigInteger)
    witnessed: Mapped[bytes] = mapped_column(LargeBinary)


class CheckpointStore(SqlStore):
    """Blocking. Raises :class:`UnavailableError` (``STORAGE``) where the database fails."""

    def __init__(self, url: str, origin: str) -> None:
        """Raises :class:`MalformedError` for a URL that cannot be used. Opens nothing yet."""
        super().__init__(url, origin, "the ledger's checkpoint store")

    def create(self, first: SignedCheckpoint) -> None:
        """Enter the first checkpoint. Raises :class:`StateError` (``EXISTS``): one that is there is never replaced."""
        row = {
            "origin": self._origin, "format": FORMAT, "size": first.checkpoint.size, "note": first.encode(),
            "witnessed_size": 0, "witnessed": b"",
        }  # fmt: skip
        try:
            with self._errors(), self._write_engine.begin() as connection:
                CheckpointBase.metadata.create_all(connection)
                connection.execute(insert(CheckpointRow).values(row))
        except IntegrityError:
            raise StateError(
                Reason.EXISTS,
                f"log {self._origin} has a checkpoint already; it was not changed",
                next_step="Serve it, or choose another ledger_checkpoint for another log",
            ) from None

    def exists(self) -> bool:
        """Whether there is a checkpoint of this log."""
        if not self._has_file():
            return False
        with self._errors(), self._engine.begin() as connection:
            if not self._engine.dialect.has_table(connection, CheckpointRow.__tablename__):
                return False
            query = select(CheckpointRow.size).where(CheckpointRow.origin == self._origin)
            return connection.scalar(query) is not None

    def read(self) -> tuple[bytes, bytes]:
        """The latest checkpoint as signed, and the latest witnessed one, empty where there is none; both notes.

        Raises :class:`StateError`: ``NOT_FOUND``, ``STATE`` (another format).
        """
        if not self._has_file():
            raise self._absent()
        query = select(CheckpointRow.format, CheckpointRow.note, CheckpointRow.witnessed)
        with self._errors(), self._engine.begin() as connection:
            if not self._engine.dialect.has_table(connection, CheckpointRow.__tablename__):
                raise self._absent()
            row = connection.execute(query.where(CheckpointRow.origin == self._origin)).first()
        if row is None:
            raise self._absent()
        if row.format != FORMAT:
            raise StateError(
                Reason.STATE,
                "the ledger's checkpoint was written by another version of keyquorum-coordinator",
                expected=f"format {FORMAT}",
                actual=f"format {row.format}",
            )
        return bytes(row.note), bytes(row.witnessed)

    def swap(self, old: bytes, new: SignedCheckpoint) -> bool:
        """Put ``new`` in place of the note ``old``, durably; False, and nothing changed, when another one is there."""
        change = (
            update(CheckpointRow)
            .where(CheckpointRow.origin == self._origin, CheckpointRow.note == old)
            .values(size=new.checkpoint.size, note=new.encode())
        )
        with self._errors(), self._write_engine.begin() as connection:
            return connection.execute(change).rowcount == 1

    def set_witnessed(self, old: bytes, new: SignedCheckpoint) -> bool:
        """Put ``new`` in place of the witnessed note ``old``; False, and nothing changed, when another one is there."""
        change = (
            update(CheckpointRow)
            .where(
                CheckpointRow.origin == self._origin,
                CheckpointRow.witnessed == old,
                CheckpointRow.size >= new.checkpoint.size,
            )
            .values(witnessed_size=new.checkpoint.size, witnessed=new.encode())
        )
        with self._errors(), self._write_engine.begin() as connection:
            return connection.execute(change).rowcount == 1

    @staticmethod
    def _absent() -> StateError:
        return StateError(
            Reason.NOT_FOUND,
            "the log's latest checkpoint is missing",
            expected="the one in ledger_checkpoint, which `ledger init` made",
            next_step="Restore it from its latest backup, or from a witness with `ledger restore`. "
            "Only for a log that never had a leaf: keyquorum-coordinator ledger init",
        )
