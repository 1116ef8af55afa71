"""The mark ``compute.secure/require-attestation``: a label or an annotation, true or false, and once true, always true.

On a Namespace only the label counts, since a webhook's ``namespaceSelector`` reads labels.
"""

from __future__ import annotations

from typing import Final

from keyquorum_admission.findings import Finding, Rule
from keyquorum_admission.tree import Node
from keyquorum_admission.workloads import Workload

__all__ = ["MARK", "is_marked", "judge_marks", "judge_namespace", "requires_attestation"]

MARK: Final = "compute.secure/require-attestation"
_VALUES: Final = '"true" or "false"'


def _values(metadata: Node) -> list[tuple[str, str]]:
    """(path, value) of each mark there."""
    return [
        (f"{node.path}[{MARK!r}]", found)
        for node in (metadata.child("labels"), metadata.child("annotations"))
        if (found := node.texts().get(MARK)) is not None
    ]


def is_marked(metadata: Node) -> bool:
    return any(value == "true" for _, value in _values(metadata))


def requires_attestation(workload: Workload, by_namespace: bool) -> bool:
    """Whether the pod must attest: its namespace says so, or any metadata from the object's to the pod's."""
    return by_namespace or any(is_marked(each) for each in workload.metadata())


def judge_marks(workload: Workload, old: Workload | None, by_namespace: bool) -> list[Finding]:
    """What is wrong with the marks themselves. ``old`` is the object before an update."""
    findings = []
    required = requires_attestation(workload, by_namespace)
    for metadata in workload.metadata():
        for field, value in _values(metadata):
            if value not in ("true", "false"):
                findings.append(Finding(Rule.MARK, field, "not a value of the mark", _VALUES, repr(value[:60])))
            elif value == "false" and required:
                why = "its namespace requires attestation" if by_namespace else "another mark on it says true"
                findings.append(Finding(Rule.MARK, field, f"the mark says false, but {why}", '"true"', '"false"'))
    if old is not None:
        for before, now in zip(old.metadata(), workload.metadata(), strict=True):
            if is_marked(before) and not is_marked(now):
                findings.append(_removed(now))
    return findings


def judge_namespace(namespace: Node, old: Node | None) -> list[Finding]:
    """What is wrong with the mark on a Namespace."""
    metadata = namespace.child("metadata")
    labels, annotations = metadata.child("labels"), metadata.child("annotations")
    findings = []
    value = labels.texts().get(MARK)
    if value is not None and value not in ("true", "false"):
        field = f"{labels.path}[{MARK!r}]"
        findings.append(Finding(Rule.MARK, field, "not a value of the mark", _VALUES, repr(value[:60])))
    if MARK in annotations.texts():
        field = f"{annotations.path}[{MARK!r}]"
        findings.append(Finding(Rule.MARK, field, "on a namespace an annotation does nothing", "a label", "annotation"))
    if old is not None and old.at("metadata", "labels").texts().get(MARK) == "true" and value != "true":
        findings.append(_removed(metadata))
    return findings


def _removed(metadata: Node) -> Finding:
    field = f"{metadata.path}.labels/annotations[{MARK!r}]"
    return Finding(
        Rule.MARK, field, "the mark cannot be taken back; delete the object instead", '"true"', "not true any more"
    )
