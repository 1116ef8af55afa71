"""What the operators decide once for a key, signed in the plan of its ceremonies and certified with every epoch.

Leases, rotation and retention go by it: a custodian needs no operator's word, and trusts no coordinator's, to know how
long a worker may hold a key, when the next rotation is due and when a retired epoch may go. Exact members:
docs/spec/ceremony.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.names import within
from keyquorum_core.quorum import MAX_CUSTODIANS
from keyquorum_core.strictjson import Fields

__all__ = ["MAX_LEASE", "MIN_LEASE", "KeyPolicy"]

_HOUR: Final = 3600
_DAY: Final = 24 * _HOUR
_TEN_YEARS: Final = 3653 * _DAY

MIN_LEASE: Final = 5
MAX_LEASE: Final = 7 * _DAY
_MIN_ROTATION: Final = 60


@dataclass(frozen=True, slots=True)
class KeyPolicy:
    """Durations in seconds. Raises :class:`MalformedError` for one out of its bounds."""

    lease_seconds: int = _HOUR
    """How long a worker may hold a released key before it must have renewed its lease: 5 s … 7 days."""
    reattest_seconds: int = _HOUR // 2
    """How old the evidence may be that a lease is renewed on: 1 s … ``lease_seconds``."""
    rotate_after_seconds: int = 0
    """The age of an epoch from which a rotation may begin without an operator: 0 (never), or 60 s … 10 years."""
    retain_seconds: int = 30 * _DAY
    """How long a retired epoch is kept for what runs on it before it may be destroyed: 0 … 10 years."""
    absent_at_most: int = 1
    """How many custodians may be missing from a rotation, to be repaired later; those present are always a quorum."""
    canary: bool = False
    """Whether the key is for drills only: faults can be injected for it, and for no other."""

    def __post_init__(self) -> None:
        within(self.lease_seconds, "lease_seconds in the key policy", MIN_LEASE, MAX_LEASE)
        within(self.reattest_seconds, "reattest_seconds in the key policy", 1, self.lease_seconds)
        within(self.rotate_after_seconds, "rotate_after_seconds in the key policy", 0, _TEN_YEARS)
        within(self.retain_seconds, "retain_seconds in the key policy", 0, _TEN_YEARS)
        within(self.absent_at_most, "absent_at_most in the key policy", 0, MAX_CUSTODIANS)
        if 0 < self.rotate_after_seconds < _MIN_ROTATION:
            raise MalformedError(
                Reason.MALFORMED,
                "a key cannot rotate that often",
                expected=f"0 for never, or at least {_MIN_ROTATION} seconds",
                actual=self.rotate_after_seconds,
            )

    def as_dict(self) -> dict[str, int | bool]:
        """The member ``policy`` of a ceremony plan, as JSON values."""
        return asdict(self)

    @classmethod
    def read(cls, fields: Fields) -> KeyPolicy:
        """From an object's members, all of which are there. Raises :class:`MalformedError`."""
        policy = cls(
            lease_seconds=fields.integer("lease_seconds"),
            reattest_seconds=fields.integer("reattest_seconds"),
            rotate_after_seconds=fields.integer("rotate_after_seconds"),
            retain_seconds=fields.integer("retain_seconds"),
            absent_at_most=fields.integer("absent_at_most"),
            canary=fields.boolean("canary"),
        )
        fields.done()
        return policy
