"""The caller of the floors: fan out to n servers, take the first k answers, verify and open each.

The same loop serves the empty floor (no crypto at all) and the crypto floor, by unary calls and over ordered streams.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.floor_server import INFO, SIGNING_SEED, STREAM, UNARY
from keyquorum_core.sealing import RecipientKey
from keyquorum_protos.wire import tls

_VERIFY = Ed25519PrivateKey.from_private_bytes(SIGNING_SEED).public_key()


class Floor:
    """``count`` server processes of one kind and the channels to them; an async context manager."""

    def __init__(self, kind: str, count: int, scratch: Path) -> None:
        self.kind, self.count, self._scratch = kind, count, scratch
        self.recipient = RecipientKey.generate()
        self._stack = AsyncExitStack()
        self._processes: list[subprocess.Popen[str]] = []
        self._unary: list[Any] = []
        self._streams: list[_Stream] = []

    async def __aenter__(self) -> Floor:
        now = int(time.time())
        server = tls.self_signed("floor", "custodian", "floor", now=now)
        client = tls.self_signed("floor", "coordinator", "floor", now=now)
        self._scratch.mkdir(parents=True, exist_ok=True)
        for name, data in (
            ("server.pem", server.certificate),
            ("server.key", server.key),
            ("client.pem", client.certificate),
        ):
            (self._scratch / name).write_bytes(data)
        command = [sys.executable, "-m", "benchmarks.floor_server", self.kind, str(self._scratch)]
        self._processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
            for _ in range(self.count)
        ]
        for process in self._processes:
            assert process.stdout is not None
            port = int((await asyncio.to_thread(process.stdout.readline)).strip())
            channel = tls.open_channel(
                f"127.0.0.1:{port}", client, [server.certificate], tls.dns_name("floor", "custodian", "floor")
            )
            await self._stack.enter_async_context(channel)
            self._unary.append(channel.unary_unary(UNARY))
            self._streams.append(_Stream(channel))
        return self

    async def __aexit__(self, *exc: object) -> None:
        for stream in self._streams:
            stream.close()
        await self._stack.aclose()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            await asyncio.to_thread(process.wait)
            assert process.stdout is not None
            process.stdout.close()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def request(self, size: int, plaintext: int) -> bytes:
        """A request of ``size`` bytes whose answer seals ``plaintext`` bytes."""
        key = self.recipient.public
        head = len(key).to_bytes(4, "big") + key + plaintext.to_bytes(4, "big")
        return head + bytes(max(0, size - len(head)))

    def _accept(self, answer: bytes) -> None:
        if self.kind == "crypto":
            _VERIFY.verify(answer[:64], answer[64:])
            self.recipient.open(answer[64:], INFO)

    async def unary(self, request: bytes, quorum: int) -> None:
        """One fan-out by unary calls; returns once ``quorum`` answers are verified and open."""
        calls = [call(request) for call in self._unary]
        for finished, answer in enumerate(asyncio.as_completed(calls), 1):
            self._accept(await answer)
            if finished == quorum:
                break

    async def streams(self, request: bytes, quorum: int) -> None:
        """One fan-out over the ordered streams."""
        answers: asyncio.Queue[bytes] = asyncio.Queue()
        for stream in self._streams:
            await stream.send(request, answers)
        for _ in range(quorum):
            self._accept(await answers.get())


class _Stream:
    """One ordered stream; answers come back in the order of requests."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call: Any = channel.stream_stream(STREAM)()
        self._waiting: asyncio.Queue[asyncio.Queue[bytes]] = asyncio.Queue()
        self._writing = asyncio.Lock()  # gRPC allows one write under way
        self._reader = asyncio.create_task(self._read())

    async def send(self, request: bytes, answers: asyncio.Queue[bytes]) -> None:
        async with self._writing:
            self._waiting.put_nowait(answers)
            await self._call.write(request)

    async def _read(self) -> None:
        while (answer := await self._call.read()) is not grpc.aio.EOF:
            (await self._waiting.get()).put_nowait(answer)

    def close(self) -> None:
        self._reader.cancel()
        self._call.cancel()


def percentile(samples: Sequence[float], share: float) -> float:
    """Nearest-rank percentile, in the samples' unit."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
