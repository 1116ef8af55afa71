"""Hostile owners: bundles that try to leave their folder, and jobs that try to leave their jail, by the real way.

Each goes through the worker as any job does: claimed, attested, decrypted, unpacked, run. G8: every one fails closed,
in a signed statement that says what was refused, and leaves nothing behind on the worker's machine.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from keyquorum_core.bundle import write_bundle
from keyquorum_core.manifest import Resources
from keyquorum_gpu_worker.config import load_config
from keyquorum_gpu_worker.ending import JobEnd
from keyquorum_gpu_worker.processes import children_of
from keyquorum_gpu_worker.worker import Worker
from tests.support.fake_worker_service import FakeCluster, FakeJob

MAIN = b"print('THIS RAN')"


class Machine:
    """A cluster and one worker, to which one job after another is given."""

    def __init__(self, cluster: FakeCluster, root: Path) -> None:
        self.cluster = cluster
        self.scratch = root / "scratch"
        self.scratch.mkdir()
        self.root = root
        self.worker = Worker(load_config(cluster.worker_dir(root / "worker", scratch=self.scratch)))

    async def do(self, job: FakeJob) -> JobEnd:
        before = children_of(os.getpid())
        end = await self.worker.one(job.id)
        assert self.left() == [], "something was left in the scratch folder"
        assert children_of(os.getpid()) == before, "something was left running"
        return end

    def check_nothing_outside(self) -> None:
        assert sorted(path.name for path in self.root.iterdir()) == ["scratch", "worker"]
        assert not Path("/tmp/keyquorum-outside").exists()

    def left(self) -> list[str]:
        return [path.name for path in self.scratch.iterdir()]

    def job(self, code: str, **resources: int) -> FakeJob:
        limits = {"cpus": 1, "memory_mib": 256, "gpus": 0, "wall_seconds": 20, "output_mib": 4, **resources}
        return self.cluster.submit({"main.py": textwrap.dedent(code).encode()}, resources=Resources(**limits))


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    cluster = FakeCluster()
    await cluster.start()
    made = Machine(cluster, tmp_path)
    yield made
    await made.worker.close()
    await cluster.stop()


# -- bundles ----------------------------------------------------------------------------------------------------------


def tar(build: Callable[[tarfile.TarFile], None], format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        build(archive)
    return out.getvalue()


def entry(name: str, data: bytes = b"x", **attributes: object) -> Callable[[tarfile.TarFile], None]:
    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        for attribute, value in attributes.items():
            setattr(info, attribute, value)
        archive.addfile(info, io.BytesIO(data) if info.isreg() else None)

    return add


def plain(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    write_bundle([(name, len(data), io.BytesIO(data)) for name, data in files.items()], out)
    return out.getvalue()


def twice(archive: tarfile.TarFile) -> None:
    entry("main.py", MAIN)(archive)
    entry("main.py", b"another")(archive)


GOOD = plain({"main.py": MAIN})
BUNDLES: dict[str, bytes] = {
    "traversal": tar(entry("../outside")),
    "traversal within": tar(entry("a/../../outside")),
    "absolute path": tar(entry("/tmp/keyquorum-outside")),
    "symbolic link": tar(entry("main.py", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "hard link": tar(entry("main.py", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd")),
    "character device": tar(entry("main.py", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=1)),
    "block device": tar(entry("main.py", b"", type=tarfile.BLKTYPE, devmajor=8)),
    "fifo": tar(entry("main.py", b"", type=tarfile.FIFOTYPE)),
    "directory": tar(entry("folder", b"", type=tarfile.DIRTYPE)),
    "sparse file": tar(entry("main.py", b"", type=tarfile.GNUTYPE_SPARSE)),
    "set-user-id": tar(entry("main.py", MAIN, mode=0o4755)),
    "name of 300 characters": tar(entry("a" * 300), tarfile.GNU_FORMAT),
    "pax header": tar(entry("ä" * 90), tarfile.PAX_FORMAT),
    "two of one name": tar(twice),
    "gzip bomb": gzip.compress(bytes(64 << 20), 9),
    "declared size of 8 GiB": tar(entry("main.py", b""))[:124] + b"77777777777\0" + tar(entry("main.py", b""))[136:],
    "garbage": b"\xff" * 4096,
    "nothing": b"",
    "cut off": GOOD[:-512],
    "second archive behind the first": GOOD + GOOD,
    "larger than the machine": plain({"main.py": MAIN})[:512][:124],
}


async def test_hostile_bundles_are_refused_and_nothing_of_them_runs(machine: Machine) -> None:
    for what, bundle in BUNDLES.items():
        job = machine.cluster.submit({"main.py": MAIN}, bundle=bundle, entrypoint=("python", "main.py", what))
        end = await machine.do(job)
        assert end.outcome == "refused", what
        statement = job.result()
        assert (statement.outcome, statement.exit_code, set(statement.artifacts)) == ("refused", 126, {"log"}), what
        assert job.log() == ""
        assert statement.reason.startswith(("BUNDLE", "DIGEST")), (what, statement.reason)
    machine.check_nothing_outside()


@pytest.mark.parametrize(
    ("what", "bundle"),
    [
        ("missing", {"main.py": MAIN}),
        ("extra", {"main.py": MAIN, "data": b"1", "sitecustomize.py": b"print('sneaked in')"}),
        ("changed", {"main.py": MAIN, "data": b"2"}),
    ],
)
async def test_bundle_must_hold_exactly_the_manifests_files(
    machine: Machine, what: str, bundle: dict[str, bytes]
) -> None:
    job = machine.cluster.submit({"main.py": MAIN, "data": b"1"}, bundle=plain(bundle))
    end = await machine.do(job)
    assert end.outcome == "refused"
    assert job.result().reason.startswith(("DIGEST", "BUNDLE"))
    assert job.log() == ""


# -- jobs -------------------------------------------------------------------------------------------------------------


async def test_job_cannot_read_the_worker_or_reach_a_network(machine: Machine) -> None:
    secret = machine.root / "worker" / "gpu-1-key.pem"
    job = machine.job(
        f"""
        import os, socket
        taken = []
        for path in ("/proc/{os.getpid()}/mem", "/proc/{os.getpid()}/environ", "{secret}", "/etc/shadow"):
            try:
                taken.append((path, open(path, "rb").read(1)))
            except OSError as error:
                print("refused", path)
        for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_VSOCK):
            try:
                taken.append(socket.socket(family))
            except OSError as error:
                print("refused", family)
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) not in (os.getpid(), 1):
                try:
                    taken.append((name, open(f"/proc/{{name}}/environ", "rb").read(1)))
                except OSError:
                    pass
        print("taken:", taken)
        """
    )
    assert (await machine.do(job)).outcome == "completed"
    lines = job.log().splitlines()
    assert len(lines) == 9
    assert lines[-1] == "taken: []"


async def test_job_that_leaves_processes_behind_leaves_none(machine: Machine) -> None:
    job = machine.job(
        """
        import os, signal, time
        for _ in range(5):
            if os.fork() == 0:
                os.setsid()
                for number in range(1, 32):
                    try: signal.signal(number, signal.SIG_IGN)
                    except OSError: pass
                if os.fork(): os._exit(0)
                while True: time.sleep(1)
        print("main is done")
        """
    )
    assert (await machine.do(job)).outcome == "completed"
    assert job.log() == "main is done\n"


@pytest.mark.parametrize(
    "code",
    [
        # many files, each within the limit of one
        "for i in range(64): open(f'{out}/{i}', 'wb').write(bytes(1 << 20))\ntime.sleep(20)",
        # a file without a name
        "files = [open(f'{out}/x', 'wb') for i in range(1)]; os.unlink(f'{out}/x')\n"
        "more = [open(f'{out}/{i}', 'wb') for i in range(9)]\n"
        "for i, f in enumerate(more): os.unlink(f'{out}/{i}'); f.write(bytes(1 << 20)); f.flush()\ntime.sleep(20)",
        # in the working and temporary folders
        "for i in range(64): open(f'{os.environ[\"TMPDIR\"]}/{i}', 'wb').write(bytes(1 << 20))\ntime.sleep(20)",
        # folders without end
        "os.chdir(out)\nfor i in range(500): os.mkdir('d'); os.chdir('d')\ntime.sleep(20)",
    ],
)
async def test_job_that_fills_the_disk_is_ended(machine: Machine, code: str) -> None:
    job = machine.job(f"import os, time\nout = os.environ['KEYQUORUM_OUTPUT']\n{code}")
    end = await machine.do(job)
    assert end.outcome == "output-too-large"
    assert job.result().outcome == "output-too-large"
    assert end.seconds < 20, "it ended by itself"


async def test_one_file_cannot_grow_over_the_limit(machine: Machine) -> None:
    job = machine.job(
        """
        import os
        try:
            with open(os.environ["KEYQUORUM_OUTPUT"] + "/big", "wb") as file:
                for _ in range(64): file.write(bytes(1 << 20))
        except OSError as error:
            print(error.errno)
        os.unlink(os.environ["KEYQUORUM_OUTPUT"] + "/big")
        """
    )
    assert (await machine.do(job)).outcome == "completed"
    assert job.log() == "27\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("os.symlink('/etc/passwd', f'{out}/passwd')", "symbolic link"),
        ("open(f'{out}/a', 'w'); os.link(f'{out}/a', f'{out}/b')", "2 names"),
        ("os.mkfifo(f'{out}/fifo')", "FIFO"),
        ("open(f'{out}/' + chr(92), 'w')", "backslash"),
    ],
)
async def test_output_that_is_no_plain_file_is_not_taken(machine: Machine, code: str, words: str) -> None:
    job = machine.job(f"import os\nout = os.environ['KEYQUORUM_OUTPUT']\n{code}\nprint('made')")
    end = await machine.do(job)
    statement = job.result()
    assert (end.outcome, set(statement.artifacts)) == ("failed", {"log"})
    assert words in statement.reason
    assert job.log() == "made\n"


async def test_memory_hogs_are_ended(machine: Machine) -> None:
    alone = machine.job("x = bytearray(600 << 20)\nprint('had it')", memory_mib=128)
    assert (await machine.do(alone)).outcome == "failed"
    assert "MemoryError" in alone.log()
    together = machine.job(
        """
        import os, time
        for _ in range(6):
            if os.fork() == 0:
                held = os.urandom(1 << 20) * 60
                time.sleep(30)
        time.sleep(30)
        """,
        memory_mib=128,
    )
    end = await machine.do(together)
    assert end.outcome == "out-of-memory"
    assert "128 MiB" in together.result().reason


async def test_memory_filled_as_files_counts_too(machine: Machine) -> None:
    """The job's own /tmp and /dev/shm are memory: what both and its processes hold is within one limit."""
    job = machine.job(
        """
        import os, time
        private = [path for path in ("/tmp", "/dev/shm") if os.access(path, os.W_OK)]
        print(len(private))
        for path in private:
            written = 0
            try:
                with open(path + "/fill", "wb") as file:
                    while written < 256: written += file.write(bytes(1 << 20)) >> 20
            except OSError:
                pass
            print(written <= 16)
        held = bytearray(os.urandom(1 << 20)) * 40
        time.sleep(10)
        """,
        memory_mib=64,
        output_mib=300,
    )
    end = await machine.do(job)
    if not end.layers["namespaces"]:
        pytest.skip("no namespaces here, so the job has no private file systems")
    assert (end.outcome, job.log()) == ("out-of-memory", "2\nTrue\nTrue\n")
    assert end.seconds < 10


