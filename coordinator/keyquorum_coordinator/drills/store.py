"""What is stored of drills: that one began, so that another process can undo it, and how it ended.

One runs at a time, over all coordinators of a database. It belongs to the process that runs it for as long as that one
says so, every few seconds: only what nobody has spoken for in :data:`LEASE_SECONDS` is a dead coordinator's, and is for
whoever takes it first to undo. Coordinators' clocks have to agree to less than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Select, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import DrillPartRow, DrillRow
from keyquorum_coordinator.drills.rehearsal import Order
from keyquorum_coordinator.outbox import enter
from keyquorum_core.drill_report import FULL, DrillReport, Outcome
from keyquorum_core.errors import Reason, StateError
from keyquorum_core.ledger.leaves import Drill

__all__ = [
    "LEASE_SECONDS",
    "RUNNING",
    "KindRecord",
    "Summary",
    "Unfinished",
    "beat",
    "begin",
    "drilled",
    "end",
    "kinds",
    "latest",
    "left_alone",
    "mark_undone",
    "report",
    "take",
]

LEASE_SECONDS: Final = 10
RUNNING: Final = "running"


@dataclass(frozen=True, slots=True)
class Summary:
    """One drill. Times in unix seconds and milliseconds."""

    drill_id: str
    kind: str
    key_id: str
    started_at: int
    duration_ms: int
    state: str
    report_sha256: str


@dataclass(frozen=True, slots=True)
class KindRecord:
    """How a kind went lately: unix seconds, 0 for never. The figures are those of its last run."""

    last_run: int = 0
    last_passed: int = 0
    passed: bool = False
    detect_ms: int | None = None
    recover_ms: int | None = None
    duration_ms: int = 0


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A drill of which something may be in force still."""

    drill_id: str
    kind: str
    key_id: str
    started_at: int
    running: bool
    lift: bytes


def begin(session: Session, order: Order, runner: str, now: int) -> None:
    """One at a time, over all coordinators of the database. Raises ``EXISTS``."""
    rival = session.scalars(select(DrillRow).where(DrillRow.state == RUNNING)).first()
    if rival is not None or session.get(DrillRow, order.drill_id) is not None:
        raise _another(f"{rival.kind}, {rival.drill_id}" if rival is not None else "one with this id")
    session.add(
        DrillRow(
            drill_id=order.drill_id,
            kind=order.kind,
            key_id=order.key_id,
            state=RUNNING,
            runner=runner,
            heartbeat_at=now,
            scheduled=order.scheduled,
            undone=False,
            started_at=now,
            duration_ms=0,
            lift=order.lift or None,
            report_sha256="",
        )
    )
    try:
        session.flush()
    except IntegrityError:  # PostgreSQL lets two look at once
        raise _another("one that began at the same moment") from None


def _another(actual: str) -> StateError:
    return StateError(
        Reason.EXISTS,
        "a drill is under way: one at a time",
        expected="none",
        actual=actual,
        next_step="Wait for its end, or stop it: keyquorum drill cancel",
    )


def beat(session: Session, drill_id: str, runner: str, now: int) -> bool:
    """``runner`` is still at it. False: it was taken for dead, and the drill is another's by now."""
    mine = update(DrillRow).where(DrillRow.drill_id == drill_id, DrillRow.runner == runner)
    found = session.execute(mine.values(heartbeat_at=now).returning(DrillRow.drill_id))
    return found.first() is not None


def end(session: Session, found: DrillReport, envelope: bytes, runner: str, now: int, *, undone: bool) -> None:
    """How it went, with its leaf for the ledger, in one transaction. Raises ``STATE`` where it is not ``runner``'s to
    say, since another coordinator took it for dead."""
    row = session.get_one(DrillRow, found.drill_id, with_for_update=True)
    if (row.runner, row.state) != (runner, RUNNING):
        raise StateError(
            Reason.STATE,
            "another coordinator took this one for dead, and undid its drill",
            expected=f"a heartbeat every {LEASE_SECONDS} s at least",
            next_step="See whether this coordinator stalls, or its clock is wrong; then run the drill again",
        )
    row.state = str(found.outcome)
    row.duration_ms = found.duration_ms
    row.report, row.report_sha256 = envelope, found.digest
    row.undone = undone
    if undone:
        row.lift = None
    for part in found.parts:
        if part.outcome is not Outcome.SKIPPED:
            session.merge(
                DrillPartRow(
                    drill_id=found.drill_id,
                    kind=part.kind,
                    passed=part.outcome is Outcome.PASSED,
                    ended_at=found.started_at + (part.at_ms + part.duration_ms) // 1000,
                    detect_ms=part.detect_ms,
                    recover_ms=part.recover_ms,
                    duration_ms=part.duration_ms,
                )
            )
    leaf = Drill(
        drill=found.kind,
        passed=found.passed,
        report_sha256=found.digest,
        duration_ms=found.duration_ms,
        time=now,
    )
    enter(session, leaf, found.drill_id)


