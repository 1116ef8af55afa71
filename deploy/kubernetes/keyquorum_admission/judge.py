"""The verdict on a pod that must attest, from the object as it will be stored, whoever changed it before."""

from __future__ import annotations

from typing import Final

from keyquorum_admission.config import PINNED, Settings
from keyquorum_admission.containers import judge_container, judge_security_context
from keyquorum_admission.findings import Finding, Rule
from keyquorum_admission.marks import MARK, is_marked, judge_marks, requires_attestation
from keyquorum_admission.tree import Node
from keyquorum_admission.worker import WORKER_VOLUMES, judge_worker
from keyquorum_admission.workloads import Workload

__all__ = ["judge", "judge_placement"]

_HOST_FLAGS: Final = ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")
_VOLUMES: Final = frozenset(
    {"emptyDir", "configMap", "downwardAPI", "projected", "persistentVolumeClaim", "ephemeral", "image"}
)
_PROJECTIONS: Final = frozenset(
    {"configMap", "downwardAPI", "serviceAccountToken", "clusterTrustBundle", "podCertificate"}
)
_RUNTIME_PREFIXES: Final = ("io.katacontainers.", "io.kubernetes.cri-o.", "cri-o.")
"""Annotations by which a pod reconfigures its own virtual machine: kernel arguments, debug consoles, devices."""
_APPARMOR: Final = "container.apparmor.security.beta.kubernetes.io/"


def judge(settings: Settings, workload: Workload, old: Workload | None, by_namespace: bool) -> list[Finding]:
    """Every rule that the object breaks; none, when it need not attest. ``old``: the object before an update.

    An update that leaves a pod as it was is let through where refusing could only leave finalizers behind: of an object
    whose deletion was asked for, and of a Pod that was there before it had to attest.
    Raises :class:`MalformedError` for fields of another type than Kubernetes has there.
    """
    findings = judge_marks(workload, old, by_namespace)
    if not requires_attestation(workload, by_namespace):
        return findings
    if old is not None and (_ending(workload, old) or _untouched(workload, old)):
        return findings
    pod = workload.pod
    if not is_marked(pod.child("metadata")):
        field = f"{pod.child('metadata').path}.annotations[{MARK!r}]"
        message = "the pod itself is not marked, though it must attest: the mutating webhook did not run"
        findings.append(Finding(Rule.MARK, field, message, '"true"', "nothing"))
    findings += judge_placement(settings, workload)
    findings += _node_name(workload, old)
    findings += _host(pod.child("spec"))
    findings += _annotations(settings, pod.at("metadata", "annotations"))
    findings += _volumes(pod.at("spec", "volumes"))
    for name in ("initContainers", "containers"):
        for container in pod.at("spec", name).items():
            findings += judge_container(settings, container)
    for container in pod.at("spec", "ephemeralContainers").items():
        message = "a container added to a running pod could look into it"
        findings.append(
            Finding(Rule.EPHEMERAL_CONTAINER, container.path, message, "no ephemeral containers", "a container")
        )
        findings += judge_container(settings, container)
    return findings + judge_worker(settings, pod)


def judge_placement(settings: Settings, workload: Workload) -> list[Finding]:
    """Runtime class and node selector: what mutation sets where they are absent, and never overrides."""
    spec = workload.pod.child("spec")
    findings = []
    runtime_class = spec.child("runtimeClassName")
    if runtime_class.text() not in settings.runtime_classes:
        expected = f"one of {', '.join(settings.runtime_classes)}"
        actual = runtime_class.text()[:100] or "nothing"
        findings.append(
            Finding(Rule.RUNTIME_CLASS, runtime_class.path, "not a confidential runtime class", expected, actual)
        )
    selector = spec.child("nodeSelector")
    chosen = selector.texts()
    for name, value in settings.node_selector.items():
        if chosen.get(name) != value:
            field = f"{selector.path}[{name!r}]"
            actual = repr(chosen[name][:100]) if name in chosen else "nothing"
            findings.append(Finding(Rule.NODE_SELECTOR, field, "may run on another node", repr(value), actual))
    return findings


