"""Repair and replacement at custodians: the certificate decides, liars are named with what they signed, nothing is
stored by halves, and a replaced custodian waits for everybody's operator."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core import derivation
from keyquorum_core.ceremony_plan import OrderedBy
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.parts import SealedPart
from keyquorum_core.rebuilding import (
    GIFT_TYPE,
    REBUILD_RECEIPT_TYPE,
    REBUILD_REQUEST_TYPE,
    Gift,
    RebuildReceipt,
    RebuildRequest,
    seal_gift,
)
from keyquorum_core.roster import sign_roster
from keyquorum_core.signing import Identity, open_envelope, sign
from keyquorum_custodian.node import open_node
from tests.support.ceremonies import Destroy, Make, Rebuild, approve
from tests.support.custodian import PASSPHRASE, Committee, build_committee, new_roster

FIVE = (("ch-1", "CH"), ("ch-2", "CH"), ("is-1", "IS"), ("jp-1", "JP"), ("no-1", "NO"))
CONTEXT = b"c" * 32
ME = "no-1"


def refusal(reason: Reason, call: Any, *arguments: Any) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call(*arguments)
    assert caught.value.reason is reason, caught.value
    return caught.value


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Committee:
    """Three of five; no-1 was absent when epoch 2 was made."""
    built = build_committee(tmp_path_factory.mktemp("rebuilding"), FIVE, {"at_least": 3})
    built.generate()
    Make.rotate(built, "key-1", present=[name for name in built.ids if name != ME]).activate()
    built.close()
    return built


@pytest.fixture
def committee(template: Committee, tmp_path: Path) -> Iterator[Committee]:
    copied = template.copy(tmp_path)
    copied.open_all()
    yield copied
    copied.close()


def root(committee: Committee, of: tuple[str, ...], epoch: int = 2) -> bytes:
    together: dict[int, bytes] = {}
    for name in of:
        for index, value in committee.open(name).epochs.active("key-1", epoch).contributions(CONTEXT).items():
            assert together.setdefault(index, value) == value
    return derivation.root(together, CONTEXT)


def receipt_of(committee: Committee, envelope: bytes, name: str = ME) -> RebuildReceipt:
    identity = committee.roster.custodian(name).identity
    return RebuildReceipt.parse(open_envelope(envelope, REBUILD_RECEIPT_TYPE, identity, "receipt"))


def lying(committee: Committee, repair: Rebuild, name: str, wrong: dict[int, bytes] | None = None) -> None:
    """Let ``name`` give wrong seeds, all of them or those in ``wrong``, under a gift it signs."""
    node = committee.open(name)
    row = node.keystore.epoch("key-1", 2)
    assert row is not None
    seeds = node.keystore.seeds(row)
    seeds |= {index: bytes(31) + b"x" for index in seeds} if wrong is None else wrong
    gift, sealed = seal_gift(repair.plan, name, seeds, committee.roster.custodian(ME).hpke)
    statement = sign(node.keystore.identity(), GIFT_TYPE, gift.to_payload())
    repair.gifts = [
        (statement, SealedPart(name, ME, sealed)) if part.sender == name else (said, part)
        for said, part in repair.gifts
    ]


def test_g7_a_stale_custodian_gets_its_seeds_back_and_serves_again(committee: Committee) -> None:
    receipt = receipt_of(committee, Rebuild(committee, "key-1", 2, ME).restore())
    assert receipt.seeds == len(committee.quorum.indices_of(ME))
    assert receipt.wrong == {}
    before = root(committee, ("ch-1", "ch-2", "is-1"))
    assert root(committee, ("jp-1", "ch-1", ME)) == before
    held = committee.open(ME).epochs
    assert (held.active("key-1", 1).state, held.active("key-1", 2).state) == ("retired", "active")
    committee.close()
    assert root(committee, ("jp-1", "ch-1", ME)) == before


@pytest.mark.parametrize("liars", [("ch-1",), ("ch-1", "ch-2"), ("ch-1", "ch-2", "is-1")], ids=len)
def test_the_certificate_outweighs_a_majority_of_liars_and_names_them(
    committee: Committee, liars: tuple[str, ...]
) -> None:
    """Any seed of no-1's is also held by two of the other four: with three liars, some seeds nobody gives rightly."""
    repair = Rebuild(committee, "key-1", 2, ME).give()
    for name in liars:
        lying(committee, repair, name)
    store = committee.open(ME).keystore
    if len(liars) < 2:
        assert set(receipt_of(committee, repair.restore_one()).wrong) == set(liars)
        assert root(committee, ("jp-1", "ch-1", ME)) == root(committee, ("ch-1", "ch-2", "is-1"))
    else:
        error = refusal(Reason.CEREMONY, repair.restore_one)
        assert set(error.details["custodians"].split(",")) == set(liars)
        assert store.epoch("key-1", 2) is None
    evidence = store.accusations()
    assert {each.custodian for each in evidence} == set(liars)
    for each in evidence:
        identity = committee.roster.custodian(each.custodian).identity
        gift = Gift.parse(open_envelope(each.statement, GIFT_TYPE, identity, "gift"))
        assert gift.sealed_sha256 == hashlib.sha256(each.sealed).hexdigest()
    if len(liars) >= 2:  # with everyone honest, the same ceremony still ends well
        repair.gifts = [repair.give_one(name) for name in repair.givers]
        repair.restore_one()


