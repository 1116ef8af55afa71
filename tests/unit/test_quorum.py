from __future__ import annotations

import json
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.quorum import Custodian, Quorum, explain, load_quorum_document
from keyquorum_core.rule import MAX_DEPTH
from tests.support.quorums import committee, qualifies, quorums, rules, subsets

INVALID = json.loads(
    (Path(__file__).parents[2] / "docs" / "spec" / "vectors" / "quorum-invalid.json").read_text(encoding="utf-8")
)["vectors"]

FIVE = committee(5)
HOME = {"at_least": 3, "jurisdictions": 2, "include": {"jurisdiction": "CH"}}


def brute_force_sets(quorum: Quorum) -> list[tuple[str, ...]]:
    """Maximal unqualified sets by trying every set, with the literal reading of the rule."""
    bad = [s for s in subsets(quorum.ids) if not qualifies(quorum.rule, quorum.committee, s)]
    return sorted((s for s in bad if not any(set(s) < set(t) for t in bad)), key=lambda s: (len(s), s))


@pytest.mark.parametrize("vector", INVALID, ids=[v["name"] for v in INVALID])
def test_invalid_rules_are_refused_with_the_member_at_fault(vector: dict[str, Any]) -> None:
    with pytest.raises(KeyquorumError) as caught:
        load_quorum_document({"custodians": vector["custodians"], "quorum": vector["quorum"]})
    assert caught.value.kind == vector["kind"]
    assert caught.value.reason in (Reason.QUORUM_RULE, Reason.MALFORMED)
    assert vector["message_contains"] in str(caught.value)


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {"custodians": [], "quorum": {"at_least": 2}},
        {"custodians": [{"id": "a", "jurisdiction": "CH"}]},
        {"custodians": [{"id": "a"}, {"id": "b", "jurisdiction": "CH"}], "quorum": {"at_least": 2}},
        {"custodians": [{"id": "a", "jurisdiction": "CH", "x": 1}], "quorum": {"at_least": 2}},
        {"custodians": [{1: "a"}], "quorum": {"at_least": 2}},
        {1: 2},
        {"custodians": ["a", "b"], "quorum": {"at_least": 2}},
        {"custodians": [{"id": "a", "jurisdiction": "CH"}, {"id": "b", "jurisdiction": "CH"}], "quorum": [], "more": 1},
    ],
    ids=str,
)
def test_malformed_documents_raise_malformed_error(document: object) -> None:
    with pytest.raises(MalformedError):
        load_quorum_document(document)


def test_norway_without_quotes_is_explained() -> None:
    document = {"custodians": [{"id": "no-1", "jurisdiction": False}], "quorum": {"at_least": 2}}
    with pytest.raises(MalformedError, match="YAML reads NO"):
        load_quorum_document(document)


def test_rules_that_nest_without_end_are_refused() -> None:
    endless: dict[str, object] = {}
    endless["all_of"] = [endless]
    with pytest.raises(MalformedError, match="nested too deeply"):
        Quorum(endless, FIVE)
    deep: dict[str, object] = {"at_least": 2}
    for _ in range(MAX_DEPTH - 1):
        deep = {"all_of": [deep]}
    assert Quorum(deep, FIVE).seed_count == 5
    with pytest.raises(MalformedError, match="nested too deeply"):
        Quorum({"all_of": [deep]}, FIVE)


def test_large_rules_are_refused() -> None:
    pairs = [{"at_least": 2, "of": [a.id, b.id]} for a, b in combinations(committee(12), 2)]
    with pytest.raises(MalformedError, match="too large"):
        Quorum({"any_of": pairs}, committee(12))
    assert Quorum({"any_of": pairs[:40]}, committee(12)).seed_count > 0


def test_huge_integers_are_refused_without_printing_them() -> None:
    with pytest.raises(RefusedError, match="a very large integer"):
        Quorum({"at_least": 10**6000}, FIVE)


