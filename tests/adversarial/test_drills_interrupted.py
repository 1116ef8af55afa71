"""Drills that must fail, and drills cut off: none passes that rehearsed nothing, and none leaves a fault behind."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_coordinator.ceremonies import Ceremonies
from keyquorum_coordinator.drills import ceremonial, defences, engine, store
from keyquorum_coordinator.drills.engine import Drills
from keyquorum_coordinator.drills.rehearsal import Order, Rehearsal
from keyquorum_coordinator.withdrawals import Withdrawals
from keyquorum_core.drill_report import KINDS, Outcome, open_report
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError
from keyquorum_custodian.appraisals import Appraisals
from keyquorum_custodian.seed_records import cannot_give
from keyquorum_protos.v1 import drills_pb2 as pb
from tests.support.drilling import CANARY, DrillScene, drill_documents, open_drills


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


async def as_the_owner(forger: object) -> list[defences.Forgery]:
    """Not forged at all: whoever gets a share with this would have got it with a forgery."""
    return [defences.Forgery("nothing forged", b"", b"", Reason.ROOT_NOT_PINNED)]


def expired(*arguments: Any) -> Any:
    raise RefusedError(Reason.EXPIRED, "the reference values have expired")


SABOTAGE: dict[str, tuple[object, str, object]] = {
    "rotation": (Rehearsal, "destroy_older", no_gone),
    "custodian-loss": (Rehearsal, "inject", no_fault),
    "slow-custodian": (Rehearsal, "inject", no_fault),
    "lying-custodian": (Rehearsal, "inject", no_fault),
    "repair": (Rehearsal, "inject", no_fault),
    "restore": (Rehearsal, "inject", no_fault),
    "revocation": (Withdrawals, "accept", nothing),
    "forged-evidence": (defences._Forger, "forgeries", as_the_owner),
    "split-view": (Rehearsal, "inject", no_fault),
    "coordinator-loss": (Ceremonies, "resume", nothing),
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
    # Custodians that refuse any evidence whatever: that says nothing of what is wrong with this.
    with monkeypatch.context() as patched:
        patched.setattr(Appraisals, "appraise", expired)
        report = await scene.drill("forged-evidence")
    assert report.outcome is Outcome.FAILED
    wrong = [each for each in report.parts[0].checks if not each.passed]
    assert ["EXPIRED at recipient" in each.actual for each in wrong] == [True] * 4
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


async def test_a_restore_is_rehearsed_where_there_are_backups_and_fails_where_nobody_has_any(
    scene: DrillScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Custodians whose hardware modules hold the seeds, and do not give them away."""

    def cannot(*arguments: object, **named: object) -> None:
        raise cannot_give()

    names = list(scene.committee.ids)
    for name in names[1:]:
        monkeypatch.setattr(scene.committee.nodes[name].canary, "_lose_and_restore", cannot)
    report = await scene.drill("restore")
    assert report.passed
    assert report.parts[0].custodians == (names[0],)
    monkeypatch.setattr(scene.committee.nodes[names[0]].canary, "_lose_and_restore", cannot)
    report = await scene.drill("restore")
    assert (report.outcome, report.parts[0].reason) == (Outcome.FAILED, Reason.UNSUPPORTED)
    assert report.parts[0].custodians == ()


async def test_only_a_dead_coordinator_s_drill_is_undone_by_another(
    scene: DrillScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two coordinators over one database: one runs drills, the other comes up meanwhile, and looks."""
    monkeypatch.setattr(engine, "_BEAT", 0.05)
    circumstances, server = scene.drills._with, scene.running.server
    other = Drills(circumstances)
    ceremonies = Ceremonies(server.database, server.fanout, spared=server._drilled)
    for kind in ("slow-custodian", "coordinator-loss"):
        async for event in scene.drills.run(Order(secrets.token_hex(16), kind, CANARY)):
            assert await other.resume() == 0
            if event.moment.step == "inject":  # nor is the ceremony taken up that the drill left lying
                assert await ceremonies.resume() == 0
        assert open_report(event.report, scene.keys.identity.public).passed
    # And when the first one stalls for longer than it may, by the other's clock: it is undone, and both know it.
    drill_id = secrets.token_hex(16)
    events = scene.drills.run(Order(drill_id, "split-view", CANARY))
    async for event in events:
        if event.moment.step == "inject":
            break
    late = Drills(dataclasses.replace(circumstances, clock=lambda: time.time() + 10 * store.LEASE_SECONDS))
    assert await late.resume() == 1
    with pytest.raises(KeyquorumError) as caught:
        async for _ in events:
            pass
    assert caught.value.reason is Reason.STATE
    assert "took this one for dead" in caught.value.message
    assert not any(node.canary.any for node in scene.committee.nodes.values())
    report = open_report(await scene.drills.report(drill_id), scene.keys.identity.public)
    assert report.outcome is Outcome.INTERRUPTED
    assert await other.resume() == await late.resume() == 0
    assert (await scene.drill("restore")).passed
