"""A custodian restored from a backup, and everybody who would have it serve what is old: the coordinator that carries
testimonies, peers that lie, its own twin from before.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from keyquorum_core.bulletin import sign_bulletin
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.revocations import REVOCATIONS
from keyquorum_core.signing import Identity, peek_payload
from keyquorum_core.testimony import NONCE_LIFETIME, TESTIMONY_TYPE, Known, KnownEpoch, sign_testimony
from keyquorum_core.testimony import Testimony as Said
from keyquorum_custodian.node import Node, open_node
from tests.support.ceremonies import Destroy, Make, derived
from tests.support.custodian import PASSPHRASE, Committee, build_committee
from tests.support.restoring import all_say, approve, back_up, wreck_and_restore
from tests.support.vendor import bulletin

NOW = 1_800_000_000
FIVE = (("ch-1", "CH"), ("de-1", "DE"), ("fr-1", "FR"), ("is-1", "IS"), ("no-1", "NO"))
ME = "ch-1"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Committee:
    made = build_committee(tmp_path_factory.mktemp("restored"), FIVE, {"at_least": 3}, clock=lambda: NOW)
    made.open_all()
    made.generate()
    made.open(ME).gate.release(made.owner_request())
    made.close()
    return made


@pytest.fixture
def committee(original: Committee, tmp_path: Path) -> Iterator[Committee]:
    made = original.copy(tmp_path / "all")
    yield made
    made.close()


def refused(action: Callable[[], object], reason: Reason, match: str | None = None) -> KeyquorumError:
    with pytest.raises(KeyquorumError, match=match) as caught:
        action()
    assert caught.value.reason is reason, caught.value
    return caught.value


def brought_back(committee: Committee, backup: bytes = b"", rosters: Mapping[int, bytes] = {}) -> Node:
    """Restored, enrolled, approved; not proved. ``rosters``: versions between the backup's and the one in force."""
    wreck_and_restore(committee, ME, backup)
    for version, envelope in rosters.items():
        (committee.directory(ME) / "rosters" / f"{version}.json").write_bytes(envelope)
    for name in committee.ids:
        committee.open(name)
    node = committee.nodes[ME]
    approve(node)
    return node


def test_it_does_nothing_until_approved_and_vouched_for_and_everything_then(committee: Committee) -> None:
    before = derived(committee, 1)
    wreck_and_restore(committee, ME)
    node = committee.open(ME)
    for name in committee.ids:
        committee.open(name)
    request = committee.owner_request()
    refused(lambda: node.gate.release(request), Reason.RESTORED)
    update = committee.ledger.update(node.witness.size)
    refused(lambda: node.witness.serve(update, cosign=True), Reason.RESTORED)
    refused(lambda: Make(committee, committee.plan("other")).propose(), Reason.RESTORED)
    assert any("RESTORED" in warning for warning in node.warnings())
    refused(node.restoration.challenge, Reason.APPROVAL)
    refused(lambda: node.restoration.vouch(b"n" * 32, []), Reason.APPROVAL)
    approve(node)
    refused(lambda: node.gate.release(request), Reason.RESTORED)
    nonce, _ = node.restoration.challenge()
    proof = node.restoration.vouch(nonce, all_say(committee, ME, nonce))
    assert proof.testified == ("de-1", "fr-1", "is-1", "no-1")
    node.gate.release(committee.owner_request())
    assert derived(committee, 1) == before
    refused(node.restoration.challenge, Reason.STATE)
    committee.close()  # and that survives
    committee.open(ME).gate.release(committee.owner_request())


def test_a_kill_between_approval_and_proof_loses_neither(committee: Committee) -> None:
    node = brought_back(committee)
    nonce, _ = node.restoration.challenge()
    said = all_say(committee, ME, nonce)
    committee.close()
    node = committee.open(ME)
    assert node.standing.restored
    refused(lambda: node.restoration.vouch(nonce, said), Reason.STALE)
    nonce, _ = node.restoration.challenge()
    node.restoration.vouch(nonce, all_say(committee, ME, nonce))
    assert not node.standing.restored


