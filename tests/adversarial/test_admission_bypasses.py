"""Ways around ``compute.secure/require-attestation``, each tried on an object that would pass but for that one change.

The validating webhook is asked about the changed object directly, as after mutating webhooks of others, or none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from keyquorum_admission.review import Seat
from tests.support.admission import (
    APP_IMAGE,
    CONFIG,
    MARK,
    WORKER_DIGEST,
    apply_patch,
    ask,
    completed,
    patch_of,
    pod,
    review,
    rules,
    settings,
    wrap,
)

Object = dict[str, Any]
KINDS = ["Pod", "ReplicationController", "Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "Job", "CronJob"]


def spec_of(of: Object) -> Object:
    at = of["spec"]
    while "containers" not in at:
        at = at.get("jobTemplate", at.get("template"))["spec"]
    assert isinstance(at, dict)
    return at


def worker_of(spec: Object) -> Object:
    found: Object = next(each for each in spec["containers"] if each["name"] == "keyquorum-worker")
    return found


def own(spec: Object) -> Object:
    found: Object = spec["containers"][0]
    assert found["name"] == "progress"
    return found


def volume(spec: Object, **source: Any) -> None:
    spec["volumes"].append({"name": "extra", **source})


def security(container: Object, **members: Any) -> None:
    container["securityContext"] = {**container.get("securityContext", {}), **members}


def env(container: Object, **variable: Any) -> None:
    container.setdefault("env", []).append(variable)


SECRET_REF = {"secretKeyRef": {"name": "k", "key": "k"}}
CONTAINER = {"name": "extra", "image": APP_IMAGE}
ATTACKS: dict[str, tuple[str, Callable[[Object], Any]]] = {
    # placement
    "the_plain_runtime": ("RUNTIME_CLASS", lambda s: s.update(runtimeClassName="runc")),
    "no_runtime_class": ("RUNTIME_CLASS", lambda s: s.pop("runtimeClassName")),
    "an_empty_runtime_class": ("RUNTIME_CLASS", lambda s: s.update(runtimeClassName="")),
    "a_runtime_class_in_other_letters": ("RUNTIME_CLASS", lambda s: s.update(runtimeClassName="Kata-Qemu-SNP")),
    "no_node_selector": ("NODE_SELECTOR", lambda s: s.pop("nodeSelector")),
    "half_the_node_selector": ("NODE_SELECTOR", lambda s: s["nodeSelector"].popitem()),
    "nodes_that_are_not_confidential": (
        "NODE_SELECTOR",
        lambda s: s["nodeSelector"].update({"amd.feature.node.kubernetes.io/snp": "false"}),
    ),
    "a_node_by_name_past_the_scheduler": ("NODE_NAME", lambda s: s.update(nodeName="plain-1")),
    # images
    "the_worker_by_tag": ("IMAGE", lambda s: worker_of(s).update(image="registry.example/keyquorum-worker:1")),
    "the_worker_by_tag_and_another_digest": (
        "IMAGE",
        lambda s: worker_of(s).update(image="registry.example/keyquorum-worker@sha256:" + "ee" * 32),
    ),
    "a_digest_cut_short": ("IMAGE", lambda s: worker_of(s).update(image=f"registry.example/w@{WORKER_DIGEST[:-1]}")),
    "a_digest_in_the_name": ("IMAGE", lambda s: worker_of(s).update(image=f"registry.example/{WORKER_DIGEST}:latest")),
    "a_digest_and_more": ("IMAGE", lambda s: worker_of(s).update(image=f"registry.example/w@{WORKER_DIGEST}\n")),
    "a_companion_by_tag": ("IMAGE", lambda s: own(s).update(image="registry.example/app:latest")),
    "a_companion_without_an_image": ("IMAGE", lambda s: own(s).pop("image")),
    "an_init_container_by_tag": ("IMAGE", lambda s: s.update(initContainers=[{"name": "i", "image": "app"}])),
    "an_image_volume_by_tag": ("IMAGE", lambda s: volume(s, image={"reference": "registry.example/data:1"})),
    # keys in the plain
    "a_key_from_a_secret": ("SECRET", lambda s: env(own(s), name="X", valueFrom=SECRET_REF)),
    "a_key_from_a_secret_for_the_worker": ("SECRET", lambda s: env(worker_of(s), name="X", valueFrom=SECRET_REF)),
    "a_key_from_a_secret_for_an_init_container": (
        "SECRET",
        lambda s: s.update(initContainers=[{**CONTAINER, "env": [{"name": "X", "valueFrom": SECRET_REF}]}]),
    ),
    "a_key_from_a_secret_for_an_ephemeral_container": (
        "SECRET",
        lambda s: s.update(ephemeralContainers=[{**CONTAINER, "env": [{"name": "X", "valueFrom": SECRET_REF}]}]),
    ),
    "all_of_a_secret": ("SECRET", lambda s: own(s).update(envFrom=[{"secretRef": {"name": "k"}}])),
    "all_of_a_secret_with_a_prefix": (
        "SECRET",
        lambda s: own(s).update(
            envFrom=[{"configMapRef": {"name": "c"}}, {"prefix": "P_", "secretRef": {"name": "k"}}]
        ),
    ),
    "a_variable_from_a_source_not_known_yet": (
        "SECRET",
        lambda s: env(own(s), name="X", valueFrom={"vaultKeyRef": {"name": "k"}}),
    ),
    "a_literal_session_key": ("SECRET", lambda s: env(own(s), name="SESSION_KEY", value="AAAA")),
    "a_literal_key_in_small_letters": ("SECRET", lambda s: env(own(s), name="my_encryption_key_b64", value="AAAA")),
    "a_literal_dek": ("SECRET", lambda s: env(own(s), name="TENANT_DEK", value="AAAA")),
    "a_key_from_a_config_map": (
        "SECRET",
        lambda s: env(own(s), name="JOB_KEY", valueFrom={"configMapKeyRef": {"name": "c", "key": "k"}}),
    ),
    "a_key_from_an_annotation": (
        "SECRET",
        lambda s: env(own(s), name="MASTER_KEY", valueFrom={"fieldRef": {"fieldPath": "metadata.annotations['k']"}}),
    ),
    "a_name_too_long_to_look_at": ("SECRET", lambda s: env(own(s), name="B" * 2000, value="AAAA")),
    "a_secret_volume": ("SECRET", lambda s: volume(s, secret={"secretName": "k"})),
    "a_projected_secret": ("SECRET", lambda s: volume(s, projected={"sources": [{"secret": {"name": "k"}}]})),
    "a_secret_behind_a_token": (
        "SECRET",
        lambda s: volume(s, projected={"sources": [{"serviceAccountToken": {"path": "t"}}, {"secret": {"name": "k"}}]}),
    ),
    "a_secret_behind_an_empty_folder": ("SECRET", lambda s: volume(s, emptyDir={}, secret={"secretName": "k"})),
    "a_secret_store_by_csi": ("VOLUME", lambda s: volume(s, csi={"driver": "secrets-store.csi.k8s.io"})),
    "a_flex_volume_with_a_secret": (
        "VOLUME",
        lambda s: volume(s, flexVolume={"driver": "x", "secretRef": {"name": "k"}}),
    ),
    "another_secret_as_the_workers": (
        "WORKER",
        lambda s: s["volumes"][0]["projected"]["sources"][1]["secret"].update(name="session-keys"),
    ),
    "more_of_the_workers_secret": (
        "WORKER",
        lambda s: s["volumes"][0]["projected"]["sources"][1]["secret"]["items"].append({"key": "k", "path": "k"}),
    ),
    "all_of_the_workers_secret": (
        "WORKER",
        lambda s: s["volumes"][0]["projected"]["sources"][1]["secret"].pop("items"),
    ),
    # the host, and other containers
    "the_hosts_processes": ("HOST", lambda s: s.update(hostPID=True)),
    "the_hosts_ipc": ("HOST", lambda s: s.update(hostIPC=True)),
    "the_hosts_network": ("HOST", lambda s: s.update(hostNetwork=True)),
    "processes_shared_between_containers": ("HOST", lambda s: s.update(shareProcessNamespace=True)),
    "a_folder_of_the_host": ("HOST", lambda s: volume(s, hostPath={"path": "/"})),
    "a_network_file_system": ("VOLUME", lambda s: volume(s, nfs={"server": "x", "path": "/"})),
    "a_raw_device": ("VOLUME", lambda s: own(s).update(volumeDevices=[{"name": "d", "devicePath": "/dev/x"}])),
    "mounts_that_reach_the_host": (
        "HOST",
        lambda s: own(s).update(volumeMounts=[{"name": "v", "mountPath": "/v", "mountPropagation": "Bidirectional"}]),
    ),
    "the_workers_memory_in_another_container": (
        "HOST",
        lambda s: own(s).update(volumeMounts=[{"name": "keyquorum-memory", "mountPath": "/m"}]),
    ),
    "the_workers_memory_in_an_init_container": (
        "HOST",
        lambda s: s.update(
            initContainers=[{**CONTAINER, "volumeMounts": [{"name": "keyquorum-config", "mountPath": "/m"}]}]
        ),
    ),
    "the_workers_memory_in_an_init_container_of_its_name": (
        "HOST",
        lambda s: s.update(
            initContainers=[
                {
                    **CONTAINER,
                    "name": "keyquorum-worker",
                    "volumeMounts": [{"name": "keyquorum-memory", "mountPath": "/m"}],
                }
            ]
        ),
    ),
    "a_process_of_the_host_on_windows": (
        "HOST",
        lambda s: s.update(securityContext={"windowsOptions": {"hostProcess": True}}),
    ),
    # privileges
    "a_privileged_companion": ("PRIVILEGE", lambda s: security(own(s), privileged=True)),
    "a_privileged_init_container": (
        "PRIVILEGE",
        lambda s: s.update(initContainers=[{**CONTAINER, "securityContext": {"privileged": True}}]),
    ),
    "a_privileged_worker": ("PRIVILEGE", lambda s: security(worker_of(s), privileged=True)),
    "a_companion_that_may_trace": ("PRIVILEGE", lambda s: security(own(s), capabilities={"add": ["SYS_PTRACE"]})),
    "a_companion_that_may_everything": ("PRIVILEGE", lambda s: security(own(s), capabilities={"add": ["ALL"]})),
    "a_capability_by_its_long_name": ("PRIVILEGE", lambda s: security(own(s), capabilities={"add": ["CAP_SYS_ADMIN"]})),
    "no_seccomp": ("PRIVILEGE", lambda s: s.update(securityContext={"seccompProfile": {"type": "Unconfined"}})),
    "no_apparmor": ("PRIVILEGE", lambda s: security(own(s), appArmorProfile={"type": "Unconfined"})),
    "an_unmasked_proc": ("PRIVILEGE", lambda s: security(own(s), procMount="Unmasked")),
    "a_debug_container": ("EPHEMERAL_CONTAINER", lambda s: s.update(ephemeralContainers=[CONTAINER])),
    # the worker
    "no_worker": ("WORKER", lambda s: s["containers"].pop()),
    "a_worker_of_another_name": ("WORKER", lambda s: worker_of(s).update(name="keyquorum-worker2")),
    "two_workers": ("WORKER", lambda s: s["containers"].append(copy.deepcopy(worker_of(s)))),
    "a_worker_that_only_initialises": (
        "WORKER",
        lambda s: s.update(initContainers=[s["containers"].pop()]),
    ),
    "another_command": ("WORKER", lambda s: worker_of(s).update(command=["/bin/sh"])),
    "other_arguments": ("WORKER", lambda s: worker_of(s).update(args=["attest", "--dir", "/etc/keyquorum"])),
    "one_more_argument": ("WORKER", lambda s: worker_of(s)["args"].append("--queue")),
    "a_library_preloaded": ("WORKER", lambda s: env(worker_of(s), name="LD_PRELOAD", value="/x.so")),
    "plaintext_to_a_disk": ("WORKER", lambda s: worker_of(s)["env"][0].update(value="/tmp")),
    "a_folder_on_disk_for_memory": ("WORKER", lambda s: s["volumes"][1].update(emptyDir={})),
    "a_claim_for_memory": (
        "WORKER",
        lambda s: s["volumes"].__setitem__(
            1, {"name": "keyquorum-memory", "persistentVolumeClaim": {"claimName": "c"}}
        ),
    ),
    "no_memory_volume": ("WORKER", lambda s: s["volumes"].pop()),
    "another_configuration": (
        "WORKER",
        lambda s: s["volumes"][0]["projected"]["sources"][0]["configMap"].update(name="mine"),
    ),
    "one_more_source_of_configuration": (
        "WORKER",
        lambda s: s["volumes"][0]["projected"]["sources"].append({"configMap": {"name": "mine"}}),
    ),
    "a_mount_over_the_workers_code": (
        "WORKER",
        lambda s: worker_of(s)["volumeMounts"].append({"name": "extra", "mountPath": "/usr/lib/python3"}),
    ),
    "a_mount_at_the_tokens_place_to_write_to": (
        "WORKER",
        lambda s: worker_of(s)["volumeMounts"].append(
            {"name": "extra", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
        ),
    ),
    "the_same_mount_twice": (
        "WORKER",
        lambda s: worker_of(s)["volumeMounts"].append({"name": "keyquorum-memory", "mountPath": "/bin"}),
    ),
    "a_part_of_the_configuration": ("WORKER", lambda s: worker_of(s)["volumeMounts"][0].update(subPath="x")),
    "a_probe_that_runs_a_command": (
        "WORKER",
        lambda s: worker_of(s).update(livenessProbe={"exec": {"command": ["sh", "-c", "cat /run/keyquorum/*"]}}),
    ),
    "a_hook_before_the_end": (
        "WORKER",
        lambda s: worker_of(s).update(lifecycle={"preStop": {"exec": {"command": ["sh"]}}}),
    ),
    "a_terminal": ("WORKER", lambda s: worker_of(s).update(stdin=True, tty=True)),
    "logs_into_the_status": ("WORKER", lambda s: worker_of(s).update(terminationMessagePath="/run/keyquorum/job")),
    "a_worker_that_may_gain_privileges": (
        "WORKER",
        lambda s: worker_of(s)["securityContext"].pop("allowPrivilegeEscalation"),
    ),
    "a_worker_as_root": ("WORKER", lambda s: security(worker_of(s), runAsUser=0)),
    "a_worker_as_root_by_a_boolean": ("WORKER", lambda s: security(worker_of(s), runAsUser=False)),
}


def test_what_every_attack_starts_from_passes() -> None:
    for kind in KINDS:
        assert rules(ask(Seat.VALIDATE, review(completed(wrap(kind, pod()))))) == set()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_refused(attack: str, kind: str) -> None:
    rule, change = ATTACKS[attack]
    tried = completed(wrap(kind, pod()))
    change(spec_of(tried))
    given = ask(Seat.VALIDATE, review(tried))
    assert rule in rules(given)
    assert given.status == 200
    cause = next(each for each in given.document["response"]["status"]["details"]["causes"] if each["reason"] == rule)
    assert cause["field"].startswith(("spec.", "metadata."))
    assert "AAAA" not in str(given.document)  # never the value of a variable


@pytest.mark.parametrize("attack", ATTACKS)
def test_mutation_does_not_make_an_attack_pass(attack: str) -> None:
    """What mutation may fill in is what was absent; after it the attack is gone or refused, never let in."""
    rule, change = ATTACKS[attack]
    tried = completed(pod())
    change(spec_of(tried))
    mutated = ask(Seat.MUTATE, review(tried))
    if not mutated.document["response"]["allowed"]:
        assert rules(mutated) == {rule}
        return
    after = apply_patch(tried, patch_of(mutated))
    verdict = rules(ask(Seat.VALIDATE, review(after)))
    absent = {"no_runtime_class", "an_empty_runtime_class", "no_node_selector", "half_the_node_selector", "no_worker",
              "no_memory_volume"}  # fmt: skip
    if attack in absent:
        assert verdict == set()
        assert after["spec"]["runtimeClassName"] == "kata-qemu-snp"
    elif attack in ("a_worker_of_another_name", "a_worker_that_only_initialises"):
        assert verdict == {"HOST"}  # a worker is there now, and the other one mounts its folders
    else:
        assert rule in verdict


@pytest.mark.parametrize(
    "annotation",
    [
        "io.katacontainers.config.hypervisor.kernel_params",
        "io.katacontainers.config.agent.enable_debug_console",
        "io.katacontainers.container.resource.swappiness",
        "io.kubernetes.cri-o.Devices",
    ],
)
def test_the_runtime_cannot_be_reconfigured(annotation: str) -> None:
    tried = completed(pod())
    tried["metadata"]["annotations"][annotation] = "agent.debug_console agent.log=debug"
    assert rules(ask(Seat.VALIDATE, review(tried))) == {"RUNTIME_ANNOTATION"}


def test_the_one_annotation_that_is_configured_is_let_through() -> None:
    tried = completed(pod())
    tried["metadata"]["annotations"]["io.katacontainers.config.hypervisor.cc_init_data"] = "H4sI"
    assert rules(ask(Seat.VALIDATE, review(tried))) == set()


def test_apparmor_cannot_be_switched_off_by_annotation() -> None:
    tried = completed(pod())
    name = "container.apparmor.security.beta.kubernetes.io/keyquorum-worker"
    tried["metadata"]["annotations"][name] = "unconfined"
    assert rules(ask(Seat.VALIDATE, review(tried))) == {"PRIVILEGE"}


def test_another_job_than_the_annotation_says() -> None:
    tried = pod()
    tried["metadata"]["annotations"]["compute.secure/job-id"] = "a" * 26
    tried = completed(tried)
    assert tried["spec"]["containers"][1]["args"][-1] == "a" * 26
    tried["metadata"]["annotations"]["compute.secure/job-id"] = "b" * 26
    assert rules(ask(Seat.VALIDATE, review(tried))) == {"WORKER"}


@pytest.mark.parametrize("job", ["--help", "A" * 26, "a" * 25, "", "../../etc/passwd"])
def test_a_job_id_that_is_something_else(job: str) -> None:
    tried = pod()
    tried["metadata"]["annotations"]["compute.secure/job-id"] = job
    assert rules(ask(Seat.VALIDATE, review(completed(tried)))) == {"WORKER"}


def test_images_beside_the_worker_can_be_held_to_a_list() -> None:
    text = CONFIG.replace('other_images = "pinned"', f'other_images = ["{APP_IMAGE.partition("@")[2]}"]')
    only = settings(text)
    tried = completed(pod())
    assert rules(ask(Seat.VALIDATE, review(tried), only)) == set()
    own(tried["spec"])["image"] = "registry.example/app@sha256:" + "c1" * 32
    assert rules(ask(Seat.VALIDATE, review(tried), only)) == {"IMAGE"}


# the mark


@pytest.mark.parametrize("kind", KINDS)
def test_the_mark_cannot_be_removed(kind: str) -> None:
    before = completed(wrap(kind, pod()))
    after = copy.deepcopy(before)
    for metadata in metadata_of(after):
        metadata.get("annotations", {}).pop(MARK, None)
    for seat in Seat:
        assert "MARK" in rules(ask(seat, review(after, "UPDATE", before)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_mark_cannot_be_set_false(kind: str) -> None:
    before = completed(wrap(kind, pod()))
    after = copy.deepcopy(before)
    for metadata in metadata_of(after):
        metadata["annotations"] = {MARK: "false"}
    assert "MARK" in rules(ask(Seat.VALIDATE, review(after, "UPDATE", before)))


def metadata_of(of: Object) -> list[Object]:
    found, at = [of["metadata"]], of
    while "containers" not in at["spec"]:
        at = at["spec"].get("jobTemplate") or at["spec"]["template"]
        found.append(at.setdefault("metadata", {}))
    return found


def test_the_mark_cannot_be_taken_off_a_deployment_whose_template_keeps_it() -> None:
    marked = wrap("Deployment", pod())
    marked["metadata"]["labels"] = {MARK: "true"}
    before = completed(marked)
    after = copy.deepcopy(before)
    after["metadata"]["labels"] = {}
    assert rules(ask(Seat.VALIDATE, review(after, "UPDATE", before))) == {"MARK"}


@pytest.mark.parametrize("value", ["True", "TRUE", "yes", "1", "", " true", "true ", "truе"])
@pytest.mark.parametrize("where", ["labels", "annotations"])
def test_another_value_of_the_mark_is_refused_and_not_taken_for_no(value: str, where: str) -> None:
    tried = pod(marked=False)
    tried["metadata"].setdefault(where, {})[MARK] = value
    for seat in Seat:
        assert rules(ask(seat, review(tried))) >= {"MARK"}


def test_a_label_that_says_true_is_not_undone_by_an_annotation() -> None:
    tried = completed(pod())
    tried["metadata"]["labels"][MARK] = "true"
    tried["metadata"]["annotations"][MARK] = "false"
    assert rules(ask(Seat.VALIDATE, review(tried))) == {"MARK"}


def test_a_pod_cannot_opt_out_of_its_namespace() -> None:
    tried = pod(marked=False)
    tried["metadata"]["annotations"][MARK] = "false"
    assert rules(ask(Seat.VALIDATE, review(tried))) == set()
    assert "MARK" in rules(ask(Seat.VALIDATE_REQUIRED, review(tried)))


def test_an_unmarked_pod_in_a_namespace_that_requires_it_is_refused_even_when_mutation_did_not_run() -> None:
    assert {"MARK", "WORKER", "RUNTIME_CLASS"} <= rules(ask(Seat.VALIDATE_REQUIRED, review(pod(marked=False))))


@pytest.mark.parametrize("kind", [each for each in KINDS if each != "Pod"])
def test_a_mark_on_the_workload_alone_reaches_its_pods(kind: str) -> None:
    """A template without the mark would make pods that nothing holds to it."""
    tried = wrap(kind, pod(marked=False))
    tried["metadata"]["labels"] = {MARK: "true"}
    assert "MARK" in rules(ask(Seat.VALIDATE, review(tried)))
    after = completed(tried)
    assert metadata_of(after)[-1]["annotations"][MARK] == "true"
    assert rules(ask(Seat.VALIDATE, review(after))) == set()


def test_a_mark_on_a_cron_jobs_job_counts() -> None:
    tried = wrap("CronJob", pod(marked=False))
    tried["spec"]["jobTemplate"]["metadata"] = {"annotations": {MARK: "true"}}
    assert "WORKER" in rules(ask(Seat.VALIDATE, review(tried)))


def test_marking_a_running_plain_pod_does_not_make_it_attested() -> None:
    before = pod(marked=False)
    after = copy.deepcopy(before)
    after["metadata"]["annotations"][MARK] = "true"
    assert not patch_of(ask(Seat.MUTATE, review(after, "UPDATE", before)))
    assert "WORKER" in rules(ask(Seat.VALIDATE, review(after, "UPDATE", before)))


def test_a_namespaces_mark_cannot_be_taken_back_or_misspelt() -> None:
    def namespace(**metadata: Any) -> Object:
        return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "jobs", **metadata}}

    marked = namespace(labels={MARK: "true"})
    for seat in Seat:
        assert rules(ask(seat, review(marked))) == set()
        assert rules(ask(seat, review(marked, "UPDATE", namespace()))) == set()
        assert rules(ask(seat, review(namespace(), "UPDATE", marked))) == {"MARK"}
        assert rules(ask(seat, review(namespace(labels={MARK: "false"}), "UPDATE", marked))) == {"MARK"}
        assert rules(ask(seat, review(namespace(labels={MARK: "yes"})))) == {"MARK"}
        assert rules(ask(seat, review(namespace(annotations={MARK: "true"})))) == {"MARK"}


# updates and subresources


def test_a_debug_container_through_the_subresource() -> None:
    before = completed(pod())
    after = copy.deepcopy(before)
    after["spec"]["ephemeralContainers"] = [{**CONTAINER, "targetContainerName": "keyquorum-worker"}]
    asked = review(after, "UPDATE", before, subResource="ephemeralcontainers")
    assert rules(ask(Seat.VALIDATE, asked)) == {"EPHEMERAL_CONTAINER"}


def test_another_image_for_a_running_worker() -> None:
    before = completed(pod())
    after = copy.deepcopy(before)
    worker_of(after["spec"])["image"] = "registry.example/keyquorum-worker:latest"
    assert rules(ask(Seat.VALIDATE, review(after, "UPDATE", before))) == {"IMAGE"}


def test_a_pod_that_was_scheduled_may_name_its_node_and_cannot_move() -> None:
    before = completed(pod())
    before["spec"]["nodeName"] = "snp-1"
    after = copy.deepcopy(before)
    assert rules(ask(Seat.VALIDATE, review(after, "UPDATE", before))) == set()
    after["spec"]["nodeName"] = "plain-1"
    assert rules(ask(Seat.VALIDATE, review(after, "UPDATE", before))) == {"NODE_NAME"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_on_its_way_out_is_let_go_unless_its_pod_changes(kind: str) -> None:
    before = wrap(kind, pod())  # was there before the webhook: would never be admitted now
    before["metadata"]["finalizers"] = ["foregroundDeletion"]
    after = copy.deepcopy(before)
    after["metadata"]["finalizers"] = []
    after["metadata"].setdefault("labels", {})["changed"] = "too"
    assert "WORKER" in rules(ask(Seat.VALIDATE, review(after, "UPDATE", before)))
    for each in (before, after):
        each["metadata"]["deletionTimestamp"] = "2026-03-01T00:00:00Z"
    assert rules(ask(Seat.VALIDATE, review(after, "UPDATE", before))) == set()
    spec_of(after)["hostPID"] = True
    assert "HOST" in rules(ask(Seat.VALIDATE, review(after, "UPDATE", before)))


def test_a_pod_from_before_its_namespace_was_marked_can_finish_and_not_change() -> None:
    """The Job's controller takes its finalizer off; anything more, and the pod is judged."""
    before = pod(marked=False)
    before["metadata"]["finalizers"] = ["batch.kubernetes.io/job-tracking"]
    after = copy.deepcopy(before)
    after["metadata"]["finalizers"] = []
    assert rules(ask(Seat.VALIDATE_REQUIRED, review(after, "UPDATE", before))) == set()
    for change in (
        lambda of: of["metadata"]["labels"].update(app="another"),
        lambda of: of["metadata"].pop("annotations"),
        lambda of: of["metadata"]["annotations"].update({"io.katacontainers.config.agent.debug": "1"}),
        lambda of: own(of["spec"]).update(image=APP_IMAGE.replace("c0", "c1")),
        lambda of: of["spec"].update(ephemeralContainers=[CONTAINER]),
    ):
        changed = copy.deepcopy(after)
        change(changed)
        assert "WORKER" in rules(ask(Seat.VALIDATE_REQUIRED, review(changed, "UPDATE", before)))


def test_a_deletion_date_of_the_callers_own_opens_nothing() -> None:
    tried = pod()
    tried["metadata"]["deletionTimestamp"] = "2026-03-01T00:00:00Z"
    assert "WORKER" in rules(ask(Seat.VALIDATE, review(tried)))
    before = pod(marked=False)
    assert "WORKER" in rules(ask(Seat.VALIDATE, review(tried, "UPDATE", before)))


@pytest.mark.parametrize("subresource", ["exec", "attach", "portforward", "proxy"])
def test_nobody_gets_into_pods_of_a_namespace_that_requires_attestation(subresource: str) -> None:
    options = {"apiVersion": "v1", "kind": "PodExecOptions", "command": ["sh"], "container": "keyquorum-worker"}
    asked = review(options, "CONNECT", subResource=subresource)
    assert rules(ask(Seat.VALIDATE_REQUIRED, asked)) == {"SESSION"}
    assert rules(ask(Seat.VALIDATE, asked)) == set()
