"""What ``keyquorum cluster status`` finds, over a coordinator in memory that says one thing or another."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from keyquorum.aio import AsyncClient
from keyquorum.cli import run
from keyquorum.cli.cluster import Look
from keyquorum.cli.cluster_view import away
from keyquorum.cluster import ClusterStatus
from keyquorum.sync import Client, connect
from keyquorum_core.ceremony_plan import PLAN_TYPE, CeremonyPlan, new_ceremony_id
from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.signing import sign_many
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2 as custodian_pb
from keyquorum_protos.v1 import drills_pb2
from keyquorum_protos.wire.errors import to_status
from tests.support.client_world import CLUSTER, World, the_world
from tests.support.deceit import deceived
from tests.support.fake_coordinator import FakeCoordinator, serving


@pytest.fixture
def world() -> World:
    return the_world().honest()


Change = Callable[[pb.ClusterStatusResponse], None]


class Says(FakeCoordinator):
    """Changes what it says of the cluster."""

    change: Change = staticmethod(lambda message: None)
    asked_for_epochs = 0

    async def Status(self, request: pb.ClusterStatusRequest, context: Any) -> pb.ClusterStatusResponse:
        message = await super().Status(request, context)
        self.change(message)
        return message

    async def ListEpochs(self, request: pb.GetKeyRequest, context: Any) -> pb.ListKeysResponse:
        self.asked_for_epochs += 1
        return await super().ListEpochs(request, context)


def plan(world: World, key_id: str = "demo", **policy: Any) -> CeremonyPlan:
    return CeremonyPlan(
        new_ceremony_id(), key_id, 1, "MLKEM768_X25519", CLUSTER, world.roster.digest, world.quorum, int(time.time()),
        KeyPolicy(**policy),
    )  # fmt: skip


@asynccontextmanager
async def cluster(world: World, folder: Path, made: int = 60, **policy: Any) -> AsyncIterator[tuple[Says, AsyncClient]]:
    """Its key's epoch was made so many seconds ago."""
    coordinator = Says(world)
    ordered = plan(world, **policy)
    coordinator.certificates = {"demo": world.certify(replace(ordered, created_at=ordered.created_at - made))}
    async with deceived(coordinator, folder) as client:
        yield coordinator, client


def gone(*names: str) -> dict[str, KeyquorumError]:
    return {name: UnavailableError(Reason.UNAVAILABLE, "gone") for name in names}


def custodian(message: pb.ClusterStatusResponse, name: str) -> pb.CustodianStatus:
    return next(each for each in message.custodians if each.health.custodian == name)


def texts(status: ClusterStatus) -> dict[str, str]:
    return {f"{each.about}{' !' if each.critical else ''}": each.text for each in status.findings}


async def test_a_whole_cluster_is_healthy_and_certificates_are_fetched_once(world: World, tmp_path: Path) -> None:
    async with cluster(world, tmp_path, rotate_after_seconds=86400) as (coordinator, client):
        status = await client.status()
        again = await client.status()
    assert status.healthy
    assert again.keys == status.keys
    assert coordinator.asked_for_epochs == 1
    # The test's roster is short-lived: nothing else is found.
    assert [each.about for each in status.findings] == ["roster"]
    assert status.findings[0].text.startswith("expires in ")
    (key,) = status.keys
    assert key.survival is not None
    assert (key.survival.losses, key.survival.jurisdiction_losses) == (2, 1)
    assert key.rotates_at == key.created_at + 86400
    assert {name: [each.custodian for each in found] for name, found in status.jurisdictions.items()} == {
        "CH": ["ch-1"],
        "DE": ["de-1", "de-2"],
        "FR": ["fr-1"],
        "IS": ["is-1"],
    }
    json.dumps(status.as_dict())


def _seal(message: pb.ClusterStatusResponse) -> None:
    found = custodian(message, "ch-1")
    found.health.reachable = False
    found.described.sealed = True
    found.described.scheme = "slip39"


def _unreachable(message: pb.ClusterStatusResponse) -> None:
    found = custodian(message, "ch-1").health
    found.reachable, found.last_error = False, "UNAVAILABLE: gone"


def _hung(message: pb.ClusterStatusResponse) -> None:
    custodian(message, "ch-1").described_at -= 300


def _alarmed(message: pb.ClusterStatusResponse) -> None:
    custodian(message, "ch-1").described.ledger_alarms = 1


