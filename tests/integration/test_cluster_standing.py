"""What a coordinator says of the cluster, over real custodians: at once after a ceremony, and when custodians go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from keyquorum_coordinator.tending import Tending
from keyquorum_core.ceremony_states import Kind
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.ceremony_scene import CeremonyScene, open_scene
from tests.support.custodian import Committee, build_committee

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Committee:
    return build_committee(tmp_path_factory.mktemp("standing"))


@pytest.fixture
async def scene(template: Committee, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[CeremonyScene]:
    async def never(self: Tending) -> None:
        """Nobody repairs what the test leaves."""

    monkeypatch.setattr(Tending, "forever", never)
    async with open_scene(template.copy(tmp_path / "custodians"), tmp_path / "coordinator") as opened:
        yield opened


async def status(scene: CeremonyScene) -> pb.ClusterStatusResponse:
    found: pb.ClusterStatusResponse = await scene.operator.cluster.Status(pb.ClusterStatusRequest())
    return found


def holders(found: pb.ClusterStatusResponse, epoch: int) -> set[str]:
    return {
        each.health.custodian
        for each in found.custodians
        if any((key.key_id, key.epoch) == ("key-1", epoch) for key in each.described.keys)
    }


async def test_a_new_epoch_is_seen_at_once_and_who_goes_is_counted_out(scene: CeremonyScene) -> None:
    await scene.generate()
    found = await status(scene)
    assert holders(found, 1) == set(scene.committee.ids)  # not what they said before there was a key
    (epoch,) = found.epochs
    record = scene.committee.nodes["ch-1"].keystore.epoch("key-1", 1)
    assert record is not None
    assert (epoch.key_id, epoch.epoch, epoch.state) == ("key-1", 1, "active")
    assert {key.certificate_digest for each in found.custodians for key in each.described.keys} == {
        epoch.certificate_digest
    }
    standing = scene.running.server.standing
    assert await standing.survivable() == {"key-1": 1}  # two of three
    await scene.run(await scene.plan(Kind.ROTATE))
    found = await status(scene)
    assert [(each.epoch, each.state) for each in found.epochs] == [(2, "active"), (1, "retired")]
    assert holders(found, 2) == set(scene.committee.ids)
    assert not found.ceremonies
    for gone, left in (("no-1", 0), ("is-1", -1)):
        await scene.down(gone)
        link = scene.running.server.fanout.links[gone]
        for _ in range(1000):
            if not link.connected:
                break
            await asyncio.sleep(0.01)
        assert await standing.survivable() == {"key-1": left}
    found = await status(scene)
    assert {each.health.custodian: each.health.reachable for each in found.custodians} == {
        "ch-1": True,
        "is-1": False,
        "no-1": False,
    }
    scene.running.server.metrics.survivable(await standing.survivable())
    sample = scene.running.server.metrics.registry.get_sample_value
    assert sample("keyquorum_coordinator_key_losses_survivable", {"key": "key-1"}) == -1
    scene.running.server.metrics.survivable({})
    assert sample("keyquorum_coordinator_key_losses_survivable", {"key": "key-1"}) is None
