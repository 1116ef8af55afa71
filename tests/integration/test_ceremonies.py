"""Every kind of ceremony between a real coordinator and real custodians, and what nobody asked for but the policy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from keyquorum_coordinator.database import OutboxRow
from keyquorum_coordinator.driving import Driver
from keyquorum_coordinator.tending import Tending
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.ledger.leaves import NOTHING, Ceremony, parse_leaf
from keyquorum_core.ledger.tiles import Bundle, decode_bundle
from keyquorum_custodian.ceremonies import Steps
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.ceremonies import order
from tests.support.ceremony_scene import CeremonyScene, open_scene, refusal
from tests.support.custodian import Committee, build_committee

pytestmark = pytest.mark.timeout(90)
POLICY = KeyPolicy(rotate_after_seconds=3600, retain_seconds=600)


class Clock:
    def __init__(self) -> None:
        import time

        self.offset = 0.0
        self._time = time.time

    def __call__(self) -> float:
        return self._time() + self.offset


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Committee:
    return build_committee(tmp_path_factory.mktemp("ceremonies"))


@pytest.fixture
async def scene(template: Committee, tmp_path: Path, clock: Clock) -> AsyncIterator[CeremonyScene]:
    async with open_scene(template.copy(tmp_path / "custodians", clock), tmp_path / "coordinator") as opened:
        yield opened


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keyquorum_coordinator.driving._RETRIES", (0.05,))
    monkeypatch.setattr("keyquorum_coordinator.driving.APPROVAL_POLL", 0.05)

    async def never(self: Tending) -> None:
        """The tests say when to look."""

    monkeypatch.setattr(Tending, "forever", never)


async def until(done: Callable[[], Any]) -> None:
    for _ in range(400):
        if done():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it never came to that")


async def leaves(scene: CeremonyScene) -> list[Ceremony]:
    """What the ledger shows of ceremonies."""
    sequencer, database = scene.running.server.sequencer, scene.running.server.database
    for _ in range(200):
        if not await database.read(lambda session: session.scalars(select(OutboxRow.number)).all()):
            break
        await asyncio.sleep(0.02)
    size = sequencer.latest.checkpoint.size
    entries = decode_bundle(await sequencer.tile(Bundle(0, size)), size) if size else ()
    return [leaf for leaf in map(parse_leaf, entries) if isinstance(leaf, Ceremony)]


async def test_a_key_is_rotated_and_the_old_epoch_still_derives(scene: CeremonyScene) -> None:
    await scene.generate()
    before = scene.root(1)
    events = await scene.run(await scene.plan(Kind.ROTATE))
    assert list(dict.fromkeys(event.step for event in events)) == ["propose", "deliver", "confirm", "activate", "done"]
    newest, oldest = await scene.epochs()
    assert (newest.epoch, newest.state, oldest.epoch, oldest.state) == (2, "active", 1, "retired")
    assert oldest.retired_at == newest.created_at
    assert scene.root(1) == before != scene.root(2)
    assert [each.epoch for each in (await scene.operator.keys.List(pb.ListKeysRequest())).keys] == [2]
    kinds = [(leaf.kind, leaf.epoch, leaf.reason) for leaf in await leaves(scene)]
    assert kinds == [("generate", 1, ""), ("rotate", 2, "")]


async def test_an_absent_custodian_is_stale_and_repaired_when_it_is_back(scene: CeremonyScene) -> None:
    await scene.generate()
    await scene.down("is-1")
    events = await scene.run(await scene.plan(Kind.ROTATE))
    assert "is-1" in events[-1].note
    assert (await scene.epochs())[0].stale == ["is-1"]
    await scene.running.server.tending.look()
    assert (await scene.epochs())[0].stale == ["is-1"]
    await scene.up("is-1")
    await until(lambda: scene.running.server.fanout.links["is-1"].connected)
    await scene.running.server.tending.look()
    assert (await scene.epochs())[0].stale == []
    assert scene.root(2) == scene.root(2, "ch-1", "no-1")
    repair = next(each for each in await scene.ceremonies() if each.kind == "repair")
    assert (repair.kind, repair.step, [each.custodian for each in repair.receipts]) == ("repair", "done", ["is-1"])


async def test_a_custodian_that_missed_only_the_end_is_told_of_it(
    scene: CeremonyScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.generate()
    activate = Steps.activate

    async def lost(self: Any, ceremony_id: str, certificate: bytes) -> None:
        if self._seat.me == "no-1":
            raise UnavailableError(Reason.UNAVAILABLE, "the network is down")
        await activate(self, ceremony_id, certificate)

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "activate", lost)
        events = await scene.run(await scene.plan(Kind.ROTATE))
        assert "no-1" in events[-1].note
    assert (await scene.epochs())[0].stale == ["no-1"]
    await scene.running.server.tending.look()
    assert (await scene.epochs())[0].stale == []
    assert scene.root(2)
    assert {each.kind for each in await scene.ceremonies()} == {"rotate", "generate"}


async def test_a_custodian_that_was_rebuilt_and_not_heard_is_stale_no_more_once_it_says_what_it_holds(
    scene: CeremonyScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.generate()
    await scene.down("is-1")
    await scene.run(await scene.plan(Kind.ROTATE))
    await scene.up("is-1")
    link, tending = scene.running.server.fanout.links["is-1"], scene.running.server.tending
    await until(lambda: link.connected)
    restore = Steps.restore

    async def unheard(self: Any, *arguments: Any) -> bytes:
        await restore(self, *arguments)
        raise UnavailableError(Reason.UNAVAILABLE, "the network is down")

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "restore", unheard)
        await tending.look()
    assert (await scene.epochs())[0].stale == ["is-1"]
    assert next((each.kind, each.step) for each in await scene.ceremonies()) == ("repair", "cancelled")
    await scene.running.server.fanout.probe_all()
    tending._pauses.clear()
    await tending.look()
    assert (await scene.epochs())[0].stale == []
    assert [each.kind for each in await scene.ceremonies()].count("repair") == 1
    assert scene.root(2)


async def test_too_many_absent_stop_a_rotation_which_leaves_the_epoch_as_it_was(scene: CeremonyScene) -> None:
    await scene.generate()
    before = scene.root(1)
    await scene.down("is-1")
    await scene.down("no-1")
    error = await refusal(scene.run(await scene.plan(Kind.ROTATE)))
    assert (error.details["step"], error.details["custodian"]) == ("propose", "is-1,no-1")
    await scene.up("is-1")
    await scene.up("no-1")
    assert scene.root(1) == before
    stopped = next(each for each in await scene.ceremonies() if each.kind == "rotate")
    assert stopped.step == "cancelled"
    assert "is-1" in stopped.error.message
    assert (await leaves(scene))[-1].certificate_sha256 == NOTHING


async def test_the_policy_rotates_and_retires_without_anybody(scene: CeremonyScene, clock: Clock) -> None:
    await scene.generate(policy=POLICY)
    await scene.running.server.tending.look()
    assert len(await scene.epochs()) == 1
    clock.offset += POLICY.rotate_after_seconds + 1
    await scene.running.server.tending.look()
    assert [each.state for each in await scene.epochs()] == ["active", "retired"]
    await scene.running.server.tending.look()
    assert len(await scene.epochs()) == 2
    clock.offset += POLICY.retain_seconds + 1
    await scene.running.server.tending.look()
    assert [each.state for each in await scene.epochs()] == ["active", "destroyed"]
    ended = next(each for each in await scene.ceremonies() if each.kind == "destroy")
    assert {each.custodian for each in ended.receipts} == set(scene.committee.ids)
    kinds = [leaf.kind for leaf in await leaves(scene)]
    assert kinds == ["generate", "rotate", "destroy"]


async def test_a_retired_epoch_stays_while_a_job_runs_on_it(scene: CeremonyScene, clock: Clock) -> None:
    from keyquorum_core.manifest import sign_manifest

    await scene.generate(policy=POLICY)
    manifest = scene.committee.manifest("key-1", not_after=int(clock()) + 10**6)
    alice = scene.running.caller("owner", "alice")
    job = await alice.jobs.Submit(pb.SubmitRequest(manifest=sign_manifest(manifest, scene.committee.owner.identity)))
    await scene.run(await scene.plan(Kind.ROTATE))
    clock.offset += POLICY.retain_seconds + 1
    await scene.running.server.tending.look()
    assert [each.state for each in await scene.epochs()] == ["active", "retired"]
    await alice.jobs.Cancel(pb.CancelJobRequest(job_id=job.job_id, why="done with it"))
    await scene.running.server.tending.look()
    assert [each.state for each in await scene.epochs()] == ["active", "destroyed"]


async def test_destruction_waits_for_every_operator_and_says_for_whom(scene: CeremonyScene) -> None:
    await scene.generate()
    plan = await scene.plan(Kind.DESTROY)
    running = asyncio.ensure_future(scene.run(plan))
    nodes = scene.committee.nodes.values()
    await until(lambda: all(node.ceremonies.approvals.pending() for node in nodes))
    await asyncio.sleep(0.1)
    (waiting,) = [each for each in await scene.ceremonies() if each.kind == "destroy"]
    assert (waiting.step, set(waiting.waiting)) == ("propose", set(scene.committee.ids))
    scene.approve("ch-1", "is-1")
    await asyncio.sleep(0.3)
    assert [each.waiting for each in await scene.ceremonies() if each.kind == "destroy"] == [["no-1"]]
    assert scene.root(1)
    scene.approve("no-1")
    events = await running
    assert events[-1].step == "done"
    assert any(set(event.waiting) == set(scene.committee.ids) for event in events)
    assert [each.state for each in await scene.epochs()] == ["destroyed"]
    error = await refusal(scene.run(await scene.plan(Kind.ROTATE)))
    assert error.reason is Reason.KEY_STATE


async def test_a_rejection_ends_the_waiting_of_all(scene: CeremonyScene) -> None:
    await scene.generate()
    running = asyncio.ensure_future(scene.run(await scene.plan(Kind.DESTROY)))
    nodes = scene.committee.nodes
    await until(lambda: all(node.ceremonies.approvals.pending() for node in nodes.values()))
    (row,) = nodes["no-1"].ceremonies.approvals.pending()
    nodes["no-1"].ceremonies.approvals.decide(row.request_id, row.subject, approve=False)
    error = await refusal(running)
    assert error.reason is Reason.APPROVAL
    assert "no-1" in error.details["custodian"]
    assert not any(node.ceremonies.approvals.pending() for node in nodes.values())
    assert scene.root(1)


async def test_an_operator_cancels_what_waits(scene: CeremonyScene) -> None:
    await scene.generate()
    plan = await scene.plan(Kind.DESTROY)
    running = asyncio.ensure_future(scene.run(plan))
    await until(lambda: all(node.ceremonies.approvals.pending() for node in scene.committee.nodes.values()))
    cancelled = await scene.operator.keys.CancelCeremony(
        pb.CancelCeremonyRequest(ceremony_id=plan.ceremony_id, why="not this one")
    )
    assert cancelled.step == "cancelled"
    assert "not this one" in cancelled.error.message
    await refusal(running)
    assert not any(node.ceremonies.approvals.pending() for node in scene.committee.nodes.values())
    done = next(each for each in await scene.ceremonies() if each.kind == "generate")
    error = await refusal(scene.operator.keys.CancelCeremony(pb.CancelCeremonyRequest(ceremony_id=done.ceremony_id)))
    assert error.reason is Reason.STATE
    assert scene.root(1)


async def test_another_coordinator_learns_of_keys_and_goes_on_with_them(scene: CeremonyScene) -> None:
    await scene.generate(policy=POLICY)
    await scene.run(await scene.plan(Kind.ROTATE))
    await scene.another_coordinator()
    await scene.running.server.fanout.probe_all()
    await scene.running.server.tending.look()
    assert [(each.epoch, each.state) for each in await scene.epochs()] == [(2, "active"), (1, "retired")]
    await scene.run(await scene.plan(Kind.ROTATE))
    assert scene.root(3)


@pytest.mark.parametrize("step", ["deliver", "confirm", "activate"])
async def test_another_coordinator_finishes_what_the_first_began(
    scene: CeremonyScene, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The first one is lost with its disk in the middle of a step, and one custodian is absent from the ceremony."""
    await scene.generate()
    await scene.down("is-1")
    plan = await scene.plan(Kind.ROTATE)
    ask = Driver.ask

    async def lost(self: Driver, at: Any, names: Any, call: Any, **options: Any) -> Any:
        asked = await ask(self, at, names, call, **options)
        if at == step:
            raise UnavailableError(Reason.STORAGE, "the coordinator's disk is gone")
        return asked

    async def silent(self: Driver, error: Any) -> None:
        return None

    with monkeypatch.context() as patch:
        patch.setattr(Driver, "ask", lost)
        patch.setattr(Driver, "cancel", silent)
        await refusal(scene.run(plan))
    await scene.up("is-1")
    await scene.another_coordinator()
    request = pb.RunCeremonyRequest(plan=order(scene.committee, plan))
    events = [event async for event in scene.operator.keys.RunCeremony(request)]
    assert events[-1].step == "done"
    assert scene.root(2, "ch-1", "no-1")
    assert (await scene.epochs())[0].stale == ["is-1"]
