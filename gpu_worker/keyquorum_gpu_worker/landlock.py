"""What of the file system a job sees, by Landlock (``linux/landlock.h``): a list of what it may, nothing else.

Landlock needs no privilege and cannot be undone. It also keeps the job from looking into processes outside itself
(the ptrace rule of its domain) and, from ABI 6 on, from signalling them. It does not govern modes, owners and times.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from keyquorum_gpu_worker.kernel import landlock_abi, landlock_allow, landlock_enforce, landlock_ruleset

__all__ = ["SYSTEM", "confine"]

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_FIRST_ABI = (1 << 13) - 1  # the thirteen rights that ABI 1 knows
_TCP = 0b11  # bind, connect
_SCOPES = 0b11  # abstract Unix sockets, signals

_READ = _EXECUTE | _READ_FILE | _READ_DIR
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE

SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime"),
    *("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/mime.types", "/etc/OpenCL"),
    *("/proc", "/sys/devices", "/sys/bus", "/sys/class", "/sys/module", "/sys/fs/cgroup"),
)
"""Read and executed by ordinary programs, and holding nobody's secrets; what is not there is left out."""

_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def confine(readable: Iterable[str], writable: Iterable[str], *, gpu: bool) -> int:
    """Confine this thread and what it will start to :data:`SYSTEM`, ``readable``, ``writable`` and a few devices.

    Returns the ABI used, 0 where the kernel has no Landlock. Raises :class:`OSError` when it has and refuses.
    """
    abi = landlock_abi()
    if abi == 0:
        return 0
    handled = _FIRST_ABI | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0)
    # The struct grew with the ABI, and older kernels refuse non-zero bytes that they do not know.
    attributes = struct.pack("=QQQ", handled, _TCP if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)
    ruleset = landlock_ruleset(attributes[: 8 if abi < 4 else 16 if abi < 6 else 24])
    try:
        devices = [*_DEVICES, *(_gpu_devices() if gpu else ())]
        rules = [(path, _READ) for path in (*SYSTEM, *readable)]
        rules += [(path, handled) for path in writable] + [(path, _READ | _WRITE_FILE) for path in devices]
        for path, rights in rules:
            if os.path.exists(path):
                landlock_allow(ruleset, rights & handled & (-1 if os.path.isdir(path) else _ON_FILES), path)
        landlock_enforce(ruleset)
    finally:
        os.close(ruleset)
    return abi


def _gpu_devices() -> list[str]:
    return [f"/dev/{name}" for name in os.listdir("/dev") if name.startswith("nvidia")]