def _restored(message: pb.ClusterStatusResponse) -> None:
    custodian(message, "ch-1").described.restored = True


def _open(message: pb.ClusterStatusResponse) -> None:
    custodian(message, "ch-1").health.circuit = "open"


def _stale(message: pb.ClusterStatusResponse) -> None:
    custodian(message, "ch-1").described.ClearField("keys")


def _not_yet(message: pb.ClusterStatusResponse) -> None:
    custodian(message, "ch-1").described.ClearField("keys")


def _other(message: pb.ClusterStatusResponse) -> None:
    custodian(message, "ch-1").described.keys[0].certificate_digest = "ab" * 32


def _unmentioned(message: pb.ClusterStatusResponse) -> None:
    kept = [each for each in message.custodians if each.health.custodian != "ch-1"]
    del message.custodians[:]
    message.custodians.extend(kept)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_seal, "sealed"),
        (_unreachable, "unreachable"),
        (_hung, "silent for 300 s"),
        (_alarmed, "stopped by a ledger alarm"),
        (_restored, "restored, and not proved yet"),
        (_open, "left alone after repeated failures"),
        (_stale, "stale: it has no seeds of this epoch"),
        (_not_yet, "not heard from since this epoch was made"),
        (_other, "it names another certificate of this epoch"),
        (_unmentioned, "unreachable"),
    ],
)
async def test_a_custodian_that_would_not_serve_the_key_is_not_counted(
    world: World, tmp_path: Path, change: Change, why: str
) -> None:
    async with cluster(world, tmp_path, made=0 if change is _not_yet else 60) as (coordinator, client):
        coordinator.change = change
        status = await client.status()
    (key,) = status.keys
    assert key.lacking == {"ch-1": why}
    assert key.survival is not None
    assert key.survival.losses == 1
    assert key.stale == (("ch-1",) if change is _stale else ())
    assert status.healthy
    assert status.findings


async def test_a_key_without_a_quorum_is_critical_and_a_canary_or_retired_one_is_not(
    world: World, tmp_path: Path
) -> None:
    async with cluster(world, tmp_path) as (coordinator, client):
        coordinator.down = gone("ch-1", "de-1")
        last = await client.status()
        coordinator.down = gone("ch-1", "de-1", "de-2")
        lost = await client.status()
        coordinator.change = lambda message: setattr(message.epochs[0], "state", "retired")
        retired = await client.status()
    assert last.healthy
    assert texts(last)["demo epoch 1"] == "no loss may follow: it needs each of de-2, fr-1, is-1"
    assert not lost.healthy
    assert not lost.quorum_reachable
    assert "ch-1 (unreachable), de-1 (unreachable), de-2 (unreachable)" in texts(lost)["demo epoch 1 !"]
    assert lost.findings[0].critical
    assert retired.healthy
    async with cluster(world, tmp_path / "canary", canary=True) as (coordinator, client):
        coordinator.down = gone("ch-1", "de-1", "de-2")
        assert (await client.status()).healthy


async def test_a_certificate_that_does_not_verify_is_critical(world: World, tmp_path: Path) -> None:
    async with cluster(world, tmp_path) as (coordinator, client):
        coordinator.change = lambda message: setattr(message.epochs[0], "certificate_digest", "ab" * 32)
        status = await client.status()
    assert not status.healthy
    assert "no certificate" in texts(status)["demo epoch 1 !"]
    async with cluster(world, tmp_path / "other") as (coordinator, client):
        forged = coordinator.certificates["demo"]
        coordinator.certificates["demo"] = forged.replace(b'"sig":"', b'"sig":"AAAA', 1)
        status = await client.status()
    assert not status.healthy
    assert "demo epoch 1 !" in texts(status)


