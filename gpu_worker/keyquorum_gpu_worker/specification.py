"""What a job is started with: its user, its command, its environment, its limits, and what it may read and write."""

from __future__ import annotations

import os
import re
import stat
import sys
import sysconfig
from pathlib import Path

from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.manifest import Resources
from keyquorum_gpu_worker import namespaces
from keyquorum_gpu_worker.jail import JailSpec
from keyquorum_gpu_worker.scratch import JobFolder

__all__ = ["PATH", "check_gpus", "choose_user", "most_processes", "specify"]

PATH = "/usr/local/bin:/usr/bin:/bin"
_OPEN_FILES = 1024
_GPU = re.compile(r"nvidia[0-9]+")
_JOB_USERS = (61184, 65519)  # the range that systemd gives to users that exist only while they run


def choose_user(scratch: Path) -> int | None:
    """The user a job runs as: another one where the worker is root and that can be, else None, the worker's own.

    ``scratch`` is where the job's folder will be.
    """
    if os.geteuid() != 0:
        return None
    # Another user must be able to reach its folder and to read Python. The way there can be opened in a namespace of
    # the job's own, but not the installation itself; where neither helps, root without any capability, under Landlock,
    # has to do.
    folders = _interpreter_folders()
    if any(os.stat(folder).st_mode & 0o005 != 0o005 for folder in folders):
        return None
    if namespaces.closed_ancestors((*folders, str(scratch.resolve() / "job"))) and not namespaces.allowed():
        return None
    first, last = _JOB_USERS
    user = first + os.getpid() % (last - first + 1)
    return user if _is_mapped(user) else None


def _is_mapped(user: int) -> bool:
    """Whether the user namespace that this process is in has such a user and group; some containers map only a few."""
    for name in ("uid_map", "gid_map"):
        ranges = [line.split() for line in Path(f"/proc/self/{name}").read_text().splitlines()]
        if not any(int(start) <= user < int(start) + int(count) for start, _, count in ranges):
            return False
    return True


def _interpreter_folders() -> tuple[str, ...]:
    """What Python needs to run: its own installation and the environment's packages, by every name they go by."""
    found = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    found |= {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    found |= {os.path.dirname(os.path.realpath(sys.executable))}
    found |= {os.path.realpath(path) for path in found}
    return tuple(sorted(path for path in found if path != "/" and os.path.isdir(path)))


def _command(entrypoint: tuple[str, ...], work: Path) -> tuple[str, ...]:
    """``python`` is the worker's own; a name without ``/`` is looked up in the system's folders, one with it in the
    bundle. Raises :class:`RefusedError` (``JOB_FAILED``)."""
    name, *arguments = entrypoint
    if name in ("python", "python3"):
        return (sys.executable, *arguments)
    candidates = [work / name] if "/" in name else [Path(folder) / name for folder in PATH.split(":")]
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return (str(candidate), *arguments)
    raise RefusedError(
        Reason.JOB_FAILED,
        "the job's entrypoint cannot be executed",
        expected="python, a program of the system, or an executable file of the bundle named with a /",
        actual=ascii(name[:80]),
    )


def _environment(folder: JobFolder, resources: Resources) -> dict[str, str]:
    threads = str(resources.cpus)
    out = {
        "PATH": PATH,
        "HOME": str(folder.work),
        "TMPDIR": str(folder.tmp),
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",  # what a job that is ended has printed is in its log
        "PYTHONDONTWRITEBYTECODE": "1",
        "KEYQUORUM_OUTPUT": str(folder.output),
    }
    for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR"):
        out[f"{name}_NUM_THREADS"] = threads
    if resources.gpus:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(number) for number in range(resources.gpus))
        out["CUDA_VISIBLE_DEVICES"] = devices
        out["CUPY_CACHE_DIR"] = str(folder.tmp / "cupy")
    else:
        out["CUDA_VISIBLE_DEVICES"] = ""
    return out


def _device_groups() -> tuple[int, ...]:
    """Groups that own GPU devices closed to others."""
    groups = set()
    for name in os.listdir("/dev"):
        if name.startswith("nvidia"):
            found = os.stat(f"/dev/{name}")
            if stat.S_ISCHR(found.st_mode) and not found.st_mode & stat.S_IWOTH:
                groups.add(found.st_gid)
    return tuple(sorted(groups - {0}))


def check_gpus(resources: Resources, devices: Path = Path("/dev")) -> None:
    """Raise :class:`RefusedError` (``UNSUPPORTED``) where this machine has fewer GPUs than the manifest asks for."""
    found = sum(1 for name in os.listdir(devices) if _GPU.fullmatch(name))
    if resources.gpus > found:
        raise RefusedError(
            Reason.UNSUPPORTED,
            "this machine has too few GPUs for the job",
            expected=f"{resources.gpus} GPUs",
            actual=f"{found} GPUs",
            next_step="Run the job on a worker with as many GPUs, or submit it with fewer.",
        )


def specify(entrypoint: tuple[str, ...], folder: JobFolder, resources: Resources, user: int | None) -> JailSpec:
    memory = resources.memory_mib << 20
    return JailSpec(
        arguments=_command(entrypoint, folder.work),
        environment=_environment(folder, resources),
        folder=str(folder.work),
        readable=_interpreter_folders(),
        writable=(str(folder.work), str(folder.output), str(folder.tmp)),
        user=user,
        groups=_device_groups() if resources.gpus else (),
        memory_bytes=memory,
        file_bytes=resources.output_mib << 20,
        open_files=_OPEN_FILES,
        processes=most_processes(resources),
        cpu_seconds=resources.cpus * resources.wall_seconds + 1,
        cpus=resources.cpus,
        gpu=resources.gpus > 0,
    )


def most_processes(resources: Resources) -> int:
    """Threads and processes together: a few libraries' thread pools, and the CUDA driver's."""
    return 128 + 32 * min(resources.cpus, 256) + 64 * resources.gpus
