"""Decisions: one set of policies, asked one request at a time, in a few microseconds (docs/spec/policy.md).

Default deny: a request is permitted when some ``permit`` matches, no ``forbid`` does, and nothing failed. Cedar ignores
a policy that fails; here a failure denies, since a ``forbid`` could have been what failed.

Cedar evaluates every policy of a set for every request, about a microsecond each. Two things keep a decision short
(docs/adr). *Slices*: a policy whose condition asks for another classification, or other string, than the request has
cannot match, so Cedar is given the set without it; which slice a request falls into is found by the few strings that
policies compare with. *Memory*: a decision is kept for all requests that the policies cannot tell apart
(:mod:`~keyquorum_core.policy.kinds`). Neither leaves out a policy that could have mattered:
``tests/unit/test_policy_engine.py`` holds both to Cedar's own answer over the whole set
(:meth:`PolicyEngine.decide_afresh`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import cedarpy

from keyquorum_core.policy.facts import MISSING, Entity, Path, Request
from keyquorum_core.policy.kinds import Readings
from keyquorum_core.policy.policies import Policy, PolicySet, handle
from keyquorum_core.transcript import H, u64be

__all__ = ["Decision", "PolicyEngine"]

_KEPT_DECISIONS: Final = 8192
_KEPT_SLICES: Final = 1024
_KEPT_PRINCIPALS: Final = 1024


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided, by which policies, and a digest that binds it to everything it was decided from.

    ``policies``: ids of the permits (or forbids) that matched, sorted; empty when nothing permitted. ``failed``: ids of
    policies that could not be evaluated. ``digest`` is 32 bytes (docs/spec/policy.md).
    """

    permitted: bool
    action: str
    policies: tuple[str, ...]
    failed: tuple[str, ...]
    bundle_digest: str
    bundle_version: int
    list_versions: Mapping[str, int]
    digest: bytes

    @property
    def outcome(self) -> str:
        return "permit" if self.permitted else "deny"

    def as_dict(self) -> dict[str, object]:
        return {
            "outcome": self.outcome,
            "action": self.action,
            "policies": list(self.policies),
            "failed": list(self.failed),
            "bundle_digest": self.bundle_digest,
            "bundle_version": self.bundle_version,
            "lists": dict(self.list_versions),
            "digest": self.digest.hex(),
        }


_Outcome: TypeAlias = tuple[bool, tuple[str, ...], tuple[str, ...]]


class PolicyEngine:
    """A set of policies ready to be asked, named by its bundle's digest (hex) and version. Used from one thread."""

    def __init__(self, policies: PolicySet, *, bundle_digest: str, bundle_version: int) -> None:
        self.policies = policies
        self.bundle_digest = bundle_digest
        self.bundle_version = bundle_version
        self._digest_bytes = bytes.fromhex(bundle_digest)
        self._readings = Readings(condition for policy in policies.policies for condition in policy.conditions)
        self._places = _Places(self._readings.paths)
        values: dict[Path, set[str]] = {}
        for policy in policies.policies:
            for path, strings in policy.equalities.items():
                values.setdefault(path, set()).update(strings)
        self._compared = tuple((path, frozenset(values[path])) for path in sorted(values))
        self._slices: dict[tuple[object, ...], cedarpy.PolicySet] = {}
        self._kept: dict[tuple[object, ...], _Outcome] = {}

    @property
    def lists(self) -> tuple[str, ...]:
        """The controlled lists that must be at hand and in date."""
        return self.policies.lists

    def decide(self, request: Request) -> Decision:
        """Never raises for a request that could be made."""
        key = self._readings.kind(request)
        outcome = self._kept.get(key)
        if outcome is None:
            outcome = self._evaluate(request)
            if len(self._kept) >= _KEPT_DECISIONS:
                self._kept.clear()
            self._kept[key] = outcome
        permitted, policies, failed = outcome
        versions = {
            name: listing["version"]
            for name in ("export", "sanctions")
            if isinstance(listing := request.context.get(name), Mapping)
        }
        digest = H(
            "keyquorum/v1/policy-decision",
            self._digest_bytes,
            u64be(self.bundle_version),
            request.text().encode(),
            b"permit" if permitted else b"deny",
            "\n".join(policies).encode(),
            "\n".join(failed).encode(),
        )
        return Decision(
            permitted,
            request.action,
            policies,
            failed,
            self.bundle_digest,
            self.bundle_version,
            versions,
            digest,
        )

    def decide_afresh(self, request: Request) -> tuple[bool, tuple[str, ...], tuple[str, ...]]:
        """Permitted or not, deciding ids, failed ids: by Cedar over the whole set and the whole request."""
        return ask(handle(self.policies.policies), request, None)

    # -- what a decision can depend on -------------------------------------------------------------------------------

    def _evaluate(self, request: Request) -> _Outcome:
        return ask(self._slice(request), request, self._places)

    def _slice(self, request: Request) -> cedarpy.PolicySet:
        """The policies that are not ruled out by a string the request has."""
        found: list[object] = [request.action, request.principal.type]
        for path, known in self._compared:
            value = request.value(path)
            found.append(value if value in known else None)
        key = tuple(found)
        policies = self._slices.get(key)
        if policies is None:
            policies = handle(tuple(each for each in self.policies.policies if self._may_matter(each, request)))
            if len(self._slices) >= _KEPT_SLICES:
                self._slices.clear()
            self._slices[key] = policies
        return policies

    @staticmethod
    def _may_matter(policy: Policy, request: Request) -> bool:
        if not policy.concerns(request.action, request.principal.type):
            return False
        return all(request.value(path) in values for path, values in policy.equalities.items())


