"""The local cluster's processes: start each, wait until it says that it is ready, stop all of them again.

Every role runs as the console script that an operator would run. Its log goes to ``logs/NAME.log``.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_local.layout import WORKER, Layout, program

__all__ = ["Cluster", "Process"]

_READY_SECONDS = 60.0
_STOP_SECONDS = 15.0


@dataclass(slots=True)
class Process:
    """One role's process. ``ready`` holds the JSON line that it printed once it could serve."""

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str] = field(repr=False)
    popen: subprocess.Popen[str] | None = None
    ready: dict[str, Any] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        if self.popen is None:
            raise UnavailableError(Reason.UNAVAILABLE, f"{self.name} is not running")
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def launch(self) -> None:
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
                env=self.environment, start_new_session=True,
            )  # fmt: skip

    def wait_ready(self, seconds: float = _READY_SECONDS) -> None:
        """Raises :class:`UnavailableError` with the end of the log when the process dies or does not get ready."""
        process = self.popen
        if process is None or process.stdout is None:
            raise UnavailableError(Reason.UNAVAILABLE, f"{self.name} was not launched")
        lines: queue.Queue[str] = queue.Queue()
        stdout = process.stdout

        def read() -> None:
            for line in stdout:
                lines.put(line)
            lines.put("")

        threading.Thread(target=read, daemon=True, name=f"{self.name} stdout").start()
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise self._failed(f"{self.name} did not get ready within {seconds:.0f} s") from None
            if not line:
                raise self._failed(f"{self.name} stopped before it was ready")
            if line.startswith("{") and json.loads(line).get("ready"):
                self.ready = json.loads(line)
                return

    def _failed(self, text: str) -> UnavailableError:
        tail = self.log.read_text(errors="replace")[-2000:].strip() if self.log.exists() else ""
        return UnavailableError(Reason.UNAVAILABLE, text, actual=tail, next_step=f"See {self.log}")

    def stop(self, seconds: float = _STOP_SECONDS) -> None:
        """Ask it to end; after ``seconds``, end it."""
        if self.popen is None:
            return
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
            try:
                self.popen.wait(seconds)
            except subprocess.TimeoutExpired:
                self.popen.kill()
        self._reap()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self.popen is not None:
            self.popen.kill()
            self._reap()

    def _reap(self) -> None:
        if self.popen is not None:
            self.popen.wait()
            if self.popen.stdout is not None:
                self.popen.stdout.close()
            self.popen = None


class Cluster:
    """All processes of one :class:`Layout`; a context manager that stops whatever it started."""

    def __init__(self, layout: Layout, *, step: Callable[[str], None] = lambda text: None) -> None:
        self.layout = layout
        self._step = step
        self.custodians = {name: self._custodian(name) for name, _ in layout.custodians}
        self.coordinator = self._process("coordinator", "keyquorum-coordinator", "serve", layout.coordinator)
        self.worker = self._process(WORKER, "keyquorum-worker", "run", layout.worker)

    def _process(self, name: str, script: str, verb: str, directory: Path, **environment: str) -> Process:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("KEYQUORUM_")}
        command = [*program(script), verb, "--dir", str(directory)]
        return Process(name, command, self.layout.logs / f"{name}.log", {**inherited, **environment})

    def _custodian(self, name: str) -> Process:
        passphrase = self.layout.passphrase(name).read_text()
        return self._process(
            name, "keyquorum-custodian", "serve", self.layout.custodian(name), KEYQUORUM_PASSPHRASE=passphrase
        )

    @property
    def processes(self) -> list[Process]:
        return [*self.custodians.values(), self.coordinator, self.worker]

    def start(self, processes: Iterable[Process] | None = None) -> None:
        """Launch all at once and wait for each. Stops everything again when one fails."""
        chosen = list(self.processes if processes is None else processes)
        try:
            for process in chosen:
                process.launch()
            for process in chosen:
                process.wait_ready()
                self._step(f"{process.name} is ready (pid {process.pid})")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for process in reversed(self.processes):
            if process.popen is not None and process.alive:
                process.popen.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            process.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
