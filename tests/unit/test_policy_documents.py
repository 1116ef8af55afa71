"""What is refused when policies, bundles, lists, scenario tables and controls are read, and what is said about it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyquorum_core.bulletin import Bulletin
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.policy.bundle import PolicyBundle, policy_kind
from keyquorum_core.policy.controls import read_controls
from keyquorum_core.policy.controls_cedar import compile_controls
from keyquorum_core.policy.controls_table import table
from keyquorum_core.policy.facts import Seat
from keyquorum_core.policy.lists import ControlledList, ListEntry
from keyquorum_core.policy.policies import load_policies
from keyquorum_core.policy.scenarios import read_scenarios, run
from keyquorum_core.policy.schema import SCHEMA_TEXT, schema
from tests.support import policies as p

OK = '@id("ok") permit(principal, action, resource);'
RELEASE = 'action == Action::"release"'


def refused(*texts: str) -> KeyquorumError:
    with pytest.raises(MalformedError) as caught:
        load_policies({f"f{i}.cedar": text for i, text in enumerate(texts)})
    return caught.value


# -- policies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f'@id("a") permit(principal is Worker, {RELEASE}, resource) when {{ principal.regoin == "eu" }};', "regoin"),
        (f'@id("a") permit(principal is Worker, {RELEASE}, resource) when {{ principal.region == 3 }};', "compatible"),
        (f'@id("a") permit(principal, {RELEASE}, resource) when {{ principal.region == "eu" }};', "region"),
        ('@id("a") permit(principal, action == Action::"leak", resource);', "leak"),
        ('@id("a") permit(principal is Operator, action, resource);', "Operator"),
        (f'@id("a") permit(principal is Worker, {RELEASE}, resource) when {{ principal.getTag("x") > 1 }};', "tag"),
        ('@id("a") permit(principal is Worker, action == Action::"submit", resource);', "applicable action"),
        ('@id("a") permit(principal, action, resource) when { context.logged };', "logged"),
    ],
)
def test_what_the_schema_does_not_know_is_refused(text: str, says: str) -> None:
    error = refused(text)
    assert error.reason is Reason.POLICY
    assert says in error.actual
    assert error.details["policy"] == "a"


def test_an_unknown_attribute_is_refused_with_those_there_are() -> None:
    error = refused(f'@id("a") permit(principal is Worker, {RELEASE}, resource) when {{ principal.regoin == "eu" }};')
    assert "attributes of Worker: region, provider, machine, model, evidence" in error.expected


@given(st.from_regex(r"[a-z_]{3,20}", fullmatch=True))
def test_no_attribute_outside_the_schema_passes(name: str) -> None:
    condition = f"resource.{name} == resource.{name}"
    text = f'@id("a") permit(principal, action == Action::"submit", resource) when {{ {condition} }};'
    known = f" {name}:" in SCHEMA_TEXT.partition("entity Job")[2].partition("};")[0]
    if not known:
        assert refused(text).reason is Reason.POLICY


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["permit(principal, action, resource);"], "@id"),
        (['@id("") permit(principal, action, resource);'], "@id"),
        (['@id("Has Space") permit(principal, action, resource);'], "@id"),
        ([OK, OK], "two policies have the id"),
        ([OK + OK], "two policies have the id"),
        (['@id("a") permit(principal == ?principal, action, resource);'], "template"),
        (["permit(principal"], "not Cedar"),
        ([""], "number of policies"),
        (
            [f'@id("a") permit(principal, {RELEASE}, resource) when {{ Owner::"alice".name == "alice" }};'],
            "names itself",
        ),
    ],
)
def test_what_cedar_would_take_and_we_do_not(texts: list[str], says: str) -> None:
    error = refused(*texts)
    assert error.reason is Reason.POLICY
    assert says in error.message


@pytest.mark.parametrize(
    "body",
    [
        "(" * 200_000 + "true" + ")" * 200_000,
        "true && " * 200_000 + "true",
        "resource" + ".a" * 200_000,
        "if true then " * 50_000 + "true" + " else true" * 50_000,
        "[" * 100_000 + "]" * 100_000 + " == 1",
        "1 + " * 100_000 + "1 == 1",
    ],
)
def test_what_would_overflow_cedars_parser_never_reaches_it(body: str) -> None:
    error = refused(f'@id("a") permit(principal, action, resource) when {{ {body} }};')
    assert error.reason is Reason.TOO_LARGE


def test_brackets_in_strings_and_comments_do_not_count() -> None:
    text = '// ((((((((((((((((((((((((((((((((((((((((((((((( " \n'
    text += f'@id("a") permit(principal, {RELEASE}, resource) when {{ resource.owner == "{"(" * 500}&&\\"" }};'
    assert load_policies({"a.cedar": text}).ids == ("a",)


def test_files_are_named_and_few_and_small() -> None:
    for files in (
        {},
        {"a.txt": OK},
        {"../a.cedar": OK},
        {f"f{i}.cedar": OK.replace("ok", f"ok{i}") for i in range(65)},
    ):
        with pytest.raises(MalformedError):
            load_policies(files)
    with pytest.raises(MalformedError) as caught:
        load_policies({"a.cedar": OK + "//" + "x" * (1 << 20)})
    assert caught.value.reason is Reason.TOO_LARGE


def test_the_schema_is_cedar() -> None:
    assert "entity Worker" in str(schema())


# -- bundles -----------------------------------------------------------------------------------------------------------


def test_a_bundle_is_read_as_it_was_written() -> None:
    bundle = PolicyBundle.make("custodian", ("is-1", "ch-1"), {"a.cedar": OK})
    assert PolicyBundle.read(bundle.body()) == bundle
    assert bundle.body() == {"custodians": ["ch-1", "is-1"], "policies": {"a.cedar": OK}, "seat": "custodian"}


@pytest.mark.parametrize(
    "change",
    [
        {"seat": "worker"},
        {"seat": "coordinator"},
        {"custodians": []},
        {"custodians": ["ch-1", "ch-1"]},
        {"custodians": ["CH 1"]},
        {"policies": {"a.cedar": 3}},
        {"policies": []},
        {"policies": {}},
        {"extra": 1},
    ],
)
def test_a_bundle_of_another_form_is_refused(change: dict[str, object]) -> None:
    body = {"custodians": ["ch-1"], "policies": {"a.cedar": OK}, "seat": "custodian"}
    with pytest.raises(MalformedError):
        PolicyBundle.read({**body, **change})


def test_a_bundle_for_another_seat_is_refused() -> None:
    def bulletin(seat: str, *ids: str) -> Bulletin:
        body = PolicyBundle.make(seat, ids, {"a.cedar": OK}).body()
        return Bulletin("demo", "policy", 4, p.NOW, p.NOW + 100, body)

    ours = policy_kind(p.CUSTODIAN)
    assert ours.read(bulletin("custodian", "ch-1", "is-1")).bundle_version == 4
    for other in (bulletin("custodian", "is-1"), bulletin("coordinator")):
        with pytest.raises(RefusedError) as caught:
            ours.read(other)
        assert (caught.value.reason, caught.value.expected) == (Reason.POLICY, "custodian ch-1")
    with pytest.raises(RefusedError):
        policy_kind(Seat("coordinator")).read(bulletin("custodian", "ch-1"))


# -- lists -------------------------------------------------------------------------------------------------------------


def test_how_a_list_bears_on_a_request() -> None:
    entries = [
        ListEntry("region", "ru-1"),
        ListEntry("region", "SE", ("3A*", "5A002")),
        ListEntry("owner", "mallory"),
        ListEntry("provider", "shady", ("*",)),
    ]
    found = ControlledList(7, entries)
    listing = found.listing(
        owner="mallory", region="SE", provider="shady", regions=("SE", "ru-1"), export_control="3A001"
    )
    assert listing == {"version": 7, "owner": True, "region": True, "provider": True, "regions": ("SE", "ru-1")}
    none = found.listing(owner="alice", region="SE", provider="shady", regions=("SE", "ru-1"), export_control="")
    assert none == {"version": 7, "owner": False, "region": False, "provider": False, "regions": ("ru-1",)}
    assert not found.listing(region="SE", export_control="5A0021")["region"]
    assert ControlledList.read(found.body(), 7).entries == found.entries


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "country", "name": "XX", "classes": []},
        {"kind": "region", "name": "", "classes": []},
        {"kind": "region", "name": "a\x1b", "classes": []},
        {"kind": "region", "name": "a", "classes": ["**"]},
        {"kind": "region", "name": "a"},
        {"kind": "region", "name": "a", "classes": [], "until": 3},
        "a",
    ],
)
def test_a_list_of_another_form_is_refused(entry: object) -> None:
    with pytest.raises(MalformedError):
        ControlledList.read({"entries": [entry]}, 1)


def test_an_entry_twice_is_refused() -> None:
    with pytest.raises(MalformedError):
        ControlledList(1, [ListEntry("region", "a"), ListEntry("region", "a")])


# -- scenario tables ---------------------------------------------------------------------------------------------------

SCENARIO = {
    "name": "one",
    "owner": "alice",
    "worker": {"region": "eu", "provider": "acme", "evidence": ["sev-snp"]},
    "job": {"classification": "research"},
    "expect": "permit",
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"job": {}}, "classification is absent"),
        ({"job": {"classification": "research", "colour": "red"}}, "unknown members"),
        ({"job": None}, "not an object"),
        ({"worker": {"region": "eu"}}, "'provider' is missing"),
        ({"worker": {"region": "eu", "provider": "a", "evidence": [], "claims": 1}}, "unknown members"),
        ({"action": "leak"}, "action"),
        ({"expect": "maybe"}, "expect"),
        ({"seat": "owner"}, "seat"),
        ({"surprise": 1}, "unknown members"),
        ({"action": "rotate"}, "'key' is missing"),
        ({"now": 1.5}, "now"),
    ],
)
def test_a_scenario_of_another_form_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(MalformedError) as caught:
        read_scenarios({"scenarios": [{**SCENARIO, **change}]})
    assert says in caught.value.message


def test_a_table_needs_different_names() -> None:
    with pytest.raises(MalformedError):
        read_scenarios({"scenarios": [SCENARIO, SCENARIO]})


def test_a_scenario_says_what_was_decided_and_by_whom() -> None:
    engine = p.engine(OK)
    wrong = {**SCENARIO, "name": "two", "by": ["other"]}
    denied = {**SCENARIO, "name": "three", "expect": "deny"}
    first, second, third = run(engine, read_scenarios({"scenarios": [SCENARIO, wrong, denied]}))
    assert (first.passed, second.passed, third.passed) == (True, False, False)
    assert second.as_dict()["got"] == {"outcome": "permit", "by": ["ok"], "failed": []}


# -- controls ----------------------------------------------------------------------------------------------------------

CONTROLS = {
    "name": "mine",
    "title": "Mine | yours",
    "classifications": {
        "secret": {
            "description": "d",
            "regions": ["CH", 'a"\\b'],
            "evidence": ["sev-snp"],
            "minimum_tcb": {"sev-snp.microcode": 3},
            "quorum": {"custodians": 3, "jurisdictions": 1},
            "maximum_lifetime": "90m",
            "preparation": {"required": True, "maximum_epsilon": "0.5"},
        }
    },
}


def test_controls_compile_to_policies_that_load_and_to_a_table() -> None:
    controls = read_controls(CONTROLS)
    files = compile_controls(controls)
    assert list(files) == ["secret.cedar"]
    ids = load_policies(files).ids
    assert {"secret.submit", "secret.open", "secret.release", "secret.epsilon", "secret.development"} <= set(ids)
    assert compile_controls(read_controls(CONTROLS)) == files
    text = table(controls)
    assert "## Mine \\| yours" in text
    assert "3 custodians from 1 jurisdiction" in text
    assert "90 minutes" in text
    assert "ε ≤ 0.5" in text
    assert "Ceremonies: none is permitted." in text


@pytest.mark.parametrize(
    "change",
    [
        {"regions": []},
        {"regions": [False]},
        {"regions": ["a", "a"]},
        {"evidence": ["sgx"]},
        {"minimum_tcb": {"microcode": 3}},
        {"quorum": {"custodians": 0}},
        {"quorum": {"people": 3}},
        {"logging": "sometimes"},
        {"maximum_lifetime": 3600},
        {"maximum_lifetime": "0d"},
        {"preparation": {"maximum_epsilon": "0.0000001"}},
        {"preparation": {"maximum_epsilon": "NaN"}},
        {"preparation": {"maximum_epsilon": "-1"}},
        {"preparation": {"maximum_epsilon": "Infinity"}},
        {"lists": ["friends"]},
        {"colour": "red"},
        {"description": ""},
    ],
)
def test_controls_of_another_form_are_refused(change: dict[str, object]) -> None:
    row = {**CONTROLS["classifications"]["secret"], **change}  # type: ignore[index]
    with pytest.raises(MalformedError) as caught:
        read_controls({**CONTROLS, "classifications": {"secret": row}})
    assert caught.value.reason is Reason.MALFORMED


def test_a_classification_needs_a_name_a_manifest_can_have() -> None:
    with pytest.raises(MalformedError):
        read_controls({**CONTROLS, "classifications": {"Top Secret": {"description": "d"}}})
