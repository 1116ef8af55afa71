"""Policies as text, and as what Cedar is asked with: bounded, parsed once, held to the schema, each with an id.

Stricter than Cedar where Cedar is lenient: every policy has an ``@id`` of its own, which decisions name; templates are
refused; attributes are only read of ``principal``, ``resource`` and ``context``, since no other entity exists when a
request is decided. Cedar's parser recurses, so brackets and operators are counted before it sees the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

import cedarpy
from cedarpy import pst

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from keyquorum_core.policy.facts import Path
from keyquorum_core.policy.lists import LIST_KINDS
from keyquorum_core.policy.schema import SCHEMA_TEXT, schema
from keyquorum_core.policy.syntax import (
    Condition,
    actions_of,
    conditions_of,
    equalities,
    paths_of,
    principals_of,
    walk,
)

__all__ = ["MAX_POLICIES", "MAX_TEXT", "Policy", "PolicySet", "handle", "load_policies"]

MAX_TEXT: Final = 1 << 20
"""Bytes of all files of a set together."""
MAX_POLICIES: Final = 4096
_MAX_FILES: Final = 64
_MAX_OPERATORS: Final = 256
_MAX_BRACKETS: Final = 32
_FILE_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?\.cedar", re.ASCII)
_ID: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?", re.ASCII)
_TOKEN: Final = re.compile(
    r"""(?P<skip>"(?:[^"\\]|\\.)*"|//[^\n]*)|(?P<open>[\[({])|(?P<close>[\])}])|(?P<end>;)"""
    r"""|(?P<operator>&&|\|\||[.!<>=+*-]|\b(?:if|then|else|in|is|has|like)\b)""",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy. ``equalities``: places that must hold one of these strings for it to matter at all."""

    id: str
    effect: Literal["permit", "forbid"]
    tree: pst.Template
    file: str
    conditions: tuple[Condition, ...]
    actions: tuple[str, ...]
    equalities: Mapping[Path, frozenset[str]]
    paths: frozenset[Path]

    def concerns(self, action: str, principal_type: str) -> bool:
        """Whether its scope lets this action of this type of principal through."""
        return action in self.actions and principal_type in principals_of(self.tree, action)

    def __str__(self) -> str:
        return f"{self.effect} {self.id!r}"


@dataclass(frozen=True, slots=True)
class PolicySet:
    """Validated policies, sorted by id: the order in which files and policies came decides nothing."""

    policies: tuple[Policy, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(policy.id for policy in self.policies)

    def policy(self, policy_id: str) -> Policy:
        for policy in self.policies:
            if policy.id == policy_id:
                return policy
        raise MalformedError(
            Reason.POLICY, "no such policy", expected=", ".join(self.ids)[:200], actual=ascii(policy_id[:64])
        )

    @property
    def lists(self) -> tuple[str, ...]:
        """Names of the controlled lists that some policy reads (``export``, ``sanctions``)."""
        read = {path[1] for policy in self.policies for path in policy.paths if path[0] == "context" and len(path) > 1}
        whole = any(path == ("context",) for policy in self.policies for path in policy.paths)
        return tuple(name for name in LIST_KINDS if whole or name in read)


def handle(policies: tuple[Policy, ...]) -> cedarpy.PolicySet:
    """What Cedar evaluates, with our ids as Cedar's own."""
    return cedarpy.PolicySet.from_pst(
        pst.PolicySet(
            templates=pst.FrozenMap(),
            static_policies=pst.FrozenMap({policy.id: policy.tree for policy in policies}),
            template_links=(),
        )
    )


def load_policies(files: Mapping[str, str]) -> PolicySet:
    """Parse and validate. ``files``: text by name (``NAME.cedar``). Raises :class:`MalformedError`: ``POLICY`` for what
    the language or the schema refuses, with file, policy, what was expected and what stands there; ``TOO_LARGE``."""
    if not 1 <= len(files) <= _MAX_FILES:
        raise _bad("a policy set is made of files", expected=f"1…{_MAX_FILES} files", actual=len(files))
    if sum(len(text.encode("utf-8", "replace")) for text in files.values()) > MAX_TEXT:
        raise MalformedError(Reason.TOO_LARGE, "the policies are too large", expected=f"at most {MAX_TEXT} bytes")
    found: dict[str, Policy] = {}
    for name in sorted(files):
        if not _FILE_NAME.fullmatch(name):
            raise _bad("bad name of a policy file", expected=_FILE_NAME.pattern, actual=ascii(name[:80]))
        for policy in _read(name, files[name]):
            if policy.id in found:
                raise _bad(
                    f"two policies have the id {policy.id!r}",
                    expected="every @id once",
                    actual=f"in {found[policy.id].file} and in {name}",
                )
            found[policy.id] = policy
    if not 1 <= len(found) <= MAX_POLICIES:
        raise _bad("bad number of policies", expected=f"1…{MAX_POLICIES}", actual=len(found))
    return PolicySet(tuple(found[policy_id] for policy_id in sorted(found)))


