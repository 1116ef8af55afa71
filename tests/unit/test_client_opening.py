"""Submitting: from a folder to a committed job, with an honest coordinator over real TLS and custodians at fault."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from queue import Queue

import pytest

import keyquorum
from keyquorum.aio import AsyncClient
from keyquorum.folder import read_folder
from keyquorum.opening import encrypt_folder
from keyquorum.profile import load_profile
from keyquorum.progress import Progress, Stage, silent
from keyquorum.session import Connection
from keyquorum.transfer import download, upload
from keyquorum_core.artifact import DecryptingReader, binding
from keyquorum_core.bundle import digests
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.keywrap import save_keys
from keyquorum_core.manifest import Resources, open_opening
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.client_world import PASSPHRASE, World, job_folder, the_world
from tests.support.fake_coordinator import FakeCoordinator, serving, unreachable


@pytest.fixture
def world() -> World:
    return the_world().honest()


@pytest.fixture
def coordinator(world: World) -> FakeCoordinator:
    return FakeCoordinator(world)


@asynccontextmanager
async def connected(coordinator: FakeCoordinator, folder: Path, grace: float = 0.2) -> AsyncIterator[AsyncClient]:
    async with serving(coordinator) as address:
        profile = coordinator.world.write_profile(folder / "profile", address)
        async with keyquorum.aio.connect(profile, passphrase=PASSPHRASE, confirm_grace=grace) as client:
            yield client


async def test_a_folder_becomes_a_committed_job(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    stages: list[Progress] = []
    async with connected(coordinator, tmp_path) as client:
        submitted = await client.submit(job_folder(tmp_path / "job"), key="demo", progress=stages.append)
        assert submitted.confirmed
        assert not submitted.blamed
        assert (await client.job(submitted.id)).final
        assert [job.id for job in await client.jobs()] == [submitted.id]
    record = coordinator.jobs[submitted.id]
    assert {each.name for each in record.manifest.subjects} == {"main.py", "data/input.bin"}
    assert record.manifest.entrypoint == ("python", "main.py")
    opening = open_opening(record.opening, coordinator.world.owner.public, submitted.id)
    assert opening.confirmed
    assert opening.bundle_sha256 == hashlib.sha256(record.artifacts["bundle"]).hexdigest()
    assert {each.stage for each in stages} == {Stage.OPEN, Stage.ENCRYPT, Stage.UPLOAD}


async def test_arguments_go_before_what_the_folder_says(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    resources = Resources(cpus=2, memory_mib=64, gpus=1, wall_seconds=5, output_mib=1)
    end = int(time.time()) + 600
    async with connected(coordinator, tmp_path) as client:
        submitted = await client.submit(
            job_folder(tmp_path / "job"),
            key="demo",
            classification="secret",
            regions=["us-east-1", "CH"],
            export_control="5A002",
            purposes=["research", "chemistry"],
            entrypoint=["python", "-m", "main"],
            resources=resources,
            not_after=end,
        )
    manifest = coordinator.jobs[submitted.id].manifest
    assert (manifest.classification, manifest.regions) == ("secret", ("CH", "us-east-1"))
    assert (manifest.export_control, manifest.entrypoint) == ("5A002", ("python", "-m", "main"))
    assert (manifest.resources, manifest.not_after) == (resources, end)
    assert manifest.purposes == ("chemistry", "research")


async def test_the_same_folder_submitted_twice_is_two_jobs(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    folder = job_folder(tmp_path / "job")
    async with connected(coordinator, tmp_path) as client:
        both = await asyncio.gather(client.submit(folder, key="demo"), client.submit(folder, key="demo"))
    assert len(coordinator.jobs) == len({job.id for job in both}) == 2


async def test_g6_a_custodian_that_lies_is_blamed_by_name_and_the_job_goes_on(
    world: World, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    world.custodians["de-1"].lies = True
    async with connected(coordinator, tmp_path) as client:
        submitted = await client.submit(job_folder(tmp_path / "job"), key="demo")
        assert submitted.blamed == ("de-1",)
        assert submitted.confirmed
        assert (await client.result(submitted.id)).exit_code == 0


async def test_a_custodian_that_seals_nonsense_is_blamed_by_name(
    world: World, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    world.custodians["fr-1"].garbles = True
    async with connected(coordinator, tmp_path) as client:
        submitted = await client.submit(job_folder(tmp_path / "job"), key="demo")
    assert submitted.blamed == ("fr-1",)


async def test_two_custodians_down_of_five_still_submit_with_a_warning_that_nothing_is_confirmed(
    coordinator: FakeCoordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.down = {name: unreachable(name) for name in ("ch-1", "is-1")}
    async with connected(coordinator, tmp_path) as client:
        submitted = await client.submit(job_folder(tmp_path / "job"), key="demo")
        result = await client.result(submitted.id)
    assert not submitted.confirmed
    assert not result.confirmed
    assert set(submitted.refused) == {"ch-1", "is-1"}
    assert "not confirmed" in caplog.text


async def test_a_silent_custodian_costs_no_more_than_the_grace(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    coordinator.silent = {"ch-1", "is-1"}
    async with connected(coordinator, tmp_path) as client:
        submitted = await asyncio.wait_for(client.submit(job_folder(tmp_path / "job"), key="demo"), 10)
    assert not submitted.confirmed


async def test_three_down_of_five_is_a_clear_refusal_that_names_them(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    coordinator.down = {name: unreachable(name) for name in ("ch-1", "de-2", "is-1")}
    async with connected(coordinator, tmp_path) as client:
        with pytest.raises(UnavailableError) as caught:
            await client.submit(job_folder(tmp_path / "job"), key="demo")
    assert caught.value.reason is Reason.NO_QUORUM
    assert set(caught.value.details) == {"ch-1", "de-2", "is-1", "job"}
    assert "de-2 could not be reached" in caught.value.message


async def test_when_all_custodians_refuse_for_one_reason_that_is_the_reason(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    coordinator.down = {
        name: RefusedError(Reason.UNKNOWN_OWNER, "no such owner", details={"custodian": name})
        for name in coordinator.world.custodians
    }
    async with connected(coordinator, tmp_path) as client:
        with pytest.raises(RefusedError) as caught:
            await client.submit(job_folder(tmp_path / "job"), key="demo")
    assert caught.value.reason is Reason.UNKNOWN_OWNER


async def test_a_broken_upload_goes_on_from_what_is_stored(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    coordinator.break_upload_at = 1 << 20
    big = job_folder(tmp_path / "job", {"main.py": b"pass", "data/input.bin": os.urandom(3 << 20)})
    async with connected(coordinator, tmp_path) as client:
        submitted = await client.submit(big, key="demo")
        result = await client.result(submitted.id)
        assert result.files["out/copy.bin"] == (big / "data/input.bin").read_bytes()
    sent = sum(len(each) for each in coordinator.seen if len(each) > 100_000)
    assert sent < 2 * len(coordinator.jobs[submitted.id].artifacts["bundle"])


async def test_an_upload_again_after_it_is_complete_sends_nothing(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    async with connected(coordinator, tmp_path) as client:
        submitted = await client.submit(job_folder(tmp_path / "job"), key="demo")
        data = bytes(coordinator.jobs[submitted.id].artifacts["bundle"])
        connection = client._connection("owner")
        before = len(coordinator.seen)
        digest = hashlib.sha256(data).digest()
        await upload(connection, submitted.id, "bundle", io.BytesIO(data), len(data), digest, silent)
        assert len(coordinator.seen) == before
        out = io.BytesIO()
        coordinator.break_download_at = 500
        await download(connection, submitted.id, "bundle", out, len(data), digest, silent)
        assert out.getvalue() == data


async def test_a_file_that_changes_while_it_is_submitted_is_refused(tmp_path: Path) -> None:
    found = read_folder(job_folder(tmp_path / "job"))
    subjects = found.subjects()
    (tmp_path / "job" / "main.py").write_bytes(b"print('HELLO')\n")
    with pytest.raises(RefusedError, match="changed") as caught:
        encrypt_folder(found, subjects, "a" * 26, bytes(32), silent)
    assert caught.value.reason is Reason.BUNDLE


@pytest.mark.parametrize("kind", ["link", "pipe", "folder-link"])
def test_a_folder_with_links_or_devices_is_refused(tmp_path: Path, kind: str) -> None:
    folder = job_folder(tmp_path / "job")
    if kind == "pipe":
        os.mkfifo(folder / "pipe")
    else:
        (folder / "link").symlink_to("/etc" if kind == "folder-link" else "/etc/passwd")
    with pytest.raises(RefusedError, match="neither a file nor a folder") as caught:
        read_folder(folder)
    assert caught.value.reason is Reason.BUNDLE


def test_hidden_files_stay_behind(tmp_path: Path) -> None:
    folder = job_folder(tmp_path / "job", {"main.py": b"", ".env": b"secret", "__pycache__/x.pyc": b"", "a/b.txt": b""})
    assert [file.name for file in read_folder(folder).files] == ["a/b.txt", "main.py"]


@pytest.mark.parametrize(
    "text",
    ["entrypoint = 3", "unknown = 1", "[resources]\ncpus = 1.5", "[resources]\nram = 1", "not toml", "regions = []"],
)
def test_a_bad_job_toml_is_malformed(tmp_path: Path, text: str) -> None:
    folder = job_folder(tmp_path / "job")
    (folder / "job.toml").write_text(text)
    with pytest.raises(MalformedError):
        read_folder(folder)


def test_a_missing_or_empty_folder_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="missing"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(RefusedError, match="no files"):
        read_folder(tmp_path)


def test_a_job_without_an_entrypoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="no entrypoint"):
        read_folder(job_folder(tmp_path / "job")).settings.overridden(entrypoint=[])


async def test_a_key_of_another_suite_is_refused_before_anything_is_sent(
    world: World, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    coordinator.certificates["cnsa"] = world.certify(world.plan("cnsa", suite="MLKEM1024_P384"))
    async with connected(coordinator, tmp_path) as client:
        assert (await client.key("cnsa")).suite == "MLKEM1024_P384"
        with pytest.raises(RefusedError, match="another suite") as caught:
            await client.submit(job_folder(tmp_path / "job"), key="cnsa")
    assert caught.value.reason is Reason.RECIPIENT
    assert not coordinator.jobs


async def test_an_unknown_key_is_the_coordinators_answer(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    async with connected(coordinator, tmp_path) as client:
        with pytest.raises(StateError) as caught:
            await client.submit(job_folder(tmp_path / "job"), key="nope")
    assert caught.value.reason is Reason.UNKNOWN_KEY


async def test_an_operator_creates_a_key_and_gets_a_verified_certificate(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    steps: list[str] = []
    async with connected(coordinator, tmp_path) as client:
        record = await client.key_create("new", progress=lambda p: steps.append(p.part))
        assert record.custodians == coordinator.world.quorum.ids
        assert [each.key_id for each in await client.keys()] == ["demo", "new"]
        with pytest.raises(StateError) as caught:
            await client.key_create("new")
    assert caught.value.reason is Reason.EXISTS
    assert steps == ["propose", "deliver", "confirm", "activate", "done"]


async def test_an_operator_that_the_roster_does_not_name_is_told_so(world: World, tmp_path: Path) -> None:
    coordinator = FakeCoordinator(world)
    async with serving(coordinator) as address:
        profile = world.write_profile(tmp_path, address)
        stranger = Identity.generate()
        blob = save_keys(stranger, RecipientKey.generate(), PASSPHRASE, "operator", "oscar", opslimit=1, memlimit=8192)
        (tmp_path / "oscar.key.json").write_bytes(blob)
        async with keyquorum.aio.connect(profile, passphrase=PASSPHRASE) as client:
            with pytest.raises(RefusedError) as caught:
                await client.key_create("new")
    assert caught.value.reason is Reason.UNKNOWN_OPERATOR


async def test_a_wrong_passphrase_and_a_lost_key_are_clear_errors(
    coordinator: FakeCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KEYQUORUM_PASSPHRASE", raising=False)
    profile = coordinator.world.write_profile(tmp_path, "127.0.0.1:1")
    for passphrase in ("wrong", None):
        async with keyquorum.aio.connect(profile, passphrase=passphrase) as client:
            with pytest.raises(RefusedError) as caught:
                await client.jobs()
        assert caught.value.reason is Reason.PASSPHRASE
    (tmp_path / "alice.key.json").unlink()
    async with keyquorum.aio.connect(profile, passphrase=PASSPHRASE) as client:
        with pytest.raises(UnavailableError) as lost:
            await client.jobs()
    assert lost.value.reason is Reason.NOT_FOUND
    assert "backup" in lost.value.next_step


async def test_a_coordinator_that_is_not_there_is_told_within_seconds(world: World, tmp_path: Path) -> None:
    profile = load_profile(world.write_profile(tmp_path, "127.0.0.1:1"))
    assert profile.owner is not None
    connection = Connection(profile, profile.owner.tls, patience=0.5)
    with pytest.raises(UnavailableError) as caught:
        await connection.unary(connection.cluster.Describe, pb.DescribeClusterRequest())
    await connection.close()
    assert caught.value.reason is Reason.UNAVAILABLE


async def test_the_synchronous_client_has_the_same_methods_and_closes_twice(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    def work(address: str) -> tuple[list[str], bytes]:
        profile = coordinator.world.write_profile(tmp_path / "profile", address)
        with keyquorum.connect(profile, passphrase=lambda path: PASSPHRASE) as client:
            job = client.submit(job_folder(tmp_path / "job"), key="demo")
            states = [event.state for event in client.watch(job.id)]
            first = client.watch(job.id)
            next(first)
            first.close()
            with client.result(job.id) as result:
                log = result.log
            assert client.status().roster_pinned
            assert client.key("demo").key_id == "demo"
        client.close()
        with pytest.raises(StateError, match="closed"):
            client.jobs()
        return states, log

    async with serving(coordinator) as address:
        states, log = await asyncio.to_thread(work, address)
    assert states[0] == "submitted"
    assert states[-1] == "completed"
    assert log == b"ran\n"


def test_an_interrupt_ends_the_call_and_leaves_the_client_usable(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    coordinator.history = lambda job: job.events[:1]  # type: ignore[method-assign]
    address: Queue[str] = Queue()
    stopped = threading.Event()

    async def serve() -> None:
        async with serving(coordinator) as where:
            address.put(where)
            await asyncio.to_thread(stopped.wait)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    server = threading.Thread(target=asyncio.run, args=(serve(),))
    server.start()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        profile = coordinator.world.write_profile(tmp_path / "profile", address.get(timeout=10))
        with keyquorum.connect(profile, passphrase=PASSPHRASE) as client:
            job = client.submit(job_folder(tmp_path / "job"), key="demo")
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                client.wait(job.id)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                list(client.watch(job.id))
            assert client.job(job.id).id == job.id
    finally:
        signal.signal(signal.SIGALRM, before)
        stopped.set()
        server.join()


async def test_closing_the_synchronous_client_ends_a_call_in_another_thread(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    coordinator.silent = set(coordinator.world.custodians)

    async with serving(coordinator) as address:
        profile = coordinator.world.write_profile(tmp_path / "profile", address)
        client = keyquorum.connect(profile, passphrase=PASSPHRASE)
        pending = asyncio.create_task(asyncio.to_thread(client.submit, job_folder(tmp_path / "job"), key="demo"))
        await coordinator.asked.wait()
        await asyncio.to_thread(client.close)
        with pytest.raises(UnavailableError, match="closed meanwhile"):
            await pending


def test_the_bundle_holds_exactly_the_files(tmp_path: Path) -> None:
    found = read_folder(job_folder(tmp_path / "job"))
    subjects = found.subjects()
    sealed = encrypt_folder(found, subjects, "a" * 26, bytes(32), silent)
    with sealed.file:
        reader = DecryptingReader(bytes(32), sealed.file, binding("a" * 26, "bundle"))
        assert {(each.name, each.sha256) for each in digests(reader)} == {(s.name, s.sha256) for s in subjects}


@pytest.mark.parametrize(
    "names",
    [["x" * 101], ["/".join(["d" * 60] * 5)], ["a\\b"], ["Main.py", "main.py"], ["bi\u202edi"], ["line\nbreak"]],
    ids=["long component", "long name", "backslash", "case", "direction", "control"],
)
async def test_names_that_no_bundle_holds_are_refused_before_anything_is_signed_or_asked(
    coordinator: FakeCoordinator, tmp_path: Path, names: list[str]
) -> None:
    folder = job_folder(tmp_path / "job", dict.fromkeys(names, b"pass"))
    async with connected(coordinator, tmp_path) as client:
        with pytest.raises(RefusedError) as caught:
            await client.submit(folder, key="demo")
    assert caught.value.reason is Reason.BUNDLE
    assert not coordinator.jobs
    assert not coordinator.opens


def test_a_folder_over_a_bundles_limits_is_refused_when_it_is_read(tmp_path: Path) -> None:
    folder = job_folder(tmp_path / "job")
    with (folder / "huge.bin").open("wb") as file:
        file.truncate((4 << 30) + 1)  # holds nothing on the disk
    with pytest.raises(RefusedError, match="limits of a bundle") as caught:
        read_folder(folder)
    assert caught.value.reason is Reason.BUNDLE


# -- keys for the owner's own data -------------------------------------------------------------------------------------


async def test_a_key_of_the_owners_own_is_the_same_every_time(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    async with connected(coordinator, tmp_path) as client:
        first = await client.derive_key("tokenize", "patients", key="demo", classification="personal")
        again = await client.derive_key("tokenize", "patients", key="demo", classification="internal", epoch=1)
        other = await client.derive_key("data", "patients", key="demo", classification="personal")
    assert first == again
    assert first.root != other.root
    assert not any(first.root in message for message in coordinator.seen)


async def test_an_unconfirmed_key_of_its_own_is_taken_only_with_its_key_check(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    async with connected(coordinator, tmp_path) as client:
        whole = await client.derive_key("tokenize", "patients", key="demo", classification="personal")
        for name in ("ch-1", "de-1"):
            coordinator.down[name] = unreachable(name)
        with pytest.raises(UnavailableError) as caught:
            await client.derive_key("tokenize", "patients", key="demo", classification="personal")
        assert caught.value.reason is Reason.NO_QUORUM
        known = await client.derive_key(
            "tokenize", "patients", key="demo", classification="personal", key_check=whole.key_check
        )
    assert known == whole
