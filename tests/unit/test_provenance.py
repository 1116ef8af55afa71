"""Provenance: what an owner says about prepared data, bound to the file it speaks of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from keyquorum.provenance import read_statements
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.manifest import Subject
from keyquorum_core.provenance import Provenance, ProvenanceStatement, open_provenance, sign_provenance
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity

OWNER = LoadedKeys("alice", "owner", Identity.generate(), RecipientKey.generate())
DATA = hashlib.sha256(b"a,b\n1,2\n").hexdigest()
STATEMENT = ProvenanceStatement(
    pipeline_sha256="11" * 32,
    inputs=("33" * 32, "22" * 32),
    output_sha256=DATA,
    columns_in=("name", "a", "b"),
    columns_out=("b", "a"),
    rows_in=3,
    rows_out=2,
    epsilon_micro=500_000,
    tool="keyquorum 0.1.0",
    issued_at=1_800_000_000,
)


def test_layout_of_the_statement_is_pinned() -> None:
    assert STATEMENT.payload() == (
        b'{"columns_in":["a","b","name"],"columns_out":["a","b"],"epsilon_micro":500000,"inputs":["' + b"22" * 32
        + b'","' + b"33" * 32 + b'"],"issued_at":1800000000,"output_sha256":"' + DATA.encode()
        + b'","pipeline_sha256":"' + b"11" * 32 + b'","rows_in":3,"rows_out":2,"tool":"keyquorum 0.1.0"}'
    )  # fmt: skip
    assert ProvenanceStatement.parse(STATEMENT.payload()) == STATEMENT


def test_an_entry_names_the_statement_by_its_digest() -> None:
    entry = STATEMENT.entry("data.csv")
    assert entry.statement_sha256 == hashlib.sha256(STATEMENT.payload()).hexdigest()
    assert (entry.pipeline_sha256, entry.columns, entry.epsilon_micro) == ("11" * 32, ("a", "b"), 500_000)
    assert Provenance.read(json.loads(json.dumps(entry.as_json()))) == entry


@pytest.mark.parametrize(
    "change",
    [
        {"pipeline_sha256": "xx"},
        {"output_sha256": "AB" * 32},
        {"inputs": ()},
        {"inputs": ("22" * 32, "22" * 32)},
        {"columns_out": ("a", "a")},
        {"columns_in": ("a\x1b",)},
        {"columns_in": ("a" * 129,)},
        {"epsilon_micro": -1},
        {"rows_in": -1},
        {"tool": "two\nlines"},
        {"epsilon_micro": 2**53},
    ],
)
def test_a_statement_is_sound_or_not_made(change: dict[str, object]) -> None:
    with pytest.raises(KeyquorumError) as caught:
        dataclasses.replace(STATEMENT, **change)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.MALFORMED


def test_statements_on_the_way_into_a_manifest(tmp_path: Path) -> None:
    file = tmp_path / "statement.json"
    file.write_bytes(sign_provenance(STATEMENT, OWNER.identity))
    subjects = (Subject("data.csv", DATA), Subject("main.py", "44" * 32))
    assert read_statements([file], OWNER, subjects) == (STATEMENT.entry("data.csv"),)
    assert open_provenance(file.read_bytes(), OWNER.identity.public) == STATEMENT

    with pytest.raises(KeyquorumError) as other_file:
        read_statements([file], OWNER, subjects[1:])
    assert other_file.value.reason is Reason.PROVENANCE
    assert DATA in other_file.value.expected
    with pytest.raises(KeyquorumError) as twice:
        read_statements([file, file], OWNER, subjects)
    assert twice.value.reason is Reason.PROVENANCE
    stranger = LoadedKeys("mallory", "owner", Identity.generate(), OWNER.recipient)
    with pytest.raises(KeyquorumError) as unsigned:
        read_statements([file], stranger, subjects)
    assert unsigned.value.reason is Reason.SIGNATURE
