"""The worker against a coordinator over real TLS: a job from claim to signed statement, and every way it can be cut
short with nothing left behind."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.manifest import Resources
from keyquorum_gpu_worker.config import load_config
from keyquorum_gpu_worker.ending import JobEnd
from keyquorum_gpu_worker.job import JobLostError, Surroundings
from keyquorum_gpu_worker.worker import Worker
from tests.support.fake_worker_service import FakeCluster, FakeJob

MAIN = b"""
import hashlib, os, pathlib
data = pathlib.Path("data/input.bin").read_bytes()
out = pathlib.Path(os.environ["KEYQUORUM_OUTPUT"])
(out / "digest").write_text(hashlib.sha256(data).hexdigest())
(out / "deep").mkdir()
(out / "deep" / "big").write_bytes(data * 2)
print("worked on", len(data))
"""
FILES = {"main.py": MAIN, "data/input.bin": bytes(range(256)) * 4096}


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    made = FakeCluster()
    await made.start()
    yield made
    await made.stop()
    assert made.unforeseen == []


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    made = tmp_path / "scratch"
    made.mkdir()
    return made


def left_in(scratch: Path) -> list[str]:
    return [path.name for path in scratch.iterdir()]


async def do(cluster: FakeCluster, tmp_path: Path, scratch: Path, job: FakeJob | None = None) -> JobEnd:
    worker = Worker(load_config(cluster.worker_dir(tmp_path / "worker", scratch=scratch)))
    try:
        return await worker.one(job.id if job else "")
    finally:
        await worker.close()
        assert left_in(scratch) == [], "plaintext was left behind"


async def test_job_runs_and_its_result_log_and_statement_verify(
    cluster: FakeCluster, tmp_path: Path, scratch: Path
) -> None:
    job = cluster.submit(FILES)
    end = await do(cluster, tmp_path, scratch, job)
    assert (end.outcome, end.exit_code, end.blamed) == ("completed", 0, ())
    assert cluster.quorum.is_qualified(end.custodians)
    statement = job.result()
    assert (statement.outcome, statement.exit_code, statement.reason) == ("completed", 0, "")
    chain, records = job.records()
    assert chain.complete
    events = [record.event for record in records]
    assert events[0] == "key-released"
    assert [each.values["step"] for each in records if each.event == "progress"] == [
        "downloading",
        "running",
        "uploading",
    ]
    assert "usage" in events
    assert events[-1] == "ended"
    assert set(statement.artifacts) == {"result", "log"}
    output = job.output()
    assert sorted(output) == ["deep/big", "digest"]
    assert output["deep/big"] == FILES["data/input.bin"] * 2
    assert job.log() == "worked on 1048576\n"
    assert job.reports[0] == "attesting"
    assert job.reports == sorted(job.reports, key=["attesting", "downloading", "running", "uploading"].index)


async def test_keys_are_new_for_every_job(cluster: FakeCluster, tmp_path: Path, scratch: Path) -> None:
    from keyquorum_core.attestation.evidence import EvidenceDocument

    seen: set[bytes] = set()
    for text in (b"print(1)", b"print(2)"):
        job = cluster.submit({"main.py": text})
        await do(cluster, tmp_path, scratch, job)
        document = EvidenceDocument.parse(job.evidence[-1])
        seen |= {document.hpke_key, document.signing_key}
    assert len(seen) == 4


async def test_next_job_of_the_queue_is_taken(cluster: FakeCluster, tmp_path: Path, scratch: Path) -> None:
    job = cluster.submit({"main.py": b"print('queued')"})
    end = await do(cluster, tmp_path, scratch)
    assert (end.job_id, end.outcome) == (job.id, "completed")


@pytest.mark.parametrize(
    ("code", "resources", "outcome", "words"),
    [
        (b"print('so far'); raise SystemExit(7)", {}, "failed", "status 7"),
        (b"print('so far'); import time; time.sleep(60)", {"wall_seconds": 1}, "timeout", "longer than"),
    ],
)
async def test_failing_job_uploads_its_log_and_a_signed_statement(
    cluster: FakeCluster,
    tmp_path: Path,
    scratch: Path,
    code: bytes,
    resources: dict[str, int],
    outcome: str,
    words: str,
) -> None:
    limits = Resources(**{"cpus": 1, "memory_mib": 256, "gpus": 0, "wall_seconds": 20, "output_mib": 1, **resources})
    job = cluster.submit({"main.py": code}, resources=limits)
    end = await do(cluster, tmp_path, scratch, job)
    statement = job.result()
    assert (end.outcome, statement.outcome) == (outcome, outcome)
    assert words in statement.reason
    assert job.log() == "so far\n"


@pytest.mark.parametrize("code", ["UNAVAILABLE", "CANCELLED", "INTERNAL", "UNKNOWN"])
async def test_broken_transfers_go_on_where_they_stopped(
    cluster: FakeCluster, tmp_path: Path, scratch: Path, code: str
) -> None:
    """Whatever gRPC calls it: without the coordinator's own word, the call broke on the way."""
    job = cluster.submit(FILES)
    cluster.break_with = grpc.StatusCode[code]
    cluster.break_downloads = cluster.break_uploads = 2
    cluster.break_calls = 1
    end = await do(cluster, tmp_path, scratch, job)
    assert end.outcome == "completed"
    assert job.output()["deep/big"] == FILES["data/input.bin"] * 2
    offsets = [int(call.rsplit(" ", 1)[1]) for call in cluster.calls if call.startswith("Download")]
    assert len(offsets) == 3
    assert offsets == sorted(set(offsets))


