"""The quorum rule's grammar (DESIGN §4): from YAML or JSON values to a small tree over bit masks.

A rule is an object, all of whose members must hold::

    at_least: k                      k of all custodians, or of those in a sibling  of: [id, …]
    jurisdictions: k                 custodians from at least k distinct jurisdictions
    include: {jurisdiction: X}       or {custodian: X}, or a list of these, each of which must hold
    all_of: [rule, …]   any_of: [rule, …]

Every form only ever asks for *more* custodians, so rules are monotone: adding a custodian to a qualified set keeps it
qualified. In a mask, bit ``i`` stands for the i-th custodian id in sorted order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = [
    "MAX_DEPTH",
    "MAX_MEMBERS",
    "UNREACHABLE",
    "AllOf",
    "AnyOf",
    "AtLeast",
    "Jurisdictions",
    "Node",
    "parse_rule",
]

MAX_DEPTH = 8
"""Levels of rules within rules, the outermost included."""

MAX_MEMBERS = 256
"""Members and list items in a whole rule."""

UNREACHABLE = 1 << 20
"""What :meth:`Node.shortfall` answers when no choice suffices; more than any committee has."""

_MEMBERS = ("at_least", "of", "jurisdictions", "include", "all_of", "any_of")


class Node(ABC):
    """A condition on a set of custodians, given as a mask."""

    __slots__ = ()

    @property
    @abstractmethod
    def mask(self) -> int:
        """The custodians the condition looks at."""

    @abstractmethod
    def holds(self, chosen: int) -> bool:
        """Whether the set meets the condition."""

    @abstractmethod
    def shortfall(self, chosen: int, available: int) -> int:
        """A lower bound on how many of ``available`` must join ``chosen``: 0 exactly when it holds already."""

    @abstractmethod
    def can_tip(self, chosen: int, reach: int, bit: int) -> bool:
        """Whether some set from ``chosen`` to ``reach`` may fail alone and hold with ``bit``.

        False is certain; true is exact once ``chosen`` equals ``reach``. It prunes the search for maximal unqualified
        sets.
        """

    @abstractmethod
    def words(self) -> str:
        """The condition, for people."""

    @abstractmethod
    def missing(self, chosen: int) -> list[str]:
        """What the set lacks, for people; empty exactly when the condition holds."""

    @abstractmethod
    def leaves(self) -> Iterator[AtLeast | Jurisdictions]:
        """The conditions at the bottom of the tree."""


@dataclass(frozen=True, slots=True)
class AtLeast(Node):
    """``count`` custodians of ``members``, in words ``text``. An ``include`` is one of these with count 1."""

    count: int
    members: int
    text: str

    @property
    def mask(self) -> int:
        return self.members

    def holds(self, chosen: int) -> bool:
        return (chosen & self.members).bit_count() >= self.count

    def shortfall(self, chosen: int, available: int) -> int:
        lack = self.count - (chosen & self.members).bit_count()
        if lack <= 0:
            return 0
        return lack if (available & self.members & ~chosen).bit_count() >= lack else UNREACHABLE

    def can_tip(self, chosen: int, reach: int, bit: int) -> bool:
        return bool(self.members & bit) and not self.holds(chosen) and self.holds(reach | bit)

    def words(self) -> str:
        return self.text

    def missing(self, chosen: int) -> list[str]:
        if self.holds(chosen):
            return []
        return [f"{self.words()} (has {(chosen & self.members).bit_count()})"]

    def leaves(self) -> Iterator[AtLeast | Jurisdictions]:
        yield self


@dataclass(frozen=True, slots=True)
class Jurisdictions(Node):
    """Custodians from ``count`` distinct jurisdictions; ``members`` holds one mask for each jurisdiction."""

    count: int
    members: tuple[int, ...]

    @property
    def mask(self) -> int:
        return sum(self.members)  # disjoint

    def _present(self, chosen: int) -> int:
        return sum(1 for mask in self.members if chosen & mask)

    def holds(self, chosen: int) -> bool:
        return self._present(chosen) >= self.count

    def shortfall(self, chosen: int, available: int) -> int:
        lack = self.count - self._present(chosen)
        if lack <= 0:
            return 0
        return lack if self._present(chosen | available) >= self.count else UNREACHABLE

    def can_tip(self, chosen: int, reach: int, bit: int) -> bool:
        return (
            not self.holds(chosen) and self._present(chosen | bit) > self._present(chosen) and self.holds(reach | bit)
        )

    def words(self) -> str:
        return f"from at least {self.count} jurisdiction{'s' if self.count > 1 else ''}"

    def missing(self, chosen: int) -> list[str]:
        return [] if self.holds(chosen) else [f"{self.words()} (has {self._present(chosen)})"]

    def leaves(self) -> Iterator[AtLeast | Jurisdictions]:
        yield self


@dataclass(frozen=True, slots=True)
class AllOf(Node):
    """Every part holds."""

    parts: tuple[Node, ...]

    @property
    def mask(self) -> int:
        return _union(self.parts)

    def holds(self, chosen: int) -> bool:
        return all(part.holds(chosen) for part in self.parts)

    def shortfall(self, chosen: int, available: int) -> int:
        # Parts that look at disjoint custodians need different ones, so their bounds add up; others may share.
        total = used = 0
        bounds = sorted(((part.shortfall(chosen, available), part.mask) for part in self.parts), reverse=True)
        for bound, mask in bounds:
            if bound >= UNREACHABLE:
                return UNREACHABLE
            if not used & mask:
                total += bound
                used |= mask
        return total

    def can_tip(self, chosen: int, reach: int, bit: int) -> bool:
        return self.holds(reach | bit) and any(part.can_tip(chosen, reach, bit) for part in self.parts)

    def words(self) -> str:
        return ", and ".join(_grouped(part) for part in self.parts)

    def missing(self, chosen: int) -> list[str]:
        return [line for part in self.parts for line in part.missing(chosen)]

    def leaves(self) -> Iterator[AtLeast | Jurisdictions]:
        for part in self.parts:
            yield from part.leaves()


@dataclass(frozen=True, slots=True)
class AnyOf(Node):
    """Some part holds."""

    parts: tuple[Node, ...]

    @property
    def mask(self) -> int:
        return _union(self.parts)

    def holds(self, chosen: int) -> bool:
        return any(part.holds(chosen) for part in self.parts)

    def shortfall(self, chosen: int, available: int) -> int:
        return min(part.shortfall(chosen, available) for part in self.parts)

    def can_tip(self, chosen: int, reach: int, bit: int) -> bool:
        return not self.holds(chosen) and any(part.can_tip(chosen, reach, bit) for part in self.parts)

    def words(self) -> str:
        return " or ".join(_grouped(part) for part in self.parts)

    def missing(self, chosen: int) -> list[str]:
        if self.holds(chosen):
            return []
        return ["one of: " + "; or ".join(" and ".join(part.missing(chosen)) for part in self.parts)]

    def leaves(self) -> Iterator[AtLeast | Jurisdictions]:
        for part in self.parts:
            yield from part.leaves()


def _union(parts: Sequence[Node]) -> int:
    mask = 0
    for part in parts:
        mask |= part.mask
    return mask


def _grouped(part: Node) -> str:
    return f"({part.words()})" if isinstance(part, AllOf | AnyOf) else part.words()


def parse_rule(rule: object, ids: Sequence[str], jurisdictions: Sequence[str]) -> tuple[Node, dict[str, object]]:
    """Read a rule for the custodians ``ids`` (sorted), each in the jurisdiction at the same position.

    Returns the tree and a deep copy of the rule made of plain dicts, lists, strings and integers. Raises
    :class:`MalformedError` for anything outside the grammar and :class:`RefusedError` for a member that nobody can
    meet, both with ``QUORUM_RULE`` and the path of the member at fault.
    """
    return _Parser(ids, jurisdictions).rule(rule, "quorum", 1)


def _malformed(path: str, message: str, expected: str, actual: object) -> NoReturn:
    raise MalformedError(Reason.QUORUM_RULE, f"{path}: {message}", expected=expected, actual=_shown(actual))


def _shown(value: object) -> str:
    """A short form of untrusted input: never megabytes, never an integer too long to print."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**9 else "a very large integer"
    if isinstance(value, str):
        return repr(value[:40])
    return type(value).__name__


