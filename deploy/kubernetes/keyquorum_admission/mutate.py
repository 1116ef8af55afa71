"""Completing a pod that must attest: mark, runtime class, node selector, worker. What is there is never changed."""

from __future__ import annotations

from keyquorum_admission.config import Settings
from keyquorum_admission.findings import Finding
from keyquorum_admission.judge import judge_placement
from keyquorum_admission.marks import MARK, is_marked, judge_marks, requires_attestation
from keyquorum_admission.patch import Patch
from keyquorum_admission.tree import Node
from keyquorum_admission.worker import WORKER, worker_container, worker_volumes
from keyquorum_admission.workloads import Workload

__all__ = ["complete"]


def complete(
    settings: Settings, workload: Workload, old: Workload | None, by_namespace: bool
) -> tuple[Patch, list[Finding]]:
    """The changes, none for a pod that is complete or need not attest, and why they contradict what the object says.

    A pod that Kubernetes no longer lets change is left to the verdict. Raises :class:`MalformedError` as
    :func:`~keyquorum_admission.judge.judge` does.
    """
    patch = Patch(workload.root.members())
    findings = judge_marks(workload, old, by_namespace)
    fixed = old is not None and workload.template_is_fixed
    if findings or fixed or not requires_attestation(workload, by_namespace):
        return patch, findings
    pod, path = workload.pod, workload.pod_path
    if not is_marked(pod.child("metadata")):
        patch.set((*path, "metadata", "annotations", MARK), "true")
    spec = pod.child("spec")
    if not spec.child("runtimeClassName").text():
        patch.set((*path, "spec", "runtimeClassName"), settings.runtime_classes[0])
    chosen = spec.child("nodeSelector").texts()
    for name, value in settings.node_selector.items():
        if name not in chosen:
            patch.set((*path, "spec", "nodeSelector", name), value)
    if WORKER not in _names(spec.child("containers")):
        patch.append((*path, "spec", "containers"), worker_container(settings, pod))
    there = _names(spec.child("volumes"))
    for volume in worker_volumes(settings):
        if volume["name"] not in there:
            patch.append((*path, "spec", "volumes"), volume)
    completed = Workload(workload.kind, Node(patch.document, workload.root.path), path)
    return patch, judge_placement(settings, completed)


def _names(items: Node) -> set[str]:
    return {each.child("name").text() for each in items.items()}
