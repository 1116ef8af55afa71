"""Kubernetes objects and reviews for tests, as an API server would send them."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

from keyquorum_admission.config import Settings, parse_config
from keyquorum_admission.review import Answer, Seat, answer

__all__ = [
    "APP_IMAGE",
    "CONFIG",
    "MARK",
    "UID",
    "WORKER_DIGEST",
    "apply_patch",
    "ask",
    "completed",
    "pod",
    "review",
    "rules",
    "settings",
    "wrap",
]  # fmt: skip

MARK = "compute.secure/require-attestation"
UID = "705ab4f5-6393-11e8-b7cc-42010a800002"
WORKER_DIGEST = "sha256:" + "5a" * 32
APP_IMAGE = "registry.example/app@sha256:" + "c0" * 32
CONFIG = f"""
listen = "127.0.0.1:0"
tls_certificate = "tls.crt"
tls_key = "tls.key"
reload_seconds = 1

runtime_classes = ["kata-qemu-snp", "kata-qemu-tdx"]
other_images = "pinned"
runtime_annotations = ["io.katacontainers.config.hypervisor.cc_init_data"]

[node_selector]
"katacontainers.io/kata-runtime" = "true"
"amd.feature.node.kubernetes.io/snp" = "true"

[worker]
image = "registry.example/keyquorum-worker@{WORKER_DIGEST}"
digests = ["{WORKER_DIGEST}", "sha256:{"5b" * 32}"]
config_map = "keyquorum-worker"
tls_secret = "keyquorum-worker-tls"
memory = "4Gi"
run_as_user = 65532

[worker.limits]
cpu = "8"
memory = "16Gi"
"nvidia.com/gpu" = "1"
"""
_TEMPLATES = {
    "ReplicationController": ("v1", ("spec", "template")),
    "Deployment": ("apps/v1", ("spec", "template")),
    "ReplicaSet": ("apps/v1", ("spec", "template")),
    "StatefulSet": ("apps/v1", ("spec", "template")),
    "DaemonSet": ("apps/v1", ("spec", "template")),
    "Job": ("batch/v1", ("spec", "template")),
    "CronJob": ("batch/v1", ("spec", "jobTemplate", "spec", "template")),
}


def settings(text: str = CONFIG) -> Settings:
    return parse_config(text.encode(), Path("/etc/keyquorum-admission"))[1]


def pod(marked: bool = True, **spec: Any) -> dict[str, Any]:
    """A pod with one container of its own, as it reaches a webhook on CREATE; ``spec`` replaces members of its spec."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "h2-vqe",
            "namespace": "jobs",
            "creationTimestamp": None,
            "labels": {"app": "h2-vqe"},
            "annotations": {MARK: "true"} if marked else {"note": "nothing"},
        },
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": "default",
            "containers": [{"name": "progress", "image": APP_IMAGE, "resources": {}}],
            **spec,
        },
    }


def wrap(kind: str, of: dict[str, Any]) -> dict[str, Any]:
    """A workload of ``kind`` whose template is the pod ``of``."""
    if kind == "Pod":
        return of
    api_version, path = _TEMPLATES[kind]
    at: dict[str, Any] = {"metadata": {k: v for k, v in of["metadata"].items() if k in ("labels", "annotations")},
                          "spec": of["spec"]}  # fmt: skip
    for name in reversed(path):
        at = {name: at}
    return {"apiVersion": api_version, "kind": kind, "metadata": {"name": "h2-vqe", "namespace": "jobs"}, **at}


def review(
    of: dict[str, Any] | None, operation: str = "CREATE", old: dict[str, Any] | None = None, **members: Any
) -> dict[str, Any]:
    """The AdmissionReview for an object; ``members`` replace those of its request."""
    shown = of or old or {}
    group, _, version = shown.get("apiVersion", "v1").rpartition("/")
    kind = shown.get("kind", "Pod")
    request = {
        "uid": UID,
        "kind": {"group": group, "version": version, "kind": kind},
        "resource": {"group": group, "version": version, "resource": kind.lower() + "s"},
        "name": shown.get("metadata", {}).get("name", ""),
        "namespace": "jobs",
        "operation": operation,
        "userInfo": {"username": "alice", "groups": ["system:authenticated"]},
        "object": of,
        "oldObject": old,
        "dryRun": False,
        **members,
    }
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}


def ask(seat: Seat, of: dict[str, Any] | bytes, with_settings: Settings | None = None) -> Answer:
    body = of if isinstance(of, bytes) else json.dumps(of).encode()
    return answer(with_settings or settings(), seat, body)


def rules(given: Answer) -> set[str]:
    """The codes of a refusal; none for an answer that allows."""
    assert given.document["response"]["allowed"] is (not given.findings and given.error is None)
    return {str(each.rule) for each in given.findings}


def patch_of(given: Answer) -> list[dict[str, Any]]:
    response = given.document["response"]
    if "patch" not in response:
        return []
    assert response["patchType"] == "JSONPatch"
    operations: list[dict[str, Any]] = json.loads(base64.b64decode(response["patch"], validate=True))
    return operations


def completed(of: dict[str, Any], by_namespace: bool = False) -> dict[str, Any]:
    """The object after mutation, with the patch applied as an API server would."""
    given = ask(Seat.MUTATE_REQUIRED if by_namespace else Seat.MUTATE, review(of))
    assert given.document["response"]["allowed"], given.findings or given.error
    return apply_patch(of, patch_of(given))


def apply_patch(document: dict[str, Any], operations: list[dict[str, Any]]) -> dict[str, Any]:
    """RFC 6902 for ``add``, written from the RFC and not from the product: a parent that is missing is an error."""
    out: Any = copy.deepcopy(document)
    for operation in operations:
        assert set(operation) == {"op", "path", "value"}
        assert operation["op"] == "add"
        assert operation["path"].startswith("/")
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"][1:].split("/")]
        at = out
        for name in parents:
            at = at[int(name)] if isinstance(at, list) else at[name]
        value = copy.deepcopy(operation["value"])
        if isinstance(at, list):
            at.insert(len(at) if last == "-" else int(last), value)
        else:
            assert isinstance(at, dict)
            at[last] = value
    assert isinstance(out, dict)
    return out
