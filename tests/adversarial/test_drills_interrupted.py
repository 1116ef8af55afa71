"""Drills that must fail, and drills cut off: none passes that rehearsed nothing, and none leaves a fault behind."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from keyquorum_coordinator.drill_key import load_drill_key
from keyquorum_coordinator.drills import ceremonial, defences
from keyquorum_coordinator.drills.rehearsal import Order, Rehearsal
from keyquorum_coordinator.withdrawals import Withdrawals
from keyquorum_core.drill_report import KINDS, Outcome, open_report
from keyquorum_protos.v1 import drills_pb2 as pb
from tests.support.coordinator import Caller, Process
from tests.support.drilling import CANARY, REAL, DrillScene, drill_documents, open_drills


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[DrillScene]:
    async with open_drills(tmp_path) as opened:
        yield opened


async def nothing(*arguments: Any, **options: Any) -> Any:
    return None


async def no_gone(drill: Rehearsal) -> list[int]:
    return []


async def no_fault(drill: Rehearsal, custodian: str, fault: str, **options: Any) -> pb.FaultState:
    """A hook that says yes and does nothing."""
    drill._faulted.append(custodian)
    drill.mark()
    return pb.FaultState(key_id=drill.key_id, fault=fault)


async def as_the_owner(forger: object) -> dict[str, bytes]:
    """Not forged at all: whoever gets a share with this would have got it with a forgery."""
    return {"nothing forged": b""}


SABOTAGE: dict[str, tuple[object, str, object]] = {
    "rotation": (Rehearsal, "destroy_older", no_gone),
    "custodian-loss": (Rehearsal, "inject", no_fault),
    "slow-custodian": (Rehearsal, "inject", no_fault),
    "lying-custodian": (Rehearsal, "inject", no_fault),
    "repair": (Rehearsal, "inject", no_fault),
    "restore": (Rehearsal, "inject", no_fault),
    "revocation": (Withdrawals, "accept", nothing),
    "forged-evidence": (defences._Forger, "documents", as_the_owner),
    "split-view": (Rehearsal, "inject", no_fault),
    "coordinator-loss": (Rehearsal, "follow", nothing),
}


async def test_each_kind_fails_where_what_it_asserts_does_not_happen(
    scene: DrillScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(SABOTAGE) == set(KINDS)
    monkeypatch.setattr(ceremonial, "_NOTICED_SECONDS", 0.5)
    monkeypatch.setattr(defences, "_HEARD_SECONDS", 0.5)
    monkeypatch.setattr(ceremonial, "_TOLD_SECONDS", 0.5)
    documents = drill_documents(scene.committee, scene.keys)
    for kind, (owner, name, instead) in SABOTAGE.items():
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, instead)
            report = await scene.drill(kind, documents=documents if kind == "revocation" else (b"", b""))
        (part,) = report.parts
        assert (kind, report.outcome, part.outcome) == (kind, Outcome.FAILED, Outcome.FAILED), report
        assert part.cause
    # A custodian that is down for good: nothing can be rehearsed, and nothing passes.
    await scene.down("no-1")
    report = await scene.drill("forged-evidence")
    assert report.outcome is Outcome.FAILED
    assert "before" in report.parts[0].cause


async def test_a_cancelled_drill_is_undone_and_reported(scene: DrillScene) -> None:
    order = Order(secrets.token_hex(16), "split-view", CANARY)
    events = scene.drills.run(order)
    async for event in events:
        if event.moment.step == "inject":
            break
    assert any(node.canary.any for node in scene.committee.nodes.values())
    assert await scene.drills.cancel(order.drill_id)
    await events.aclose()
    assert not any(node.canary.any for node in scene.committee.nodes.values())
    report = open_report(await scene.drills.report(order.drill_id), scene.keys.identity.public)
    assert report.outcome is Outcome.INTERRUPTED
    assert not report.passed
    assert (await scene.drill("restore")).passed


POINTS = (
    ("custodian-loss", "inject", ""),
    ("split-view", "inject", ""),
    ("rotation", "note", "deliver"),
    ("repair", "inject", ""),
    ("revocation", "inject", ""),
)
"""Where the coordinator dies: kind, step, and what the step's text ends with."""


async def test_a_coordinator_killed_in_a_drill_lifts_the_fault_when_it_is_back(scene: DrillScene) -> None:
    config, keys = scene.running.config, scene.keys
    documents = drill_documents(scene.committee, keys)
    await scene.running.stop()
    process = Process(config)
    try:
        for point in POINTS:
            await die_at(scene, process, documents, *point)
    finally:
        await process.kill()
    assert scene.root(1, key_id=REAL)


async def die_at(
    scene: DrillScene, process: Process, documents: tuple[bytes, bytes], kind: str, step: str, text: str
) -> None:
    """Kill it there, start it again, and see that it undoes what it had begun."""
    keys = load_drill_key(process.config.directory)
    assert keys is not None
    await process.start()
    operator = Caller(process.config, "operator", "olga")
    drill_id = secrets.token_hex(16)
    request = pb.RunDrillRequest(drill_id=drill_id, kind=kind, key_id=CANARY)
    if kind == "revocation":
        request.revoke, request.lift = documents
    reached = False
    async for event in operator.drills.Run(request):
        reached = event.step == step and event.text.endswith(text)
        if reached:
            break
    assert reached, kind
    await process.kill()
    await operator.close()
    await process.start()
    operator = Caller(process.config, "operator", "olga")
    await settled(scene, operator, drill_id)
    # All is well again: a drill that needs every custodian, and the drill owner, passes.
    answer: pb.DrillEvent | None = None
    async for event in operator.drills.Run(
        pb.RunDrillRequest(drill_id=secrets.token_hex(16), kind="restore", key_id=CANARY)
    ):
        answer = event
    assert answer is not None
    after = open_report(answer.report, keys.identity.public)
    assert after.passed, (kind, after)
    found = await operator.drills.GetReport(pb.GetDrillReportRequest(drill_id=drill_id))
    assert open_report(found.report, keys.identity.public).outcome is Outcome.INTERRUPTED
    await operator.close()
    await process.terminate()


async def settled(scene: DrillScene, operator: Caller, drill_id: str) -> None:
    """The drill is over, no fault is in force, and every custodian holds the canary's newest epoch."""
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)
        try:
            listed = await operator.drills.List(pb.ListDrillsRequest())
        except grpc.aio.AioRpcError:
            continue
        state = next(each.state for each in listed.runs if each.drill_id == drill_id)
        if state == "running" or any(node.canary.any for node in scene.committee.nodes.values()):
            continue
        newest = [node.epochs.newest(CANARY) for node in scene.committee.nodes.values()]
        if all(each is not None and each.state == "active" for each in newest) and (
            len({each.epoch for each in newest if each is not None}) == 1
        ):
            return
