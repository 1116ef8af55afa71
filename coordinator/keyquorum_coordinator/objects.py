"""The object store under artifacts and the ledger's tiles: local disk by default, S3, GCS or Azure by URL (obstore).

obstore's blocking calls run on threads: they do not need the interpreter's lock, and its asynchronous ones were seen
to abort the process when it ends while one is being dropped.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from keyquorum_core.errors import Reason, UnavailableError

__all__ = ["ObjectStorage", "Objects", "open_objects", "stored"]

P = ParamSpec("P")
T = TypeVar("T")


class ObjectStorage(Protocol):
    """What artifacts need of an object store. Calls block; errors are :class:`OSError` or obstore's."""

    def put(self, path: str, data: bytes) -> None: ...
    def get(self, path: str, offset: int, size: int) -> bytes: ...
    def paths(self, prefix: str) -> list[str]: ...
    def delete(self, paths: list[str]) -> None: ...


class Objects:
    """An obstore store as :class:`ObjectStorage`."""

    def __init__(self, store: ObjectStore, folder: Path | None = None) -> None:
        """``folder``: where a store on local disk is."""
        self._store = store
        self._folder = folder

    def put(self, path: str, data: bytes) -> None:
        obstore.put(self._store, path, data, use_multipart=False)

    def get(self, path: str, offset: int, size: int) -> bytes:
        return bytes(obstore.get_range(self._store, path, start=offset, length=size))

    def read(self, path: str, max_bytes: int) -> bytes | None:
        """The whole object, None where there is none. Raises :class:`OSError` for one larger than ``max_bytes``."""
        try:
            found = obstore.get(self._store, path)
        except FileNotFoundError:
            return None
        if found.meta["size"] > max_bytes:
            raise OSError(f"object {path} has {found.meta['size']} bytes, over {max_bytes}")
        return bytes(found.bytes())

    def exists(self, path: str) -> bool:
        try:
            obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        return True

    def put_durable(self, path: str, data: bytes) -> None:
        """As :meth:`put`, and whole or absent after a power cut too. An object store on the network promises that with
        its answer; on local disk it takes care."""
        if self._folder is None:
            self.put(path, data)
            return
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        stage = target.with_name(f"{target.name}#{secrets.token_hex(8)}")  # as obstore names what it stages
        try:
            with stage.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            stage.replace(target)
        except BaseException:
            stage.unlink(missing_ok=True)
            raise
        for folder in target.parents:  # one of them may be new
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if folder == self._folder:
                break

    def paths(self, prefix: str) -> list[str]:
        return [found["path"] for batch in obstore.list(self._store, prefix) for found in batch]

    def delete(self, paths: list[str]) -> None:
        obstore.delete(self._store, paths)


def open_objects(place: str) -> Objects:
    """An object store from a URL, or local disk from a path. Raises :class:`UnavailableError` (``STORAGE``)."""
    try:
        if "://" in place:
            return Objects(from_url(place))
        return Objects(LocalStore(place, mkdir=True, automatic_cleanup=True), Path(place))
    except (BaseError, OSError, ValueError) as error:
        raise UnavailableError(
            Reason.STORAGE, "the artifact store cannot be opened", expected="a folder or a URL", actual=str(error)[:200]
        ) from None


async def stored(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a call of the object store on a thread; its failures become ``STORAGE``."""
    try:
        return await asyncio.to_thread(call, *args, **kwargs)
    except (BaseError, OSError) as error:
        raise UnavailableError(
            Reason.STORAGE,
            "the artifact store failed; what was committed before is intact",
            actual=str(error)[:200],
            next_step="Check the store's free space, then go on from the committed offset",
        ) from None
