"""What a monitor of the ledger has to say: one event a line, for people or as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["ALARMS", "Event", "Kind"]


class Kind(StrEnum):
    """Stable, part of the output of ``keyquorum audit watch --json``."""

    VERIFIED = "verified"  # the log grew, or was cosigned anew, and holds
    RELEASE = "release"  # a key that is watched was released
    LOGGED_ALARM = "logged-alarm"  # a custodian or the coordinator put an alarm into the log
    FORK = "fork"  # two signed checkpoints that contradict each other
    ROLLBACK = "rollback"  # a smaller log than before
    NO_QUORUM = "no-quorum"  # the latest checkpoint lacks a quorum's cosignatures
    STALLED = "stalled"  # no quorum has cosigned for longer than allowed
    REFUSED = "refused"  # any other check that said no
    UNREACHABLE = "unreachable"  # the check could not be made


ALARMS = frozenset(Kind) - {Kind.VERIFIED, Kind.UNREACHABLE}


@dataclass(frozen=True, slots=True)
class Event:
    """``time`` is when it was noticed, unix seconds. ``standing``: it lasts until what caused it is gone, and need not
    be said again each round. ``details`` use none of the names that every event has."""

    kind: Kind
    time: int
    message: str
    details: Mapping[str, object] = field(default_factory=dict)
    standing: bool = False

    @property
    def alarm(self) -> bool:
        return self.kind in ALARMS

    def as_dict(self) -> dict[str, object]:
        return {
            "event": str(self.kind),
            "alarm": self.alarm,
            "time": self.time,
            "message": self.message,
            **self.details,
        }
