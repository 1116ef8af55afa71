"""Data files with the cluster: which key is asked for, what an epoch's state means, nothing half done."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import keyquorum
from keyquorum.aio import AsyncClient
from keyquorum.progress import Progress, Stage
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.key_request import KEY_REQUEST_TYPE, KeyRequest
from keyquorum_core.signing import peek_payload
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.client_world import PASSPHRASE, the_world
from tests.support.data_files import data_key
from tests.support.fake_coordinator import FakeCoordinator, serving, unreachable


class Rotating(FakeCoordinator):
    """Its key ``demo`` may have further epochs, and states by epoch."""

    def __init__(self) -> None:
        super().__init__(the_world().honest())
        self.states = {1: "active"}
        self.made: dict[int, bytes] = {1: self.certificates["demo"]}

    def rotate(self) -> None:
        newest = max(self.states)
        self.states[newest] = "retired"
        self.states[newest + 1] = "active"
        self.made[newest + 1] = self.world.certify(self.world.plan("demo", epoch=newest + 1, certificate="ab" * 32))

    def message(self, epoch: int) -> pb.Key:
        retired = 1_800_000_000 if self.states[epoch] != "active" else 0
        certificate = self.made[epoch]
        return pb.Key(key_id="demo", epoch=epoch, state=self.states[epoch], certificate=certificate, retired_at=retired)

    def key_message(self, key_id: str, epoch: int = 0) -> pb.Key:
        if epoch and epoch not in self.states:
            known = ", ".join(map(str, sorted(self.states, reverse=True)))
            raise StateError(Reason.EPOCH, f"key {key_id} has no such epoch", expected=known, actual=epoch)
        return self.message(epoch or max(self.states))

    async def ListEpochs(self, request: pb.GetKeyRequest, context: Any) -> pb.ListKeysResponse:
        return pb.ListKeysResponse(keys=[self.message(epoch) for epoch in sorted(self.states, reverse=True)])


@pytest.fixture
def coordinator() -> Rotating:
    return Rotating()


@asynccontextmanager
async def connected(coordinator: Rotating, folder: Path) -> AsyncIterator[AsyncClient]:
    async with serving(coordinator) as address:
        profile = coordinator.world.write_profile(folder / "profile", address)
        async with keyquorum.aio.connect(profile, passphrase=PASSPHRASE, confirm_grace=0.2) as client:
            yield client


async def test_encrypt_rotate_rewrap_decrypt(coordinator: Rotating, tmp_path: Path) -> None:
    source, sealed = tmp_path / "in", tmp_path / "sealed"
    source.write_bytes(b"a very private record" * 1000)
    async with connected(coordinator, tmp_path) as client:
        made = await client.encrypt("demo", source, sealed, classification="personal", name="cohort")
        assert (made.header.epoch, made.header.name, made.header.owner, made.rewrap_before) == (1, "cohort", "alice", 0)
        coordinator.rotate()
        old = await client.decrypt(sealed, tmp_path / "one")
        assert old.rewrap_before == 1_800_000_000 + 2_592_000
        stages: list[Progress] = []
        moved = await client.rewrap(sealed, progress=stages.append)
        assert (moved.header.epoch, moved.header.file_id, moved.rewrap_before) == (2, made.header.file_id, 0)
        assert {each.stage for each in stages} == {Stage.OPEN, Stage.REWRAP}
        before, asked = sealed.read_bytes(), len(coordinator.seen)
        assert (await client.rewrap(sealed)).header.epoch == 2
        assert (sealed.read_bytes(), len(coordinator.seen)) == (before, asked)
        coordinator.states[1] = "destroyed"
        found = await client.decrypt(sealed, tmp_path / "two")
        streamed = io.BytesIO()
        await client.decrypt(io.BytesIO(before), streamed)
    assert found.size == source.stat().st_size
    for each in (tmp_path / "one", tmp_path / "two"):
        assert each.read_bytes() == source.read_bytes()
    assert streamed.getvalue() == source.read_bytes()
    assert b"very private" not in sealed.read_bytes()


async def test_a_rotation_meanwhile_does_not_part_a_file_from_its_epoch(
    coordinator: Rotating, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header names the epoch that the key is of, whatever became the newest since it was looked up."""
    sealed, key_message = tmp_path / "sealed", coordinator.key_message

    def rotates(key_id: str, epoch: int = 0) -> pb.Key:
        found = key_message(key_id, epoch)
        coordinator.rotate()
        return found

    async with connected(coordinator, tmp_path) as client:
        monkeypatch.setattr(coordinator, "key_message", rotates)
        made = await client.encrypt("demo", io.BytesIO(b"kept"), sealed, classification="personal")
        monkeypatch.undo()
        asked = KeyRequest.parse(
            peek_payload(pb.DeriveRequest.FromString(coordinator.seen[-1]).request, KEY_REQUEST_TYPE, "key request")
        )
        assert made.header.epoch == asked.epoch == 1
        await client.decrypt(sealed, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"kept"


async def test_an_opened_key_serves_many_files_with_one_release(coordinator: Rotating, tmp_path: Path) -> None:
    async with connected(coordinator, tmp_path) as client:
        with await client.data_key("demo", classification="personal") as key:
            asked = len(coordinator.seen)
            for number in range(5):
                key.encrypt(io.BytesIO(b"%d" % number), tmp_path / f"{number}")
                key.decrypt(tmp_path / f"{number}", tmp_path / f"{number}.back")
            assert len(coordinator.seen) == asked
        assert "root" not in repr(key)
        await client.decrypt(tmp_path / "3", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "3.back").read_bytes() == b"3"


async def test_a_destroyed_or_unknown_epoch_says_what_to_do(coordinator: Rotating, tmp_path: Path) -> None:
    sealed = tmp_path / "sealed"
    async with connected(coordinator, tmp_path) as client:
        await client.encrypt("demo", io.BytesIO(b"gone"), sealed, classification="personal")
        coordinator.rotate()
        coordinator.states[1] = "destroyed"
        for attempt in (client.decrypt(sealed, tmp_path / "out"), client.rewrap(sealed)):
            with pytest.raises(StateError) as caught:
                await attempt
            assert caught.value.reason is Reason.KEY_STATE
            assert "retain_seconds" in caught.value.next_step
        coordinator.states[1] = "retired"
        with pytest.raises(StateError) as unknown:
            await client.rewrap(sealed, to_epoch=9)
        assert (unknown.value.reason, unknown.value.expected) == (Reason.EPOCH, "2, 1")
        for none in (0, -1, 1 << 64):
            with pytest.raises(StateError) as caught:
                await client.rewrap(sealed, to_epoch=none)
            assert caught.value.reason is Reason.EPOCH
        await client.rewrap(sealed, to_epoch=2)
        with pytest.raises(RefusedError) as back:
            await client.rewrap(sealed, to_epoch=1)
        assert back.value.reason is Reason.EPOCH
    assert not (tmp_path / "out").exists()


async def test_a_file_opens_with_the_custodians_that_its_key_check_needs(coordinator: Rotating, tmp_path: Path) -> None:
    sealed = tmp_path / "sealed"
    async with connected(coordinator, tmp_path) as client:
        await client.encrypt("demo", io.BytesIO(b"kept"), sealed, classification="personal")
        for name in ("ch-1", "de-1"):
            coordinator.down[name] = unreachable(name)
        await client.decrypt(sealed, tmp_path / "out")
        with pytest.raises(UnavailableError) as caught:
            await client.encrypt("demo", io.BytesIO(b"new"), tmp_path / "new", classification="personal")
        assert caught.value.reason is Reason.NO_QUORUM
    assert (tmp_path / "out").read_bytes() == b"kept"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("other", "reason"), [({"owner": "bob"}, Reason.UNKNOWN_OWNER), ({"cluster": "prod"}, Reason.UNKNOWN_KEY)], ids=str
)
async def test_nobody_is_asked_for_a_file_of_others(
    coordinator: Rotating, tmp_path: Path, other: dict[str, str], reason: Reason
) -> None:
    with data_key(1, **other) as key:  # type: ignore[arg-type]
        key.encrypt(io.BytesIO(b"theirs"), tmp_path / "sealed")
    async with connected(coordinator, tmp_path) as client:
        for attempt in (client.decrypt(tmp_path / "sealed", tmp_path / "out"), client.rewrap(tmp_path / "sealed")):
            with pytest.raises(KeyquorumError) as caught:
                await attempt
            assert caught.value.reason is reason
    assert not coordinator.seen


def left(folder: Path) -> list[str]:
    return [each.name for each in folder.iterdir()]


async def test_an_interrupt_leaves_nothing_behind(coordinator: Rotating, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def report(progress: Progress) -> None:
        if progress.stage is Stage.ENCRYPT:
            begun.set()
            go_on.wait(30)

    async with connected(coordinator, tmp_path) as client:
        task = asyncio.ensure_future(
            client.encrypt(
                "demo", io.BytesIO(bytes(3_000_000)), tmp_path / "out", classification="personal", progress=report
            )
        )
        await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        for _ in range(500):
            if left(tmp_path) == ["profile"]:
                break
            await asyncio.sleep(0.02)
    assert left(tmp_path) == ["profile"]
