"""Malicious coordinators in ceremonies: they drop, reorder, repeat and swap messages, tell half of the custodians that
it succeeded, and order what nobody signed. Custodians are asked directly, as it would.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from keyquorum_core.ceremony import CERTIFICATE_TYPE, EpochCertificate
from keyquorum_core.ceremony_states import Kind, Step
from keyquorum_core.destruction import DESTRUCTION_RECEIPT_TYPE, DestructionReceipt, check_receipts
from keyquorum_core.errors import Reason
from keyquorum_core.signing import Identity, merge, peek_payload, sign
from keyquorum_protos.v1 import custodian_pb2 as pb
from tests.support.ceremonies import Destroy, Make, Rebuild, approve, derived, refused
from tests.support.ceremony_twins import LIAR, LIES, Behaviour, Phase, Twin
from tests.support.custodian import THREE, TWO_OF_THREE, Committee, build_committee

ONE, TWO, THIRD = "ch-1", "is-1", "no-1"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Committee:
    built = build_committee(tmp_path_factory.mktemp("hostile"), THREE, TWO_OF_THREE)
    built.generate()
    built.close()
    return built


@pytest.fixture
def committee(template: Committee, tmp_path: Path) -> Iterator[Committee]:
    copied = template.copy(tmp_path / "custodians")
    copied.open_all()
    yield copied
    copied.close()


def test_a_coordinator_that_drops_messages_stops_the_ceremony_and_nothing_else(committee: Committee) -> None:
    make = Make.rotate(committee, "key-1").propose()
    node = committee.open(ONE).ceremonies
    refused(Reason.CEREMONY, node.deliver, make.id, make.headers, make.parts(ONE)[1:])
    for kept in (make.headers[:1], make.headers[1:], []):  # less than may make it, or without the one that is asked
        refused(Reason.CEREMONY, node.deliver, make.id, kept, make.parts(ONE))
    make.deliver()
    refused(Reason.CEREMONY, node.confirm, make.id, [make.commitments[ONE]])
    make.confirm()
    refused(Reason.SIGNATURE_MISSING, node.activate, make.id, merge([make.signed[ONE], make.signed[TWO]]))
    make.activate()


def test_a_coordinator_that_repeats_and_reorders_messages_gets_the_same_answers(committee: Committee) -> None:
    make = Make.rotate(committee, "key-1").propose()
    node = committee.open(ONE).ceremonies
    first = node.deliver(make.id, make.headers, make.parts(ONE))
    assert node.deliver(make.id, make.headers[::-1], make.parts(ONE)[::-1]) == first
    refused(Reason.CEREMONY, node.deliver, make.id, make.headers * 2, make.parts(ONE))
    refused(Reason.STATE, node.activate, make.id, b"")
    make.deliver().confirm()
    assert node.confirm(make.id, list(make.commitments.values())[::-1]) == make.signed[ONE]
    refused(Reason.CEREMONY, node.confirm, make.id, list(make.commitments.values()) * 2)
    make.activate()
    make.activate()
    for step in (lambda: node.deliver(make.id, [], []), lambda: node.confirm(make.id, [])):
        refused(Reason.CEREMONY, step)


def test_a_coordinator_that_swaps_messages_between_ceremonies_is_refused_at_every_step(committee: Committee) -> None:
    one, two = (Make(committee, committee.plan(key)).propose() for key in ("key-2", "key-3"))
    node = committee.open(ONE).ceremonies
    refused(Reason.CEREMONY, node.deliver, one.id, two.headers, two.parts(ONE))
    refused(Reason.CEREMONY, node.deliver, one.id, one.headers, two.parts(ONE))
    refused(Reason.CEREMONY, node.deliver, one.id, [one.headers[0], *two.headers[1:]], one.parts(ONE))
    one.deliver()
    two.deliver()
    refused(Reason.CEREMONY, node.confirm, one.id, list(two.commitments.values()))
    mixed = [one.commitments[ONE], two.commitments[TWO], one.commitments[THIRD]]
    refused(Reason.CEREMONY, node.confirm, one.id, mixed)
    one.confirm()
    two.confirm()
    refused(Reason.CEREMONY, node.activate, one.id, two.certificate)
    one.activate()
    two.activate()
    assert derived(committee, 1, "key-2") != derived(committee, 1, "key-3")


def test_a_coordinator_that_swaps_steps_between_kinds_is_refused(committee: Committee) -> None:
    make = Make.rotate(committee, "key-1").propose()
    node = committee.open(ONE).ceremonies
    refused(Reason.STATE, node.erase, make.id, [])
    refused(Reason.STATE, node.give, make.id, b"{}")
    refused(Reason.STATE, node.restore, make.id, b"{}", [])
    destroy = Destroy(committee, "key-1", 1).approve().propose()
    refused(Reason.STATE, node.deliver, destroy.id, [], [])
    refused(Reason.STATE, node.confirm, destroy.id, [])
    refused(Reason.STATE, node.activate, destroy.id, b"{}")
    make.cancel()


def test_a_coordinator_that_tells_half_that_it_succeeded_splits_nothing(committee: Committee) -> None:
    """One is told to activate, the others to cancel: the certificate still binds them, and jobs of before still run."""
    before = derived(committee, 1)
    make = Make.rotate(committee, "key-1").confirm()
    make.activate_one(ONE)
    for name in (TWO, THIRD):
        committee.open(name).ceremonies.cancel(make.id)
    assert derived(committee, 1) == before
    committee.close()
    committee.open_all()
    assert derived(committee, 1) == before
    for name in (TWO, THIRD):
        make.activate_one(name)
    assert derived(committee, 1) == before
    assert derived(committee, 2)


def test_made_twice_by_a_coordinator_an_epoch_is_never_two_things_to_one_custodian(committee: Committee) -> None:
    """With the one that knows the first certificate called absent, the rest make the epoch again. It stays with what it
    has, says which two certificates there are, and no job of before is the worse for it."""
    before = derived(committee, 1)
    first = Make.rotate(committee, "key-1").confirm()
    first.activate_one(ONE)
    for name in (TWO, THIRD):
        committee.open(name).ceremonies.cancel(first.id)
    old = committee.open(ONE)
    digest = old.epochs.active("key-1", 1).certificate_digest
    again = Make(committee, replace(first.plan, ceremony_id="ab" * 16, certificate=digest), present=(TWO, THIRD))
    again.activate()
    repair = Rebuild(committee, "key-1", 2, ONE)
    repair.certificate = again.certificate
    found = EpochCertificate.parse(peek_payload(again.certificate, CERTIFICATE_TYPE, "certificate"))
    repair.plan = replace(repair.plan, certificate=found.digest)
    repair.envelope = committee.sign_plan(repair.plan)
    error = refused(Reason.CEREMONY, repair.propose_one, ONE)
    assert found.digest in error.actual
    assert derived(committee, 1) == before


def test_half_erased_by_a_coordinator_an_epoch_does_not_count_as_destroyed(committee: Committee) -> None:
    destroy = Destroy(committee, "key-1", 1).approve().propose()
    receipt = destroy.erase_one(ONE)
    for name in (TWO, THIRD):
        committee.open(name).ceremonies.cancel(destroy.id)
        refused(Reason.STATE, destroy.erase_one, name)
    one = DestructionReceipt.parse(peek_payload(receipt, DESTRUCTION_RECEIPT_TYPE, "receipt"))
    refused(Reason.CEREMONY, check_receipts, destroy.plan, committee.ids, {ONE: one})


@pytest.mark.parametrize("what", ["a seed", "a header", "who is there"])
def test_a_coordinator_that_helps_a_custodian_to_say_two_things_gets_no_certificate(
    committee: Committee, what: str
) -> None:
    """One hears the liar's honest commitments, another the others; the rest of the ceremony is told the truth."""
    make = Make.rotate(committee, "key-1").deliver()
    phase = Phase(Kind.ROTATE, Step.DELIVER)
    twin = Twin(committee, make.plan, phase, LIES[phase][Behaviour.EQUIVOCATING][f"about {what}"])
    lie = twin.lie(twin, pb.DeliverResponse(commitments=make.commitments[LIAR])).commitments
    make.confirm_one(ONE)
    said = [make.commitments[ONE], lie, make.commitments[THIRD]]
    error = refused(Reason.CEREMONY, committee.open(THIRD).ceremonies.confirm, make.id, said)
    assert LIAR in " ".join([error.message, *error.details.values()]) or what == "who is there"
    assert committee.open(THIRD).keystore.epoch("key-1", 2) is None
    make.activate()


