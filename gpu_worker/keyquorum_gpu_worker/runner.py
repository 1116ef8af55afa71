"""Runs one job in the jail and watches it: output, memory, files, processes, time, and whether it should go on at all.

Limits that the kernel keeps by itself (``jail.py``) hold per process; what the job uses as a whole is looked at every
:data:`LOOK_SECONDS`, so a job can be over a limit for that long before it is ended. Time is the monotonic clock's.
RLIMIT_AS is not used: CUDA reserves address space by the terabyte. RLIMIT_DATA and the sum of resident memory and of
what the job's private /tmp and /dev/shm hold say what a job really takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.manifest import Resources
from keyquorum_gpu_worker import kernel
from keyquorum_gpu_worker.namespaces import private_bytes_used
from keyquorum_gpu_worker.processes import children_of, descendants, end_all, usage_of
from keyquorum_gpu_worker.scratch import MAX_DEPTH, MAX_ENTRIES, JobFolder, measure
from keyquorum_gpu_worker.specification import PATH, choose_user, most_processes, specify

__all__ = ["LOG_BYTES", "JobRun", "probe", "run_job"]

LOG_BYTES = 16 << 20
LOOK_SECONDS = 0.2
_MAX_REPORT = 64 << 10


@dataclass(slots=True)
class JobRun:
    """How a job ended. ``log`` is its stdout and stderr as they came, at most :data:`LOG_BYTES` and a marker."""

    outcome: str
    """One of the manifest module's OUTCOMES."""
    exit_code: int
    """Of the process; negative: ended by that signal."""
    reason: str
    log: bytearray = field(repr=False)
    layers: dict[str, object]
    """What confined it: namespaces, other_user, landlock (ABI), seccomp."""
    seconds: float


class _Watch:
    """What is looked at while the job runs, and the verdict once a limit is passed."""

    def __init__(
        self,
        folder: JobFolder,
        resources: Resources,
        cancelled: threading.Event,
        using: Callable[[dict[str, int]], None],
    ) -> None:
        self._using = using
        self._folder = folder
        self._resources = resources
        self._cancelled = cancelled
        self._before = measure(folder.work, folder.output, folder.tmp).size
        self.started = time.monotonic()
        self.verdict: tuple[str, str] | None = None

    def look(self, pids: list[int]) -> None:
        """Set :attr:`verdict` to (outcome, reason) at the first limit passed."""
        limits = self._resources
        if self._cancelled.is_set():
            self.verdict = ("cancelled", "the job was cancelled or taken away")
        elif time.monotonic() - self.started > limits.wall_seconds:
            self.verdict = ("timeout", f"the job ran longer than its {limits.wall_seconds} s")
        else:
            used = usage_of(pids)
            # A file that a process maps counts twice: rather that than not at all.
            memory = used.memory_bytes + private_bytes_used(pids)
            held = measure(self._folder.work, self._folder.output, self._folder.tmp)
            written = max(0, held.size - self._before) + used.unlinked_bytes
            most = most_processes(limits)
            seconds = int(time.monotonic() - self.started)
            self._using(
                {
                    "seconds": seconds,
                    "processes": used.processes,
                    "memory_bytes": memory,
                    "written_bytes": written,
                }
            )
            if memory > limits.memory_mib << 20:
                self.verdict = ("out-of-memory", f"the job took more memory than its {limits.memory_mib} MiB")
            elif used.processes > most:
                self.verdict = ("failed", f"the job started more than {most} processes")
            elif written > limits.output_mib << 20:
                self.verdict = ("output-too-large", f"the job wrote more than its {limits.output_mib} MiB")
            elif held.entries > MAX_ENTRIES or held.depth > MAX_DEPTH or held.closed:
                self.verdict = (
                    "output-too-large",
                    f"the job made over {MAX_ENTRIES} files, folders over {MAX_DEPTH} deep, or closed one",
                )


class _Output:
    """The job's log: bounded, but always drained, so that a chatty job does not block."""

    def __init__(self, limit: int) -> None:
        self.kept = bytearray()
        self._limit = limit
        self._dropped = 0

    def take(self, data: bytes) -> None:
        room = self._limit - len(self.kept)
        self.kept += data[: max(0, room)]
        self._dropped += max(0, len(data) - max(0, room))

    def finish(self) -> bytearray:
        if self._dropped:
            self.kept += f"\n[keyquorum: log cut here, {self._dropped} bytes more]\n".encode()
        return self.kept


