"""A custodian whose connection stands and that says nothing: ceremonies go on without it where they may.

Nothing is timed: a silent custodian is one that would answer only after the ceremony is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from keyquorum_coordinator import driving
from keyquorum_coordinator.ceremonies import Ceremonies
from keyquorum_coordinator.database import StaleRow
from keyquorum_core.errors import Reason, StateError, UnavailableError
from keyquorum_core.key_policy import KeyPolicy
from tests.support.ceremonies import Make, Rebuild
from tests.support.custodian import THREE, Committee, build_committee
from tests.support.direct import DirectFanout, DirectLink, MortalDatabase, end_of, open_database

SILENT = "no-1"


@pytest.fixture
def committee(tmp_path: Path) -> Iterator[Committee]:
    built = build_committee(tmp_path / "committee")
    built.open_all()
    built.generate(policy=KeyPolicy(absent_at_most=1))
    yield built
    built.close()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[MortalDatabase]:
    opened = open_database(tmp_path / "coordinator.db")
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driving, "GRACE", 0.05)
    monkeypatch.setattr(driving, "APPROVAL_POLL", 0.2)


def links(step: str) -> tuple[type[DirectLink], asyncio.Event, list[str]]:
    """Links on which one custodian says nothing in one step before the event; and what became of its calls."""
    over, ends = asyncio.Event(), list[str]()

    class Link(DirectLink):
        async def call(self, method: str, request: Any) -> Any:
            if (self.id, method) == (SILENT, step):
                try:
                    await over.wait()
                except asyncio.CancelledError:
                    ends.append("given up")
                    raise
            return await super().call(method, request)

    return Link, over, ends


def stale(database: MortalDatabase) -> list[str]:
    return database.run_read(lambda session: [row.custodian for row in session.scalars(select(StaleRow))])


@pytest.mark.parametrize("step", ["Propose", "Activate"])
async def test_a_rotation_goes_on_without_the_one_that_says_nothing(
    committee: Committee, database: MortalDatabase, step: str
) -> None:
    link, over, ends = links(step)
    ceremonies = Ceremonies(database, DirectFanout(committee, link))  # type: ignore[arg-type]
    end = await end_of(ceremonies, Make.rotate(committee, "key-1").envelope)
    assert end.step == "done"
    assert SILENT in end.note
    assert ends == ["given up"]
    assert not over.is_set()
    assert stale(database) == [SILENT]
    await ceremonies.close()


@pytest.mark.parametrize("step", ["Propose", "Give"])
async def test_a_repair_goes_on_without_a_co_holder_that_nobody_needs(
    tmp_path: Path, database: MortalDatabase, step: str
) -> None:
    four = build_committee(tmp_path / "four", (*THREE, ("de-1", "DE")), {"at_least": 2})
    four.open_all()
    four.generate(policy=KeyPolicy(absent_at_most=1))
    Make.rotate(four, "key-1", present=[name for name in four.ids if name != "is-1"]).activate()
    link, over, ends = links(step)
    ceremonies = Ceremonies(database, DirectFanout(four, link))  # type: ignore[arg-type]
    end = await end_of(ceremonies, Rebuild(four, "key-1", 2, "is-1").envelope)
    assert (end.step, ends) == ("done", ["given up"])
    assert not over.is_set()
    assert four.open("is-1").epochs.active("key-1", 2).state == "active"
    await ceremonies.close()
    four.close()


async def test_whoever_waits_for_its_operator_is_not_silent(committee: Committee, database: MortalDatabase) -> None:
    """Not even two that begin and end to wait at the same time, while an answer is there to be stored."""
    asked = {"is-1": 0, SILENT: 0}

    class Link(DirectLink):
        async def call(self, method: str, request: Any) -> Any:
            if method == "Propose" and self.id in asked:
                asked[self.id] += 1
                await asyncio.sleep(0)
                if asked[self.id] < 4:
                    raise StateError(Reason.APPROVAL, "it waits for this custodian's operator")
            return await super().call(method, request)

    ceremonies = Ceremonies(database, DirectFanout(committee, Link))  # type: ignore[arg-type]
    end = await end_of(ceremonies, Make.rotate(committee, "key-1").envelope)
    assert end.note == ""
    assert asked == {"is-1": 4, SILENT: 4}
    assert stale(database) == []
    assert committee.open(SILENT).epochs.active("key-1", 2).state == "active"
    await ceremonies.close()


async def test_who_is_restarted_while_its_operator_is_asked_is_waited_for(
    committee: Committee, database: MortalDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than one that was never asked would be: it remembers what it was asked."""
    monkeypatch.setattr(driving, "_RETRIES", ())
    monkeypatch.setattr(driving, "APPROVAL_POLL", 0.01)
    asked = 0

    class Link(DirectLink):
        async def call(self, method: str, request: Any) -> Any:
            nonlocal asked
            if method == "Propose" and self.id == SILENT:
                asked += 1
                if asked == 1:
                    raise StateError(Reason.APPROVAL, "it waits for this custodian's operator")
                if asked < 6:
                    raise UnavailableError(Reason.UNAVAILABLE, "it is being restarted")
            return await super().call(method, request)

    ceremonies = Ceremonies(database, DirectFanout(committee, Link))  # type: ignore[arg-type]
    end = await end_of(ceremonies, Make.rotate(committee, "key-1").envelope)
    assert (end.step, end.note, asked) == ("done", "", 6)
    assert stale(database) == []
    await ceremonies.close()


async def test_who_puts_it_before_its_operator_while_the_others_are_done_is_not_silent(
    committee: Committee, database: MortalDatabase
) -> None:
    asked = 0

    class Link(DirectLink):
        async def call(self, method: str, request: Any) -> Any:
            nonlocal asked
            if method == "Propose" and self.id == SILENT:
                asked += 1
                if asked == 1:
                    await asyncio.sleep(driving.GRACE / 2)  # the others' answers have been enough since
                if asked < 3:
                    raise StateError(Reason.APPROVAL, "it waits for this custodian's operator")
            return await super().call(method, request)

    ceremonies = Ceremonies(database, DirectFanout(committee, Link))  # type: ignore[arg-type]
    end = await end_of(ceremonies, Make.rotate(committee, "key-1").envelope)
    assert (end.step, end.note, asked) == ("done", "", 3)
    assert stale(database) == []
    await ceremonies.close()


async def test_a_key_is_not_generated_without_anybody(committee: Committee, database: MortalDatabase) -> None:
    link, over, ends = links("Propose")
    ceremonies = Ceremonies(database, DirectFanout(committee, link))  # type: ignore[arg-type]
    events: list[Any] = []
    others = asyncio.Event()

    async def follow() -> None:
        async for event in ceremonies.run(Make(committee, committee.plan("key-2")).envelope):
            events.append(event)
            if event.done == 2:
                others.set()

    following = asyncio.create_task(follow())
    await others.wait()
    await asyncio.sleep(4 * driving.GRACE)
    assert {str(event.step) for event in events} == {"propose"}
    over.set()
    await following
    assert (events[-1].step, ends) == ("done", [])
    await ceremonies.close()
