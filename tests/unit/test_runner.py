"""The runner: how jobs end, what is kept of them, and that nothing of them stays."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keyquorum_core.errors import Reason, RefusedError, UnavailableError
from keyquorum_core.manifest import Resources
from keyquorum_gpu_worker import scratch
from keyquorum_gpu_worker.processes import children_of
from keyquorum_gpu_worker.runner import JobRun, probe, run_job
from keyquorum_gpu_worker.scratch import JobFolder, choose_base, measure, remove_tree, sweep
from keyquorum_gpu_worker.specification import check_gpus, choose_user

BASE = choose_base(None)


@pytest.fixture
def folder() -> Iterator[JobFolder]:
    with JobFolder(BASE, choose_user(BASE)) as made:
        yield made


def run(
    folder: JobFolder,
    code: str,
    *arguments: str,
    cancelled: threading.Event | None = None,
    log_bytes: int = 1 << 20,
    wall_seconds: int = 20,
    memory_mib: int = 256,
    output_mib: int = 4,
) -> JobRun:
    (folder.work / "job.py").write_text(textwrap.dedent(code))
    return run_job(
        ("python", "job.py", *arguments),
        folder,
        Resources(cpus=1, memory_mib=memory_mib, gpus=0, wall_seconds=wall_seconds, output_mib=output_mib),
        user=choose_user(BASE),
        cancelled=cancelled or threading.Event(),
        log_bytes=log_bytes,
    )


def test_probe_tells_the_layers() -> None:
    layers = probe(choose_base(None))
    assert layers["seccomp"]
    assert layers["other_user"] or layers["landlock"]


def test_output_log_and_status_of_a_good_job(folder: JobFolder) -> None:
    told: list[dict[str, object]] = []
    (folder.work / "job.py").write_text(
        "import os, sys\nprint('out'); print('err', file=sys.stderr)\n"
        "open(os.environ['KEYQUORUM_OUTPUT'] + '/r', 'w').write(sys.argv[1])"
    )
    ended = run_job(
        ("python", "job.py", "an argument"),
        folder,
        Resources(cpus=1, memory_mib=256, gpus=0, wall_seconds=20, output_mib=1),
        user=choose_user(BASE),
        cancelled=threading.Event(),
        confined=told.append,
    )
    assert (ended.outcome, ended.exit_code, ended.reason) == ("completed", 0, "")
    assert ended.log == b"out\nerr\n"
    assert (folder.output / "r").read_text() == "an argument"
    assert told == [ended.layers]


@pytest.mark.parametrize(
    ("code", "exit_code", "reason"),
    [
        ("raise SystemExit(3)", 3, "status 3"),
        ("import os; os.kill(os.getpid(), 11)", -11, "signal 11"),
        ("import os; os.abort()", -6, "signal 6"),
    ],
)
def test_failing_job_keeps_its_log_and_status(folder: JobFolder, code: str, exit_code: int, reason: str) -> None:
    ended = run(folder, f"print('before')\n{code}")
    assert (ended.outcome, ended.exit_code) == ("failed", exit_code)
    assert reason in ended.reason
    assert ended.log.startswith(b"before")


def test_log_is_cut_at_its_bound_and_says_so(folder: JobFolder) -> None:
    ended = run(folder, "for _ in range(200): print('x' * 9999)", log_bytes=5000)
    assert ended.outcome == "completed"
    assert len(ended.log) < 5100
    assert b"[keyquorum: log cut here, 1995000 bytes more]" in ended.log


def test_job_past_its_time_is_ended(folder: JobFolder) -> None:
    ended = run(folder, "import time; print('on'); time.sleep(3600)", wall_seconds=1)
    assert ended.outcome == "timeout"
    assert "1 s" in ended.reason
    assert ended.log == b"on\n"


def test_cancelled_job_is_ended(folder: JobFolder) -> None:
    cancelled = threading.Event()
    threading.Timer(0.6, cancelled.set).start()
    ended = run(folder, "import time; time.sleep(60)", cancelled=cancelled)
    assert ended.outcome == "cancelled"
    assert ended.seconds < 5


@pytest.mark.parametrize(
    ("entrypoint", "words"), [(("./missing",), "entrypoint"), (("nosuchprogram",), "entrypoint"), (("sub/",), "entry")]
)
def test_entrypoint_that_is_not_there_is_refused(folder: JobFolder, entrypoint: tuple[str, ...], words: str) -> None:
    with pytest.raises(RefusedError, match=words) as caught:
        run_job(entrypoint, folder, Resources(1, 64, 0, 5, 1), user=choose_user(BASE), cancelled=threading.Event())
    assert caught.value.reason is Reason.JOB_FAILED


def test_executable_of_the_bundle_and_system_programs_run(folder: JobFolder) -> None:
    script = folder.work / "go"
    script.write_text("#!/bin/sh\necho from the bundle\n")
    script.chmod(0o755)
    for entrypoint, said in (
        (("./go",), b"from the bundle\n"),
        (("sh", "-c", "echo from the system"), b"from the system\n"),
    ):
        ended = run_job(
            entrypoint, folder, Resources(1, 256, 0, 10, 1), user=choose_user(BASE), cancelled=threading.Event()
        )
        assert (ended.outcome, bytes(ended.log)) == ("completed", said)


def test_folder_is_private_and_prefers_memory(folder: JobFolder) -> None:
    assert folder.path.stat().st_mode & 0o777 == 0o711
    assert {(p.stat().st_mode & 0o777) for p in (folder.work, folder.output, folder.tmp)} == {0o700}
    if scratch.file_system_of(Path("/dev/shm")) == "tmpfs":
        assert folder.in_memory


def test_configured_scratch_folder_is_never_replaced_by_another(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="scratch folder"):
        choose_base(tmp_path / "absent")
    assert choose_base(tmp_path) == tmp_path


def test_folder_of_any_depth_and_mode_is_removed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    outside = tmp_path / "outside"
    outside.write_text("stays")
    here = os.open(top, os.O_RDONLY)
    for level in range(600):  # together far longer than PATH_MAX, and deeper than any recursion
        os.mkdir("directory-name", dir_fd=here)
        if level % 50 == 0:
            os.symlink(outside, "link", dir_fd=here)
        deeper = os.open("directory-name", os.O_RDONLY, dir_fd=here)
        if level % 7 == 0:
            os.fchmod(here, 0)
        os.close(here)
        here = deeper
    os.close(here)
    remove_tree(top)
    assert not top.exists()
    assert outside.read_text() == "stays"
    remove_tree(top)


def test_sweep_removes_folders_of_dead_workers_only(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = tmp_path / f"keyquorum-job-{ended.pid}-{'0' * 16}"
    (dead / "work").mkdir(parents=True)
    (dead / "work" / "secret").write_text("plaintext")
    alive = tmp_path / f"keyquorum-job-1-{'1' * 16}"
    other = tmp_path / "keyquorum-jobs"
    alive.mkdir()
    other.mkdir()
    with JobFolder(tmp_path, None) as mine:
        assert sweep(tmp_path) == [dead.name]
        assert mine.path.exists()
    assert sorted(tmp_path.iterdir()) == [alive, other]


def test_sweep_leaves_a_folder_whose_lock_is_held(tmp_path: Path) -> None:
    """A worker in another process namespace looks dead from here."""
    with JobFolder(tmp_path, None) as mine:
        disguised = tmp_path / f"keyquorum-job-999999999-{'2' * 16}"
        mine.path.rename(disguised)
        assert sweep(tmp_path) == []
        disguised.rename(mine.path)


def test_killed_workers_job_dies_and_its_folder_is_swept(tmp_path: Path) -> None:
    """kill -9 in the middle: the kernel ends the job, the next start removes the plaintext."""
    code = f"""
        import sys, threading
        from pathlib import Path
        from keyquorum_core.manifest import Resources
        from keyquorum_gpu_worker.runner import run_job
        from keyquorum_gpu_worker.specification import check_gpus, choose_user
        from keyquorum_gpu_worker.scratch import JobFolder
        base = Path({str(tmp_path)!r})
        with JobFolder(base, choose_user(base)) as folder:
            (folder.work / "job.py").write_text(
                "import time\\nwhile True: time.sleep(0.05); open('alive', 'a').write('x')")
            run_job(("python", "job.py"), folder, Resources(1, 256, 0, 60, 1), user=choose_user(base),
                    cancelled=threading.Event(), confined=lambda layers: print("up", flush=True))
    """
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    with worker.stdout:
        assert worker.stdout.readline() == b"up\n"
        time.sleep(0.3)
        worker.kill()
        worker.wait()
    (left,) = tmp_path.iterdir()
    marks = left / "work" / "alive"
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        before = marks.stat().st_size
        time.sleep(0.3)
        if marks.stat().st_size == before:
            break
    else:
        pytest.fail("the job outlived its worker")
    assert sweep(tmp_path) == [left.name]
    assert list(tmp_path.iterdir()) == []


def test_measure_sees_depth_and_size(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(bytes(1 << 16))
    held = measure(tmp_path)
    assert (held.entries, held.depth, held.closed) == (3, 3, False)
    assert held.size >= 1 << 16


def test_nothing_is_left_running(folder: JobFolder) -> None:
    before = children_of(os.getpid())
    ended = run(
        folder,
        """
        import os, time
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.setsid()
                    time.sleep(300)
                os._exit(0)
        print("left")
        """,
    )
    assert ended.outcome == "completed"
    assert children_of(os.getpid()) == before


def test_gpus_are_counted_before_they_are_promised(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia11", "nvidiactl", "nvidia-uvm", "nvidia-caps", "null"):
        (tmp_path / name).touch()
    for wanted in (0, 2):
        check_gpus(Resources(1, 64, wanted, 5, 1), tmp_path)
    with pytest.raises(RefusedError) as caught:
        check_gpus(Resources(1, 64, 3, 5, 1), tmp_path)
    assert (caught.value.reason, caught.value.expected, caught.value.actual) == (
        Reason.UNSUPPORTED,
        "3 GPUs",
        "2 GPUs",
    )
