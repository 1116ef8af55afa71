"""Uploads in parts: resumed, replaced, damaged, on a full disk."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from keyquorum_coordinator import migrations
from keyquorum_coordinator.artifacts import ArtifactState, ArtifactStore, Upload, WriteRight
from keyquorum_coordinator.database import Database, make_engine
from keyquorum_coordinator.jobs import JobStore
from keyquorum_coordinator.objects import Objects, open_objects
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError, UnavailableError
from tests.support.coordinator import new_job

JOB = "a" * 26
PART = 1000
LIMIT = 1 << 20
DATA = secrets.token_bytes(4321)


class Disk:
    """A store whose disk can be full, slow, or lose a write's tail."""

    def __init__(self, inner: Objects) -> None:
        self.inner = inner
        self.room = 1 << 30
        self.truncate = False

    def put(self, path: str, data: bytes) -> None:
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        self.inner.put(path, data[:-1] if self.truncate else data)

    def get(self, path: str, offset: int, size: int) -> bytes:
        return self.inner.get(path, offset, size)

    def paths(self, prefix: str) -> list[str]:
        return self.inner.paths(prefix)

    def delete(self, paths: list[str]) -> None:
        self.inner.delete(paths)


class Setting:
    def __init__(self, database: Database, disk: Disk) -> None:
        self.database = database
        self.disk = disk
        self.lost: Exception | None = None
        self.restart()

    def check(self, session: Session) -> None:
        if self.lost is not None:
            raise self.lost

    def restart(self) -> None:
        """What a new process would make of the same database and disk."""
        self.store = ArtifactStore(self.database, self.disk, part_size=PART)

    async def committed(self) -> int:
        return (await self.store.state(JOB, "bundle")).committed

    async def begin(self, offset: int) -> Upload:
        return await self.store.upload(JOB, "bundle", offset, WriteRight(LIMIT, self.check))

    async def send(self, data: bytes, offset: int = 0, piece: int = 300) -> ArtifactState:
        upload = await self.begin(offset)
        try:
            for start in range(offset, len(data), piece):
                await upload.write(data[start : start + piece])
            return await upload.finish(len(data), hashlib.sha256(data).digest())
        finally:
            upload.close()

    async def read(self, offset: int = 0) -> bytes:
        return b"".join([piece async for piece in self.store.download(JOB, "bundle", offset)])


