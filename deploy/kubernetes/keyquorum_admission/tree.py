"""Reading Kubernetes objects, each of whose members somebody else wrote: typed, and every error names the path.

As everywhere in Kubernetes' API, ``null`` and an absent member are the same.
"""

from __future__ import annotations

from typing import Final, NoReturn

from keyquorum_core.errors import MalformedError, Reason

__all__ = ["Node"]

_MAX_ITEMS: Final = 10_000


class Node:
    """A value and where it stands. Accessors raise :class:`MalformedError` for a value of another type."""

    __slots__ = ("path", "value")

    def __init__(self, value: object, path: str) -> None:
        self.value = value
        self.path = path

    @property
    def present(self) -> bool:
        return self.value is not None

    def _fail(self, expected: str) -> NoReturn:
        raise MalformedError(
            Reason.MALFORMED, f"bad field {self.path}", expected=expected, actual=_json_type(self.value)
        )

    def members(self) -> dict[str, object]:
        """The object's own dictionary; of nothing, an empty one."""
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            self._fail("object")
        return self.value

    def child(self, name: str) -> Node:
        return Node(self.members().get(name), f"{self.path}.{name}" if self.path else name)

    def at(self, *names: str) -> Node:
        """The descendant under these members."""
        found = self
        for name in names:
            found = found.child(name)
        return found

    def items(self) -> list[Node]:
        if self.value is None:
            return []
        if not isinstance(self.value, list):
            self._fail("list")
        if len(self.value) > _MAX_ITEMS:
            self._fail(f"list of at most {_MAX_ITEMS} items")
        return [Node(item, f"{self.path}[{index}]") for index, item in enumerate(self.value)]

    def text(self) -> str:
        """The string; of nothing, the empty one."""
        if self.value is None:
            return ""
        if not isinstance(self.value, str):
            self._fail("string")
        return self.value

    def flag(self) -> bool:
        """The boolean; of nothing, false."""
        if self.value is None:
            return False
        if not isinstance(self.value, bool):
            self._fail("true or false")
        return self.value

    def texts(self) -> dict[str, str]:
        """A map of strings to strings: labels, annotations, selectors."""
        return {name: Node(value, f"{self.path}[{name!r}]").text() for name, value in self.members().items()}


def _json_type(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "object", list: "list", str: "string", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)
