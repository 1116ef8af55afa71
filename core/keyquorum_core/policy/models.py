"""Small models: few enough requests to stand for all, so that "never" can be found out by asking Cedar about each.

A policy looks at a request through comparisons with the constants that stand in it. Two values of a place that give
every comparison the same answer are interchangeable; one of each kind is enough. For strings that is each constant and
one that is none; for integers each constant and its neighbours, from 0 up; for sets of strings the sets made of the
constants. Exact as long as every comparison reads one place: where one reads two (or a set is compared with more than
:data:`MAX_SET` constants), the values tried are all constants that occur, and what comes out is marked as not exact.
A place that holds a whole record has no values to try.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Final

import cedarpy
from cedarpy import pst

from keyquorum_core.policy.engine import ask
from keyquorum_core.policy.facts import MISSING, Entity, Path, Request
from keyquorum_core.policy.schema import RESOURCES, SCHEMA_TEXT
from keyquorum_core.policy.syntax import children, paths_of, walk

__all__ = ["MAX_SET", "Domain", "domains", "request_with", "type_of"]

MAX_SET: Final = 8
_OTHER: Final = "…"
"""A string that is none of the constants."""
_ANY: Final = pst.ScopeAny()

Value = object


@cache
def _members() -> Mapping[str, Mapping[str, str]]:
    """Types by name, of every entity, record type and action's context in the schema."""
    text = re.sub(r"//[^\n]*", "", SCHEMA_TEXT)
    out: dict[str, dict[str, str]] = {}
    for kind, name, body in re.findall(r"(entity|type) (\w+) = \{(.*?)\}", text, re.DOTALL):
        out[f"{kind} {name}"] = dict(re.findall(r"(\w+): ([\w<>]+)", body))
    for names, body in re.findall(r"action ([\w, ]+) appliesTo \{.*?context: \{(.*?)\}", text, re.DOTALL):
        for name in names.split(", "):
            out[f"context {name}"] = dict(re.findall(r"(\w+): ([\w<>]+)", body))
    return out


def type_of(path: Path, action: str, principal_type: str) -> str:
    """The schema's type of a place: ``String``, ``Long``, ``Bool``, ``Set<String>``, ``Uid``, ``Tag``; empty for a
    whole record."""
    head, *rest = path
    if rest == ["#uid"]:
        return "Uid"
    if rest[:1] == ["#tags"]:
        return "Tag" if len(rest) == 2 else ""
    found = {
        "principal": f"entity {principal_type}",
        "resource": f"entity {RESOURCES[action]}",
        "context": f"context {action}",
    }.get(head, "")
    for name in rest:
        kind = _members().get(found, {}).get(name, "")
        found = f"type {kind}"
    kind = found.removeprefix("type ")
    return kind if kind in ("String", "Long", "Bool", "Set<String>") else ""


def _blank(name: str) -> dict[str, object]:
    """A record of this type with nothing in it."""
    blanks: Mapping[str, object] = {"String": "", "Long": 0, "Bool": False, "Set<String>": ()}
    return {
        member: blanks[kind] if kind in blanks else _blank(f"type {kind}") for member, kind in _members()[name].items()
    }


def request_with(action: str, principal_type: str, values: Mapping[Path, Value]) -> Request:
    """A request in which these places hold these values, and all others nothing."""
    parts = {
        "principal": _blank(f"entity {principal_type}"),
        "resource": _blank(f"entity {RESOURCES[action]}"),
        "context": _blank(f"context {action}"),
    }
    ids = {"principal": _OTHER, "resource": _OTHER}
    tags: dict[str, int] = {}
    for (head, *rest), value in values.items():
        if rest == ["#uid"]:
            ids[head] = str(value)
        elif rest[:1] == ["#tags"]:
            if isinstance(value, int):
                tags[rest[1]] = value
        elif head != "action":
            place = parts[head]
            for name in rest[:-1]:
                inner = place[name]
                place = inner if isinstance(inner, dict) else {}
            place[rest[-1]] = value
    return Request(
        action,
        Entity(principal_type, ids["principal"], parts["principal"], tags),
        Entity(RESOURCES[action], ids["resource"], parts["resource"]),
        parts["context"],
    )


@dataclass(frozen=True, slots=True)
class Domain:
    """The values of one place that stand for all; ``exact`` unless some had to be left out."""

    path: Path
    values: tuple[Value, ...]
    exact: bool


