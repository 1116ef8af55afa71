"""The object store under the artifacts: local disk by default, S3, GCS or Azure by URL, through obstore.

obstore's blocking calls run on threads: they do not need the interpreter's lock, and its asynchronous ones were seen
to abort the process when it ends while one is being dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def put(self, path: str, data: bytes) -> None:
        obstore.put(self._store, path, data, use_multipart=False)

    def get(self, path: str, offset: int, size: int) -> bytes:
        return bytes(obstore.get_range(self._store, path, start=offset, length=size))

    def paths(self, prefix: str) -> list[str]:
        return [found["path"] for batch in obstore.list(self._store, prefix) for found in batch]

    def delete(self, paths: list[str]) -> None:
        obstore.delete(self._store, paths)


def open_objects(place: str) -> Objects:
    """An object store from a URL, or local disk from a path. Raises :class:`UnavailableError` (``STORAGE``)."""
    try:
        if "://" in place:
            return Objects(from_url(place))
        return Objects(LocalStore(place, mkdir=True, automatic_cleanup=True))
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
