"""Ciphertext to and from the coordinator's store, going on where a broken transfer stopped.

The store is not trusted: a download is bounded by the size that the owner signed and refused when its digest is
another; an upload has ended only when the store reports the size and digest that were sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import queue
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import BinaryIO, TypeVar

import grpc.aio

from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_gpu_worker.link import Link
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["CHUNK_BYTES", "ChunkSource", "download_through", "upload"]

CHUNK_BYTES = 1 << 20
_STALL_SECONDS = 600.0
_QUEUED_CHUNKS = 4

Read = TypeVar("Read")


class ChunkSource:
    """A blocking source for one thread, fed by another or by an event loop; bounded, so that neither runs ahead."""

    def __init__(self) -> None:
        self._queue: queue.Queue[bytes | BaseException] = queue.Queue(_QUEUED_CHUNKS)
        self._left = memoryview(b"")
        self._ended = False
        self._closed = False

    def feed(self, item: bytes | BaseException) -> bool:
        """Hand over a chunk, ``b""`` for the end, or what broke the transfer. Blocks; false once nobody reads on."""
        while not self._closed:
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def close(self) -> None:
        """The reader has gone."""
        self._closed = True

    def read(self, size: int, /) -> bytes:
        while not len(self._left) and not self._ended:
            item = self._queue.get()
            if isinstance(item, BaseException):
                self._ended = True
                raise item
            self._ended = not item
            self._left = memoryview(item)
        out = bytes(self._left[:size])
        self._left = self._left[size:]
        return out


async def download_through(
    link: Link, job_id: str, kind: str, size: int, sha256: bytes, consume: Callable[[ChunkSource], Read]
) -> Read:
    """Run ``consume`` in a thread over exactly ``size`` bytes as they come; its result, once the digest was met.

    Raises :class:`RefusedError` with ``ARTIFACT`` for another length and ``DIGEST`` for other bytes, what the
    transport means once patience is used up, and what ``consume`` raises.
    """
    source = ChunkSource()

    def reading() -> Read:
        try:
            return consume(source)
        finally:
            source.close()

    reader = asyncio.get_running_loop().run_in_executor(None, reading)
    try:
        await _fetch(link, job_id, kind, size, sha256, source)
    except KeyquorumError as error:
        # Whoever noticed first tells: the reader may have refused the bytes before their digest was wrong.
        if not await asyncio.to_thread(source.feed, error):
            return await reader
        try:
            await reader
        except KeyquorumError as consumed:
            raise consumed from None
        raise
    except BaseException:
        source.feed(UnavailableError(Reason.UNAVAILABLE, "the transfer was given up"))
        await asyncio.wait([reader])
        reader.exception()
        raise
    return await reader


async def _fetch(link: Link, job_id: str, kind: str, size: int, sha256: bytes, source: ChunkSource) -> None:
    digest = hashlib.sha256()
    backoff = link.backoff()
    got = 0
    while got < size:
        request = pb.DownloadRequest(job_id=job_id, kind=kind, offset=got)
        try:
            async with aclosing(link.stream(link.artifacts.Download, request, timeout=_STALL_SECONDS)) as chunks:
                async for chunk in chunks:
                    if not chunk.data:
                        continue
                    got += len(chunk.data)
                    if got > size:
                        raise _wrong_size(kind, size, f"more than {size} bytes")
                    digest.update(chunk.data)
                    if got == size and not hmac.compare_digest(digest.digest(), sha256):
                        raise RefusedError(
                            Reason.DIGEST,
                            f"the store gave another {kind} than the one that was signed",
                            expected=sha256.hex(),
                            actual=digest.hexdigest(),
                            details={"job": job_id, "kind": kind},
                        )
                    if not await asyncio.to_thread(source.feed, chunk.data):
                        return  # the reader has refused; its error is the one to tell
                    backoff.reset()
        except grpc.aio.AioRpcError as error:
            if not (link.transient(error) and await backoff.wait()):
                raise link.error(error) from None
        else:
            if got < size:
                raise _wrong_size(kind, size, f"{got} bytes")
    await asyncio.to_thread(source.feed, b"")


def _wrong_size(kind: str, size: int, actual: str) -> RefusedError:
    return RefusedError(
        Reason.ARTIFACT,
        f"the store gave a {kind} of another size than the one that was signed",
        expected=f"{size} bytes",
        actual=actual,
    )


async def upload(link: Link, job_id: str, kind: str, source: BinaryIO, size: int, sha256: bytes) -> None:
    """Upload ``size`` bytes of ``source`` (seekable), from the start, whatever an earlier worker had left there.

    Raises :class:`RefusedError` (``ARTIFACT``) where the store reports anything else, and what the coordinator or the
    transport raise once patience is used up.
    """
    backoff = link.backoff()
    offset = 0
    while True:
        try:
            state = await link.artifacts.Upload(
                _chunks(job_id, kind, source, offset, size, sha256), timeout=_STALL_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            if not link.transient(error):
                refusal = link.error(error)
                # What is stored before the offset was an earlier worker's: its ciphertext is another.
                if refusal.reason in (Reason.DIGEST, Reason.STATE) and offset > 0:
                    offset = 0
                    continue
                raise refusal from None
            if not await backoff.wait():
                raise link.error(error) from None
            request = pb.StatArtifactRequest(job_id=job_id, kind=kind)
            stored = await link.unary(link.artifacts.Stat, request)
            if stored.committed > offset:
                backoff.reset()
            # A complete one is checked by going on at its end.
            offset = stored.committed if stored.committed <= size else 0
            continue
        if not (state.complete and state.size == size and hmac.compare_digest(state.sha256, sha256)):
            raise RefusedError(
                Reason.ARTIFACT,
                f"the store reports another {kind} than the one uploaded",
                expected=f"{size} bytes, SHA-256 {sha256.hex()}",
                actual=f"{state.size} bytes, SHA-256 {state.sha256.hex()[:64]}",
                details={"job": job_id, "kind": kind},
            )
        return


async def _chunks(
    job_id: str, kind: str, source: BinaryIO, offset: int, size: int, sha256: bytes
) -> AsyncIterator[pb.UploadChunk]:
    yield pb.UploadChunk(start=pb.UploadStart(job_id=job_id, kind=kind, offset=offset))
    for data in _pieces(source, offset, size):
        yield pb.UploadChunk(data=data)
    yield pb.UploadChunk(finish=pb.UploadFinish(size=size, sha256=sha256))


def _pieces(source: BinaryIO, offset: int, size: int) -> Iterable[bytes]:
    """From memory or a local file, so not worth a thread."""
    source.seek(offset)
    while offset < size:
        data = source.read(min(CHUNK_BYTES, size - offset))
        if not data:
            raise UnavailableError(Reason.STORAGE, "the artifact ended early", expected=f"{size} bytes", actual=offset)
        offset += len(data)
        yield data
