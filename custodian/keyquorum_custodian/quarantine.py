"""Workers that this custodian gives nothing to any more: hardware and worker keys whose attestation failed anew.

An entry names what is refused: hardware identities, and the digests of recipient keys. It is made when a worker that
held a lease hands in evidence that its machine is not what it was (``leases.py`` says when), or by whoever else has
reason to. It is on the disk when :meth:`Quarantine.put` returns, with the evidence that gave rise to it, survives
restarts, and ends only when an operator lifts it. Entries are never deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from keyquorum_core.attestation.inventory import HardwareId
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError
from keyquorum_custodian.keystore import Keystore

__all__ = ["Quarantine", "QuarantineEntry", "worker_subject"]

_COLUMNS: Final = "number, subjects, reason, message, job_id, evidence_sha256, raised_at, lifted_at, why"
_MAX_TEXT: Final = 400


@dataclass(frozen=True, slots=True)
class QuarantineEntry:
    """``subjects``: ``worker:SHA-256 of its recipient key`` and hardware identities, ``kind:id``. Times are unix
    seconds; an entry in force has no ``lifted_at``. ``evidence_sha256`` is empty where there was no evidence."""

    number: int
    subjects: tuple[str, ...]
    reason: str
    message: str
    job_id: str
    evidence_sha256: str
    raised_at: int
    lifted_at: int | None
    why: str | None


def worker_subject(recipient_sha256: str) -> str:
    """A worker's key as entries name it: the hex SHA-256 of its encoded recipient key, as in its leaves."""
    return f"worker:{recipient_sha256}"


class Quarantine:
    """One custodian's entries; used from one thread. ``on_entry`` hears of each new one: it is an alarm."""

    def __init__(self, keystore: Keystore, on_entry: Callable[[QuarantineEntry], None] = lambda entry: None) -> None:
        self._keystore = keystore
        self._on_entry = on_entry
        self._in_force: dict[str, QuarantineEntry] = {}
        self._read()

    def entries(self) -> tuple[QuarantineEntry, ...]:
        """All of them, lifted ones too, oldest first."""
        rows = self._keystore.select(f"SELECT {_COLUMNS} FROM quarantine ORDER BY number")  # noqa: S608
        return tuple(QuarantineEntry(row[0], tuple(json.loads(str(row[1]))), *row[2:]) for row in rows)  # type: ignore[arg-type]

    @property
    def in_force(self) -> int:
        """How many entries are."""
        return len({entry.number for entry in self._in_force.values()})

    def put(
        self,
        *,
        reason: Reason,
        message: str,
        now: int,
        hardware: Iterable[HardwareId] = (),
        workers: Iterable[str] = (),
        job_id: str = "",
        evidence: bytes = b"",
    ) -> QuarantineEntry:
        """Refuse this hardware and these workers (digests of recipient keys) from now on, and keep ``evidence``.

        In force when this returns or raises; raises ``STORAGE`` when it could not be written, so that a restart would
        lift it: the caller refuses then all the same."""
        subjects = tuple(dict.fromkeys([*map(worker_subject, workers), *map(str, hardware)]))
        digest = hashlib.sha256(evidence).hexdigest() if evidence else ""
        entry = QuarantineEntry(0, subjects, str(reason), message[:_MAX_TEXT], job_id, digest, now, None, None)
        self._in_force |= dict.fromkeys(subjects, entry)
        with self._keystore.transaction():
            if evidence:
                self._keystore.change("INSERT OR IGNORE INTO quarantine_evidence VALUES (?, ?)", digest, evidence)
            self._keystore.change(
                "INSERT INTO quarantine (subjects, reason, message, job_id, evidence_sha256, raised_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                json.dumps(subjects),
                entry.reason,
                entry.message,
                job_id,
                digest,
                now,
            )
        self._read()
        entry = self.entries()[-1]
        self._on_entry(entry)
        return entry

    def evidence(self, number: int) -> bytes:
        """The evidence document that an entry was made for. Raises ``NOT_FOUND``."""
        rows = self._keystore.select(
            "SELECT document FROM quarantine_evidence JOIN quarantine ON sha256 = evidence_sha256 WHERE number = ?",
            number,
        )
        if not rows:
            raise StateError(Reason.NOT_FOUND, "there is no such quarantine entry with evidence", actual=number)
        document = rows[0][0]
        assert isinstance(document, bytes)  # noqa: S101 - the column's type, in a STRICT table
        return document

    def lift(self, number: int, why: str, now: int) -> None:
        """End an entry. Raises ``MALFORMED`` without a reason, ``NOT_FOUND`` for one that there is not in force."""
        if not 1 <= len(why.strip()) <= _MAX_TEXT or not why.isprintable():
            raise MalformedError(
                Reason.MALFORMED,
                "lifting a quarantine needs a reason",
                expected=f"1…{_MAX_TEXT} printable characters",
                actual=f"{len(why)} characters",
            )
        with self._keystore.transaction():
            changed = self._keystore.change(
                "UPDATE quarantine SET lifted_at = ?, why = ? WHERE number = ? AND lifted_at IS NULL", now, why, number
            )
        if not changed:
            raise StateError(Reason.NOT_FOUND, "there is no such quarantine entry in force", actual=number)
        self._read()

    def require_worker(self, recipient_sha256: str) -> None:
        """Raises :class:`RefusedError` (``QUARANTINED``) for a worker key in quarantine."""
        self._require([worker_subject(recipient_sha256)])

    def require_hardware(self, hardware: Iterable[HardwareId]) -> None:
        """Raises :class:`RefusedError` (``QUARANTINED``) where one of these is in quarantine."""
        self._require(map(str, hardware))

    def _require(self, subjects: Iterable[str]) -> None:
        for subject in subjects:
            entry = self._in_force.get(subject)
            if entry is not None:
                raise RefusedError(
                    Reason.QUARANTINED,
                    "this custodian has put the worker in quarantine",
                    expected="a worker whose attestation never failed here, or a quarantine that was lifted",
                    actual=f"{subject[:80]}: {entry.reason}, at {entry.raised_at}",
                    next_step="Have this custodian's operator look at the evidence and lift the quarantine:"
                    " `keyquorum-custodian quarantine list`.",
                )

    def _read(self) -> None:
        self._in_force = {
            subject: entry for entry in self.entries() if entry.lifted_at is None for subject in entry.subjects
        }
