"""The few kernel calls that confining a job takes and Python 3.11 does not offer: thin ctypes bindings, nothing else.

Constants are from ``linux/prctl.h``, ``linux/sched.h``, ``linux/mount.h`` and ``linux/landlock.h``. Every call raises
:class:`OSError` with the kernel's errno. Calls for which the C library has no wrapper go by number; those numbers are
the same on x86_64 and aarch64 (they date from after the two tables were unified).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from pathlib import Path

__all__ = [
    "CLONE_NEWIPC",
    "CLONE_NEWNET",
    "CLONE_NEWNS",
    "CLONE_NEWPID",
    "CLONE_NEWUSER",
    "CLONE_NEWUTS",
    "bind_mount",
    "clear_dumpable",
    "die_with_parent",
    "drop_capabilities",
    "landlock_abi",
    "landlock_allow",
    "landlock_enforce",
    "landlock_ruleset",
    "make_mounts_private",
    "mount_proc",
    "mount_tmpfs",
    "no_new_privileges",
    "set_read_only",
    "set_subreaper",
    "unshare",
]

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

_MS_RDONLY = 1
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_NOEXEC = 8
_MS_BIND = 4096
_MS_REC = 16384
_MS_PRIVATE = 1 << 18

_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY = 1
_SYS_MOUNT_SETATTR = 442
_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_ADD_RULE = 445
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_RULE_PATH_BENEATH = 1

_CAPABILITY_VERSION_3 = 0x2008_0522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def prctl(option: int, *arguments: int | bytes) -> int:
    """prctl(2) with up to four further arguments; integers go as unsigned longs."""
    padded = [*arguments, 0, 0, 0, 0][:4]
    values = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in padded]
    return _checked(_libc.prctl(ctypes.c_int(option), *values), f"prctl({option})")


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that made it ends. Cleared by a change of user: ask again after it."""
    prctl(_PR_SET_PDEATHSIG, 9)


def clear_dumpable() -> None:
    """No core dump, and nobody without CAP_SYS_PTRACE reads this process's memory or environment."""
    prctl(_PR_SET_DUMPABLE, 0)


def set_subreaper(on: bool = True) -> None:
    """Orphaned descendants become this process's children, so that none escapes by forking twice."""
    prctl(_PR_SET_CHILD_SUBREAPER, int(on))


def no_new_privileges() -> None:
    """No set-user-id program gives anything from here on; not reversible."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Empty every capability set. The bounding set needs CAP_SETPCAP; without it there was nothing to gain anyway."""
    for capability in range(64):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            break
    with contextlib.suppress(OSError):  # kernels before 4.3 have no ambient set to clear
        prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, bytes(24)), "capset")


def unshare(flags: int) -> None:
    _checked(_libc.unshare(ctypes.c_int(flags)), f"unshare({flags:#x})")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = (source.encode(), os.fsencode(target), kind.encode())
    _checked(_libc.mount(*arguments, ctypes.c_ulong(flags), data.encode()), f"mount {kind or 'bind'} on {target}")


def make_mounts_private() -> None:
    """Nothing mounted from here on is seen outside this mount namespace."""
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)


def mount_tmpfs(target: str, *, mode: int, size: int) -> None:
    """``size`` bytes of pages at most, and an inode for each of them: inodes are memory too."""
    options = f"mode={mode:o},size={size},nr_inodes={max(64, size >> 12)}"
    _mount("tmpfs", target, "tmpfs", _MS_NOSUID | _MS_NODEV, options)


def mount_proc() -> None:
    """/proc of this process namespace, read-only, over the one that shows the machine's processes."""
    _mount("proc", "/proc", "proc", _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)


def bind_mount(descriptor: int, target: str) -> None:
    """Show what ``descriptor`` (O_PATH) is open on at ``target``."""
    _mount(f"/proc/self/fd/{descriptor}", target, "", _MS_BIND | _MS_REC)


def set_read_only(path: str, on: bool, *, recursive: bool) -> None:
    """Set or clear the read-only attribute of the mount at ``path`` (mount_setattr(2), Linux 5.12)."""
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY if on else 0, 0 if on else _MOUNT_ATTR_RDONLY, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    _checked(
        _libc.syscall(
            ctypes.c_long(_SYS_MOUNT_SETATTR),
            ctypes.c_int(_AT_FDCWD),
            os.fsencode(path),
            ctypes.c_uint(flags),
            attributes,
            ctypes.c_size_t(len(attributes)),
        ),
        f"mount_setattr {path}",
    )


def landlock_abi() -> int:
    """Version of Landlock that the kernel offers; 0 when it has none or it is switched off."""
    found = _libc.syscall(ctypes.c_long(_SYS_LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    return max(0, int(found))


def landlock_ruleset(attributes: bytes) -> int:
    """A descriptor for a new ruleset that handles what ``struct landlock_ruleset_attr`` says."""
    return _checked(
        _libc.syscall(
            ctypes.c_long(_SYS_LANDLOCK_CREATE_RULESET), attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)
        ),
        "landlock_create_ruleset",
    )


def landlock_allow(ruleset: int, rights: int, path: Path | str) -> None:
    """Grant ``rights`` beneath ``path``."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights, descriptor)
        _checked(
            _libc.syscall(
                ctypes.c_long(_SYS_LANDLOCK_ADD_RULE),
                ctypes.c_int(ruleset),
                ctypes.c_int(_LANDLOCK_RULE_PATH_BENEATH),
                rule,
                ctypes.c_uint(0),
            ),
            f"landlock_add_rule {path}",
        )
    finally:
        os.close(descriptor)


def landlock_enforce(ruleset: int) -> None:
    """Confine this thread and all it will start; not reversible."""
    _checked(
        _libc.syscall(ctypes.c_long(_SYS_LANDLOCK_RESTRICT_SELF), ctypes.c_int(ruleset), ctypes.c_uint(0)),
        "landlock_restrict_self",
    )
