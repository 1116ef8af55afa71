"""The worker's container: what is put into a pod, and whether the one that a pod has is that very one.

The worker makes its keys in memory, has the enclave's hardware sign evidence over them, and receives the job's key into
memory alone: nothing of it is in the pod's description, a Secret, or a file. What it mounts is a folder of
configuration (read-only; with its TLS identity, which lets it talk to the coordinator and opens nothing) and a folder
in memory for the job's plaintext.
"""

from __future__ import annotations

import re
from typing import Any, Final

from keyquorum_admission.config import PINNED, Settings
from keyquorum_admission.findings import Finding, Rule
from keyquorum_admission.tree import Node

__all__ = ["JOB_ID", "WORKER", "WORKER_VOLUMES", "judge_worker", "worker_container", "worker_volumes"]

WORKER: Final = "keyquorum-worker"
JOB_ID: Final = "compute.secure/job-id"
"""Annotation on the pod: the one job that its worker is to do."""
_JOB: Final = re.compile(r"[a-z2-7]{26}", re.ASCII)
_CONFIG: Final = "keyquorum-config"
_MEMORY: Final = "keyquorum-memory"
WORKER_VOLUMES: Final = frozenset({_CONFIG, _MEMORY})
_CONFIG_PATH: Final = "/etc/keyquorum"
_MEMORY_PATH: Final = "/run/keyquorum"
_TOKEN_PATH: Final = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - a path
_DEFAULTS: Final[dict[str, tuple[object, ...]]] = {
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "mountPropagation": ("None",),
    "optional": (False,),
    "privileged": (False,),
    "procMount": ("Default",),
    "readOnly": (False,),
    "recursiveReadOnly": ("Disabled",),
    "terminationMessagePath": ("/dev/termination-log",),
    "terminationMessagePolicy": ("File",),
}
"""What the API server fills in by itself, and values that say the same."""
_FREE: Final = frozenset({"resources", "resizePolicy"})
"""Members that other controllers may set as they like: they can starve a worker, not open it."""


def worker_container(settings: Settings, pod: Node) -> dict[str, Any]:
    """The container for this pod: its job by annotation, else one job where the pod ends, else job after job."""
    job = pod.at("metadata", "annotations").texts().get(JOB_ID, "")
    restarts = pod.at("spec", "restartPolicy").text() in ("", "Always")
    work = job or ("--queue" if restarts else "--once")
    worker = settings.worker
    user: dict[str, Any] = {"runAsUser": worker.run_as_user}
    if worker.run_as_user:
        user["runAsNonRoot"] = True
    resources: dict[str, Any] = {"limits": dict(worker.limits)}
    if worker.requests:
        resources["requests"] = dict(worker.requests)
    return {
        "name": WORKER,
        "image": worker.image,
        "command": ["keyquorum-worker"],
        "args": ["run", "--dir", _CONFIG_PATH, work],
        "env": [{"name": "TMPDIR", "value": _MEMORY_PATH}],
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "seccompProfile": {"type": "RuntimeDefault"},
            **user,
        },
        "volumeMounts": [
            {"name": _CONFIG, "mountPath": _CONFIG_PATH, "readOnly": True},
            {"name": _MEMORY, "mountPath": _MEMORY_PATH},
        ],
    }


def worker_volumes(settings: Settings) -> list[dict[str, Any]]:
    items = [{"key": name, "path": name} for name in ("tls.crt", "tls.key")]
    return [
        {
            "name": _CONFIG,
            "projected": {
                "defaultMode": 0o444,
                "sources": [
                    {"configMap": {"name": settings.worker.config_map}},
                    {"secret": {"name": settings.worker.tls_secret, "items": items}},
                ],
            },
        },
        {"name": _MEMORY, "emptyDir": {"medium": "Memory", "sizeLimit": settings.worker.memory}},
    ]