def test_the_old_twin_is_nobody_under_the_new_roster(committee: Committee) -> None:
    node = brought_back(committee)
    twin = committee.directory(f"{ME}.old")
    old = open_node(twin, PASSPHRASE, clock=committee.clock)  # under the old roster it still starts
    try:
        nonce, _ = node.restoration.challenge()
        (theirs,) = (each.restoration.testify("de-1", nonce, {})[0] for each in (old,))
        assert old.windows.current().statement != node.windows.current().statement
        refused(
            lambda: node.restoration.vouch(nonce, [*all_say(committee, ME, nonce, "de-1", "fr-1"), theirs]),
            Reason.SIGNATURE,
        )
    finally:
        old.close()
    shutil.copy(committee.folder / "roster.json", twin / "roster.json")
    with pytest.raises(RefusedError, match="identity on disk is not the one in the roster"):
        open_node(twin, PASSPHRASE, clock=committee.clock)


# -- what a coordinator may try ----------------------------------------------------------------------------------------


def test_too_few_the_same_twice_strangers_and_old_answers_are_refused(committee: Committee) -> None:
    node = brought_back(committee)
    nonce, _ = node.restoration.challenge()
    said = all_say(committee, ME, nonce)
    vouch = node.restoration.vouch
    refused(lambda: vouch(nonce, []), Reason.RESTORED, "too few")
    refused(lambda: vouch(nonce, said[:2]), Reason.RESTORED, "too few")
    refused(lambda: vouch(nonce, [said[0], said[0], said[1]]), Reason.RESTORED, "twice")
    other, _ = node.restoration.challenge()
    refused(lambda: vouch(other, said), Reason.RESTORED, "another question")
    refused(lambda: vouch(b"x" * 32, said), Reason.STALE)
    elsewhere = [committee.nodes[name].restoration.testify("no-1", nonce, {})[0] for name in ("de-1", "fr-1", "is-1")]
    refused(lambda: vouch(nonce, elsewhere), Reason.RESTORED, "somebody else")
    mine = sign_testimony(_testimony(committee, ME, nonce), node.keystore.identity())
    refused(lambda: vouch(nonce, [*said[:2], mine]), Reason.RESTORED, "for itself")
    forged = sign_testimony(_testimony(committee, "is-1", nonce), Identity.generate())
    refused(lambda: vouch(nonce, [*said[:2], forged]), Reason.SIGNATURE)
    stranger = sign_testimony(_testimony(committee, "jp-1", nonce), Identity.generate())
    refused(lambda: vouch(nonce, [*said[:2], stranger]), Reason.UNKNOWN_CUSTODIAN)
    assert node.standing.restored
    vouch(nonce, said[:3])
    assert not node.standing.restored


def _testimony(committee: Committee, name: str, nonce: bytes, **known: object) -> Said:
    base = committee.nodes["de-1"].restoration.known()
    return Said(name, ME, nonce.hex(), int(committee.clock()), False, dataclasses.replace(base, **known))  # type: ignore[arg-type]


def _lie(committee: Committee, name: str, nonce: bytes, **known: object) -> bytes:
    """A testimony that its author really signed."""
    return sign_testimony(_testimony(committee, name, nonce, **known), committee.nodes[name].keystore.identity())


def test_an_answer_that_came_too_late_is_refused(original: Committee, tmp_path: Path) -> None:
    now = [NOW]
    committee = original.copy(tmp_path / "all", lambda: now[0])
    try:
        node = brought_back(committee)
        nonce, _ = node.restoration.challenge()
        said = all_say(committee, ME, nonce)
        now[0] += NONCE_LIFETIME + 1
        refused(lambda: node.restoration.vouch(nonce, said), Reason.STALE)
    finally:
        committee.close()


def test_keeping_the_one_back_who_knows_more_does_not_help(committee: Committee) -> None:
    """Any three that testify have a member in every quorum: whoever is left out was not needed."""
    backup = back_up(committee, ME)
    node = brought_back(committee, backup)
    # Three of the others cosign something newer; the coordinator shows the restored one nothing of it.
    committee.ledger.fill(3)
    committee.ledger.bring(*(committee.nodes[name].witness for name in ("de-1", "fr-1", "is-1")))
    nonce, _ = node.restoration.challenge()
    everyone = ("de-1", "fr-1", "is-1", "no-1")
    for left_out in everyone:
        names = [name for name in everyone if name != left_out]
        error = refused(
            lambda names=names: node.restoration.vouch(nonce, all_say(committee, ME, nonce, *names)),  # type: ignore[misc]
            Reason.RESTORED,
            "newer ledger",
        )
        assert error.details["peer"] in names
    committee.ledger.bring(node.witness)
    node.restoration.vouch(nonce, all_say(committee, ME, nonce, "de-1", "fr-1", "no-1"))