def run_job(
    entrypoint: tuple[str, ...],
    folder: JobFolder,
    resources: Resources,
    *,
    user: int | None,
    cancelled: threading.Event,
    log_bytes: int = LOG_BYTES,
    confined: Callable[[dict[str, object]], None] = lambda layers: None,
    using: Callable[[dict[str, int]], None] = lambda used: None,
) -> JobRun:
    """Run to the end, and leave no process behind. Blocking; one at a time in a process.

    ``confined`` is told the layers just before the job starts, ``using`` at every look what the job uses. Raises
    :class:`RefusedError`: ``SANDBOX`` when the job could not be confined (it has not run then) or not be ended,
    ``JOB_FAILED`` when its entrypoint cannot be executed.
    """
    spec = specify(entrypoint, folder, resources, user)
    spared = children_of(os.getpid())
    kernel.set_subreaper(True)
    report_end, report_start = os.pipe()
    try:
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-m", "keyquorum_gpu_worker.jail", str(report_start)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": PATH, "LANG": "C.UTF-8"},
            cwd="/",
            pass_fds=(report_start,),
            start_new_session=True,
        )
        os.close(report_start)
        report_start = -1
        output = _Output(log_bytes)
        watch = _Watch(folder, resources, cancelled, using)
        events = _Events(confined)
        to_launcher, log = cast(IO[bytes], launcher.stdin), cast(IO[bytes], launcher.stdout)
        try:
            with contextlib.suppress(BrokenPipeError), to_launcher:  # it ended at once; what it said tells why
                to_launcher.write(spec.to_json())
            _follow(launcher, log.fileno(), report_end, output, events, watch)
        finally:
            survivors = end_all(spared)
            _drain(log.fileno(), output)
            log.close()
            launcher.poll()
        seconds = time.monotonic() - watch.started
    finally:
        kernel.set_subreaper(False)
        for descriptor in (report_end, report_start):
            if descriptor >= 0:
                os.close(descriptor)
    return _conclude(output, events, watch, seconds, survivors)


class _Events:
    """What the launcher reported."""

    def __init__(self, confined: Callable[[dict[str, object]], None]) -> None:
        self._confined = confined
        self._text = b""
        self.layers: dict[str, object] = {}
        self.jailed = False
        self.refused = ""
        self.ended: int | None = None
        """Exit code, negative for a signal."""

    def take(self, data: bytes) -> None:
        self._text += data
        if len(self._text) > _MAX_REPORT:
            raise RefusedError(Reason.SANDBOX, "the launcher reports without end")
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] == "jailed":
                self.layers, self.jailed = event["layers"], True
                self._confined(self.layers)
            elif event["event"] == "refused":
                self.refused = f"{event['step']}: {event['error']}"
            elif event["event"] == "ended":
                self.ended = -event["signal"] or event["code"]


def _follow(
    launcher: subprocess.Popen[bytes], log: int, report: int, output: _Output, events: _Events, watch: _Watch
) -> None:
    """Until the job ended or broke a limit."""
    os.set_blocking(log, False)
    os.set_blocking(report, False)
    next_look = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(log, selectors.EVENT_READ)
        selector.register(report, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(timeout=max(0.0, next_look - time.monotonic())):
                data = os.read(key.fd, 1 << 16)
                if key.fd == log:
                    output.take(data)
                else:
                    events.take(data)
                if not data:
                    selector.unregister(key.fd)
            if events.ended is not None or events.refused or report not in selector.get_map():
                return  # the report's end: the launcher is gone, with or without a last word
            if time.monotonic() >= next_look:
                watch.look(descendants(launcher.pid))
                next_look = time.monotonic() + LOOK_SECONDS
            if watch.verdict is not None:
                return


def _drain(log: int, output: _Output) -> None:
    """What was still in the pipe; nobody writes any more."""
    try:
        while data := os.read(log, 1 << 16):
            output.take(data)
    except OSError:
        return


def _conclude(output: _Output, events: _Events, watch: _Watch, seconds: float, survivors: list[int]) -> JobRun:
    log = output.finish()
    if events.refused.startswith(("exec:", "folder:")):
        return JobRun("failed", 127, f"the job could not be started: {events.refused}", log, events.layers, seconds)
    if events.refused or (not events.jailed and watch.verdict is None):
        raise RefusedError(
            Reason.SANDBOX,
            "the job could not be confined, and so was not run",
            expected="a seccomp filter, and Landlock or another user",
            actual=events.refused or log[-300:].decode("utf-8", "replace") or "the launcher ended without a word",
        )
    if survivors:
        # Nothing of its folder can be trusted to stay what it is while it is read.
        raise RefusedError(
            Reason.SANDBOX,
            "processes of the job could not be ended, so its output is not taken",
            expected="none alive",
            actual=f"{len(survivors)} in the kernel's hands",
            next_step="Restart the machine.",
        )
    if watch.verdict is not None:
        outcome, reason = watch.verdict
        return JobRun(outcome, -9, reason, log, events.layers, seconds)
    if events.ended is None:
        return JobRun("failed", -9, "the job's supervisor was killed", log, events.layers, seconds)
    if events.ended == 0:
        return JobRun("completed", 0, "", log, events.layers, seconds)
    how = f"ended by signal {-events.ended}" if events.ended < 0 else f"ended with status {events.ended}"
    return JobRun("failed", events.ended, f"the job {how}", log, events.layers, seconds)


def probe(base: Path) -> dict[str, object]:
    """Whether this machine can confine a job: runs one that does nothing, and returns the layers.

    Asked at the worker's start, before any key is asked for. Raises :class:`RefusedError` (``SANDBOX``).
    """
    user = choose_user(base)
    with JobFolder(base, user) as folder:
        run = run_job(
            ("python", "-I", "-S", "-c", "pass"),
            folder,
            Resources(cpus=1, memory_mib=256, gpus=0, wall_seconds=30, output_mib=1),
            user=user,
            cancelled=threading.Event(),
        )
    if run.outcome != "completed":
        raise RefusedError(
            Reason.SANDBOX,
            "a job that does nothing does not run on this machine",
            expected="completed",
            actual=f"{run.outcome}: {run.reason}: {run.log[-300:].decode('utf-8', 'replace')}",
        )
    return run.layers
