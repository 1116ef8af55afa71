"""Ciphertext to and from the coordinator's store, going on where a broken transfer stopped.

A transfer may take as long as it takes: only one that stands still is given up. It is tried again as long as each try
got further than the one before.

The store is not trusted: an upload ends only when it reports the size and digest that were sent, a download is bounded
by the size that was signed and refused when its digest is another.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from typing import BinaryIO, TypeVar

import grpc
import grpc.aio

from keyquorum.progress import Progress, ProgressCallback, Stage
from keyquorum.session import Connection
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.streams import write_all
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["CHUNK_BYTES", "download", "upload"]

CHUNK_BYTES = 1 << 20
STALL_SECONDS = 120.0  # without one message getting through; a store may digest a large upload before it answers

Value = TypeVar("Value")


class _Stall:
    """Lets a call live for :data:`STALL_SECONDS` from the last message that got through."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._last = 0.0
        self.fault: KeyquorumError | None = None
        """Why there is nothing more to send: gRPC tells of a source that failed only by cancelling the call."""

    def moved(self) -> None:
        """A message got through."""
        self._last = asyncio.get_running_loop().time()

    async def watch(self, call: Awaitable[Value]) -> Value:
        """What the call gives. Raises :class:`UnavailableError` (``TIMEOUT``) when it stood still, and cancels it."""
        self.moved()
        pending = asyncio.ensure_future(call)
        try:
            while not pending.done():
                left = self._last + STALL_SECONDS - asyncio.get_running_loop().time()
                if left <= 0:
                    raise UnavailableError(
                        Reason.TIMEOUT,
                        f"the transfer of the {self._kind} stands still",
                        expected=f"something within {STALL_SECONDS:g} s",
                        actual="nothing",
                        next_step="Try again: it goes on from what the store has",
                    )
                await asyncio.wait((pending,), timeout=left)
            if self.fault is not None:
                raise self.fault
            return await pending
        finally:
            if not pending.done():
                pending.cancel()
                await asyncio.wait((pending,), timeout=1.0)


def _stood_still(connection: Connection, error: grpc.aio.AioRpcError) -> bool:
    """Whether a deadline that somebody on the way set ended the call."""
    return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not connection.decided(error)


async def upload(
    connection: Connection,
    job_id: str,
    kind: str,
    source: BinaryIO,
    size: int,
    sha256: bytes,
    progress: ProgressCallback,
) -> None:
    """Upload ``size`` bytes of ``source`` (seekable). Idempotent.

    Raises :class:`RefusedError` (``ARTIFACT``) where the store holds or reports anything else, and what the
    coordinator or transport raises once patience is used up.
    """
    backoff = connection.backoff()
    furthest = -1
    stall = _Stall(kind)
    stopped: KeyquorumError | None = None
    while True:
        state = await connection.unary(connection.artifacts.Stat, pb.StatArtifactRequest(job_id=job_id, kind=kind))
        if not state.complete:
            if state.committed > size:
                raise _other_upload(kind, size, state.committed)
            if state.committed > furthest:
                furthest = state.committed
                backoff.reset()
            elif stopped is not None:
                raise stopped
            stopped = None
            progress(Progress(Stage.UPLOAD, state.committed, size))
            chunks = _chunks(job_id, kind, source, state.committed, size, sha256, progress, stall)
            try:
                state = await stall.watch(connection.artifacts.Upload(chunks))
            except UnavailableError as error:
                if error.reason is not Reason.TIMEOUT:
                    raise
                stopped = error
                continue
            except grpc.aio.AioRpcError as error:
                if _stood_still(connection, error):
                    stopped = connection.error(error)
                elif not (connection.transient(error) and await backoff.wait()):
                    raise connection.error(error) from None
                continue
        if not (state.complete and state.size == size and hmac.compare_digest(state.sha256, sha256)):
            raise RefusedError(
                Reason.ARTIFACT,
                f"the store reports another {kind} than the one uploaded",
                expected=f"{size} bytes, SHA-256 {sha256.hex()}",
                actual=f"{state.size} bytes, SHA-256 {state.sha256.hex()[:64]}",
                details={"job": job_id, "kind": kind},
            )
        progress(Progress(Stage.UPLOAD, size, size))
        return


