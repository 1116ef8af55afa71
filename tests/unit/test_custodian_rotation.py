"""Rotation at custodians: the next epoch takes the present one and fresh parts; an absent custodian stops nothing; the
old epoch serves what began on it; nobody but operators or the key's policy orders it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core import ceremony, derivation
from keyquorum_core.ceremony import EpochCertificate
from keyquorum_core.ceremony_plan import PLAN_TYPE, OrderedBy
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.errors import KeyquorumError, Reason, StateError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.signing import peek_payload, sign
from keyquorum_custodian.epochs import ISSUE_GRACE
from tests.support.ceremonies import Make, Rebuild, certificate_of
from tests.support.custodian import Committee, build_committee

FIVE = (("ch-1", "CH"), ("ch-2", "CH"), ("is-1", "IS"), ("jp-1", "JP"), ("no-1", "NO"))
HOURLY = KeyPolicy(rotate_after_seconds=3600, retain_seconds=600)
CONTEXT = b"c" * 32


class Clock:
    def __init__(self, now: int = 1_800_000_000) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def refusal(reason: Reason, call: Any, *arguments: Any) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call(*arguments)
    assert caught.value.reason is reason, caught.value
    return caught.value


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Committee:
    built = build_committee(tmp_path_factory.mktemp("rotation"), clock=Clock())
    built.generate(policy=HOURLY)
    built.close()
    return built


@pytest.fixture
def committee(template: Committee, tmp_path: Path, clock: Clock) -> Iterator[Committee]:
    copied = template.copy(tmp_path, clock)
    copied.open_all()
    yield copied
    copied.close()


def roots(committee: Committee, epoch: int, *, of: tuple[str, ...] | None = None) -> bytes:
    """The root for one context that the custodians in ``of`` hold together; all of them must agree on every seed."""
    together: dict[int, bytes] = {}
    for name in of or committee.ids:
        for index, value in committee.open(name).epochs.active("key-1", epoch).contributions(CONTEXT).items():
            assert together.setdefault(index, value) == value
    return derivation.root(together, CONTEXT)


def test_g5_the_next_epoch_takes_every_seed_of_the_present_one_and_fresh_parts(committee: Committee) -> None:
    store = committee.open("ch-1").keystore
    before = store.seeds(store.epochs("key-1")[0])
    make = Make.rotate(committee, "key-1").propose()
    given = {
        name: committee.nodes[name].keystore.parts(committee.nodes[name].keystore.ceremony(make.id))  # type: ignore[arg-type]
        for name in committee.ids
    }
    make.activate()
    after = store.seeds(store.epochs("key-1")[1])
    for index, old in before.items():
        parts = {name: given[name][index] for name in committee.quorum.holders(index)}
        assert after[index] == ceremony.seed(make.id, index, parts, old)
        assert after[index] != ceremony.seed(make.id, index, parts)
    assert roots(committee, 1) != roots(committee, 2)
    assert committee.open("ch-1").epochs.active("key-1", 2).policy == HOURLY


def test_every_earlier_epoch_still_derives_after_rotations_and_restarts(committee: Committee) -> None:
    derived = [roots(committee, 1)]
    for epoch in (2, 3):
        Make.rotate(committee, "key-1").activate()
        derived.append(roots(committee, epoch))
    committee.close()
    committee.open_all()
    assert [roots(committee, epoch) for epoch in (1, 2, 3)] == derived
    states = [row.state for row in committee.nodes["ch-1"].keystore.epochs("key-1")]
    assert states == ["retired", "retired", "active"]


def test_a_rotation_runs_without_an_absent_custodian_and_says_so(committee: Committee) -> None:
    certificate = Make.rotate(committee, "key-1", present=("ch-1", "no-1")).activate()
    payload = peek_payload(certificate, ceremony.CERTIFICATE_TYPE, "it")
    assert EpochCertificate.parse(payload).absent == ("is-1",)
    assert b'"absent":["is-1"]' in payload
    assert roots(committee, 2, of=("ch-1", "no-1"))
    refusal(Reason.EPOCH, committee.open("is-1").epochs.active, "key-1", 2)
    assert committee.open("is-1").epochs.active("key-1", 1).state == "active"
    committee.close()
    assert roots(committee, 2, of=("ch-1", "no-1"))


def test_a_stale_custodian_is_no_part_of_the_next_rotation_until_it_is_repaired(committee: Committee) -> None:
    Make.rotate(committee, "key-1", present=("ch-1", "no-1")).activate()
    make = Make.rotate(committee, "key-1")
    error = refusal(Reason.KEY_STATE, make.propose_one, "is-1")
    assert error.details["stale"] == "is-1"
    assert "key repair" in error.next_step
    make.cancel()
    Rebuild(committee, "key-1", 2, "is-1").restore()
    assert roots(committee, 2) == roots(committee, 2, of=("ch-1", "no-1"))
    Make.rotate(committee, "key-1").activate()
    assert roots(committee, 3)


@pytest.mark.parametrize(
    ("present", "absent_at_most"),
    [(("ch-1",), 2), (("ch-1", "no-1"), 0)],
    ids=["no quorum", "policy"],
)
def test_too_few_cannot_make_an_epoch(
    tmp_path: Path, clock: Clock, present: tuple[str, ...], absent_at_most: int
) -> None:
    committee = build_committee(tmp_path, clock=clock)
    committee.generate(policy=KeyPolicy(absent_at_most=absent_at_most))
    make = Make.rotate(committee, "key-1", present=present)
    make.propose()
    refusal(Reason.CEREMONY, committee.open("ch-1").ceremonies.deliver, make.id, make.headers, make.parts("ch-1"))
    assert len(committee.open("ch-1").keystore.epochs("key-1")) == 1
    committee.close()


def test_nobody_may_be_absent_from_a_first_epoch(committee: Committee) -> None:
    make = Make(committee, committee.plan("key-2"), present=("ch-1", "no-1"))
    make.propose()
    error = refusal(Reason.CEREMONY, make.deliver_one, "ch-1")
    assert error.details["custodians"] == "is-1"


def test_a_custodian_does_not_sign_for_an_epoch_it_was_left_out_of(committee: Committee) -> None:
    make = Make.rotate(committee, "key-1")
    make.propose()
    make.present = ("ch-1", "no-1")
    refusal(Reason.CEREMONY, committee.open("is-1").ceremonies.deliver, make.id, make.headers, [])


def test_told_of_different_participants_nobody_confirms(committee: Committee) -> None:
    """A coordinator that tells one that another is absent, and the others that all are there."""
    make = Make.rotate(committee, "key-1")
    make.propose()
    everyone = make.present
    make.present = ("ch-1", "no-1")
    make.deliver_one("ch-1")
    make.present = everyone
    for name in ("is-1", "no-1"):
        make.deliver_one(name)
    for name in everyone:
        refusal(Reason.CEREMONY, make.confirm_one, name)
    make.cancel()
    assert roots(committee, 1)
    Make.rotate(committee, "key-1").activate()


def test_a_cancelled_rotation_leaves_the_old_epoch_as_it_was(committee: Committee) -> None:
    before = roots(committee, 1)
    for step in ("propose", "deliver", "confirm"):
        make = Make.rotate(committee, "key-1")
        getattr(make, step)()
        make.cancel()
        assert roots(committee, 1) == before
        assert committee.open("ch-1").epochs.active("key-1", 1).state == "active"
    Make.rotate(committee, "key-1").activate()


def test_a_retired_epoch_serves_what_began_on_it_and_nothing_new(committee: Committee, clock: Clock) -> None:
    clock.now += 4000
    Make.rotate(committee, "key-1").activate()
    held = committee.open("ch-1").epochs.active("key-1", 1)
    assert (held.state, held.retired_at) == ("retired", clock.now)
    held.check_serves(clock.now + ISSUE_GRACE)
    refusal(Reason.KEY_STATE, held.check_serves, clock.now + ISSUE_GRACE + 1)
    committee.open("ch-1").epochs.active("key-1", 2).check_serves(2**40)


def test_the_policy_rotates_when_the_epoch_is_old_enough_and_never_before(committee: Committee, clock: Clock) -> None:
    def attempt(**changes: Any) -> Make:
        return Make.rotate(committee, "key-1", ordered_by=OrderedBy.POLICY, **changes)

    clock.now += HOURLY.rotate_after_seconds - 1
    error = refusal(Reason.STATE, attempt().propose_one, "ch-1")
    assert isinstance(error, StateError)
    clock.now += 1
    refusal(Reason.STALE, attempt(created_at=clock.now - 301).propose_one, "ch-1")
    refusal(Reason.STALE, attempt(created_at=clock.now + 301).propose_one, "ch-1")
    changed = dataclasses.replace(HOURLY, rotate_after_seconds=60)
    refusal(Reason.CEREMONY, attempt(policy=changed).propose_one, "ch-1")
    attempt().activate()
    refusal(Reason.STATE, attempt().propose_one, "ch-1")  # a coordinator cannot rotate as often as it likes
    clock.now += HOURLY.rotate_after_seconds
    attempt().activate()
    assert roots(committee, 3)


def test_without_a_schedule_only_operators_rotate(tmp_path: Path, clock: Clock) -> None:
    committee = build_committee(tmp_path, clock=clock)
    committee.generate()
    clock.now += 10**8
    make = Make.rotate(committee, "key-1", ordered_by=OrderedBy.POLICY)
    refusal(Reason.STATE, make.propose_one, "ch-1")
    signed = sign(committee.operator.identity, PLAN_TYPE, make.plan.to_payload())
    refusal(Reason.SIGNATURE_EXTRA, committee.open("ch-1").ceremonies.propose, signed)
    committee.close()


def test_an_operator_may_change_the_policy_with_a_rotation(committee: Committee) -> None:
    policy = KeyPolicy(lease_seconds=30, reattest_seconds=10)
    Make.rotate(committee, "key-1", policy=policy).activate()
    assert committee.open("no-1").epochs.active("key-1", 2).policy == policy


@pytest.mark.parametrize("what", ["certificate", "epoch", "quorum", "stale plan"])
def test_a_rotation_of_something_else_is_refused(committee: Committee, clock: Clock, what: str) -> None:
    from keyquorum_core.quorum import Quorum

    _, before = certificate_of(committee, "key-1", 1)
    other = Quorum({"at_least": 3}, before.plan.quorum.committee)
    changes: dict[str, dict[str, Any]] = {
        "certificate": {"certificate": "0" * 64},
        "epoch": {"epoch": 3},
        "quorum": {"quorum": other},
        "stale plan": {"created_at": clock.now - 9 * 86400},
    }
    plan = dataclasses.replace(Make.rotate(committee, "key-1").plan, **changes[what])
    reason = {"epoch": Reason.KEY_STATE, "stale plan": Reason.STALE}.get(what, Reason.CEREMONY)
    for name in committee.ids:
        refusal(reason, Make(committee, plan).propose_one, name)


def test_a_new_key_version_follows_the_old_one_and_takes_nothing_from_it(committee: Committee) -> None:
    """What a change of committee or rule comes to: a fresh epoch under the same key id, which waits for operators."""
    _, before = certificate_of(committee, "key-1", 1)
    plan = committee.plan("key-1", 2, certificate=before.digest, policy=HOURLY)
    assert plan.kind is Kind.GENERATE
    make = Make(committee, plan)
    for name in committee.ids:
        error = refusal(Reason.APPROVAL, make.propose_one, name)
        approvals = committee.open(name).ceremonies.approvals
        (row,) = approvals.pending()
        assert row.kind == "renew"
        assert any(line.startswith("- key key-1 epoch 1") for line in row.difference)
        assert error.details["request"] == row.request_id
        approvals.decide(row.request_id, row.subject, approve=True)
    make.activate()
    assert roots(committee, 1) != roots(committee, 2)
    assert committee.open("ch-1").epochs.active("key-1", 1).state == "retired"
    refusal(Reason.EXISTS, Make(committee, committee.plan("key-1", 2, certificate=before.digest)).propose_one, "ch-1")


def test_of_five_any_two_may_be_absent_if_the_policy_says_so(tmp_path: Path, clock: Clock) -> None:
    committee = build_committee(tmp_path, FIVE, {"at_least": 3}, clock=clock)
    committee.generate(policy=KeyPolicy(absent_at_most=2))
    make = Make.rotate(committee, "key-1", present=("ch-1", "is-1", "no-1"))
    make.activate()
    whole = roots(committee, 2, of=make.present)
    for name in ("ch-2", "jp-1"):
        Rebuild(committee, "key-1", 2, name).restore()
    assert roots(committee, 2) == whole
    assert roots(committee, 2, of=("ch-2", "jp-1", "no-1")) == whole
    committee.close()
