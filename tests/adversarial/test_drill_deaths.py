"""A coordinator killed in a drill: before and after every write of the drill and of its ceremonies, every fault that is
injected, shown or lifted, and every document taken; and at each of these while it undoes what the one before left.

Started again it undoes what there is. After each death no fault is in force, no ceremony is left, every custodian holds
the canary, and every other key is released. ``make soak`` goes through all of them for every kind; the suite takes one
of each sort.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from keyquorum_core.bulletin import peek_bulletin
from keyquorum_core.ceremony_states import Step
from keyquorum_core.drill_report import KINDS, DrillReport, Outcome, open_report
from keyquorum_core.manifest import sign_manifest
from keyquorum_protos.v1 import coordinator_pb2
from keyquorum_protos.v1 import drills_pb2 as pb
from tests.support.coordinator import Caller, Process
from tests.support.drilling import CANARY, REAL, DrillScene, drill_documents, open_drills

SOAK = bool(os.environ.get("KEYQUORUM_SOAK"))
pytestmark = pytest.mark.timeout(3600 if SOAK else 180)
SETTLED_SECONDS = 60
QUORUM = 3
LEAST = 3
"""What can be died of at the least: a drill begins, something is done and undone, and it ends."""
DOES_NOTHING = {"forged-evidence"}
"""Kinds that only ask: they begin, and they end."""


class Deaths:
    """The coordinator of a scene as a process, which dies again and again."""

    def __init__(self, scene: DrillScene) -> None:
        self.scene = scene
        self.keys = scene.keys
        self.process = Process(scene.running.config)
        self.left = ""
        """The drill of which something may be in force."""

    async def start(self, phase: str = "drill", number: int = 0, when: str = "before") -> None:
        directory = str(self.process.config.directory)
        self.process.command = ("-m", "tests.support.dying_coordinator", directory, phase, str(number), when)
        await self.process.start()

    def caller(self, role: str, name: str) -> Caller:
        return Caller(self.process.config, role, name)

    async def dies(self, kind: str, number: int, when: str) -> DrillReport | None:
        """Start it, see that the last drill is undone, and run one: None when it died of it, else its report."""
        await self.start("drill", number, when)
        await self.well()
        operator = self.caller("operator", "olga")
        drill_id = secrets.token_hex(16)
        request = pb.RunDrillRequest(drill_id=drill_id, kind=kind, key_id=CANARY)
        if kind == "revocation":
            found = await operator.revocations.Get(coordinator_pb2.GetRevocationsRequest())
            version = peek_bulletin(found.document).version if found.document else 0
            request.revoke, request.lift = drill_documents(self.scene.committee, self.keys, version + 1)
        report: DrillReport | None = None
        try:
            async for event in operator.drills.Run(request):
                if event.report:
                    report = open_report(event.report, self.keys.identity.public)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        await operator.close()
        # Where it dies once the report is stored, the report may have left first.
        if report is not None and not await self.dead(1.0):
            await self.process.terminate()
            return report
        assert await self.dead(20.0), (kind, number, when)
        self.left = drill_id
        return None

    async def dead(self, seconds: float) -> bool:
        """Whether it is, of SIGKILL, within that time."""
        try:
            async with asyncio.timeout(seconds):
                code = await self.process.ended()
        except TimeoutError:
            return False
        assert code == -signal.SIGKILL, (self.process.config.directory / "stderr.log").read_text()[-2000:]
        return True

    async def well(self) -> None:
        """The drill that the last one died of is over, and all is as it was before."""
        operator, owner = self.caller("operator", "olga"), self.caller("owner", "alice")
        nodes = self.scene.committee.nodes.values()
        deadline = time.monotonic() + SETTLED_SECONDS
        while self.left and not await self.over(operator):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert not any(node.canary.any for node in nodes)
        if self.left:
            found = await operator.drills.GetReport(pb.GetDrillReportRequest(drill_id=self.left))
            report = open_report(found.report, self.keys.identity.public)
            assert report.outcome in (Outcome.INTERRUPTED, Outcome.PASSED)
        # Every other key is released: enough custodians give their shares, and they derive the same.
        committee = self.scene.committee
        signed = sign_manifest(committee.manifest(REAL), committee.owner.identity)
        job = (await owner.jobs.Submit(coordinator_pb2.SubmitRequest(manifest=signed))).job_id
        answers = [event.answer for event in await owner.open(job) if event.answer.share.sealed]
        assert len(answers) >= QUORUM
        assert {each.share.key_id for each in answers} == {REAL}
        await owner.jobs.Cancel(coordinator_pb2.CancelJobRequest(job_id=job, why="it was opened"))
        assert self.scene.root(1, key_id=REAL)
        await operator.close()
        await owner.close()
        self.left = ""

    async def over(self, operator: Caller) -> bool:
        """It is reported, no fault is in force, no ceremony is left, and all hold the canary's newest epoch."""
        nodes = self.scene.committee.nodes.values()
        listed = await operator.drills.List(pb.ListDrillsRequest())
        state = next((each.state for each in listed.runs if each.drill_id == self.left), "never began")
        if state == "never began":
            self.left = ""
            return True
        ceremonies = await operator.keys.ListCeremonies(coordinator_pb2.ListCeremoniesRequest(key_id=CANARY))
        if any(each.step not in (Step.DONE, Step.CANCELLED) for each in ceremonies.ceremonies):
            return False
        newest = {node.epochs.newest(CANARY) for node in nodes}
        return (
            state != "running"
            and not any(node.canary.any for node in nodes)
            and all(each is not None and each.state == "active" for each in newest)
            and len({each.epoch for each in newest if each is not None}) == 1
        )


