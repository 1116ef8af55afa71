"""docs/spec/vectors/policy.json: what another implementation must read, refuse and decide alike."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import make_policy_vectors
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.policy.bundle import PolicyBundle
from keyquorum_core.policy.engine import PolicyEngine
from keyquorum_core.policy.facts import Entity, Request
from keyquorum_core.policy.lists import ControlledList
from keyquorum_core.policy.policies import load_policies
from keyquorum_core.transcript import transcript, u64be

FILE = Path(__file__).resolve().parents[2] / "docs" / "spec" / "vectors" / "policy.json"
DOCUMENT: dict[str, Any] = json.loads(FILE.read_text())


def plain(value: Any) -> Any:
    """JSON's lists as the sets of a request."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return tuple(value) if isinstance(value, list) else value


def replay(vector: dict[str, Any]) -> None:
    match vector["operation"]:
        case "bundle":
            assert PolicyBundle.read(vector["body"]).body() == vector["body"]
        case "list":
            ControlledList.read(vector["body"], 1)
        case "listing":
            found = ControlledList.read(vector["list"], vector["version"]).listing(**vector["of"])
            assert found == plain(vector["listing"])
        case "decide":
            decide(vector)
        case other:
            raise AssertionError(other)


def decide(vector: dict[str, Any]) -> None:
    engine = PolicyEngine(
        load_policies(DOCUMENT["policies"]),
        bundle_digest=DOCUMENT["bundle_digest"],
        bundle_version=DOCUMENT["bundle_version"],
    )
    action, principal, resource, context = json.loads(vector["request"])
    entities = [Entity(kind, name, plain(attrs), tags) for kind, name, attrs, tags in (principal, resource)]
    request = Request(action, entities[0], entities[1], plain(context))
    assert request.text() == vector["request"]
    found = engine.decide(request)
    assert (found.outcome, list(found.policies), list(found.failed)) == (
        vector["outcome"], vector["policies"], vector["failed"],
    )  # fmt: skip
    parts = [
        bytes.fromhex(DOCUMENT["bundle_digest"]),
        u64be(DOCUMENT["bundle_version"]),
        vector["request"].encode(),
        vector["outcome"].encode(),
        "\n".join(vector["policies"]).encode(),
        "\n".join(vector["failed"]).encode(),
    ]
    expected = hashlib.sha256(transcript("keyquorum/v1/policy-decision", *parts)).hexdigest()
    assert found.digest.hex() == vector["digest"] == expected


@pytest.mark.parametrize("vector", DOCUMENT["vectors"], ids=lambda vector: vector["name"])
def test_vector(vector: dict[str, Any]) -> None:
    if vector["expect"] == "ok":
        replay(vector)
        return
    with pytest.raises(KeyquorumError) as caught:
        replay(vector)
    assert caught.value.reason == vector["expect"]


def test_most_vectors_of_documents_are_negative() -> None:
    documents = [each for each in DOCUMENT["vectors"] if each["operation"] in ("bundle", "list")]
    assert sum(each["expect"] != "ok" for each in documents) > len(documents) // 2


def test_the_file_is_what_the_script_writes() -> None:
    assert json.loads(json.dumps(make_policy_vectors.document())) == DOCUMENT
