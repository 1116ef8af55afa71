"""A custodian's backup: made, verified, restored under new keys, and what is refused of it."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from keyquorum_core.backup import BackupReader, fingerprint
from keyquorum_core.backup_body import SHAPES, Record
from keyquorum_core.backup_checks import BackupCheck, Checked
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.sealing import RecipientKey
from keyquorum_custodian.backing_up import NOT_BACKED_UP, write_backup
from keyquorum_custodian.config import load_config
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.node import open_node
from keyquorum_custodian.restoring import Restored, restore
from keyquorum_custodian.standing import Standing
from keyquorum_custodian.trust import load_operators
from tests.support.custodian import PASSPHRASE, Committee, build_committee
from tests.support.mortal import KILLED, ROOT, dying_command

NOW = 1_800_000_000
KEY = RecipientKey.generate()
OTHER = RecipientKey.generate()


@pytest.fixture(scope="module")
def committee(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Committee]:
    """Three custodians with two epochs of a key, of which one release was made."""
    made = build_committee(tmp_path_factory.mktemp("backup"), clock=lambda: NOW)
    made.open_all()
    made.generate()
    made.open("ch-1").gate.release(made.owner_request())
    made.close()
    yield made
    made.close()


def back_up(committee: Committee, custodian: str = "ch-1", *recipients: RecipientKey) -> bytes:
    config = load_config(committee.directory(custodian))
    store = Keystore.open(config.keystore, PASSPHRASE)
    sink = io.BytesIO()
    try:
        write_backup(sink, store, config, [each.public for each in recipients or (KEY,)], NOW)
    finally:
        store.close()
    return sink.getvalue()


@pytest.fixture(scope="module")
def backup(committee: Committee) -> bytes:
    return back_up(committee)


def verified(data: bytes, committee: Committee, key: RecipientKey = KEY) -> Checked:
    reader = BackupReader(io.BytesIO(data))
    check = BackupCheck(reader.opening.cluster, reader.opening.custodian)
    for record in reader.records(key):
        check.take(record)
    operators = load_operators(committee.folder / "operators.json")
    return check.finish(reader, operators.identities, operators.threshold)


def restored(data: bytes, committee: Committee, folder: Path, **more: object) -> Restored:
    operators = committee.folder / "operators.json"
    return restore(
        io.BytesIO(data),
        KEY,
        folder,
        PASSPHRASE,
        load_operators(operators),
        operators.read_bytes(),
        now=NOW + 3600,
        opslimit=1,
        memlimit=8 << 10,
        **more,  # type: ignore[arg-type]
    )


def test_a_backup_verifies_without_being_restored(backup: bytes, committee: Committee) -> None:
    found = verified(backup, committee)
    assert found.operators_checked
    (epoch,) = found.statement.epochs
    assert (epoch.key_id, epoch.epoch, epoch.state, epoch.seeds) == ("key-1", 1, "active", 2)
    assert found.statement.ledger_size == committee.ledger.size
    assert found.statement.sequence == 1
    assert verified(back_up(committee), committee).statement.sequence > 1


def test_it_opens_for_each_recipient_and_nobody_else(committee: Committee) -> None:
    data = back_up(committee, "ch-1", KEY, OTHER)
    assert verified(data, committee).statement == verified(data, committee, OTHER).statement
    with pytest.raises(RefusedError) as caught:
        verified(back_up(committee), committee, OTHER)
    assert caught.value.reason is Reason.RECIPIENT
    assert fingerprint(OTHER.public)[:16] in caught.value.actual


def test_no_secret_stands_in_it_in_the_clear(backup: bytes, committee: Committee) -> None:
    config = load_config(committee.directory("ch-1"))
    store = Keystore.open(config.keystore, PASSPHRASE)
    seeds = [seed for row in store.epochs() for seed in store.seeds(row).values()]
    store.close()
    assert seeds
    assert not any(seed in backup for seed in seeds)


def test_what_is_restored_holds_what_the_old_one_did_under_other_keys(
    backup: bytes, committee: Committee, tmp_path: Path
) -> None:
    made = restored(backup, committee, tmp_path / "new")
    old, new = (load_config(folder) for folder in (committee.directory("ch-1"), tmp_path / "new"))
    before, after = Keystore.open(old.keystore, PASSPHRASE), Keystore.open(new.keystore, PASSPHRASE)
    try:
        assert [before.seeds(row) for row in before.epochs()] == [after.seeds(row) for row in after.epochs()]
        assert before.epochs() == after.epochs()
        for query in (
            "SELECT * FROM rosters ORDER BY digest",
            "SELECT * FROM ledgers",
            "SELECT * FROM bulletins ORDER BY kind",
            "SELECT * FROM releases",
            "SELECT ceremony_id, state, plan FROM ceremonies",
        ):
            assert before.select(query) == after.select(query), query
        assert before.release_count() == 1
        assert before.identity().public != after.identity().public == made.card.custodian.identity
        assert before.recipient().public != after.recipient().public
        assert before.cosigner("x").witness_key.encode() != after.cosigner("x").witness_key.encode()
        assert [row.kind for row in after.approvals()] == ["restore"]
    finally:
        before.close()
        after.close()
    assert sorted(path.name for path in (tmp_path / "new" / "owners").iterdir()) == ["alice.json"]
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def test_under_the_old_roster_what_was_restored_does_not_start(
    backup: bytes, committee: Committee, tmp_path: Path
) -> None:
    restored(backup, committee, tmp_path / "new")
    shutil.copy(committee.folder / "roster.json", tmp_path / "new" / "roster.json")
    with pytest.raises(RefusedError, match="identity on disk is not the one in the roster"):
        open_node(tmp_path / "new", PASSPHRASE, clock=lambda: NOW)


def test_restoring_never_overwrites(backup: bytes, committee: Committee, tmp_path: Path) -> None:
    restored(backup, committee, tmp_path / "new")
    kept = (tmp_path / "new" / "keystore.db").read_bytes()
    with pytest.raises(KeyquorumError) as caught:
        restored(backup, committee, tmp_path / "new")
    assert caught.value.reason is Reason.EXISTS
    assert (tmp_path / "new" / "keystore.db").read_bytes() == kept


def test_any_changed_byte_is_noticed_and_nothing_is_left(backup: bytes, committee: Committee, tmp_path: Path) -> None:
    for place in [*range(0, len(backup), len(backup) // 60), len(backup) - 1]:
        spoilt = bytearray(backup)
        spoilt[place] ^= 0x40
        with pytest.raises(KeyquorumError):
            restored(bytes(spoilt), committee, tmp_path / "new")
        assert not list(tmp_path.iterdir()), place


def test_a_backup_that_ends_early_or_goes_on_is_refused(backup: bytes, committee: Committee) -> None:
    for data in (backup[:-1], backup[: len(backup) // 2], backup + b"\0", b"", backup[:30]):
        with pytest.raises(MalformedError):
            list(_all(data))


def _all(data: bytes) -> Iterator[Record]:
    reader = BackupReader(io.BytesIO(data))
    yield from reader.records(KEY)


def test_other_operators_do_not_vouch_for_it(backup: bytes, committee: Committee, tmp_path: Path) -> None:
    stranger = build_committee(tmp_path / "other", clock=lambda: NOW)
    with pytest.raises(RefusedError) as caught:
        restored(backup, stranger, tmp_path / "new")
    assert caught.value.reason in (Reason.SIGNATURE, Reason.SIGNATURE_MISSING, Reason.UNKNOWN_OPERATOR)
    assert not (tmp_path / "new").exists()


def test_every_table_is_backed_up_or_left_out_on_purpose(committee: Committee) -> None:
    store = Keystore.open(load_config(committee.directory("ch-1")).keystore, PASSPHRASE)
    tables = {str(row[0]) for row in store.select("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    store.close()
    records = {
        "alarm": "ledger_alarms",
        "checkpoint": "ledgers",
        "evidence": "quarantine_evidence",
        "quarantine": "quarantine",
        "seeds": "seeds",
        "tpm": "tpm_states",
        "ceremony": "ceremonies",
    }
    backed = {records.get(kind, f"{kind}s") for kind in SHAPES} - {"files", "roster-files"}
    assert tables - {"meta", "sqlite_sequence"} == backed | NOT_BACKED_UP


@pytest.mark.parametrize("when", ["before", "after"])
def test_restore_killed_at_any_write_is_made_whole_by_running_it_again(
    backup: bytes, committee: Committee, tmp_path: Path, when: str
) -> None:
    (tmp_path / "backup").write_bytes(backup)
    (tmp_path / "recipient").write_bytes(KEY.to_seed_bytes())
    shutil.copy(committee.folder / "operators.json", tmp_path)
    killed = 0
    for number in range(1, 30):
        folder = tmp_path / f"new-{number}"
        command = dying_command("restore", str(folder), str(number), when)
        child = subprocess.run(command, cwd=ROOT, timeout=60, check=False)
        if child.returncode == 0:
            break
        assert child.returncode == KILLED
        killed += 1
        assert not folder.exists(), "half a custodian"
        made = restored(backup, committee, folder)
        assert not folder.with_name(f"{folder.name}.init").exists()
        store = Keystore.open(folder / "keystore.db", PASSPHRASE)
        assert store.identity().public == made.card.custodian.identity
        assert len(store.seeds(store.epochs()[0])) == 2
        assert Standing(store).restored
        store.close()
    assert killed == 2 + 6 + 3  # two commits of the keystore, six files of any custodian, and three from the backup
