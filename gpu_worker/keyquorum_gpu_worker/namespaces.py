"""A view of the machine that holds only the job: namespaces of its own, where this kernel and user may make them.

Root makes them outright; anybody else makes them inside a user namespace. Where neither is allowed (many containers)
the job still has the seccomp filter and Landlock or another user; the caller decides whether that is enough.

With them: no network interface, no other process to see or signal, the death of the first process is the death of
all, every file system read-only but for the job's folders, and the places where people and daemons keep things
(:data:`_COVERED`) covered by empty ones.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from keyquorum_gpu_worker import kernel

__all__ = ["PRIVATE", "Namespaces", "allowed", "closed_ancestors", "enter", "private_bytes_used"]

PRIVATE = ("/tmp", "/dev/shm")  # noqa: S108 - covered by empty, size-limited file systems of the job's own
_COVERED = ("/root", "/home", "/run", "/var/tmp", "/mnt", "/media", "/srv")  # noqa: S108

_INODE_BYTES = 1024
FLAGS = kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS


@dataclass(frozen=True, slots=True)
class Namespaces:
    """What :func:`enter` achieved: all of it or nothing."""

    entered: bool
    """The next child is the first process of its own process namespace."""
    within_user_namespace: bool


def enter(readable: Sequence[str], writable: Sequence[str], *, private_bytes: int) -> Namespaces:
    """Leave the machine's namespaces. Returns quietly when the kernel says that this user may not.

    Raises :class:`OSError` when it stops half-way: then the job must not run.
    """
    uid, gid = os.geteuid(), os.getegid()
    within_user_namespace = False
    try:
        kernel.unshare(FLAGS)
    except OSError:
        if uid == 0:
            return Namespaces(False, False)
        try:
            kernel.unshare(FLAGS | kernel.CLONE_NEWUSER)
        except OSError:
            return Namespaces(False, False)
        within_user_namespace = True
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _arrange_mounts(readable, writable, private_bytes)
    return Namespaces(True, within_user_namespace)


def private_bytes_used(pids: Iterable[int]) -> int:
    """Memory that the private file systems hold now, as seen from any of the job's processes; 0 without namespaces.

    A file there is memory of no process. Its inode, which the kernel keeps beside the pages, counts as 1 KiB.
    """
    for pid in pids:
        try:
            found = {path: os.stat(f"/proc/{pid}/root{path}").st_dev for path in PRIVATE}
            return sum(
                _held_by(os.statvfs(f"/proc/{pid}/root{path}"))
                for path, device in found.items()
                if device != _device_of(path)
            )
        except OSError:
            continue  # it ended, or has not got so far yet
    return 0


def _held_by(found: os.statvfs_result) -> int:
    return (found.f_blocks - found.f_bfree) * found.f_frsize + (found.f_files - found.f_ffree) * _INODE_BYTES


def _device_of(path: str) -> int:
    """Of the worker's own file system there; -1 where it has none."""
    try:
        return os.stat(path).st_dev
    except OSError:
        return -1


def allowed() -> bool:
    """Whether this process may make them; tried in a child, since it could not come back."""
    attempt = "from keyquorum_gpu_worker import kernel, namespaces; kernel.unshare(namespaces.FLAGS)"
    tried = subprocess.run([sys.executable, "-I", "-c", attempt], capture_output=True, timeout=30, check=False)
    return tried.returncode == 0


def _arrange_mounts(readable: Sequence[str], writable: Sequence[str], private_bytes: int) -> None:
    kernel.make_mounts_private()
    shown = [*_outermost(readable), *writable]
    descriptors = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in shown}
    covers = [path for path in (*PRIVATE, *_COVERED, *closed_ancestors(shown)) if _is_plain_folder(path)]
    covers = _outermost(covers)
    for path in covers:
        private = path in PRIVATE
        kernel.mount_tmpfs(path, mode=0o1777 if private else 0o755, size=private_bytes if private else 1 << 20)
    for path, descriptor in descriptors.items():
        if _inside_any(path, covers):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                os.makedirs(path, mode=0o755, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        if _inside_any(path, covers) or path in writable:
            kernel.bind_mount(descriptor, path)
        os.close(descriptor)
    kernel.set_read_only("/", True, recursive=True)
    for path in (*writable, *(path for path in covers if path in PRIVATE)):
        kernel.set_read_only(path, False, recursive=False)


def _inside_any(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _outermost(paths: Sequence[str]) -> list[str]:
    """Each path once, without those inside another."""
    out: list[str] = []
    for path in sorted(set(paths), key=len):
        if not _inside_any(path, out):
            out.append(path)
    return out


def _is_plain_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def closed_ancestors(paths: Sequence[str]) -> list[str]:
    """Folders on the way to ``paths`` that the job's user could not pass through; covering them makes a way."""
    out = []
    for path in paths:
        for ancestor in reversed(Path(path).parents):
            if ancestor.exists() and not os.stat(ancestor).st_mode & stat.S_IXOTH:
                out.append(str(ancestor))
                break
    return out
