"""Drills by the clock, and what their age looks like to whoever watches it. Times are passed in, unix seconds."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Mapping

import pytest

from keyquorum_coordinator.config import DrillSettings
from keyquorum_coordinator.drills import schedule as scheduling
from keyquorum_coordinator.drills.rehearsal import Order
from keyquorum_coordinator.drills.schedule import Schedule, due
from keyquorum_coordinator.drills.store import KindRecord
from keyquorum_coordinator.metrics import Metrics
from keyquorum_core.drill_report import FULL, KINDS
from keyquorum_core.errors import KeyquorumError, Reason, StateError, UnavailableError

T = 1_800_000_000
DAY = 86400


class Drills:
    """What a schedule knows of them: each passes at once, at ``now``."""

    def __init__(self, **schedule: int) -> None:
        self.settings = DrillSettings("canary", "public", {name.replace("_", "-"): at for name, at in schedule.items()})
        self.running = ""
        self.records: dict[str, KindRecord] = {}
        self.now = T
        self.ordered: list[Order] = []
        self.resumed = 0
        self.looked, self.began = asyncio.Event(), asyncio.Event()
        self.refusal: KeyquorumError | None = None
        self.broken: KeyquorumError | None = None

    async def resume(self) -> int:
        self.resumed += 1
        self.looked.set()
        if self.broken is not None:
            raise self.broken
        return 0

    async def kinds(self) -> Mapping[str, KindRecord]:
        return self.records

    async def run(self, order: Order) -> AsyncGenerator[object]:
        self.ordered.append(order)
        self.began.set()
        if self.refusal is not None:
            raise self.refusal
        yield object()
        self.records[order.kind] = KindRecord(self.now, self.now, True)


def made(drills: Drills) -> Schedule:
    return Schedule(drills, lambda: float(drills.now))  # type: ignore[arg-type]


async def look(schedule: Schedule, drills: Drills, now: int) -> str:
    drills.now = now
    return await schedule.look(now)


def test_what_is_due_longest_comes_first() -> None:
    schedule = {"rotation": 100, "repair": 1000}
    assert due(schedule, {}, 5000) == "rotation"  # neither ever ran
    records = {"rotation": KindRecord(last_run=4950), "repair": KindRecord(last_run=3500)}
    assert due(schedule, records, 5000) == "repair"
    assert due(schedule, records | {"repair": KindRecord(last_run=4400)}, 5000) == ""
    assert due({}, records, 5000) == ""


async def test_each_kind_runs_when_it_never_did_and_then_as_often_as_it_is_to() -> None:
    drills = Drills(rotation=DAY, custodian_loss=7 * DAY)
    schedule = made(drills)
    assert [await look(schedule, drills, T + second) for second in range(4)] == ["rotation", "custodian-loss", "", ""]
    assert await look(schedule, drills, T + DAY - 1) == ""
    assert await look(schedule, drills, T + DAY) == "rotation"
    assert await look(schedule, drills, T + 7 * DAY) == "rotation"  # longer overdue than the other
    assert await look(schedule, drills, T + 7 * DAY + 1) == "custodian-loss"
    assert {(each.key_id, each.scheduled, each.revoke, each.lift) for each in drills.ordered} == {
        ("canary", True, b"", b"")
    }
    assert len({each.drill_id for each in drills.ordered}) == len(drills.ordered)


async def test_what_a_dead_coordinator_left_is_undone_at_each_look_whether_or_not_anything_is_scheduled() -> None:
    drills = Drills()
    schedule = made(drills)
    assert await look(schedule, drills, T) == await look(schedule, drills, T + DAY) == ""
    assert (drills.resumed, drills.ordered) == (2, [])


async def test_nothing_begins_while_a_drill_runs_here() -> None:
    drills = Drills(rotation=DAY)
    drills.running = "0d" * 16
    schedule = made(drills)
    assert await look(schedule, drills, T) == ""
    drills.running = ""
    assert await look(schedule, drills, T + 1) == "rotation"


async def test_what_could_not_begin_is_tried_again_ten_minutes_later_and_keeps_nothing_else_waiting() -> None:
    drills = Drills(rotation=DAY, repair=DAY)
    schedule = made(drills)
    drills.refusal = StateError(Reason.EXISTS, "a drill is under way: one at a time")
    assert await look(schedule, drills, T) == "repair"
    drills.refusal = None
    assert await look(schedule, drills, T + 1) == "rotation"
    assert await look(schedule, drills, T + 599) == ""
    assert await look(schedule, drills, T + 600) == "repair"
    assert await look(schedule, drills, T + 601) == ""


async def test_the_loop_outlives_a_database_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_LOOK_SECONDS", 0.0)
    drills = Drills(rotation=DAY)
    drills.broken = UnavailableError(Reason.STORAGE, "the disk is full")
    task = asyncio.create_task(made(drills).forever())
    for _ in range(3):
        await drills.looked.wait()
        drills.looked.clear()
    assert not drills.ordered
    drills.broken = None
    await drills.began.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert [each.kind for each in drills.ordered] == ["rotation"]


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"keyquorum_coordinator_drill_{name}", labels)


def test_the_age_of_the_last_drill_that_passed_is_told_of_each_kind() -> None:
    records = {
        "rotation": KindRecord(T - 50, T - 50, True, 400, None, 1500),
        "repair": KindRecord(T - 10, T - 3 * DAY, False, None, None, 900),  # it passed once, and failed since
        "restore": KindRecord(T - 10, 0, False),
        FULL: KindRecord(T + 5, T + 5, True, duration_ms=20_000),  # by a clock that was set back since
    }
    metrics = Metrics()
    metrics.track_drills(lambda: records, lambda: float(T))
    ages = {kind: sample(metrics, "passed_age_seconds", kind=kind) for kind in (*KINDS, FULL)}
    assert (ages["rotation"], ages["repair"], ages[FULL]) == (50.0, 3.0 * DAY, 0.0)
    never = set(ages) - {"rotation", "repair", FULL}
    assert {ages[kind] for kind in never} == {math.inf}  # so that an alarm on the age finds what never passed
    passed = {kind: sample(metrics, "passed", kind=kind) for kind in (*records, "split-view")}
    assert passed == {"rotation": 1.0, "repair": 0.0, "restore": 0.0, FULL: 1.0, "split-view": None}
    assert sample(metrics, "seconds", kind="rotation", what="detect") == 0.4
    assert sample(metrics, "seconds", kind="rotation", what="recover") is None
    assert sample(metrics, "seconds", kind=FULL, what="duration") == 20.0


def test_other_figures_are_served_while_the_database_is_away() -> None:
    def away() -> Mapping[str, KindRecord]:
        raise UnavailableError(Reason.STORAGE, "the database failed")

    metrics = Metrics()
    metrics.track_drills(away, lambda: float(T))
    assert sample(metrics, "passed_age_seconds", kind="rotation") is None
    assert metrics.registry.get_sample_value("keyquorum_coordinator_ledger_size") == 0.0