def test_one_wrong_seed_of_many_is_found(committee: Committee) -> None:
    repair = Rebuild(committee, "key-1", 2, ME).give()
    index = next(i for i in committee.quorum.indices_of(ME) if "ch-1" in committee.quorum.holders(i))
    lying(committee, repair, "ch-1", {index: bytes(32)})
    assert receipt_of(committee, repair.restore_one()).wrong == {"ch-1": 1}


def test_a_blob_that_cannot_be_opened_counts_as_wrong_and_others_make_up_for_it(committee: Committee) -> None:
    repair = Rebuild(committee, "key-1", 2, ME).give()
    identity = committee.open("ch-1").keystore.identity()
    garbage = b"\1" * 2000
    gift = Gift(repair.plan.digest, "ch-1", ME, hashlib.sha256(garbage).hexdigest())
    made = (sign(identity, GIFT_TYPE, gift.to_payload()), SealedPart("ch-1", ME, garbage))
    repair.gifts = [made if part.sender == "ch-1" else (said, part) for said, part in repair.gifts]
    assert set(receipt_of(committee, repair.restore_one()).wrong) == {"ch-1"}


@pytest.mark.parametrize("what", ["swapped", "another's", "twice", "forged", "another plan's", "not addressed"])
def test_gifts_that_are_not_what_their_giver_signed_are_refused(committee: Committee, what: str) -> None:
    repair = Rebuild(committee, "key-1", 2, ME).give()
    (said, part), (other_said, other) = repair.gifts[:2]
    identity = committee.open(part.sender).keystore.identity()
    good = Gift(repair.plan.digest, part.sender, ME, hashlib.sha256(part.sealed).hexdigest())
    bad: dict[str, tuple[bytes, SealedPart]] = {
        "swapped": (said, dataclasses.replace(part, sealed=other.sealed)),
        "another's": (other_said, part),
        "twice": (other_said, other),
        "forged": (sign(Identity.generate(), GIFT_TYPE, good.to_payload()), part),
        "another plan's": (
            sign(identity, GIFT_TYPE, dataclasses.replace(good, plan_digest="0" * 64).to_payload()),
            part,
        ),
        "not addressed": (sign(identity, GIFT_TYPE, dataclasses.replace(good, to="ch-2").to_payload()), part),
    }
    repair.gifts[0] = bad[what]
    refusal(Reason.SIGNATURE if what in ("another's", "forged") else Reason.CEREMONY, repair.restore_one)
    assert committee.open(ME).keystore.epoch("key-1", 2) is None
    repair.gifts[0] = (said, part)
    repair.restore_one()


