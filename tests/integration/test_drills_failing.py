"""Drills where all is not well: one custodian really down, and a drill that is stopped in the middle."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from keyquorum_coordinator.drills.engine import Event
from keyquorum_coordinator.drills.rehearsal import Order
from keyquorum_core.drill_report import Outcome, open_report
from tests.support.drilling import CANARY, DrillScene, open_drills


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[DrillScene]:
    async with open_drills(tmp_path) as opened:
        yield opened


async def test_drills_fail_while_a_custodian_is_really_down(scene: DrillScene) -> None:
    await scene.down("ch-1")
    report = await scene.drill("custodian-loss", CANARY)
    assert report.outcome is Outcome.FAILED
    (part,) = report.parts
    assert not part.checks[0].passed
    assert "ch-1" in part.checks[0].actual


async def test_a_drill_that_is_stopped_undoes_what_it_injected_and_says_that_it_was(scene: DrillScene) -> None:
    order = Order(secrets.token_hex(16), "custodian-loss", CANARY)
    events: list[Event] = []
    async with aclosing(scene.drills.run(order)) as run:
        async for event in run:
            events.append(event)
            if event.moment.step == "inject":
                assert any(node.canary.any for node in scene.committee.nodes.values())
                assert await scene.drills.cancel(order.drill_id)
    report = open_report(events[-1].report, scene.keys.identity.public)
    assert report.outcome is Outcome.INTERRUPTED
    assert all(node.canary.of(CANARY) is None for node in scene.committee.nodes.values())
    assert (await scene.drill("custodian-loss")).passed
