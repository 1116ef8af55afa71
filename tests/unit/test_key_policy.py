"""What operators decide for a key: bounded, signed in the plan, known to every custodian that holds the epoch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import typer

from keyquorum.cli.durations import duration, in_words
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.strictjson import Fields
from tests.support.custodian import build_committee

DAY = 86400


@pytest.mark.parametrize(
    "change",
    [
        {"lease_seconds": 4},
        {"lease_seconds": 7 * DAY + 1},
        {"reattest_seconds": 0},
        {"reattest_seconds": 3601},
        {"rotate_after_seconds": -1},
        {"rotate_after_seconds": 59},
        {"rotate_after_seconds": 3653 * DAY + 1},
        {"retain_seconds": -1},
        {"retain_seconds": 3653 * DAY + 1},
        {"absent_at_most": -1},
        {"absent_at_most": 65},
    ],
)
def test_a_policy_out_of_its_bounds_is_malformed(change: dict[str, int]) -> None:
    with pytest.raises(MalformedError) as caught:
        KeyPolicy(**change)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.MALFORMED


def test_every_member_is_there_and_none_besides() -> None:
    whole = KeyPolicy().as_dict()
    assert KeyPolicy.read(Fields(whole, "policy")) == KeyPolicy()
    for name in whole:
        with pytest.raises(MalformedError, match=name):
            KeyPolicy.read(Fields({key: value for key, value in whole.items() if key != name}, "policy"))
    with pytest.raises(MalformedError, match="unknown members"):
        KeyPolicy.read(Fields(whole | {"lease": 1}, "policy"))
    for name, value in (("lease_seconds", True), ("retain_seconds", "30d"), ("canary", 1), ("absent_at_most", 1.5)):
        with pytest.raises(MalformedError, match=name):
            KeyPolicy.read(Fields(whole | {name: value}, "policy"))


def test_custodians_know_the_policy_of_an_epoch_also_after_a_restart(tmp_path: Path) -> None:
    committee = build_committee(tmp_path)
    policy = KeyPolicy(lease_seconds=60, reattest_seconds=30, canary=True)
    committee.generate("key-1", policy=policy)
    assert all(node.epochs.active("key-1", 1).policy == policy for node in committee.nodes.values())
    committee.close()
    assert committee.open("ch-1").epochs.active("key-1", 1).policy == policy
    plan = dataclasses.replace(committee.plan("key-2"), policy=policy)
    assert CeremonyPlan.parse(plan.to_payload()).policy == policy
    committee.close()


@pytest.mark.parametrize(
    ("text", "seconds", "words"),
    [("90", 90, "90s"), ("90s", 90, "90s"), ("30m", 1800, "30m"), ("12h", 43200, "12h"), ("2w", 1209600, "2w"),
     ("14d", 1209600, "2w"), ("0", 0, "never"), ("never", 0, "never")],
)  # fmt: skip
def test_durations_are_read_and_written(text: str, seconds: int, words: str) -> None:
    assert duration(text) == seconds
    assert in_words(seconds) == words


@pytest.mark.parametrize("text", ["", "1z", "-1", "1 h", "1.5h", "h", "\u0661h", "99999999999"])
def test_what_is_no_duration_is_wrong_usage(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        duration(text)
