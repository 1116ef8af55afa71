"""Export and sanctions lists: what operators publish as signed bulletins, and how one bears on a request.

Body of a bulletin of kind ``export-list`` or ``sanctions-list``: ``{"entries": [{"kind", "name", "classes"}]}``. An
entry lists a ``region``, a ``provider`` or an ``owner`` by its name. With ``classes`` it counts only for jobs of one of
these export control classes (``5A002``, or ``5A*`` for all that begin so); without, for every job. Policies do not see
the entries, only whether one applies (the schema's ``Listing``): a list of any length costs a decision nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.strictjson import Fields

__all__ = ["EXPORT_LIST", "LIST_KINDS", "NO_LISTING", "SANCTIONS_LIST", "ControlledList", "ListEntry"]

EXPORT_LIST: Final = "export-list"
SANCTIONS_LIST: Final = "sanctions-list"
LIST_KINDS: Final[Mapping[str, str]] = {"export": EXPORT_LIST, "sanctions": SANCTIONS_LIST}
"""The name in a policy's context, and the kind of bulletin."""

MAX_ENTRIES: Final = 65536
_KINDS: Final = ("owner", "provider", "region")
_NAME: Final = re.compile(r"[\x20-\x7e]{1,128}")
_CLASS: Final = re.compile(r"[A-Za-z0-9. -]{1,64}\*?|\*", re.ASCII)

NO_LISTING: Final[Mapping[str, object]] = {
    "version": 0,
    "owner": False,
    "region": False,
    "provider": False,
    "regions": (),
}
"""What a request carries of a list that no policy at hand reads."""


@dataclass(frozen=True, slots=True, order=True)
class ListEntry:
    """Raises :class:`MalformedError`."""

    kind: str
    name: str
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(sorted(self.classes)))
        if self.kind not in _KINDS:
            raise MalformedError(
                Reason.MALFORMED, "bad kind of list entry", expected=", ".join(_KINDS), actual=ascii(self.kind[:40])
            )
        if not _NAME.fullmatch(self.name):
            raise MalformedError(
                Reason.MALFORMED, "bad name in a list", expected="1…128 printable ASCII", actual=ascii(self.name[:40])
            )
        for each in self.classes:
            if not _CLASS.fullmatch(each):
                raise MalformedError(
                    Reason.MALFORMED,
                    "bad export control class in a list",
                    expected="such as 5A002, or 5A* for all that begin so",
                    actual=ascii(each[:40]),
                )

    def applies_to(self, export_control: str) -> bool:
        if not self.classes:
            return True
        if not export_control:
            return False
        return any(
            export_control.startswith(each[:-1]) if each.endswith("*") else export_control == each
            for each in self.classes
        )


class ControlledList:
    """One version of one list. Raises :class:`MalformedError` for an entry given twice."""

    def __init__(self, version: int, entries: Iterable[ListEntry]) -> None:
        self.version = version
        self.entries = tuple(sorted(entries))
        self._by_name: dict[tuple[str, str], list[ListEntry]] = {}
        for entry in self.entries:
            self._by_name.setdefault((entry.kind, entry.name), []).append(entry)
        if len(set(self.entries)) != len(self.entries):
            raise MalformedError(Reason.MALFORMED, "a list holds an entry twice")

    def lists(self, kind: str, name: str, export_control: str) -> bool:
        return any(entry.applies_to(export_control) for entry in self._by_name.get((kind, name), ()))

    def listing(
        self, *, owner: str = "", region: str = "", provider: str = "", regions: Iterable[str] = (), export_control: str
    ) -> dict[str, object]:
        """The schema's ``Listing`` for one request."""
        return {
            "version": self.version,
            "owner": self.lists("owner", owner, export_control),
            "region": self.lists("region", region, export_control),
            "provider": self.lists("provider", provider, export_control),
            "regions": tuple(sorted(each for each in set(regions) if self.lists("region", each, export_control))),
        }

    def body(self) -> dict[str, object]:
        """The bulletin's body."""
        return {
            "entries": [
                {"kind": entry.kind, "name": entry.name, "classes": list(entry.classes)} for entry in self.entries
            ]
        }

    @staticmethod
    def read(body: Mapping[str, object], version: int) -> ControlledList:
        """From a bulletin's body. Raises :class:`MalformedError`."""
        fields = Fields(dict(body), "controlled list")
        entries = []
        for item in fields.list("entries", max_items=MAX_ENTRIES):
            entry = Fields(item, "list entry")
            kind, name = entry.text("kind", max_length=16), entry.text("name", max_length=128)
            classes = entry.texts("classes", max_items=256, max_length=65)
            entry.done()
            entries.append(ListEntry(kind, name, classes))
        fields.done()
        return ControlledList(version, entries)