def test_an_old_checkpoint_does_not_bring_it_forward_and_a_fork_is_an_alarm(committee: Committee) -> None:
    node = brought_back(committee)
    size = node.witness.size
    committee.ledger.fill(4)
    committee.ledger.bring(*(committee.nodes[name].witness for name in committee.ids if name != ME))
    node.witness.update(committee.ledger.update(size, size=size))
    assert node.witness.size == size
    nonce, _ = node.restoration.challenge()
    refused(lambda: node.restoration.vouch(nonce, all_say(committee, ME, nonce)), Reason.RESTORED, "newer ledger")
    committee.ledger.bring(node.witness)
    assert node.witness.size == size + 4
    lie = _lie(committee, "de-1", nonce, ledger_size=size + 4, ledger_root="ab" * 32)
    refused(
        lambda: node.restoration.vouch(nonce, [lie, *all_say(committee, ME, nonce, "fr-1", "is-1")]),
        Reason.RESTORED,
        "de-1 saw another ledger of that size",
    )
    assert node.standing.restored


# -- what has happened since -------------------------------------------------------------------------------------------


def test_newer_documents_are_named_and_brought(committee: Committee) -> None:
    node = brought_back(committee)
    newer = sign_bulletin(
        bulletin(REVOCATIONS.name, {"lifted": [], "revoked": []}, cluster=committee.cluster),
        [committee.operator.identity],
    )
    committee.nodes["fr-1"].withdrawn.accept(newer)
    nonce, _ = node.restoration.challenge()
    said = all_say(committee, ME, nonce)
    error = refused(lambda: node.restoration.vouch(nonce, said), Reason.RESTORED, "fr-1 knows a newer revocations")
    assert error.details == {"peer": "fr-1", "subject": "revocations"}
    _, handed = committee.nodes["fr-1"].restoration.testify(ME, nonce, {})
    assert newer in handed
    node.restoration.vouch(nonce, said, [b"junk", *handed])
    assert node.bulletins.accepted(REVOCATIONS) is not None


def test_an_epoch_retired_since_is_retired_and_one_made_since_is_lacking(committee: Committee) -> None:
    backup = back_up(committee, ME)
    committee.open_all()
    Make.rotate(committee, "key-1").activate()
    node = brought_back(committee, backup)
    assert node.epochs.active("key-1", 1).state == "active"
    nonce, _ = node.restoration.challenge()
    proof = node.restoration.vouch(nonce, all_say(committee, ME, nonce))
    assert proof.lacking == (("key-1", 2),)
    assert node.epochs.active("key-1", 1).state == "retired"
    row = node.keystore.epoch("key-1", 1)
    assert row is not None
    assert (row.state, row.retired_at) == ("retired", committee.nodes["de-1"].epochs.active("key-1", 1).retired_at)


def test_an_epoch_destroyed_since_is_withheld_for_good_until_it_is_destroyed_here_too(committee: Committee) -> None:
    backup = back_up(committee, ME)
    committee.open_all()
    Destroy(committee, "key-1", 1).approve().erase()
    node = brought_back(committee, backup)
    nonce, _ = node.restoration.challenge()
    proof = node.restoration.vouch(nonce, all_say(committee, ME, nonce))
    assert set(proof.withhold) == {("key-1", 1)}
    committee.ledger.bring(node.witness)
    refused(lambda: node.gate.release(committee.owner_request()), Reason.KEY_STATE, "withheld")
    committee.close()
    node = committee.open(ME)
    assert node.epochs.all() == ()
    refused(lambda: node.gate.release(committee.owner_request()), Reason.KEY_STATE, "withheld")
    assert node.restoration.known().epochs["key-1", 1].state == "destroyed"
    assert any("WITHHELD" in warning for warning in node.warnings())
    Destroy(committee, "key-1", 1).approve().erase()
    row = node.keystore.epoch("key-1", 1)
    assert row is not None
    assert row.state == "destroyed"
    assert node.keystore.seeds(row) == {}
    assert not any("WITHHELD" in warning for warning in node.warnings())


