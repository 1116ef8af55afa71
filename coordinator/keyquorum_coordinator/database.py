"""The coordinator's tables, and how the event loop reaches them without ever waiting for a disk.

SQLAlchemy on SQLite by default; types and statements are those PostgreSQL has too. All changes go through one writer
thread, each in one transaction; reads run on threads of their own, which SQLite's WAL lets them do beside the writer.
``synchronous=FULL``: owners and workers act on what a commit told them, so it must survive a power cut, and a job has
only a dozen commits. The hot path, releases, touches the database after its answers have left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    BigInteger,
    Boolean,
    Engine,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    text,
)
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from keyquorum_core.errors import MalformedError, Reason, UnavailableError

__all__ = [
    "ArtifactPartRow",
    "ArtifactRow",
    "Base",
    "BulletinRow",
    "CeremonyAnswerRow",
    "CeremonyReceiptRow",
    "CeremonyRow",
    "ClockRow",
    "Database",
    "DrillPartRow",
    "DrillRow",
    "EventRow",
    "JobRow",
    "KeyRow",
    "OutboxRow",
    "ReceiptRow",
    "ReleaseRow",
    "database_file",
    "make_engine",
]

T = TypeVar("T")
_READERS = 2


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class JobRow(Base):
    """Times are unix seconds. ``error`` is the JSON of :meth:`KeyquorumError.as_dict`."""

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_state_ready_at", "state", "ready_at"), Index("ix_jobs_owner", "owner"))

    job_id: Mapped[str] = mapped_column(String(26), primary_key=True)
    owner: Mapped[str] = mapped_column(String(256))
    key_id: Mapped[str] = mapped_column(String(64))
    epoch: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(16))
    manifest: Mapped[bytes] = mapped_column(LargeBinary)
    opening: Mapped[bytes | None] = mapped_column(LargeBinary)
    statement: Mapped[bytes | None] = mapped_column(LargeBinary)
    error: Mapped[str | None] = mapped_column(Text)
    worker: Mapped[str | None] = mapped_column(String(256))
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[int] = mapped_column(BigInteger)
    updated_at: Mapped[int] = mapped_column(BigInteger)
    ready_at: Mapped[int | None] = mapped_column(BigInteger)
    heartbeat_at: Mapped[int | None] = mapped_column(BigInteger)
    not_after: Mapped[int] = mapped_column(BigInteger)
    last_event: Mapped[int] = mapped_column(BigInteger, default=0)


class EventRow(Base):
    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    time: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(16))
    detail: Mapped[str] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(Text)


class ArtifactRow(Base):
    """``generation`` names the upload whose parts count; ``sha256`` is set once the artifact is complete."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(8), primary_key=True)
    generation: Mapped[str] = mapped_column(String(32))
    committed: Mapped[int] = mapped_column(BigInteger)
    complete: Mapped[bool] = mapped_column(Boolean)
    sha256: Mapped[bytes | None] = mapped_column(LargeBinary)
    updated_at: Mapped[int] = mapped_column(BigInteger)


class ArtifactPartRow(Base):
    """``prefix_sha256``: SHA-256 of the artifact up to and with this part, so that one pass over what is stored both
    checks it and brings a hash up to where an upload goes on."""

    __tablename__ = "artifact_parts"
    __table_args__ = (ForeignKeyConstraint(["job_id", "kind"], ["artifacts.job_id", "artifacts.kind"]),)

    job_id: Mapped[str] = mapped_column(String(26), primary_key=True)
    kind: Mapped[str] = mapped_column(String(8), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    offset: Mapped[int] = mapped_column(BigInteger)
    size: Mapped[int] = mapped_column(BigInteger)
    prefix_sha256: Mapped[bytes] = mapped_column(LargeBinary)


class ReleaseRow(Base):
    """The latest release of a job to a worker. Holds no share, sealed or not."""

    __tablename__ = "releases"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    worker: Mapped[str] = mapped_column(String(256))
    leaf: Mapped[bytes] = mapped_column(LargeBinary)
    leaf_index: Mapped[int] = mapped_column(BigInteger)
    evidence: Mapped[bytes] = mapped_column(LargeBinary)
    recorded_at: Mapped[int] = mapped_column(BigInteger)


class ReceiptRow(Base):
    __tablename__ = "receipts"

    job_id: Mapped[str] = mapped_column(ForeignKey("releases.job_id"), primary_key=True)
    custodian: Mapped[str] = mapped_column(String(32), primary_key=True)
    key_id: Mapped[str] = mapped_column(String(64))
    epoch: Mapped[int] = mapped_column(BigInteger)
    window: Mapped[int] = mapped_column(BigInteger)
    sealed_sha256: Mapped[bytes] = mapped_column(LargeBinary)
    signature: Mapped[bytes] = mapped_column(LargeBinary)
    window_statement: Mapped[bytes] = mapped_column(LargeBinary)


class CeremonyRow(Base):
    """``present``: who takes part, once that is settled, and ``waiting``: whose operators have to approve; ids, joined
    by spaces. ``error``: why it was given up, or what keeps it where it is. ``number``: the order they began in,
    where ``created_at`` tells whole seconds only."""

    __tablename__ = "ceremonies"

    ceremony_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, server_default="0", index=True)
    kind: Mapped[str] = mapped_column(String(16), server_default="generate")
    plan: Mapped[bytes] = mapped_column(LargeBinary)
    key_id: Mapped[str] = mapped_column(String(64))
    epoch: Mapped[int] = mapped_column(BigInteger)
    step: Mapped[str] = mapped_column(String(16))
    present: Mapped[str] = mapped_column(Text, default="", server_default="")
    waiting: Mapped[str] = mapped_column(Text, default="", server_default="")
    certificate: Mapped[bytes | None] = mapped_column(LargeBinary)
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger)
    updated_at: Mapped[int] = mapped_column(BigInteger)


