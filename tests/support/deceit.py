"""An owner and a coordinator that may lie to it, for adversarial tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import keyquorum
from keyquorum.aio import AsyncClient
from keyquorum_core.errors import KeyquorumError, Reason
from tests.support.client_world import PASSPHRASE, job_folder
from tests.support.fake_coordinator import FakeCoordinator, serving


@asynccontextmanager
async def deceived(coordinator: FakeCoordinator, folder: Path) -> AsyncIterator[AsyncClient]:
    async with serving(coordinator) as address:
        profile = coordinator.world.write_profile(folder / "profile", address)
        async with keyquorum.aio.connect(profile, passphrase=PASSPHRASE, confirm_grace=0.2) as client:
            yield client


async def submit(client: AsyncClient, tmp_path: Path) -> str:
    return (await client.submit(job_folder(tmp_path / "job"), key="demo")).id


async def reason_of_submitting_to(coordinator: FakeCoordinator, tmp_path: Path) -> Reason:
    async with deceived(coordinator, tmp_path) as client:
        with pytest.raises(KeyquorumError) as caught:
            await submit(client, tmp_path)
    return caught.value.reason


async def reason_of_believing(coordinator: FakeCoordinator, tmp_path: Path) -> Reason:
    """The job is submitted and runs; its result is then refused."""
    async with deceived(coordinator, tmp_path) as client:
        job = await submit(client, tmp_path)
        with pytest.raises(KeyquorumError) as caught:
            await client.result(job)
    return caught.value.reason