def test_home_rule() -> None:
    quorum = Quorum(HOME, FIVE)
    assert quorum.ids == ("ch-1", "ch-2", "de-1", "fr-1", "se-1")
    assert quorum.maximal_unqualified_sets == (
        ("ch-1", "ch-2"),
        ("ch-1", "de-1"),
        ("ch-1", "fr-1"),
        ("ch-1", "se-1"),
        ("ch-2", "de-1"),
        ("ch-2", "fr-1"),
        ("ch-2", "se-1"),
        ("de-1", "fr-1", "se-1"),
    )
    assert quorum.holders(7) == ("ch-1", "ch-2")
    assert quorum.indices_of("ch-1") == (4, 5, 6, 7)
    assert quorum.rule == HOME
    assert quorum.is_qualified(["ch-1", "de-1", "fr-1", "nobody"])
    assert not quorum.is_qualified(["ch-1", "de-1", "nobody"])


def test_quorums_are_equal_by_rule_and_committee() -> None:
    assert Quorum(HOME, FIVE) == Quorum(dict(reversed(HOME.items())), reversed(FIVE))
    assert len({Quorum(HOME, FIVE), Quorum(HOME, FIVE), Quorum({"at_least": 3}, FIVE)}) == 2
    quorum = Quorum(HOME, FIVE)
    quorum.rule["at_least"] = 1
    assert quorum.rule == HOME


def test_unknown_custodians_and_seeds_are_refused() -> None:
    quorum = Quorum(HOME, FIVE)
    with pytest.raises(MalformedError) as caught:
        quorum.indices_of("xx-1")
    assert caught.value.reason == Reason.UNKNOWN_CUSTODIAN
    for index in (-1, quorum.seed_count):
        with pytest.raises(MalformedError):
            quorum.holders(index)


def test_committees_are_bounded() -> None:
    crowd = [Custodian(f"c{i}", "CH") for i in range(65)]
    with pytest.raises(MalformedError, match="committee size"):
        Quorum({"at_least": 2}, crowd)
    with pytest.raises(MalformedError, match="committee size"):
        Quorum({"at_least": 2}, crowd[:1])
    assert Quorum({"at_least": 2}, crowd[:64]).seed_count == 64


@pytest.mark.parametrize(
    ("rule", "size", "count"),
    [
        ({"at_least": 20}, 40, "68923264410"),
        ({"at_least": 20, "jurisdictions": 4}, 40, "68808547144"),
        ({"at_least": 9}, 18, "24310"),
    ],
)
def test_rules_with_too_many_seeds_are_refused_at_once_saying_the_count(
    rule: dict[str, object], size: int, count: str
) -> None:
    with pytest.raises(RefusedError, match="too many seeds") as caught:
        Quorum(rule, committee(size))
    assert caught.value.actual == count


@pytest.mark.timeout(60)  # seconds on a busy machine; without a bound, hours
def test_intricate_rules_end() -> None:
    lists = [[f"c{(i * 7 + j * (i + 3)) % 41}" for j in range(9)] for i in range(12)]
    rule = {"any_of": [{"at_least": 4, "of": sorted(set(names))} for names in lists]}
    with pytest.raises(RefusedError):
        Quorum(rule, [Custodian(f"c{i}", "CH") for i in range(41)])


def test_eight_of_sixteen_is_accepted() -> None:
    quorum = Quorum({"at_least": 8}, committee(16))
    assert quorum.seed_count == 11440
    assert set(quorum.resilience().seeds_per_custodian.values()) == {6435}


def test_resilience_of_the_home_rule() -> None:
    report = Quorum(HOME, FIVE).resilience()
    assert report.as_dict() == {
        "custodians": 5,
        "jurisdictions": 4,
        "fewest_custodians_to_collude": 3,
        "custodians_example": list(report.custodians_example),
        "fewest_jurisdictions_to_collude": 2,
        "jurisdictions_example": list(report.jurisdictions_example),
        "most_that_may_fail": 1,
        "veto_holders": [],
        "veto_jurisdictions": ["CH"],
        "seed_count": 8,
        "seeds_per_custodian": {"ch-1": 4, "ch-2": 4, "de-1": 5, "fr-1": 5, "se-1": 5},
    }
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()