def test_in_a_repair_a_coordinator_gains_nothing_by_what_it_drops_reorders_repeats_or_swaps(
    committee: Committee,
) -> None:
    Make(committee, committee.plan("key-2")).activate()
    for key in ("key-1", "key-2"):
        Make.rotate(committee, key, present=(ONE, TWO)).activate()
    one, two = (Rebuild(committee, key, 2, THIRD) for key in ("key-1", "key-2"))
    target, giver = committee.open(THIRD).ceremonies, committee.open(ONE).ceremonies
    refused(Reason.NOT_FOUND, giver.give, one.id, b"{}")
    one.propose()
    two.propose()
    refused(Reason.CEREMONY, target.restore, one.id, one.certificate, [])
    refused(Reason.CEREMONY, giver.give, one.id, two.request)
    refused(Reason.STATE, target.deliver, one.id, [], [])
    one.give()
    two.give()
    mixed = [one.gifts[0], two.gifts[1]]
    for gifts in (one.gifts[:1], one.gifts[1:], one.gifts * 2, two.gifts, mixed):
        refused(Reason.CEREMONY, target.restore, one.id, one.certificate, gifts)
    refused(Reason.CEREMONY, target.restore, one.id, two.certificate, one.gifts)
    assert committee.open(THIRD).keystore.epoch("key-1", 2) is None
    receipt = target.restore(one.id, one.certificate, one.gifts[::-1])
    assert target.restore(one.id, one.certificate, one.gifts) == receipt
    assert derived(committee, 2)
    # The target is told that it was given up, the co-holders that it went on: nobody is the worse for it.
    target.cancel(two.id)
    refused(Reason.STATE, target.restore, two.id, two.certificate, two.gifts)
    refused(Reason.STATE, giver.cancel, two.id)
    Rebuild(committee, "key-2", 2, THIRD).restore()
    assert derived(committee, 2, "key-2")


