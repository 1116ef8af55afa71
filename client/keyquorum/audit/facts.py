"""What a verified log says, on a scratch disk: memory does not grow with the log, and a report is a few queries.

Every leaf is read by the strict parser of its type. What no parser reads is counted and listed, and is nothing else: no
custodian releases on such a leaf.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from keyquorum.ledger.proving import LoggedLeaf
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.ledger.leaves import (
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
    parse_leaf,
)
from keyquorum_core.release import LEAF_TYPE, Leaf

__all__ = ["LISTED", "UNREADABLE", "Facts", "Row"]

UNREADABLE: Final = "unreadable"
"""The type of a leaf that no parser reads."""
LISTED: Final = (
    Alarm.TYPE,
    UNREADABLE,
    JobDenied.TYPE,
    LEAF_TYPE,
    Ceremony.TYPE,
    Drill.TYPE,
    Revocation.TYPE,
    RosterInUse.TYPE,
)
"""Types whose leaves a report lists one by one, most urgent first; of the others it gives numbers."""

_SCHEMA: Final = """
CREATE TABLE job (job_id TEXT PRIMARY KEY, classification TEXT, export_control TEXT, regions TEXT) WITHOUT ROWID;
CREATE TABLE leaf (
    idx INTEGER PRIMARY KEY, type TEXT, time INTEGER, job_id TEXT, key_id TEXT, epoch INTEGER, word TEXT, seat TEXT,
    digest TEXT, development INTEGER, passed INTEGER, version INTEGER, data BLOB
);
CREATE INDEX by_type ON leaf (type, idx);
"""
Columns = tuple[str, int, str, str, int, str, str, str, bool, bool, int]
_INSERT: Final = "INSERT INTO leaf VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, slots=True)
class Row:
    """One leaf. ``word``: what its type turns on, a release's recipient, a refusal's or failed ceremony's reason, the
    alarm, drill or target; ``digest``: of the evidence, policy, certificate, report or document."""

    index: int
    type: str
    time: int
    job_id: str
    key_id: str
    epoch: int
    word: str
    seat: str
    digest: str
    development: bool
    passed: bool
    version: int
    data: bytes


class Facts:
    """The leaves of a period, ``begin`` ≤ time < ``end`` (unix seconds), and the jobs of all time. ``before`` and
    ``after`` count the leaves outside it; those that no parser reads have no time and are always in it."""

    def __init__(self, folder: Path, begin: int, end: int) -> None:
        """``folder`` is private and thrown away afterwards."""
        self._begin, self._end = begin, end
        self.before = self.after = 0
        self._db = sqlite3.connect(folder / "facts.sqlite", isolation_level=None)
        self._db.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_SCHEMA}")

    def close(self) -> None:
        self._db.close()

    def add(self, first: int, leaves: tuple[bytes, ...]) -> None:
        """Consecutive leaves from index ``first`` on."""
        rows, jobs = [], []
        for index, data in enumerate(leaves, first):
            leaf = _read(data)
            if isinstance(leaf, JobSubmitted):
                jobs.append((leaf.job_id, leaf.classification, leaf.export_control, ", ".join(leaf.regions)))
            if leaf is None:
                rows.append((index, UNREADABLE, 0, "", "", 0, "", "", "", 0, 0, 0, data))
                continue
            columns = _columns(leaf)
            if columns[1] < self._begin:
                self.before += 1
            elif columns[1] >= self._end:
                self.after += 1
            else:
                rows.append((index, *columns, data))
        self._db.execute("BEGIN")
        # The first leaf about a job counts: later ones can't change what was said of releases before them.
        self._db.executemany("INSERT OR IGNORE INTO job VALUES (?, ?, ?, ?)", jobs)
        self._db.executemany(_INSERT, rows)
        self._db.execute("COMMIT")

    def count(self, kind: str) -> int:
        return int(self.query("SELECT count(*) FROM leaf WHERE type = ?", kind)[0][0])

    def query(self, sql: str, *values: str | int) -> list[tuple[str | int, ...]]:
        """All rows of a small result; a minimum or maximum of nothing is 0."""
        return [tuple(0 if each is None else each for each in row) for row in self._db.execute(sql, values)]

    def rows(self, kind: str, most: int) -> list[Row]:
        """The latest leaves of a type, the last one first."""
        found = self._db.execute("SELECT * FROM leaf WHERE type = ? ORDER BY idx DESC LIMIT ?", (kind, most))
        return [_row(each) for each in found]

    def leaves(self, kinds: Sequence[str]) -> Iterator[LoggedLeaf]:
        """All leaves of these types in the log's order."""
        marks = ", ".join("?" * len(kinds))
        for index, data in self._db.execute(
            f"SELECT idx, data FROM leaf WHERE type IN ({marks}) ORDER BY idx",  # noqa: S608 - question marks only
            tuple(kinds),
        ):
            yield LoggedLeaf(index, data)