def test_nobody_is_rebuilt_unasked(committee: Committee) -> None:
    repair = Rebuild(committee, "key-1", 2, ME).propose()
    request = RebuildRequest(repair.plan.digest, ME)
    mallory = sign(committee.open("ch-1").keystore.identity(), REBUILD_REQUEST_TYPE, request.to_payload())
    refusal(Reason.SIGNATURE, committee.open("ch-2").ceremonies.give, repair.id, mallory)
    own = committee.open(ME).keystore.identity()
    other = sign(own, REBUILD_REQUEST_TYPE, RebuildRequest("0" * 64, ME).to_payload())
    refusal(Reason.CEREMONY, committee.open("ch-2").ceremonies.give, repair.id, other)


def test_a_repair_is_repeatable_at_every_step(committee: Committee) -> None:
    repair = Rebuild(committee, "key-1", 2, ME).propose()
    first = repair.request
    repair.give()
    assert repair.request == first
    repair.give()
    receipt = repair.restore_one()
    assert repair.restore_one() == receipt
    repair.gifts = []
    assert repair.restore_one() == receipt
    refusal(Reason.STATE, committee.open(ME).ceremonies.cancel, repair.id)


def test_the_policy_has_a_stale_custodian_repaired_without_an_operator(committee: Committee) -> None:
    Rebuild(committee, "key-1", 2, ME, ordered_by=OrderedBy.POLICY).restore()
    assert root(committee, ("jp-1", "ch-1", ME))


def test_there_is_nothing_to_repair_where_nothing_lacks(committee: Committee) -> None:
    refusal(Reason.EXISTS, Rebuild(committee, "key-1", 2, "ch-1").propose)
    refusal(Reason.EXISTS, Rebuild(committee, "key-1", 1, ME).propose)


def test_a_repair_by_another_certificate_is_refused(committee: Committee) -> None:
    repair = Rebuild(committee, "key-1", 2, ME)
    repair.certificate = Rebuild(committee, "key-1", 1, ME).certificate
    refusal(Reason.CEREMONY, repair.propose)
    repair = Rebuild(committee, "key-1", 2, ME)
    repair.propose()
    repair.certificate = Rebuild(committee, "key-1", 1, ME).certificate
    refusal(Reason.CEREMONY, repair.restore)


def test_a_destroyed_epoch_is_not_brought_back(committee: Committee) -> None:
    Rebuild(committee, "key-1", 2, ME).restore()
    repair = Rebuild(committee, "key-1", 1, ME)
    Destroy(committee, "key-1", 1).approve().erase()
    for name in (ME, "ch-1"):
        refusal(Reason.KEY_STATE, repair.propose_one, name)


def test_an_older_epoch_is_repaired_as_retired(committee: Committee) -> None:
    """Its keystore was lost, all but its identity: every epoch it held comes back, the old one for what runs on it."""
    store = committee.open(ME).keystore
    with store.transaction():
        for table in ("seeds", "parts", "epochs", "ceremonies", "ceremony_steps"):
            store._db.execute(f"DELETE FROM {table}")  # noqa: S608
    committee.nodes.pop(ME).close()
    for epoch in (2, 1):
        Rebuild(committee, "key-1", epoch, ME).restore()
    held = committee.open(ME).epochs
    assert (held.active("key-1", 1).state, held.active("key-1", 2).state) == ("retired", "active")
    assert held.active("key-1", 1).retired_at == committee.open("ch-1").epochs.active("key-1", 1).retired_at
    assert root(committee, ("ch-1", "ch-2", ME), epoch=1) == root(committee, ("ch-1", "ch-2", "jp-1"), epoch=1)


# -- replace -----------------------------------------------------------------------------------------------------------


def replaced(committee: Committee, name: str = "jp-1") -> None:
    """Another machine, another person's perhaps, in the place of ``name``; the others serve under the new roster."""
    committee.close()
    shutil.rmtree(committee.directory(name))
    new_roster(committee, replace=name)