def test_a_withheld_epoch_whose_destruction_fails_is_still_withheld(
    committee: Committee, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = back_up(committee, ME)
    committee.open_all()
    Destroy(committee, "key-1", 1).approve().erase()
    node = brought_back(committee, backup)
    nonce, _ = node.restoration.challenge()
    node.restoration.vouch(nonce, all_say(committee, ME, nonce))
    again = Destroy(committee, "key-1", 1).approve().propose()

    def full(*arguments: object) -> None:
        raise UnavailableError(Reason.STORAGE, "the disk is full")

    with monkeypatch.context() as disk:
        disk.setattr(type(node.keystore), "end_epoch", full)
        refused(lambda: again.erase_one(ME), Reason.STORAGE)
    assert node.epochs.all() == ()
    again.erase_one(ME)


def test_an_epoch_is_withheld_though_the_mark_names_nobody(committee: Committee) -> None:
    node = brought_back(committee)
    mark = node.standing.mark
    assert mark is not None
    node.standing.proved(dataclasses.replace(mark, proved_at=NOW, withheld={("key-1", 1): ()}))
    refused(lambda: node.gate.release(committee.owner_request()), Reason.KEY_STATE, "withheld")


def test_one_lying_peer_may_stop_it_and_no_more(committee: Committee) -> None:
    node = brought_back(committee)
    nonce, _ = node.restoration.challenge()
    truth = committee.nodes["de-1"].restoration.known()
    two = all_say(committee, ME, nonce, "fr-1", "is-1")
    lies: list[tuple[dict[str, object], str]] = [
        ({"roster_version": truth.roster_version + 1}, "de-1 knows a newer roster"),
        ({"roster_digest": "ab" * 32}, "de-1 knows a newer roster"),
        ({"ledger_size": 10**9}, "de-1 knows a newer ledger"),
        ({"documents": {"inventory": (99, "ab" * 32)}}, "de-1 knows a newer inventory"),
        ({"log": "ab" * 32}, "de-1 follows another ledger"),
        ({"epochs": {("key-1", 1): KnownEpoch("active", "ab" * 32)}}, "de-1 knows epoch 1 of key key-1 by another"),
    ]
    for known, said in lies:
        lie = _lie(committee, "de-1", nonce, **known)
        refused(lambda lie=lie: node.restoration.vouch(nonce, [lie, *two]), Reason.RESTORED, said)  # type: ignore[misc]
    # Saying less than it knows changes nothing for the others' word.
    nothing = Known(truth.roster_version, truth.roster_digest, {}, {}, truth.log)
    silent = sign_testimony(
        Said("de-1", ME, nonce.hex(), NOW, False, nothing), committee.nodes["de-1"].keystore.identity()
    )
    assert node.restoration.vouch(nonce, [silent, *two]).retire == {}


def test_others_restored_as_well_count_only_when_nobody_else_is_left(committee: Committee) -> None:
    backups = {name: back_up(committee, name) for name in ("ch-1", "de-1")}
    committee.close()
    wreck_and_restore(committee, "de-1", backups["de-1"])
    rosters = committee.directory("de-1") / "rosters"
    node = brought_back(committee, backups["ch-1"], {2: (rosters / "2.json").read_bytes()})
    nonce, _ = node.restoration.challenge()
    three = all_say(committee, ME, nonce, "de-1", "fr-1", "is-1")
    refused(lambda: node.restoration.vouch(nonce, three), Reason.RESTORED, "too few")
    node.restoration.vouch(nonce, all_say(committee, ME, nonce, "fr-1", "is-1", "no-1"))


def test_ceremonies_under_way_at_the_backup_are_cancelled(committee: Committee) -> None:
    committee.open_all()
    begun = Make(committee, committee.plan("key-2"))
    begun.propose()
    backup = back_up(committee, ME)
    node = brought_back(committee, backup)
    row = node.keystore.ceremony(begun.id)
    assert row is not None
    assert (row.state, row.cancelled_from) == ("cancelled", "proposed")
    assert node.keystore.parts(row) == {}


def test_a_testimony_is_signed_as_what_it_is(committee: Committee) -> None:
    committee.open_all()
    envelope = committee.nodes["de-1"].restoration.testify(ME, b"n" * 32, {})[0]
    testimony = Said.parse(peek_payload(envelope, TESTIMONY_TYPE, "testimony"))
    assert (testimony.custodian, testimony.subject, testimony.restored) == ("de-1", ME, False)
    refused(lambda: committee.nodes["de-1"].restoration.testify("de-1", b"n" * 32, {}), Reason.MALFORMED)
    refused(lambda: committee.nodes["de-1"].restoration.testify("jp-1", b"n" * 32, {}), Reason.UNKNOWN_CUSTODIAN)
