"""From a folder to a job that may run: manifest, opening, encryption, upload, commit (DESIGN §6, owner's side).

The job's id and key context follow from the manifest that the owner signs here, before anybody else hears of the job.
Plaintext goes from the folder straight into the cipher; only ciphertext is ever written, to a file without a name, from
which a broken upload goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import grpc.aio

from keyquorum.folder import JobFolder, JobSettings
from keyquorum.progress import Progress, ProgressCallback, Stage
from keyquorum.provenance import read_statements
from keyquorum.session import Connection
from keyquorum_core.answers import Answers, JobBinding
from keyquorum_core.artifact import EncryptingWriter, binding
from keyquorum_core.bundle import write_bundle
from keyquorum_core.derivation import Combination
from keyquorum_core.errors import Reason, RefusedError, UnavailableError
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.manifest import (
    MAX_LIFETIME,
    Manifest,
    Subject,
    job_id,
    payload,
    sign_manifest,
    subject,
)
from keyquorum_core.release import Answer
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.wire.errors import from_status

__all__ = ["CLOCK_SKEW", "PreparedJob", "SealedBundle", "encrypt_folder", "gather", "prepare"]

CLOCK_SKEW = 120  # seconds that a custodian's clock may be behind the owner's
OPEN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A signed manifest, and what follows from it."""

    manifest: Manifest
    envelope: bytes
    binding: JobBinding


def prepare(
    owner: LoadedKeys,
    settings: JobSettings,
    subjects: tuple[Subject, ...],
    *,
    key_id: str,
    epoch: int,
    now: int,
    not_before: int | None,
    not_after: int | None,
    provenance: Sequence[Path] = (),
) -> PreparedJob:
    """Sign the manifest. ``not_after`` defaults to a day from now, or longer where the job itself may take longer.

    ``provenance`` names files with provenance statements (:mod:`keyquorum.provenance`). Raises :class:`MalformedError`
    for anything that a manifest can't say, and what reading a statement raises.
    """
    start = now - CLOCK_SKEW if not_before is None else not_before
    end = not_after
    if end is None:
        end = min(now + max(24 * 3600, 2 * settings.resources.wall_seconds), start + MAX_LIFETIME)
    manifest = Manifest(
        subjects=subjects,
        key_id=key_id,
        epoch=epoch,
        classification=settings.classification,
        export_control=settings.export_control,
        regions=settings.regions,
        evidence_types=settings.evidence_types,
        resources=settings.resources,
        owner=owner.name,
        owner_identity=owner.identity.public,
        owner_hpke=owner.recipient.public,
        entrypoint=settings.entrypoint,
        not_before=start,
        not_after=end,
        issued_at=now,
        nonce=secrets.token_hex(16),
        purposes=settings.purposes,
        provenance=read_statements(provenance, owner, subjects),
    )
    data = payload(manifest)
    return PreparedJob(
        manifest,
        sign_manifest(manifest, owner.identity),
        JobBinding(job_id(data), subject(data), key_id, epoch),
    )


async def gather(
    connection: Connection,
    answers: Answers,
    job: str,
    *,
    grace: float,
    progress: ProgressCallback,
    total: int,
    request: bytes = b"",
) -> Combination:
    """Ask the custodians through the coordinator until their answers give the job's key, or the one that a key
    ``request`` (its envelope) asks for.

    A confirmed key is taken at once; an unconfirmed one when ``grace`` seconds have passed since it was first there,
    or nobody is left to answer. Raises what :meth:`Answers.failure` says when there is neither.
    """
    backoff = connection.backoff()
    while True:
        answers.ask()
        try:
            await _ask(connection, answers, job, request, grace, lambda n: progress(Progress(Stage.OPEN, n, total)))
        except grpc.aio.AioRpcError as error:
            if answers.combination(confirmed=False) is None:
                if connection.transient(error):
                    if await backoff.wait():
                        continue
                    raise connection.error(error) from None
                if not (answers.answered or answers.refused or answers.rejected):
                    raise connection.error(error) from None
        found = answers.combination(confirmed=False)
        if found is None:
            raise answers.failure()
        return found