async def test_coordinator_restarted_in_the_middle_is_waited_for(
    cluster: FakeCluster, tmp_path: Path, scratch: Path
) -> None:
    job = cluster.submit({"main.py": b"import time; time.sleep(1.5); print('done')"})
    running = asyncio.create_task(do(cluster, tmp_path, scratch, job))
    await job.reaches("running")
    await cluster.stop()
    await asyncio.sleep(1.8)
    await cluster.start()
    assert (await running).outcome == "completed"
    assert job.log() == "done\n"


async def test_release_that_the_coordinator_lost_is_repeated_for_the_same_keys(
    cluster: FakeCluster, tmp_path: Path, scratch: Path
) -> None:
    """It was killed after the shares left and before it wrote the release down: no owner could verify the statement."""
    job = cluster.submit({"main.py": b"print('once')"})
    cluster.lose_records = 1
    end = await do(cluster, tmp_path, scratch, job)
    assert (end.outcome, job.result().outcome, job.log()) == ("completed", "completed", "once\n")
    assert (cluster.calls.count("Release"), cluster.calls.count("Complete")) == (2, 2)


async def test_coordinator_that_never_records_a_release_is_given_up(
    cluster: FakeCluster, tmp_path: Path, scratch: Path
) -> None:
    job = cluster.submit({"main.py": b""})
    cluster.lose_records = 99
    with pytest.raises(StateError, match="on record"):
        await do(cluster, tmp_path, scratch, job)
    assert cluster.calls.count("Complete") == 3


async def test_machine_with_too_few_gpus_never_asks_for_the_key(
    cluster: FakeCluster, tmp_path: Path, scratch: Path
) -> None:
    job = cluster.submit({"main.py": b""}, resources=Resources(1, 256, 64, 20, 1))
    assert (await do(cluster, tmp_path, scratch, job)).outcome == "refused"
    assert job.error is not None
    assert (job.error.reason, job.error.expected) == (Reason.UNSUPPORTED, "64 GPUs")
    assert "GetChallenge" not in cluster.calls


