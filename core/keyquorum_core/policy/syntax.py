"""Reading policies as trees: their conditions one by one, what they look at, and how they are written for people.

Everything here works on ``cedarpy.pst``, Cedar's own syntax tree, so that no second parser of the language is trusted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cedarpy import pst

from keyquorum_core.policy.facts import Path
from keyquorum_core.policy.schema import ACTIONS, PRINCIPALS

__all__ = [
    "Condition",
    "actions_of",
    "children",
    "conditions_of",
    "equalities",
    "path_of",
    "paths_of",
    "principals_of",
    "render",
    "walk",
]

_INFIX: Final = {
    "eq": "==", "not_eq": "!=", "less": "<", "less_eq": "<=", "greater": ">", "greater_eq": ">=",
    "and": "&&", "or": "||", "add": "+", "sub": "-", "mul": "*", "in": "in",
}  # fmt: skip
_METHODS: Final = {
    "contains": "contains", "contains_all": "containsAll", "contains_any": "containsAny", "get_tag": "getTag",
    "has_tag": "hasTag", "is_in_range": "isInRange", "offset": "offset", "duration_since": "durationSince",
    "decimal_less_than": "lessThan", "decimal_less_eq": "lessThanOrEqual", "decimal_greater": "greaterThan",
    "decimal_greater_eq": "greaterThanOrEqual", "is_empty": "isEmpty", "is_ipv4": "isIpv4", "is_ipv6": "isIpv6",
    "is_loopback": "isLoopback", "is_multicast": "isMulticast", "to_date": "toDate", "to_time": "toTime",
    "to_milliseconds": "toMilliseconds", "to_seconds": "toSeconds", "to_minutes": "toMinutes", "to_hours": "toHours",
    "to_days": "toDays",
}  # fmt: skip
_CAN_FAIL: Final = frozenset(
    {"add", "sub", "mul", "neg", "offset", "duration_since", "datetime", "decimal", "duration"}
)
"""Operations that can fail on values that are of the right type: by overflow, or at all."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing a policy asks for: a conjunct of its scope, of a ``when``, or (``negated``) a whole ``unless``."""

    expr: pst.Expr
    negated: bool

    def __str__(self) -> str:
        return f"!({render(self.expr)})" if self.negated else render(self.expr)

    def clause(self) -> pst.Clause:
        return pst.Unless(self.expr) if self.negated else pst.When(self.expr)


def conditions_of(policy: pst.Template) -> tuple[Condition, ...]:
    """All of a policy's conditions, in the order in which Cedar looks at them; it matches when every one holds."""
    out = [Condition(expr, False) for expr in _scope(policy)]
    for clause in policy.clauses:
        if isinstance(clause, pst.When):
            out.extend(Condition(expr, False) for expr in _conjuncts(clause.expr))
        else:
            out.append(Condition(clause.expr, True))
    return tuple(out)


def _scope(policy: pst.Template) -> Iterator[pst.Expr]:
    yield from _constraint(pst.Var("principal"), policy.principal)
    action: pst.Expr = pst.Var("action")
    if isinstance(policy.action, pst.ActionEq):
        yield pst.BinaryOp("eq", action, pst.EntityLit(policy.action.entity))
    elif isinstance(policy.action, pst.ActionIn):
        yield pst.BinaryOp("in", action, pst.Set(tuple(pst.EntityLit(each) for each in policy.action.entities)))
    yield from _constraint(pst.Var("resource"), policy.resource)


def _constraint(var: pst.Expr, scope: pst.PrincipalOrResourceConstraint) -> Iterator[pst.Expr]:
    if isinstance(scope, pst.ScopeIs | pst.ScopeIsIn):
        yield pst.Is(var, scope.entity_type, None)
    if isinstance(scope, pst.ScopeEq | pst.ScopeIn | pst.ScopeIsIn) and isinstance(scope.entity, pst.EntityUid):
        yield pst.BinaryOp("eq" if isinstance(scope, pst.ScopeEq) else "in", var, pst.EntityLit(scope.entity))


def _conjuncts(expr: pst.Expr) -> Iterator[pst.Expr]:
    if isinstance(expr, pst.BinaryOp) and expr.op == "and":
        yield from _conjuncts(expr.left)
        yield from _conjuncts(expr.right)
    else:
        yield expr


