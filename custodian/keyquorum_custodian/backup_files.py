"""Backups and recipients' keys as files: written whole or not at all, never over another.

A recipient is a key pair that lives away from every custodian: ``FILE`` holds the private key under a passphrase,
``FILE.pub`` what custodians encrypt backups to (docs/spec/backup.md).
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import grpc.aio

from keyquorum_core import jcs, keywrap
from keyquorum_core.backup import BackupReader, Statement, fingerprint, open_statement
from keyquorum_core.backup_checks import BackupCheck, Checked
from keyquorum_core.errors import Reason, StateError, UnavailableError
from keyquorum_core.roster import open_roster
from keyquorum_core.sealing import RecipientKey, check_public
from keyquorum_core.strictjson import canonical
from keyquorum_custodian.admin import admin_channel
from keyquorum_custodian.backing_up import write_backup
from keyquorum_custodian.config import load_config
from keyquorum_custodian.init import write_file
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.trust import Operators
from keyquorum_protos.v1 import restoration_pb2 as pb
from keyquorum_protos.v1.restoration_pb2_grpc import BackupsStub
from keyquorum_protos.wire.errors import from_rpc_error
from keyquorum_protos.wire.files import read_bytes

__all__ = [
    "RECIPIENT_PURPOSE",
    "backup_running",
    "backup_stopped",
    "inspect",
    "load_recipient",
    "new_recipient",
    "opened",
    "read_public",
    "verify",
]

RECIPIENT_PURPOSE: Final = "keyquorum/v1/backup-recipient"
_MAX_PUBLIC: Final = 2 << 20


def new_recipient(path: Path, passphrase: str, suite: str) -> str:
    """Make ``path`` and ``path``.pub; the fingerprint. Raises ``EXISTS``, ``STORAGE``, ``PASSPHRASE``."""
    key = RecipientKey.generate(suite)
    wrapped = keywrap.wrap(key.to_seed_bytes(), passphrase, purpose=RECIPIENT_PURPOSE)
    public = jcs.dumps({"format": RECIPIENT_PURPOSE, "hpke": base64.b64encode(key.public).decode()})
    with _new_files(path, path.with_name(f"{path.name}.pub")):
        write_file(path, wrapped)
        write_file(path.with_name(f"{path.name}.pub"), public)
    return fingerprint(key.public)


@contextlib.contextmanager
def _new_files(*paths: Path) -> Iterator[None]:
    for path in paths:
        if path.exists():
            raise StateError(Reason.EXISTS, f"{path} exists and is not overwritten", next_step="Name another file.")
    try:
        yield
    except OSError as error:
        raise UnavailableError(
            Reason.STORAGE, f"{paths[0]} could not be written", actual=error.strerror, next_step="Free space."
        ) from None


def read_public(data: bytes) -> bytes:
    """The encoded HPKE key in a recipient's public file. Raises :class:`MalformedError`."""
    fields = canonical(data.rstrip(b"\n"), "recipient's public file", _MAX_PUBLIC)
    fields.literal("format", RECIPIENT_PURPOSE)
    public = fields.base64("hpke", max_bytes=_MAX_PUBLIC)
    fields.done()
    check_public(public)
    return public


def load_recipient(path: Path, passphrase: str) -> RecipientKey:
    """The key in a recipient's private file. Raises ``NOT_FOUND``, ``PASSPHRASE``, :class:`MalformedError`."""
    wrapped = read_bytes(path, "the recipient's key file", _MAX_PUBLIC)
    return RecipientKey.from_seed_bytes(keywrap.unwrap(wrapped, passphrase, RECIPIENT_PURPOSE))


# -- making -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _partial(out: Path) -> Iterator[BinaryIO]:
    """A file that becomes ``out`` once it is whole and on the disk."""
    partial = out.with_name(f".{out.name}.partial")
    with _new_files(out):
        try:
            descriptor = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
            with os.fdopen(descriptor, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.link(partial, out)  # unlike a rename it replaces nothing
        finally:
            partial.unlink(missing_ok=True)


def backup_stopped(directory: Path, passphrase: str, recipients: Sequence[bytes], out: Path, now: int) -> Statement:
    """Back a custodian up that isn't running. Raises as :meth:`Keystore.open` and :func:`write_backup`."""
    config = load_config(directory)
    store = Keystore.open(config.keystore, passphrase, module=config.pkcs11_module)
    try:
        with _partial(out) as file:
            return write_backup(file, store, config, recipients, now)
    finally:
        store.close()


async def backup_running(directory: Path, recipients: Sequence[bytes], out: Path) -> Statement:
    """Have the custodian serving ``directory`` make one. Raises its error, or ``UNAVAILABLE`` without one."""
    with _partial(out) as file:
        async for data in _pieces(directory, recipients):
            file.write(data)
        file.seek(0)
        reader = BackupReader(file)  # what arrived is whole, or it does not become the backup
        reader.skip()
    return reader.statement


async def _pieces(directory: Path, recipients: Sequence[bytes]) -> AsyncIterator[bytes]:
    async with admin_channel(directory) as (channel, what):
        try:
            async for piece in BackupsStub(channel).Make(pb.BackupRequest(recipients=recipients)):
                yield piece.data
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, what) from None


# -- looking ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A backup to read. Raises ``NOT_FOUND``, ``STORAGE``."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise StateError(Reason.NOT_FOUND, f"there is no backup at {path}") from None
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, f"{path} cannot be read", actual=error.strerror) from None
    with file:
        yield file


def verify(path: Path, recipient: RecipientKey, operators: Operators | None) -> Checked:
    """Everything in a backup, against itself and against the operators that are trusted to name custodians; nothing is
    written. Raises as :class:`BackupReader` and :class:`BackupCheck`."""
    with opened(path) as source:
        reader = BackupReader(source)
        check = BackupCheck(reader.opening.cluster, reader.opening.custodian)
        for record in reader.records(recipient):
            check.take(record)
        return check.finish(
            reader,
            operators.identities if operators is not None else None,
            operators.threshold if operators is not None else 1,
        )


def inspect(path: Path, roster: bytes | None, operators: Operators | None) -> tuple[Statement, bool]:
    """What a backup says that it is, without a recipient's key: structure and digests fit. Whether its custodian signed
    it is known only with the ``roster`` that it was made under, and the ``operators`` who vouch for that."""
    with opened(path) as source:
        reader = BackupReader(source)
        reader.skip()
    statement = reader.statement
    if roster is None or operators is None:
        return statement, False
    found = open_roster(
        roster, operators.identities, operators.threshold, statement.created_at, cluster=statement.cluster
    )
    return open_statement(reader.envelope, found.custodian(statement.custodian).identity), True
