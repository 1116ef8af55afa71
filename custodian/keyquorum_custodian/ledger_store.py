"""What a custodian keeps of the ledger, in its keystore: the newest checkpoint accepted, and alarms, which stay.

Each change is one transaction and on the disk when the call returns. Nothing here is secret; what a checkpoint is worth
its signatures say, which :mod:`keyquorum_custodian.witness` verifies again whenever it starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from keyquorum_core.errors import MalformedError, Reason, StateError
from keyquorum_custodian.keystore import Keystore

__all__ = ["Alarm", "LedgerStore", "ScratchLedgerStore", "StoredCheckpoint"]

_ALARM: Final = "number, kind, evidence, known, shown, raised_at, cleared_at, why"
_MAX_WHY: Final = 400


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint as it was accepted; ``note`` is the signed note."""

    size: int
    root: bytes
    note: bytes


@dataclass(frozen=True, slots=True)
class Alarm:
    """Two signed notes that cannot both be: ``known`` from before (empty when nothing was), ``shown`` that raised the
    alarm. ``kind`` is ``fork`` or ``rollback``, ``evidence`` the digest of what contradicts what. Times are unix
    seconds; an open alarm has no ``cleared_at``."""

    number: int
    kind: str
    evidence: bytes
    known: bytes
    shown: bytes
    raised_at: int
    cleared_at: int | None
    why: str | None


class LedgerStore:
    """The ledger's tables in one keystore; used from one thread."""

    def __init__(self, keystore: Keystore) -> None:
        self._keystore = keystore

    def newest(self, log: str) -> StoredCheckpoint | None:
        """The newest checkpoint accepted of ``log``, a digest of its keys."""
        rows = self._keystore.select("SELECT size, root, note FROM ledgers WHERE log = ?", log)
        return StoredCheckpoint(*rows[0]) if rows else None  # type: ignore[arg-type]

    def accept(self, log: str, checkpoint: StoredCheckpoint, now: int) -> None:
        """The newest one from now on. Raises ``STORAGE``; then the one before still is."""
        with self._keystore.transaction():
            self._keystore.change(
                "INSERT OR REPLACE INTO ledgers VALUES (?, ?, ?, ?, ?)",
                log,
                checkpoint.size,
                checkpoint.root,
                checkpoint.note,
                now,
            )

    def alarms(self) -> tuple[Alarm, ...]:
        """All of them, cleared ones too, oldest first."""
        rows = self._keystore.select(f"SELECT {_ALARM} FROM ledger_alarms ORDER BY number")  # noqa: S608
        return tuple(Alarm(*row) for row in rows)  # type: ignore[arg-type]

    def raise_alarm(self, kind: str, evidence: bytes, known: bytes, shown: bytes, now: int) -> bool:
        """Keep an alarm; ``evidence`` is its digest. False: the same one was raised before, perhaps cleared since."""
        with self._keystore.transaction():
            return bool(
                self._keystore.change(
                    "INSERT OR IGNORE INTO ledger_alarms (kind, evidence, known, shown, raised_at)"
                    " VALUES (?, ?, ?, ?, ?)",
                    kind,
                    evidence,
                    known,
                    shown,
                    now,
                )
            )

    def clear_alarm(self, number: int, why: str, now: int) -> None:
        """Record that an operator cleared an alarm. Raises ``MALFORMED`` without a reason, ``NOT_FOUND`` for an alarm
        that there is not or that was cleared before."""
        if not 1 <= len(why.strip()) <= _MAX_WHY or not why.isprintable():
            raise MalformedError(
                Reason.MALFORMED,
                "clearing an alarm needs a reason",
                expected=f"1…{_MAX_WHY} printable characters",
                actual=f"{len(why)} characters",
            )
        with self._keystore.transaction():
            changed = self._keystore.change(
                "UPDATE ledger_alarms SET cleared_at = ?, why = ? WHERE number = ? AND cleared_at IS NULL",
                now,
                why,
                number,
            )
        if not changed:
            raise StateError(Reason.NOT_FOUND, "there is no such open ledger alarm", actual=number)


class ScratchLedgerStore(LedgerStore):
    """The same, of a log that a drill made, in memory and gone with it."""

    def __init__(self) -> None:
        self._newest: StoredCheckpoint | None = None
        self._raised: list[Alarm] = []

    def newest(self, log: str) -> StoredCheckpoint | None:
        return self._newest

    def accept(self, log: str, checkpoint: StoredCheckpoint, now: int) -> None:
        self._newest = checkpoint

    def alarms(self) -> tuple[Alarm, ...]:
        return tuple(self._raised)

    def raise_alarm(self, kind: str, evidence: bytes, known: bytes, shown: bytes, now: int) -> bool:
        if any(alarm.evidence == evidence for alarm in self._raised):
            return False
        self._raised.append(Alarm(len(self._raised) + 1, kind, evidence, known, shown, now, None, None))
        return True

    def clear_alarm(self, number: int, why: str, now: int) -> None:
        raise StateError(Reason.STATE, "a drill's alarm ends with its fault", actual=number)
