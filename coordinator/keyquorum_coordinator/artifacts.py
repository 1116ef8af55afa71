"""Encrypted artifacts in an object store, uploaded in parts that survive a broken connection or a killed coordinator.

An upload's parts are objects ``jobs/<job>/<kind>/<generation>/<number>`` of 8 MiB (the last one shorter). A part is
recorded in the database after it is stored, so the record never promises what is not there; an object without a record
is swept when the next upload begins. Starting from offset 0 begins a new generation. Memory per transfer: two parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, delete, select
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import ArtifactPartRow, ArtifactRow, Database
from keyquorum_coordinator.objects import ObjectStorage, stored
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError, UnavailableError

__all__ = ["CHUNK", "KINDS", "PART", "ArtifactState", "ArtifactStore", "Upload", "WriteRight"]

PART = 8 << 20
CHUNK = 1 << 20
"""Largest piece of data in one message, either way."""
KINDS = ("bundle", "result", "log")
_MAX_UPLOADS = 32


@dataclass(frozen=True, slots=True)
class ArtifactState:
    """``committed`` bytes are safely stored; ``sha256`` (32 bytes) is empty until the artifact is complete."""

    job_id: str
    kind: str
    committed: int
    complete: bool
    sha256: bytes


@dataclass(frozen=True, slots=True)
class WriteRight:
    """What an upload may do: ``max_bytes`` of the whole artifact, and only while ``check`` raises nothing.

    ``check`` is asked in every transaction that changes what is recorded of the artifact.
    """

    max_bytes: int
    check: Callable[[Session], None]


class ArtifactStore:
    """Artifacts of all jobs. Who may do what is the caller's question."""

    def __init__(
        self,
        database: Database,
        objects: ObjectStorage,
        *,
        clock: Callable[[], float] = time.time,
        part_size: int = PART,
        on_bytes: Callable[[str, int], None] = lambda direction, count: None,
    ) -> None:
        self._database = database
        self._objects = objects
        self._clock = clock
        self._part_size = part_size
        self._on_bytes = on_bytes
        self._uploads: dict[tuple[str, str], Upload] = {}

    async def state(self, job_id: str, kind: str) -> ArtifactState:
        """What is stored; nothing, for an artifact that nobody began."""
        _check_kind(kind)
        return await self._database.read(lambda session: _state(session, job_id, kind))

    async def upload(self, job_id: str, kind: str, offset: int, right: WriteRight) -> Upload:
        """Begin at 0, or go on at what is committed. A newer upload of the same artifact ends an older one, whose
        connection may be long dead.

        Raises :class:`StateError` (``STATE``) naming the offset to go on from, :class:`RefusedError` (``QUOTA``), and
        what ``right.check`` raises.
        """
        _check_kind(kind)
        if len(self._uploads) >= _MAX_UPLOADS and (job_id, kind) not in self._uploads:
            raise RefusedError(
                Reason.QUOTA, "too many uploads at once", expected=f"at most {_MAX_UPLOADS}", next_step="Try again"
            )
        upload = Upload(self, job_id, kind, right)
        older = self._uploads.get((job_id, kind))
        self._uploads[job_id, kind] = upload
        try:
            if older is not None:
                async with older.lock:  # a part being stored is committed or not before the offset is looked at
                    pass
            await upload.begin(offset)
        except BaseException:
            upload.close()
            raise
        return upload

    async def download(self, job_id: str, kind: str, offset: int) -> AsyncGenerator[bytes]:
        """The complete artifact from ``offset`` on, in pieces of at most 1 MiB. Raises :class:`StateError`."""
        state = await self.state(job_id, kind)
        if not state.complete:
            raise StateError(
                Reason.NOT_FOUND, f"the {kind} of job {job_id} is not complete", actual=f"{state.committed} bytes"
            )
        if offset > state.committed:
            raise MalformedError(
                Reason.MALFORMED, "the offset is past the end", expected=f"at most {state.committed}", actual=offset
            )
        generation, parts = await self._database.read(lambda session: _parts(session, job_id, kind))
        for part in parts:
            start = max(offset - part.offset, 0)
            while start < part.size:
                size = min(CHUNK, part.size - start)
                data = await self.get(_path(job_id, kind, generation, part.number), start, size)
                if len(data) != size:
                    raise UnavailableError(
                        Reason.STORAGE, f"the stored {kind} of job {job_id} is damaged", expected=size, actual=len(data)
                    )
                start += size
                self._on_bytes("download", size)
                yield data

    # -- for Upload ---------------------------------------------------------------------------------------------------

    async def get(self, path: str, offset: int, size: int) -> bytes:
        return await stored(self._objects.get, path, offset, size)

    async def put(self, path: str, data: bytes) -> None:
        await stored(self._objects.put, path, data)
        self._on_bytes("upload", len(data))

    async def delete(self, path: str) -> None:
        await stored(self._objects.delete, [path])

    async def sweep(self, job_id: str, kind: str, keep: frozenset[str]) -> None:
        """Delete objects that no record names: left by a generation given up, or by a kill before the record."""
        prefix = f"jobs/{job_id}/{kind}"
        stale = [path for path in await stored(self._objects.paths, prefix) if path not in keep]
        if stale:
            await stored(self._objects.delete, stale)

    @property
    def part_size(self) -> int:
        return self._part_size

    @property
    def database(self) -> Database:
        return self._database

    def now(self) -> int:
        return int(self._clock())

    def is_current(self, upload: Upload) -> bool:
        return self._uploads.get((upload.job_id, upload.kind)) is upload

    def forget(self, upload: Upload) -> None:
        if self.is_current(upload):
            del self._uploads[upload.job_id, upload.kind]