def actions_of(policy: pst.Template) -> tuple[str, ...]:
    """The actions that the policy's scope lets through."""
    if isinstance(policy.action, pst.ActionEq):
        return (policy.action.entity.id,)
    if isinstance(policy.action, pst.ActionIn):
        named = {entity.id for entity in policy.action.entities}
        return tuple(action for action in ACTIONS if action in named)
    return ACTIONS


def principals_of(policy: pst.Template, action: str) -> tuple[str, ...]:
    """The principal types of ``action`` that the policy's scope lets through."""
    scope = policy.principal
    if isinstance(scope, pst.ScopeIs | pst.ScopeIsIn):
        wanted = str(scope.entity_type)
    elif isinstance(scope, pst.ScopeEq | pst.ScopeIn) and isinstance(scope.entity, pst.EntityUid):
        wanted = str(scope.entity.type)
    else:
        return PRINCIPALS[action]
    return tuple(each for each in PRINCIPALS[action] if each == wanted)


def walk(expr: pst.Expr) -> Iterator[pst.Expr]:
    """``expr`` and every expression in it."""
    yield expr
    for child in children(expr):
        yield from walk(child)


def children(expr: pst.Expr) -> tuple[pst.Expr, ...]:
    """The expressions that ``expr`` is directly made of."""
    match expr:
        case pst.UnaryOp(arg=arg):
            return (arg,)
        case pst.BinaryOp(left=left, right=right):
            return (left, right)
        case pst.GetAttr(base=base) | pst.HasAttr(base=base) | pst.Like(base=base):
            return (base,)
        case pst.Is(base=base, in_expr=within):
            return (base,) if within is None else (base, within)
        case pst.IfThenElse(cond=cond, then_expr=then, else_expr=other):
            return (cond, then, other)
        case pst.Set(elements=elements):
            return elements
        case pst.Record(fields=members):
            return tuple(members.values())
    return ()


def path_of(expr: pst.Expr) -> Path | None:
    """The path that ``expr`` reads, if that is all it does."""
    match expr:
        case pst.Var(name="context" | "action"):
            return (expr.name,)
        case pst.Var(name=name):
            return (name, "#uid")
        case pst.GetAttr(base=pst.Var(name=name), attr=attr):
            return (name, attr)
        case pst.GetAttr(base=base, attr=attr):
            found = path_of(base)
            return None if found is None or found[-1].startswith("#") else (*found, attr)
        case pst.BinaryOp(op="get_tag" | "has_tag", left=pst.Var(name=name), right=pst.StringLit(value=tag)):
            return (name, "#tags", tag)
        case pst.BinaryOp(op="get_tag" | "has_tag", left=pst.Var(name=name)):
            return (name, "#tags")
    return None


def paths_of(expr: pst.Expr) -> Iterator[Path]:
    """Every place of the request that the value of ``expr`` can depend on."""
    found = path_of(expr)
    if found is not None:
        yield found
        if isinstance(expr, pst.BinaryOp) and len(found) == 2:  # a tag whose name is itself read from somewhere
            yield from paths_of(expr.right)
        return
    if isinstance(expr, pst.Is) and isinstance(expr.base, pst.Var) and expr.in_expr is None:
        return  # only the type, which every request is sorted by anyway
    if isinstance(expr, pst.HasAttr):
        base = path_of(expr.base)
        if base is not None:
            root = (base[0],) if base[-1] == "#uid" else base
            yield (*root, *expr.attrs)
            return
    for child in children(expr):
        yield from paths_of(child)


def can_fail(expr: pst.Expr) -> bool:
    """Whether evaluating it on a request of the schema's form can be an error rather than a value."""
    return any(isinstance(each, pst.UnaryOp | pst.BinaryOp) and each.op in _CAN_FAIL for each in walk(expr))


