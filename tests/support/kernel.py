"""The kernel's attestation interfaces as they behave, for collectors to talk to: configfs-tsm, and three devices."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from keyquorum_core.attestation.snp_report import REPORT_BYTES

__all__ = ["Nsm", "SevGuest", "TdxGuest", "Tsm"]

Sign = Callable[[bytes], bytes]
"""Report data in, report out."""


class Tsm:
    """configfs-tsm as a folder: the attributes appear in each folder made below it, and behave as the kernel's do.

    Attributes whose content depends on what was written are FIFOs, served by a thread. ``written`` is what came, in
    order; ``intruder`` stands for somebody else who writes at the same time.
    """

    def __init__(
        self,
        root: Path,
        sign: Sign,
        *,
        table: bytes = b"",
        provider: str = "sev_guest",
        expected: str = "sev_guest",
        intruder: bool = False,
        generation: str = "4",
        privileged: bool = False,
    ) -> None:
        self.root = root
        self.written: list[tuple[str, bytes]] = []
        self._sign = sign
        self._table = table
        self._provider = provider
        self._answers = provider == expected and generation.isdigit()  # otherwise nobody reads on
        self._intruder = intruder
        self._generation = generation
        self._privileged = privileged

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on making and removing folders does what configfs does: mkdir fills, rmdir empties."""
        monkeypatch.setattr(Path, "mkdir", lambda path: self._mkdir(path))
        monkeypatch.setattr(Path, "rmdir", self._rmdir)

    def _mkdir(self, path: Path) -> None:
        os.mkdir(path)
        (path / "provider").write_text(self._provider + "\n")
        for name in ("inblob", "outblob", "privlevel"):
            os.mkfifo(path / name)
        if self._table:
            (path / "auxblob").write_bytes(self._table)
        if not self._answers:
            (path / "generation").write_text(self._generation + "\n")
            return
        os.mkfifo(path / "generation")
        threading.Thread(target=self._served, args=(path,), daemon=True).start()

    @staticmethod
    def _rmdir(path: Path) -> None:
        for each in path.iterdir():
            each.unlink()
        os.rmdir(path)

    def _served(self, path: Path) -> None:
        with suppress(OSError):  # a reader that had enough goes away
            self._serve(path)

    def _serve(self, path: Path) -> None:
        (path / "generation").write_text(self._generation + "\n")
        for name in ("privlevel", "inblob") if self._privileged else ("inblob",):
            self.written.append((name, (path / name).read_bytes()))
        (path / "outblob").write_bytes(self._sign(self.written[-1][1]))
        after = int(self._generation) + len(self.written) + self._intruder
        (path / "generation").write_text(f"{after}\n")


@dataclass
class SevGuest:
    """``/dev/sev-guest``: reads the structures at the addresses that it is given, and writes the answers there.

    ``table_bytes`` is how much the host's table takes, rounded up to pages; more than the guest's room is an error.
    """

    sign: Sign
    table: bytes = b""
    table_bytes: int = 0
    host_error: int = 0
    status: int = 0
    report_size: int = REPORT_BYTES
    asked: list[tuple[int, bytes]] = field(default_factory=list)
    """Request number, and the bytes of the request."""

    def __call__(self, descriptor: int, request: int, argument: bytearray) -> None:
        os.fstat(descriptor)  # it must be open
        version, asked_at, answer_at, error = struct.unpack("<B7xQQQ", argument)
        assert (version, error) == (1, 0)
        size = {0xC0205300: 96, 0xC0205302: 112}[request]
        asked = ctypes.string_at(asked_at, size)
        self.asked.append((request, asked))
        if self.host_error:
            self._fail(argument, self.host_error)
        if request == 0xC0205302:
            table_at, room = struct.unpack("<QI4x", asked[96:])
            if self.table_bytes > room:
                ctypes.memmove(asked_at + 104, struct.pack("<I", self.table_bytes), 4)
                self._fail(argument, 1)
            ctypes.memmove(table_at, self.table, len(self.table))
        answer = struct.pack("<II24x", self.status, self.report_size) + self.sign(asked[:64])
        ctypes.memmove(answer_at, answer.ljust(4000, b"\0"), 4000)

    @staticmethod
    def _fail(argument: bytearray, host_error: int) -> None:
        argument[24:32] = struct.pack("<Q", host_error << 32)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@dataclass
class TdxGuest:
    """``/dev/tdx_guest``: a TDREPORT is the type, what stands before the report data, the data, and the rest."""

    tee_type: int = 0x81
    data: bytes | None = None
    """Instead of what was asked for."""
    asked: list[tuple[int, bytes]] = field(default_factory=list)

    def report(self, report_data: bytes) -> bytes:
        start = bytes([self.tee_type]).ljust(128, b"\x0d")
        return (start + (self.data or report_data)).ljust(1024, b"\x0e")

    def __call__(self, descriptor: int, request: int, argument: bytearray) -> None:
        os.fstat(descriptor)
        self.asked.append((request, bytes(argument)))
        argument[64:] = self.report(bytes(argument[:64]))


@dataclass
class Nsm:
    """``/dev/nsm``: ``answer`` makes a CBOR response of a CBOR request; ``length`` is what it says it wrote."""

    answer: Callable[[bytes], bytes]
    length: int | None = None
    asked: list[tuple[int, bytes]] = field(default_factory=list)

    def __call__(self, descriptor: int, request: int, argument: bytearray) -> None:
        os.fstat(descriptor)
        asked_at, asked_length, answer_at, room = struct.unpack("<QQQQ", argument)
        assert room == 0x3000
        asked = ctypes.string_at(asked_at, asked_length)
        self.asked.append((request, asked))
        answer = self.answer(asked)
        ctypes.memmove(answer_at, answer, len(answer))
        argument[24:32] = struct.pack("<Q", len(answer) if self.length is None else self.length)
