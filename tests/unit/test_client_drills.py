"""Drills from the operator's side: a live timeline, a report that only the pinned identity can sign, a page, a leaf."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
import time
from pathlib import Path

import pytest

from keyquorum import aio
from keyquorum.cli import run
from keyquorum.drill_page import render
from keyquorum.drills import find_in_ledger
from keyquorum.ledger.source import DirectorySource
from keyquorum.profile import load_profile
from keyquorum_core.bulletin import peek_bulletin
from keyquorum_core.drill_report import FULL, KINDS, Moment, open_report
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.ledger.leaves import Drill as DrillLeaf
from keyquorum_core.revocations import Revocations
from keyquorum_core.signing import Identity
from tests.support.client_world import CLUSTER, PASSPHRASE, the_world
from tests.support.fake_coordinator import FakeCoordinator, serving
from tests.support.fake_drills import AT, RAN, FakeDrills, report_of
from tests.support.ledger_world import TestLog, World


class Scene:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.drills = FakeDrills()
        self.moments: list[Moment] = []

    async def with_client(self, kind: str = "rotation", key: str = "canary", *, pinned: bool = True) -> object:
        coordinator = FakeCoordinator(the_world())
        async with serving(coordinator, self.drills.serve) as address:
            profile = coordinator.world.write_profile(self.folder / "profile", address)
            if pinned:
                self.drills.pin(profile)
            async with aio.AsyncClient(load_profile(profile), passphrase=PASSPHRASE) as client:
                return await client.drill_run(kind, key, moment=self.moments.append)

    async def refused(self, reason: Reason, kind: str = "rotation", key: str = "canary", *, pinned: bool = True) -> str:
        with pytest.raises(KeyquorumError) as caught:
            await self.with_client(kind, key, pinned=pinned)
        assert caught.value.reason is reason, caught.value
        return str(caught.value)

    async def command(self, *arguments: str) -> int:
        coordinator = FakeCoordinator(the_world())
        async with serving(coordinator, self.drills.serve) as address:
            profile = coordinator.world.write_profile(self.folder / "profile", address)
            self.drills.pin(profile)
            secret = self.folder / "passphrase"
            secret.write_text(PASSPHRASE)
            common = ["--profile", str(profile), "--passphrase-file", str(secret)]
            return await asyncio.to_thread(run, ["drill", *arguments, *common])


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def test_a_drill_is_followed_live_and_ends_with_its_verified_report(scene: Scene) -> None:
    finished = await scene.with_client()
    assert finished.report.passed  # type: ignore[attr-defined]
    assert [(each.step, each.text) for each in scene.moments] == [("start", "begins"), ("inject", "no answer [2J")]
    (request,) = scene.drills.requests
    assert (request.kind, request.key_id, request.revoke, request.lift) == ("rotation", "canary", b"", b"")


async def test_a_broken_connection_goes_on_with_the_same_drill(scene: Scene) -> None:
    scene.drills.breaks = 2
    await scene.with_client()
    assert len({each.drill_id for each in scene.drills.requests}) == 1
    assert len(scene.drills.requests) == 3


async def test_reports_of_anybody_else_s_signing_or_of_another_drill_are_not_believed(scene: Scene) -> None:
    scene.drills.signer = Identity.generate()
    await scene.refused(Reason.SIGNATURE)
    scene.drills.signer = scene.drills.identity
    scene.drills.other_id = RAN
    assert "another drill" in await scene.refused(Reason.STATE)
    scene.drills.other_id, scene.drills.cluster = "", "elsewhere"
    assert "another cluster" in await scene.refused(Reason.STATE)
    scene.drills.cluster, scene.drills.other_kind = CLUSTER, "restore"
    assert "another kind" in await scene.refused(Reason.STATE, kind=FULL)


async def test_nothing_is_begun_without_a_pinned_identity_or_for_no_kind_of_drill(scene: Scene) -> None:
    assert "drill.pub.json" in await scene.refused(Reason.NOT_FOUND, pinned=False)
    await scene.refused(Reason.MALFORMED, kind="earthquake")
    assert scene.drills.requests == []
    await scene.refused(Reason.CANARY, key="demo")


async def test_a_drill_of_revocation_carries_both_documents_signed(scene: Scene) -> None:
    await scene.with_client("revocation")
    (request,) = scene.drills.requests
    revoke, lift = peek_bulletin(request.revoke), peek_bulletin(request.lift)
    assert (revoke.kind, revoke.version, lift.version) == ("revocations", 1, 2)
    name = ("owner", scene.drills.identity.public.fingerprint)
    assert name in Revocations.read(revoke).revoked
    assert name not in Revocations.read(lift).revoked
    assert name in Revocations.read(lift).lifted


async def test_the_command_s_exit_status_is_the_drill_s_outcome(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await scene.command("run", FULL, "--json", "--out", str(scene.folder / "out")) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["kind"] for each in found["report"]["parts"]] == list(KINDS)
    report = open_report((scene.folder / "out/report.json").read_bytes(), scene.drills.identity.public)
    assert report.digest == found["report_sha256"]
    assert (scene.folder / "out/report.html").read_text() == render(report)
    scene.drills.failed = "repair"
    assert await scene.command("run", FULL) == 1
    said = capsys.readouterr()
    assert "FAILED repair: the key derives as before: expected the same key, got another" in said.out
    assert "no answer [2J" in said.err  # the timeline, and nothing that a terminal would obey
    assert await scene.command("show", RAN, "--timeline") == 0
    assert "it gives <no> answer" in capsys.readouterr().out
    assert await scene.command("show", "cd" * 16) == 1
    assert await scene.command("cancel", RAN) == 0
    assert scene.drills.cancelled == [RAN]


async def test_what_there_is_to_rehearse_and_when_it_passed_last(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await scene.command("list", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["kind"] for each in found["kinds"]] == list(KINDS)
    assert (found["kinds"][0]["every_seconds"], found["kinds"][1]["last_passed"]) == (7 * 86400, 0)
    assert found["runs"][0]["drill_id"] == RAN
    assert await scene.command("list") == 0
    assert "never" in capsys.readouterr().out


def test_a_page_shows_everything_and_obeys_nothing() -> None:
    report = report_of(RAN, FULL, failed="split-view")
    page = render(report)
    assert "it gives &lt;no&gt; answer" in page
    assert "<no>" not in page
    assert "Failed: split-view." in page
    for kind in KINDS:
        assert f'<section id="{kind}">' in page
    assert "default-src 'none'" in page
    assert "<script" not in page


async def test_the_ledger_has_a_leaf_about_a_report_or_the_coordinator_hides_it(tmp_path: Path) -> None:
    report = report_of(RAN, FULL, failed="repair")
    leaf = DrillLeaf(drill=FULL, passed=False, report_sha256=report.digest, duration_ms=report.duration_ms, time=AT)
    other = dataclasses.replace(leaf, report_sha256="1" * 64)

    async def find(*leaves: DrillLeaf) -> int:
        world = World()
        log = TestLog(world, [b'{"type":"drill"}', *(each.to_bytes() for each in leaves)], now=int(time.time()))
        folder = log.write(tmp_path / secrets.token_hex(4))
        return await find_in_ledger(DirectorySource(folder), world.trust, report, patience=0)

    assert await find(other, leaf) == 2
    with pytest.raises(KeyquorumError) as hidden:
        await find(other)
    assert hidden.value.reason is Reason.NOT_FOUND
    with pytest.raises(KeyquorumError) as changed:
        await find(dataclasses.replace(leaf, passed=True))
    assert changed.value.reason is Reason.LEAF