@pytest.fixture
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    engine = make_engine(f"sqlite:///{tmp_path / 'c.db'}")
    migrations.upgrade(engine)
    database = Database(engine)
    await JobStore(database).submit(new_job(JOB))
    yield Setting(database, Disk(open_objects(str(tmp_path / "objects"))))
    database.close()


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 4 * PART, len(DATA)])
async def test_what_is_uploaded_is_downloaded(setting: Setting, size: int) -> None:
    state = await setting.send(DATA[:size])
    assert (state.complete, state.committed, state.sha256) == (True, size, hashlib.sha256(DATA[:size]).digest())
    assert await setting.read() == DATA[:size]
    assert await setting.read(size // 2) == DATA[size // 2 : size]


async def test_an_upload_goes_on_from_what_is_committed_after_a_restart(setting: Setting) -> None:
    upload = await setting.begin(0)
    for start in range(0, 2500, 500):
        await upload.write(DATA[start : start + 500])
    setting.restart()
    assert await setting.committed() == 2000
    state = await setting.send(DATA, offset=2000)
    assert state.complete
    assert await setting.read() == DATA


async def test_another_offset_is_refused_and_the_right_one_named(setting: Setting) -> None:
    (await setting.begin(0)).close()
    upload = await setting.begin(0)
    await upload.write(DATA[:PART])
    upload.close()
    with pytest.raises(StateError) as caught:
        await setting.begin(500)
    assert caught.value.details == {"committed": str(PART)}


async def test_beginning_again_drops_the_earlier_parts(setting: Setting) -> None:
    await setting.send(DATA)
    state = await setting.send(DATA[:1500])
    assert state.committed == 1500
    assert await setting.read() == DATA[:1500]
    assert len(setting.disk.paths(f"jobs/{JOB}/bundle")) == 2


async def test_a_newer_upload_ends_an_older_one(setting: Setting) -> None:
    older = await setting.begin(0)
    await older.write(DATA[:PART])
    newer = await setting.begin(PART)
    with pytest.raises(StateError):
        await older.write(DATA[PART : 2 * PART])
    older.close()
    await newer.write(DATA[PART:2000])
    assert await setting.committed() == 2000
    newer.close()


async def test_a_full_disk_is_a_storage_error_and_what_was_committed_stays(setting: Setting) -> None:
    setting.disk.room = 2500
    with pytest.raises(UnavailableError) as caught:
        await setting.send(DATA)
    assert caught.value.reason is Reason.STORAGE
    assert await setting.committed() == 2000
    setting.disk.room = 1 << 20
    assert (await setting.send(DATA, offset=2000)).complete
    assert await setting.read() == DATA


async def test_a_wrong_digest_is_refused_and_nothing_of_it_kept(setting: Setting) -> None:
    upload = await setting.begin(0)
    await upload.write(DATA[:1500])
    with pytest.raises(RefusedError) as caught:
        await upload.finish(1500, bytes(32))
    assert caught.value.reason is Reason.DIGEST
    assert await setting.committed() == 0
    assert setting.disk.paths(f"jobs/{JOB}/bundle") == []


async def test_a_wrong_size_is_refused_and_the_upload_can_go_on(setting: Setting) -> None:
    upload = await setting.begin(0)
    await upload.write(DATA[:1500])
    with pytest.raises(RefusedError):
        await upload.finish(len(DATA), hashlib.sha256(DATA).digest())
    upload.close()
    assert (await setting.send(DATA, offset=await setting.committed())).complete


async def test_a_part_damaged_on_disk_sends_the_upload_back_to_the_last_good_one(setting: Setting) -> None:
    upload = await setting.begin(0)
    await upload.write(DATA[:PART])
    setting.disk.truncate = True
    await upload.write(DATA[PART:2000])
    upload.close()
    setting.disk.truncate = False
    with pytest.raises(StateError) as caught:
        await setting.begin(2000)
    assert caught.value.details == {"committed": str(PART)}
    assert (await setting.send(DATA, offset=PART)).complete
    assert await setting.read() == DATA


async def test_an_object_stored_but_not_recorded_is_swept(setting: Setting) -> None:
    upload = await setting.begin(0)
    await upload.write(DATA[:PART])
    upload.close()
    (path,) = setting.disk.paths(f"jobs/{JOB}/bundle")
    setting.disk.put(path[:-1] + "1", b"a part that was never recorded")
    setting.restart()
    assert (await setting.send(DATA, offset=PART)).complete
    assert await setting.read() == DATA
    assert len(setting.disk.paths(f"jobs/{JOB}/bundle")) == 5


async def test_a_sender_that_hangs_up_still_finds_the_part_it_sent(setting: Setting) -> None:
    upload = await setting.begin(0)
    writing = asyncio.create_task(upload.write(DATA[:PART]))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    upload.close()
    for _ in range(100):
        if await setting.committed() == PART:
            break
        await asyncio.sleep(0.01)
    assert await setting.committed() in (0, PART)
    assert (await setting.send(DATA, offset=await setting.committed())).complete


async def test_an_upload_over_its_limit_is_refused(setting: Setting) -> None:
    upload = await setting.store.upload(JOB, "bundle", 0, WriteRight(1500, setting.check))
    await upload.write(bytes(1500))
    with pytest.raises(RefusedError) as caught:
        await upload.write(b"1")
    assert caught.value.reason is Reason.TOO_LARGE


async def test_a_piece_over_a_mebibyte_is_refused(setting: Setting) -> None:
    upload = await setting.store.upload(JOB, "bundle", 0, WriteRight(1 << 30, setting.check))
    with pytest.raises(MalformedError):
        await upload.write(bytes((1 << 20) + 1))


async def test_kinds_are_names_and_never_paths(setting: Setting) -> None:
    with pytest.raises(MalformedError):
        await setting.store.state(JOB, "../bundle")


async def test_an_incomplete_artifact_is_not_handed_out(setting: Setting) -> None:
    upload = await setting.begin(0)
    await upload.write(DATA[:PART])
    with pytest.raises(StateError) as caught:
        await setting.read()
    assert caught.value.reason is Reason.NOT_FOUND


# -- rights lost on the way -------------------------------------------------------------------------------------------


async def test_who_loses_the_right_changes_nothing_more(setting: Setting) -> None:
    upload = await setting.begin(0)
    await upload.write(DATA[:PART])
    setting.lost = StateError(Reason.STATE, "no longer")
    for change in (
        upload.write(DATA[PART : 2 * PART]),
        upload.finish(PART, hashlib.sha256(DATA[:PART]).digest()),
        upload.finish(PART, bytes(32)),
        setting.begin(0),
        setting.begin(PART),
    ):
        with pytest.raises(StateError):
            await change
    setting.lost = None
    state = await setting.store.state(JOB, "bundle")
    assert (state.committed, state.complete) == (PART, False)
    assert len(setting.disk.paths(f"jobs/{JOB}/bundle")) == 1
    assert (await setting.send(DATA, offset=PART)).complete


async def test_a_complete_artifact_is_replaced_only_by_another_upload_from_the_start(setting: Setting) -> None:
    await setting.send(DATA[: 2 * PART])
    again = await setting.begin(2 * PART)
    with pytest.raises(StateError) as caught:
        await again.write(DATA[2 * PART : 3 * PART])
    assert caught.value.reason is Reason.EXISTS
    again.close()
    with pytest.raises(RefusedError):
        await (await setting.begin(2 * PART)).finish(2 * PART, bytes(32))
    assert await setting.read() == DATA[: 2 * PART]
    assert (await setting.send(DATA[: 2 * PART], offset=2 * PART)).complete  # the answer was lost: told again
    assert (await setting.send(DATA)).committed == len(DATA)
