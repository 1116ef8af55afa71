"""Mutation: what it adds, that it changes nothing there, that a second time adds nothing, that the result passes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyquorum_admission.mutate import complete
from keyquorum_admission.patch import Patch
from keyquorum_admission.review import Seat
from keyquorum_admission.tree import Node
from keyquorum_admission.workloads import WORKLOADS, workload
from tests.support.admission import (
    APP_IMAGE,
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

KINDS = [kind for _, kind in WORKLOADS]
SETTINGS = settings()

names = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
texts = st.text(max_size=12)
labels = st.dictionaries(names, texts, max_size=3)
absent: st.SearchStrategy[Any] = st.just(...)  # a member that is not there
harmless_env = st.lists(
    st.one_of(
        st.builds(lambda value: {"name": "LEVEL", "value": value}, texts),
        st.just({"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}),
        st.just({"name": "SIZE", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "size"}}}),
    ),
    max_size=2,
)
containers = st.builds(
    lambda name, env, context: {"name": f"c-{name}", "image": APP_IMAGE, "env": env, "securityContext": context},
    names,
    harmless_env,
    st.sampled_from([None, {}, {"runAsUser": 0}, {"capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}}]),
)
volumes = st.builds(
    lambda name, source: {"name": f"v-{name}", **source},
    names,
    st.sampled_from(
        [
            {"emptyDir": {}},
            {"configMap": {"name": "c"}},
            {"persistentVolumeClaim": {"claimName": "c"}},
            {"projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}},
        ]
    ),
)


def members(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """An object of these members, without those that are ``...``."""
    return st.fixed_dictionaries(strategies).map(
        lambda found: {name: value for name, value in found.items() if value is not ...}
    )


@st.composite
def compliant(draw: st.DrawFn) -> tuple[dict[str, Any], bool]:
    """A workload that says nothing against the rules, more or less of it filled in, and whether its namespace says that
    it must attest."""
    spec = draw(
        members(
            containers=st.one_of(absent, st.none(), st.lists(containers, max_size=3)),
            initContainers=st.one_of(absent, st.lists(containers, max_size=2)),
            volumes=st.one_of(absent, st.none(), st.lists(volumes, max_size=3)),
            runtimeClassName=st.one_of(absent, st.none(), st.sampled_from(["", "kata-qemu-snp", "kata-qemu-tdx"])),
            nodeSelector=st.one_of(
                absent, st.none(), labels, st.just({"katacontainers.io/kata-runtime": "true", "zone": "a"})
            ),
            restartPolicy=st.sampled_from(["Always", "OnFailure", "Never", ...]),
            hostPID=st.sampled_from([False, None, ...]),
        )
    )
    metadata = draw(
        members(
            labels=st.one_of(absent, st.none(), labels),
            annotations=st.one_of(absent, st.none(), labels, st.just({"compute.secure/job-id": "a2" * 13})),
        )
    )
    by_namespace = draw(st.booleans())
    where = draw(st.sampled_from(["labels", "annotations"]))
    if not by_namespace or draw(st.booleans()):
        metadata[where] = {**(metadata.get(where) or {}), MARK: "true"}
    kind = draw(st.sampled_from(KINDS))
    of = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **metadata}, "spec": spec}
    return wrap(kind, of), by_namespace


@given(compliant())
def test_a_compliant_object_passes_once_it_is_mutated_and_mutation_is_idempotent(
    case: tuple[dict[str, Any], bool],
) -> None:
    of, by_namespace = case
    mutating = Seat.MUTATE_REQUIRED if by_namespace else Seat.MUTATE
    validating = Seat.VALIDATE_REQUIRED if by_namespace else Seat.VALIDATE
    after = completed(of, by_namespace)
    assert rules(ask(validating, review(after))) == set()
    again = ask(mutating, review(after))
    assert again.outcome == "allowed"
    assert patch_of(again) == []
    assert rules(ask(validating, review(after, "UPDATE", after))) == set()


@given(compliant())
def test_mutation_only_adds(case: tuple[dict[str, Any], bool]) -> None:
    of, by_namespace = case

    def kept(before: object, after: object) -> bool:
        if before in (None, ""):
            return True
        if isinstance(before, dict) and isinstance(after, dict):
            return all(name in after and kept(value, after[name]) for name, value in before.items())
        if isinstance(before, list) and isinstance(after, list):
            return len(after) >= len(before) and all(map(kept, before, after))
        return before == after

    untouched = copy.deepcopy(of)
    after = completed(of, by_namespace)
    assert of == untouched
    assert kept(of, after)


@given(compliant())
def test_the_patch_does_what_the_product_says_it_does(case: tuple[dict[str, Any], bool]) -> None:
    """The product's own result, which `check` judges, and the patch applied by the RFC are one."""
    of, by_namespace = case
    asked = workload(Node(of, ""), of["apiVersion"], of["kind"])
    patch, findings = complete(SETTINGS, asked, None, by_namespace)
    assert not findings
    assert apply_patch(of, patch.operations) == patch.document