async def test_log_that_is_not_stored_leaves_no_statement(
    cluster: FakeCluster, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Owners refuse a statement without a log, so none is made."""

    def refused(*arguments: object) -> None:
        raise RefusedError(Reason.STORAGE, "the log cannot be stored")

    monkeypatch.setattr("keyquorum_gpu_worker.job.seal_log", refused)
    job = cluster.submit({"main.py": b"print('x')"})
    assert (await do(cluster, tmp_path, scratch, job)).outcome == "refused"
    assert job.statement == b""
    assert job.error is not None
    assert job.error.reason is Reason.STORAGE


async def test_two_of_five_custodians_down_still_give_the_key(
    cluster: FakeCluster, tmp_path: Path, scratch: Path
) -> None:
    for name in ("ch-2", "jp-1"):
        cluster.custodians[name].refusal = UnavailableError(Reason.UNAVAILABLE, "not reached")
    end = await do(cluster, tmp_path, scratch, cluster.submit({"main.py": b""}))
    assert (end.outcome, end.custodians) == ("completed", ("ch-1", "de-1", "is-1"))


async def test_cancelled_job_is_stopped_and_wiped(
    cluster: FakeCluster, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "keyquorum_gpu_worker.worker.Surroundings", lambda **parts: Surroundings(**parts, heartbeat_seconds=0.5)
    )
    job = cluster.submit({"main.py": b"import time; time.sleep(3600)"})
    worker = Worker(load_config(cluster.worker_dir(tmp_path / "worker", scratch=scratch)))
    running = asyncio.create_task(worker.one(job.id))
    await job.reaches("running")
    assert left_in(scratch)
    cluster.proceed = False
    with pytest.raises(JobLostError, match="cancelled or taken away"):
        await running
    await worker.close()
    assert left_in(scratch) == []
    assert job.statement == b""


async def test_without_evidence_the_key_is_never_asked_for(cluster: FakeCluster, tmp_path: Path, scratch: Path) -> None:
    job = cluster.submit({"main.py": b""})
    directory = cluster.worker_dir(tmp_path / "worker", scratch=scratch)
    text = (directory / "worker.toml").read_text()
    missing = tmp_path / "no-tsm"
    (directory / "worker.toml").write_text(
        text.replace('[development]\ndir = "platform"', f'[sev-snp]\nreport_dir = "{missing}"')
    )
    worker = Worker(load_config(directory))
    with pytest.raises(UnavailableError) as caught:  # it would not even take a job
        await asyncio.to_thread(worker.prepare)
    assert caught.value.reason is Reason.EVIDENCE_TYPE
    end = await worker.one(job.id)
    await worker.close()
    assert end.outcome == "refused"
    assert job.error is not None
    assert job.error.reason is Reason.EVIDENCE_TYPE
    assert str(missing) in job.error.expected
    assert "Release" not in cluster.calls


async def test_expired_manifest_is_refused_before_the_key_is_asked_for(
    cluster: FakeCluster, tmp_path: Path, scratch: Path
) -> None:
    now = int(time.time())
    for window, reason in (((now - 100, now - 50), Reason.EXPIRED), ((now + 50, now + 100), Reason.NOT_YET_VALID)):
        job = cluster.submit({"main.py": str(window).encode()}, window=window)
        end = await do(cluster, tmp_path, scratch, job)
        assert end.outcome == "refused"
        assert job.error is not None
        assert job.error.reason is reason
    assert "GetChallenge" not in cluster.calls


async def test_full_scratch_folder_ends_in_a_signed_refusal(
    cluster: FakeCluster, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keyquorum_gpu_worker.scratch import JobFolder

    monkeypatch.setattr(JobFolder, "free_bytes", lambda self: 9 << 20)  # 8 MiB of it are the job's own
    job = cluster.submit({"main.py": b"", "large": bytes(2 << 20)})
    end = await do(cluster, tmp_path, scratch, job)
    assert (end.outcome, end.exit_code) == ("refused", 126)
    assert "over its limits" in job.result().reason


# -- as a process -----------------------------------------------------------------------------------------------------


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts ``keyquorum-worker run``; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(directory: Path, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "keyquorum_gpu_worker.cli", "run", "--dir", str(directory), *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


async def communicate(process: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], str]:
    out, err = await asyncio.to_thread(process.communicate, None, 60)
    return [json.loads(line) for line in out.splitlines()], err


async def test_command_says_when_it_is_ready_and_how_the_job_ended(
    cluster: FakeCluster, start: Start, tmp_path: Path, scratch: Path
) -> None:
    job = cluster.submit({"main.py": b"print('hello')"})
    process = start(cluster.worker_dir(tmp_path / "worker", scratch=scratch), job.id, "--json")
    lines, err = await communicate(process)
    assert process.returncode == 0, err
    assert lines[0]["ready"] is True
    assert (lines[0]["worker"], lines[0]["evidence"]) == ("gpu-1", "development")
    assert (lines[1]["job_id"], lines[1]["outcome"]) == (job.id, "completed")
    events = [json.loads(line) for line in err.splitlines()]
    assert any("DEVELOPMENT" in event["event"] for event in events)
    assert "hello" not in err
    assert job.log() == "hello\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_worker_asked_to_end_wipes_first(
    cluster: FakeCluster, start: Start, tmp_path: Path, scratch: Path, number: signal.Signals
) -> None:
    job = cluster.submit({"main.py": b"import time; time.sleep(60)"})
    process = start(cluster.worker_dir(tmp_path / "worker", scratch=scratch))
    await job.reaches("running")
    await asyncio.sleep(0.3)
    assert left_in(scratch)
    process.send_signal(number)
    _, err = await communicate(process)
    assert process.returncode == 0, err
    assert left_in(scratch) == []
    assert job.statement == b""


def files_with(marker: bytes, top: Path) -> list[Path]:
    return [path for path in top.rglob("*") if path.is_file() and marker in path.read_bytes()]


STEPS = ["claimed", "attesting", "downloading", "running", "uploading", "completing"]


@pytest.mark.parametrize("step", STEPS)
async def test_worker_killed_at_any_step_is_restarted_and_does_the_job(
    cluster: FakeCluster, start: Start, tmp_path: Path, scratch: Path, step: str
) -> None:
    """kill -9; the next start sweeps the plaintext, claims the job again and ends it."""
    marker = b"plaintext-that-must-not-stay"
    code = b"import os, time; time.sleep(0.5); open(os.environ['KEYQUORUM_OUTPUT'] + '/r', 'wb').write(%a)" % marker
    job = cluster.submit({"main.py": code, "data": marker * 100_000})
    directory = cluster.worker_dir(tmp_path / "worker", scratch=scratch)
    cluster.hold_at = step
    first = start(directory, "--once")
    async with asyncio.timeout(30):
        await cluster.held.wait()
    if step == "running":
        await asyncio.sleep(0.3)
    first.kill()
    _, err = await communicate(first)
    assert marker.decode() not in err
    left = left_in(scratch)
    assert len(left) == (0 if step in ("claimed", "attesting", "completing") else 1)
    assert job.statement == b""
    second = start(directory, "--once", "--json")
    lines, err = await communicate(second)
    assert second.returncode == 0, err
    assert ("removed what a killed worker left" in err) == bool(left)
    assert lines[-1]["outcome"] == "completed"
    assert job.output() == {"r": marker}
    assert left_in(scratch) == []
    assert files_with(marker, tmp_path) == []


async def test_worker_writes_no_plaintext_and_no_key_to_its_log(
    cluster: FakeCluster, start: Start, tmp_path: Path, scratch: Path
) -> None:
    """Of a job that completes, one that fails with a traceback, and one whose bundle is refused."""
    secret = os.urandom(32)
    show = f"secret = bytes.fromhex('{secret.hex()}')\nprint(secret.hex(), secret)\n".encode()
    jobs = [
        cluster.submit({"main.py": show + b"open('../output/' + secret.hex(), 'wb').write(secret)", "data": secret}),
        cluster.submit({"main.py": show + b"raise ValueError(secret.hex())"}),
        cluster.submit({"main.py": show}, bundle=secret * 64),
    ]
    directory = cluster.worker_dir(tmp_path / "worker", scratch=scratch)
    written = b""
    for job in jobs:
        process = start(directory, job.id, "--json")
        out, err = await asyncio.to_thread(process.communicate, None, 60)
        written += out.encode() + err.encode()
        assert job.id in out
    assert [job.result().outcome for job in jobs] == ["completed", "failed", "refused"]
    assert secret.hex() in jobs[0].log()
    assert secret.hex() in jobs[1].log()
    pem = (directory / "gpu-1-key.pem").read_bytes().splitlines()[1]
    forbidden = [secret, pem, *(seed for seed in cluster.seeds.values())]
    for job in jobs:
        forbidden += [job.key.root, *(job.key.purpose_key(name) for name in ("bundle", "result", "telemetry"))]
    for value in forbidden:
        for form in (value, value.hex().encode(), repr(value)[2:-1].encode(), base64.b64encode(value)[:40]):
            assert form not in written


def check_closed(pid: int) -> None:
    limits = Path(f"/proc/{pid}/limits").read_text()
    core = next(line for line in limits.splitlines() if line.startswith("Max core"))
    assert core.split()[4:6] == ["0", "0"]
    # What belongs to a process that is not dumpable belongs to root.
    assert Path(f"/proc/{pid}/environ").stat().st_uid == 0
    if os.geteuid() != 0:
        with pytest.raises(PermissionError):
            Path(f"/proc/{pid}/environ").read_bytes()


async def test_worker_process_gives_no_memory_to_its_own_user(
    cluster: FakeCluster, start: Start, tmp_path: Path, scratch: Path
) -> None:
    process = start(cluster.worker_dir(tmp_path / "worker", scratch=scratch))
    assert process.stdout is not None
    assert json.loads(await asyncio.to_thread(process.stdout.readline))["ready"]
    check_closed(process.pid)
    process.terminate()
    await communicate(process)


async def test_attest_shows_what_this_machine_can_give(cluster: FakeCluster, tmp_path: Path) -> None:
    directory = cluster.worker_dir(tmp_path / "worker")
    command = [sys.executable, "-m", "keyquorum_gpu_worker.cli", "attest", "--dir", str(directory), "--json"]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    shown = json.loads(done.stdout)
    assert done.returncode == 0
    assert (shown["types"], shown["development"], shown["items"][0]["bound"]) == (["sev-snp"], True, True)
    (directory / "platform" / "vek-key.pem").unlink()
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["reason"] == "EVIDENCE_TYPE"


def test_result_bundle_is_a_tar_that_tar_reads(tmp_path: Path) -> None:
    """The format is an ordinary one: an owner without keyquorum can open a decrypted result."""
    from keyquorum_gpu_worker.plaintext import collect_output, seal_output

    (tmp_path / "a").write_bytes(b"1")
    sealed, digests = seal_output(bytes(32), collect_output(tmp_path, 10), b"", io.BytesIO())
    from keyquorum_core.artifact import decrypt_stream

    sealed.file.seek(0)
    plain = io.BytesIO()
    decrypt_stream(bytes(32), sealed.file, plain, b"")
    plain.seek(0)
    with tarfile.open(fileobj=plain) as tar:
        assert tar.getnames() == [each.name for each in digests] == ["a"]


def test_malformed_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyquorumError, match="configuration is missing"):
        load_config(tmp_path)
    base = 'name="a"\ncluster="c"\ncoordinator="h:1"\ncoordinator_name="m"\nroster="r"\noperators="o"\n'
    base += 'tls_certificate="c"\ntls_key="k"\n'
    for text, words in (
        ("= 1", "not TOML"),
        (base, "where evidence comes from"),
        (base + "[development]\ndir='p'\n[sev-snp]\n", "where evidence comes from"),
        (base + "extra=1\n[sev-snp]\n", "unknown members"),
        (base.replace('"a"', '"A"') + "[sev-snp]\n", "worker name"),
    ):
        (tmp_path / "worker.toml").write_text(text)
        with pytest.raises(KeyquorumError, match=words):
            load_config(tmp_path)
    assert RefusedError.kind == "refused"