def _read(data: bytes) -> LedgerLeaf | Leaf | None:
    try:
        return parse_leaf(data)
    except KeyquorumError:
        return None


def _row(found: tuple[object, ...]) -> Row:
    values = list(found)
    values[9], values[10] = bool(values[9]), bool(values[10])
    return Row(*values)  # type: ignore[arg-type]


def _columns(leaf: LedgerLeaf | Leaf) -> Columns:
    """type, time, job, key, epoch, word, seat, digest, development, passed, version."""
    match leaf:
        case Leaf():
            return (
                LEAF_TYPE, leaf.time, leaf.job_id, leaf.key_id, leaf.epoch, leaf.recipient, "", leaf.evidence_sha256,
                leaf.development, False, 0,
            )  # fmt: skip
        case JobSubmitted():
            return (
                leaf.TYPE, leaf.time, leaf.job_id, leaf.key_id, leaf.epoch, "", "coordinator", leaf.policy_sha256,
                False, True, leaf.policy_version,
            )  # fmt: skip
        case JobDenied():
            return (
                leaf.TYPE, leaf.time, leaf.job_id, leaf.key_id, leaf.epoch, leaf.reason, leaf.seat, leaf.policy_sha256,
                False, False, leaf.policy_version,
            )  # fmt: skip
        case Telemetry():
            return (
                leaf.TYPE, leaf.time, leaf.job_id, "", 0, "", "", leaf.evidence_sha256, leaf.development, True,
                leaf.records,
            )  # fmt: skip
        case Result():
            return (
                leaf.TYPE, leaf.time, leaf.job_id, "", 0, leaf.outcome, "", leaf.evidence_sha256, leaf.development,
                leaf.outcome == "completed", 0,
            )  # fmt: skip
        case Ceremony():
            return (
                leaf.TYPE, leaf.time, "", leaf.key_id, leaf.epoch, leaf.kind, leaf.reason, leaf.certificate_sha256,
                False, leaf.reason == "", 0,
            )  # fmt: skip
        case RosterInUse():
            return (
                leaf.TYPE, leaf.time, "", "", 0, f"{leaf.custodians} custodians", "", leaf.roster_sha256, False, True,
                leaf.roster_version,
            )  # fmt: skip
        case Revocation():
            return (
                leaf.TYPE, leaf.time, "", "", 0, leaf.target, "", leaf.subject_sha256, False, True,
                leaf.document_version,
            )  # fmt: skip
        case Drill():
            return (
                leaf.TYPE, leaf.time, "", "", 0, leaf.drill, "", leaf.report_sha256, False, leaf.passed,
                leaf.duration_ms,
            )  # fmt: skip
        case Alarm():
            return (leaf.TYPE, leaf.time, "", "", 0, leaf.alarm, leaf.seat, leaf.evidence_sha256, False, False, 0)
        case _:  # a type that this report does not know yet; its leaves are counted
            return (leaf.TYPE, getattr(leaf, "time", 0), "", "", 0, "", "", "", False, False, 0)