def _ending(workload: Workload, old: Workload) -> bool:
    """Whether deletion was asked for, which only the API server writes, and the pod stays what it was."""
    return (
        old.root.at("metadata", "deletionTimestamp").present
        and workload.pod.child("spec").value == old.pod.child("spec").value
    )


def _untouched(workload: Workload, old: Workload) -> bool:
    """Whether nothing that is judged here changed in a Pod: a Job's controller, for one, takes its finalizer off."""
    if workload.kind != "Pod":
        return False
    parts = (("metadata", "labels"), ("metadata", "annotations"), ("spec",))
    return all(workload.root.at(*each).value == old.root.at(*each).value for each in parts)


def _node_name(workload: Workload, old: Workload | None) -> list[Finding]:
    """A pod that names its node goes past the scheduler, and so past the node selector. Once scheduled it has one."""
    name = workload.pod.at("spec", "nodeName")
    if not name.text():
        return []
    if workload.kind == "Pod" and old is not None and old.pod.at("spec", "nodeName").text() == name.text():
        return []
    message = "names its node instead of selecting one"
    return [Finding(Rule.NODE_NAME, name.path, message, "nothing", name.text()[:100])]


def _host(spec: Node) -> list[Finding]:
    message = "shares a namespace that the worker must have to itself"
    findings = [
        Finding(Rule.HOST, spec.child(name).path, message, "false", "true")
        for name in _HOST_FLAGS
        if spec.child(name).flag()
    ]
    return findings + judge_security_context(spec.child("securityContext"))


def _annotations(settings: Settings, annotations: Node) -> list[Finding]:
    findings = []
    for name, value in annotations.texts().items():
        field = f"{annotations.path}[{name[:100]!r}]"
        if name.startswith(_RUNTIME_PREFIXES) and name not in settings.runtime_annotations:
            message = "reconfigures the runtime"
            findings.append(
                Finding(Rule.RUNTIME_ANNOTATION, field, message, "one of runtime_annotations", "another annotation")
            )
        if name.startswith(_APPARMOR) and value == "unconfined":
            findings.append(Finding(Rule.PRIVILEGE, field, "unconfined", "runtime/default", "unconfined"))
    return findings


def _volumes(volumes: Node) -> list[Finding]:
    findings = []
    for volume in volumes.items():
        name = volume.child("name").text()
        if name in WORKER_VOLUMES:
            continue  # the worker's own rules hold it to one exact form
        kinds = [kind for kind, value in volume.members().items() if kind != "name" and value is not None]
        for kind in kinds:
            source = volume.child(kind)
            if kind == "secret":
                findings.append(_secret(source))
            elif kind == "hostPath":
                findings.append(Finding(Rule.HOST, source.path, "a folder of the host", "no hostPath", "hostPath"))
            elif kind not in _VOLUMES:
                expected = f"one of {', '.join(sorted(_VOLUMES))}"
                findings.append(
                    Finding(Rule.VOLUME, source.path, "a kind of volume that cannot be judged", expected, kind[:60])
                )
            elif kind == "projected":
                findings += _projected(source)
            elif kind == "image" and not PINNED.fullmatch(source.child("reference").text()):
                shown = source.child("reference").text()[:200] or "nothing"
                message = "an image that can change under its name"
                findings.append(Finding(Rule.IMAGE, source.path, message, "name@sha256:…", shown))
    return findings


def _projected(source: Node) -> list[Finding]:
    findings = []
    for part in source.child("sources").items():
        for kind, value in part.members().items():
            if value is None or kind in _PROJECTIONS:
                continue
            if kind == "secret":
                findings.append(_secret(part.child(kind)))
            else:
                expected = f"one of {', '.join(sorted(_PROJECTIONS))}"
                message = "a projection that cannot be judged"
                findings.append(Finding(Rule.VOLUME, part.child(kind).path, message, expected, kind[:60]))
    return findings


def _secret(node: Node) -> Finding:
    message = "a Secret is plain to the cluster's operators: a key belongs into the worker's memory"
    return Finding(Rule.SECRET, node.path, message, "no Secret", "a Secret")
