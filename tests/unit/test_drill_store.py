"""Whose a drill is, by what is stored: one at a time over all coordinators, and its own coordinator's while that one
says that it runs it. Times are passed in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import Database, OutboxRow
from keyquorum_coordinator.drills import store
from keyquorum_coordinator.drills.rehearsal import Order
from keyquorum_core.drill_report import Check, DrillReport, Moment, Outcome, Part
from keyquorum_core.errors import Reason, StateError
from tests.support.direct import open_database

ONE, TWO = "01" * 16, "02" * 16
HERE, THERE = "aa" * 16, "bb" * 16
AT = 1_800_000_000
LATER = AT + store.LEASE_SECONDS


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(tmp_path / "drills.db")
    yield opened
    opened.close()


def begin(database: Database, drill_id: str = ONE, runner: str = HERE, kind: str = "repair", lift: bytes = b"") -> None:
    order = Order(drill_id, kind, "canary", b"", lift)
    database.run_write(lambda session: store.begin(session, order, runner, AT))


def end(database: Database, runner: str, *, undone: bool = True, drill_id: str = ONE) -> None:
    report = DrillReport(
        drill_id, "repair", "demo", "main", "canary", "0" * 64, AT, 7, Outcome.INTERRUPTED,
        (Part("repair", 0, 7, Outcome.INTERRUPTED, cause="cut off"),), (Moment(0, "repair", "note", "", ""),),
    )  # fmt: skip
    database.run_write(lambda session: store.end(session, report, b"signed", runner, AT + 1, undone=undone))


def taken(database: Database, runner: str, now: int, but: str = "") -> list[str]:
    there = database.run_read(lambda session: store.left_alone(session, runner, now, but))
    found = database.run_write(lambda session: store.take(session, runner, now, but))
    assert there == bool(found)
    return [each.drill_id for each in found]


def refused(reason: Reason, *arguments: object, **named: object) -> None:
    call, *rest = arguments
    with pytest.raises(StateError) as caught:
        call(*rest, **named)  # type: ignore[operator]
    assert caught.value.reason is reason


def test_one_drill_at_a_time_over_all_coordinators(database: Database) -> None:
    begin(database)
    refused(Reason.EXISTS, begin, database, TWO, THERE)
    assert database.run_read(store.drilled) == {"canary"}
    end(database, HERE)
    refused(Reason.EXISTS, begin, database)  # the same one again
    assert database.run_read(store.drilled) == frozenset()
    begin(database, TWO, THERE)


class Blind:
    """A session that sees no other drill, as READ COMMITTED lets two see none that begin at once."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def scalars(self, *_: object) -> Any:
        return SimpleNamespace(first=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def test_two_that_begin_at_the_same_moment_are_told_apart_by_the_database(database: Database) -> None:
    begin(database)
    order = Order(TWO, "repair", "canary")
    refused(
        Reason.EXISTS,
        database.run_write,
        lambda session: store.begin(Blind(session), order, THERE, AT),  # type: ignore[arg-type]
    )
    assert [each.drill_id for each in database.run_read(store.latest)] == [ONE]


def test_a_drill_is_taken_only_when_nobody_has_spoken_for_it(database: Database) -> None:
    begin(database, lift=b"lift")
    assert taken(database, THERE, LATER - 1) == []
    assert database.run_write(lambda session: store.beat(session, ONE, HERE, AT + 5))
    assert not database.run_write(lambda session: store.beat(session, ONE, THERE, AT + 900))
    assert taken(database, THERE, LATER + 4) == []
    (left,) = database.run_write(lambda session: store.take(session, THERE, LATER + 5))
    assert (left.drill_id, left.running, left.lift) == (ONE, True, b"lift")
    # It is the other's now, for as long as that one lives: the first hears it at its next beat, and cannot report it.
    assert not database.run_write(lambda session: store.beat(session, ONE, HERE, LATER + 6))
    assert taken(database, HERE, LATER + 6) == []
    refused(Reason.STATE, end, database, HERE)
    end(database, THERE)
    assert taken(database, HERE, LATER + 900) == taken(database, THERE, LATER + 900) == []
    refused(Reason.STATE, end, database, THERE)  # once
    assert len(database.run_read(lambda session: session.query(OutboxRow).all())) == 1


def test_what_could_not_be_undone_is_its_own_coordinator_s_at_once_and_another_s_when_that_one_is_gone(
    database: Database,
) -> None:
    begin(database)
    assert taken(database, HERE, AT, but=ONE) == []  # it runs here
    end(database, HERE, undone=False)
    assert taken(database, THERE, AT + 1) == []
    assert taken(database, HERE, AT + 1) == [ONE]
    assert taken(database, THERE, LATER + 1) == [ONE]
    database.run_write(lambda session: store.mark_undone(session, ONE))
    assert taken(database, HERE, LATER + 900) == []


def test_how_kinds_went_is_told_by_their_last_run_and_the_last_that_passed(database: Database) -> None:
    def went(drill_id: str, at: int, outcome: Outcome, took: int) -> None:
        order = Order(drill_id, "repair", "canary")
        checks = (Check("all is well", "yes", "yes", True),) if outcome is Outcome.PASSED else ()
        cause = "" if checks else "cut off"
        part = Part("repair", 0, took, outcome, ("ch-1",), 5, None, "", cause, checks)
        moments = (Moment(0, "repair", "note", "", ""),)
        report = DrillReport(
            drill_id, "repair", "demo", "main", "canary", "0" * 64, at, took, outcome, (part,), moments
        )
        database.run_write(lambda session: store.begin(session, order, HERE, at))
        database.run_write(lambda session: store.end(session, report, b"signed", HERE, at + took, undone=True))

    assert database.run_read(store.kinds) == {}
    went(ONE, AT, Outcome.PASSED, 2000)
    assert database.run_read(store.kinds) == {"repair": store.KindRecord(AT + 2, AT + 2, True, 5, None, 2000)}
    went(TWO, AT + 100, Outcome.INTERRUPTED, 1000)  # a run: what is scheduled does not begin again at once
    assert database.run_read(store.kinds) == {"repair": store.KindRecord(AT + 101, AT + 2, False, 5, None, 1000)}
