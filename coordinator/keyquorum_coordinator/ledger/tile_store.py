"""Full tiles and entry bundles in an object store: local disk by default, S3, GCS or Azure by URL.

Only full ones are stored, each once and for ever, under their C2SP paths; partial ones are prefixes of what the leaf
store and the edge hold. What is there is never replaced by something else: other bytes in its place mean that the log's
database was rolled back, or that two logs share a store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from obstore.exceptions import BaseError

from keyquorum_core.errors import Reason, RefusedError, UnavailableError
from keyquorum_core.ledger.tiles import MAX_BUNDLE, Bundle, Tile

__all__ = ["TileObjects", "TileStore"]

T = TypeVar("T")


class TileObjects(Protocol):
    """What the log needs of an object store. Calls block; errors are :class:`OSError` or obstore's."""

    def put_durable(self, path: str, data: bytes) -> None: ...
    def read(self, path: str, max_bytes: int) -> bytes | None: ...
    def exists(self, path: str) -> bool: ...


class TileStore:
    """Blocking. Raises :class:`UnavailableError` (``STORAGE``) where the object store fails."""

    def __init__(self, objects: TileObjects) -> None:
        self._objects = objects

    def write(self, contents: list[tuple[Tile | Bundle, bytes]]) -> None:
        """Store full tiles and bundles; durable when this returns. Idempotent. Raises :class:`RefusedError`
        (``LEDGER_FORK``) rather than replace one that differs."""
        for name, data in contents:
            present = self._do(self._objects.read, name.path, MAX_BUNDLE)
            if present is None:
                self._do(self._objects.put_durable, name.path, data)
            elif present != data:
                raise RefusedError(
                    Reason.LEDGER_FORK,
                    "the object store holds another tile of this log",
                    expected=f"{name.path} as the ledger's database gives it",
                    actual="other bytes",
                    next_step="The ledger's database was rolled back, or another log uses this store: restore the "
                    "database that belongs to it",
                )

    def read(self, name: Tile | Bundle) -> bytes:
        """A full tile or bundle. Raises :class:`UnavailableError` (``STORAGE``) when it is not there."""
        data = self._do(self._objects.read, name.path, MAX_BUNDLE)
        if data is None:
            raise UnavailableError(
                Reason.STORAGE,
                "the object store lost a tile of the ledger",
                expected=name.path,
                actual="nothing",
                next_step="Restore the object store from its backup",
            )
        return data

    def holds(self, name: Tile | Bundle) -> bool:
        return self._do(self._objects.exists, name.path)

    @staticmethod
    def _do(call: Callable[..., T], *arguments: object) -> T:
        try:
            return call(*arguments)
        except (BaseError, OSError) as error:
            raise UnavailableError(
                Reason.STORAGE,
                "the ledger's object store failed",
                actual=str(error)[:200],
                next_step="Check the store and its free space; leaves wait in the ledger's database meanwhile",
            ) from None