class _Parser:
    def __init__(self, ids: Sequence[str], jurisdictions: Sequence[str]) -> None:
        self._bit = {name: 1 << i for i, name in enumerate(ids)}
        self._everyone = (1 << len(ids)) - 1
        self._jurisdiction: dict[str, int] = {}
        for name, jurisdiction in zip(ids, jurisdictions, strict=True):
            self._jurisdiction[jurisdiction] = self._jurisdiction.get(jurisdiction, 0) | self._bit[name]
        self._members = 0

    def _count_members(self, path: str, number: int) -> None:
        self._members += number
        if self._members > MAX_MEMBERS:
            _malformed(path, "the rule is too large", f"at most {MAX_MEMBERS} members", self._members)

    def rule(self, value: object, path: str, depth: int) -> tuple[Node, dict[str, object]]:
        if not isinstance(value, Mapping):
            _malformed(path, "a rule is an object", "object", value)
        if depth > MAX_DEPTH:
            _malformed(path, "rules are nested too deeply", f"at most {MAX_DEPTH} levels", depth)
        if not value:
            _malformed(path, "the rule is empty", f"one or more of {', '.join(_MEMBERS)}", "nothing")
        self._count_members(path, len(value))
        for name in value:
            if name not in _MEMBERS:
                _malformed(path, "unknown member", f"one of {', '.join(_MEMBERS)}", name)
        if "of" in value and "at_least" not in value:
            _malformed(f"{path}.of", "needs a sibling at_least", "at_least beside of", "of alone")
        parts: list[Node] = []
        plain: dict[str, object] = {}
        if "at_least" in value:
            mask, whom = self._everyone, f"of the {len(self._bit)} custodians"
            if "of" in value:
                names = self._ids(value["of"], f"{path}.of")
                plain["of"] = names
                mask, whom = sum(self._bit[name] for name in names), f"of ({', '.join(names)})"
            count = self._count(value["at_least"], f"{path}.at_least", mask.bit_count(), "custodians")
            plain["at_least"] = count
            parts.append(AtLeast(count, mask, f"at least {count} {whom}"))
        if "jurisdictions" in value:
            masks = tuple(self._jurisdiction[name] for name in sorted(self._jurisdiction))
            count = self._count(value["jurisdictions"], f"{path}.jurisdictions", len(masks), "jurisdictions")
            plain["jurisdictions"] = count
            parts.append(Jurisdictions(count, masks))
        if "include" in value:
            plain["include"] = self._include(value["include"], f"{path}.include", parts)
        for name in ("all_of", "any_of"):
            if name in value:
                nodes, plain[name] = self._rules(value[name], f"{path}.{name}", depth)
                parts.append(AllOf(nodes) if name == "all_of" else AnyOf(nodes))
        return (parts[0] if len(parts) == 1 else AllOf(tuple(parts))), plain

    def _count(self, value: object, path: str, available: int, what: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            _malformed(path, "not a count", "an integer of at least 1", value)
        if value > available:
            raise RefusedError(
                Reason.QUORUM_RULE,
                f"{path}: nobody can meet it",
                expected=f"at most the {available} {what} there are",
                actual=_shown(value),
                next_step="Lower the number or add custodians.",
            )
        return value

    def _list(self, value: object, path: str) -> list[object]:
        if not isinstance(value, list | tuple) or not value:
            _malformed(path, "not a list, or an empty one", "a list of one or more items", value)
        self._count_members(path, len(value))
        return list(value)

    def _ids(self, value: object, path: str) -> list[str]:
        names: list[str] = []
        for item in self._list(value, path):
            if not isinstance(item, str) or item not in self._bit:
                _malformed(path, "unknown custodian", "ids of this committee", item)
            if item in names:
                _malformed(path, "custodian listed twice", "each id once", item)
            names.append(item)
        return names

    def _include(self, value: object, path: str, parts: list[Node]) -> object:
        if isinstance(value, Mapping):
            plain, node = self._included(value, path)
            parts.append(node)
            return plain
        out: list[dict[str, str]] = []
        for i, item in enumerate(self._list(value, path)):
            plain, node = self._included(item, f"{path}[{i}]")
            if plain in out:
                _malformed(f"{path}[{i}]", "listed twice", "each custodian or jurisdiction once", "a repetition")
            out.append(plain)
            parts.append(node)
        return out

    def _included(self, value: object, path: str) -> tuple[dict[str, str], AtLeast]:
        form = "{jurisdiction: X} or {custodian: X}"
        if not isinstance(value, Mapping) or len(value) != 1:
            _malformed(path, "not an inclusion", form, value)
        ((kind, name),) = value.items()
        self._count_members(path, 1)
        if kind == "custodian" and isinstance(name, str) and name in self._bit:
            return {"custodian": name}, AtLeast(1, self._bit[name], f"custodian {name}")
        if kind == "jurisdiction" and isinstance(name, str) and name in self._jurisdiction:
            return {"jurisdiction": name}, AtLeast(1, self._jurisdiction[name], f"a custodian in {name}")
        if kind not in ("custodian", "jurisdiction"):
            _malformed(path, "unknown member", form, kind)
        hint = ", as text (in YAML write 'NO' in quotes)" if isinstance(name, bool) else ""
        _malformed(path, f"unknown {kind}", f"a {kind} of this committee{hint}", name)

    def _rules(self, value: object, path: str, depth: int) -> tuple[tuple[Node, ...], list[dict[str, object]]]:
        nodes: list[Node] = []
        plains: list[dict[str, object]] = []
        for i, item in enumerate(self._list(value, path)):
            node, plain = self.rule(item, f"{path}[{i}]", depth + 1)
            if plain in plains:
                _malformed(f"{path}[{i}]", "the same rule twice", "different rules", "a repetition")
            nodes.append(node)
            plains.append(plain)
        return tuple(nodes), plains
