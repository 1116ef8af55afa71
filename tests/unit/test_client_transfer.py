"""Transfers take as long as they take: one that stands still is tried again while it gets further, then given up."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

import keyquorum
import keyquorum.transfer
from keyquorum.progress import silent
from keyquorum.session import Connection
from keyquorum.transfer import download, upload
from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.client_world import PASSPHRASE, the_world
from tests.support.fake_coordinator import FakeCoordinator, serving

DATA = os.urandom(3 << 20)
SHA256 = hashlib.sha256(DATA).digest()
STALL = 0.4


class Store(FakeCoordinator):
    """One artifact, whatever its job and kind. ``moods``: what to do in each call, in order; then all goes well."""

    def __init__(self, *moods: str) -> None:
        super().__init__(the_world())
        self.moods = list(moods)
        self.held = bytearray()
        self.whole = False

    async def misbehave(self, mood: str, context: Any) -> None:
        if mood.startswith("hang"):
            await asyncio.sleep(30)
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "a proxy's limit")

    async def Stat(self, request: pb.StatArtifactRequest, context: Any) -> pb.ArtifactState:
        return pb.ArtifactState(committed=len(self.held), complete=self.whole, size=len(self.held), sha256=SHA256)

    async def Upload(self, request_iterator: Any, context: Any) -> pb.ArtifactState:
        mood = self.moods.pop(0) if self.moods else ""
        async for chunk in request_iterator:
            self.whole = chunk.HasField("finish")
            if mood.endswith("at once"):
                await self.misbehave(mood, context)
            self.held += chunk.data
            if mood and chunk.data:
                await self.misbehave(mood, context)
        return await self.Stat(pb.StatArtifactRequest(), context)

    async def Download(self, request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.DownloadChunk]:
        mood = self.moods.pop(0) if self.moods else ""
        if mood.endswith("at once"):
            await self.misbehave(mood, context)
        for start in range(request.offset, len(DATA), 1 << 19):
            yield pb.DownloadChunk(data=DATA[start : start + (1 << 19)])
            if mood == "slow":
                await asyncio.sleep(STALL / 2)
            elif mood:
                await self.misbehave(mood, context)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyquorum.transfer, "STALL_SECONDS", STALL)


@asynccontextmanager
async def connected(store: Store, folder: Path) -> AsyncIterator[Connection]:
    async with serving(store) as address:
        profile = store.world.write_profile(folder / "profile", address)
        async with keyquorum.aio.connect(profile, passphrase=PASSPHRASE) as client:
            yield client._connection("owner")


async def test_a_slow_download_that_moves_on_takes_longer_than_the_stall_timer(tmp_path: Path) -> None:
    out = io.BytesIO()
    async with connected(Store("slow"), tmp_path) as connection:
        began = time.monotonic()
        await download(connection, "j", "result", out, len(DATA), SHA256, silent)
    assert time.monotonic() - began > 2 * STALL
    assert out.getvalue() == DATA


@pytest.mark.parametrize("mood", ["hang", "deadline"])
async def test_a_download_that_stood_still_goes_on_from_where_it_was(tmp_path: Path, mood: str) -> None:
    out = io.BytesIO()
    store = Store(mood, mood, mood)
    async with connected(store, tmp_path) as connection:
        await download(connection, "j", "result", out, len(DATA), SHA256, silent)
    assert out.getvalue() == DATA
    assert not store.moods


@pytest.mark.parametrize("mood", ["hang at once", "deadline at once"])
async def test_a_download_that_never_moves_is_given_up(tmp_path: Path, mood: str) -> None:
    store = Store(mood, mood)
    async with connected(store, tmp_path) as connection:
        with pytest.raises(UnavailableError) as caught:
            await download(connection, "j", "result", io.BytesIO(), len(DATA), SHA256, silent)
    assert caught.value.reason is Reason.TIMEOUT
    assert len(store.moods) == 1


@pytest.mark.parametrize("mood", ["hang", "deadline"])
async def test_an_upload_that_stood_still_goes_on_from_what_is_stored(tmp_path: Path, mood: str) -> None:
    store = Store(mood, mood)
    async with connected(store, tmp_path) as connection:
        await upload(connection, "j", "bundle", io.BytesIO(DATA), len(DATA), SHA256, silent)
    assert bytes(store.held) == DATA
    assert not store.moods


@pytest.mark.parametrize("mood", ["hang at once", "deadline at once"])
async def test_an_upload_of_which_the_store_takes_nothing_is_given_up(tmp_path: Path, mood: str) -> None:
    store = Store(mood, mood)
    async with connected(store, tmp_path) as connection:
        with pytest.raises(UnavailableError) as caught:
            await upload(connection, "j", "bundle", io.BytesIO(DATA), len(DATA), SHA256, silent)
    assert caught.value.reason is Reason.TIMEOUT
    assert len(store.moods) == 1


async def test_a_source_that_ends_early_or_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    async with connected(Store(), tmp_path) as connection:
        for source, text in ((io.BytesIO(DATA[:-1]), "ended early"), (Broken(DATA), "can't be read")):
            with pytest.raises(UnavailableError, match=text) as caught:
                await upload(connection, "j", "bundle", source, len(DATA), SHA256, silent)
            assert caught.value.reason is Reason.STORAGE
