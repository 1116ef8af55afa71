"""A custodian killed at every persistence step of init, of the generate ceremony and of a release, and started again.

It must come back understanding what is on its disk, must have answered nothing that it did not persist, and the same
requests must then run to completion.
"""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest

from keyquorum_core.attestation.inventory import INVENTORY
from keyquorum_core.bulletin import sign_bulletin
from keyquorum_core.errors import UnavailableError
from keyquorum_core.parts import SealedPart
from keyquorum_core.signing import merge
from keyquorum_custodian.config import CustodianConfig
from keyquorum_custodian.init import initialise
from keyquorum_custodian.keystore import Keystore
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2_grpc as rpc
from tests.support.custodian import PASSPHRASE, Committee, build_committee
from tests.support.mortal import KILLED, ROOT, MortalCustodian, dying_command
from tests.support.vendor import bulletin, inventory_json

ME = "ch-1"
STEPS = ("propose", "deliver", "confirm", "activate")


# -- init --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_init_killed_at_any_write_is_made_whole_by_running_it_again(tmp_path: Path, when: str) -> None:
    killed = 0
    for number in range(1, 20):
        folder = tmp_path / f"ch-{number}"
        child = subprocess.run(dying_command("init", str(folder), str(number), when), cwd=ROOT, timeout=60, check=False)
        if child.returncode == 0:
            break
        assert child.returncode == KILLED
        killed += 1
        assert not folder.exists(), "half a custodian"
        config = CustodianConfig(folder, ME, "CH", "demo", "127.0.0.1:7001", "127.0.0.1:7002", "")
        card = initialise(config, PASSPHRASE, now=1_700_000_000, opslimit=1, memlimit=8 << 10)
        assert not folder.with_name(f"{folder.name}.init").exists()
        store = Keystore.open(folder / "keystore.db", PASSPHRASE)
        assert store.identity().public == card.custodian.identity
        store.close()
    assert killed == 1 + 6  # one commit of the keystore, six files


# -- the ceremony ------------------------------------------------------------------------------------------------------


@pytest.fixture
def committee(tmp_path: Path) -> Iterator[Committee]:
    built = build_committee(tmp_path)
    for name in built.ids:
        if name != ME:
            built.open(name)
    yield built
    built.close()


class Driver:
    """An honest coordinator's view of one ceremony: what it would send in each step, and the others' answers."""

    def __init__(self, committee: Committee, key_id: str) -> None:
        self.nodes = dict(committee.nodes)
        self.plan = committee.plan(key_id)
        self.envelope = committee.sign_plan(self.plan)
        self.id = self.plan.ceremony_id
        self.proposals = {
            name: made for name, node in self.nodes.items() if (made := node.ceremonies.propose(self.envelope).proposal)
        }
        self.mine: pb.ProposeResponse
        self.commitments: list[bytes] = []
        self.certificate = b""

    async def step(self, name: str, custodian: MortalCustodian) -> None:
        await getattr(self, f"_{name}")(custodian)

    async def _propose(self, custodian: MortalCustodian) -> None:
        request = pb.ProposeRequest(plan=self.envelope)
        self.mine = await custodian.call(lambda channel: rpc.CeremoniesStub(channel).Propose(request, timeout=10))

    async def _deliver(self, custodian: MortalCustodian) -> None:
        headers = [self.mine.header, *(proposal.header for proposal in self.proposals.values())]
        parts = [part for proposal in self.proposals.values() for part in proposal.parts]
        parts += [SealedPart(getattr(part, "from"), part.to, part.sealed) for part in self.mine.parts]
        wire = [pb.SealedParts(**{"from": p.sender}, to=p.to, sealed=p.sealed) for p in parts if p.to == ME]
        request = pb.DeliverRequest(ceremony_id=self.id, headers=headers, parts=wire)
        answer = await custodian.call(lambda channel: rpc.CeremoniesStub(channel).Deliver(request, timeout=10))
        self.commitments = [answer.commitments]
        for name, node in self.nodes.items():
            mine = [part for part in parts if part.to == name]
            self.commitments.append(node.ceremonies.deliver(self.id, headers, mine))

    async def _confirm(self, custodian: MortalCustodian) -> None:
        request = pb.ConfirmRequest(ceremony_id=self.id, commitments=self.commitments)
        answer = await custodian.call(lambda channel: rpc.CeremoniesStub(channel).Confirm(request, timeout=10))
        signed = [node.ceremonies.confirm(self.id, self.commitments) for node in self.nodes.values()]
        self.certificate = merge([answer.certificate, *signed])

    async def _activate(self, custodian: MortalCustodian) -> None:
        request = pb.ActivateRequest(ceremony_id=self.id, certificate=self.certificate)
        await custodian.call(lambda channel: rpc.CeremoniesStub(channel).Activate(request, timeout=10))
        for node in self.nodes.values():
            node.ceremonies.activate(self.id, self.certificate)