class CeremonyAnswerRow(Base):
    """What a custodian answered at a step: kept until the ceremony ends, so that a restart asks only the others."""

    __tablename__ = "ceremony_answers"

    ceremony_id: Mapped[str] = mapped_column(ForeignKey("ceremonies.ceremony_id"), primary_key=True)
    step: Mapped[str] = mapped_column(String(16), primary_key=True)
    custodian: Mapped[str] = mapped_column(String(32), primary_key=True)
    answer: Mapped[bytes] = mapped_column(LargeBinary)


class BulletinRow(Base):
    """The last document of a kind that was accepted: nothing older is taken again."""

    __tablename__ = "bulletins"

    kind: Mapped[str] = mapped_column(String(32), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(64))
    envelope: Mapped[bytes] = mapped_column(LargeBinary)
    accepted_at: Mapped[int] = mapped_column(BigInteger)


class ClockRow(Base):
    """The latest time that was seen, unix seconds."""

    __tablename__ = "clocks"

    name: Mapped[str] = mapped_column(String(16), primary_key=True)
    highest: Mapped[int] = mapped_column(BigInteger)


class CeremonyReceiptRow(Base):
    """What a custodian signed at the end of a ceremony: that it was rebuilt, or that it erased its seeds."""

    __tablename__ = "ceremony_receipts"

    ceremony_id: Mapped[str] = mapped_column(ForeignKey("ceremonies.ceremony_id"), primary_key=True)
    custodian: Mapped[str] = mapped_column(String(32), primary_key=True)
    receipt: Mapped[bytes] = mapped_column(LargeBinary)


class KeyRow(Base):
    """One epoch. ``state``: active, retired, destroyed."""

    __tablename__ = "keys"

    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    epoch: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(String(16))
    certificate: Mapped[bytes] = mapped_column(LargeBinary)
    ceremony_id: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[int] = mapped_column(BigInteger)
    retired_at: Mapped[int | None] = mapped_column(BigInteger)
    ended_at: Mapped[int | None] = mapped_column(BigInteger)


class StaleRow(Base):
    """A custodian that lacks an epoch, as far as this coordinator knows: it was absent, or missed the end."""

    __tablename__ = "stale_custodians"

    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    epoch: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    custodian: Mapped[str] = mapped_column(String(32), primary_key=True)
    since: Mapped[int] = mapped_column(BigInteger)
    cause: Mapped[str] = mapped_column(Text)


class RosterRow(Base):
    """Every roster this coordinator worked under: custodians that join later know the earlier ones by their digests."""

    __tablename__ = "rosters"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
    envelope: Mapped[bytes] = mapped_column(LargeBinary)


class TelemetryRow(Base):
    """A batch of a worker's telemetry, records encrypted; ``evidence`` with the first of each chain."""

    __tablename__ = "telemetry"
    __table_args__ = (UniqueConstraint("job_id", "worker_sha256", "sequence"),)

    number: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), index=True)
    worker_sha256: Mapped[str] = mapped_column(String(64))
    sequence: Mapped[int] = mapped_column(Integer)
    peer: Mapped[str] = mapped_column(String(256))
    statement: Mapped[bytes] = mapped_column(LargeBinary)
    content: Mapped[bytes] = mapped_column(LargeBinary)
    size: Mapped[int] = mapped_column(Integer)
    leaf: Mapped[bytes] = mapped_column(LargeBinary)
    last: Mapped[bool] = mapped_column(Boolean)
    evidence: Mapped[bytes | None] = mapped_column(LargeBinary)


class QuarantineRow(Base):
    """A worker that gets no jobs while ``lifted_at`` is empty. ``revoked``: the revocation that it follows from, which
    ends it too. Never deleted."""

    __tablename__ = "worker_quarantine"

    number: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    worker: Mapped[str] = mapped_column(String(256), index=True)
    reason: Mapped[str] = mapped_column(String(40))
    message: Mapped[str] = mapped_column(Text)
    job_id: Mapped[str] = mapped_column(String(26))
    evidence_sha256: Mapped[str] = mapped_column(String(64))
    custodians: Mapped[str] = mapped_column(Text)
    raised_at: Mapped[int] = mapped_column(BigInteger)
    lifted_at: Mapped[int | None] = mapped_column(BigInteger)
    why: Mapped[str | None] = mapped_column(Text)
    revoked: Mapped[str] = mapped_column(String(320), default="", server_default="")


