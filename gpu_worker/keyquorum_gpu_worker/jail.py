"""The launcher that runs in the child: it confines itself step by step, then becomes the job.

``python -I -m keyquorum_gpu_worker.jail FD`` reads a :class:`JailSpec` as JSON from its standard input and reports on
descriptor FD, one JSON object a line: ``{"event": "jailed", "layers": {…}}`` just before the job starts, then
``{"event": "ended", "code": …, "signal": …}``; or ``{"event": "refused", "step": …, "error": …}``. Three processes:

* the launcher, which dies with the worker, enters the namespaces and waits;
* the first process of the job's process namespace (or, where there is none, the launcher itself), which reaps, and
  whose end takes every process of the job with it;
* the job: another user where that can be, no capability, no way to gain one, Landlock, seccomp, limits, exec.

Every step fails closed. The job is refused unless the seccomp filter is in place and, beyond it, at least one of
Landlock and another user keeps the job from the worker's own files.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import resource
import select
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NoReturn

from keyquorum_gpu_worker import kernel, landlock, namespaces, seccomp

__all__ = ["REFUSED_STATUS", "JailSpec", "main"]

REFUSED_STATUS = 125
_MAX_SPEC = 1 << 20
_DESCRIPTORS = 1 << 20


@dataclass(frozen=True, slots=True)
class JailSpec:
    """What to run and how it is confined. Sizes in bytes, times in seconds."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    folder: str
    """Working directory; one of ``writable`` or beneath one."""
    readable: tuple[str, ...]
    writable: tuple[str, ...]
    user: int | None
    """User and group to become; None stays the worker's own."""
    groups: tuple[int, ...]
    memory_bytes: int
    file_bytes: int
    open_files: int
    processes: int
    cpu_seconds: int
    cpus: int
    gpu: bool

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes) -> JailSpec:
        """From the worker's own :meth:`to_json`; anything else raises :class:`TypeError` or :class:`ValueError`."""
        members = json.loads(data)
        for name in ("arguments", "readable", "writable", "groups"):
            members[name] = tuple(members[name])
        return JailSpec(**members)