def ask(policies: cedarpy.PolicySet, request: Request, places: _Places | None) -> _Outcome:
    """Cedar's answer. ``places``: what of the request to hand over; ``None`` for all of it."""
    if places is None:
        principal = _entities(request.principal, request.principal.attrs, request.principal.tags)
        resource, context = request.resource.attrs, request.context
    else:
        principal = places.principal(request)
        resource, context = places.attrs(request, "resource"), places.attrs(request, "context")
    answer = cedarpy.is_authorized(
        {
            "principal": request.principal.uid,
            "action": {"type": "Action", "id": request.action},
            "resource": request.resource.uid,
            "context": dict(context),
        },
        policies,
        principal.with_added_json_str(_entity_text(request.resource, resource, request.resource.tags)),
    )
    errors = answer.diagnostics.errors
    failed = tuple(sorted({_named_in(error) for error in errors}))
    return answer.allowed and not errors, tuple(sorted(answer.diagnostics.reasons)), failed


def _entity_text(entity: Entity, attrs: Mapping[str, object], tags: Mapping[str, int]) -> str:
    return json.dumps([{"uid": entity.uid, "attrs": attrs, "tags": tags, "parents": []}])


def _entities(entity: Entity, attrs: Mapping[str, object], tags: Mapping[str, int]) -> cedarpy.Entities:
    return cedarpy.Entities.from_json_str(_entity_text(entity, attrs, tags))


def _named_in(error: str) -> str:
    """The policy id in one of Cedar's evaluation errors, or the whole message where it names none."""
    _, _, rest = error.partition("policy `")
    name, tick, _ = rest.partition("`")
    return name if tick else error[:200]


class _Places:
    """The places of a request that a set of policies reads; everything else is left out of what Cedar is handed."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = tuple(sorted(paths))
        self._attrs: dict[str, list[tuple[str, ...]]] = {"principal": [], "resource": [], "context": []}
        self._tags: list[str] = []
        self._all_tags = False
        for head, *rest in self.paths:
            if head == "action" or rest[:1] == ["#uid"]:
                continue
            if rest[:1] == ["#tags"]:
                self._tags += rest[1:]
                self._all_tags = self._all_tags or len(rest) == 1
            else:
                self._attrs[head].append(tuple(rest))
        self._principals: dict[str, cedarpy.Entities] = {}

    def principal(self, request: Request) -> cedarpy.Entities:
        """The principal, parsed once for as long as it stays in use."""
        entity = request.principal
        known = self._principals.get(entity.text)
        if known is None:
            tags = entity.tags if self._all_tags else {t: entity.tags[t] for t in self._tags if t in entity.tags}
            known = _entities(entity, self.attrs(request, "principal"), tags)
            if len(self._principals) >= _KEPT_PRINCIPALS:
                self._principals.clear()
            self._principals[entity.text] = known
        return known

    def attrs(self, request: Request, head: str) -> Mapping[str, object]:
        """The part of the principal's or resource's attributes, or of the context, that is read."""
        out: dict[str, object] = {}
        for names in self._attrs[head]:
            if not names:  # the whole context, as a value
                return request.context
            value = request.value((head, *names))
            if value is not MISSING:
                place = out
                for name in names[:-1]:
                    inner = place.setdefault(name, {})
                    if not isinstance(inner, dict):
                        break  # a path above it was read too: what is here already is all of it
                    place = inner
                else:
                    place[names[-1]] = dict(value) if isinstance(value, Mapping) else value
        return out