class DrillRow(Base):
    """``state``: running, passed, failed, interrupted. ``runner``: the coordinator's process that runs or undoes it, as
    of ``heartbeat_at``. ``undone``: whether all that it injected is known to be gone; ``lift``: the operators' document
    that is still to be handed over for that. ``report``: DSSE envelope."""

    __tablename__ = "drills"
    __table_args__ = (
        Index(
            "uq_drills_running",
            "state",
            unique=True,
            sqlite_where=text("state = 'running'"),
            postgresql_where=text("state = 'running'"),
        ),
    )

    drill_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), index=True)
    key_id: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    runner: Mapped[str] = mapped_column(String(32))
    heartbeat_at: Mapped[int] = mapped_column(BigInteger)
    scheduled: Mapped[bool] = mapped_column(Boolean)
    undone: Mapped[bool] = mapped_column(Boolean)
    started_at: Mapped[int] = mapped_column(BigInteger)
    duration_ms: Mapped[int] = mapped_column(BigInteger)
    lift: Mapped[bytes | None] = mapped_column(LargeBinary)
    report: Mapped[bytes | None] = mapped_column(LargeBinary)
    report_sha256: Mapped[str] = mapped_column(String(64))


class DrillPartRow(Base):
    """How one kind went in a drill, for schedules and figures: of a full drill, each of its parts."""

    __tablename__ = "drill_parts"

    drill_id: Mapped[str] = mapped_column(ForeignKey("drills.drill_id"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), primary_key=True)
    passed: Mapped[bool] = mapped_column(Boolean)
    ended_at: Mapped[int] = mapped_column(BigInteger)
    detect_ms: Mapped[int | None] = mapped_column(BigInteger)
    recover_ms: Mapped[int | None] = mapped_column(BigInteger)
    duration_ms: Mapped[int] = mapped_column(BigInteger)


class OutboxRow(Base):
    """A leaf for the ledger, stored with the change that it tells of, until it is in the ledger."""

    __tablename__ = "ledger_outbox"

    number: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    request_id: Mapped[bytes] = mapped_column(LargeBinary(64), unique=True)
    leaf: Mapped[bytes] = mapped_column(LargeBinary)


def make_engine(url: str) -> Engine:
    """An engine for a database URL. Raises :class:`MalformedError` for one that SQLAlchemy cannot use."""
    try:
        parsed = make_url(url)
        engine = create_engine(parsed)
    except (ArgumentError, ImportError) as error:
        raise MalformedError(
            Reason.UNSUPPORTED, "the database URL cannot be used", expected="sqlite:///… or postgresql+…", actual=error
        ) from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _sqlite_pragmas)
        event.listen(engine, "begin", _sqlite_begin)
    return engine


def database_file(engine: Engine) -> Path | None:
    """The file that must be there before a connection is made, where SQLite would make an empty one in its place."""
    database = engine.url.database
    return Path(database) if engine.dialect.name == "sqlite" and database else None


def _sqlite_pragmas(connection: Any, _record: object) -> None:
    # The driver would begin transactions only before the first change; we begin them ourselves, below.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _sqlite_begin(connection: Connection) -> None:
    # IMMEDIATE takes the write lock at once, instead of failing half-way when another process wrote in between.
    immediate = connection.get_execution_options().get("keyquorum_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


class Database:
    """Transactions for the event loop. ``work`` runs on another thread with a session, and must not keep rows."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._write_engine = engine.execution_options(keyquorum_write=True)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="db-writer")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="db-reader")

    async def write(self, work: Callable[[Session], T]) -> T:
        """One transaction: committed when ``work`` returns, rolled back when it raises.

        Raises :class:`UnavailableError` (``STORAGE``) when the database did not take it; then nothing changed.
        """
        return await asyncio.get_running_loop().run_in_executor(self._writer, self.run_write, work)

    async def read(self, work: Callable[[Session], T]) -> T:
        """A consistent view. Raises :class:`UnavailableError` (``STORAGE``)."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self.run_read, work)

    def run_write(self, work: Callable[[Session], T]) -> T:
        """:meth:`write` on the calling thread."""
        return _transaction(self._write_engine, work)

    def run_read(self, work: Callable[[Session], T]) -> T:
        """:meth:`read` on the calling thread."""
        return _transaction(self.engine, work)

    def close(self) -> None:
        """Waits for what is running, then closes every connection."""
        self._writer.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        self.engine.dispose()


def _transaction(engine: Engine, work: Callable[[Session], T]) -> T:
    try:
        with Session(engine, expire_on_commit=False) as session, session.begin():
            return work(session)
    except DBAPIError as error:
        raise UnavailableError(
            Reason.STORAGE,
            "the coordinator's database failed; nothing was changed",
            actual=str(error.orig)[:200],
            next_step="Check the disk's free space and the database, then try again",
        ) from None
