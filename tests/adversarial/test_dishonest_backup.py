"""Backups that their own custodian signed, with a record repeated, left out, emptied or made up: the worst that whoever
had the old machine can hand to the new one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from keyquorum_core.backup import BackupReader, BackupWriter, Statement
from keyquorum_core.backup_body import SHAPES, Record
from keyquorum_core.backup_checks import BackupCheck
from keyquorum_core.errors import KeyquorumError, MalformedError, RefusedError
from keyquorum_custodian.config import load_config
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.node import open_node
from keyquorum_custodian.restoring import restore
from keyquorum_custodian.trust import load_operators
from tests.support.custodian import PASSPHRASE, Committee, build_committee
from tests.support.restoring import KEY, back_up

NOW = 1_800_000_000
ME = "ch-1"
MADE_UP = [
    Record("tpm", {"ak": "ab" * 32}, b"{}"),
    Record("evidence", {"sha256": hashlib.sha256(b"evidence").hexdigest()}, b"evidence"),
    Record("quarantine", {"evidence_sha256": "", "job_id": "", "lifted_at": 0, "message": "m", "raised_at": 1,
                          "reason": "EVIDENCE", "why": ""}, b'["worker:ab"]'),
    Record("lease", {"epoch": 1, "granted_at": 1, "job_id": "a" * 26, "key_id": "key-1", "recipient_sha256": "ab" * 32,
                     "renewals": 0, "revoked": "", "until": 2}, b"{}"),
    Record("alarm", {"cleared_at": 0, "evidence": "ab" * 32, "kind": "fork", "raised_at": 1, "why": ""},
           b"\0\0\0\1xy"),
    Record("accusation", {"ceremony_id": "0c" * 16, "custodian": "de-1", "found_at": 1, "what": "w"}, b"\0\0\0\1xy"),
]  # fmt: skip


PASSES = {
    "file": {"name", "data"},  # refused when restored, or by whoever reads it
    "checkpoint": {"accepted_at"},
    "bulletin": {"accepted_at"},
    "epoch": {"activated_at"},
    "ceremony": {"signers", "updated_at"},
    "release": {"decision_sha256", "owner", "policy_sha256", "policy_version", "released_at", "window"},
    "tpm": {"ak", "data"},
    "quarantine": {"message", "raised_at", "reason"},
    "lease": {"data", "epoch", "granted_at", "job_id", "key_id", "until"},
    "alarm": {"kind", "raised_at"},
    "accusation": {"ceremony_id", "custodian", "found_at", "what"},
}
"""Nothing in a backup says what they have to be: by kind, members that may be empty, and be so in a wrong one only."""


@pytest.fixture(scope="module")
def committee(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Committee]:
    made = build_committee(tmp_path_factory.mktemp("dishonest"), clock=lambda: NOW)
    made.open_all()
    made.generate()
    made.open(ME).gate.release(made.owner_request())
    made.close()
    yield made
    made.close()


@pytest.fixture(scope="module")
def honest(committee: Committee) -> tuple[list[Record], Statement]:
    reader = BackupReader(io.BytesIO(back_up(committee, ME)))
    records = list(reader.records(KEY))
    return records, reader.statement


def signed(committee: Committee, records: Iterable[Record], statement: Statement) -> bytes:
    """What the custodian's own machine makes of these records."""
    sink = io.BytesIO()
    writer = BackupWriter(sink, [KEY.public], cluster=statement.cluster, custodian=ME)
    for record in sorted(records, key=lambda each: list(SHAPES).index(each.kind.replace("seeds", "epoch"))):
        writer.add(record)
    digest, size = writer.close_body()
    said = replace(
        statement, backup_id=writer.opening.backup_id, opening_sha256=writer.opening_sha256,
        body_sha256=digest, body_bytes=size,
    )  # fmt: skip
    store = Keystore.open(load_config(committee.directory(ME)).keystore, PASSPHRASE)
    writer.finish(said, store.identity())
    store.close()
    return sink.getvalue()


