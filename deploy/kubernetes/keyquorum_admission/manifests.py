"""Judging manifest files before they reach a cluster: what the webhook would make of them on CREATE."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml

from keyquorum_admission.config import Settings
from keyquorum_admission.findings import Finding
from keyquorum_admission.judge import judge
from keyquorum_admission.marks import judge_namespace, requires_attestation
from keyquorum_admission.mutate import complete
from keyquorum_admission.tree import Node
from keyquorum_admission.workloads import WORKLOADS, workload
from keyquorum_core.errors import MalformedError, Reason

__all__ = ["MAX_MANIFEST", "Verdict", "judge_manifest", "read_manifests"]

MAX_MANIFEST: Final = 4 << 20
_MAX_DOCUMENTS: Final = 1000
_MAX_DEPTH: Final = 64


@dataclass(frozen=True, slots=True)
class Verdict:
    """``outcome``: ``compliant``, ``refused``, ``not-required`` (it need not attest) or ``not-judged`` (it holds no
    pod). ``completed``: the object as the mutating webhook leaves it."""

    kind: str
    name: str
    outcome: str
    findings: tuple[Finding, ...]
    completed: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "name": self.name,
            "outcome": self.outcome,
            "findings": [each.as_dict() for each in self.findings],
        }


class _Loader(yaml.SafeLoader):
    """YAML without aliases, which could grow without bound, and without members said twice, which two readers may read
    differently."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", None)
        if self._depth > _MAX_DEPTH:
            problem = f"nested deeper than {_MAX_DEPTH} levels"
            raise yaml.composer.ComposerError(None, None, problem, None)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) != len(names):
            raise yaml.constructor.ConstructorError(None, None, "a member is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_manifests(data: bytes, what: str) -> list[dict[str, Any]]:
    """The objects of a YAML or JSON file, those of a List one by one. Raises :class:`MalformedError`."""
    if len(data) > MAX_MANIFEST:
        raise MalformedError(Reason.TOO_LARGE, f"{what} is too large", expected=f"at most {MAX_MANIFEST} bytes")
    found: list[dict[str, Any]] = []
    try:
        for document in yaml.load_all(data.decode("utf-8"), Loader=_Loader):
            found += _objects(document, what)
            if len(found) > _MAX_DOCUMENTS:
                raise MalformedError(Reason.TOO_LARGE, f"{what} has more than {_MAX_DOCUMENTS} objects")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise MalformedError(Reason.MALFORMED, f"{what} is not YAML{where}", actual=str(problem)[:200]) from None
    return found


def _objects(document: object, what: str) -> Iterator[dict[str, Any]]:
    if document is None:
        return
    _check(document, what)
    root = Node(document, "")
    if root.child("kind").text() == "List":
        for item in root.child("items").items():
            yield item.members()
    else:
        yield root.members()


def _check(value: object, what: str) -> None:
    """Refuse what JSON does not have: keys that are no strings, dates, sets, bytes."""
    if isinstance(value, dict):
        for name, member in value.items():
            if not isinstance(name, str):
                raise MalformedError(
                    Reason.MALFORMED, f"{what} has a key that is no string", expected="string", actual=repr(name)[:60]
                )
            _check(member, what)
    elif isinstance(value, list):
        for member in value:
            _check(member, what)
    elif isinstance(value, datetime.date | bytes | set | tuple):
        raise MalformedError(
            Reason.MALFORMED,
            f"{what} has a value that JSON does not have",
            expected="text in quotes",
            actual=type(value).__name__,
        )


def judge_manifest(settings: Settings, document: dict[str, Any], by_namespace: bool) -> Verdict:
    """What becomes of it: mutation, then the verdict on what that leaves. Raises :class:`MalformedError`."""
    root = Node(document, "")
    api_version, kind = root.child("apiVersion").text(), root.child("kind").text()
    metadata = root.child("metadata")
    name = metadata.child("name").text() or metadata.child("generateName").text()
    if (api_version, kind) == ("v1", "Namespace"):
        found = judge_namespace(root, None)
        return Verdict(kind, name, "refused" if found else "compliant", tuple(found))
    if (api_version, kind) not in WORKLOADS:
        return Verdict(kind, name, "not-judged", ())
    asked = workload(root, api_version, kind)
    patch, findings = complete(settings, asked, None, by_namespace)
    if not findings and not requires_attestation(asked, by_namespace):
        return Verdict(kind, name, "not-required", ())
    completed = workload(Node(patch.document, ""), api_version, kind)
    findings = findings or judge(settings, completed, None, by_namespace)
    return Verdict(kind, name, "refused" if findings else "compliant", tuple(findings), patch.document)