def test_g7_a_replaced_custodian_gets_the_seeds_of_its_place_once_every_operator_agrees(committee: Committee) -> None:
    Rebuild(committee, "key-1", 2, ME).restore()
    before = root(committee, ("jp-1", "ch-1", "ch-2"))
    old = committee.roster_envelope
    replaced(committee)
    committee.open_all()
    change = Rebuild(committee, "key-1", 2, "jp-1", kind=Kind.REPLACE)
    change.rosters = [old]
    for name in ("jp-1", *change.givers):
        refusal(Reason.APPROVAL, change.propose_one, name)
        approvals = committee.open(name).ceremonies.approvals
        (row,) = approvals.pending()
        assert row.kind == "replace"
        assert any(line.startswith("+ custodian jp-1 (JP)") for line in row.difference)
        if name != "jp-1":
            assert any(line.startswith("- custodian jp-1 (JP)") for line in row.difference)
        approvals.decide(row.request_id, row.subject, approve=True)
    change.restore()
    assert root(committee, ("jp-1", "ch-1", "ch-2")) == before
    # What the one that left still knows is worth nothing after the next rotation.
    Make.rotate(committee, "key-1").activate()
    assert root(committee, ("jp-1", "ch-1", "ch-2"), epoch=3) != before


def test_another_custodian_in_the_place_is_never_repaired_as_if_it_were_the_same(committee: Committee) -> None:
    Rebuild(committee, "key-1", 2, ME).restore()
    replaced(committee)
    committee.open_all()
    repair = Rebuild(committee, "key-1", 2, "jp-1")
    refusal(Reason.CEREMONY, repair.propose_one, "ch-1")
    same = Rebuild(committee, "key-1", 2, ME, kind=Kind.REPLACE)
    refusal(Reason.CEREMONY, same.propose_one, "ch-1")


def test_a_rejected_replacement_goes_nowhere(committee: Committee) -> None:
    Rebuild(committee, "key-1", 2, ME).restore()
    replaced(committee)
    committee.open_all()
    change = Rebuild(committee, "key-1", 2, "jp-1", kind=Kind.REPLACE)
    refusal(Reason.APPROVAL, change.propose_one, "ch-1")
    approvals = committee.open("ch-1").ceremonies.approvals
    (row,) = approvals.pending()
    approvals.decide(row.request_id, row.subject, approve=False)
    error = refusal(Reason.APPROVAL, change.propose_one, "ch-1")
    assert error.actual == "rejected"
    refusal(Reason.STATE, committee.open("ch-1").ceremonies.give, change.id, b"{}")


def test_earlier_rosters_must_hang_together(committee: Committee) -> None:
    Rebuild(committee, "key-1", 2, ME).restore()
    old = committee.roster_envelope
    replaced(committee)
    committee.open_all()
    change = Rebuild(committee, "key-1", 2, "jp-1", kind=Kind.REPLACE)
    refusal(Reason.ROSTER, change.propose_one, "jp-1")  # it has never seen the roster of the certificate
    stranger = dataclasses.replace(committee.roster, version=1, previous="", committee="other")
    change.rosters = [sign_roster(stranger, [committee.operator.identity])]
    refusal(Reason.ROSTER, change.propose_one, "jp-1")
    change.rosters = [old]
    approve(committee, "ch-1", change.envelope, change.certificate)
    change.propose_one("ch-1")


def test_a_custodian_follows_its_roster_only_by_succession(committee: Committee) -> None:
    roster = committee.roster
    committee.close()
    folder = committee.directory("ch-1")
    for change in ({"previous": "0" * 64, "version": 2}, {"previous": roster.digest, "version": 3}):
        other = dataclasses.replace(roster, **change)  # type: ignore[arg-type]
        (folder / "roster.json").write_bytes(sign_roster(other, [committee.operator.identity]))
        refusal(Reason.ROSTER if change["version"] == 2 else Reason.NOT_FOUND, open_node, folder, PASSPHRASE)
    second = dataclasses.replace(roster, version=2, previous=roster.digest)
    third = dataclasses.replace(roster, version=3, previous=second.digest)
    (folder / "rosters").mkdir()
    (folder / "rosters" / "2.json").write_bytes(sign_roster(second, [committee.operator.identity]))
    (folder / "roster.json").write_bytes(sign_roster(third, [committee.operator.identity]))
    open_node(folder, PASSPHRASE).close()
    (folder / "roster.json").write_bytes(committee.roster_envelope)
    refusal(Reason.ROSTER, open_node, folder, PASSPHRASE)
