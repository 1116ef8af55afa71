"""A real custodian process that is killed at a chosen write, as its caller sees it; see ``dying_custodian.py``."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import grpc.aio

from keyquorum_protos.wire.errors import from_rpc_error
from tests.support.custodian import Committee

__all__ = ["KILLED", "NEVER", "ROOT", "MortalCustodian", "dying_command"]

ROOT = Path(__file__).parents[2]
KILLED = -9
NEVER = 99
"""More commits than any test makes."""
T = TypeVar("T")


def dying_command(*arguments: str) -> list[str]:
    """The command line of a custodian armed to die."""
    return [sys.executable, "-m", "tests.support.dying_custodian", *arguments]


class MortalCustodian:
    """The real process, armed to die; whoever calls it finds out, starts it again and repeats the call."""

    def __init__(self, committee: Committee, custodian_id: str) -> None:
        self._committee = committee
        self.id = custodian_id
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""
        self.deaths = 0

    async def start(self, number: int = NEVER, when: str = "before", command: str = "serve") -> None:
        self.address = json.loads(await asyncio.to_thread(self._spawn, command, str(number), when))["address"]

    def _spawn(self, command: str, number: str, when: str) -> bytes:
        log = self._committee.folder / "dying.log"
        arguments = dying_command(command, str(self._committee.directory(self.id)), number, when)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, log.read_text()[-2000:]
        return line

    async def call(self, method: Callable[[grpc.aio.Channel], Awaitable[T]]) -> T:
        """One call. Raises :class:`UnavailableError` when the custodian died of it."""
        async with self._committee.channel(self.id, self.address) as channel:
            try:
                return await method(channel)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, self.id) from None

    def wait_for_death(self) -> None:
        assert self._process is not None
        assert self._process.wait(10) == KILLED
        self.deaths += 1
        self._close()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            assert self._process.wait(10) == 0
        self._close()

    def _close(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
