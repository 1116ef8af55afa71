"""Data files with the cluster: the header says which key to ask the custodians for, their answers open it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from keyquorum.data_keys import DataFile, DataKey, DataSink, DataSource, read_header
from keyquorum.progress import Progress, ProgressCallback
from keyquorum_core.data_file import PURPOSE, DataHeader
from keyquorum_core.errors import Reason, RefusedError, StateError, UnavailableError

if TYPE_CHECKING:
    from typing import BinaryIO

    from keyquorum.aio import AsyncClient
    from keyquorum.keys import KeyRecord

__all__ = ["decrypt", "in_thread", "open_key", "rewrap"]

T = TypeVar("T")


async def in_thread(work: Callable[[ProgressCallback], T], progress: ProgressCallback) -> T:
    """``work`` in a thread, which stops at its next report when the caller no longer waits for it."""
    stopped = threading.Event()

    def report(each: Progress) -> None:
        if stopped.is_set():
            raise UnavailableError(Reason.UNAVAILABLE, "interrupted", next_step="Start again.")
        progress(each)

    try:
        return await asyncio.to_thread(work, report)
    except asyncio.CancelledError:
        stopped.set()
        raise


async def open_key(
    client: AsyncClient,
    key: str,
    *,
    classification: str,
    export_control: str,
    name: str,
    epoch: int | None = None,
    key_check: bytes | None = None,
    progress: ProgressCallback | None = None,
) -> DataKey:
    """The owner's data key, of the newest epoch unless ``epoch`` says which."""
    found = await _kept(client, key, epoch)
    if epoch is None:
        await client._check_usable(found)
    derived = await client.derive_key(
        PURPOSE,
        name,
        key=key,
        classification=classification,
        export_control=export_control,
        epoch=found.epoch,  # the newest may be another one by now
        key_check=key_check,
        progress=progress,
    )
    return DataKey(
        derived,
        cluster=client.profile.cluster,
        owner=client.profile.principal("owner").name,
        key_id=key,
        epoch=found.epoch,
        name=name,
        classification=classification,
        export_control=export_control,
        rewrap_before=found.retired_at + found.policy.retain_seconds if found.retired_at else 0,
    )


async def _kept(client: AsyncClient, key: str, number: int | None) -> KeyRecord:
    """The newest epoch or the one with this number. What the coordinator makes of the others decides nothing: it is
    custodians that answer for an epoch, or don't."""
    found = await client.key(key, number)
    if found.state == "destroyed":
        raise StateError(
            Reason.KEY_STATE,
            f"epoch {found.epoch} of key {key} was destroyed: what is encrypted under it can't be opened any more",
            expected="an epoch that is active, or retired and still kept",
            actual=found.state,
            next_step="Use a copy that was rewrapped in time. Rewrap what else is under a retired epoch before its "
            "retain_seconds are over: keyquorum data rewrap FILE",
        )
    return found


async def _open_for(client: AsyncClient, header: DataHeader, epoch: int, progress: ProgressCallback) -> DataKey:
    same = epoch == header.epoch
    return await open_key(
        client,
        header.key_id,
        classification=header.classification,
        export_control=header.export_control,
        name=header.name,
        epoch=epoch,
        key_check=bytes.fromhex(header.key_check) if same else None,
        progress=progress,
    )


def _check_ours(client: AsyncClient, header: DataHeader) -> None:
    """Before anybody is asked."""
    owner = client.profile.principal("owner").name
    for what, reason, own, named in (
        ("cluster", Reason.UNKNOWN_KEY, client.profile.cluster, header.cluster),
        ("owner", Reason.UNKNOWN_OWNER, owner, header.owner),
    ):
        if own != named:
            raise RefusedError(reason, f"the data file is another {what}'s", expected=own, actual=named)


async def decrypt(client: AsyncClient, source: DataSource, sink: DataSink, progress: ProgressCallback) -> DataFile:
    """One release of the key that the header names; nothing is written before it is there."""
    header = (await asyncio.to_thread(_peek, source)).header
    _check_ours(client, header)
    with await _open_for(client, header, header.epoch, progress) as key:
        return await in_thread(lambda report: key.decrypt(source, sink, progress=report), progress)


def _peek(source: DataSource) -> DataFile:
    if isinstance(source, str | os.PathLike):
        return read_header(source)
    file = cast("BinaryIO", source)
    try:
        start = file.tell()
        found = read_header(source)
        file.seek(start)
    except (AttributeError, OSError):
        raise UnavailableError(
            Reason.STORAGE,
            "the data can't be read twice, for its header and for the rest",
            expected="a path, or a file that can seek",
            next_step="Open the key first, with data_key, and decrypt with that.",
        ) from None
    return found


async def rewrap(client: AsyncClient, path: Path, to_epoch: int | None, progress: ProgressCallback) -> DataFile:
    """Two releases: of the key that opens the file, and of the one that it goes under."""
    found = await asyncio.to_thread(read_header, path)
    header = found.header
    _check_ours(client, header)
    target = await _kept(client, header.key_id, to_epoch)
    if target.epoch == header.epoch:
        return found
    if target.epoch < header.epoch:
        raise RefusedError(
            Reason.EPOCH,
            "a file is not put back under an earlier epoch",
            expected=f"an epoch after {header.epoch}",
            actual=target.epoch,
        )
    with (
        await _open_for(client, header, header.epoch, progress) as old,
        await _open_for(client, header, target.epoch, progress) as new,
    ):
        return await in_thread(lambda report: old.rewrap(path, new, progress=report), progress)
