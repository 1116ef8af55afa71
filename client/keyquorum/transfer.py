"""Ciphertext to and from the coordinator's store, going on where a broken transfer stopped.

The store is not trusted: an upload ends only when it reports the size and digest that were sent, a download is bounded
by the size that was signed and refused when its digest is another.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import BinaryIO

import grpc.aio

from keyquorum.progress import Progress, ProgressCallback, Stage
from keyquorum.session import Connection
from keyquorum_core.errors import Reason, RefusedError, UnavailableError
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["CHUNK_BYTES", "download", "upload"]

CHUNK_BYTES = 1 << 20
_STALL_SECONDS = 600.0


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
    while True:
        state = await connection.unary(connection.artifacts.Stat, pb.StatArtifactRequest(job_id=job_id, kind=kind))
        if not state.complete:
            if state.committed > size:
                raise _other_upload(kind, size, state.committed)
            if state.committed > furthest:
                furthest = state.committed
                backoff.reset()
            progress(Progress(Stage.UPLOAD, state.committed, size))
            try:
                state = await connection.artifacts.Upload(
                    _chunks(job_id, kind, source, state.committed, size, sha256, progress), timeout=_STALL_SECONDS
                )
            except grpc.aio.AioRpcError as error:
                if not (connection.transient(error) and await backoff.wait()):
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
    job_id: str, kind: str, source: BinaryIO, offset: int, size: int, sha256: bytes, progress: ProgressCallback
) -> AsyncIterator[pb.UploadChunk]:
    yield pb.UploadChunk(start=pb.UploadStart(job_id=job_id, kind=kind, offset=offset))
    await asyncio.to_thread(source.seek, offset)
    while offset < size:
        data = await asyncio.to_thread(source.read, min(CHUNK_BYTES, size - offset))
        if not data:
            raise UnavailableError(Reason.STORAGE, f"the {kind} ended early", expected=f"{size} bytes", actual=offset)
        offset += len(data)
        yield pb.UploadChunk(data=data)
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
    got = 0
    while got < size:
        request = pb.DownloadRequest(job_id=job_id, kind=kind, offset=got)
        try:
            async with aclosing(
                connection.stream(connection.artifacts.Download, request, timeout=_STALL_SECONDS)
            ) as chunks:
                async for chunk in chunks:
                    if not chunk.data:
                        continue
                    got += len(chunk.data)
                    if got > size:
                        raise _wrong_size(kind, size, f"more than {size} bytes")
                    digest.update(chunk.data)
                    sink.write(chunk.data)  # into the page cache: a thread would cost more than it saves
                    backoff.reset()
                    progress(Progress(Stage.DOWNLOAD, got, size))
        except grpc.aio.AioRpcError as error:
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


def _wrong_size(kind: str, size: int, actual: str) -> RefusedError:
    return RefusedError(
        Reason.ARTIFACT,
        f"the store gave a {kind} of another size than the worker signed",
        expected=f"{size} bytes",
        actual=actual,
    )
