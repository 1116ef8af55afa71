"""deploy/kubernetes/manifests: right by the API's own schemas, and what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from keyquorum_admission.config import parse_config
from keyquorum_admission.manifests import judge_manifest, read_manifests
from keyquorum_admission.review import Seat
from tests.support.admission import completed, pod, wrap

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "manifests"
VERSIONS = ["1.31", "1.34", "1.37"]
DOCUMENTS = [
    (path.name, document)
    for path in sorted(FOLDER.glob("*.yaml"))
    for document in read_manifests(path.read_bytes(), path.name)
]
NAMES = [f"{name}-{document['kind']}-{document['metadata']['name']}" for name, document in DOCUMENTS]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for _, document in DOCUMENTS if document["kind"] == kind]


def webhooks() -> list[dict[str, Any]]:
    found = of_kind("MutatingWebhookConfiguration") + of_kind("ValidatingWebhookConfiguration")
    assert len(found) == 2
    return [hook for document in found for hook in document["webhooks"]]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("name", "document"), DOCUMENTS, ids=NAMES)
def test_a_manifest_is_right_by_the_api_schema(name: str, document: dict[str, Any], version: str) -> None:
    if document["apiVersion"] == "cert-manager.io/v1":  # not Kubernetes' own API: it has no schema there
        assert name == "30-certificate.yaml"
        with pytest.raises(kubernetes_validate.SchemaNotFoundError):
            kubernetes_validate.validate(document, version, strict=True)
        return
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["Pod", "Deployment", "Job", "CronJob"])
def test_what_mutation_makes_is_right_by_the_api_schema(kind: str, version: str) -> None:
    of = completed(wrap(kind, pod()))
    if kind == "Deployment":
        of["spec"]["selector"] = {"matchLabels": {"app": "h2-vqe"}}
    if kind == "CronJob":
        of["spec"]["schedule"] = "@daily"
    kubernetes_validate.validate(of, version, strict=True)


def test_the_schemas_would_notice() -> None:
    broken = {**of_kind("Deployment")[0], "spec": {**of_kind("Deployment")[0]["spec"], "replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.37", strict=True)


def test_webhooks_fail_closed_and_cannot_be_walked_around() -> None:
    for hook in webhooks():
        assert hook["failurePolicy"] == "Fail"
        assert hook["matchPolicy"] == "Equivalent"
        assert hook["sideEffects"] == "None"
        assert hook["admissionReviewVersions"] == ["v1"]
        assert hook["timeoutSeconds"] <= 10
        assert "objectSelector" not in hook
        assert "matchConditions" not in hook
        excluded = hook["namespaceSelector"]["matchExpressions"][0]
        assert excluded == {"key": "kubernetes.io/metadata.name", "operator": "NotIn",
                            "values": ["keyquorum-admission", "kube-system"]}  # fmt: skip
        expressions = hook["namespaceSelector"]["matchExpressions"][1:]
        required = {"key": "compute.secure/require-attestation", "operator": "In", "values": ["true"]}
        assert expressions == ([required] if hook["clientConfig"]["service"]["path"].endswith("/required") else [])
    for hook in of_kind("MutatingWebhookConfiguration")[0]["webhooks"]:
        assert hook["reinvocationPolicy"] == "IfNeeded"


def test_every_seat_is_asked_at_the_service_that_is_there() -> None:
    service, deployment = of_kind("Service")[0], of_kind("Deployment")[0]
    assert {hook["clientConfig"]["service"]["path"] for hook in webhooks()} == {f"/v1/{seat}" for seat in Seat}
    for hook in webhooks():
        asked = hook["clientConfig"]["service"]
        assert (asked["name"], asked["namespace"]) == (service["metadata"]["name"], service["metadata"]["namespace"])
        assert asked["port"] == service["spec"]["ports"][0]["port"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    certificate = of_kind("Certificate")[-1]
    assert certificate["spec"]["dnsNames"] == [f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"]
    secrets = [
        each["secret"]["secretName"] for each in deployment["spec"]["template"]["spec"]["volumes"] if "secret" in each
    ]
    assert secrets == [certificate["spec"]["secretName"]]


def test_every_kind_with_a_pod_is_validated_with_its_subresources() -> None:
    for hook in of_kind("ValidatingWebhookConfiguration")[0]["webhooks"]:
        seen = {
            (resource, operation)
            for rule in hook["rules"]
            for resource in rule["resources"]
            for operation in rule["operations"]
        }
        kinds = [
            "pods",
            "replicationcontrollers",
            "deployments",
            "replicasets",
            "statefulsets",
            "daemonsets",
            "jobs",
            "cronjobs",
        ]
        kinds += ["pods/ephemeralcontainers", "pods/resize"]
        assert seen >= {(kind, operation) for kind in kinds for operation in ("CREATE", "UPDATE")}
        if hook["clientConfig"]["service"]["path"].endswith("/required"):
            assert seen >= {(f"pods/{each}", "CONNECT") for each in ("exec", "attach", "portforward", "proxy")}
        else:
            assert ("namespaces", "UPDATE") in seen


def test_the_webhook_runs_with_nothing_that_it_does_not_need() -> None:
    deployment = of_kind("Deployment")[0]
    spec = deployment["spec"]["template"]["spec"]
    assert deployment["spec"]["replicas"] == 2
    assert of_kind("PodDisruptionBudget")[0]["spec"]["minAvailable"] == 1
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "https", "scheme": "HTTPS"}
    assert of_kind("NetworkPolicy")[0]["spec"]["egress"] == []
    bound = {each["subjects"][0]["name"] for each in of_kind("RoleBinding")}
    assert bound == {"keyquorum-submitters"}
    assert of_kind("ClusterRole") == of_kind("ClusterRoleBinding") == []
    (role,) = of_kind("Role")
    granted = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert not {resource for resource, _ in granted} & {"secrets", "pods/exec", "pods/attach", "pods/portforward", "*"}
    assert {verb for resource, verb in granted if resource.startswith("pods")} == {"get", "list", "watch"}


def test_the_shipped_configuration_is_read_and_lets_the_shipped_job_through() -> None:
    shipped = next(each for each in of_kind("ConfigMap") if each["metadata"]["name"] == "keyquorum-admission")
    _, settings = parse_config(shipped["data"]["admission.toml"].encode(), Path("/etc/keyquorum-admission"))
    assert of_kind("RuntimeClass")[0]["metadata"]["name"] in settings.runtime_classes
    assert of_kind("RuntimeClass")[0]["scheduling"]["nodeSelector"] == settings.node_selector
    verdict = judge_manifest(settings, of_kind("Job")[0], by_namespace=True)
    assert (verdict.outcome, verdict.findings) == ("compliant", ())
    kubernetes_validate.validate(verdict.completed or {}, "1.37", strict=True)
    (namespace,) = [each for each in of_kind("Namespace") if each["metadata"]["name"] == "keyquorum-jobs"]
    assert judge_manifest(settings, namespace, False).outcome == "compliant"


def test_the_workers_configuration_is_one_that_the_worker_reads(tmp_path: Path) -> None:
    from keyquorum_gpu_worker.config import load_config

    shipped = next(each for each in of_kind("ConfigMap") if each["metadata"]["name"] == "keyquorum-worker")
    (tmp_path / "worker.toml").write_text(shipped["data"]["worker.toml"])
    config = load_config(tmp_path)
    (worker,) = [each for each in completed(pod())["spec"]["containers"] if each["name"] == "keyquorum-worker"]
    assert str(config.scratch) in [each["mountPath"] for each in worker["volumeMounts"]]
    assert {config.roster.name, config.operators.name} <= shipped["data"].keys()
    assert (config.tls_certificate.name, config.tls_key.name) == ("tls.crt", "tls.key")


def test_the_reader_of_manifests_reads_what_yaml_does() -> None:
    for path in sorted(FOLDER.glob("*.yaml")):
        assert read_manifests(path.read_bytes(), path.name) == list(yaml.safe_load_all(path.read_text()))
