"""Why a decision came out as it did: every condition of every policy concerned, with the values it was asked about.

Cedar says which policies matched, and no more. Here each condition is put to Cedar as a policy of its own, on the same
request, so that what is said about a condition is Cedar's word too. Slow (milliseconds): for refusals and for people.
"""

from __future__ import annotations

from dataclasses import dataclass

import cedarpy
from cedarpy import pst

from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.policy.engine import Decision, ask
from keyquorum_core.policy.facts import MISSING, Path, Request, Seat
from keyquorum_core.policy.policies import Policy, PolicySet
from keyquorum_core.policy.syntax import Condition, paths_of

__all__ = ["ConditionFound", "Explanation", "PolicyFound", "explain", "refusal", "spell"]

_ANY = pst.ScopeAny()
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class ConditionFound:
    """A condition, whether it holds (``None``: it could not be evaluated, as after one that guards it), and what stands
    at each place it reads."""

    text: str
    holds: bool | None
    values: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, object]:
        return {"condition": self.text, "holds": self.holds, "values": dict(self.values)}


@dataclass(frozen=True, slots=True)
class PolicyFound:
    """A policy whose scope the request is in. ``policy`` matched when every condition holds."""

    policy: Policy
    conditions: tuple[ConditionFound, ...]

    @property
    def matched(self) -> bool:
        return all(condition.holds for condition in self.conditions)

    @property
    def unmet(self) -> tuple[int, ...]:
        """Positions of the conditions that do not hold."""
        return tuple(i for i, condition in enumerate(self.conditions) if not condition.holds)

    def as_dict(self) -> dict[str, object]:
        return {
            "policy": self.policy.id,
            "effect": self.policy.effect,
            "file": self.policy.file,
            "matched": self.matched,
            "conditions": [condition.as_dict() for condition in self.conditions],
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """All policies concerned: forbids first, those that matched before others, then by how little they lack."""

    permitted: bool
    policies: tuple[PolicyFound, ...]
    failed: tuple[str, ...]

    def matched(self, effect: str) -> tuple[PolicyFound, ...]:
        return tuple(each for each in self.policies if each.matched and each.policy.effect == effect)

    @property
    def nearest_permit(self) -> PolicyFound | None:
        """The permit that lacks least."""
        return next((each for each in self.policies if each.policy.effect == "permit"), None)

    def as_dict(self) -> dict[str, object]:
        return {
            "outcome": "permit" if self.permitted else "deny",
            "policies": [each.as_dict() for each in self.policies],
            "failed": list(self.failed),
        }


def explain(policies: PolicySet, request: Request) -> Explanation:
    """Evaluate every condition of every policy that the request is in the scope of."""
    concerned = [each for each in policies.policies if each.concerns(request.action, request.principal.type)]
    trees: dict[str, pst.Template] = {}
    for i, policy in enumerate(concerned):
        for j, condition in enumerate(policy.conditions):
            name = f"{i}.{j}"
            trees[name] = pst.Template(
                name, "permit", _ANY, _ANY, _ANY, (condition.clause(),), pst.FrozenMap[str, str]()
            )
        trees[f"{i}"] = pst.Template(
            f"{i}",
            "permit",
            _ANY,
            _ANY,
            _ANY,
            tuple(each.clause() for each in policy.conditions),
            pst.FrozenMap[str, str](),
        )
    handle = cedarpy.PolicySet.from_pst(pst.PolicySet(pst.FrozenMap(), pst.FrozenMap(trees), ()))
    _, held, broken = ask(handle, request, None)
    found = []
    for i, policy in enumerate(concerned):
        outcomes = tuple(
            _condition(each, request, None if f"{i}.{j}" in broken else f"{i}.{j}" in held)
            for j, each in enumerate(policy.conditions)
        )
        found.append(PolicyFound(policy, outcomes))
    failed = tuple(policy.id for i, policy in enumerate(concerned) if f"{i}" in broken)
    forbidden = any(each.matched and each.policy.effect == "forbid" for each in found)
    permitted = any(each.matched and each.policy.effect == "permit" for each in found)
    found.sort(key=lambda each: (each.policy.effect != "forbid", len(each.unmet), each.policy.id))
    return Explanation(permitted and not forbidden and not failed, tuple(found), failed)


def _condition(condition: Condition, request: Request, holds: bool | None) -> ConditionFound:
    places = sorted(set(paths_of(condition.expr)))
    return ConditionFound(str(condition), holds, tuple((_name(path), spell(request.value(path))) for path in places))


def _name(path: Path) -> str:
    if path[1:2] == ("#uid",):
        return path[0]
    if path[1:2] == ("#tags",):
        return f"{path[0]} tag {path[2]}" if len(path) == 3 else f"{path[0]} tags"
    return ".".join(path)


def spell(value: object) -> str:
    """A value for people, on one line."""
    if value is MISSING:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value)


def refusal(seat: Seat, policies: PolicySet, request: Request, decision: Decision) -> RefusedError:
    """The error (``POLICY``) of a decision that denies: the policy, the condition, what it wants and what it got."""
    message, field, expected, actual = _why(str(seat), explain(policies, request), request, decision)
    return RefusedError(
        Reason.POLICY,
        message,
        expected=expected[:_SHOWN],
        actual=actual[:_SHOWN],
        next_step="Change the job, or have the policy's signers change it; `keyquorum policy explain` shows every"
        " condition.",
        details={
            "field": field,
            "policies": ", ".join(decision.policies)[:_SHOWN] or "none: denied by default",
            "policy_sha256": decision.bundle_digest,
            "policy_version": str(decision.bundle_version),
            "decision_sha256": decision.digest.hex(),
        },
    )


def _why(seat: str, found: Explanation, request: Request, decision: Decision) -> tuple[str, str, str, str]:
    """Message, field, expected, actual."""
    if decision.failed:
        return (
            f"a policy of {seat} could not be evaluated, so nothing is permitted",
            "",
            "policies that can be evaluated",
            ", ".join(decision.failed),
        )
    forbids = found.matched("forbid")
    if forbids:
        first = forbids[0]
        position = _telling(first.policy)
        if position is None:
            return f"{seat} forbids it by policy {first.policy.id}", "", "another request", request.action
        condition, told = first.policy.conditions[position], first.conditions[position]
        wanted = told.text.removeprefix("!(").removesuffix(")") if condition.negated else f"not {told.text}"
        return f"{seat} forbids it by policy {first.policy.id}", _field(told), wanted, _actual(told)
    nearest = found.nearest_permit
    if nearest is None:
        return (
            f"no policy of {seat} permits anybody to {request.action}",
            "action",
            f"a policy that permits {request.action} to {request.principal.type}",
            "none",
        )
    told = nearest.conditions[nearest.unmet[0]]
    return f"no policy of {seat} permits it; {nearest.policy.id} comes nearest", _field(told), told.text, _actual(told)


def _telling(policy: Policy) -> int | None:
    """The condition that says why a matching forbid is there: its first exception, else its last condition."""
    negated = [i for i, each in enumerate(policy.conditions) if each.negated]
    if negated:
        return negated[0]
    return len(policy.conditions) - 1 if policy.conditions else None


def _field(condition: ConditionFound) -> str:
    return condition.values[0][0] if condition.values else ""


def _actual(condition: ConditionFound) -> str:
    return ", ".join(f"{name} = {value}" for name, value in condition.values)