def domains(exprs: Iterable[pst.Expr], action: str, principal_type: str) -> dict[Path, Domain]:
    """For every place that ``exprs`` read, few values that tell all their comparisons apart."""
    alone: dict[Path, list[pst.Expr]] = {}
    crossed: set[Path] = set()
    constants: dict[Path, list[object]] = {}
    for atom in (each for expr in exprs for each in _atoms(expr)):
        places = sorted(set(paths_of(atom)))
        for place in places:
            constants.setdefault(place, []).extend(_constants(atom))
        if len(places) == 1:
            alone.setdefault(places[0], []).append(atom)
        else:
            crossed.update(places)
    everything = [each for place in crossed for each in constants[place]]
    out = {}
    for path, found in constants.items():
        if path == ("action",):
            continue
        kind = type_of(path, action, principal_type)
        values, exact = _candidates(kind, found if path not in crossed else found + everything)
        if path in crossed:
            out[path] = Domain(path, values, False)
        else:
            out[path] = Domain(path, _tell_apart(path, values, alone[path], action, principal_type), exact)
    return out


def _atoms(expr: pst.Expr) -> Iterator[pst.Expr]:
    """The parts of a condition that are put together by ``&&``, ``||``, ``!`` and ``if``."""
    if isinstance(expr, pst.IfThenElse) or (
        isinstance(expr, pst.BinaryOp | pst.UnaryOp) and expr.op in ("and", "or", "not")
    ):
        for each in children(expr):
            yield from _atoms(each)
    else:
        yield expr


def _constants(expr: pst.Expr) -> Iterator[object]:
    for each in walk(expr):
        match each:
            case pst.StringLit(value=value) | pst.LongLit(value=value):
                yield value
            case pst.EntityLit(value=uid):
                yield uid.id
            case pst.Like(pattern=pattern):
                for filler in ("", "x"):
                    yield "".join(filler if isinstance(one, pst.Wildcard) else one.value for one in pattern)


def _candidates(kind: str, constants: Iterable[object]) -> tuple[tuple[Value, ...], bool]:
    found = list(dict.fromkeys(constants))
    words = [each for each in found if isinstance(each, str)]
    numbers = [each for each in found if isinstance(each, int)]
    near = sorted({each + step for each in numbers for step in (-1, 0, 1) if each + step >= 0} | {0})
    match kind:
        case "Bool":
            return (False, True), True
        case "Long":
            return tuple(near), True
        case "Tag":
            return (MISSING, *near), True
        case "String" | "Uid":
            return (*words, _OTHER), True
        case "Set<String>":
            if len(words) <= MAX_SET:
                pool = [*words, _OTHER]
                sizes: Iterable[int] = range(len(pool) + 1)
                return tuple(tuple(sorted(c)) for size in sizes for c in combinations(pool, size)), True
            whole = tuple(sorted(words))
            fewer = [tuple(w for w in whole if w != each) for each in whole]
            return ((), *((each,) for each in whole), *fewer, whole, (*whole, _OTHER), (_OTHER,)), False
    return (), False


def _tell_apart(
    path: Path, values: tuple[Value, ...], atoms: list[pst.Expr], action: str, principal_type: str
) -> tuple[Value, ...]:
    """One value for each combination of answers that ``atoms`` can give."""
    trees = {
        f"a{i}": pst.Template(f"a{i}", "permit", _ANY, _ANY, _ANY, (pst.When(atom),), pst.FrozenMap[str, str]())
        for i, atom in enumerate(dict.fromkeys(atoms))
        if _is_bool(atom)
    }
    if len(trees) != len(set(atoms)):
        return values  # a comparison that is no condition by itself, as an operand of arithmetic
    handle = cedarpy.PolicySet.from_pst(pst.PolicySet(pst.FrozenMap(), pst.FrozenMap(trees), ()))
    kept: dict[tuple[object, ...], Value] = {}
    for value in values:
        _, held, broken = ask(handle, request_with(action, principal_type, {path: value}), None)
        kept.setdefault((held, broken), value)
    return tuple(kept.values())


def _is_bool(expr: pst.Expr) -> bool:
    """Whether an atom is a condition: what it is made of always is one, but for literals and bare places."""
    return not isinstance(expr, pst.StringLit | pst.LongLit | pst.EntityLit | pst.Set | pst.Record | pst.Var)
