"""Which cosignatures go into a checkpoint's note: all that there is room for, and always a quorum."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_coordinator.witnesses import Witnesses
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.roster import MAX_COSIGNERS

MANY = [Custodian(f"c-{number:02}", ("CH", "DE", "IS")[number % 3]) for number in range(12)]
IDS = [custodian.id for custodian in MANY]


def chosen(quorum: Quorum, cosigned: Iterable[str]) -> list[str]:
    fanout = SimpleNamespace(quorum=quorum, roster=SimpleNamespace(witnesses=dict), running=0)
    return Witnesses(cast(Any, None), cast(Any, fanout))._chosen(cosigned)


@pytest.mark.parametrize(
    "rule",
    [
        {"at_least": 3},
        {"at_least": 4, "jurisdictions": 3},
        {"all_of": [{"at_least": 2}, {"include": {"custodian": "c-11"}}]},
    ],
    ids=str,
)
@given(st.sets(st.sampled_from(IDS)))
@settings(max_examples=60, deadline=None)
def test_a_quorum_stays_a_quorum_and_fits(rule: dict[str, object], cosigned: set[str]) -> None:
    quorum = Quorum(rule, MANY)
    taken = chosen(quorum, cosigned)
    assert set(taken) <= cosigned
    assert taken == chosen(quorum, cosigned)
    if quorum.is_qualified(cosigned):
        assert quorum.is_qualified(taken)
        assert len(taken) <= MAX_COSIGNERS
    if len(cosigned) <= MAX_COSIGNERS:
        assert set(taken) == cosigned