def judge_worker(settings: Settings, pod: Node) -> list[Finding]:
    """Whether the pod has exactly one worker, as configured, and its volumes, which nothing else mounts."""
    findings = []
    job = pod.at("metadata", "annotations").texts().get(JOB_ID)
    if job is not None and not _JOB.fullmatch(job):
        field = f"{pod.path}.metadata.annotations[{JOB_ID!r}]".lstrip(".")
        findings.append(Finding(Rule.WORKER, field, "not a job id", "26 characters of base32", repr(job[:40])))
    spec = pod.child("spec")
    containers = [each for each in spec.child("containers").items() if each.child("name").text() == WORKER]
    if len(containers) != 1:
        field = spec.child("containers").path
        message = "the worker is missing" if not containers else "there is more than one worker"
        findings.append(Finding(Rule.WORKER, field, message, f"one container {WORKER!r}", str(len(containers))))
    for container in containers:
        findings += _judge_container(settings, container, worker_container(settings, pod))
    for expected in worker_volumes(settings):
        found = [each for each in spec.child("volumes").items() if each.child("name").text() == expected["name"]]
        if len(found) != 1:
            message, field = "a volume of the worker is missing or there twice", spec.child("volumes").path
            findings.append(Finding(Rule.WORKER, field, message, f"one volume {expected['name']!r}", str(len(found))))
        for volume in found:
            findings += _differences(expected, volume)
    return findings


def _judge_container(settings: Settings, container: Node, expected: dict[str, Any]) -> list[Finding]:
    findings = []
    image = container.child("image")
    pinned = PINNED.fullmatch(image.text())
    if pinned is None or pinned[1] not in settings.worker.digests:
        wanted = f"an image by one of {len(settings.worker.digests)} digests of the configuration"
        findings.append(
            Finding(Rule.IMAGE, image.path, "not an image of the worker", wanted, image.text()[:200] or "nothing")
        )
    wanted_mounts = expected.pop("volumeMounts")
    del expected["image"], expected["resources"]
    members = {name: value for name, value in container.members().items() if name not in ("image", "volumeMounts")}
    findings += _differences(expected, Node(members, container.path))
    mounts = {each.child("name").text(): each for each in container.child("volumeMounts").items() if not _token(each)}
    count = sum(not _token(each) for each in container.child("volumeMounts").items())
    if len(mounts) != len(wanted_mounts) or count != len(wanted_mounts):
        names = ", ".join(each["name"] for each in wanted_mounts)
        field = container.child("volumeMounts").path
        findings.append(Finding(Rule.WORKER, field, "the worker mounts something else", names, ", ".join(mounts)[:200]))
    for wanted in wanted_mounts:
        if wanted["name"] in mounts:
            findings += _differences(wanted, mounts[wanted["name"]])
    return findings


def _token(mount: Node) -> bool:
    """Whether this is the service account's token, which the API server mounts into every container."""
    return mount.child("mountPath").text() == _TOKEN_PATH and mount.child("readOnly").flag()


def _differences(expected: object, actual: Node) -> list[Finding]:
    """The places where ``actual`` is not ``expected``, but for :data:`_DEFAULTS` and :data:`_FREE`."""
    value = actual.value
    if isinstance(expected, dict) and isinstance(value, dict):
        found = []
        for name, wanted in expected.items():
            found += _differences(wanted, actual.child(name))
        for name in value.keys() - expected.keys() - _FREE:
            extra = actual.child(name)
            if not extra.present or any(_same(extra.value, each) for each in _DEFAULTS.get(name, ())):
                continue
            found.append(
                Finding(
                    Rule.WORKER, extra.path, "the worker has something that is not configured", "nothing", "a value"
                )
            )
        return found
    if isinstance(expected, list) and isinstance(value, list) and len(expected) == len(value):
        return [
            each for wanted, item in zip(expected, actual.items(), strict=True) for each in _differences(wanted, item)
        ]
    if not isinstance(expected, dict | list) and _same(expected, value):
        return []
    shown = "nothing" if value is None else "another value"
    return [Finding(Rule.WORKER, actual.path, "the worker is not as configured", _shown(expected), shown)]


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(value)}"
    return f"{len(value)} items" if isinstance(value, list) else str(value)
