"""Decisions: default deny, forbids win, failures deny, and every shortcut agrees with Cedar over the whole set."""

from __future__ import annotations

import hashlib
from typing import Any

import cedarpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.policy.engine import PolicyEngine
from keyquorum_core.policy.facts import JobFacts, Request, owner_entity
from keyquorum_core.policy.policies import load_policies
from keyquorum_core.policy.schema import ACTIONS, schema
from keyquorum_core.transcript import transcript, u64be
from tests.support import policies as p

JOBS = 'action in [Action::"submit", Action::"release"]'
PERMIT = f'@id("research") permit(principal, {JOBS}, resource) when {{ resource.classification == "research" }};'


def test_what_no_policy_permits_is_denied() -> None:
    engine = p.engine('@id("public") permit(principal, action == Action::"submit", resource);')
    assert engine.decide(p.submit()).policies == ("public",)
    decision = engine.decide(p.release())
    assert (decision.permitted, decision.policies, decision.outcome) == (False, (), "deny")


def test_a_forbid_wins_and_is_named() -> None:
    engine = p.engine(
        PERMIT + f'@id("b.no") forbid(principal, {JOBS}, resource) when {{ resource.cpus > 4 }};'
        f'@id("a.no") forbid(principal, {JOBS}, resource) when {{ resource.cpus > 2 }};'
    )
    assert engine.decide(p.release()).policies == ("research",)
    assert engine.decide(p.release(cpus=3)).policies == ("a.no",)
    assert engine.decide(p.release(cpus=5)).policies == ("a.no", "b.no")


def test_a_policy_that_fails_denies_though_cedar_would_permit() -> None:
    much = "resource.cpus + 9223372036854775807 > 0"
    text = PERMIT + f'@id("sum") forbid(principal, {JOBS}, resource) when {{ {much} }};'
    decision = p.engine(text).decide(p.release())
    assert (decision.permitted, decision.failed) == (False, ("sum",))
    assert not p.engine(text).decide_afresh(p.release())[0]


def test_the_time_counts_to_the_second() -> None:
    within = f"context.now < {p.NOW} && {p.NOW - 10} <= context.now"
    engine = p.engine(f'@id("until") permit(principal, action, resource) when {{ {within} }};')
    outcomes = [engine.decide(p.release(now=p.NOW + step)).permitted for step in (-11, -10, -9, -1, 0, 1, -1, 0)]
    assert outcomes == [False, True, True, True, False, False, True, False]


@pytest.mark.parametrize(
    "condition",
    [
        "context.now - 1799999999 > 0",
        "context == context && context.now == 1800000000",
        "[1800000000].contains(context.now)",
        "context.now * 1 == 1800000000",
    ],
)
def test_a_time_used_in_any_other_way_is_never_rounded(condition: str) -> None:
    engine = p.engine(f'@id("odd") permit(principal, action, resource) when {{ {condition} }};')
    for step in (0, 1, -1, 0):
        request = p.release(now=p.NOW + step)
        decision = engine.decide(request)
        assert (decision.permitted, decision.policies, decision.failed) == engine.decide_afresh(request)


def test_tags_are_read_only_where_there_are_any() -> None:
    engine = p.engine(
        '@id("tcb") permit(principal is Worker, action == Action::"release", resource)'
        ' when { principal.hasTag("sev-snp.microcode") && principal.getTag("sev-snp.microcode") >= 213 };'
    )
    assert engine.decide(p.release()).permitted
    assert not engine.decide(p.release(to=p.worker(tcb={"sev-snp.microcode": 212}))).permitted
    assert not engine.decide(p.release(to=p.worker(tcb={}))).permitted


