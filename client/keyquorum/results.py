"""A job's result: fetched as ciphertext, verified, decrypted, and kept where nobody else reads it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from keyquorum.progress import Progress, ProgressCallback, Stage
from keyquorum.session import Connection
from keyquorum.transfer import download
from keyquorum.verify import VerifiedOutcome
from keyquorum_core.artifact import DecryptingReader, binding, plaintext_size
from keyquorum_core.bundle import BundleLimits, read_bundle
from keyquorum_core.derivation import DerivedKey
from keyquorum_core.errors import MalformedError, Reason, StateError, UnavailableError
from keyquorum_core.manifest import ArtifactDigest, Manifest, ResultStatement

__all__ = ["JobFailedError", "Result", "ResultFiles", "fetch_result"]

MAX_LOG = 64 << 20
_COPY_BYTES = 1 << 20


class ResultFiles(Mapping[str, bytes]):
    """The files a job left, by relative POSIX name, in name order. Reading one reads it from an unnamed file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self._finalizer = weakref.finalize(self, self._file.close)
        self._places: dict[str, tuple[int, int, bool]] = {}

    def _add(self, name: str, size: int, executable: bool, reader: io.RawIOBase) -> None:
        start = self._file.seek(0, os.SEEK_END)
        shutil.copyfileobj(reader, self._file, _COPY_BYTES)
        self._file.flush()  # that it is all kept must be known now
        self._places[name] = (start, size, executable)

    def __getitem__(self, name: str) -> bytes:
        start, size, _ = self._places[name]
        self._file.seek(start)
        return self._file.read(size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def size(self, name: str) -> int:
        """Bytes of a file, without reading it."""
        return self._places[name][1]

    def executable(self, name: str) -> bool:
        return self._places[name][2]

    def copy(self, name: str, sink: BinaryIO) -> None:
        """Write a file to ``sink`` in pieces, for those too large to hold."""
        start, size, _ = self._places[name]
        self._file.seek(start)
        while size:
            piece = self._file.read(min(size, _COPY_BYTES))
            if not piece:
                raise UnavailableError(Reason.STORAGE, f"{name} was cut short on this machine")
            sink.write(piece)
            size -= len(piece)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take
            self._finalizer()


class Result:
    """A verified, decrypted result. Close it, or use it in a ``with`` block, to let go of the plaintext early."""

    def __init__(
        self,
        outcome: VerifiedOutcome,
        files: ResultFiles,
        log: bytes,
        *,
        from_cache: bool,
    ) -> None:
        self._outcome = outcome
        self.files = files
        """What the job wrote, name → bytes."""
        self.log = log
        """What the job printed: standard output and error, as the worker captured them."""
        self.key_from_cache = from_cache
        """Whether the job's key was at hand, so that no custodian was asked to open this result."""

    @property
    def job_id(self) -> str:
        return self._outcome.binding.job_id

    @property
    def statement(self) -> ResultStatement:
        """What the worker signed with its attested key."""
        return self._outcome.statement

    @property
    def manifest(self) -> Manifest:
        return self._outcome.manifest

    @property
    def custodians(self) -> tuple[str, ...]:
        """Whose receipts for the release to this worker verify; they qualify under the roster's quorum."""
        return self._outcome.custodians

    @property
    def evidence(self) -> tuple[str, ...]:
        """Types of the worker's evidence, which those custodians appraised before they released the key."""
        return tuple(sorted(item.type for item in self._outcome.evidence.items))

    @property
    def proof(self) -> bytes:
        """That the ledger shows the release of this job's key to the worker, in a checkpoint that a quorum of
        custodians cosigned: a C2SP tlog-proof, worth keeping."""
        return self._outcome.proof.encode()

    @property
    def development(self) -> bool:
        """Whether the worker ran on development hardware, which proves nothing about who could see the data."""
        return self._outcome.leaf.development

    @property
    def doubts(self) -> dict[str, str]:
        """Custodians whose receipt doesn't verify, with why. The result doesn't rest on them."""
        return {name: str(error) for name, error in self._outcome.doubts.items()}

    @property
    def exit_code(self) -> int:
        return self.statement.exit_code

    @property
    def confirmed(self) -> bool:
        """Whether each seed behind the job's key was reported by two custodians when the owner opened the job."""
        return self._outcome.opening.confirmed

    def save(self, directory: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Write the files, and the log as ``job.log`` unless a file has that name, into ``directory`` (made, 0700).

        Files that are there already are replaced, each whole or not at all; links below ``directory`` are never
        followed, not even to make a folder. Returns the paths written. Raises :class:`UnavailableError` (``STORAGE``).
        """
        root = Path(directory)
        written = []
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in self.files:
                with _place(root, name, executable=self.files.executable(name)) as file:
                    self.files.copy(name, file)
                written.append(root / name)
            if self.log and "job.log" not in self.files:
                with _place(root, "job.log", executable=False) as file:
                    file.write(self.log)
                written.append(root / "job.log")
        except OSError as error:
            raise UnavailableError(
                Reason.STORAGE, f"the result can't be written to {root}", actual=error.strerror
            ) from None
        return tuple(written)

    def close(self) -> None:
        self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Result({self.job_id}, {self.statement.outcome}, {len(self.files)} files)"


@contextmanager
def _place(root: Path, name: str, *, executable: bool) -> Iterator[BinaryIO]:
    """A file to write what is to be ``root/name``, which it becomes at the end of the block; after an error it is gone.

    ``name`` is a bundle's, so it has no ``..``. Its folders are opened one from the other, so that no link that is, or
    comes, in the way leads anywhere else.
    """
    folders = name.split("/")
    last = folders.pop()
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for each in folders:
            inner = _open_folder(root, name, each, folder)
            os.close(folder)
            folder = inner
        temporary = f".{secrets.token_hex(8)}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(temporary, flags, 0o700 if executable else 0o600, dir_fd=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
            os.replace(temporary, last, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
    finally:
        os.close(folder)


def _open_folder(root: Path, name: str, component: str, within: int) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(component, 0o700, dir_fd=within)
    try:
        return os.open(component, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=within)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise UnavailableError(
            Reason.STORAGE,
            f"{component} is in the way of {name} in {root}",
            expected="a folder",
            actual="a link or a file",
            next_step="Take it away, or write the result to another folder",
        ) from None


class JobFailedError(StateError):
    """The job ran and failed, by the worker's own signed statement (``JOB_FAILED``).

    :attr:`result` has the verified statement with the exit code, the decrypted log, and whatever files there are.
    """

    def __init__(self, result: Result) -> None:
        statement = result.statement
        self.result = result
        super().__init__(
            Reason.JOB_FAILED,
            f"job {result.job_id} ended as {statement.outcome}" + (f": {statement.reason}" if statement.reason else ""),
            expected="exit code 0",
            actual=f"exit code {statement.exit_code}",
            next_step=f"Read its log: keyquorum job logs {result.job_id}",
            details={"job": result.job_id, "outcome": statement.outcome, "exit_code": str(statement.exit_code)},
        )


async def fetch_result(
    connection: Connection,
    outcome: VerifiedOutcome,
    key: DerivedKey,
    *,
    from_cache: bool,
    progress: ProgressCallback,
) -> Result:
    """Download and decrypt the artifacts that the statement names.

    Raises :class:`RefusedError` (``DIGEST``, ``ARTIFACT``, ``BUNDLE``) for anything but those, and
    :class:`UnavailableError`.
    """
    job = outcome.binding.job_id
    files: ResultFiles | None = None
    log = bytearray()
    try:
        files = ResultFiles()
        for kind, purpose in (("log", "telemetry"), ("result", "result")):
            digest = outcome.statement.artifacts.get(kind)
            if digest is None:
                continue
            limit = outcome.manifest.resources.output_mib << 20
            _check_size(kind, digest, MAX_LOG if kind == "log" else limit)
            with tempfile.TemporaryFile() as spool:
                await download(connection, job, kind, spool, digest.size, bytes.fromhex(digest.sha256), progress)
                spool.seek(0)
                total = plaintext_size(digest.size)

                def report(done: int, total: int = total) -> None:
                    progress(Progress(Stage.DECRYPT, done, total))

                bound = binding(job, kind, outcome.evidence.signing_key)
                with DecryptingReader(key.purpose_key(purpose), spool, bound, progress=report) as reader:
                    if kind == "log":
                        log += await asyncio.to_thread(reader.readall)
                    else:
                        await asyncio.to_thread(_unpack, reader, files, limit)
    except OSError as error:
        if files is not None:
            files.close()
        raise UnavailableError(
            Reason.STORAGE,
            "the result can't be kept on this machine",
            actual=error.strerror,
            next_step=f"Check the free space in {tempfile.gettempdir()}",
        ) from None
    except BaseException:
        if files is not None:
            files.close()
        raise
    return Result(outcome, files, bytes(log), from_cache=from_cache)


def _check_size(kind: str, digest: ArtifactDigest, limit: int) -> None:
    # Headers and padding of the bundle come on top of what the job may write.
    if plaintext_size(digest.size) > 2 * limit + (64 << 20):
        raise MalformedError(
            Reason.TOO_LARGE,
            f"the job's {kind} is larger than its manifest allows",
            expected=f"about {limit} bytes",
            actual=f"{digest.size} bytes",
        )


def _unpack(reader: DecryptingReader, files: ResultFiles, limit: int) -> None:
    limits = BundleLimits(max_files=100_000, max_file_bytes=limit, max_total_bytes=limit)
    for file in read_bundle(reader, limits):
        files._add(file.name, file.size, file.executable, file.reader)
