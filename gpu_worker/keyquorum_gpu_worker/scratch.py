"""The private folder that holds a job's plaintext, and its removal on every way out.

``keyquorum-job-<pid>-<random>`` (0711: passed through, not listed) holds ``work`` (the bundle; the job's working
directory and home), ``output`` and ``tmp`` (0700, the job's user's). It lies on a tmpfs where there is one, so that
plaintext meets no disk. The worker holds a lock on it for as long as it lives: a folder without a living worker is a
leftover of one that was killed, and the next start sweeps it.

Removal unlinks. On a tmpfs of an enclave the pages go back to encrypted memory; on a disk their blocks stay until
something overwrites them, which is why a folder that is not on a tmpfs is warned about.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from keyquorum_core.errors import Reason, UnavailableError

__all__ = ["JobFolder", "choose_base", "file_system_of", "measure", "remove_tree", "sweep"]

_NAME = re.compile(r"keyquorum-job-([0-9]{1,10})-[0-9a-f]{16}")
_MEMORY = ("tmpfs", "ramfs")
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - only ever a folder of our own in it
MAX_ENTRIES = 100_000
MAX_DEPTH = 64


def file_system_of(path: Path) -> str:
    """Type of the file system that holds ``path``, as ``/proc/mounts`` names it; empty when it does not say."""
    resolved = str(path.resolve())
    best, kind = "", ""
    try:
        mounts = Path("/proc/mounts").read_text(errors="replace")
    except OSError:
        return ""
    for line in mounts.splitlines():
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if (resolved == point or resolved.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, found
    return kind


def choose_base(configured: Path | None) -> Path:
    """Where job folders go: what is configured, else shared memory, else the system's folder for temporary files.

    Raises :class:`UnavailableError` (``STORAGE``) when the configured one cannot be used: plaintext is never put
    somewhere else than where the operator said.
    """
    if configured is not None:
        if not os.access(configured, os.W_OK | os.X_OK) or not configured.is_dir():
            raise UnavailableError(
                Reason.STORAGE,
                "the scratch folder cannot be used",
                expected=f"{configured}: a folder that the worker may write",
                next_step="Create it, or change `scratch` in worker.toml.",
            )
        return configured
    shared = Path(_SHARED_MEMORY)
    if shared.is_dir() and os.access(shared, os.W_OK | os.X_OK) and file_system_of(shared) in _MEMORY:
        return shared
    return Path(tempfile.gettempdir())


@dataclass(frozen=True, slots=True)
class Held:
    """What a folder holds: allocated bytes, entries, how deep the deepest is, and whether part of it is closed to the
    worker."""

    size: int
    entries: int
    depth: int
    closed: bool


class JobFolder:
    """A job's private folder; a context manager that removes it."""

    def __init__(self, base: Path, user: int | None) -> None:
        self.path = base / f"keyquorum-job-{os.getpid()}-{secrets.token_hex(8)}"
        self.in_memory = file_system_of(base) in _MEMORY
        try:
            self.path.mkdir(mode=0o700)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.chmod(0o711)
            for folder in (self.work, self.output, self.tmp):
                folder.mkdir(mode=0o700)
                if user is not None:
                    os.chown(folder, user, user)
        except OSError as error:
            shutil.rmtree(self.path, ignore_errors=True)
            raise UnavailableError(
                Reason.STORAGE, "cannot make the job's private folder", actual=f"{error.strerror}: {base}"
            ) from None

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def output(self) -> Path:
        return self.path / "output"

    @property
    def tmp(self) -> Path:
        return self.path / "tmp"

    def free_bytes(self) -> int:
        """Bytes that the file system still has for this user."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def remove(self) -> None:
        """Remove everything; does nothing the second time. Raises :class:`UnavailableError` if something stays."""
        if self._lock < 0:
            return
        remove_tree(self.path)
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def sweep(base: Path) -> list[str]:
    """Remove the job folders in ``base`` whose worker is dead; returns their names. Others' folders are left alone."""
    swept = []
    for entry in os.scandir(base):
        match = _NAME.fullmatch(entry.name)
        if match is None or not entry.is_dir(follow_symlinks=False):
            continue
        if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
            continue
        if os.path.exists(f"/proc/{match[1]}") and not _reused(Path(entry.path), match[1]):
            continue  # its worker lives
        lock = -1
        try:
            lock = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_tree(Path(entry.path))
            swept.append(entry.name)
        except (OSError, UnavailableError):
            continue  # held by a worker in another process namespace, or gone meanwhile
        finally:
            if lock >= 0:
                os.close(lock)
    return swept


def _reused(path: Path, pid: str) -> bool:
    """Whether the process numbered ``pid`` began after the folder was made, so that it cannot be the folder's."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        began = int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
        found = path.lstat()
    except (OSError, StopIteration, ValueError, IndexError):
        return False
    return began > found.st_mtime + 2


def remove_tree(top: Path) -> None:
    """Remove a folder that held a hostile job's files: any depth, any modes, links never followed.

    Folders are not descended into but pulled up: each subfolder is moved beside its parent before that is removed, so
    neither the depth nor the length of a path matters. Raises :class:`UnavailableError` (``STORAGE``) when something
    stays.
    """
    try:
        root = _open_folder(str(top), None)
    except FileNotFoundError:
        return
    try:
        counter = 0
        while names := os.listdir(root):
            for name in names:
                try:
                    os.unlink(name, dir_fd=root)
                    continue
                except (IsADirectoryError, PermissionError):
                    pass  # a folder: EISDIR, or EPERM as POSIX has it
                folder = _open_folder(name, root)
                try:
                    for inner in os.listdir(folder):
                        try:
                            os.unlink(inner, dir_fd=folder)
                        except (IsADirectoryError, PermissionError):
                            os.close(_open_folder(inner, folder))  # makes it writable: moving it changes its ".."
                            counter += 1
                            os.rename(inner, f".up-{counter}", src_dir_fd=folder, dst_dir_fd=root)
                finally:
                    os.close(folder)
                os.rmdir(name, dir_fd=root)
        os.rmdir(top)
    except OSError as error:
        raise UnavailableError(
            Reason.STORAGE,
            "plaintext could not be removed",
            actual=f"{error.strerror}: {top.name}",
            next_step=f"Remove {top} by hand.",
        ) from None
    finally:
        os.close(root)


def _open_folder(name: str, parent: int | None) -> int:
    """Open a folder, not a link to one, after giving its owner all rights to it."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if stat.S_IMODE(os.fstat(handle).st_mode) & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(handle)


def measure(*folders: Path) -> Held:
    """What the folders hold now, links not followed; stops counting just above :data:`MAX_ENTRIES` entries."""
    size = entries = deepest = 0
    closed = False
    pending = [(str(folder), 1) for folder in folders]
    while pending and entries <= MAX_ENTRIES:
        folder, depth = pending.pop()
        try:
            with os.scandir(folder) as found:
                for entry in found:
                    entries += 1
                    deepest = max(deepest, depth)
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entries > MAX_ENTRIES:
                        break
                    if depth <= MAX_DEPTH and entry.is_dir(follow_symlinks=False):
                        pending.append((entry.path, depth + 1))
        except PermissionError:
            closed = True
        except OSError:
            continue  # removed meanwhile
    return Held(size, entries, deepest, closed)
