"""The jail: what the filter says about every call, what a job finds when it looks around, and that it fails closed."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import struct
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from keyquorum_core.manifest import Resources
from keyquorum_gpu_worker import seccomp
from keyquorum_gpu_worker.jail import JailSpec
from keyquorum_gpu_worker.runner import JobRun, run_job
from keyquorum_gpu_worker.scratch import JobFolder, choose_base
from keyquorum_gpu_worker.specification import choose_user

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
READ = {"x86_64": 0, "aarch64": 63}


def judge(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """Run the filter over one call, as the kernel's interpreter would (Documentation/networking/filter.rst)."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *[*arguments, 0, 0, 0, 0, 0, 0][:6])
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif code == 0x54:
            accumulator &= value
        elif code == 0x06:
            return int(value)
        else:
            test = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += if_true if test else if_false


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_filter_refuses_every_listed_call_and_lets_others_pass(machine: str, column: int) -> None:
    program = seccomp.program(machine)
    for table, verdict in ((seccomp.DENIED, errno.EPERM), (seccomp.HIDDEN, errno.ENOSYS)):
        for name, numbers in table.items():
            number = numbers[column]
            if number is not None:
                assert judge(program, AUDIT[machine], number) == ERRNO | verdict, name
    assert judge(program, AUDIT[machine], READ[machine]) == ALLOW


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_kills_another_architectures_calls_and_hides_x32_and_newer_ones(machine: str) -> None:
    program = seccomp.program(machine)
    assert judge(program, 0x40000003, 102) == KILL  # i386's socketcall
    assert judge(program, AUDIT[machine], 0x40000000 | 41) == ERRNO | errno.ENOSYS
    assert judge(program, AUDIT[machine], 463) == ERRNO | errno.ENOSYS


@pytest.mark.parametrize(
    ("machine", "socketpair", "clone", "kill"), [("x86_64", 53, 56, 62), ("aarch64", 199, 220, 129)]
)
def test_filter_judges_some_calls_by_their_arguments(machine: str, socketpair: int, clone: int, kill: int) -> None:
    program, audit = seccomp.program(machine), AUDIT[machine]
    refused = ERRNO | errno.EPERM
    assert judge(program, audit, socketpair, 1, 1) == ALLOW
    assert judge(program, audit, socketpair, 1, 5 | 0x80000) == ALLOW
    assert judge(program, audit, socketpair, 1, 2) == refused  # datagrams could be addressed
    assert judge(program, audit, socketpair, 2, 1) == refused
    assert judge(program, audit, clone, 0x01200011) == ALLOW  # fork
    assert judge(program, audit, clone, 0x10000011) == refused  # a user namespace
    assert judge(program, audit, kill, 1234, 9) == ALLOW
    assert judge(program, audit, kill, 0xFFFFFFFFFFFFFFFF, 9) == refused


def test_filter_allows_memfd_for_gpus_only_and_metadata_only_where_asked() -> None:
    memfd, chmod, chown = 319, 90, 92
    audit = AUDIT["x86_64"]
    assert judge(seccomp.program("x86_64"), audit, memfd) == ERRNO | errno.ENOSYS
    assert judge(seccomp.program("x86_64", gpu=True), audit, memfd) == ALLOW
    assert judge(seccomp.program("x86_64"), audit, chmod) == ALLOW
    assert judge(seccomp.program("x86_64", metadata=False), audit, chmod) == ERRNO  # 0: as if it were done
    assert judge(seccomp.program("x86_64", metadata=False), audit, chown) == ERRNO | errno.EPERM


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
)
def test_call_numbers_are_the_kernels(column: int, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"no kernel headers: {header}")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    checked = 0
    for table in (seccomp.DENIED, seccomp.HIDDEN, seccomp.MODES, seccomp.OWNERS):
        for name, numbers in table.items():
            if name in found:
                assert numbers[column] == int(found[name]), name
                checked += 1
    assert checked > 50