async def test_clocks_rosters_ledger_ceremonies_and_drills_are_looked_at(world: World, tmp_path: Path) -> None:
    waiting = plan(world, "next")
    stopped = plan(world, "other")

    def change(message: pb.ClusterStatusResponse) -> None:
        custodian(message, "ch-1").health.clock_skew_ms = -7000
        custodian(message, "de-1").health.clock_skew_ms = 3000
        custodian(message, "de-1").described.roster_digest = "ab" * 32
        custodian(message, "de-2").described.revocations_version = 4
        for each in message.custodians:
            each.described.ledger_witnessed_at = message.now - 400
        message.now += 60
        for each in message.custodians:
            each.described_at += 60
        for made, names, error in ((waiting, ["ch-1"], None), (stopped, [], UnavailableError(Reason.TIMEOUT, "slow"))):
            said = message.ceremonies.add(
                ceremony_id=made.ceremony_id, kind="generate", key_id=made.key_id, epoch=1, step="propose",
                waiting=names, plan=sign_many([world.operator], PLAN_TYPE, made.to_payload()),
            )  # fmt: skip
            if error is not None:
                said.error.CopyFrom(to_status(error))
        message.drills.append(drills_pb2.DrillKind(kind="rotation", last_passed=5, last_run=9))
        message.roster = b"another"

    async with cluster(world, tmp_path) as (coordinator, client):
        coordinator.change = change
        status = await client.status(max_skew=5)
    said = texts(status)
    assert said["ch-1"] == "its clock is -7.0 s off the coordinator's"
    assert said["de-1"].startswith("has roster version 0")
    assert "has not come to ch-1, de-1, fr-1, is-1" in said["revocations"]
    assert said["coordinator"].startswith("its clock is +6")
    assert "the coordinator serves another roster than the one pinned here" in [each.text for each in status.findings]
    assert said["ledger"].startswith("no quorum has cosigned for 4")
    assert said["generate of next epoch 1"] == "waits for the operators of ch-1"
    assert said["generate of other epoch 1"] == "stopped at propose: slow"
    assert said["drill rotation"] == "its last run did not pass"
    assert status.healthy


async def test_the_command_exits_by_what_it_finds_and_says_what_people_need(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator = Says(world)
    coordinator.certificates = {"demo": world.certify(plan(world))}
    async with serving(coordinator) as address:
        profile = str(world.write_profile(tmp_path / "profile", address))

        async def command(*options: str) -> tuple[int, str]:
            status = await asyncio.to_thread(run, ["cluster", "status", "--profile", profile, *options])
            return status, capsys.readouterr().out

        status, shown = await command()
        assert status == 0
        assert "any 2; any 1 jurisdiction" in shown
        assert "the coordinator's word" in shown
        coordinator.down = gone("ch-1", "de-1", "fr-1")
        status, shown = await command()
        assert (status, "NO QUORUM" in shown, "no quorum: without ch-1" in shown) == (1, True, True)
        status, shown = await command("--json")
        assert status == 1
        assert json.loads(shown)["keys"][0]["survival"]["losses"] == -1
        assert await command("--watch") == (2, "")


async def again(look: Look) -> KeyquorumError | None:
    await asyncio.to_thread(look.again)
    return look.error


async def test_watching_outlives_a_coordinator_that_goes_away(world: World, tmp_path: Path) -> None:
    coordinator = FakeCoordinator(world)
    coordinator.certificates = {"demo": world.certify(plan(world))}
    async with serving(coordinator) as address:
        profile = world.write_profile(tmp_path / "profile", address)

        def first() -> tuple[Client, Look]:
            client = connect(profile)
            return client, Look(client, client.status(), 5.0)

        client, look = await asyncio.to_thread(first)
        assert await again(look) is None
    error = await again(look)
    assert error is not None
    assert error.reason in (Reason.UNAVAILABLE, Reason.TIMEOUT)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(away(look.found, error, int(look.since)))
    assert "nothing can be seen" in console.export_text()
    since = look.since
    await again(look)
    assert look.since == since
    async with serving(coordinator, address=address):
        for _ in range(200):
            if await again(look) is None:
                break
            await asyncio.sleep(0.1)
        assert await again(look) is None
    await asyncio.to_thread(client.close)


def test_a_described_custodian_is_told_apart_from_one_never_asked() -> None:
    from keyquorum.health import custodian_health
    from keyquorum_core.roster import RosterCustodian

    entry = RosterCustodian.__new__(RosterCustodian)
    object.__setattr__(entry, "id", "ch-1")
    object.__setattr__(entry, "jurisdiction", "CH")
    said = pb.CustodianStatus(health=pb.CustodianHealth(reachable=True, circuit="closed"))
    assert custodian_health(entry, said, 1000).why == "not asked yet"
    said.described.CopyFrom(custodian_pb.DescribeResponse())
    said.described_at = 990
    assert custodian_health(entry, said, 1000).serving
