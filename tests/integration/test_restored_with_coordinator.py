"""A custodian restored under a coordinator that goes on with what it knew: how it is shown, brought back, and rid of an
epoch that was destroyed while it was away."""

from __future__ import annotations

from pathlib import Path

import pytest

from keyquorum_coordinator.tending import Tending
from keyquorum_core.ceremony_states import Kind
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.ceremonies import approve, order
from tests.support.ceremony_scene import CeremonyScene, open_scene
from tests.support.coordinator import Running, write_roster
from tests.support.custodian import build_committee
from tests.support.restoring import approve as approve_restore
from tests.support.restoring import back_up, wreck_and_restore

pytestmark = pytest.mark.timeout(90)
ME = "ch-1"


async def _destroy(scene: CeremonyScene, epoch: int) -> list[pb.CeremonyEvent]:
    """Each custodian's operator has approved when the coordinator asks."""
    plan = await scene.plan(Kind.DESTROY, epoch=epoch)
    for name in scene.committee.ids:
        approve(scene.committee, name, order(scene.committee, plan))
    return await scene.run(plan)


async def test_it_counts_for_nothing_until_proved_and_a_destroyed_epoch_is_destroyed_there_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(self: Tending) -> None:
        """Each round is the test's."""

    monkeypatch.setattr(Tending, "forever", never)
    committee = build_committee(tmp_path / "custodians")
    async with open_scene(committee, tmp_path / "coordinator") as scene:
        await scene.generate()
        await scene.run(await scene.plan(Kind.ROTATE))
        backup = back_up(committee, ME)
        await _destroy(scene, 1)

        await scene.running.stop()
        for name in committee.ids:
            await scene.down(name)
        wreck_and_restore(committee, ME, backup)
        config = scene.running.config
        write_roster(config, committee.roster, committee.operator.identity)
        for name in committee.ids:
            await scene.up(name)
        scene.running = await Running.again(config, committee, clock=committee.clock)
        scene.operator = scene.running.caller("operator", "olga")
        node, standing = committee.nodes[ME], scene.running.server.standing

        found = await scene.operator.cluster.Status(pb.ClusterStatusRequest())
        assert [each.health.custodian for each in found.custodians if each.described.restored] == [ME]
        assert await standing.survivable() == {"key-1": 0}
        approve_restore(node)
        for _ in range(20):
            await scene.running.server.tending.look()
            if not node.standing.restored:
                break
        assert set(node.standing.withheld) == {("key-1", 1)}
        await scene.running.server.fanout.probe_all()
        assert await standing.survivable() == {"key-1": 1}

        row = node.keystore.epoch("key-1", 1)
        assert row is not None
        assert node.keystore.seeds(row)
        events = await _destroy(scene, 1)
        assert events[-1].note.endswith("3 receipts")
        assert node.keystore.seeds(row) == {}
        assert not any("WITHHELD" in warning for warning in node.warnings())
        assert [(each.epoch, each.state) for each in await scene.epochs()] == [(2, "active"), (1, "destroyed")]
