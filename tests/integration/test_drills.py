"""Drills on real custodians: all pass on a sound cluster, fail on a broken one, and touch no other key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from keyquorum_coordinator.drills.engine import Drills
from keyquorum_coordinator.outbox import request_id
from keyquorum_core.drill_report import FULL, KINDS, DrillReport, Outcome
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.ledger.leaves import Drill, parse_leaf
from keyquorum_protos.v1 import drills_pb2 as pb
from keyquorum_protos.wire.errors import from_rpc_error
from tests.support.drilling import CANARY, REAL, DrillScene, drill_documents, open_drills
from tests.support.ledger_log import all_leaves


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[DrillScene]:
    async with open_drills(tmp_path) as opened:
        yield opened


async def healthy(scene: DrillScene) -> bool:
    """The canary derives alike everywhere, and so does the real key."""
    epoch = (await scene.epochs(CANARY))[0].epoch
    return bool(scene.root(epoch, key_id=CANARY)) and bool(scene.root(1, key_id=REAL))


def outcomes(report: DrillReport) -> dict[str, Outcome]:
    return {part.kind: part.outcome for part in report.parts}


def failures(report: DrillReport) -> list[str]:
    return [
        f"{part.kind}: {each.what}: {each.actual}" for part in report.parts for each in part.checks if not each.passed
    ]


async def test_a_full_drill_passes_and_leaves_everything_as_it_was(scene: DrillScene) -> None:
    before = scene.root(1, key_id=REAL)
    report = await scene.drill(FULL, documents=drill_documents(scene.committee, scene.keys))
    assert not failures(report)
    assert outcomes(report) == dict.fromkeys(KINDS, Outcome.PASSED)
    assert report.outcome is Outcome.PASSED
    assert all(part.detect_ms is not None and part.recover_ms is not None for part in report.parts)
    assert all(len(part.checks) >= 3 for part in report.parts)
    assert scene.root(1, key_id=REAL) == before
    assert await healthy(scene)
    assert [each.state for each in await scene.epochs(CANARY)].count("active") == 1
    assert not any(node.canary.any for node in scene.committee.nodes.values())
    # The ledger has one leaf about it, by the digest of what was signed.
    await scene.running.server.outbox.settle(request_id(Drill.TYPE, report.drill_id))
    leaves = [parse_leaf(each) for each in all_leaves(scene.running.server.sequencer._ledger)]
    drills = [each for each in leaves if isinstance(each, Drill)]
    assert [(each.drill, each.passed, each.report_sha256) for each in drills] == [(FULL, True, report.digest)]
    records = await scene.drills.kinds()
    assert all(records[kind].passed and records[kind].last_passed for kind in (*KINDS, FULL))


async def test_no_drill_touches_a_key_that_is_not_a_canary(scene: DrillScene, monkeypatch: pytest.MonkeyPatch) -> None:
    driven: list[str] = []
    monkeypatch.setattr(Drills, "_drive", lambda *arguments: driven.append("driven"))
    for kind in (*KINDS, FULL):
        with pytest.raises(RefusedError) as caught:
            await scene.drill(kind, REAL)
        assert (caught.value.reason, driven) == (Reason.CANARY, [])
    assert not await scene.drills.runs()
    # Nor would a custodian have let it, whatever the coordinator says.
    request = pb.InjectFaultRequest(drill_id="0d" * 16, key_id=REAL, fault="silent", seconds=60)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await scene.running.server.fanout.links["ch-1"].canary.Inject(request)
    assert from_rpc_error(refused.value, "ch-1").reason is Reason.CANARY
