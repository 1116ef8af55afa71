"""A JSON Patch (RFC 6902) in the making: each change is applied to a copy and written down, so both are the same."""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["Patch"]


class Patch:
    """Of ``add`` operations alone: all that completing a pod takes. The document given is never changed."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document: dict[str, Any] = copy.deepcopy(document)
        self.operations: list[dict[str, Any]] = []

    def set(self, path: tuple[str, ...], value: object) -> None:
        """Make the member at ``path`` be ``value``; objects on the way that are absent or null are made."""
        at: dict[str, Any] = self.document
        for depth, name in enumerate(path[:-1], start=1):
            if at.get(name) is None:
                self._add(at, name, path[:depth], {})
            at = at[name]
        self._add(at, path[-1], path, value)

    def append(self, path: tuple[str, ...], value: object) -> None:
        """Put ``value`` at the end of the list at ``path``; a list that is absent or null is made."""
        at: dict[str, Any] = self.document
        for name in path[:-1]:
            at = at[name]
        if at.get(path[-1]) is None:
            self._add(at, path[-1], path, [])
        at[path[-1]].append(copy.deepcopy(value))
        self.operations.append({"op": "add", "path": f"{_pointer(path)}/-", "value": copy.deepcopy(value)})

    def _add(self, parent: dict[str, Any], name: str, path: tuple[str, ...], value: object) -> None:
        parent[name] = copy.deepcopy(value)
        self.operations.append({"op": "add", "path": _pointer(path), "value": copy.deepcopy(value)})


def _pointer(path: tuple[str, ...]) -> str:
    """RFC 6901."""
    return "".join("/" + name.replace("~", "~0").replace("/", "~1") for name in path)
