"""Write docs/spec/vectors/policy.json: bundles, lists, and decisions with their digests. Nothing in it is random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keyquorum_core.errors import KeyquorumError
from keyquorum_core.policy.bundle import PolicyBundle
from keyquorum_core.policy.engine import PolicyEngine
from keyquorum_core.policy.facts import (
    JobFacts,
    QuorumFacts,
    Request,
    Seat,
    WorkerFacts,
    cluster_entity,
    custodian_entity,
    key_entity,
)
from keyquorum_core.policy.lists import ControlledList, ListEntry
from keyquorum_core.policy.policies import load_policies
from keyquorum_core.policy.requests import Situation

VECTORS = Path(__file__).resolve().parent.parent / "docs" / "spec" / "vectors" / "policy.json"
NOW = 1_800_000_000
Vector = dict[str, Any]

TO_WORKER = 'principal is Worker, action == Action::"release", resource'
POLICIES = {
    "jobs.cedar": (
        '@id("research.submit") permit (principal is Owner, action == Action::"submit", resource)'
        ' when { resource.classification == "research" };\n'
        '@id("research.open") permit (principal is Owner, action == Action::"release", resource)'
        ' when { resource.classification == "research" };\n'
        f'@id("research.release") permit ({TO_WORKER}) when {{ resource.classification == "research" }};\n'
        f'@id("region") forbid ({TO_WORKER}) unless {{ ["eu", "CH"].contains(principal.region) }};\n'
        f'@id("sanctions") forbid ({TO_WORKER}) when {{ context.sanctions.provider }};\n'
    ),
    "keys.cedar": (
        '@id("rotate") permit (principal, action == Action::"rotate", resource)'
        ' when { context.operators.contains("olga") && resource.age_seconds >= 60 };\n'
        '@id("enrol") permit (principal, action == Action::"enrol", resource) when { context.operator_count >= 2 };\n'
        '@id("sum") forbid (principal, action == Action::"destroy", resource)'
        " when { resource.age_seconds + 9223372036854775807 > 0 };\n"
        '@id("destroy") permit (principal, action == Action::"destroy", resource);\n'
    ),
}
DIGEST = "5a" * 32


def requests() -> list[tuple[str, Request]]:
    sanctions = ControlledList(7, [ListEntry("provider", "shady", ("5A*",))])
    here = Situation(Seat("custodian", "ch-1", "CH"), QuorumFacts(3, 2), NOW, {"sanctions": sanctions})
    intake = Situation(Seat("coordinator"), QuorumFacts(3, 2), NOW, {"sanctions": sanctions})
    job = JobFacts(
        "a" * 26, "alice", "research", "5A002", ("eu", "CH"), ("sev-snp",), ("chemistry",), "chem-2027", 3,
        lifetime_seconds=86400, wall_seconds=600, cpus=2, gpus=1, memory_mib=2048,
        prepared=("data.csv",), unprepared=("main.py",), pipelines=("11" * 32,), columns=("age", "zip3"),
        epsilon_micro=500_000,
    )  # fmt: skip
    secret = JobFacts("b" * 26, "alice", "secret")
    worker = WorkerFacts(
        "sev-snp:aa", "eu", "acme", ("sev-snp", "nvidia-gpu"), "rack-7", "DGX-H100", ("Milan",), ("GH100",),
        {"sev-snp.microcode": 213}, True,
    )  # fmt: skip
    who = custodian_entity("ch-1", "CH")
    return [
        ("a job is submitted", intake.submit(job)),
        ("a job that nothing permits", intake.submit(secret)),
        ("the owner opens it", here.release(job, None, logged=True)),
        ("a worker gets it", here.release(job, worker, logged=True)),
        ("a worker elsewhere", here.release(job, WorkerFacts("tdx:01", "us", "acme", ("tdx",)), logged=True)),
        (
            "a listed provider elsewhere",
            here.release(job, WorkerFacts("tdx:01", "us", "shady", ("tdx",)), logged=False),
        ),
        ("a machine is enrolled", here.enrol(worker.entity, cluster_entity("demo"), ["per", "olga"])),
        ("a key is rotated", here.ceremony("rotate", who, key_entity("chem-2027", 3, 60), ["olga"])),
        ("too young to rotate", here.ceremony("rotate", who, key_entity("chem-2027", 3, 59), ["olga"])),
        ("a policy that fails denies", here.ceremony("destroy", who, key_entity("chem-2027", 3, 1), [])),
    ]


def decisions() -> list[Vector]:
    engine = PolicyEngine(load_policies(POLICIES), bundle_digest=DIGEST, bundle_version=4)
    out = []
    for name, request in requests():
        found = engine.decide(request)
        out.append(
            {
                "name": name,
                "operation": "decide",
                "request": request.text(),
                "outcome": found.outcome,
                "policies": list(found.policies),
                "failed": list(found.failed),
                "digest": found.digest.hex(),
                "expect": "ok",
            }
        )
    return out


def attempt(vector: Vector, read: Any) -> Vector:
    """With the outcome that reading has."""
    try:
        read()
    except KeyquorumError as error:
        return vector | {"expect": str(error.reason)}
    return vector | {"expect": "ok"}


def bundles() -> list[Vector]:
    good: Vector = {"custodians": ["ch-1", "is-1"], "policies": POLICIES, "seat": "custodian"}
    one = {"a.cedar": '@id("a") permit (principal, action, resource);'}

    def policies(text: str) -> Vector:
        return {**good, "policies": {"a.cedar": text}}

    cases: list[tuple[str, Vector]] = [
        ("a custodians' bundle", good),
        ("the coordinator's", {**good, "seat": "coordinator", "custodians": []}),
        ("an unknown seat", {**good, "seat": "worker"}),
        ("a coordinator's that names custodians", {**good, "seat": "coordinator"}),
        ("a custodians' that names none", {**good, "custodians": []}),
        ("a custodian twice", {**good, "custodians": ["ch-1", "ch-1"]}),
        ("custodians out of order", {**good, "custodians": ["is-1", "ch-1"]}),
        ("unknown member", {**good, "more": 1}),
        ("no policies", {**good, "policies": {}}),
        ("a bad file name", {**good, "policies": {"../a.cedar": one["a.cedar"]}}),
        ("no id", policies("permit (principal, action, resource);")),
        ("an id twice", {**good, "policies": {**one, "b.cedar": one["a.cedar"]}}),
        ("an unknown attribute", policies(f'@id("a") permit ({TO_WORKER}) when {{ principal.country == "CH" }};')),
        ("an unknown action", policies('@id("a") permit (principal, action == Action::"leak", resource);')),
        ("another type", policies(f'@id("a") permit ({TO_WORKER}) when {{ principal.region == 1 }};')),
        (
            "a tag that may not be there",
            policies(f'@id("a") permit ({TO_WORKER}) when {{ principal.getTag("x") > 1 }};'),
        ),
        ("a template", policies('@id("a") permit (principal == ?principal, action, resource);')),
        (
            "an attribute of an entity it names",
            policies(
                '@id("a") permit (principal is Owner, action == Action::"submit", resource)'
                ' when { Owner::"alice".name == "alice" };'
            ),
        ),
        (
            "33 brackets",
            policies(f'@id("a") permit (principal, action, resource) when {{ {"(" * 32}true{")" * 32} }};'),
        ),
        (
            "257 operators",
            policies(f'@id("a") permit (principal, action, resource) when {{ true{" && true" * 257} }};'),
        ),
        ("not Cedar", policies("permit (principal")),
    ]
    return [
        attempt({"name": name, "operation": "bundle", "body": body}, lambda body=body: PolicyBundle.read(body))
        for name, body in cases
    ]


def lists() -> list[Vector]:
    entries: list[Vector] = [
        {"classes": [], "kind": "region", "name": "embargoed-1"},
        {"classes": ["3A*", "5A002"], "kind": "region", "name": "SE"},
        {"classes": [], "kind": "owner", "name": "mallory"},
        {"classes": ["*"], "kind": "provider", "name": "shady"},
    ]
    cases: list[tuple[str, Vector]] = [
        ("a list", {"entries": entries}),
        ("an empty list", {"entries": []}),
        ("an unknown kind", {"entries": [{**entries[0], "kind": "country"}]}),
        ("an empty name", {"entries": [{**entries[0], "name": ""}]}),
        ("a bad class", {"entries": [{**entries[0], "classes": ["5*A"]}]}),
        ("unknown member of an entry", {"entries": [{**entries[0], "until": 1}]}),
        ("an entry twice", {"entries": [entries[0], entries[0]]}),
    ]
    out = [
        attempt({"name": name, "operation": "list", "body": body}, lambda body=body: ControlledList.read(body, 7))
        for name, body in cases
    ]
    found = ControlledList.read({"entries": entries}, 7)
    asked: list[Vector] = [
        {"owner": "mallory", "region": "", "provider": "", "regions": ["SE", "embargoed-1"], "export_control": ""},
        {"owner": "alice", "region": "SE", "provider": "shady", "regions": ["SE"], "export_control": "3A001"},
        {"owner": "alice", "region": "SE", "provider": "shady", "regions": ["SE"], "export_control": "5A0021"},
        {"owner": "alice", "region": "SE", "provider": "acme", "regions": [], "export_control": "5A002"},
    ]
    for number, each in enumerate(asked):
        listing = found.listing(**each)
        vector = {"name": f"listing {number + 1}", "operation": "listing", "list": {"entries": entries}, "version": 7}
        out.append({**vector, "of": each, "listing": {**listing, "regions": list(listing["regions"])}, "expect": "ok"})  # type: ignore[call-overload]
    return out


def document() -> Vector:
    return {
        "about": "Policy bundles, controlled lists, decisions; docs/spec/policy.md",
        "policies": POLICIES,
        "bundle_digest": DIGEST,
        "bundle_version": 4,
        "vectors": [*bundles(), *lists(), *decisions()],
    }


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(document(), indent=1, ensure_ascii=True) + "\n")