def _read(name: str, text: str) -> list[Policy]:
    _check_shape(name, text)
    try:
        trees = cedarpy.policies_to_pst(text)
    except ValueError as error:
        raise _bad(f"{name} is not Cedar", expected="policies in Cedar's syntax", actual=str(error)[:300]) from None
    if trees.templates:
        raise _bad(f"{name} holds a template", expected="policies without ?principal and ?resource", actual="slots")
    ids = {position: _id_of(name, tree) for position, tree in trees.static_policies.items()}
    _validate(name, text, ids)
    return [_policy(name, replace(tree, id=ids[position])) for position, tree in trees.static_policies.items()]


def _check_shape(name: str, text: str) -> None:
    depth = operators = 0
    for token in _TOKEN.finditer(text):
        match token.lastgroup:
            case "open":
                depth += 1
            case "close":
                depth -= 1
            case "end":
                operators = 0
            case "operator":
                operators += 1
        if depth > _MAX_BRACKETS or operators > _MAX_OPERATORS:
            raise MalformedError(
                Reason.TOO_LARGE,
                f"a policy in {name} is too complicated",
                expected=f"at most {_MAX_BRACKETS} nested brackets and {_MAX_OPERATORS} operators",
                actual=f"more, at line {text.count(chr(10), 0, token.start()) + 1}",
                next_step="Split it into several policies.",
            )


def _id_of(name: str, tree: pst.Template) -> str:
    found = tree.annotations.get("id", "")
    if not _ID.fullmatch(found):
        raise _bad(
            f"a policy in {name} has no usable @id",
            expected=f'@id("…") matching {_ID.pattern}',
            actual=ascii(found[:80]) if found else "none",
            next_step="Decisions name the policies that decided, so every policy needs a name.",
        )
    return found


def _validate(name: str, text: str, ids: Mapping[str, str]) -> None:
    result = cedarpy.validate_policies(text, schema())
    if result.validation_passed:
        return
    error = result.errors[0] if result.errors else None
    position = error.policy_id if error is not None else ""
    message = error.error if error is not None else "unknown"
    policy_id = ids.get(position, position)
    found = re.search(r"attribute `(\w+)`.*entity type `(\w+)`", message)
    expected = f"attributes of {found[2]}: {', '.join(attributes(found[2]))}" if found else "what the schema describes"
    raise MalformedError(
        Reason.POLICY,
        f"policy {policy_id!r} in {name} does not fit the schema",
        expected=expected,
        actual=message.replace(f"for policy `{position}`, ", "")[:300],
        next_step="See docs/spec/policy.md for the schema.",
        details={"policy": policy_id},
    )


def attributes(entity_type: str) -> list[str]:
    """Names of an entity type's attributes, for error messages."""
    body = re.search(rf"entity {re.escape(entity_type)} = \{{(.*?)\}}", SCHEMA_TEXT, re.DOTALL)
    return re.findall(r"^\s*(\w+):", body[1], re.MULTILINE) if body else []


def _policy(name: str, tree: pst.Template) -> Policy:
    conditions = conditions_of(tree)
    for condition in conditions:
        for each in walk(condition.expr):
            if isinstance(each, pst.GetAttr | pst.HasAttr) and isinstance(each.base, pst.EntityLit):
                raise _bad(
                    f"policy {tree.id!r} in {name} reads an attribute of an entity that it names itself",
                    expected="attributes of principal, resource and context only",
                    actual=str(each.base.value),
                )
    actions = tuple(each for each in actions_of(tree) if principals_of(tree, each))
    return Policy(
        id=tree.id,
        effect=tree.effect,
        tree=tree,
        file=name,
        conditions=conditions,
        actions=actions,
        equalities=equalities(conditions),
        paths=frozenset(path for condition in conditions for path in paths_of(condition.expr)),
    )


def _bad(message: str, *, expected: str, actual: object, next_step: str = "") -> KeyquorumError:
    return MalformedError(Reason.POLICY, message, expected=expected, actual=actual, next_step=next_step)
