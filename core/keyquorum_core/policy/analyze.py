"""What a set of policies can never do: policies that never match, and classifications that nobody would ever release.

Both are searches through small models (:mod:`~keyquorum_core.policy.models`), each request put to Cedar. A witness is
proof that something can happen. None found is proof that it cannot where the search was exact and complete; otherwise
the finding says that it is only likely. Not looked at: whether values can occur together in life (a region with its
provider), bounds that manifests set (no job has 0 CPUs), and the controlled lists, which are taken to list nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Final

import cedarpy
from cedarpy import pst

from keyquorum_core.policy.engine import ask
from keyquorum_core.policy.facts import Path, QuorumFacts
from keyquorum_core.policy.lists import LIST_KINDS, NO_LISTING
from keyquorum_core.policy.models import Domain, domains, request_with
from keyquorum_core.policy.policies import Policy, PolicySet, handle
from keyquorum_core.policy.syntax import Condition, paths_of, principals_of
from keyquorum_core.quorum import Custodian, Quorum

__all__ = ["MAX_MODELS", "Finding", "classifications_of", "dead_policies", "unreleasable"]

MAX_MODELS: Final = 50_000
"""Requests that one question may take."""
_CLASSIFICATION: Final[Path] = ("resource", "classification")
_ANY: Final = pst.ScopeAny()


@dataclass(frozen=True, slots=True)
class Finding:
    """``kind``: ``never-matches``, ``never-released`` or ``undecided``. ``about``: a policy or a classification.
    ``proven``: not merely that no witness was found."""

    kind: str
    about: str
    message: str
    proven: bool

    def as_dict(self) -> dict[str, object]:
        return {"kind": self.kind, "about": self.about, "message": self.message, "proven": self.proven}


# -- policies that never match -----------------------------------------------------------------------------------------


def dead_policies(policies: PolicySet) -> list[Finding]:
    """A finding for each policy that matches no request."""
    return [found for policy in policies.policies if (found := _dead(policy)) is not None]


def _dead(policy: Policy) -> Finding | None:
    proven, undecided, why = True, False, ""
    for action in policy.actions:
        for principal_type in principals_of(policy.tree, action):
            found, exact, culprit = _satisfiable(policy.conditions, action, principal_type)
            if found:
                return None
            proven, undecided, why = proven and exact, undecided or found is None, why or culprit
    if not policy.actions:
        return Finding("never-matches", policy.id, "its scope fits no action of the schema", True)
    if undecided:
        return Finding("undecided", policy.id, f"its conditions take more than {MAX_MODELS} requests to try out", False)
    return Finding("never-matches", policy.id, f"never together: {why}", proven)


def _satisfiable(conditions: tuple[Condition, ...], action: str, principal_type: str) -> tuple[bool | None, bool, str]:
    """Whether all can hold at once (``None``: too much to try), whether that is proven, and what cannot."""
    places = domains([each.expr for each in conditions], action, principal_type)
    for group in _groups(conditions):
        used = sorted({path for each in group for path in paths_of(each.expr)} & places.keys())
        if not 0 < prod(len(places[path].values) for path in used) <= MAX_MODELS:
            return None, False, ""
        tree = pst.Template(
            "all", "permit", _ANY, _ANY, _ANY, tuple(each.clause() for each in group), pst.FrozenMap[str, str]()
        )
        together = cedarpy.PolicySet.from_pst(pst.PolicySet(pst.FrozenMap(), pst.FrozenMap({"all": tree}), ()))
        if not any(
            ask(together, request_with(action, principal_type, values), None)[0] for values in _models(used, places)
        ):
            return False, all(places[path].exact for path in used), " && ".join(str(each) for each in group)
    return True, True, ""


def _groups(conditions: tuple[Condition, ...]) -> Iterator[list[Condition]]:
    """Conditions that share places, together; others hold or fail independently."""
    left = [(each, set(paths_of(each.expr))) for each in conditions]
    while left:
        first, places = left.pop(0)
        group = [first]
        grown = True
        while grown:
            joined = [each for each in left if each[1] & places]
            grown = bool(joined)
            for each in joined:
                group.append(each[0])
                places |= each[1]
                left.remove(each)
        yield sorted(group, key=conditions.index)


def _models(used: list[Path], places: Mapping[Path, Domain]) -> Iterator[dict[Path, object]]:
    for values in product(*(places[path].values for path in used)):
        yield dict(zip(used, values, strict=True))


# -- classifications that no quorum releases ---------------------------------------------------------------------------


def classifications_of(policies: Iterable[PolicySet]) -> tuple[str, ...]:
    """Every classification that some policy names."""
    return tuple(
        sorted(
            {
                name
                for each in policies
                for policy in each.policies
                for name in policy.equalities.get(_CLASSIFICATION, frozenset())
            }
        )
    )


def unreleasable(
    custodians: Mapping[str, PolicySet],
    quorum: Quorum,
    classifications: Iterable[str],
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Finding]:
    """A finding for each classification that no quorum of ``custodians`` would release to one and the same worker, or
    to the owner. A custodian that is not given releases nothing."""
    out = []
    for classification in classifications:
        progress(classification)
        for principal_type in ("Owner", "Worker"):
            found = _unreleasable(custodians, quorum, classification, principal_type)
            if found is not None:
                out.append(found)
                break
    return out


def _unreleasable(
    custodians: Mapping[str, PolicySet], quorum: Quorum, classification: str, principal_type: str
) -> Finding | None:
    fixed = _fixed(QuorumFacts.of(quorum), classification)
    concerned = {
        name: [
            policy
            for policy in policies.policies
            if policy.concerns("release", principal_type)
            and classification in policy.equalities.get(_CLASSIFICATION, {classification})
        ]
        for name, policies in custodians.items()
    }
    willing = {name for name, found in concerned.items() if any(policy.effect == "permit" for policy in found)}
    whom = "a worker" if principal_type == "Worker" else "its owner"
    if not quorum.is_qualified(willing):
        return Finding(
            "never-released",
            classification,
            f"a quorum is {quorum.words()}, but only {', '.join(sorted(willing)) or 'no custodian'} would ever release"
            f" it to {whom}",
            True,
        )
    exprs = [condition.expr for name in willing for policy in concerned[name] for condition in policy.conditions]
    places = {path: each for path, each in domains(exprs, "release", principal_type).items() if path not in fixed}
    used = sorted(places)
    if not 0 < prod(len(places[path].values) for path in used) <= MAX_MODELS:
        return Finding("undecided", classification, f"takes more than {MAX_MODELS} requests to try out", False)
    voters = _voters({name: tuple(concerned[name]) for name in sorted(willing)}, quorum, fixed, principal_type)
    best: frozenset[str] = frozenset()
    ever: set[str] = set()
    for values in _promising(voters, used, places):
        agreed = frozenset(name for voter in voters if voter.objections(values) == 0 for name in voter.names)
        ever |= agreed
        best = max(best, agreed, key=len)
        if quorum.is_qualified(agreed):
            return None
    exact = all(each.exact for each in places.values())
    alone = f"; {', '.join(sorted(ever))} each would, but never enough of them for the same request" if ever else ""
    return Finding(
        "never-released",
        classification,
        f"a quorum is {quorum.words()}, but at most {', '.join(sorted(best)) or 'no custodian'} would release one job"
        f" of it to {whom}{alone}",
        exact,
    )


@dataclass(frozen=True, slots=True)
class _Voter:
    """Custodians that decide alike: the same policies, and none that asks who decides."""

    names: tuple[str, ...]
    principal_type: str
    handle: cedarpy.PolicySet
    fixed: Mapping[Path, object]

    def objections(self, values: Mapping[Path, object]) -> int:
        """0 where they would release; else how many policies forbid it, and one more where none permits it."""
        request = request_with("release", self.principal_type, {**values, **self.fixed})
        permitted, policies, failed = ask(self.handle, request, None)
        return 0 if permitted else max(len(policies) + len(failed), 1)


def _voters(
    policies: Mapping[str, tuple[Policy, ...]], quorum: Quorum, fixed: Mapping[Path, object], principal_type: str
) -> list[_Voter]:
    alike: dict[object, list[str]] = {}
    for name, found in policies.items():
        asks_who = any(path[:2] == ("context", "seat") for policy in found for path in policy.paths)
        alike.setdefault((name,) if asks_who else tuple(policy.tree for policy in found), []).append(name)
    seats = {each.id: _seat(each) for each in quorum.committee}
    return [
        _Voter(tuple(names), principal_type, handle(policies[names[0]]), {**fixed, **seats[names[0]]})
        for names in alike.values()
    ]


def _promising(
    voters: list[_Voter], used: list[Path], places: Mapping[Path, Domain]
) -> Iterator[Mapping[Path, object]]:
    """Every model, after those that are reached by improving one value at a time, for each voter and for all."""
    for group in [voters, *([voter] for voter in voters)]:
        values = {path: places[path].values[0] for path in used}
        score = sum(voter.objections(values) for voter in group)
        improved = True
        while score and improved:
            improved = False
            for path in used:
                for value in places[path].values:
                    other = {**values, path: value}
                    found = sum(voter.objections(other) for voter in group)
                    if found < score:
                        values, score, improved = other, found, True
        yield values
    yield from _models(used, places)


def _fixed(facts: QuorumFacts, classification: str) -> dict[Path, object]:
    return {
        _CLASSIFICATION: classification,
        ("context", "quorum", "custodians"): facts.custodians,
        ("context", "quorum", "jurisdictions"): facts.jurisdictions,
        ("context", "logged"): True,
        **{("context", name, member): value for name in LIST_KINDS for member, value in NO_LISTING.items()},
        **{("context", "seat", member): "" for member in ("kind", "id", "jurisdiction")},
    }


def _seat(custodian: Custodian) -> dict[Path, object]:
    return {
        ("context", "seat", "kind"): "custodian",
        ("context", "seat", "id"): custodian.id,
        ("context", "seat", "jurisdiction"): custodian.jurisdiction,
    }