def test_layout_of_the_decision_digest_is_pinned() -> None:
    engine = p.engine(PERMIT, version=7)
    request = p.submit()
    decision = engine.decide(request)
    text = (
        '["submit",["Owner","alice",{"name":"alice"},{}],["Job","jjjjjjjjjjjjjjjjjjjjjjjjjj",{"classification":"research",'
        '"columns":[],"cpus":1,"epoch":0,"epsilon_micro":0,"evidence_types":["sev-snp"],"export_control":"","gpus":0,'
        '"key":"","lifetime_seconds":86400,"memory_mib":0,"owner":"alice","pipelines":[],"prepared":[],"purposes":[],'
        '"regions":["eu"],"unprepared":[],"wall_seconds":0},{}],{"export":{"owner":false,"provider":false,"region":false,'
        '"regions":[],"version":0},"now":1800000000,"quorum":{"custodians":3,"jurisdictions":2},"sanctions":{"owner":false,'
        '"provider":false,"region":false,"regions":[],"version":0},"seat":{"id":"","jurisdiction":"","kind":"coordinator"}}]'
    )
    assert request.text() == text
    message = transcript(
        "keyquorum/v1/policy-decision", b"\xab" * 32, u64be(7), text.encode(), b"permit", b"research", b""
    )
    assert decision.digest == hashlib.sha256(message).digest()
    assert decision.as_dict()["lists"] == {"export": 0, "sanctions": 0}


def test_the_digest_tells_apart_whatever_the_decision_rests_on() -> None:
    engine = p.engine(PERMIT)
    digests = {
        engine.decide(p.release()).digest,
        engine.decide(p.release(now=p.NOW + 1)).digest,
        engine.decide(p.release(job_id="k" * 26)).digest,
        engine.decide(p.release(to=p.worker(region="us"))).digest,
        engine.decide(p.release(logged=False)).digest,
        p.engine(PERMIT, version=2).decide(p.release()).digest,
        p.engine(PERMIT.replace('research")', 'other")')).decide(p.release()).digest,
    }
    assert len(digests) == 7


def test_a_job_without_a_classification_is_no_request() -> None:
    with pytest.raises(KeyquorumError) as caught:
        p.job(classification="")
    assert caught.value.reason is Reason.POLICY
    assert caught.value.expected == "job.classification"


def test_a_principal_that_the_action_does_not_know_is_no_request() -> None:
    with pytest.raises(KeyquorumError) as caught:
        Request("rotate", owner_entity("alice"), p.job().entity, {})
    assert caught.value.reason is Reason.POLICY


# -- every form of request fits the schema, and every shortcut agrees with Cedar ---------------------------------------


def every_request() -> list[Request]:
    here = p.situation()
    enrolled = p.worker().entity
    from keyquorum_core.policy.facts import cluster_entity, custodian_entity, key_entity

    who = custodian_entity("ch-1", "CH")
    return [
        p.submit(),
        p.release(),
        here.release(p.job(), None, logged=False),
        here.enrol(enrolled, cluster_entity("demo"), ["olga"]),
        here.enrol(who, cluster_entity("demo"), []),
        here.ceremony("rotate", who, key_entity("demo", 3, 500), ["olga", "per"]),
        here.ceremony("destroy", who, key_entity("demo", 3, 500), []),
    ]


def test_every_request_is_of_the_schemas_form() -> None:
    """So that requests need no check against it when they are made."""
    everything = cedarpy.PolicySet.from_str("permit(principal, action, resource);")
    for request in every_request():
        entities = [
            {"uid": dict(each.uid), "attrs": dict(each.attrs), "tags": dict(each.tags), "parents": []}
            for each in (request.principal, request.resource)
        ]
        answer = cedarpy.is_authorized(
            {
                "principal": dict(request.principal.uid),
                "action": {"type": "Action", "id": request.action},
                "resource": dict(request.resource.uid),
                "context": dict(request.context),
            },
            everything,
            entities,
            schema(),
        )
        assert answer.allowed, (request.action, answer.diagnostics.errors)
    assert {request.action for request in every_request()} == set(ACTIONS)


