"""A custodian whose seeds are a PKCS#11 module's own keys, as a process of its own, in ceremonies that a coordinator
drives."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from keyquorum_coordinator.tending import Tending
from keyquorum_core.ceremony_states import Kind
from keyquorum_custodian.config import load_config
from keyquorum_custodian.keystore import open_keystore
from keyquorum_custodian.resealing import reseal
from keyquorum_custodian.sealing.record import Scheme
from keyquorum_custodian.sealing.schemes import TokenWrapping
from keyquorum_custodian.sealing.token import Token
from tests.support.ceremonies import approve, order
from tests.support.ceremony_scene import CeremonyScene
from tests.support.custodian import PASSPHRASE, CustodianProcess, build_committee, start_custodian_process
from tests.support.softhsm import MODULE, PIN, a_token, needs_softhsm

pytestmark = [needs_softhsm, pytest.mark.timeout(120)]
ME = "ch-1"


class Scene(CeremonyScene):
    """With ``ME`` as a process."""

    process: CustodianProcess | None = None

    async def up(self, name: str) -> None:
        if name == ME:
            folder = self.committee.directory(ME)
            self.process = await asyncio.to_thread(start_custodian_process, folder, PIN)
        else:
            await super().up(name)

    async def down(self, name: str) -> None:
        if name == ME:
            process, self.process = self.process, None
            assert process is None or await asyncio.to_thread(process.stop) == 0
        else:
            await super().down(name)

    async def stop(self) -> None:
        await self.down(ME)
        await super().stop()


def command(scene: Scene, *arguments: str) -> dict[str, object]:
    where = ["--dir", str(scene.committee.directory(ME)), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "keyquorum_custodian", *arguments, *where],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found: dict[str, object] = json.loads(done.stdout)
    return found


async def test_it_generates_rotates_is_repaired_and_destroys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(self: Tending) -> None:
        """What is due, the test orders."""

    monkeypatch.setattr(Tending, "forever", never)
    soft = a_token()
    committee = build_committee(tmp_path / "custodians")
    config = committee.directory(ME) / "custodian.toml"
    config.write_text(config.read_text().replace('pkcs11_module = ""', f'pkcs11_module = "{MODULE}"'))
    store = open_keystore(load_config(config.parent), PASSPHRASE)
    reseal(store, TokenWrapping(Token.open(MODULE, PIN, soft.label), Scheme.PKCS11_SEEDS))
    store.close()

    def in_token() -> int:
        token = Token.open(MODULE, PIN, soft.label)
        try:
            return len(token.seeds(f"keyquorum seed {ME}"))
        finally:
            token.close()

    scene = Scene(committee, tmp_path / "coordinator")
    await scene.start()
    try:
        await scene.generate()
        assert in_token() == 2
        await scene.run(await scene.plan(Kind.ROTATE))
        assert in_token() == 4

        await scene.down(ME)
        await scene.run(await scene.plan(Kind.ROTATE))
        assert [each.stale for each in await scene.epochs()] == [[ME], [], []]
        await scene.up(ME)
        await scene.running.server.fanout.probe_all()
        await scene.run(await scene.plan(Kind.REPAIR, target=ME))
        assert in_token() == 6
        assert [each.stale for each in await scene.epochs()] == [[], [], []]

        plan = await scene.plan(Kind.DESTROY, epoch=1)
        for name in committee.ids:
            if name != ME:
                approve(committee, name, order(committee, plan))
        running = asyncio.create_task(scene.run(plan))
        while not (waiting := (await asyncio.to_thread(command, scene, "approve"))["pending"]):
            assert not running.done()
        assert isinstance(waiting, list)
        await asyncio.to_thread(command, scene, "approve", waiting[0]["request_id"], "--yes")
        await running
        assert in_token() == 4
    finally:
        await scene.stop()
    committee.secrets[ME] = PIN
    node = committee.open(ME)  # each seed is checked against the certificate again
    assert [(held.epoch, len(held.indices)) for held in node.epochs.all()] == [(2, 2), (3, 2)]
    committee.close()
