"""How many more losses an epoch survives, against trying out every loss there can be."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.survival import survival
from tests.support.quorums import committee, quorums


def _fewest_fatal(quorum: Quorum, serving: set[str], groups: list[set[str]]) -> int:
    for count in range(len(groups) + 1):
        for lost in combinations(groups, count):
            if not quorum.is_qualified(serving.difference(*lost)):
                return count
    raise AssertionError("nobody at all qualified")


@given(quorum=quorums(), data=st.data())
def test_the_smallest_fatal_loss_is_what_trying_every_loss_finds(quorum: Quorum, data: st.DataObject) -> None:
    serving = data.draw(st.sets(st.sampled_from([*quorum.ids, "nobody-1"])))
    found = survival(quorum, serving)
    there = serving & set(quorum.ids)
    law = {each.id: each.jurisdiction for each in quorum.committee}
    singles = [{name} for name in sorted(there)]
    regions = [{name for name in there if law[name] == where} for where in sorted({law[name] for name in there})]
    assert set(found.serving) == there
    assert found.fatal_custodians == _fewest_fatal(quorum, there, singles)
    assert found.fatal_jurisdictions == _fewest_fatal(quorum, there, regions)
    assert found.quorum is quorum.is_qualified(there)
    # The examples are such losses, and of that size.
    assert len(found.fatal_custodians_example) == found.fatal_custodians
    assert not quorum.is_qualified(there - set(found.fatal_custodians_example))
    assert len(found.fatal_jurisdictions_example) == found.fatal_jurisdictions
    lost = {name for name in there if law[name] in found.fatal_jurisdictions_example}
    assert not quorum.is_qualified(there - lost)
    # Who may not be lost next: exactly those whose own loss is fatal.
    fatal_alone = {name for name in there if found.quorum and not quorum.is_qualified(there - {name})}
    assert set(found.indispensable) == fatal_alone
    assert set(found.indispensable_jurisdictions) == {
        where
        for where in set(law.values())
        if found.quorum and not quorum.is_qualified({name for name in there if law[name] != where})
    }


def test_three_of_five_survives_two_losses_then_one_then_none() -> None:
    quorum = Quorum({"at_least": 3, "jurisdictions": 2}, committee(5))
    ids = list(quorum.ids)
    assert [survival(quorum, ids[gone:]).losses for gone in range(4)] == [2, 1, 0, -1]
    last = survival(quorum, ids[2:])
    assert last.indispensable == tuple(ids[2:])
    assert len(last.fatal_custodians_example) == 1
    assert survival(quorum, ids[3:]).as_dict() | {"serving": []} == {
        "quorum": False,
        "serving": [],
        "losses": -1,
        "fatal_loss": [],
        "indispensable": [],
        "jurisdiction_losses": -1,
        "fatal_jurisdictions": [],
        "indispensable_jurisdictions": [],
    }


def test_a_rule_by_jurisdictions_names_the_one_that_cannot_be_lost() -> None:
    committee = [Custodian("ch-1", "CH"), Custodian("ch-2", "CH"), Custodian("de-1", "DE"), Custodian("us-1", "US")]
    quorum = Quorum({"at_least": 2, "include": {"jurisdiction": "CH"}}, committee)
    found = survival(quorum, quorum.ids)
    assert (found.losses, found.jurisdiction_losses) == (1, 0)
    assert found.indispensable == ()
    assert found.indispensable_jurisdictions == ("CH",)
    assert found.fatal_jurisdictions_example == ("CH",)
