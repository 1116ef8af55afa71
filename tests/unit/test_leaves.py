"""Leaves of the ledger: docs/spec/vectors/leaves.json replayed, the bytes pinned, and nothing in them but digests."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from keyquorum_core.ledger import leaves
from keyquorum_core.ledger.leaves import (
    LEAF_TYPES,
    MAX_LEAF,
    NOTHING,
    Alarm,
    Ceremony,
    Drill,
    JobDenied,
    JobSubmitted,
    LedgerLeaf,
    Result,
    Revocation,
    RosterInUse,
    Telemetry,
    custodian_seat,
    parse_leaf,
)
from keyquorum_core.ledger.merkle import leaf_hash

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT: dict[str, Any] = json.loads((ROOT / "docs" / "spec" / "vectors" / "leaves.json").read_text("utf-8"))
GOOD = [vector for vector in DOCUMENT["vectors"] if vector["expect"] == "ok"]
SUBMITTED = next(v["data"].encode() for v in GOOD if v["name"] == "job.submitted")


@pytest.mark.parametrize("vector", DOCUMENT["vectors"], ids=lambda vector: ascii(vector["name"]))
def test_vector(vector: dict[str, Any]) -> None:
    data = vector["data"].encode()
    if vector["expect"] == "ok":
        leaf = parse_leaf(data)
        assert leaf.to_bytes() == data
        assert leaf.hash().hex() == vector["hash"] == leaf_hash(data).hex()
    else:
        with pytest.raises(MalformedError) as caught:
            parse_leaf(data)
        assert caught.value.reason == vector["expect"]


def test_every_type_has_a_vector_and_most_are_negative() -> None:
    assert {json.loads(vector["data"])["type"] for vector in GOOD} == LEAF_TYPES
    assert len(DOCUMENT["vectors"]) > 2 * len(GOOD)


def test_the_vectors_are_what_their_script_writes() -> None:
    script = ROOT / "scripts" / "make_leaf_vectors.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_the_types_are_those_of_the_design() -> None:
    assert {
        "job.submitted", "job.denied", "release.intent", "telemetry", "result", "ceremony", "roster", "revocation",
        "drill", "alarm",
    } == LEAF_TYPES  # fmt: skip


def test_members_are_pinned() -> None:
    """A member more or less is another version."""
    found = {
        kind.TYPE: (kind.VERSION, " ".join(sorted(field.name for field in dataclasses.fields(kind))))
        for kind in (JobSubmitted, JobDenied, Telemetry, Result, Ceremony, RosterInUse, Revocation, Drill, Alarm)
    }
    decided = "decision_sha256 {} policy_sha256 policy_version {}"
    assert found == {
        "job.submitted": (
            1,
            "classification decision_sha256 epoch export_control job_id key_id manifest_sha256 owner_sha256"
            " policy_sha256 policy_version regions time",
        ),
        "job.denied": (
            1,
            decided.format("epoch intent_sha256 job_id key_id manifest_sha256 owner_sha256", "reason seat time"),
        ),
        "telemetry": (
            1,
            "content_sha256 development evidence_sha256 job_id last previous_sha256 records sequence statement_sha256"
            " time worker_sha256",
        ),
        "result": (
            1,
            "development evidence_sha256 job_id log_sha256 outcome reason result_sha256 statement_sha256 time",
        ),
        "ceremony": (1, "ceremony_id certificate_sha256 epoch key_id kind plan_sha256 reason roster_sha256 time"),
        "roster": (1, "custodians expires_at roster_sha256 roster_version time"),
        "revocation": (1, "document_sha256 document_version subject_sha256 target time"),
        "drill": (1, "drill duration_ms passed report_sha256 time"),
        "alarm": (1, "alarm evidence_sha256 seat time"),
    }


def test_the_bytes_of_a_leaf_are_pinned() -> None:
    roster = RosterInUse(roster_sha256="5" * 64, roster_version=2, custodians=5, expires_at=1_900_000_000, time=7)
    assert roster.to_bytes() == (
        b'{"custodians":5,"expires_at":1900000000,"roster_sha256":"' + b"5" * 64 + b'","roster_version":2,"time":7,'
        b'"type":"roster","version":1}'
    )
    alarm = Alarm(alarm="fork", seat=custodian_seat("ch-1"), evidence_sha256=NOTHING, time=1)
    assert alarm.to_bytes() == (
        b'{"alarm":"fork","evidence_sha256":"' + NOTHING.encode() + b'","seat":"custodian/ch-1","time":1,'
        b'"type":"alarm","version":1}'
    )


def test_no_member_takes_a_free_text() -> None:
    """What a person could be named in: strings of words, an address, a path."""
    for vector in GOOD:
        members = json.loads(vector["data"])
        for name, value in members.items():
            for personal in ("Alice Example", "alice@example.org", "secret/plans.pdf", "älice"):
                changed = {**members, name: [personal] if isinstance(value, list) else personal}
                data = json.dumps(changed, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
                if name == "export_control" and personal == "Alice Example":
                    continue  # a class such as "5A002 b" has letters, digits and spaces; the manifest has it too
                with pytest.raises(MalformedError):
                    parse_leaf(data)


def test_an_owner_is_a_digest() -> None:
    text = SUBMITTED.decode()
    assert "alice" not in text
    assert hashlib.sha256(b"owner").hexdigest() in text


@given(st.binary(max_size=200))
def test_any_bytes_are_a_leaf_or_a_typed_error(data: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_leaf(data)


@given(st.integers(0, len(SUBMITTED) - 1), st.integers(0, 255))
def test_a_changed_byte_is_another_leaf_or_none(position: int, value: int) -> None:
    changed = bytearray(SUBMITTED)
    changed[position] = value
    try:
        leaf = parse_leaf(bytes(changed))
    except MalformedError:
        return
    assert leaf.to_bytes() == changed


def test_parsing_one_type_refuses_the_others() -> None:
    with pytest.raises(KeyquorumError) as caught:
        JobDenied.parse(SUBMITTED)
    assert caught.value.reason is Reason.MALFORMED
    assert isinstance(JobSubmitted.parse(SUBMITTED), LedgerLeaf)


def test_the_largest_leaf_fits() -> None:
    leaf = JobSubmitted.parse(SUBMITTED)
    regions = tuple(sorted(f"{number:032d}" for number in range(64)))
    largest = dataclasses.replace(leaf, key_id="k" * 64, regions=regions, export_control="E" * 64)
    assert len(largest.to_bytes()) < MAX_LEAF
    assert parse_leaf(largest.to_bytes()) == largest
    assert leaves.MAX_LEAF < 65_535