def equalities(conditions: tuple[Condition, ...]) -> dict[Path, frozenset[str]]:
    """Places that must hold one of a few strings for the policy to match, from the conditions that come before any that
    can fail: where another string stands there, the policy neither matches nor fails."""
    out: dict[Path, frozenset[str]] = {}
    for condition in conditions:
        if can_fail(condition.expr):
            break
        found = None if condition.negated else _equality(condition.expr)
        if found is not None:
            path, values = found
            out[path] = out.get(path, values) & values
    return out


def _equality(expr: pst.Expr) -> tuple[Path, frozenset[str]] | None:
    match expr:
        case (
            pst.BinaryOp(op="eq", left=pst.GetAttr() as place, right=pst.StringLit(value=value))
            | pst.BinaryOp(op="eq", left=pst.StringLit(value=value), right=pst.GetAttr() as place)
        ):
            path = path_of(place)
            return None if path is None else (path, frozenset({value}))
        case pst.BinaryOp(op="contains", left=pst.Set(elements=elements), right=pst.GetAttr() as place):
            path = path_of(place)
            values = frozenset(each.value for each in elements if isinstance(each, pst.StringLit))
            return None if path is None or len(values) != len(set(elements)) else (path, values)
        case pst.BinaryOp(op="eq", left=pst.Var(name="principal"), right=pst.EntityLit(value=uid)):
            return ("principal", "#uid"), frozenset({str(uid)})
    return None


def render(expr: pst.Expr) -> str:
    """Cedar text, with parentheses only where they are needed."""
    match expr:
        case pst.Var(name=name):
            return name
        case pst.BoolLit(value=value):
            return "true" if value else "false"
        case pst.LongLit(value=value):
            return str(value)
        case pst.StringLit(value=value):
            return _quoted(value)
        case pst.EntityLit(value=uid):
            return f"{uid.type}::{_quoted(uid.id)}"
        case pst.GetAttr(base=base, attr=attr):
            return f"{_atom(base)}.{attr}" if attr.isidentifier() else f"{_atom(base)}[{_quoted(attr)}]"
        case pst.HasAttr(base=base, attrs=attrs):
            return f"{_atom(base)} has {'.'.join(attrs)}"
        case pst.UnaryOp(op=op, arg=arg):
            if op in ("not", "neg"):
                return f"{'!' if op == 'not' else '-'}{_atom(arg)}"
            return f"{_atom(arg)}.{_METHODS[op]}()" if op in _METHODS else f"{op}({render(arg)})"
        case pst.BinaryOp(op=op, left=left, right=right):
            if op in _METHODS:
                return f"{_atom(left)}.{_METHODS[op]}({render(right)})"
            if op in ("and", "or"):
                return f" {_INFIX[op]} ".join(_side(each, op) for each in (left, right))
            return f"{_atom(left)} {_INFIX[op]} {_atom(right)}"
        case pst.Like(base=base, pattern=pattern):
            text = "".join(
                "*" if isinstance(each, pst.Wildcard) else r"\*" if each.value == "*" else _quoted(each.value)[1:-1]
                for each in pattern
            )
            return f'{_atom(base)} like "{text}"'
        case pst.Is(base=base, entity_type=entity_type, in_expr=within):
            return f"{_atom(base)} is {entity_type}" + ("" if within is None else f" in {render(within)}")
        case pst.IfThenElse(cond=cond, then_expr=then, else_expr=other):
            return f"if {render(cond)} then {render(then)} else {render(other)}"
        case pst.Set(elements=elements):
            return f"[{', '.join(render(each) for each in elements)}]"
        case pst.Record(fields=members):
            return "{" + ", ".join(f"{name}: {render(value)}" for name, value in members.items()) + "}"
    return f"?{expr.name}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _side(expr: pst.Expr, op: str) -> str:
    """An operand of ``&&`` or ``||``: comparisons bind tighter than both."""
    if isinstance(expr, pst.IfThenElse) or (
        isinstance(expr, pst.BinaryOp) and expr.op in ("and", "or") and expr.op != op
    ):
        return f"({render(expr)})"
    return render(expr)


def _atom(expr: pst.Expr) -> str:
    compound = isinstance(expr, pst.IfThenElse | pst.Like | pst.HasAttr | pst.Is) or (
        isinstance(expr, pst.BinaryOp) and expr.op not in _METHODS
    )
    return f"({render(expr)})" if compound else render(expr)