class Upload:
    """One upload in progress; from :meth:`ArtifactStore.upload`. Call :meth:`close` when done, in any way."""

    def __init__(self, store: ArtifactStore, job_id: str, kind: str, right: WriteRight) -> None:
        self.job_id = job_id
        self.kind = kind
        self.lock = asyncio.Lock()
        self._store = store
        self._right = right
        self._generation = ""
        self._number = 0
        self._committed = 0
        self._hash = hashlib.sha256()
        self._buffer: list[bytes] = []
        self._buffered = 0

    async def begin(self, offset: int) -> None:
        """Make what is stored and what will come agree; see :meth:`ArtifactStore.upload`."""
        if offset == 0:
            self._generation = secrets.token_hex(16)
            await self._store.database.write(self._start)
            await self._store.sweep(self.job_id, self.kind, frozenset())
            return

        def recorded(session: Session) -> tuple[str, list[_Part]]:
            self._right.check(session)
            return _parts(session, self.job_id, self.kind)

        generation, parts = await self._store.database.read(recorded)
        committed = parts[-1].offset + parts[-1].size if parts else 0
        if offset != committed:
            raise _wrong_offset(self.job_id, self.kind, committed, offset)
        self._generation = generation
        paths = [_path(self.job_id, self.kind, generation, part.number) for part in parts]
        for part, path in zip(parts, paths, strict=True):
            if not await self._check_part(part, path):
                # What was recorded is not there any more (a power cut, a restored disk): go back to what is.
                await self._store.database.write(lambda session, at=part: self._cut(session, at))  # type: ignore[misc]
                raise _wrong_offset(self.job_id, self.kind, part.offset, offset)
        self._number = len(parts)
        self._committed = committed
        await self._store.sweep(self.job_id, self.kind, frozenset(paths))

    async def write(self, data: bytes) -> None:
        """Take the next bytes; a part that is full is stored and committed before this returns."""
        if len(data) > CHUNK:
            raise MalformedError(
                Reason.TOO_LARGE,
                "a piece of an upload is too large",
                expected=f"at most {CHUNK} bytes",
                actual=len(data),
            )
        total = self._committed + self._buffered + len(data)
        if total > self._right.max_bytes:
            raise RefusedError(
                Reason.TOO_LARGE,
                f"the {self.kind} of job {self.job_id} is too large",
                expected=f"at most {self._right.max_bytes} bytes",
                actual=f"at least {total} bytes",
            )
        self._buffer.append(data)
        self._buffered += len(data)
        while self._buffered >= self._store.part_size:
            await self._flush(self._store.part_size)

    async def finish(self, size: int, sha256: bytes) -> ArtifactState:
        """Commit the rest and complete the artifact if it is what the sender says it is.

        Raises :class:`RefusedError` (``DIGEST``) and drops everything stored when it is not: no later part could
        repair it.
        """
        if self._buffered:
            await self._flush(self._buffered)
        if size != self._committed:
            raise RefusedError(
                Reason.DIGEST,
                f"the {self.kind} of job {self.job_id} has another size than its sender says",
                expected=size,
                actual=self._committed,
                next_step="Go on from the committed offset, or upload it again from the start",
            )
        if not hmac.compare_digest(self._hash.digest(), sha256):
            await self._drop()
            raise RefusedError(
                Reason.DIGEST,
                f"the {self.kind} of job {self.job_id} has another digest than its sender says",
                expected=sha256.hex()[:64],
                actual=self._hash.hexdigest(),
                next_step="Upload it again from the start",
            )

        def work(session: Session) -> ArtifactState:
            self._right.check(session)
            row = self._own(session)
            row.complete = True
            row.sha256 = sha256
            row.updated_at = self._store.now()
            return _state(session, self.job_id, self.kind)

        return await self._store.database.write(work)

    def close(self) -> None:
        """Forget the upload; what is committed stays. Bytes short of a part are dropped: the sender has them."""
        self._buffer.clear()
        self._buffered = 0
        self._store.forget(self)

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _drop(self) -> None:
        """Forget what this upload stored, unless the artifact is complete: then it is what its sender said once, and
        only an upload from the start replaces it."""
        own, self._generation = self._generation, secrets.token_hex(16)

        def work(session: Session) -> bool:
            row = session.get(ArtifactRow, (self.job_id, self.kind))
            if row is None or row.generation != own or row.complete:
                return False
            self._start(session)
            return True

        if await self._store.database.write(work):
            await self._store.sweep(self.job_id, self.kind, frozenset())

    async def _flush(self, size: int) -> None:
        data, self._buffer = b"".join(self._buffer), []
        self._buffered = len(data) - size
        if self._buffered:
            self._buffer.append(data[size:])
            data = data[:size]
        # Shielded: a sender that hangs up now still finds this part committed, and nothing writes to it later.
        storing = asyncio.ensure_future(self._store_part(data))
        storing.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(storing)

    async def _store_part(self, data: bytes) -> None:
        async with self.lock:
            if not self._store.is_current(self):
                raise StateError(
                    Reason.STATE, f"another upload of the {self.kind} of job {self.job_id} has begun", actual="replaced"
                )
            following = self._hash.copy()
            path = _path(self.job_id, self.kind, self._generation, self._number)
            await asyncio.gather(asyncio.to_thread(following.update, data), self._store.put(path, data))
            try:
                await self._store.database.write(lambda session: self._commit(session, len(data), following.digest()))
            except (RefusedError, StateError):
                with contextlib.suppress(UnavailableError):  # or the next upload's sweep does it
                    await self._store.delete(path)
                raise
            self._hash = following
            self._number += 1
            self._committed += len(data)

    async def _check_part(self, part: _Part, path: str) -> bool:
        """Read a stored part into the running hash; False when it is missing or not what was recorded."""
        try:
            for start in range(0, part.size, CHUNK):
                data = await self._store.get(path, start, min(CHUNK, part.size - start))
                await asyncio.to_thread(self._hash.update, data)
        except (UnavailableError, StateError):
            return False
        return hmac.compare_digest(self._hash.digest(), part.prefix_sha256)

    def _own(self, session: Session) -> ArtifactRow:
        row = session.get(ArtifactRow, (self.job_id, self.kind))
        if row is None or row.generation != self._generation:
            raise StateError(Reason.STATE, f"the upload of the {self.kind} of job {self.job_id} was replaced")
        return row

    def _start(self, session: Session) -> None:
        self._right.check(session)
        session.execute(delete(ArtifactPartRow).where(_parts_of(self.job_id, self.kind)))
        row = session.get(ArtifactRow, (self.job_id, self.kind))
        if row is None:
            row = ArtifactRow(job_id=self.job_id, kind=self.kind)
            session.add(row)
        row.generation = self._generation
        row.committed = 0
        row.complete = False
        row.sha256 = None
        row.updated_at = self._store.now()

    def _cut(self, session: Session, first_lost: _Part) -> None:
        self._right.check(session)
        row = self._own(session)
        session.execute(
            delete(ArtifactPartRow).where(
                _parts_of(self.job_id, self.kind), ArtifactPartRow.number >= first_lost.number
            )
        )
        row.committed = first_lost.offset
        row.complete = False
        row.sha256 = None

    def _commit(self, session: Session, size: int, prefix_sha256: bytes) -> None:
        self._right.check(session)
        row = self._own(session)
        if row.complete:
            raise StateError(
                Reason.EXISTS,
                f"the {self.kind} of job {self.job_id} is complete",
                expected="nothing more",
                actual=f"{size} bytes more",
                next_step="Upload another one from the start",
            )
        session.add(
            ArtifactPartRow(
                job_id=self.job_id,
                kind=self.kind,
                number=self._number,
                offset=self._committed,
                size=size,
                prefix_sha256=prefix_sha256,
            )
        )
        row.committed = self._committed + size
        row.complete = False
        row.sha256 = None
        row.updated_at = self._store.now()


