"""The coordinator's ledger between real custodians: who was shown what, who cosigned, what happens when they differ."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from keyquorum_coordinator.sequencer import Sequencer
from keyquorum_coordinator.witnesses import Witnesses
from keyquorum_core.ledger.leaves import Alarm, parse_leaf
from keyquorum_core.ledger.log_trust import LogTrust
from keyquorum_core.ledger.tiles import Bundle, decode_bundle
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_core.release import Leaf
from keyquorum_custodian.server import CustodianServer
from keyquorum_custodian.witness import CheckpointUpdate, Witness
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2 as custodian_pb
from keyquorum_protos.v1 import custodian_pb2_grpc as custodian_rpc
from tests.support.coordinator import Caller, Owner, Running
from tests.support.custodian import Committee, build_committee
from tests.support.fake_custodian import FakeCommittee, FakeCustodian
from tests.support.ledger import MemoryLog

pytestmark = pytest.mark.timeout(90)


class Scene:
    """A committee whose custodians serve in this process, and a coordinator of theirs."""

    def __init__(self, committee: Committee, folder: Path) -> None:
        self.committee = committee
        self.folder = folder
        self.servers: dict[str, CustodianServer] = {}
        self.running: Running
        self.alice: Caller
        self.owner = Owner(committee.owner.name, committee.owner.identity, committee.owner.recipient)

    async def serve(self, name: str) -> None:
        server = CustodianServer(self.committee.open(name, shown=False))
        await server.start()
        self.servers[name] = server

    async def restart(self, name: str) -> None:
        await self.down(name)
        await self.serve(name)

    async def down(self, name: str) -> None:
        await self.servers.pop(name).stop(0)
        self.committee.nodes.pop(name).close()

    async def begin(self, **changes: Any) -> None:
        self.running = await Running.start(self.folder / "coordinator", self.committee, **changes)
        self.alice = self.running.caller("owner", "alice")

    def witness(self, name: str) -> Witness:
        return self.committee.nodes[name].witness

    @property
    def sequencer(self) -> Sequencer:
        return self.running.server.sequencer

    @property
    def witnesses(self) -> Witnesses:
        return self.running.server.witnesses

    async def release(self) -> list[pb.AnswerEvent]:
        """One job opened: every custodian's answer."""
        job, manifest = self.owner.manifest(key_id="key-1")
        await self.alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
        return await self.alice.open(job)

    async def leaves(self) -> list[bytes]:
        size = self.sequencer.latest.checkpoint.size
        return list(decode_bundle(await self.sequencer.tile(Bundle(0, size)), size)) if size else []


def outcomes(events: list[pb.AnswerEvent]) -> dict[str, str]:
    return {event.answer.custodian: event.answer.WhichOneof("outcome") or "" for event in events}


ALL = dict.fromkeys(("ch-1", "is-1", "no-1"), "share")


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    committee = build_committee(tmp_path / "custodians")
    committee.generate()
    committee.close()
    made = Scene(committee, tmp_path)
    for name in committee.ids:
        await made.serve(name)
    await made.begin()
    yield made
    await made.running.stop()
    for server in made.servers.values():
        await server.stop(0)
    committee.close()


