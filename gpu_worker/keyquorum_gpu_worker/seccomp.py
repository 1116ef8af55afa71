"""The system calls a job may not make: a classic-BPF seccomp filter (``linux/seccomp.h``, ``linux/filter.h``).

What it is for, in order of weight: no network (no ``socket`` at all; a connected pair of stream sockets between the
job's own processes is all there is), no reaching into other processes, no kernel surface that a computation has no use
for, no memory that the worker cannot see and count. The architecture is checked, x32 is refused, and a call newer than
this table does not exist, so that next year's kernel brings no hole.

The filter is a whole or nothing: :func:`install` raises :class:`OSError` and the job is refused.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

from keyquorum_gpu_worker.kernel import prctl

__all__ = ["DENIED", "HIDDEN", "MODES", "OWNERS", "architecture", "install", "program"]

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_…, column of the tables

Table = dict[str, tuple[int | None, int | None]]
"""Call → its number on x86_64 and on aarch64; None where it has none."""

DENIED: Table = {
    # network: socketpair is judged by its arguments
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # keys
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # the kernel itself
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "syslog": (103, 116),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "personality": (135, 92),
    "vhangup": (153, 58),
    "lookup_dcookie": (212, 18),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "sysfs": (139, None),
}
"""Refused with EPERM."""

HIDDEN: Table = {
    "io_uring_setup": (425, 425),  # makes the calls above without passing this filter
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "clone3": (435, 435),  # its flags lie behind a pointer; the C library falls back to clone
    "memfd_secret": (447, 447),
    "shmget": (29, 194),  # memory of no process, which the memory limit would not see
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
"""Refused with ENOSYS, so that libraries take their older way."""

_MEMFD: Table = {"memfd_create": (319, 279)}

MODES: Table = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "utime": (132, None),
    "utimes": (235, None),
    "utimensat": (280, 88),
    "futimesat": (261, None),
}
"""Answered as done, and not done, where the job runs as the worker's own user and nothing else keeps it from that
user's files: Landlock governs a file's contents, not its mode, owner and times. A refusal would break every program
that copies a file, and neither mode nor time matters in a result."""

OWNERS: Table = {
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "truncate": (76, 45),  # by path, which Landlock governs from ABI 3 on only
}
"""Refused with EPERM in the same case."""

_SOCKETPAIR = (53, 199)
_CLONE = (56, 220)
_KILL = (62, 129)
_NEWEST = 462  # mseal; later calls are unknown here and answered ENOSYS
_X32_BIT = 0x4000_0000

_ALLOW = 0x7FFF_0000
_ERRNO = 0x0005_0000
_KILL_PROCESS = 0x8000_0000
_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06

_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_NAMESPACE_FLAGS = 0x0002_0000 | 0x0200_0000 | 0x7C00_0000  # CLONE_NEW{NS, CGROUP, UTS IPC USER PID NET}

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2


def architecture() -> str:
    """This machine's, as in the tables. Raises :class:`OSError` (ENOSYS) for one that has no table."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"no seccomp table for {machine}; there is one for {', '.join(_ARCHITECTURES)}")
    return machine


def _low(argument: int) -> int:
    """Offset of the low 32 bits of a call's argument; both architectures are little-endian."""
    return 16 + 8 * argument


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _return(value: int) -> bytes:
    return _instruction(_RETURN, value)


def program(machine: str, *, gpu: bool = False, metadata: bool = True) -> bytes:
    """The filter as an array of ``struct sock_filter``. ``gpu`` leaves memfd_create, which the CUDA driver uses;
    ``metadata`` leaves the calls of :data:`MODES` and :data:`OWNERS`."""
    audit, column = _ARCHITECTURES[machine]
    refuse, hide = _return(_ERRNO | errno.EPERM), _return(_ERRNO | errno.ENOSYS)
    out = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, audit, 1, 0),
        _return(_KILL_PROCESS),
        _instruction(_LOAD, _NUMBER),
        _instruction(_GREATER_EQUAL, _NEWEST + 1, 0, 1),  # x32's numbers (bit 30) are above it, too
        hide,
    ]

    def judge(number: int, *checks: bytes) -> None:
        """The checks that end in a verdict for one call; the number is still loaded when it is another one."""
        out.append(_instruction(_EQUAL, number, 0, len(checks)))
        out.extend(checks)

    tables = [(DENIED, refuse), (HIDDEN, hide)]
    if not gpu:
        tables.append((_MEMFD, hide))
    if not metadata:
        tables += [(MODES, _return(_ERRNO)), (OWNERS, refuse)]
    for table, verdict in tables:
        for numbers in table.values():
            if (number := numbers[column]) is not None:
                judge(number, verdict)
    judge(
        _SOCKETPAIR[column],
        # Stream or sequenced-packet pairs only: a datagram pair could address a daemon's socket with sendmsg.
        _instruction(_LOAD, _low(0)),
        _instruction(_EQUAL, 1, 0, 4),  # AF_UNIX
        _instruction(_LOAD, _low(1)),
        _instruction(_AND, 0xF),
        _instruction(_EQUAL, 1, 2, 0),  # SOCK_STREAM
        _instruction(_EQUAL, 5, 1, 0),  # SOCK_SEQPACKET
        refuse,
        _return(_ALLOW),
    )
    judge(
        _CLONE[column],
        _instruction(_LOAD, _low(0)),
        _instruction(_ANY_BIT, _NAMESPACE_FLAGS, 0, 1),
        refuse,
        _return(_ALLOW),
    )
    judge(
        _KILL[column],
        # kill(-1) means everything this user runs; where there is no namespace of the job's own that is too much.
        _instruction(_LOAD, _low(0)),
        _instruction(_EQUAL, 0xFFFF_FFFF, 0, 1),
        refuse,
        _return(_ALLOW),
    )
    out.append(_return(_ALLOW))
    return b"".join(out)


class _SockFprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def install(*, gpu: bool, metadata: bool) -> None:
    """Filter this process and all it will start; needs no_new_privs. Raises :class:`OSError`."""
    code = program(architecture(), gpu=gpu, metadata=metadata)
    wrapped = _SockFprog(len(code) // 8, code)
    prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(wrapped))
