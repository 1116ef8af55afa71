"""The processes of a job as ``/proc`` shows them: who descends from whom, what they use, and ending them all.

The worker is a *subreaper* while a job runs: whatever a job leaves behind becomes the worker's child, however often it
forked, and so is found here.
"""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Usage", "children_of", "descendants", "end_all", "usage_of"]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a set of processes uses now."""

    processes: int
    memory_bytes: int
    """Resident, of their own or shared among them: not the pages of files."""
    unlinked_bytes: int
    """Held in open files that no folder shows any more."""


def children_of(pid: int) -> list[int]:
    """Direct children now; empty for a process that is gone."""
    out: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return out
    for task in tasks:
        try:
            out += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
        except OSError:
            continue  # the thread ended
    return out


def descendants(pid: int) -> list[int]:
    """All that descend from ``pid``, itself not included, parents before children."""
    out: list[int] = []
    pending = [pid]
    while pending:
        found = children_of(pending.pop())
        out += found
        pending += found
    return out


def usage_of(pids: Collection[int]) -> Usage:
    memory = 0
    unlinked: dict[tuple[int, int], int] = {}
    count = 0
    for pid in pids:
        resident = _resident(pid)
        if resident is None:
            continue
        count += 1
        memory += resident
        unlinked |= _unlinked(pid)
    return Usage(count, memory, sum(unlinked.values()))


def _resident(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    total = 0
    for line in status.splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            total += 1024 * int(line.split()[1])
    return total


def _unlinked(pid: int) -> dict[tuple[int, int], int]:
    """Regular files, memfds among them, that are open in a process and have no name: (device, inode) → bytes."""
    out: dict[tuple[int, int], int] = {}
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return out  # it ended, or it is the launcher, whose files are nobody's business
    for descriptor in descriptors:
        try:
            found = os.stat(f"/proc/{pid}/fd/{descriptor}")
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 0:
            out[found.st_dev, found.st_ino] = found.st_blocks * 512
    return out


def end_all(spare: Collection[int], *, patience: float = 10.0) -> list[int]:
    """SIGKILL, and collect, every child of this process that is not in ``spare``, and all that descends from them.

    As a subreaper this process inherits the orphans of each round, so rounds go on until there are none; numbers are
    looked up anew in each, since a number may by then belong to somebody else. Returns what still lives after
    ``patience`` seconds: nothing, unless the kernel holds a process in a call.
    """
    deadline = time.monotonic() + patience
    while True:
        children = [child for child in children_of(os.getpid()) if child not in spare]
        if not children:
            return []
        everything = [pid for child in children for pid in (child, *descendants(child))]
        if time.monotonic() > deadline:
            return everything
        for pid in everything:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue  # it ended
        for child in children:
            try:
                os.waitpid(child, os.WNOHANG)
            except ChildProcessError:
                continue  # collected elsewhere
        time.sleep(0.002)
