"""A custodian's own Cedar policies have the last word in ceremonies: over operators' orders, over its own operator's
approval, over a key's schedule; asked when a ceremony is proposed, and again before the step that binds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core.ceremony_plan import OrderedBy
from keyquorum_core.ceremony_states import Kind, State
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.key_policy import KeyPolicy
from tests.support import policies
from tests.support.ceremonies import Destroy, Make, Rebuild, certificate_of
from tests.support.custodian import Committee, build_committee, new_roster

KEY = "key-1"
POLICY = KeyPolicy(rotate_after_seconds=3600, retain_seconds=600)
ME = "ch-1"
Install = Callable[[str], None]


class Clock:
    def __init__(self, now: int = 1_800_000_000) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Committee:
    """Epoch 1 is retired, epoch 2 active."""
    built = build_committee(tmp_path_factory.mktemp("policy"), clock=Clock())
    built.generate(policy=POLICY)
    Make.rotate(built, KEY).activate()
    built.close()
    return built


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def committee(template: Committee, tmp_path: Path, clock: Clock) -> Iterator[Committee]:
    copied = template.copy(tmp_path, clock)
    copied.open_all()
    yield copied
    copied.close()


@pytest.fixture
def install(committee: Committee) -> Install:
    """Have ch-1 go by these policies."""

    def accept(text: str) -> None:
        node = committee.open(ME)
        version = next(each.version for name, each, _ in node.bulletins.states() if name == "policy" and each)
        node.bulletins.accept(
            policies.bundle(
                [committee.operator.identity],
                text=text,
                custodians=[ME],
                version=version + 1,
                issued_at=int(committee.clock()) - 10,
            )
        )

    return accept


def denied(call: Any, *arguments: Any) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call(*arguments)
    assert caught.value.reason is Reason.POLICY, caught.value
    return caught.value


def rules(action: str, when: str) -> str:
    return f'@id("own.{action}") permit(principal, action == Action::"{action}", resource) when {{ {when} }};'


def test_a_rotation_that_no_policy_permits_is_refused_and_leaves_nothing(
    committee: Committee, install: Install
) -> None:
    install(rules("rotate", 'context.operators.contains("nobody")'))
    make = Make.rotate(committee, KEY)
    error = denied(make.propose_one, ME)
    assert error.details["policy_version"] == "2"
    assert len(error.details["decision_sha256"]) == 64
    assert "context.operators" in error.details["field"]
    assert error.next_step
    store = committee.open(ME).keystore
    assert store.ceremony(make.id) is None
    assert not committee.open(ME).ceremonies.approvals.pending()
    assert [row.state for row in store.epochs(KEY)] == ["retired", "active"]
    install(rules("rotate", f'context.operators.contains("{committee.operator.name}")'))
    make.activate()
    assert committee.open(ME).epochs.active(KEY, 3).state == "active"


def test_what_a_policy_permits_of_the_routine_is_not_put_before_the_operator(
    committee: Committee, install: Install
) -> None:
    """Cedar permits, and the operator approved rotations beforehand: nobody is asked."""
    install(rules("rotate", "resource.age_seconds == 0"))
    Make.rotate(committee, KEY).propose()
    assert not committee.open(ME).ceremonies.approvals.pending()


def test_the_age_is_that_of_the_present_epoch(committee: Committee, install: Install, clock: Clock) -> None:
    install(rules("rotate", 'resource.age_seconds >= 100 && resource.name == "key-1" && resource.epoch == 2'))
    denied(Make.rotate(committee, KEY).propose_one, ME)
    clock.now += 100
    Make.rotate(committee, KEY).propose_one(ME)


def test_a_schedule_is_permitted_as_such_and_by_no_operator(
    committee: Committee, install: Install, clock: Clock
) -> None:
    clock.now += 3600
    install(rules("rotate", "context.operator_count >= 1"))
    scheduled = Make.rotate(committee, KEY, ordered_by=OrderedBy.POLICY)
    denied(scheduled.propose_one, ME)
    install(rules("rotate", "context.scheduled"))
    denied(Make.rotate(committee, KEY).propose_one, ME)  # an operator's order is no schedule
    scheduled.propose_one(ME)


def test_a_new_epoch_for_another_rule_is_a_rotation_too(committee: Committee, install: Install) -> None:
    install(rules("destroy", "true"))
    _, present = certificate_of(committee, KEY, 2)
    anew = Make(committee, committee.plan(KEY, 3, kind=Kind.GENERATE, certificate=present.digest, policy=POLICY))
    denied(anew.propose_one, ME)
    # A key's first epoch ends none, and is nobody's rotation.
    Make(committee, committee.plan("key-2", policy=POLICY)).propose_one(ME)


def test_no_operator_s_approval_makes_up_for_a_policy_that_denies(committee: Committee, install: Install) -> None:
    destroy = Destroy(committee, KEY, 1)
    install(rules("rotate", "true"))
    denied(destroy.propose_one, ME)
    assert not committee.open(ME).ceremonies.approvals.pending()
    install(rules("destroy", "true"))
    destroy.approve()
    install(rules("rotate", "true"))
    error = denied(destroy.propose_one, ME)  # approved meanwhile, and denied all the same
    assert error.expected
    install(rules("destroy", "true"))
    destroy.propose_one(ME)


def test_policies_are_asked_again_before_seeds_are_erased(committee: Committee, install: Install) -> None:
    destroy = Destroy(committee, KEY, 1).approve().propose()
    install(rules("rotate", "true"))
    denied(destroy.erase_one, ME)
    node = committee.open(ME)
    row = node.keystore.ceremony(destroy.id)
    assert row is not None
    assert row.state is State.PROPOSED
    assert node.epochs.active(KEY, 1).contributions(bytes(32))
    install(rules("destroy", "true"))
    receipt = destroy.erase_one(ME)
    install(rules("rotate", "true"))
    assert destroy.erase_one(ME) == receipt  # it happened: what is repeated is not decided anew


def test_policies_are_asked_again_before_a_certificate_is_signed(committee: Committee, install: Install) -> None:
    make = Make.rotate(committee, KEY).deliver()
    install(rules("destroy", "true"))
    denied(make.confirm_one, ME)
    row = committee.open(ME).keystore.ceremony(make.id)
    assert row is not None
    assert row.state is State.DELIVERED
    install(rules("rotate", "true"))
    make.confirm()
    install(rules("destroy", "true"))
    make.activate()  # it is certified: nothing to decide any more
    assert committee.open(ME).epochs.active(KEY, 3).state == "active"


def test_nothing_is_rotated_or_destroyed_without_a_policy_in_date(committee: Committee, clock: Clock) -> None:
    make, destroy = Make.rotate(committee, KEY), Destroy(committee, KEY, 1)
    clock.now += 5 * 86400
    node = committee.open(ME)
    (expires,) = {each.expires_at for name, each, _ in node.bulletins.states() if name == "policy" and each}
    clock.now = max(clock.now, expires + 1)
    for plan in (make, destroy):
        with pytest.raises(KeyquorumError) as caught:
            node.ceremonies._own_policy.check(plan.plan, ["olga"])
        assert caught.value.reason is Reason.EXPIRED


NORDIC = 'principal is Custodian && ["IS", "NO"].contains(principal.jurisdiction)'


def joined(committee: Committee, **change: Any) -> None:
    """The next roster, and every custodian that was there serving under it."""
    names = [name for name in committee.ids if name != change.get("replace")]
    committee.close()
    if "replace" in change:
        shutil.rmtree(committee.directory(change["replace"]))
    new_roster(committee, **change)
    for name in names:
        committee.open(name)


def test_nobody_takes_another_s_place_whom_a_policy_does_not_enrol(committee: Committee, install: Install) -> None:
    earlier = committee.roster_envelope
    joined(committee, replace="no-1")
    replace = Rebuild(committee, KEY, 2, "no-1", kind=Kind.REPLACE)
    replace.rosters = [earlier]
    install(rules("rotate", "true"))
    error = denied(replace.propose_one, ME)
    assert error.details["policy_version"] == "2"
    assert not committee.open(ME).ceremonies.approvals.pending()
    install(rules("enrol", f'{NORDIC} && resource.name == "{committee.roster.cluster}" && context.operator_count > 1'))
    denied(replace.propose_one, ME)
    install(rules("enrol", f"{NORDIC} && context.operator_count == 1"))
    with pytest.raises(KeyquorumError) as caught:
        replace.propose_one(ME)
    assert caught.value.reason is Reason.APPROVAL
    for name in committee.ids:
        approvals = committee.open(name).ceremonies.approvals
        if name != ME:
            with pytest.raises(KeyquorumError):
                replace.propose_one(name)
        for each in approvals.pending():
            approvals.decide(each.request_id, each.subject, approve=True)
    replace.propose()
    install(rules("rotate", "true"))
    denied(replace.give_one, ME)  # asked again before seeds leave
    row = committee.open(ME).keystore.ceremony(replace.id)
    assert row is not None
    assert row.state is State.PROPOSED
    install(rules("enrol", NORDIC))
    given = replace.give_one(ME)
    install(rules("rotate", "true"))
    assert replace.give_one(ME)[1] != given[1]  # it happened: what is repeated is not decided anew


@pytest.mark.parametrize(
    "change", [{"add": ("us-1", "US")}, {"replace": "no-1"}], ids=["one more", "other keys under a known name"]
)
def test_nobody_gets_a_key_by_a_new_epoch_whom_a_policy_does_not_enrol(
    committee: Committee, install: Install, change: dict[str, Any]
) -> None:
    joined(committee, **change)
    (name,) = {"us-1", "no-1"} & ({each[0] for each in change.values()} | set(change.values()))
    _, present = certificate_of(committee, KEY, 2)
    members: dict[str, Any] = {"certificate": present.digest, "policy": POLICY, "quorum": committee.quorum}
    anew = Make(committee, committee.plan(KEY, 3, kind=Kind.GENERATE, **members))
    rotates = rules("rotate", "true")
    for enrols in (rules("enrol", f'principal is Custodian && principal.id != "{name}"'), rules("destroy", "true")):
        install(f"{rotates}\n{enrols}")
        denied(anew.propose_one, ME)
    install(f"{rotates}\n{rules('enrol', f'principal is Custodian && principal.id == {chr(34)}{name}{chr(34)}')}")
    with pytest.raises(KeyquorumError) as caught:
        anew.propose_one(ME)
    assert caught.value.reason is Reason.APPROVAL  # the others are no newcomers: nothing was asked about them


def test_a_committee_that_stays_as_it_is_enrols_nobody(committee: Committee, install: Install) -> None:
    joined(committee, rule={"at_least": 3})
    install(rules("rotate", "true"))
    _, present = certificate_of(committee, KEY, 2)
    members: dict[str, Any] = {"certificate": present.digest, "policy": POLICY, "quorum": committee.quorum}
    with pytest.raises(KeyquorumError) as caught:
        Make(committee, committee.plan(KEY, 3, kind=Kind.GENERATE, **members)).propose_one(ME)
    assert caught.value.reason is Reason.APPROVAL


def test_repair_is_asked_of_no_policy(committee: Committee, install: Install) -> None:
    Make.rotate(committee, KEY, present=("is-1", "no-1"), policy=KeyPolicy(absent_at_most=1)).activate()
    install(rules("destroy", "true"))
    Rebuild(committee, KEY, 3, ME).propose()
