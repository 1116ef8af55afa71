"""How long a decision takes with 200 policies, beside an empty Cedar call.

``empty_call`` is Cedar asked about a request with nothing in it under no policy at all: the floor that any decision
through ``cedarpy`` stands on. ``whole_set`` is Cedar given all policies and the whole request, parsed beforehand: the
peer, and what a decision would cost without slices and memory. Both are measured in the same rounds as ours, and the
best round of each counts, so that other load on the machine hits all alike.

Two sets of policies: ``controls``, 200 policies as a controls matrix compiles to, and ``unsliceable``, 200 forbids that
all concern every release and have no string to tell them apart, the worst there is. ``again``: a job never seen before,
of a kind that was: every release but the first few after a bundle was installed. ``first``: nothing is remembered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import cedarpy

from keyquorum_core.policy.engine import PolicyEngine, ask
from keyquorum_core.policy.facts import JobFacts, QuorumFacts, Request, Seat, WorkerFacts
from keyquorum_core.policy.policies import PolicySet, handle, load_policies
from keyquorum_core.policy.requests import Situation

POLICIES = 200
TARGET_US = 60
ROUNDS = 60
CALLS = 25
_RELEASE = 'principal is Worker, action == Action::"release", resource'
_OWNER = "principal is Owner"
_WORKER = WorkerFacts("sev-snp:01", "eu", "acme", ("sev-snp",), tcb={"sev-snp.microcode": 213})
_SITUATION = Situation(Seat("custodian", "ch-1", "CH"), QuorumFacts(3, 2), 1_800_000_000)
_NUMBERS = count()


def controls() -> PolicySet:
    """As ``keyquorum policy controls compile`` makes them: a permit for each way a key is handed out, a forbid for each
    control, for as many classifications as it takes."""
    out: list[str] = []
    for number in count():
        name = f"class-{number}"
        this = f'resource.classification == "{name}"'
        both = 'action in [Action::"submit", Action::"release"]'
        out += [
            f'@id("{name}.submit") permit ({_OWNER}, action == Action::"submit", resource) when {{ {this} }};',
            f'@id("{name}.open") permit ({_OWNER}, action == Action::"release", resource) when {{ {this} }};',
            f'@id("{name}.release") permit ({_RELEASE}) when {{ {this} }};',
            f'@id("{name}.region") forbid ({_RELEASE}) when {{ {this} }}'
            ' unless { ["eu", "DE"].contains(principal.region) };',
            f'@id("{name}.provider") forbid ({_RELEASE}) when {{ {this} }}'
            ' unless { ["acme"].contains(principal.provider) };',
            f'@id("{name}.evidence") forbid ({_RELEASE}) when {{ {this} }}'
            ' unless { principal.evidence.containsAll(["sev-snp"]) };',
            f'@id("{name}.tcb") forbid ({_RELEASE}) when {{ {this} }}'
            ' unless { principal.hasTag("sev-snp.microcode") && principal.getTag("sev-snp.microcode") >= 209 };',
            f'@id("{name}.lifetime") forbid (principal, {both}, resource) when {{ {this} }}'
            " unless { resource.lifetime_seconds <= 2592000 };",
        ]
        if len(out) >= POLICIES:
            return load_policies({"controls.cedar": "\n".join(out[:POLICIES])})
    raise AssertionError


def unsliceable() -> PolicySet:
    forbids = [
        f'@id("f{number}") forbid ({_RELEASE}) when {{ resource.lifetime_seconds > {3_000_000 + number} }};'
        for number in range(POLICIES - 1)
    ]
    return load_policies({"all.cedar": "\n".join([f'@id("p") permit ({_RELEASE});', *forbids])})


def request() -> Request:
    """A release of a job never seen before."""
    number = next(_NUMBERS)
    job = JobFacts(
        f"job-{number}",
        "alice",
        "class-7",
        regions=("eu",),
        evidence_types=("sev-snp",),
        lifetime_seconds=number % 2_000_000 + 1,
    )
    return _SITUATION.release(job, _WORKER, logged=True)


def decide_first(engine: PolicyEngine) -> Callable[[Request], object]:
    def call(asked: Request) -> object:
        engine._kept.clear()
        return engine.decide(asked)

    return call


def measure(scratch: Path) -> dict[str, object]:
    nothing = cedarpy.PolicySet.from_str("")
    no_entities = cedarpy.Entities.from_json_str("[]")
    bare = {
        "principal": {"type": "Worker", "id": "w"},
        "action": {"type": "Action", "id": "release"},
        "resource": {"type": "Job", "id": "j"},
        "context": {},
    }
    out: dict[str, object] = {"policies": POLICIES, "target": f"under {TARGET_US} µs"}
    for name, make in (("controls", controls), ("unsliceable", unsliceable)):
        policies = make()
        engine = PolicyEngine(policies, bundle_digest="ab" * 32, bundle_version=1)
        whole = handle(policies.policies)
        assert engine.decide(request()).permitted
        cases: dict[str, Callable[[Request], object]] = {
            "empty_call_us": lambda _: cedarpy.is_authorized(bare, nothing, no_entities),
            "whole_set_us": lambda asked, whole=whole: ask(whole, asked, None),  # type: ignore[misc]
            "first_us": decide_first(engine),
            "again_us": engine.decide,
        }
        best = dict.fromkeys(cases, float("inf"))
        for _ in range(ROUNDS):
            for case, call in cases.items():
                asked = [request() for _ in range(CALLS)]
                started = time.perf_counter()
                for each in asked:
                    call(each)
                best[case] = min(best[case], (time.perf_counter() - started) / CALLS * 1e6)
        figures: dict[str, object] = {case: round(value, 1) for case, value in best.items()}
        for case in ("first", "again"):
            figures[f"{case}_over_empty_call"] = round(best[f"{case}_us"] / best["empty_call_us"], 2)
            figures[f"{case}_over_whole_set"] = round(best[f"{case}_us"] / best["whole_set_us"], 3)
        out[name] = figures
    return out