CONDITIONS = [
    'resource.classification == "research"',
    'resource.classification == "secret"',
    '["research", "public"].contains(resource.classification)',
    '"secret" == resource.classification',
    'resource.export_control like "5A*"',
    'resource.owner == "alice"',
    "resource.cpus > 2",
    "resource.cpus + resource.gpus <= 3",
    "resource.cpus * 4611686018427387904 > 0",
    'resource.regions.contains("eu")',
    '["eu", "us"].containsAll(resource.regions)',
    "resource.prepared.isEmpty()",
    f"context.now < {p.NOW}",
    f"context.now - {p.NOW} >= 0",
    f"{p.NOW} == context.now",
    "context.sanctions.region",
    'context.seat.id == "ch-1"',
    "context.quorum.custodians >= 3",
    "context has logged && context.logged",
    'principal == Owner::"alice"',
    "principal is Worker",
    'principal is Worker && principal.region == "eu"',
    'principal is Worker && principal.evidence.containsAny(["tdx", "sev-snp"])',
    'principal is Worker && principal.hasTag("sev-snp.microcode") && principal.getTag("sev-snp.microcode") >= 210',
    '(if resource.cpus > 2 then resource.owner == "bob" else context.quorum.jurisdictions == 2)',
    '(resource.classification == "research" || resource.owner == "bob")',
    '!(resource.classification == "secret")',
    "(if resource.cpus > 2 then resource.gpus else resource.epoch) > 1",
    "resource.cpus == 2 || resource.gpus != 1",
    "[1, 3].contains(resource.cpus)",
    "resource.cpus > resource.gpus",
    "resource.cpus > -1",
    'resource.regions == ["eu"]',
    'resource.regions != ["us", "eu"]',
    'resource.regions.containsAny(["jp", "mars"])',
    'resource.regions.containsAll(["eu", "us"])',
    "resource.regions.containsAll(resource.purposes)",
    "resource.purposes.contains(resource.owner)",
    "[resource.owner].contains(resource.export_control)",
    '["eu", resource.owner].containsAll(resource.regions)',
    'resource.owner != "alice"',
    "resource.owner == resource.export_control",
    'principal in Owner::"alice"',
    "context.seat == context.seat",
    'context.seat == {kind: "custodian", id: "ch-1", jurisdiction: "CH"}',
    "resource has cpus && resource.cpus == 1",
    'principal is Worker && !(principal.hasTag("sev-snp.microcode"))',
    "principal is Worker && principal.hasTag(resource.owner)",
]


@st.composite
def policy_texts(draw: st.DrawFn) -> list[str]:
    out = []
    for i in range(draw(st.integers(1, 8))):
        effect = draw(st.sampled_from(["permit", "forbid"]))
        scope = draw(st.sampled_from([JOBS, 'action == Action::"release"', 'action == Action::"submit"']))
        chosen = draw(st.lists(st.sampled_from(CONDITIONS), min_size=0, max_size=3))
        if "submit" in scope:
            chosen = [each for each in chosen if "logged" not in each and "is Worker" not in each]
        text = f'@id("p{i}") {effect}(principal, {scope}, resource)'
        if chosen:
            word = draw(st.sampled_from(["when", "when", "unless"]))
            text += f" {word} {{ {' && '.join(chosen)} }}"
        out.append(text + ";")
    return out


VARIED: dict[str, list[Any]] = {
    "to_worker": [True, False],
    "now": [p.NOW - 1, p.NOW, p.NOW + 1],
    "owner": ["alice", "bob", "eu"],
    "classification": ["research", "secret", "public", "other"],
    "cpus": [1, 2, 3, 4],
    "gpus": [0, 1, 2],
    "regions": [(), ("eu",), ("us",), ("xx",), ("eu", "us"), ("eu", "xx"), ("eu", "us", "xx"), ("jp", "yy")],
    "purposes": [(), ("eu",), ("alice", "xx"), ("xx", "yy")],
    "region": ["eu", "us"],
    "evidence": [(), ("sev-snp",), ("tdx", "tpm2")],
    "tcb": [{}, {"sev-snp.microcode": 209}, {"sev-snp.microcode": 210, "alice": 1}, {"sev-snp.microcode": 300}],
    "control": ["", "5A002", "3A001", "alice"],
}