def test_what_the_worker_is_given() -> None:
    spec = completed(pod())["spec"]
    worker = spec["containers"][-1]
    assert worker["image"].endswith(f"@{WORKER_DIGEST}")
    assert worker["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert worker["resources"] == {"limits": {"cpu": "8", "memory": "16Gi", "nvidia.com/gpu": "1"}}
    folders = {each["name"]: each for each in spec["volumes"]}
    assert folders["keyquorum-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert {each["mountPath"]: each.get("readOnly", False) for each in worker["volumeMounts"]} == {
        "/etc/keyquorum": True,
        "/run/keyquorum": False,
    }
    assert "valueFrom" not in json.dumps(worker)


@pytest.mark.parametrize(
    ("policy", "job", "last"),
    [("Always", "", "--queue"), ("Never", "", "--once"), ("OnFailure", "", "--once"), ("Always", "a2" * 13, "a2" * 13)],
)
def test_what_the_worker_is_to_do(policy: str, job: str, last: str) -> None:
    of = pod(restartPolicy=policy)
    if job:
        of["metadata"]["annotations"]["compute.secure/job-id"] = job
    assert completed(of)["spec"]["containers"][-1]["args"] == ["run", "--dir", "/etc/keyquorum", last]


def test_the_workers_arguments_are_ones_that_it_takes() -> None:
    """The command line is the worker's own: its parser is asked."""
    import typer

    from keyquorum_gpu_worker.cli import app

    group: Any = typer.main.get_command(app)
    for policy, job in (("Always", ""), ("Never", ""), ("Never", "a2" * 13)):
        of = pod(restartPolicy=policy)
        if job:
            of["metadata"]["annotations"]["compute.secure/job-id"] = job
        name, *arguments = completed(of)["spec"]["containers"][-1]["args"]
        command = group.commands[name]
        context = command.make_context(name, list(arguments))
        assert str(context.params["directory"]) == "/etc/keyquorum"
        assert context.params["job_id"] == job
        assert context.params["once"] is (policy == "Never" and not job)


def test_what_contradicts_is_refused_and_not_overwritten() -> None:
    plain = pod(runtimeClassName="runc")
    assert rules(ask(Seat.MUTATE, review(plain))) == {"RUNTIME_CLASS"}
    elsewhere = pod(nodeSelector={"amd.feature.node.kubernetes.io/snp": "false"})
    assert rules(ask(Seat.MUTATE, review(elsewhere))) == {"NODE_SELECTOR"}


def test_what_need_not_attest_is_left_alone() -> None:
    for of in (pod(marked=False), wrap("Deployment", pod(marked=False))):
        for seat in (Seat.MUTATE, Seat.VALIDATE):
            assert ask(seat, review(of)).document["response"] == {"uid": review(of)["request"]["uid"], "allowed": True}


def test_a_dry_run_gets_the_same_answer() -> None:
    assert ask(Seat.MUTATE, review(pod(), dryRun=True)).document == ask(Seat.MUTATE, review(pod())).document


def test_a_patch_escapes_names_and_copies_values() -> None:
    patch = Patch({"metadata": {"annotations": None}})
    value = {"a": [1]}
    patch.set(("metadata", "annotations", "x/y~z"), value)
    patch.append(("list",), value)
    value["a"].append(2)
    assert patch.operations == [
        {"op": "add", "path": "/metadata/annotations", "value": {}},
        {"op": "add", "path": "/metadata/annotations/x~1y~0z", "value": {"a": [1]}},
        {"op": "add", "path": "/list", "value": []},
        {"op": "add", "path": "/list/-", "value": {"a": [1]}},
    ]
    assert patch.document == {"metadata": {"annotations": {"x/y~z": {"a": [1]}}}, "list": [{"a": [1]}]}
    assert apply_patch({"metadata": {"annotations": None}}, patch.operations) == patch.document
