"""Destruction at custodians: agreed by all before anybody erases, exclusive with releases, and nothing of a seed is
left in the database or its log."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core.ceremony_plan import OrderedBy
from keyquorum_core.destruction import DESTRUCTION_RECEIPT_TYPE, DestructionReceipt
from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.signing import open_envelope
from keyquorum_custodian.vault import blob
from tests.support.ceremonies import Destroy, Make
from tests.support.custodian import Committee, build_committee

POLICY = KeyPolicy(retain_seconds=600)


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


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Committee:
    """Epoch 1 is retired, epoch 2 active."""
    built = build_committee(tmp_path_factory.mktemp("destruction"), clock=Clock())
    built.generate(policy=POLICY)
    Make.rotate(built, "key-1").activate()
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


def sealed_seeds(committee: Committee, name: str, epoch: int) -> list[bytes]:
    store = committee.open(name).keystore
    row = store.epoch("key-1", epoch)
    assert row is not None
    rows = store._rows("SELECT sealed FROM seeds WHERE ceremony_id = ?", row.ceremony_id)
    return [blob(sealed) for (sealed,) in rows]


def on_disk(committee: Committee, name: str) -> bytes:
    return b"".join(path.read_bytes() for path in committee.directory(name).iterdir() if "keystore" in path.name)


def test_an_epoch_is_erased_everywhere_with_signed_receipts(committee: Committee, clock: Clock) -> None:
    receipts = Destroy(committee, "key-1", 1).approve().erase()
    for name, envelope in receipts.items():
        identity = committee.roster.custodian(name).identity
        receipt = DestructionReceipt.parse(open_envelope(envelope, DESTRUCTION_RECEIPT_TYPE, identity, "receipt"))
        assert (receipt.custodian, receipt.erased, receipt.erased_at) == (name, 2, clock.now)
        error = refusal(Reason.KEY_STATE, committee.open(name).epochs.active, "key-1", 1)
        assert error.actual == "destroyed"
        assert committee.open(name).epochs.active("key-1", 2).state == "active"
    committee.close()
    for name in committee.ids:
        node = committee.open(name)
        assert [row.state for row in node.keystore.epochs("key-1")] == ["destroyed", "active"]
        refusal(Reason.KEY_STATE, node.epochs.active, "key-1", 1)


def test_g5_not_a_byte_of_a_sealed_seed_is_left_in_any_file_of_the_keystore(committee: Committee) -> None:
    before = {name: sealed_seeds(committee, name, 1) for name in committee.ids}
    kept = {name: sealed_seeds(committee, name, 2) for name in committee.ids}
    for name, seeds in before.items():
        assert all(seed in on_disk(committee, name) for seed in seeds), "else this test proves nothing"
    Destroy(committee, "key-1", 1).approve().erase()
    for moment in ("while it serves", "after it ended"):
        for name, seeds in before.items():
            files = on_disk(committee, name)
            for sealed in seeds:
                assert sealed not in files, moment
                for piece in range(0, len(sealed) - 16, 16):
                    assert sealed[piece : piece + 16] not in files, moment
            if moment == "after it ended":
                assert all(sealed in files for sealed in kept[name])
        committee.close()


def test_nobody_erases_before_everyone_agreed(committee: Committee) -> None:
    destroy = Destroy(committee, "key-1", 1).approve().propose()
    missing = dict(destroy.consents)
    del missing["no-1"]
    cases: list[tuple[list[bytes], Reason]] = [
        ([], Reason.CEREMONY),
        (list(missing.values()), Reason.CEREMONY),
        ([*missing.values(), missing["ch-1"]], Reason.CEREMONY),
        ([*missing.values(), b"{}"], Reason.MALFORMED),
    ]
    other = Destroy(committee, "key-1", 2).approve()
    other.propose()
    cases.append(([*missing.values(), other.consents["no-1"]], Reason.CEREMONY))
    for consents, reason in cases:
        refusal(reason, committee.open("ch-1").ceremonies.erase, destroy.id, consents)
    assert committee.open("ch-1").epochs.active("key-1", 1).contributions(bytes(32))


def test_destruction_waits_for_every_custodian_s_own_operator(committee: Committee) -> None:
    destroy = Destroy(committee, "key-1", 2)
    refusal(Reason.APPROVAL, destroy.propose_one, "ch-1")
    (row,) = committee.open("ch-1").ceremonies.approvals.pending()
    assert row.kind == "destroy"
    assert row.asked_by == "operators olga"
    assert any("2 seeds at this custodian" in line for line in row.difference)
    assert any(line.startswith("!") for line in row.difference)
    committee.close()  # the request is still there after a restart
    assert committee.open("ch-1").ceremonies.approvals.pending() == (row,)
    refusal(Reason.APPROVAL, destroy.propose_one, "ch-1")
    refusal(Reason.STATE, committee.open("ch-1").ceremonies.erase, destroy.id, [])


def test_the_policy_destroys_a_retired_epoch_once_it_was_kept_long_enough(committee: Committee, clock: Clock) -> None:
    def attempt(epoch: int) -> Destroy:
        return Destroy(committee, "key-1", epoch, ordered_by=OrderedBy.POLICY)

    refusal(Reason.STATE, attempt(1).propose_one, "ch-1")
    clock.now += POLICY.retain_seconds - 1
    refusal(Reason.STATE, attempt(1).propose_one, "ch-1")
    clock.now += 1
    refusal(Reason.STATE, attempt(2).propose_one, "ch-1")  # in use
    attempt(1).erase()
    assert committee.open("ch-1").keystore.epochs("key-1")[0].state == "destroyed"


def test_a_release_under_way_is_finished_and_none_begins(committee: Committee) -> None:
    destroy = Destroy(committee, "key-1", 1).approve().propose()
    held = committee.open("ch-1").epochs.active("key-1", 1)
    expected = held.contributions(bytes(32))
    began, go_on = threading.Event(), threading.Event()
    derived: list[dict[int, bytes]] = []

    def release() -> None:
        with held.lease():
            began.set()
            go_on.wait(10)
            derived.append(held.contributions(bytes(32)))

    thread = threading.Thread(target=release)
    thread.start()
    began.wait(10)
    with pytest.raises(UnavailableError) as caught:
        destroy.erase_one("ch-1")
    assert caught.value.actual == "1"
    with pytest.raises(KeyquorumError), held.lease():
        raise AssertionError("a new release began")
    go_on.set()
    thread.join(10)
    assert derived == [expected]
    destroy.erase_one("ch-1")
    assert held.contributions(bytes(32)) == {}


def test_a_consent_is_worth_nothing_once_it_is_withdrawn_or_old(committee: Committee, clock: Clock) -> None:
    destroy = Destroy(committee, "key-1", 1).approve().propose()
    committee.open("ch-1").ceremonies.cancel(destroy.id)
    refusal(Reason.STATE, destroy.erase_one, "ch-1")
    clock.now += 9 * 86400
    refusal(Reason.STALE, destroy.erase_one, "no-1")
    assert committee.open("no-1").epochs.active("key-1", 1).indices


def test_a_full_disk_erases_nothing_and_the_epoch_serves_on(
    committee: Committee, monkeypatch: pytest.MonkeyPatch
) -> None:
    destroy = Destroy(committee, "key-1", 1).approve().propose()
    node = committee.open("ch-1")
    before = node.epochs.active("key-1", 1).contributions(bytes(32))

    def full(self: object) -> None:
        raise UnavailableError(Reason.STORAGE, "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(type(node.keystore), "_commit", full)
        refusal(Reason.STORAGE, destroy.erase_one, "ch-1")
    assert node.epochs.active("key-1", 1).contributions(bytes(32)) == before
    destroy.erase_one("ch-1")


def test_a_death_between_tables_and_file_is_made_good_at_the_next_start(
    committee: Committee, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = sealed_seeds(committee, "ch-1", 1)
    destroy = Destroy(committee, "key-1", 1).approve().propose()
    node = committee.open("ch-1")

    def dead(self: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(node.keystore), "scrub", dead)
        with pytest.raises(KeyboardInterrupt):
            destroy.erase_one("ch-1")
    assert str(node.keystore.ceremony(destroy.id).state) == "erased"  # type: ignore[union-attr]
    committee.nodes.pop("ch-1").close()
    again = committee.open("ch-1")
    assert str(again.keystore.ceremony(destroy.id).state) == "destroyed"  # type: ignore[union-attr]
    assert not any(each in on_disk(committee, "ch-1") for each in sealed)
    receipt = destroy.erase_one("ch-1")
    identity = committee.roster.custodian("ch-1").identity
    assert DestructionReceipt.parse(open_envelope(receipt, DESTRUCTION_RECEIPT_TYPE, identity, "it")).erased == 2


def test_the_receipt_is_the_same_however_often_it_is_asked_for(committee: Committee) -> None:
    destroy = Destroy(committee, "key-1", 1).approve()
    receipts = destroy.erase()
    assert {name: destroy.erase_one(name) for name in committee.ids} == receipts
    refusal(Reason.STATE, committee.open("ch-1").ceremonies.cancel, destroy.id)
