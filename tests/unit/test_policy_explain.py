"""What is said about a denial, and what can be found out about policies without asking anybody."""

from __future__ import annotations

import pytest

from keyquorum_core.errors import Reason
from keyquorum_core.policy.analyze import classifications_of, dead_policies, unreleasable
from keyquorum_core.policy.engine import PolicyEngine
from keyquorum_core.policy.explain import explain, refusal
from keyquorum_core.policy.facts import Request
from keyquorum_core.policy.policies import load_policies
from keyquorum_core.policy.syntax import render
from keyquorum_core.quorum import Custodian, Quorum
from tests.support import policies as p

RELEASE = 'principal is Worker, action == Action::"release", resource'
OPEN = '@id("open") permit(principal is Owner, action == Action::"release", resource);'
POLICIES = (
    f'@id("eu.release") permit({RELEASE}) when {{ resource.classification == "research" && principal.region == "eu" '
    '&& principal.hasTag("sev-snp.microcode") && principal.getTag("sev-snp.microcode") >= 213 };'
    f'@id("provider") forbid({RELEASE}) unless {{ ["acme", "north"].contains(principal.provider) }};'
    f'@id("late") forbid({RELEASE}) when {{ context.now > {p.NOW} }};'
)


def said(engine: PolicyEngine, request: Request) -> dict[str, str]:
    error = refusal(p.CUSTODIAN, engine.policies, request, engine.decide(request))
    assert error.reason is Reason.POLICY
    return {"message": error.message, "expected": error.expected, "actual": error.actual, **error.details}


def test_a_denial_by_default_names_the_nearest_permit_and_its_first_unmet_condition() -> None:
    found = said(p.engine(POLICIES), p.release(to=p.worker(region="us")))
    assert "eu.release comes nearest" in found["message"]
    assert found["expected"] == 'principal.region == "eu"'
    assert found["actual"] == "principal.region = us"
    assert found["field"] == "principal.region"
    assert found["policies"] == "none: denied by default"


def test_a_forbid_is_named_with_its_exception_and_the_value() -> None:
    engine = p.engine(POLICIES)
    request = p.release(to=p.worker(provider="shady"))
    found = said(engine, request)
    assert "by policy provider" in found["message"]
    assert found["expected"] == '["acme", "north"].contains(principal.provider)'
    assert found["actual"] == "principal.provider = shady"
    assert found["policy_sha256"] == "ab" * 32
    assert found["policy_version"] == "1"
    assert found["decision_sha256"] == engine.decide(request).digest.hex()


def test_a_forbid_without_an_exception_says_what_must_not_be() -> None:
    found = said(p.engine(POLICIES), p.release(now=p.NOW + 5))
    assert found["expected"] == f"not context.now > {p.NOW}"
    assert found["actual"] == f"context.now = {p.NOW + 5}"


def test_an_action_that_nothing_permits() -> None:
    found = said(p.engine(POLICIES), p.submit())
    assert found["field"] == "action"
    assert "submit" in found["expected"]


def test_a_policy_that_fails_is_named() -> None:
    engine = p.engine(POLICIES + f'@id("sum") forbid({RELEASE}) when {{ resource.cpus + 9223372036854775807 > 0 }};')
    found = said(engine, p.release())
    assert found["actual"] == "sum"
    assert explain(engine.policies, p.release()).failed == ("sum",)


def test_every_condition_is_shown_with_what_stands_there() -> None:
    engine = p.engine(POLICIES)
    found = explain(engine.policies, p.release(to=p.worker(tcb={})))
    assert not found.permitted
    permit = next(each for each in found.policies if each.policy.id == "eu.release")
    assert [condition.holds for condition in permit.conditions] == [True, True, True, True, False, None]
    assert permit.conditions[3].as_dict() == {
        "condition": 'principal.region == "eu"', "holds": True, "values": {"principal.region": "eu"},
    }  # fmt: skip
    assert permit.conditions[4].values == (("principal tag sev-snp.microcode", "nothing"),)
    assert explain(engine.policies, p.release()).permitted


@pytest.mark.parametrize(
    "condition",
    [
        'resource.classification == "a\\"b\\\\c"',
        '(resource.cpus > 2 || resource.gpus == 1) && !(resource.owner == "x")',
        "resource.cpus + resource.gpus * 2 <= 3 - -1",
        'if resource.cpus > 2 then resource.owner like "a*b\\*" else resource.regions.containsAny(["eu"])',
        'context.seat has kind && ["a"].containsAll(resource.regions)',
        'principal == Owner::"alice" || principal in Owner::"bob"',
        "resource.regions.isEmpty()",
        'resource.owner == "a" && (resource.owner == "b" || resource.owner == "c") && resource.cpus == 1',
    ],
)
def test_a_condition_written_out_means_what_it_meant(condition: str) -> None:
    scope = 'principal is Owner, action == Action::"release", resource'
    (policy,) = load_policies({"a.cedar": f'@id("a") permit({scope}) when {{ {condition} }};'}).policies
    written = " && ".join(f"({each})" for each in map(str, policy.conditions[2:]))
    (again,) = load_policies({"a.cedar": f'@id("a") permit({scope}) when {{ {written} }};'}).policies
    assert [render(each.expr) for each in again.conditions] == [render(each.expr) for each in policy.conditions]
    assert [each.expr for each in again.conditions] == [each.expr for each in policy.conditions]