def run(tmp_path: Path, code: str, *arguments: str, memory_mib: int = 512) -> tuple[JobRun, str]:
    base = choose_base(None)
    user = choose_user(base)
    with JobFolder(base, user) as folder:
        (folder.work / "job.py").write_text(textwrap.dedent(code))
        ended = run_job(
            ("python", "job.py", *arguments),
            folder,
            Resources(cpus=1, memory_mib=memory_mib, gpus=0, wall_seconds=20, output_mib=4),
            user=user,
            cancelled=threading.Event(),
        )
    return ended, ended.log.decode()


def test_job_has_no_environment_descriptors_or_privileges_but_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "not for the job")
    ended, log = run(
        tmp_path,
        """
        import json, os, resource
        status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
        print(json.dumps({
            "environment": sorted(os.environ),
            "descriptors": sorted(int(n) for n in os.listdir("/proc/self/fd"))[:-1],
            "user": os.getuid(), "groups": os.getgroups(), "session": os.getsid(0) != 0,
            "capabilities": [status[n].strip() for n in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
            "no_new_privs": status["NoNewPrivs"].strip(), "seccomp": status["Seccomp"].strip(),
            "core": resource.getrlimit(resource.RLIMIT_CORE), "cwd": os.getcwd() == os.environ["HOME"],
            "stdin": os.read(0, 10).hex(),
        }))
        """,
    )
    assert ended.outcome == "completed", log
    seen = json.loads(log)
    assert "SECRET_TOKEN" not in seen["environment"]
    # LC_CTYPE is what Python itself adds.
    assert set(seen["environment"]) - {"LC_CTYPE"} == {
        *("PATH", "HOME", "TMPDIR", "LANG", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "KEYQUORUM_OUTPUT"),
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    }
    assert seen["descriptors"] == [0, 1, 2]
    assert seen["stdin"] == ""
    assert set(seen["capabilities"][:3]) == {"0" * 16}
    assert (seen["no_new_privs"], seen["seccomp"]) == ("1", "2")
    assert seen["core"] == [0, 0]
    assert seen["cwd"]
    assert (seen["user"] != os.getuid()) == (choose_user(choose_base(None)) is not None)
    assert ended.layers["seccomp"]


def test_job_has_no_network_and_no_way_into_other_processes(tmp_path: Path) -> None:
    ended, log = run(
        tmp_path,
        """
        import ctypes, errno, os, platform, socket, sys
        libc = ctypes.CDLL(None, use_errno=True)

        def refused(call, *codes):
            try:
                call()
            except OSError as error:
                assert error.errno in codes, error
            else:
                raise SystemExit(f"was let through: {call}")

        def raw(number, *arguments):
            if libc.syscall(ctypes.c_long(number), *arguments) < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

        for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET, 40):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                refused(lambda: socket.socket(family, kind), errno.EPERM)
        refused(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM), errno.EPERM)
        one, other = socket.socketpair()
        refused(lambda: one.connect("\\0daemon"), errno.EPERM)
        refused(lambda: one.bind("\\0mine"), errno.EPERM)
        one.sendall(b"x"); assert other.recv(1) == b"x"

        io_uring, ptrace, vm_readv, unshare, keyctl, perf = (
            (425, 101, 310, 272, 250, 298) if platform.machine() == "x86_64" else (425, 117, 270, 97, 219, 241)
        )
        refused(lambda: raw(io_uring, 8, None), errno.ENOSYS)
        for number in (ptrace, vm_readv, unshare, keyctl, perf):
            refused(lambda: raw(number, 0, 0, 0, 0, 0), errno.EPERM)
        refused(lambda: os.kill(-1, 9), errno.EPERM)

        worker = sys.argv[1]
        for name in ("mem", "environ", "maps", "fd/0", "cwd", "root"):
            for look in (open, os.readlink) if "/" in name or name in ("cwd", "root") else (open,):
                refused(lambda: look(f"/proc/{worker}/{name}"), errno.EACCES, errno.EPERM, errno.ENOENT)
        refused(lambda: os.kill(int(worker), 0), errno.EPERM, errno.ESRCH)
        print("confined")
        """,
        str(os.getpid()),
    )
    assert (ended.outcome, log) == ("completed", "confined\n")