async def test_fork_bomb_is_contained(machine: Machine) -> None:
    job = machine.job(
        """
        import os, time
        started = time.monotonic()
        while time.monotonic() < started + 30:
            try:
                os.fork()
            except OSError:
                time.sleep(0.05)
        """,
        wall_seconds=1,
    )
    end = await machine.do(job)
    assert end.outcome in ("timeout", "failed", "out-of-memory")
    assert end.seconds < 25


async def test_huge_log_is_cut_and_does_not_stop_the_job(machine: Machine) -> None:
    job = machine.job("import sys\nfor _ in range(24): sys.stdout.write('x' * (1 << 20))\nprint('end')")
    assert (await machine.do(job)).outcome == "completed"
    log = job.log()
    assert len(log) < (16 << 20) + 100
    assert "keyquorum: log cut here" in log[-100:]


async def test_job_that_closes_its_folders_cannot_hide_in_them(machine: Machine) -> None:
    job = machine.job(
        """
        import os
        out = os.environ["KEYQUORUM_OUTPUT"]
        os.mkdir(out + "/closed")
        open(out + "/closed/x", "w").write("x")
        os.chmod(out + "/closed", 0)
        os.chmod(out, 0)
        """
    )
    end = await machine.do(job)
    assert end.outcome in ("completed", "failed", "output-too-large")  # root reads closed folders, others do not
