"""What every process that holds a secret does to itself before it reads one."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from typing import Final

from keyquorum_core.errors import Reason, UnavailableError

__all__ = ["harden"]

_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4


def harden() -> None:
    """No core dump of this process, and nobody without CAP_SYS_PTRACE reads its memory or environment (prctl(2),
    ``PR_SET_DUMPABLE``). Both last for this process only until it executes another program: call it in each one.

    Raises :class:`UnavailableError` (``UNSUPPORTED`` on anything but Linux, ``SANDBOX`` when the kernel refuses): then
    no secret may be read.
    """
    if sys.platform != "linux":
        raise UnavailableError(
            Reason.UNSUPPORTED,
            "a process cannot be kept from others' eyes on this operating system",
            expected="Linux",
            actual=sys.platform,
        )
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if libc.prctl(_PR_SET_DUMPABLE, zero, zero, zero, zero) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except (OSError, ValueError) as error:
        raise _refused(error) from None
    if libc.prctl(_PR_GET_DUMPABLE, zero, zero, zero, zero) != 0:
        raise _refused("the kernel took the call and did not heed it")


def _refused(why: object) -> UnavailableError:
    return UnavailableError(
        Reason.SANDBOX,
        "this process cannot be kept from others' eyes",
        expected="no core dumps, and memory closed to other processes",
        actual=why,
        next_step="Look at what confines this process: a seccomp filter may forbid prctl or setrlimit.",
    )