def _other_upload(kind: str, size: int, committed: int) -> RefusedError:
    return RefusedError(
        Reason.ARTIFACT,
        f"the store claims more of the {kind} than there is",
        expected=f"at most {size} bytes",
        actual=committed,
    )


async def _chunks(
    job_id: str,
    kind: str,
    source: BinaryIO,
    offset: int,
    size: int,
    sha256: bytes,
    progress: ProgressCallback,
    stall: _Stall,
) -> AsyncIterator[pb.UploadChunk]:
    yield pb.UploadChunk(start=pb.UploadStart(job_id=job_id, kind=kind, offset=offset))
    while offset < size:
        try:
            await asyncio.to_thread(source.seek, offset)
            data = await asyncio.to_thread(source.read, min(CHUNK_BYTES, size - offset))
        except OSError as error:
            stall.fault = UnavailableError(Reason.STORAGE, f"the {kind} can't be read", actual=error.strerror)
            raise stall.fault from None
        if not data:
            stall.fault = UnavailableError(
                Reason.STORAGE, f"the {kind} ended early", expected=f"{size} bytes", actual=offset
            )
            raise stall.fault
        offset += len(data)
        yield pb.UploadChunk(data=data)
        stall.moved()
        progress(Progress(Stage.UPLOAD, offset, size))
    yield pb.UploadChunk(finish=pb.UploadFinish(size=size, sha256=sha256))


async def download(
    connection: Connection,
    job_id: str,
    kind: str,
    sink: BinaryIO,
    size: int,
    sha256: bytes,
    progress: ProgressCallback,
) -> None:
    """Download exactly ``size`` bytes into ``sink``.

    Raises :class:`RefusedError` with ``ARTIFACT`` for another length and ``DIGEST`` for other bytes.
    """
    backoff = connection.backoff()
    digest = hashlib.sha256()
    stall = _Stall(kind)
    got = 0
    while got < size:
        before = got
        request = pb.DownloadRequest(job_id=job_id, kind=kind, offset=got)
        try:
            async with aclosing(connection.stream(connection.artifacts.Download, request)) as chunks:
                while (chunk := await stall.watch(_next(chunks))) is not None:
                    got += len(chunk.data)
                    if got > size:
                        raise _wrong_size(kind, size, f"more than {size} bytes")
                    digest.update(chunk.data)
                    write_all(
                        sink, memoryview(chunk.data)
                    )  # into the page cache: a thread would cost more than it saves
                    backoff.reset()
                    progress(Progress(Stage.DOWNLOAD, got, size))
        except UnavailableError as error:
            if error.reason is not Reason.TIMEOUT or got == before:
                raise
        except grpc.aio.AioRpcError as error:
            if _stood_still(connection, error) and got > before:
                continue
            if not (connection.transient(error) and await backoff.wait()):
                raise connection.error(error) from None
        else:
            if got < size:
                raise _wrong_size(kind, size, f"{got} bytes")
    if not hmac.compare_digest(digest.digest(), sha256):
        raise RefusedError(
            Reason.DIGEST,
            f"the store gave another {kind} than the one the worker signed",
            expected=sha256.hex(),
            actual=digest.hexdigest(),
            details={"job": job_id, "kind": kind},
        )


async def _next(chunks: AsyncIterator[pb.DownloadChunk]) -> pb.DownloadChunk | None:
    """The next chunk with something in it, ``None`` at the end."""
    async for chunk in chunks:
        if chunk.data:
            return chunk
    return None


def _wrong_size(kind: str, size: int, actual: str) -> RefusedError:
    return RefusedError(
        Reason.ARTIFACT,
        f"the store gave a {kind} of another size than the worker signed",
        expected=f"{size} bytes",
        actual=actual,
    )
