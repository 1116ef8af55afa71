"""A full disk at the owner: each place that writes says ``STORAGE`` and leaves nothing that looks whole."""

from __future__ import annotations

import asyncio
import os
import resource
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

import keyquorum
from keyquorum.aio import AsyncClient
from keyquorum.folder import read_folder
from keyquorum.keyfiles import create_keys
from keyquorum.opening import encrypt_folder
from keyquorum.progress import silent
from keyquorum.rootcache import RootCache
from keyquorum_core.answers import JobBinding
from keyquorum_core.derivation import DerivedKey, key_check
from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_core.sealing import RecipientKey
from tests.support.client_world import PASSPHRASE, job_folder, the_world
from tests.support.fake_coordinator import FakeCoordinator, serving

BIG = os.urandom(1 << 20)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process may grow over ``size`` bytes (EFBIG; Python ignores the signal that goes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@asynccontextmanager
async def connected(coordinator: FakeCoordinator, folder: Path) -> AsyncIterator[AsyncClient]:
    async with serving(coordinator) as address:
        profile = coordinator.world.write_profile(folder / "profile", address)
        async with keyquorum.aio.connect(profile, passphrase=PASSPHRASE, confirm_grace=0.2) as client:
            yield client


def kept() -> tuple[JobBinding, DerivedKey]:
    job = JobBinding("a" * 26, bytes(32), "demo", 1)
    return job, DerivedKey(job.context(), bytes(32), key_check(bytes(32), job.context()))


@pytest.mark.parametrize("room", [0, 100_000, 1_000_000])
def test_the_bundle_does_not_fit(tmp_path: Path, room: int) -> None:
    found = read_folder(job_folder(tmp_path / "job", {"main.py": BIG}))
    subjects = found.subjects()
    with room_for(room), pytest.raises(UnavailableError) as caught:
        encrypt_folder(found, subjects, "a" * 26, bytes(32), silent)
    assert caught.value.reason is Reason.STORAGE
    assert "free space" in caught.value.next_step


def test_there_is_no_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_folder(job_folder(tmp_path / "job"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(UnavailableError) as caught:
        encrypt_folder(found, found.subjects(), "a" * 26, bytes(32), silent)
    assert caught.value.reason is Reason.STORAGE


def test_a_jobs_key_does_not_fit_and_the_one_kept_before_stays(tmp_path: Path) -> None:
    owner = RecipientKey.generate()
    cache = RootCache(tmp_path)
    job, key = kept()
    with room_for(100), pytest.raises(UnavailableError) as caught:
        cache.store(job, key, owner)
    assert caught.value.reason is Reason.STORAGE
    assert not list((tmp_path / "jobs").iterdir())
    cache.store(job, key, owner)
    with room_for(100), pytest.raises(UnavailableError):
        cache.store(job, key, owner)
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == [f"{job.job_id}.sealed"]
    assert cache.load(job, owner, key.key_check) == key


async def test_submitting_where_the_key_cannot_be_kept_is_refused_before_anything_is_uploaded(tmp_path: Path) -> None:
    coordinator = FakeCoordinator(the_world())
    async with connected(coordinator, tmp_path) as client:
        (tmp_path / "profile" / "state").write_text("a file where the folder should be")
        with pytest.raises(UnavailableError) as caught:
            await client.submit(job_folder(tmp_path / "job"), key="demo")
    assert caught.value.reason is Reason.STORAGE
    (job,) = coordinator.jobs.values()
    assert not job.artifacts


@pytest.mark.parametrize("room", [0, 50_000, 1_048_000])
async def test_a_result_does_not_fit(tmp_path: Path, room: int) -> None:
    coordinator = FakeCoordinator(the_world(), run=lambda files: (0, {"out.bin": BIG}, b"log\n"))
    async with connected(coordinator, tmp_path) as client:
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        with room_for(room), pytest.raises(UnavailableError) as caught:
            await client.result(job.id)
        assert caught.value.reason is Reason.STORAGE
        assert "free space" in caught.value.next_step
        with await client.result(job.id) as result:
            assert result.files["out.bin"] == BIG


async def test_a_saved_result_does_not_fit_and_what_was_there_before_stays(tmp_path: Path) -> None:
    outputs = {"a.txt": b"small", "sub/big.bin": BIG}
    coordinator = FakeCoordinator(the_world(), run=lambda files: (0, outputs, b"log\n"))
    out = tmp_path / "out"
    async with connected(coordinator, tmp_path) as client:
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        result = await client.result(job.id)
    with result:
        for before in (None, b"of an earlier run"):
            if before is not None:
                (out / "sub" / "big.bin").write_bytes(before)
            with room_for(500_000), pytest.raises(UnavailableError) as caught:
                await asyncio.to_thread(result.save, out)
            assert caught.value.reason is Reason.STORAGE
            assert (out / "a.txt").read_bytes() == b"small"
            left = {path.name: path.read_bytes() for path in (out / "sub").iterdir()}
            assert left == ({} if before is None else {"big.bin": before})
        result.save(out)
    assert (out / "sub" / "big.bin").read_bytes() == BIG


def test_key_files_do_not_fit_or_have_no_folder(tmp_path: Path) -> None:
    with room_for(100), pytest.raises(UnavailableError) as caught:
        create_keys(tmp_path / "keys", "alice", "owner", "pass")
    assert caught.value.reason is Reason.STORAGE
    assert not list((tmp_path / "keys").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError) as caught:
        create_keys(tmp_path / "file", "alice", "owner", "pass")
    assert caught.value.reason is Reason.STORAGE