def verified(committee: Committee, data: bytes) -> bool:
    """Raises what no backup may bring about."""
    reader = BackupReader(io.BytesIO(data))
    check = BackupCheck(reader.opening.cluster, ME)
    operators = load_operators(committee.folder / "operators.json")
    try:
        for record in reader.records(KEY):
            check.take(record)
        check.finish(reader, operators.identities, operators.threshold)
    except KeyquorumError:
        return False
    return True


def restored(committee: Committee, data: bytes, folder: Path) -> bool:
    operators = committee.folder / "operators.json"
    try:
        made = restore(
            io.BytesIO(data), KEY, folder, PASSPHRASE, load_operators(operators), operators.read_bytes(), now=NOW,
            opslimit=1, memlimit=8 << 10,
        )  # fmt: skip
    except KeyquorumError:
        assert not folder.exists()
        return False
    shutil.copy(committee.folder / "roster.json", folder / "roster.json")
    with pytest.raises(RefusedError, match="identity on disk"):  # no further: its card is in no roster
        open_node(made.config.directory, PASSPHRASE, clock=lambda: NOW)
    return True


Honest = tuple[list[Record], Statement]


def test_the_same_record_twice_is_refused_where_it_may_stand_but_once(
    committee: Committee, honest: Honest, tmp_path: Path
) -> None:
    records, statement = honest
    assert restored(committee, signed(committee, [*records, *MADE_UP], statement), tmp_path / "new")
    kinds = {record.kind: record for record in [*records, *MADE_UP]}
    twice = set()
    for kind, record in kinds.items():
        more = [record] if record in records else [record, record]
        if restored(committee, signed(committee, [*records, *more], statement), tmp_path / f"new-{kind}"):
            twice.add(kind)
    assert twice == {"quarantine", "accusation"}  # one more entry, and the same one


def test_what_is_left_out_is_missed_where_others_speak_of_it(committee: Committee, honest: Honest) -> None:
    records, statement = honest
    missed = {
        record.kind
        for record in records
        if not verified(committee, signed(committee, [each for each in records if each is not record], statement))
    }
    assert missed == {"roster", "roster-file", "checkpoint", "epoch", "seeds"}


def test_an_emptied_member_is_refused_where_it_means_something(committee: Committee, honest: Honest) -> None:
    """What passes is only told to people, or left to the peers' testimony."""
    records, statement = honest
    passes: dict[str, set[str]] = {}
    for record in [*records, *MADE_UP]:
        base = [*records, *([] if record in records else [record])]
        changed: dict[str, Record] = {}
        for name, value in record.members.items():
            with contextlib.suppress(MalformedError):
                changed[name] = replace(record, members={**record.members, name: 0 if isinstance(value, int) else ""})
        changed["data"] = replace(record, data=b"")
        for name, spoilt in changed.items():
            if spoilt != record and verified(
                committee, signed(committee, [spoilt if each is record else each for each in base], statement)
            ):
                passes.setdefault(record.kind, set()).add(name)
    assert passes == PASSES


def test_states_and_kinds_that_there_are_not_are_refused(committee: Committee, honest: Honest) -> None:
    records, statement = honest
    (begun,) = [each for each in records if each.kind == "ceremony"]
    quarantined = next(each for each in MADE_UP if each.kind == "quarantine")
    for name in ("state", "cancelled_from", "kind"):
        spoilt = replace(begun, members={**begun.members, name: "asleep"})
        changed = [spoilt if each is begun else each for each in records]
        assert not verified(committee, signed(committee, changed, statement))
    for data in (b"", b"worker", b"{}", b"[1]", b"[[]]", b"[" * 100_000):
        spoilt = replace(quarantined, data=data)
        assert not verified(committee, signed(committee, [*records, spoilt], statement))