def test_in_a_destruction_a_coordinator_gains_nothing_by_what_it_drops_reorders_repeats_or_swaps(
    committee: Committee,
) -> None:
    Make(committee, committee.plan("key-2")).activate()
    one, two = (Destroy(committee, key, 1).approve() for key in ("key-1", "key-2"))
    node = committee.open(ONE).ceremonies
    refused(Reason.STATE, node.erase, one.id, [])  # approved, and not proposed again
    one.propose()
    two.propose()
    mine, others = list(one.consents.values()), list(two.consents.values())
    for consents in ([], mine[:2], mine[1:], mine * 2, others, [*mine[:2], others[2]]):
        refused(Reason.CEREMONY, node.erase, one.id, consents)
    assert derived(committee, 1)
    receipt = node.erase(one.id, mine[::-1])
    assert node.erase(one.id, []) == receipt
    one.erase()
    assert derived(committee, 1, "key-2")


def test_a_coordinator_cannot_order_anything_itself(committee: Committee) -> None:
    """A plan that it signs, one that it strips of signatures, and one whose signatures it moves to another plan."""
    make = Make.rotate(committee, "key-1")
    node = committee.open(ONE).ceremonies
    own = sign(Identity.generate(), "application/vnd.keyquorum.ceremony-plan.v1+json", make.plan.to_payload())
    refused(Reason.SIGNATURE, node.propose, own)
    tree = json.loads(make.envelope)
    refused(Reason.SIGNATURE_MISSING, node.propose, json.dumps({**tree, "signatures": []}).encode())
    other = replace(make.plan, ceremony_id="cd" * 16)
    moved = {**tree, "payload": base64.b64encode(other.to_payload()).decode()}
    refused(Reason.SIGNATURE, node.propose, json.dumps(moved).encode())
    approve(committee, ONE, Destroy(committee, "key-1", 1).envelope)