async def until(true: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
    """Poll. Raises :class:`TimeoutError`."""
    async with asyncio.timeout(seconds):
        while not await true():  # noqa: ASYNC110 - what is waited for is in other processes' hands
            await asyncio.sleep(0.02)


def trust(committee: Committee) -> LogTrust:
    assert committee.roster.log_key is not None
    return LogTrust(committee.roster.log_key, committee.roster.witnesses(), committee.quorum)


async def test_a_release_is_logged_shown_to_all_and_cosigned_by_a_quorum(scene: Scene) -> None:
    events = await scene.release()
    assert outcomes(events) == ALL
    leaf = Leaf.parse(events[0].leaf)
    proof = TlogProof.parse(events[0].leaf_proof)
    proof.verify(leaf.hash(), scene.committee.log.keys)
    assert events[0].leaf in await scene.leaves()

    async def covered() -> bool:
        signed = scene.sequencer.witnessed
        return signed is not None and signed.checkpoint.size > proof.index

    await until(covered)
    published = await scene.sequencer.published()
    seen = trust(scene.committee).verify(published.encode(), now=int(time.time()))
    assert set(seen.times) == set(scene.committee.ids)


async def test_many_releases_at_once_are_each_answered_by_all(scene: Scene) -> None:
    found = await asyncio.gather(*(scene.release() for _ in range(24)))
    assert [outcomes(events) for events in found] == [ALL] * 24
    sizes = {scene.witness(name).size for name in scene.committee.ids}
    assert len(sizes) == 1


async def test_a_custodian_that_was_away_is_brought_up_to_date(scene: Scene) -> None:
    await scene.release()
    await scene.down("no-1")
    events = await scene.release()
    assert {name for name, what in outcomes(events).items() if what == "share"} == {"ch-1", "is-1"}
    await scene.serve("no-1")

    async def back() -> bool:
        return outcomes(await scene.release()) == ALL

    await until(back)
    assert scene.witness("no-1").size == scene.witness("ch-1").size


async def test_custodians_that_somebody_else_moved_on_are_asked_again_from_where_they_are(scene: Scene) -> None:
    """Another coordinator on the same log spoke to them: the first answer is where they are, the second a share."""
    await scene.release()
    for number in range(3):
        entry = await scene.sequencer.append(b"of another coordinator %d" % number, b"%d" % number)
        size = entry.checkpoint.checkpoint.size
        for name in scene.committee.ids:
            witness = scene.witness(name)
            proof = await scene.sequencer.consistency(witness.size, size)
            witness.update(CheckpointUpdate(witness.size, proof, entry.checkpoint.encode()))
        assert outcomes(await scene.release()) == ALL


async def test_a_restarted_custodian_knows_no_quorum_and_is_told_with_the_next_release(scene: Scene) -> None:
    await scene.release()
    await scene.restart("ch-1")
    assert scene.witness("ch-1").witnessed_at == 0

    async def connected() -> bool:
        return scene.running.server.fanout.links["ch-1"].connections > 1

    await until(connected)
    assert outcomes(await scene.release()) == ALL
    assert scene.witness("ch-1").witnessed_at > 0


async def test_a_coordinator_that_starts_anew_goes_on(scene: Scene) -> None:
    await scene.release()
    config = scene.running.config
    await scene.running.stop()
    scene.running = await Running.again(config, scene.committee)
    scene.alice = scene.running.caller("owner", "alice")
    assert outcomes(await scene.release()) == ALL


async def test_an_alarm_stops_one_custodian_and_comes_to_be_in_the_ledger(scene: Scene) -> None:
    """It holds proof that the log forked; the others go on, and the log itself says what one of them saw."""
    await scene.release()
    witness = scene.witness("no-1")
    fork = MemoryLog(scene.committee.log, time.time)
    fork.fill(witness.size)
    with pytest.raises(Exception, match="LEDGER_FORK"):
        witness.update(fork.update(0))
    events = await scene.release()
    assert outcomes(events) == {**ALL, "no-1": "refusal"}

    async def logged() -> bool:
        scene.witnesses.poke()
        return any(isinstance(parse_leaf(leaf), Alarm) for leaf in await scene.leaves())

    await until(logged)
    (alarm,) = [leaf for leaf in map(parse_leaf, await scene.leaves()) if isinstance(leaf, Alarm)]
    assert (alarm.alarm, alarm.seat) == ("fork", "custodian/no-1")
    assert alarm.evidence_sha256 == witness.open_alarms[0].evidence.hex()
    witness.clear(1, "a test")

    async def back() -> bool:
        return outcomes(await scene.release()) == ALL

    await until(back)
    alarms = [leaf for leaf in map(parse_leaf, await scene.leaves()) if isinstance(leaf, Alarm)]
    assert len(alarms) == 1, "each alarm once"


async def test_one_bad_cosignature_spoils_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lying custodian's lines are left out: a note with one bad line would be refused by everybody."""
    liar = scene.committee.nodes["is-1"].witness
    stranger = scene.committee.nodes["no-1"].witness._cosigner

    class Lies:
        keys = liar._cosigner.keys

        def cosign(self, checkpoint: Any, now: int) -> Any:
            return [
                dataclasses.replace(line, name=key.name, key_id=key.key_id)
                for line, key in zip(stranger.cosign(checkpoint, now), self.keys, strict=True)
            ]

    monkeypatch.setattr(liar, "_cosigner", Lies())
    await scene.release()
    size = scene.sequencer.latest.checkpoint.size

    async def covered() -> bool:
        signed = scene.sequencer.witnessed
        return signed is not None and signed.checkpoint.size >= size

    await until(covered)
    seen = trust(scene.committee).verify((await scene.sequencer.published()).encode(), now=int(time.time()))
    assert set(seen.times) == {"ch-1", "no-1"}


async def test_without_a_quorum_nothing_is_cosigned_and_the_refusal_says_so(scene: Scene) -> None:
    for name in ("ch-1", "is-1"):
        await scene.down(name)
    await scene.restart("no-1")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(scene.running.server.fanout.links["no-1"].first_stream.wait(), 5)
    with pytest.raises(Exception, match="no quorum"):
        await scene.release()


async def test_a_log_that_stands_still_is_cosigned_again_and_again(tmp_path: Path) -> None:
    committee = build_committee(tmp_path / "custodians")
    committee.generate()
    committee.close()
    made = Scene(committee, tmp_path)
    for name in committee.ids:
        await made.serve(name)
    await made.begin(cosign_interval=1)
    try:
        await made.release()
        first = made.witness("ch-1").witnessed_at

        async def again() -> bool:
            return made.witness("ch-1").witnessed_at > first

        await until(again)
    finally:
        await made.running.stop()
        for server in made.servers.values():
            await server.stop(0)
        committee.close()


# -- two streams -------------------------------------------------------------------------------------------------------


async def test_a_request_that_is_hedged_takes_its_checkpoint_along(tmp_path: Path) -> None:
    """The second stream may be the first over which the custodian hears of that checkpoint."""

    def stall(custodian: FakeCustodian) -> None:
        custodian.behaviour.stall = custodian.id == "jp-1"

    committee = await FakeCommittee.start(stall)
    running = await Running.start(tmp_path / "coordinator", committee)
    try:
        alice = running.caller("owner", "alice")
        job, manifest = Owner().manifest()
        await alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
        events = await alice.open(job)
        assert outcomes(events) == dict.fromkeys(committee.custodians, "share")
        first, hedged = committee.custodians["jp-1"].requests
        assert hedged.HasField("update")
        assert hedged == first
        assert TlogProof.parse(events[0].leaf_proof).index == first.leaf_index
    finally:
        await running.stop()
        await committee.stop()


async def test_the_same_request_over_two_streams_is_answered_over_both(tmp_path: Path) -> None:
    committee, name = build_committee(tmp_path), "ch-1"
    committee.generate()
    node = committee.nodes.pop(name)
    committee.close()
    server = CustodianServer(node)
    await server.start()
    try:
        message = committee.message(name, committee.owner_request())
        assert message.HasField("update")
        async with committee.channel(name, server.address) as channel:
            streams = [custodian_rpc.CustodianStub(channel).Release() for _ in range(2)]
            for stream in streams:
                await stream.write(message)
            for stream in streams:
                answer = await stream.read()
                assert isinstance(answer, custodian_pb.ReleaseAnswer)
                assert answer.HasField("share"), answer
                await stream.done_writing()
        assert node.witness.size == 1
    finally:
        await server.stop(0)
        node.close()