async def test_a_custodian_killed_at_any_step_of_a_ceremony_finishes_it(committee: Committee) -> None:
    """One process per death: each is armed for a commit of the next ceremony, after finishing the present one."""
    moments = [(number, when) for when in ("before", "after") for number in range(1, len(STEPS) + 1)]
    custodian = MortalCustodian(committee, ME)
    await custodian.start(*moments[0], "hold")
    for position, (number, when) in enumerate(moments):
        driver = Driver(committee, f"key-{position}")
        still_due = len(STEPS) - number + (when == "before")
        for due, name in enumerate(STEPS, start=1):
            if due != number:
                await driver.step(name, custodian)
                continue
            with pytest.raises(UnavailableError):  # it died: nothing was answered
                await driver.step(name, custodian)
            custodian.wait_for_death()
            following = moments[position + 1] if position + 1 < len(moments) else (99, "before")
            await custodian.start(still_due + following[0], following[1], "hold")
            await driver.step(name, custodian)
    custodian.stop()
    assert custodian.deaths == len(moments)
    node = committee.open(ME)
    assert len(node.epochs.all()) == len(moments)
    assert {row.state for row in node.keystore.ceremonies()} == {"active"}
    for held in node.epochs.all():
        mine = held.contributions(b"c" * 32)
        for other in committee.ids:
            theirs = committee.nodes[other].epochs.active(held.key_id, held.epoch).contributions(b"c" * 32)
            assert all(mine[index] == theirs[index] for index in mine.keys() & theirs.keys())


async def test_a_custodian_killed_between_recording_and_answering_answers_the_next_time(
    committee: Committee,
) -> None:
    committee.generate()
    committee.nodes.pop(ME).close()
    custodian = MortalCustodian(committee, ME)
    await custodian.start(1, "record")
    request = committee.owner_request()
    message = committee.message(ME, request)

    async def release(channel: grpc.aio.Channel) -> pb.ReleaseAnswer:
        call = rpc.CustodianStub(channel).Release(timeout=10)
        await call.write(message)
        answer = await call.read()
        if not isinstance(answer, pb.ReleaseAnswer):
            raise AssertionError(await call.code())
        return answer

    with pytest.raises(UnavailableError):
        await custodian.call(release)
    custodian.wait_for_death()
    await custodian.start(99, "record")
    assert (await custodian.call(release)).WhichOneof("outcome") == "share"
    custodian.stop()
    assert committee.open(ME).keystore.release_count() == 1


@pytest.mark.parametrize(
    ("number", "when", "kept"), [(2, "record", 0), (4, "record", 0), (2, "before", 0), (2, "after", 4)]
)
async def test_a_custodian_killed_while_it_keeps_a_group_answered_none_of_it(
    committee: Committee, number: int, when: str, kept: int
) -> None:
    """Dead between two records, before the commit or after it: the coordinator has no answer, and gets all the next
    time; each release is recorded once."""
    committee.generate()
    committee.nodes.pop(ME).close()
    custodian = MortalCustodian(committee, ME)
    await custodian.start(number, when)  # the first commit is the checkpoint's
    requests = [committee.owner_request() for _ in range(4)]
    requests = [dataclasses.replace(each, inclusion=committee.ledger.inclusion(i)) for i, each in enumerate(requests)]
    messages = [committee.message(ME, each, str(number)) for number, each in enumerate(requests)]
    heard: list[pb.ReleaseAnswer] = []

    async def release(channel: grpc.aio.Channel) -> list[str | None]:
        call = rpc.CustodianStub(channel).Release(timeout=10)
        await call.write(pb.ReleaseRequest(group=messages))
        answer = await call.read()
        if not isinstance(answer, pb.ReleaseAnswer):
            raise AssertionError(await call.code())
        heard.append(answer)
        return [each.WhichOneof("outcome") for each in answer.group]

    with pytest.raises(UnavailableError):
        await custodian.call(release)
    custodian.wait_for_death()
    assert heard == []
    node = committee.open(ME)
    assert node.keystore.release_count() == kept
    committee.nodes.pop(ME).close()
    await custodian.start()
    assert await custodian.call(release) == ["share"] * 4
    custodian.stop()
    assert committee.open(ME).keystore.release_count() == 4


@pytest.mark.parametrize(("when", "version"), [("before", 1), ("after", 2)])
async def test_a_custodian_killed_while_it_accepts_a_bulletin_has_the_old_one_or_the_new_one(
    committee: Committee, when: str, version: int
) -> None:
    """It notices the file by itself, and dies at the commit. The file is gone at the next start: only the keystore can
    say which document is in force; then the file is back, and it is the new one either way."""
    custodian = MortalCustodian(committee, ME)
    await custodian.start(2, when)  # the first commit keeps the time
    path = committee.directory(ME) / "bulletins" / "inventory.json"
    envelope = sign_bulletin(bulletin("inventory", inventory_json(), 2), [committee.operator.identity])
    path.with_suffix(".partial").write_bytes(envelope)
    path.with_suffix(".partial").replace(path)
    await asyncio.to_thread(custodian.wait_for_death)
    path.unlink()
    node = committee.open(ME)
    assert node.bulletins.get(INVENTORY).version == version
    path.write_bytes(envelope)
    node.bulletins.refresh()
    assert node.bulletins.get(INVENTORY).version == 2
    committee.nodes.pop(ME).close()