# -- what can never be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "condition",
    [
        'resource.classification == "a" && resource.classification == "b"',
        "resource.cpus > 4 && resource.cpus < 3",
        "resource.cpus < 0",
        'principal.region == "eu" && !["eu", "us"].contains(principal.region)',
        'principal.evidence.containsAll(["tdx"]) && principal.evidence.isEmpty()',
        f"context.now < {p.NOW} && context.now > {p.NOW}",
        'principal.hasTag("x") && principal.getTag("x") > 5 && principal.getTag("x") < 6',
        "principal.development && !principal.development",
        'resource.owner like "a*" && resource.owner == "bob"',
        "false",
    ],
)
def test_a_policy_that_never_matches_is_found(condition: str) -> None:
    policies = load_policies({"a.cedar": f'@id("dead") forbid({RELEASE}) when {{ {condition} }};' + OPEN})
    (found,) = dead_policies(policies)
    assert (found.kind, found.about, found.proven) == ("never-matches", "dead", True)


@pytest.mark.parametrize(
    "condition",
    [
        "resource.cpus > 4 && resource.cpus < 6",
        'principal.evidence.containsAll(["tdx", "tpm2"]) && !principal.evidence.contains("nitro")',
        'resource.owner like "a*b*c"',
        'principal.hasTag("x") && principal.getTag("x") == 5',
        "resource.cpus + 1 > 4",
        'resource.regions == ["eu"]',
        "resource.regions.containsAll(resource.purposes) && !resource.regions.isEmpty()",
    ],
)
def test_a_policy_that_can_match_is_not_suspected(condition: str) -> None:
    assert dead_policies(load_policies({"a.cedar": f'@id("live") permit({RELEASE}) when {{ {condition} }};'})) == []


def test_what_cannot_be_searched_through_is_said_to_be_undecided() -> None:
    condition = "context.seat == context.seat"
    (found,) = dead_policies(load_policies({"a.cedar": f'@id("odd") permit({RELEASE}) when {{ {condition} }};'}))
    assert (found.kind, found.proven) == ("undecided", False)


def test_a_contradiction_between_two_places_is_found_but_not_proven() -> None:
    condition = "resource.cpus > resource.gpus && resource.gpus > resource.cpus"
    (found,) = dead_policies(load_policies({"a.cedar": f'@id("odd") permit({RELEASE}) when {{ {condition} }};'}))
    assert (found.kind, found.proven) == ("never-matches", False)


QUORUM = Quorum(
    {"at_least": 2, "jurisdictions": 2}, [Custodian("ch-1", "CH"), Custodian("ch-2", "CH"), Custodian("de-1", "DE")]
)


def where(*regions: str, classification: str = "personal") -> str:
    listed = ", ".join(f'"{each}"' for each in regions)
    return OPEN + (
        f'@id("{classification}.release") permit({RELEASE}) when {{ resource.classification == "{classification}" }};'
        f'@id("{classification}.region") forbid({RELEASE}) unless {{ [{listed}].contains(principal.region) }};'
    )


def findings(**texts: str) -> list[str]:
    custodians = {name.replace("_", "-"): load_policies({"a.cedar": text}) for name, text in texts.items()}
    return [
        f"{each.kind} {each.about} {each.proven}: {each.message}"
        for each in unreleasable(custodians, QUORUM, classifications_of(custodians.values()))
    ]


def test_a_quorum_that_agrees_on_some_worker_is_found() -> None:
    assert findings(ch_1=where("CH", "FR"), ch_2=where("CH"), de_1=where("DE", "FR")) == []


def test_custodians_that_each_would_but_never_together() -> None:
    (found,) = findings(ch_1=where("CH"), ch_2=where("CH"), de_1=where("DE"))
    assert found.startswith("never-released personal True")
    assert "ch-1, ch-2, de-1 each would, but never enough of them" in found


def test_a_classification_that_too_few_permit_at_all() -> None:
    (found,) = findings(ch_1=where("CH"), ch_2=where("CH"), de_1=where("CH", classification="research"))[:1]
    assert "only ch-1, ch-2 would ever release it to a worker" in found


def test_custodians_that_are_not_given_release_nothing() -> None:
    found = findings(ch_1=where("CH"), ch_2=where("CH"))
    assert len(found) == 1


def test_a_policy_that_looks_at_who_decides() -> None:
    where_it_is = 'resource.classification == "r" && context.seat.jurisdiction == "DE"'
    only_german = OPEN + f'@id("r.release") permit({RELEASE}) when {{ {where_it_is} }};'
    (found,) = findings(ch_1=only_german, ch_2=only_german, de_1=only_german)
    assert "at most de-1" in found
