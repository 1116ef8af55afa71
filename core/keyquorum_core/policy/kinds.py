"""Which requests a set of policies cannot tell apart: what a decision may be remembered by.

A decision depends on nothing but the places of the request that the policies read, and on no more of what stands there
than their comparisons can see. A number that is only compared with constants counts by which of them it lies between; a
string that is only compared with constants, by which of them it is, if any; a set of strings that is only held against
constants, by which of them it has and whether it has others. What is used in any other way counts as it is.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from cedarpy import pst

from keyquorum_core.policy.facts import MISSING, Path, Request, encode
from keyquorum_core.policy.syntax import Condition, children, path_of, paths_of

__all__ = ["Readings"]

_COMPARISONS: Final = frozenset({"eq", "not_eq", "less", "less_eq", "greater", "greater_eq"})
_EQUALITIES: Final = frozenset({"eq", "not_eq"})
_SUBSETS: Final = frozenset({"contains_all", "contains_any", "eq", "not_eq"})


@dataclass(slots=True)
class _Reading:
    """One place, and the constants it is compared with; ``whole`` where more of it can be seen than that."""

    path: Path
    whole: bool = False
    constants: set[object] = field(default_factory=set)
    bounds: list[int] = field(default_factory=list)

    def settle(self) -> None:
        numbers = [each for each in self.constants if isinstance(each, int)]
        self.bounds = sorted({bound for each in numbers for bound in (each, each + 1)})

    def kind(self, value: object) -> object:
        """Equal for values that no policy can tell apart here."""
        if value is MISSING or isinstance(value, bool):
            return value
        if isinstance(value, Mapping):
            return encode(value)
        if self.whole:
            return value
        if isinstance(value, int):
            return bisect.bisect_right(self.bounds, value)
        if isinstance(value, tuple):
            return frozenset([each if each in self.constants else None for each in value])
        return value if value in self.constants else None


class Readings:
    """Every place that some condition reads."""

    def __init__(self, conditions: Iterable[Condition]) -> None:
        found: dict[Path, _Reading] = {}
        for condition in conditions:
            for path in paths_of(condition.expr):
                found.setdefault(path, _Reading(path))
            for path, constants in _uses(condition.expr, None):
                reading = found.setdefault(path, _Reading(path))
                reading.whole = reading.whole or constants is None
                reading.constants.update(constants or ())
        for path, reading in found.items():
            # A record that is read as a whole shows all that its members are.
            reading.whole = reading.whole or any(path[:-1][:size] in found for size in range(1, len(path)))
            reading.settle()
        self._readings = tuple(found[path] for path in sorted(found))

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(reading.path for reading in self._readings)

    def kind(self, request: Request) -> tuple[object, ...]:
        """Equal for requests of one action and type of principal that the policies decide alike."""
        return (
            request.action,
            request.principal.type,
            *[reading.kind(request.value(reading.path)) for reading in self._readings],
        )


def _uses(expr: pst.Expr, around: pst.Expr | None) -> Iterator[tuple[Path, set[object] | None]]:
    """Each place read in ``expr``, with the constants it is compared with there; ``None`` where that is not all."""
    path = path_of(expr)
    if path is not None:
        if isinstance(expr, pst.BinaryOp) and len(path) == 2:  # a tag whose name is itself read from somewhere
            yield path, None
            yield from _uses(expr.right, expr)
        else:
            yield path, _constants(expr, around)
        return
    if isinstance(expr, pst.HasAttr) and path_of(expr.base) is not None:
        return  # whether there is something, which every kind of value tells
    if isinstance(expr, pst.Is) and isinstance(expr.base, pst.Var) and expr.in_expr is None:
        return  # only the type
    for child in children(expr):
        yield from _uses(child, expr)


def _constants(place: pst.Expr, around: pst.Expr | None) -> set[object] | None:
    match around:
        case None:
            return set() if isinstance(place, pst.BinaryOp) else None  # has_tag, alone
        case pst.UnaryOp(op="not" | "is_empty") | pst.BinaryOp(op="and" | "or"):
            return set()
        case pst.BinaryOp(op=op, left=left, right=right):
            other = right if left is place else left
            if op in _EQUALITIES and isinstance(other, pst.EntityLit):
                return {str(other.value)}
            if op in _COMPARISONS and isinstance(other, pst.LongLit):
                return {other.value}
            if op in _EQUALITIES and isinstance(other, pst.StringLit):
                return {other.value}
            if op == "contains" and left is place and isinstance(other, pst.StringLit):
                return {other.value}
            if op == "contains" and right is place:
                return _strings(other)
            if op in _SUBSETS:
                return _strings(other)
    return None


def _strings(expr: pst.Expr) -> set[object] | None:
    if isinstance(expr, pst.Set) and all(isinstance(each, pst.StringLit) for each in expr.elements):
        return {each.value for each in expr.elements if isinstance(each, pst.StringLit)}
    return None