def test_explanations_for_people() -> None:
    quorum = Quorum(HOME, FIVE)
    text = explain(quorum)
    assert "at least 3 of the 5 custodians" in text
    assert "veto jurisdictions: CH" in text
    assert (
        quorum.explain_missing(["de-1", "fr-1"]) == "at least 3 of the 5 custodians (has 2); a custodian in CH (has 0)"
    )
    either = Quorum({"any_of": [{"at_least": 4}, {"include": [{"custodian": "ch-1"}, {"custodian": "ch-2"}]}]}, FIVE)
    assert either.explain_missing(["ch-1"]).startswith(
        "one of: at least 4 of the 5 custodians (has 1); or custodian ch-2"
    )
    assert "never counts: de-1" in explain(Quorum({"at_least": 2, "of": ["ch-1", "ch-2", "fr-1", "se-1"]}, FIVE))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_rules_mean_what_the_blueprint_says_and_are_monotone(data: st.DataObject) -> None:
    quorum = data.draw(quorums())
    chosen = data.draw(st.sets(st.sampled_from(quorum.ids)))
    assert quorum.is_qualified(chosen) == qualifies(quorum.rule, quorum.committee, chosen)
    assert quorum.is_qualified(chosen) == (quorum.explain_missing(chosen) == "")
    more = chosen | data.draw(st.sets(st.sampled_from(quorum.ids)))
    assert quorum.is_qualified(more) or not quorum.is_qualified(chosen)


@settings(max_examples=80, deadline=None)
@given(quorums())
def test_maximal_unqualified_sets_are_those_found_by_trying_all(quorum: Quorum) -> None:
    sets = brute_force_sets(quorum)
    assert list(quorum.maximal_unqualified_sets) == sets
    for index, members in enumerate(sets):
        assert set(quorum.holders(index)) == set(quorum.ids) - set(members)
    for name in quorum.ids:
        assert quorum.indices_of(name) == tuple(i for i, members in enumerate(sets) if name not in members)


@settings(max_examples=60, deadline=None)
@given(quorums())
def test_resilience_is_that_found_by_trying_all(quorum: Quorum) -> None:
    report = quorum.resilience()
    where = {c.id: c.jurisdiction for c in quorum.committee}
    good = [set(s) for s in subsets(quorum.ids) if qualifies(quorum.rule, quorum.committee, s)]
    assert report.fewest_custodians_to_collude == min(map(len, good)) == len(report.custodians_example)
    assert set(report.custodians_example) in good
    allied = [places for places in subsets(set(where.values())) if {n for n in where if where[n] in places} in good]
    assert report.fewest_jurisdictions_to_collude == min(map(len, allied))
    assert report.jurisdictions_example in allied
    tolerated = [
        k for k in range(len(where)) if all(set(where) - set(s) in good for s in subsets(where) if len(s) == k)
    ]
    assert report.most_that_may_fail == max(tolerated)
    assert report.veto_holders == tuple(n for n in quorum.ids if all(n in s for s in good))
    assert report.veto_jurisdictions == tuple(
        j for j in sorted(set(where.values())) if all(any(where[n] == j for n in s) for s in good)
    )


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_only_rules_that_nobody_or_one_alone_meets_are_refused(data: st.DataObject) -> None:
    custodians = committee(data.draw(st.integers(2, 5)))
    rule = data.draw(rules(custodians))
    ids = [c.id for c in custodians]
    sound = qualifies(rule, custodians, ids) and not any(qualifies(rule, custodians, [name]) for name in ids)
    try:
        Quorum(rule, custodians)
    except RefusedError:
        assert not sound
    else:
        assert sound


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["at_least", "of", "jurisdictions", "include", "all_of", "any_of", "custodian", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(json_values)
def test_any_input_gives_a_quorum_or_one_of_our_errors(value: object) -> None:
    document = {"custodians": [{"id": c.id, "jurisdiction": c.jurisdiction} for c in FIVE], "quorum": value}
    with suppress(KeyquorumError):
        assert load_quorum_document(document).rule == value