def test_job_reads_and_writes_its_own_folders_only(tmp_path: Path) -> None:
    secret = tmp_path / "worker-key.pem"
    secret.write_text("the worker's own")
    secret.chmod(0o644)
    ended, log = run(
        tmp_path,
        """
        import errno, os, pathlib, shutil, sys
        secret, base = sys.argv[1:]

        def refused(call):
            try:
                call()
            except OSError as error:
                assert error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT), error
            else:
                raise SystemExit(f"was let through: {call}")

        refused(lambda: open(secret).read())
        refused(lambda: open(secret, "w"))
        try:
            os.chmod(secret, 0o600)  # may look as if it were done: see below
        except OSError as error:
            assert error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT), error
        refused(lambda: os.listdir(os.path.dirname(secret)))
        for place in ("/etc/passwd", "/usr/x", os.path.dirname(sys.executable) + "/x", "/proc/sys/kernel/core_pattern"):
            refused(lambda: open(place, "w"))
        refused(lambda: os.unlink(sys.executable))
        refused(lambda: open("/etc/shadow").read())
        refused(lambda: os.mknod("device", 0o020666, os.makedev(1, 1)))
        refused(lambda: os.listdir("/root"))
        pathlib.Path("here").write_text("x")
        shutil.copy("here", os.environ["KEYQUORUM_OUTPUT"])
        pathlib.Path(os.environ["TMPDIR"], "x").write_text("x")
        assert open("/proc/cpuinfo").read(10) and open("/dev/urandom", "rb").read(4)
        print("confined")
        """,
        str(secret),
        str(tmp_path),
    )
    assert (ended.outcome, log) == ("completed", "confined\n")
    assert secret.stat().st_mode & 0o777 == 0o644
    assert secret.read_text() == "the worker's own"


def test_numpy_works_in_the_jail(tmp_path: Path) -> None:
    ended, log = run(
        tmp_path,
        """
        import numpy as np
        a = np.random.default_rng(7).random((200, 200))
        print(np.allclose(np.linalg.inv(a) @ a, np.eye(200)))
        """,
    )
    assert (ended.outcome, log) == ("completed", "True\n")


def launch(tmp_path: Path, sabotage: str) -> list[dict[str, object]]:
    """The launcher's report when one of its parts is missing; the job would leave a file behind."""
    spec = JailSpec(
        arguments=(sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"),
        environment={},
        folder="/",
        readable=(),
        writable=(str(tmp_path),),
        user=None,
        groups=(),
        memory_bytes=1 << 28,
        file_bytes=1 << 20,
        open_files=64,
        processes=64,
        cpu_seconds=5,
        cpus=1,
        gpu=False,
    )
    start = f"import sys; from keyquorum_gpu_worker import jail, kernel, landlock, seccomp; {sabotage}; jail.main()"
    reading, writing = os.pipe()
    try:
        subprocess.run(
            [sys.executable, "-I", "-c", start, str(writing)],
            input=spec.to_json(),
            pass_fds=(writing,),
            start_new_session=True,
            capture_output=True,
            timeout=30,
            check=False,
        )
    finally:
        os.close(writing)
    with os.fdopen(reading) as report:
        return [json.loads(line) for line in report]


@pytest.mark.parametrize(
    ("sabotage", "step"),
    [
        ("landlock.landlock_abi = lambda: 0", "landlock"),
        ("seccomp.architecture = lambda: (_ for _ in ()).throw(OSError(38, 'no table for riscv64'))", "seccomp"),
        ("kernel.no_new_privileges = lambda: (_ for _ in ()).throw(OSError(1, 'no'))", "no new privileges"),
    ],
)
def test_job_that_cannot_be_confined_does_not_run(tmp_path: Path, sabotage: str, step: str) -> None:
    events = launch(tmp_path, sabotage)
    refusal = next(event for event in events if event["event"] == "refused")
    assert refusal["step"] == step
    assert not (tmp_path / "ran").exists()


def test_architecture_without_a_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="no seccomp table for riscv64"):
        seccomp.architecture()