def mark_undone(session: Session, drill_id: str) -> None:
    row = session.get_one(DrillRow, drill_id)
    row.undone, row.lift = True, None


def left_alone(session: Session, runner: str, now: int, but: str = "") -> bool:
    """Whether there is something for :meth:`take`."""
    return session.scalars(_left(runner, now, but)).first() is not None


def take(session: Session, runner: str, now: int, but: str = "") -> list[Unfinished]:
    """Drills of which something may be in force still and that nobody runs or undoes: ``runner`` does from now on. Its
    own are among them, except for the one that it runs, ``but``."""
    rows = list(session.scalars(_left(runner, now, but).with_for_update(skip_locked=True)))
    for row in rows:
        row.runner, row.heartbeat_at = runner, now
    return [
        Unfinished(
            row.drill_id,
            row.kind,
            row.key_id,
            row.started_at,
            row.state == RUNNING,
            bytes(row.lift) if row.lift else b"",
        )
        for row in rows
    ]


def _left(runner: str, now: int, but: str) -> Select[DrillRow]:
    unfinished = DrillRow.undone.is_(False) | (DrillRow.state == RUNNING)
    mine_or_nobody_s = (DrillRow.runner == runner) | (DrillRow.heartbeat_at <= now - LEASE_SECONDS)
    return select(DrillRow).where(unfinished, mine_or_nobody_s, DrillRow.drill_id != but).order_by(DrillRow.started_at)


def drilled(session: Session) -> frozenset[str]:
    """The keys that drills are at, whoever runs them."""
    return frozenset(session.scalars(select(DrillRow.key_id).where(DrillRow.state == RUNNING)))


def report(session: Session, drill_id: str) -> bytes:
    """Raises ``NOT_FOUND``; ``STATE`` while it runs."""
    row = session.get(DrillRow, drill_id)
    if row is None:
        raise StateError(Reason.NOT_FOUND, "no such drill", actual=ascii(drill_id[:40]))
    if row.report is None:
        raise StateError(Reason.STATE, "the drill is under way", expected="one that ended", actual=row.state)
    return bytes(row.report)


def latest(session: Session, count: int = 50) -> list[Summary]:
    query = select(DrillRow).order_by(DrillRow.started_at.desc(), DrillRow.drill_id).limit(count)
    return [
        Summary(row.drill_id, row.kind, row.key_id, row.started_at, row.duration_ms, row.state, row.report_sha256)
        for row in session.scalars(query)
    ]


def kinds(session: Session) -> Mapping[str, KindRecord]:
    """By kind that ever ran."""
    newest = (
        select(DrillPartRow.kind, func.max(DrillPartRow.ended_at).label("at")).group_by(DrillPartRow.kind).subquery()
    )
    both = (DrillPartRow.kind == newest.c.kind) & (DrillPartRow.ended_at == newest.c.at)
    rows = {row.kind: row for row in session.scalars(select(DrillPartRow).join(newest, both))}
    passed = select(DrillPartRow.kind, func.max(DrillPartRow.ended_at).label("at")).where(DrillPartRow.passed.is_(True))
    last = {row.kind: row.at for row in session.execute(passed.group_by(DrillPartRow.kind))}
    out = {
        kind: KindRecord(row.ended_at, last.get(kind, 0), row.passed, row.detect_ms, row.recover_ms, row.duration_ms)
        for kind, row in rows.items()
    }
    whole = select(DrillRow).where(DrillRow.kind == FULL, DrillRow.state != RUNNING)
    fulls = list(session.scalars(whole.order_by(DrillRow.started_at.desc()).limit(1)))
    if fulls:
        at = [
            row.started_at + row.duration_ms // 1000
            for row in session.scalars(
                whole.where(DrillRow.state == "passed").order_by(DrillRow.started_at.desc()).limit(1)
            )
        ]
        full = fulls[0]
        out[FULL] = KindRecord(
            full.started_at + full.duration_ms // 1000,
            at[0] if at else 0,
            full.state == str(Outcome.PASSED),
            duration_ms=full.duration_ms,
        )
    return out
