"""One Release stream to a custodian, and how requests share its messages.

A message costs both sides as much as most of the checks, and a custodian commits once for each. So requests that gather
while one is being written share the next message, where the custodian takes such groups (its Describe says how many).
One that comes alone waits for none.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import grpc.aio

from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.wire.errors import from_rpc_error

__all__ = ["Lane", "framed"]

_RELEASE: Final = "/keyquorum.v1.Custodian/Release"
_MAX_GROUP: Final = 8
"""With more, callers fall into step: all wait for the custodians, then these for all of them."""
_MAX_GROUP_BYTES: Final = 1 << 20
_GROUP_TAG: Final = bytes([pb.ReleaseRequest.GROUP_FIELD_NUMBER << 3 | 2])


class Lane:
    """One Release stream: a queue with its writer, and a reader. Ends when either fails. ``group``: how many requests
    the custodian takes in one message."""

    def __init__(
        self, channel: grpc.aio.Channel, on_answer: Callable[[pb.ReleaseAnswer], None], group: int = 1
    ) -> None:
        method: Callable[[], grpc.aio.StreamStreamCall[bytes, pb.ReleaseAnswer]] = channel.stream_stream(
            _RELEASE, request_serializer=None, response_deserializer=pb.ReleaseAnswer.FromString
        )
        self._call = method()
        self._on_answer = on_answer
        self._group = max(1, min(group, _MAX_GROUP))
        self._queue: deque[bytes] = deque()
        self._wake: asyncio.Future[None] | None = None
        self.started = time.monotonic()

    def send(self, data: bytes) -> None:
        self._queue.append(data)
        wake = self._wake
        if wake is not None and not wake.done():
            wake.set_result(None)

    async def run(self, peer: str) -> KeyquorumError:
        """Until the stream ends; returns why."""
        writer = asyncio.create_task(self._write())
        try:
            call = self._call
            on_answer = self._on_answer
            while True:
                answer = await call.read()
                if not isinstance(answer, pb.ReleaseAnswer):
                    return UnavailableError(Reason.UNAVAILABLE, f"{peer} ended the release stream")
                if answer.group:
                    for each in answer.group:
                        on_answer(each)
                else:
                    on_answer(answer)
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error, peer)
        finally:
            writer.cancel()
            self._call.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await writer

    async def _write(self) -> None:
        queue = self._queue
        write = self._call.write
        loop = asyncio.get_running_loop()
        while True:
            while queue:
                # Raises when the stream is broken; the reader learns of it as well, and says why.
                await write(self._next())
            self._wake = loop.create_future()
            await self._wake

    def _next(self) -> bytes:
        """The first request of the queue, or a group of the first few."""
        queue = self._queue
        first = queue.popleft()
        group, size = [first], len(first)
        while queue and len(group) < self._group and size + len(queue[0]) <= _MAX_GROUP_BYTES:
            group.append(queue.popleft())
            size += len(group[-1])
        return first if len(group) == 1 else b"".join(part for each in group for part in framed(each))


def framed(request: bytes) -> tuple[bytes, bytes, bytes]:
    """A serialised request as a member of a group: tag, length, itself (protobuf's wire format)."""
    size, length = len(request), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return _GROUP_TAG, bytes(length), request