class _Launcher:
    def __init__(self, spec: JailSpec, report: int) -> None:
        self._spec = spec
        self._report = report
        self._worker = os.getppid()
        self._layers: dict[str, object] = {}

    def say(self, **event: object) -> None:
        os.write(self._report, json.dumps(event).encode() + b"\n")

    def step(self, name: str, action: Callable[[], object]) -> None:
        """Do one step; a failure is reported by name and ends this process."""
        try:
            action()
        except Exception as error:
            self.say(event="refused", step=name, error=f"{type(error).__name__}: {error}"[:500])
            os._exit(REFUSED_STATUS)

    def run(self) -> NoReturn:
        os.umask(0o022)
        self.step("die with the worker", lambda: _die_with(self._worker))
        self.step("namespaces", self._enter_namespaces)
        self.step("own privacy", kernel.clear_dumpable)
        self.step("subreaper", kernel.set_subreaper)
        if not self._layers["namespaces"]:
            self._supervise()
        watched, held = os.pipe()  # held by the launcher for as long as it lives
        first = os.fork()
        if first == 0:
            os.close(held)
            self.step("die with the launcher", lambda: _die_with_launcher(watched))
            self.step("processes of its own", self._own_proc)
            self._supervise()
        _, status = os.waitpid(first, 0)
        os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else REFUSED_STATUS)

    def _enter_namespaces(self) -> None:
        spec = self._spec
        made = namespaces.enter(spec.readable, spec.writable, private_bytes=spec.memory_bytes // 4)
        self._layers["namespaces"] = made.entered
        self._layers["user_namespace"] = made.within_user_namespace

    def _own_proc(self) -> None:
        try:
            kernel.mount_proc()
        except OSError:
            # A user namespace may only mount it where the machine's own is wholly visible. Without it the job sees
            # that other processes exist, and nothing inside them.
            self._layers["own_proc"] = False
        else:
            self._layers["own_proc"] = True

    def _supervise(self) -> NoReturn:
        """Start the job, wait for it, end what it left behind."""
        supervisor = os.getpid()
        job = os.fork()
        if job == 0:
            self._become_job(supervisor)
        status = 0
        while True:
            pid, ended = os.waitpid(-1, 0)
            if pid == job:
                status = ended
                break
        code = os.waitstatus_to_exitcode(status)
        self.say(event="ended", code=max(code, 0), signal=max(-code, 0))
        os._exit(0)

    def _become_job(self, supervisor: int) -> NoReturn:
        spec = self._spec
        self.step("signals", _default_signals)
        self.step("limits", self._set_limits)
        self.step("folder", lambda: os.chdir(spec.folder))
        self.step("user", self._change_user)
        self.step("die with the supervisor", lambda: _die_with(supervisor))
        self.step("capabilities", kernel.drop_capabilities)
        self.step("no new privileges", kernel.no_new_privileges)
        self.step("landlock", self._confine_files)
        self.step("descriptors", self._close_descriptors)
        metadata = bool(spec.user is not None or self._layers["namespaces"])
        self._layers["seccomp"] = True
        self.say(event="jailed", layers=self._layers)
        self.step("seccomp", lambda: seccomp.install(gpu=spec.gpu, metadata=metadata))
        self.step("exec", self._exec)
        os._exit(REFUSED_STATUS)

    def _exec(self) -> None:
        os.execve(self._spec.arguments[0], self._spec.arguments, self._spec.environment)  # noqa: S606 - no shell wanted

    def _set_limits(self) -> None:
        spec = self._spec
        processes = spec.processes
        if spec.user is None and not self._layers["namespaces"]:
            processes += _processes_of(os.getuid())  # they count against the same user
        for what, value in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_DATA, spec.memory_bytes),
            (resource.RLIMIT_FSIZE, spec.file_bytes),
            (resource.RLIMIT_NOFILE, spec.open_files),
            (resource.RLIMIT_NPROC, processes),
            (resource.RLIMIT_CPU, spec.cpu_seconds),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            _lower(what, value)
        allowed = sorted(os.sched_getaffinity(0))
        if spec.cpus < len(allowed):
            # Any of them, so that workers side by side do not crowd the first ones.
            os.sched_setaffinity(0, random.sample(allowed, spec.cpus))

    def _change_user(self) -> None:
        user = self._spec.user
        self._layers["other_user"] = user is not None
        if user is not None:
            os.setgroups(list(self._spec.groups))
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)

    def _confine_files(self) -> None:
        spec = self._spec
        private = namespaces.PRIVATE if self._layers["namespaces"] else ()
        abi = landlock.confine(spec.readable, (*spec.writable, *private), gpu=spec.gpu)
        self._layers["landlock"] = abi
        if abi == 0 and spec.user is None:
            raise OSError(
                errno.ENOSYS,
                "this kernel has no Landlock, and the job would run as the worker's own user: start the worker as "
                "root, or on a kernel with Landlock",
            )

    def _close_descriptors(self) -> None:
        os.closerange(3, self._report)
        os.closerange(self._report + 1, _DESCRIPTORS)
        os.set_inheritable(self._report, False)  # closes at exec
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        if null > 0:
            os.close(null)


def _die_with(parent: int) -> None:
    kernel.die_with_parent()
    if os.getppid() != parent:  # it died before it was asked
        os._exit(REFUSED_STATUS)


def _die_with_launcher(watched: int) -> None:
    """As :func:`_die_with`, across a new process namespace, in which the parent has no number."""
    kernel.die_with_parent()
    if select.select([watched], [], [], 0)[0]:
        os._exit(REFUSED_STATUS)


def _default_signals() -> None:
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _lower(what: int, value: int) -> None:
    """Set a limit, soft and hard, never above the hard one inherited."""
    hard = resource.getrlimit(what)[1]
    most = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (most, most))


def _processes_of(user: int) -> int:
    """Threads that now run as ``user``: what RLIMIT_NPROC counts."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == user:
                    count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue  # ended meanwhile
    return count


def main() -> NoReturn:
    report = int(sys.argv[1])
    spec = JailSpec.from_json(sys.stdin.buffer.read(_MAX_SPEC))
    gc.disable()
    _Launcher(spec, report).run()


if __name__ == "__main__":
    main()
