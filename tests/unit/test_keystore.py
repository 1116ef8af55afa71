"""The keystore: secrets only under the passphrase, changes whole or not at all, and errors that say what is wrong."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from keyquorum_core.ceremony_states import Kind, State
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_custodian import schema, seed_records
from keyquorum_custodian.keystore import Keystore, ReleaseRecord
from keyquorum_custodian.seed_records import CeremonyRow, EpochRow

PASSPHRASE = "correct horse battery staple"
NOW = 1_700_000_000
ROW = CeremonyRow("c" * 32, Kind.GENERATE, "key-1", 1, State.PROPOSED, None, b"plan", ("olga",))


def make(path: Path, identity: Identity | None = None, recipient: RecipientKey | None = None) -> Keystore:
    return Keystore.create(
        path,
        "ch-1",
        identity or Identity.generate(),
        recipient or RecipientKey.generate(),
        Cosigner.generate("demo/ch-1"),
        PASSPHRASE,
        opslimit=1,
        memlimit=8 << 10,
    )


def fill(store: Keystore, seeds: dict[int, bytes]) -> EpochRow:
    epoch = EpochRow("key-1", 1, ROW.ceremony_id, b"certificate")
    with store.transaction():
        store.insert_ceremony(ROW, NOW)
        store.replace_parts_by_seeds(ROW, seeds)
        store.insert_epoch(epoch, NOW)
    return epoch


def record(number: int) -> ReleaseRecord:
    return ReleaseRecord(number.to_bytes(32, "big"), b"leaf", "alice", NOW + number, 5, False, "ab" * 32, 3, "cd" * 32)


def _insert_twice(store: Keystore) -> None:
    for _ in range(2):
        store.insert_ceremony(ROW, NOW)
        store.insert_parts(ROW, {0: bytes(32)})


def _record_many(store: Keystore) -> None:
    for number in range(10_000):
        store.record_release(record(number))


def test_what_was_stored_is_there_again_after_opening(tmp_path: Path) -> None:
    identity, recipient = Identity.generate(), RecipientKey.generate()
    seeds = {0: os.urandom(32), 7: os.urandom(32)}
    store = make(tmp_path / "k.db", identity, recipient)
    fill(store, seeds)
    store.record_release(record(1))
    store.close()
    again = Keystore.open(tmp_path / "k.db", PASSPHRASE)
    assert again.custodian_id == "ch-1"
    assert again.identity().public == identity.public
    assert again.recipient().public == recipient.public
    (epoch,) = again.epochs()
    assert again.epoch("key-1", 1) == epoch
    assert again.epoch("key-1", 2) is None
    assert again.seeds(epoch) == seeds
    assert again.release_count() == 1
    assert again.releases_since(NOW) == [("alice", NOW + 1)]
    again.close()


def test_no_secret_stands_in_clear_in_any_of_its_files(tmp_path: Path) -> None:
    identity, recipient = Identity.generate(), RecipientKey.generate()
    seeds = {index: os.urandom(32) for index in range(20)}
    parts = {index: os.urandom(32) for index in range(20)}
    store = make(tmp_path / "k.db", identity, recipient)
    with store.transaction():
        store.insert_ceremony(ROW, NOW)
        store.insert_parts(ROW, parts)
    assert store.parts(ROW) == parts
    with store.transaction():
        store.replace_parts_by_seeds(ROW, seeds)
    private = recipient.to_seed_bytes()
    secrets = [*identity.seeds(), private, private[-32:], *seeds.values(), *parts.values(), PASSPHRASE.encode()]
    for moment in ("open", "closed"):
        files = list(tmp_path.iterdir())
        assert files, moment
        everything = b"".join(file.read_bytes() for file in files)
        assert len(everything) > 4096
        for secret in secrets:
            assert secret not in everything
            assert secret.hex().encode() not in everything
        store.close()


def test_its_file_is_for_its_owner_only(tmp_path: Path) -> None:
    make(tmp_path / "k.db").close()
    assert (tmp_path / "k.db").stat().st_mode & 0o777 == 0o600


def test_a_wrong_passphrase_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    make(tmp_path / "k.db").close()
    before = (tmp_path / "k.db").read_bytes()
    with pytest.raises(RefusedError) as caught:
        Keystore.open(tmp_path / "k.db", "wrong")
    assert caught.value.reason is Reason.PASSPHRASE
    assert (tmp_path / "k.db").read_bytes() == before
    Keystore.open(tmp_path / "k.db", PASSPHRASE).close()


def test_a_keystore_is_never_overwritten(tmp_path: Path) -> None:
    make(tmp_path / "k.db").close()
    before = (tmp_path / "k.db").read_bytes()
    with pytest.raises(StateError) as caught:
        make(tmp_path / "k.db")
    assert caught.value.reason is Reason.EXISTS
    assert (tmp_path / "k.db").read_bytes() == before


def test_a_missing_keystore_is_not_made_by_opening(tmp_path: Path) -> None:
    with pytest.raises(StateError) as caught:
        Keystore.open(tmp_path / "k.db", PASSPHRASE)
    assert caught.value.reason is Reason.NOT_FOUND
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"not a database at all, but long enough to look at" * 100])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "k.db").write_bytes(content)
    with pytest.raises(UnavailableError) as caught:
        Keystore.open(tmp_path / "k.db", PASSPHRASE)
    assert caught.value.reason is Reason.STORAGE


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    make(tmp_path / "k.db").close()
    db = sqlite3.connect(tmp_path / "k.db")
    db.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    db.close()
    before = (tmp_path / "k.db").read_bytes()
    with pytest.raises(StateError) as caught:
        Keystore.open(tmp_path / "k.db", PASSPHRASE)
    assert caught.value.reason is Reason.UNSUPPORTED
    assert caught.value.actual == f"schema version {schema.VERSION + 1}"
    assert (tmp_path / "k.db").read_bytes() == before


def test_one_process_serves_a_keystore(tmp_path: Path) -> None:
    store = make(tmp_path / "k.db")
    with pytest.raises(StateError) as caught:
        Keystore.open(tmp_path / "k.db", PASSPHRASE)
    assert caught.value.reason is Reason.STATE
    store.close()
    Keystore.open(tmp_path / "k.db", PASSPHRASE).close()


@pytest.mark.parametrize(
    "tamper",
    [
        "UPDATE seeds SET idx = 1 WHERE idx = 0",
        "UPDATE seeds SET sealed = (SELECT sealed FROM seeds WHERE idx = 7) WHERE idx = 0",
        "UPDATE seeds SET sealed = x'00' WHERE idx = 0",
        "UPDATE epochs SET epoch = 2",
        "UPDATE epochs SET key_id = 'key-2'",
    ],
)
def test_a_sealed_value_opens_only_where_it_was_written(tmp_path: Path, tamper: str) -> None:
    store = make(tmp_path / "k.db")
    fill(store, {0: os.urandom(32), 7: os.urandom(32)})
    store.close()
    db = sqlite3.connect(tmp_path / "k.db")
    db.execute(tamper)
    db.commit()
    db.close()
    store = Keystore.open(tmp_path / "k.db", PASSPHRASE)
    (epoch,) = store.epochs()
    with pytest.raises(UnavailableError) as caught:
        store.seeds(epoch)
    assert caught.value.reason is Reason.STORAGE
    assert "key-" in caught.value.expected
    store.close()


def test_a_failed_transaction_leaves_everything_as_it_was(tmp_path: Path) -> None:
    store = make(tmp_path / "k.db")
    with pytest.raises(StateError), store.transaction():
        _insert_twice(store)
    assert store.ceremonies() == ()
    assert store.parts(ROW) == {}
    store.close()


def test_a_full_disk_is_a_typed_error_and_loses_nothing(tmp_path: Path) -> None:
    store = make(tmp_path / "k.db")
    epoch = fill(store, {0: bytes(32)})
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(UnavailableError) as caught, store.transaction():
        store.replace_parts_by_seeds(ROW, {index: os.urandom(32) for index in range(1, 200)})
    assert caught.value.reason is Reason.STORAGE
    assert caught.value.next_step
    with pytest.raises(UnavailableError) as caught:
        _record_many(store)
    assert caught.value.reason is Reason.STORAGE
    assert store.seeds(epoch) == {0: bytes(32)}
    store._db.execute("PRAGMA max_page_count = 1000000")
    store.record_release(record(10_001))
    store.close()
    again = Keystore.open(tmp_path / "k.db", PASSPHRASE)
    assert again.seeds(epoch) == {0: bytes(32)}
    again.close()


def test_an_epoch_has_one_live_ceremony(tmp_path: Path) -> None:
    store = make(tmp_path / "k.db")
    fill(store, {})
    other = replace(ROW, ceremony_id="d" * 32)
    with pytest.raises(StateError), store.transaction():
        store.insert_ceremony(other, NOW)
    with store.transaction():
        store.move_ceremony(ROW.ceremony_id, State.CANCELLED, NOW, "why")
        store.insert_ceremony(other, NOW)
    assert store.live_ceremony("key-1", 1) == other
    assert store.ceremony(ROW.ceremony_id) == replace(
        ROW, state=State.CANCELLED, cancelled_from=State.PROPOSED, cause="why"
    )
    store.close()


def test_a_release_is_recorded_once_per_leaf(tmp_path: Path) -> None:
    store = make(tmp_path / "k.db")
    assert store.record_release(record(1))
    assert not store.record_release(record(1))
    assert store.has_release(record(1).leaf_hash)
    assert not store.has_release(bytes(32))
    assert store.release_count() == 1
    store.close()


def test_rosters_are_kept_by_digest_and_the_newest_is_known(tmp_path: Path) -> None:
    store = make(tmp_path / "k.db")
    assert store.newest_roster() is None
    store.keep_roster("aa", 2, b"second")
    store.keep_roster("aa", 2, b"second")
    store.keep_roster("bb", 1, b"first")
    assert store.newest_roster() == (2, "aa", b"second")
    assert store.roster_payload("bb") == b"first"
    assert store.roster_payload("cc") is None
    store.close()


def test_appraisals_are_kept_until_they_expire_and_cannot_be_planted(tmp_path: Path) -> None:
    store = make(tmp_path / "k.db")
    store.save_appraisals([(b"e" * 32, b"r" * 32, NOW + 10, b"verdict")], [("ak", b"state")], NOW)
    assert store.appraisal(b"e" * 32, b"r" * 32, NOW) == b"verdict"
    assert store.appraisals() == [(b"e" * 32, b"verdict")]
    assert store.tpm_state("ak") == b"state"
    assert store.tpm_state("other") is None
    assert store.appraisal(b"e" * 32, b"s" * 32, NOW) is None
    assert store.appraisal(b"e" * 32, b"r" * 32, NOW + 10) is None
    store._db.execute("UPDATE appraisals SET expires_at = expires_at + 1000")
    with pytest.raises(KeyquorumError):
        store.appraisal(b"e" * 32, b"r" * 32, NOW)
    store.save_appraisals([], [], NOW + 2000)
    assert store.appraisal(b"e" * 32, b"r" * 32, NOW) is None
    store._db.execute("UPDATE tpm_states SET ak = 'another'")
    with pytest.raises(KeyquorumError):
        store.tpm_state("another")
    store.close()


def test_dropped_appraisals_are_gone_in_every_context(tmp_path: Path) -> None:
    store = make(tmp_path / "k.db")
    rows = [(each * 32, context * 32, NOW + 10, each) for each in (b"e", b"f") for context in (b"r", b"s")]
    store.save_appraisals(rows, [], NOW)
    store.drop_appraisals([b"e" * 32])
    assert [verdict for _, verdict in store.appraisals()] == [b"f", b"f"]
    store.close()


def test_a_value_of_the_wrong_type_is_malformed(tmp_path: Path) -> None:
    store = make(tmp_path / "k.db")
    with pytest.raises(MalformedError):
        Keystore.create(
            tmp_path / "l.db",
            "ch-1",
            Identity.generate(),
            RecipientKey.generate(),
            Cosigner.generate("demo/ch-1"),
            "p",
            opslimit=99,
        )
    assert not (tmp_path / "l.db").exists()
    store.close()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7])
def test_seeds_are_read_in_pieces_as_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(seed_records, "_PIECE", 2)
    store = make(tmp_path / "k.db")
    seeds = {3 * index: bytes([index]) * 32 for index in range(count)}
    epoch = fill(store, seeds)
    with store.transaction():
        store.insert_seeds("another ceremony", "key-1", 1, {0: bytes(32), 50: bytes(32)})
    pieces = list(store.seeds_in_pieces(epoch))
    assert {index: seed for piece in pieces for index, seed in piece.items()} == store.seeds(epoch) == seeds
    assert all(len(piece) <= 2 for piece in pieces)
    store.close()
