"""Distance on one machine: a relay in a process of its own that hands every byte on a chosen time later.

``python -m benchmarks.distance LISTEN TO`` takes connections at one port of the loopback and carries each to another.
Lines on its standard input say how many milliseconds it takes from then on, one way; it ends with its input.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from types import TracebackType
from typing import IO, Self

__all__ = ["Distance"]

_CHUNK = 1 << 18


class Distance:
    """The relay as whoever uses it sees it; a context manager that ends it. ``one_way`` is in milliseconds."""

    def __init__(self, listen: int, to: int) -> None:
        self._command = [sys.executable, "-m", "benchmarks.distance", str(listen), str(to)]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._pipes()[1].readline() == "ready\n", "the relay did not start"
        return self

    def set(self, one_way: float) -> None:
        """From now on; returns once it holds."""
        commands, answers = self._pipes()
        commands.write(f"{one_way}\n")
        commands.flush()
        assert answers.readline() == "set\n", "the relay is gone"

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        return process.stdin, process.stdout

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        commands, answers = self._pipes()
        commands.close()
        if self._process is not None:
            self._process.wait()
        answers.close()


class _Relay:
    def __init__(self, to: int) -> None:
        self._to = to
        self._seconds = 0.0
        self._connections: set[asyncio.Task[None]] = set()

    async def serve(self, listen: int) -> None:
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._connected, "127.0.0.1", listen)
        print("ready", flush=True)
        async with server:
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                self._seconds = float(line) / 1000
                print("set", flush=True)
            for task in self._connections:
                task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self._to)
            await asyncio.gather(self._carry(reader, onward_writer), self._carry(onward_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Everything, in order, each piece when its time has come; then the end of it."""
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def arrive() -> None:
            while True:
                due, data = await under_way.get()
                if (left := due - loop.time()) > 0:
                    await asyncio.sleep(left)
                if not data:
                    return
                writer.write(data)

        arriving = asyncio.create_task(arrive())
        try:
            while data := await reader.read(_CHUNK):
                under_way.put_nowait((loop.time() + self._seconds, data))
            under_way.put_nowait((loop.time() + self._seconds, b""))
            await arriving
        finally:
            arriving.cancel()
            with contextlib.suppress(OSError):
                writer.close()


if __name__ == "__main__":
    asyncio.run(_Relay(int(sys.argv[2])).serve(int(sys.argv[1])))