async def _ask(
    connection: Connection, answers: Answers, job: str, request: bytes, grace: float, report: Callable[[int], None]
) -> None:
    name = os.urandom(16).hex()
    call = (
        connection.keys.Derive(pb.DeriveRequest(request=request, request_id=name), timeout=OPEN_SECONDS)
        if request
        else connection.jobs.Open(pb.OpenRequest(job_id=job, request_id=name), timeout=OPEN_SECONDS)
    )
    deadline: float | None = None
    try:
        while True:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                event = await asyncio.wait_for(call.read(), wait)
            except TimeoutError:
                return
            if not isinstance(event, pb.AnswerEvent):  # the end of the stream
                return
            connection.reached()
            _take(answers, event)
            report(len(answers.answered))
            if answers.combination(confirmed=True) is not None:
                return
            if deadline is None and answers.combination(confirmed=False) is not None:
                deadline = time.monotonic() + grace
    finally:
        call.cancel()


def _take(answers: Answers, event: pb.AnswerEvent) -> None:
    if event.leaf:
        answers.take_leaf(event.leaf, event.leaf_proof)
    if not event.HasField("answer"):
        return
    custodian = event.answer.custodian
    if event.answer.WhichOneof("outcome") == "share":
        share = event.answer.share
        answers.take(
            Answer(custodian, share.key_id, share.epoch, share.window, share.sealed, share.signature),
            event.window_statement,
        )
    elif event.answer.HasField("refusal"):
        answers.take_refusal(custodian, from_status(event.answer.refusal))


@dataclass(frozen=True, slots=True)
class SealedBundle:
    """Ciphertext in a file without a name, at its start; size in bytes."""

    file: BinaryIO
    size: int
    sha256: bytes


class _HashingSink:
    """Writes ciphertext on, and keeps its digest and length."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: memoryview, /) -> int:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)


def encrypt_folder(
    folder: JobFolder, subjects: tuple[Subject, ...], job: str, key: bytes, progress: ProgressCallback
) -> SealedBundle:
    """Bundle and encrypt the folder's files, checking that they are still the ones in the manifest. Blocks.

    Raises :class:`RefusedError` (``BUNDLE``) where a file changed meanwhile, :class:`UnavailableError` (``STORAGE``).
    """
    total = sum(file.size for file in folder.files)
    spool: BinaryIO | None = None
    try:
        spool = tempfile.TemporaryFile()  # noqa: SIM115 - handed on, or closed below
        sink = _HashingSink(spool)
        with EncryptingWriter(
            key,
            sink,
            binding(job, "bundle"),
            progress=lambda done: progress(Progress(Stage.ENCRYPT, min(done, total), total)),
        ) as writer:
            written = write_bundle(
                [(file.name, file.size, file.open) for file in folder.files],
                writer,
                executable={file.name for file in folder.files if file.executable},
            )
        promised = {each.name: each.sha256 for each in subjects}
        for entry in written:
            if not hmac.compare_digest(promised.get(entry.name, ""), entry.sha256):
                raise RefusedError(
                    Reason.BUNDLE,
                    f"{entry.name} changed while the job was submitted",
                    expected=promised.get(entry.name),
                    actual=entry.sha256,
                    next_step="Submit again when nothing writes to the folder",
                )
        spool.flush()
        spool.seek(0)
        return SealedBundle(spool, sink.size, sink.digest.digest())
    except OSError as error:
        _drop(spool)
        raise UnavailableError(
            Reason.STORAGE,
            "the bundle can't be read or written",
            actual=error.strerror,
            next_step=f"Check the folder, and the free space in {tempfile.gettempdir()}",
        ) from None
    except BaseException:
        _drop(spool)
        raise


def _drop(spool: BinaryIO | None) -> None:
    if spool is not None:
        with contextlib.suppress(OSError):  # closing writes what is buffered, and the disk may be full
            spool.close()
