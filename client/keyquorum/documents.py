"""Small configuration documents that people write: YAML or JSON read as plain data.

YAML is read as its JSON subset: no anchors or aliases (a few lines of them expand to gigabytes), no tags, no
duplicate keys. JSON is YAML, so one reader serves both.
"""

from __future__ import annotations

from collections.abc import Hashable

import yaml

from keyquorum_core.errors import MalformedError, Reason

__all__ = ["MAX_DOCUMENT", "load_document"]

MAX_DOCUMENT = 1 << 20


class _PlainLoader(yaml.SafeLoader):
    """The safe loader, less everything that makes two readers disagree."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError("anchors and aliases are not accepted")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        out = super().construct_mapping(node, deep=deep)
        if len(out) != len(node.value):
            raise yaml.YAMLError("a mapping repeats a key")
        return out


def load_document(data: bytes, what: str, *, max_bytes: int = MAX_DOCUMENT) -> object:
    """Parse UTF-8 YAML or JSON. ``what`` names it in errors. Raises :class:`MalformedError`."""
    if len(data) > max_bytes:
        raise MalformedError(
            Reason.TOO_LARGE, f"{what} is too large", expected=f"at most {max_bytes} bytes", actual=len(data)
        )
    try:
        loader = _PlainLoader(data.decode("utf-8"))
        try:
            parsed: object = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else "somewhere"
        raise MalformedError(
            Reason.MALFORMED, f"{what} is neither YAML nor JSON", actual=f"{error.problem} at {where}"
        ) from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise MalformedError(Reason.MALFORMED, f"{what} is neither YAML nor JSON", actual=str(error)[:200]) from None
    return parsed
