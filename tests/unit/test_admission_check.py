"""``keyquorum-admission check``: manifests as a gate in CI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from keyquorum_admission.cli import app
from keyquorum_admission.manifests import MAX_MANIFEST, read_manifests
from keyquorum_core.errors import MalformedError, Reason
from tests.support.admission import CONFIG, pod, wrap


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "admission.toml"
    path.write_text(CONFIG)
    return path


def run(config: Path, files: list[Any], *options: str) -> Result:
    paths = []
    for index, documents in enumerate(files):
        path = config.parent / f"manifest-{index}.yaml"
        path.write_text(documents if isinstance(documents, str) else yaml.safe_dump_all(documents))
        paths.append(str(path))
    return CliRunner().invoke(app, ["check", "--config", str(config), *options, *paths])


def test_good_bad_and_others_in_one_file(config: Path) -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}}
    good, plain = wrap("Job", pod()), pod(marked=False)
    bad = wrap("Deployment", pod(hostPID=True))
    done = run(config, [[good, service, plain, bad]], "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["refused"] is True
    assert [each["outcome"] for each in found["objects"]] == ["compliant", "not-judged", "not-required", "refused"]
    assert found["objects"][3]["findings"] == [
        {
            "rule": "HOST",
            "field": "spec.template.spec.hostPID",
            "message": "shares a namespace that the worker must have to itself",
            "expected": "false",
            "actual": "true",
        }
    ]
    text = run(config, [[good, bad]])
    assert text.exit_code == 1
    assert "compliant     Job h2-vqe" in text.stdout
    assert "HOST: shares a namespace" in text.stdout
    assert run(config, [[good], [service]]).exit_code == 0


def test_a_list_and_a_namespace_that_requires_attestation(config: Path) -> None:
    of = {"apiVersion": "v1", "kind": "List", "items": [pod(marked=False, runtimeClassName="runc")]}
    assert run(config, [[of]]).exit_code == 0
    done = run(config, [[of]], "--namespace-requires", "--json")
    assert done.exit_code == 1
    assert [each["rule"] for each in json.loads(done.stdout)["objects"][0]["findings"]] == ["RUNTIME_CLASS"]


def test_show_prints_the_object_as_the_cluster_will_have_it(config: Path) -> None:
    done = run(config, [[pod()]], "--show", "--json")
    completed = json.loads(done.stdout)["objects"][0]["completed"]
    assert [each["name"] for each in completed["spec"]["containers"]] == ["progress", "keyquorum-worker"]
    text = run(config, [[pod()]], "--show").stdout
    assert yaml.safe_load(text.partition("---\n")[2]) == completed


def test_a_namespaces_misspelt_mark(config: Path) -> None:
    labels = {"compute.secure/require-attestation": "yes"}
    of = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n", "labels": labels}}
    assert run(config, [[of]]).exit_code == 1


def test_usage_and_files_that_are_not_there(config: Path) -> None:
    assert CliRunner().invoke(app, ["check", "--config", str(config)]).exit_code == 2
    assert CliRunner().invoke(app, ["serve"]).exit_code == 2
    assert CliRunner().invoke(app, ["serve", "--config", str(config), "--log-level", "loud"]).exit_code == 2
    done = CliRunner().invoke(app, ["check", "--config", str(config), "--json", str(config.parent / "none.yaml")])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["reason"] == "NOT_FOUND"
    done = CliRunner().invoke(app, ["check", "--config", "none.toml", str(config)])
    assert done.exit_code == 1
    assert "NOT_FOUND" in done.stderr


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: [", "not YAML in line"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: 1\na: 2", "twice"),
        ("? [1, 2]\n: x", "not YAML"),
        ("1: x", "no string"),
        ("a: 2026-01-01", "JSON does not have"),
        ("a: !!binary aGk=", "JSON does not have"),
        ("a: !!python/object:os.system {}", "not YAML"),
        ("just text", "expected object"),
        ("kind: List\nitems: [1]", "expected object"),
        ("kind: 7", "expected string"),
        ("a: " + "[" * 80 + "]" * 80, "nested deeper"),
        ("a: " + "[" * 100_000, "nested deeper"),
        ("a: \x07", "not YAML"),
    ],
)
def test_a_bad_file_is_refused_with_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(MalformedError) as caught:
        read_manifests(text.encode(), "m.yaml")
    assert why in str(caught.value)


def test_bounds_of_a_file() -> None:
    with pytest.raises(MalformedError) as caught:
        read_manifests(b"#" * (MAX_MANIFEST + 1), "m.yaml")
    assert caught.value.reason is Reason.TOO_LARGE
    with pytest.raises(MalformedError) as caught:
        read_manifests(b"---\n{a: b}\n" * 1001, "m.yaml")
    assert caught.value.reason is Reason.TOO_LARGE
    assert read_manifests(b"---\n---\n", "m.yaml") == []