@dataclass(frozen=True, slots=True)
class _Part:
    number: int
    offset: int
    size: int
    prefix_sha256: bytes


def _parts_of(job_id: str, kind: str) -> ColumnElement[bool]:
    return and_(ArtifactPartRow.job_id == job_id, ArtifactPartRow.kind == kind)


def _parts(session: Session, job_id: str, kind: str) -> tuple[str, list[_Part]]:
    row = session.get(ArtifactRow, (job_id, kind))
    query = select(ArtifactPartRow).where(_parts_of(job_id, kind)).order_by(ArtifactPartRow.number)
    parts = [_Part(part.number, part.offset, part.size, part.prefix_sha256) for part in session.scalars(query)]
    return (row.generation if row else "", parts)


def _state(session: Session, job_id: str, kind: str) -> ArtifactState:
    row = session.get(ArtifactRow, (job_id, kind))
    if row is None:
        return ArtifactState(job_id, kind, 0, False, b"")
    return ArtifactState(job_id, kind, row.committed, row.complete, row.sha256 or b"")


def _path(job_id: str, kind: str, generation: str, number: int) -> str:
    return f"jobs/{job_id}/{kind}/{generation}/{number:08d}"


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise MalformedError(Reason.MALFORMED, "no such kind of artifact", expected=", ".join(KINDS), actual=kind[:16])


def _wrong_offset(job_id: str, kind: str, committed: int, offset: int) -> StateError:
    return StateError(
        Reason.STATE,
        f"the upload of the {kind} of job {job_id} cannot go on from there",
        expected=committed,
        actual=offset,
        next_step="Go on from the committed offset, or start again from 0",
        details={"committed": str(committed)},
    )
