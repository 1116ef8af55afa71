"""A character device that answers ``ioctl``: opened for one exchange, and what it says when it cannot be had."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from keyquorum_core.errors import UnavailableError
from keyquorum_gpu_worker.evidence.source import unavailable

__all__ = ["Device", "Exchange", "Ioctl", "iowr", "kernel_ioctl"]

Ioctl = Callable[[int, int, bytearray], None]
"""File descriptor, request number, argument, which the kernel may change in place. Raises :class:`OSError`."""
Exchange = Callable[[int, bytearray], None]
"""The same on an open device."""

_IOC_WRITE_READ = 3


def kernel_ioctl(descriptor: int, request: int, argument: bytearray) -> None:
    """The system call."""
    fcntl.ioctl(descriptor, request, argument, True)


def iowr(kind: int, number: int, size: int) -> int:
    """``_IOWR(kind, number, type of that size)`` as include/uapi/asm-generic/ioctl.h has it (x86 and arm64)."""
    return _IOC_WRITE_READ << 30 | size << 16 | kind << 8 | number


class Device:
    """``path``, reached through ``ioctl``; ``next_step`` tells people what makes the device appear."""

    def __init__(self, path: Path, next_step: str, ioctl: Ioctl = kernel_ioctl) -> None:
        self.path = path
        self._next_step = next_step
        self._ioctl = ioctl

    @property
    def exists(self) -> bool:
        return self.path.exists()

    @contextmanager
    def opened(self) -> Iterator[Exchange]:
        """Raises :class:`UnavailableError` naming the device where it cannot be opened."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise self.failed("cannot be opened", error) from None
        try:
            yield lambda request, argument: self._ioctl(descriptor, request, argument)
        finally:
            os.close(descriptor)

    def failed(self, how: str, error: OSError) -> UnavailableError:
        return unavailable(
            f"the device {self.path.name} {how}",
            expected=f"{self.path}, to read and write",
            actual=error.strerror or str(error),
            next_step=self._next_step,
        )