@pytest.fixture
async def deaths(tmp_path: Path) -> AsyncIterator[Deaths]:
    async with open_drills(tmp_path) as scene:
        await scene.running.stop()
        opened = Deaths(scene)
        try:
            yield opened
        finally:
            await opened.process.kill()


SOME = (
    ("rotation", 1, "after"),  # it has begun, and nothing else happened
    ("custodian-loss", 2, "before"),  # nothing is injected yet
    ("split-view", 5, "after"),  # some custodians have the fault, others not
    ("rotation", 4, "after"),  # a ceremony is between two steps
    ("revocation", 2, "after"),  # the drill's owner is revoked
    ("restore", 7, "before"),  # undone, and not stored yet
)


async def test_killed_at_any_point_of_a_drill_a_coordinator_undoes_it(deaths: Deaths) -> None:
    if SOAK:
        pytest.skip("make soak goes through all of them, below")
    for kind, number, when in SOME:
        assert await deaths.dies(kind, number, when) is None
    # And killed again while it undoes that: it has been told that the custodians lifted it, and has not stored it.
    await deaths.start("undo", 4, "after")
    assert await deaths.dead(20.0)
    report = await deaths.dies("restore", 0, "before")
    assert report is not None
    assert report.passed


@pytest.mark.skipif(not SOAK, reason="takes many minutes: make soak")
@pytest.mark.parametrize("kind", KINDS)
async def test_killed_at_every_point_of_every_drill_a_coordinator_undoes_it(deaths: Deaths, kind: str) -> None:
    number, report = 0, None
    while report is None:
        number += 1
        for when in ("before", "after"):
            report = await deaths.dies(kind, number, when)
    assert report.passed, report
    assert number > (2 if kind in DOES_NOTHING else LEAST)


@pytest.mark.skipif(not SOAK, reason="takes many minutes: make soak")
@pytest.mark.parametrize(
    ("kind", "left"),
    [("custodian-loss", 2), ("split-view", 6), ("revocation", 2), ("rotation", 4), ("lying-custodian", 4)],
)
async def test_killed_at_every_point_of_undoing_it_does_so_when_it_is_back(
    deaths: Deaths, kind: str, left: int
) -> None:
    number, alive = 0, False
    while not alive:
        number += 1
        for when in ("before", "after"):
            assert await deaths.dies(kind, left, "after") is None
            await deaths.start("undo", number, when)
            alive = not await deaths.dead(5.0)
            if alive:
                await deaths.well()
                await deaths.process.terminate()
    assert number > LEAST