def request_of(values: dict[str, Any]) -> Request:
    job = {
        "now": values["now"],
        "owner": values["owner"],
        "classification": values["classification"],
        "cpus": values["cpus"],
        "gpus": values["gpus"],
        "epoch": values["gpus"],
        "regions": values["regions"],
        "purposes": values["purposes"],
        "export_control": values["control"],
    }
    if not values["to_worker"]:
        return p.submit(**job)
    to = p.worker(region=values["region"], evidence=values["evidence"], tcb=values["tcb"])
    return p.release(to=to, **job)


@st.composite
def alike(draw: st.DrawFn) -> list[Request]:
    """Requests that differ from one in one thing each."""
    base = {name: draw(st.sampled_from(values)) for name, values in VARIED.items()}
    out = [request_of(base)]
    for name in draw(st.lists(st.sampled_from(list(VARIED)), min_size=1, max_size=8)):
        out.append(request_of({**base, name: draw(st.sampled_from(VARIED[name]))}))
    return out


requests = alike().map(lambda found: found[0])


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("base", [0, 1])
def test_what_is_remembered_tells_apart_whatever_a_condition_can(condition: str, base: int) -> None:
    """Every value in every place, from two ends, twice: once asked, once remembered."""
    scope = 'action == Action::"release"' if "logged" in condition or "is Worker" in condition else JOBS
    engine = p.engine(f'@id("it") permit(principal, {scope}, resource) when {{ {condition} }};')
    one = {name: values[base % len(values)] for name, values in VARIED.items()} | {"to_worker": True}
    asked = [request_of({**one, name: value}) for name, values in VARIED.items() for value in values]
    for request in [*asked, *reversed(asked)]:
        decision = engine.decide(request)
        assert (decision.permitted, decision.policies, decision.failed) == engine.decide_afresh(request)


@given(policy_texts(), alike())
@settings(max_examples=150, deadline=None)
def test_slices_and_memory_never_change_a_decision(texts: list[str], asked: list[Request]) -> None:
    engine = p.engine("\n".join(texts))
    for request in [*asked, *asked]:
        decision = engine.decide(request)
        assert (decision.permitted, decision.policies, decision.failed) == engine.decide_afresh(request)


@given(policy_texts(), requests, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_of_policies_decides_nothing(texts: list[str], request: Request, random: Any) -> None:
    shuffled = list(texts)
    random.shuffle(shuffled)
    one, other = p.engine("\n".join(texts)).decide(request), p.engine("\n".join(shuffled)).decide(request)
    assert one == other
    halves = {
        "b.cedar": "\n".join(shuffled[: len(texts) // 2] or texts[:1]),
        "a.cedar": "\n".join(shuffled[len(texts) // 2 :]),
    }
    if len(texts) > 1:
        split = PolicyEngine(load_policies(halves), bundle_digest="ab" * 32, bundle_version=1)
        assert split.decide(request) == one


@given(policy_texts(), policy_texts(), requests)
@settings(max_examples=100, deadline=None)
def test_a_further_forbid_never_turns_a_denial_into_a_permit(
    texts: list[str], more: list[str], request: Request
) -> None:
    forbids = [text.replace('@id("p', '@id("more') for text in more if ") forbid(" in text]
    before = p.engine("\n".join(texts)).decide(request)
    after = p.engine("\n".join([*texts, *forbids])).decide(request)
    assert before.permitted or not after.permitted


def test_facts_of_a_manifest() -> None:
    from tests.unit.test_manifest import MANIFEST

    facts = JobFacts.of(MANIFEST)
    assert (facts.owner, facts.classification, facts.key, facts.epoch) == ("alice", "internal", "chem-2027", 3)
    assert facts.lifetime_seconds == 3600
    assert (facts.prepared, facts.unprepared) == (("data/h2.json",), ("main.py",))
    assert (facts.pipelines, facts.columns, facts.epsilon_micro) == (("55" * 32,), ("age", "zip3"), 250_000)
    assert facts.entity.attrs["purposes"] == ("chemistry", "research")
