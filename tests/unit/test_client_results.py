"""Results: waited for, verified, decrypted, saved; failed jobs; results opened again later."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import keyquorum
from keyquorum.aio import AsyncClient
from keyquorum.progress import Progress, Stage
from keyquorum.results import JobFailedError
from keyquorum_core.errors import Reason, RefusedError, StateError, UnavailableError
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.client_world import PASSPHRASE, World, job_folder, the_world
from tests.support.fake_coordinator import FakeCoordinator, Files, JobRecord, serving, unreachable


@pytest.fixture
def world() -> World:
    return the_world().honest()


@pytest.fixture
def coordinator(world: World) -> FakeCoordinator:
    return FakeCoordinator(world)


@asynccontextmanager
async def connected(coordinator: FakeCoordinator, folder: Path) -> AsyncIterator[AsyncClient]:
    async with serving(coordinator) as address:
        profile = coordinator.world.write_profile(folder / "profile", address)
        async with keyquorum.aio.connect(profile, passphrase=PASSPHRASE, confirm_grace=0.2) as client:
            yield client


async def test_a_result_is_verified_decrypted_and_saved(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    stages: set[Stage] = set()
    async with connected(coordinator, tmp_path) as client:
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        with await client.result(job.id, progress=lambda p: stages.add(p.stage)) as result:
            assert dict(result.files) == {"result.json": b'{"files": 2}', "out/copy.bin": bytes(range(256))}
            assert result.files.size("out/copy.bin") == 256
            assert result.log == b"ran\n"
            assert result.custodians == coordinator.world.quorum.ids
            assert result.evidence == ("sev-snp",)
            assert result.development
            assert (result.exit_code, result.statement.outcome, result.doubts) == (0, "completed", {})
            written = result.save(tmp_path / "out")
            again = result.save(tmp_path / "out")
    assert written == again
    assert [path.relative_to(tmp_path / "out").as_posix() for path in written] == [
        "out/copy.bin",
        "result.json",
        "job.log",
    ]
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "out/result.json").stat().st_mode) == 0o600
    assert stages == {Stage.WAIT, Stage.DOWNLOAD, Stage.DECRYPT}


async def test_a_result_is_not_written_through_a_link(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    async with connected(coordinator, tmp_path) as client:
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        result = await client.result(job.id)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnavailableError, match="in the way"):
        result.save(tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir()), "not even a folder"
    (tmp_path / "out" / "out").unlink()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out" / "result.json").symlink_to(tmp_path / "precious")
    result.save(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "mine"


async def test_no_folder_is_made_through_a_link(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    coordinator.run = lambda files: (0, {"a/b/c.txt": b"deep"}, b"")
    async with connected(coordinator, tmp_path) as client:
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        result = await client.result(job.id)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnavailableError, match="in the way"):
        result.save(tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "out" / "a").unlink()
    assert result.save(tmp_path / "out") == (tmp_path / "out" / "a" / "b" / "c.txt",)
    assert (tmp_path / "out" / "a" / "b" / "c.txt").read_bytes() == b"deep"


async def test_a_result_opens_without_custodians_from_the_owners_own_keeping(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    async with connected(coordinator, tmp_path) as client:
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        coordinator.down = {name: unreachable(name) for name in coordinator.world.custodians}
        opens = coordinator.opens
        assert (await client.result(job.id)).key_from_cache
        assert coordinator.opens == opens
        kept = tmp_path / "profile" / "state" / "jobs" / f"{job.id}.sealed"
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", ["missing", "changed", "of another job"])
async def test_without_the_kept_key_the_custodians_are_asked_again(
    coordinator: FakeCoordinator, tmp_path: Path, damage: str
) -> None:
    async with connected(coordinator, tmp_path) as client:
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        other = await client.submit(job_folder(tmp_path / "other", {"main.py": b"other"}), key="demo")
        folder = tmp_path / "profile" / "state" / "jobs"
        kept = folder / f"{job.id}.sealed"
        if damage == "missing":
            kept.unlink()
        elif damage == "changed":
            kept.write_bytes(bytes(each ^ 1 for each in kept.read_bytes()))
        else:
            kept.write_bytes((folder / f"{other.id}.sealed").read_bytes())
        result = await client.result(job.id)
        assert not result.key_from_cache
        assert (await client.result(job.id)).key_from_cache


async def test_without_kept_key_and_custodians_the_error_names_them(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    async with connected(coordinator, tmp_path) as client:
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        (tmp_path / "profile" / "state" / "jobs" / f"{job.id}.sealed").unlink()
        coordinator.down = {
            name: RefusedError(Reason.EXPIRED, "the manifest has expired") for name in coordinator.world.custodians
        }
        with pytest.raises(RefusedError) as expired:
            await client.result(job.id)
        coordinator.down = {name: unreachable(name) for name in ("ch-1", "de-1", "de-2")}
        with pytest.raises(UnavailableError) as lacking:
            await client.result(job.id)
    assert expired.value.reason is Reason.EXPIRED
    assert lacking.value.reason is Reason.NO_QUORUM


async def test_a_failed_job_says_so_and_gives_its_log(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    def crash(files: Files) -> tuple[int, Files, bytes]:
        return 3, {"partial.txt": b"half"}, b"Traceback: no\n"

    coordinator.run = crash
    async with connected(coordinator, tmp_path) as client:
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        with pytest.raises(JobFailedError) as caught:
            await client.result(job.id)
    error = caught.value
    assert error.reason is Reason.JOB_FAILED
    assert error.actual == "exit code 3"
    assert error.result.log == b"Traceback: no\n"
    assert error.result.files["partial.txt"] == b"half"
    error.result.close()


async def test_a_job_that_no_worker_could_run_says_that_this_is_the_coordinators_word(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    async with connected(coordinator, tmp_path) as client:
        coordinator.run = lambda files: refuse()
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        with pytest.raises(StateError) as caught:
            await client.result(job.id)
    assert caught.value.reason is Reason.JOB_FAILED
    assert caught.value.details["cause"] == "STALE"
    assert "coordinator's word" in caught.value.message


def refuse() -> tuple[int, Files, bytes]:
    raise RefusedError(Reason.STALE, "the evidence is stale")


async def test_a_cancelled_job_has_no_result(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    class Slow(FakeCoordinator):
        async def Commit(self, request: pb.CommitRequest, context: object) -> pb.Job:
            job = self._job(request.job_id)
            job.opening = request.opening
            return self.job_message(job)

    slow = Slow(coordinator.world)
    async with connected(slow, tmp_path) as client:
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        with pytest.raises(UnavailableError) as waiting:
            await client.result(job.id, timeout=0.3)
        assert (await client.cancel(job.id, why="changed my mind")).state == "cancelled"
        with pytest.raises(StateError) as caught:
            await client.result(job.id)
    assert waiting.value.reason is Reason.TIMEOUT
    assert caught.value.reason is Reason.STATE


async def test_one_bad_receipt_is_a_doubt_and_not_the_end(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    class OneBad(FakeCoordinator):
        def outcome(self, job: JobRecord) -> pb.Outcome:
            out = super().outcome(job)
            out.receipts[0].signature = bytes(64)
            return out

    async with connected(OneBad(coordinator.world), tmp_path) as client:
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        result = await client.result(job.id)
    assert set(result.doubts) == {"ch-1"}
    assert result.custodians == ("de-1", "de-2", "fr-1", "is-1")


async def test_watching_survives_a_restart_of_the_coordinator(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    async with connected(coordinator, tmp_path) as client:
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        coordinator.break_watch = True
        events = [event async for event in client.watch(job.id)]
        later = [event.sequence async for event in client.watch(job.id, after=3)]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert events[-1].final
    assert later == [event.sequence for event in events if event.sequence > 3]


async def test_progress_of_a_wait_names_the_states(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    seen: list[Progress] = []
    async with connected(coordinator, tmp_path) as client:
        job = await client.submit(job_folder(tmp_path / "job"), key="demo")
        assert await asyncio.wait_for(client.wait(job.id, progress=seen.append), 10) == "completed"
    assert [each.detail for each in seen] == ["submitted", "opened", "ready", "claimed w-1", "completed"]
