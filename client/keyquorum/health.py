"""The parts of a cluster's status: a custodian's health, a key's, the roster's, the ledger's, drills."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from keyquorum.keys import KeyRecord
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.roster import RosterCustodian
from keyquorum_core.survival import Survival
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["CustodianHealth", "Drill", "KeyHealth", "LedgerHealth", "RosterHealth", "custodian_health"]

_FRESH_SECONDS = 25  # the coordinator asks each custodian every 10 s


@dataclass(frozen=True, slots=True)
class CustodianHealth:
    """One custodian as the coordinator sees it, and what it said of itself. Latencies in milliseconds, 0 before the
    first release; times in unix seconds, 0 for never; ``clock_skew_ms`` against the coordinator's clock."""

    custodian: str
    jurisdiction: str
    reachable: bool
    circuit: str
    latency_ms: float
    latency_p95_ms: float
    last_error: str
    clock_skew_ms: int
    why: str = ""
    """Why it serves nothing; empty while it serves."""
    described_at: int = 0
    version: str = ""
    sealed: bool = False
    scheme: str = ""
    """What opens its keystore."""
    restored: bool = False
    """From a backup; it serves nothing before it has proved itself against its peers."""
    roster_version: int = 0
    roster_digest: str = ""
    ledger_size: int = 0
    ledger_witnessed_at: int = 0
    ledger_alarms: int = 0
    revocations_version: int = 0
    trusts_development_hardware: bool = False
    holds: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """Certificate digests of the epochs that it has seeds of, by key and epoch."""

    @property
    def serving(self) -> bool:
        """Whether it would answer now, for keys that it holds."""
        return not self.why

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        out = asdict(self)
        out["holds"] = [{"key_id": key_id, "epoch": epoch} for key_id, epoch in sorted(self.holds)]
        out["serving"] = self.serving
        return out


def custodian_health(entry: RosterCustodian, said: pb.CustodianStatus | None, now: int) -> CustodianHealth:
    """What is known of a custodian of the roster. ``now`` is the coordinator's clock."""
    if said is None:
        said = pb.CustodianStatus(health=pb.CustodianHealth(last_error="not mentioned by the coordinator"))
    health, described = said.health, said.described
    return CustodianHealth(
        custodian=entry.id,
        jurisdiction=entry.jurisdiction,
        reachable=health.reachable,
        circuit=health.circuit[:16] or "unknown",
        latency_ms=health.latency_ms,
        latency_p95_ms=health.latency_p95_ms,
        last_error=health.last_error[:512],
        clock_skew_ms=health.clock_skew_ms,
        why=_why(said, now),
        described_at=said.described_at,
        version=described.version[:64],
        sealed=described.sealed,
        scheme=described.scheme[:32],
        restored=described.restored,
        roster_version=described.roster_version,
        roster_digest=described.roster_digest[:64],
        ledger_size=described.ledger_size,
        ledger_witnessed_at=described.ledger_witnessed_at,
        ledger_alarms=described.ledger_alarms,
        revocations_version=described.revocations_version,
        trusts_development_hardware=described.trusts_development_hardware,
        holds={
            (each.key_id[:64], each.epoch): each.certificate_digest[:64]
            for each in described.keys[:4096]
            if each.state in ("active", "retired")
        },
    )


def _why(said: pb.CustodianStatus, now: int) -> str:
    fresh = said.HasField("described") and now - said.described_at <= _FRESH_SECONDS
    if said.described.sealed and fresh:
        return "sealed"
    if not said.health.reachable:
        return "unreachable"
    if said.health.circuit == "open":
        return "left alone after repeated failures"
    if not fresh:
        return f"silent for {now - said.described_at} s" if said.described_at else "not asked yet"
    if said.described.ledger_alarms:
        return "stopped by a ledger alarm"
    if said.described.restored:
        return "restored, and not proved yet"
    return ""


@dataclass(frozen=True, slots=True)
class KeyHealth:
    """One epoch of a key. ``survival`` is worked out from its verified certificate, ``state`` and ``retired_at`` are
    the coordinator's word. ``lacking``: by custodian of its committee that doesn't serve it, why."""

    key_id: str
    epoch: int
    state: str
    created_at: int
    retired_at: int
    record: KeyRecord | None
    """None where the certificate does not verify."""
    survival: Survival | None
    lacking: Mapping[str, str]
    problem: KeyquorumError | None

    @classmethod
    def unverified(cls, said: pb.EpochStatus, problem: KeyquorumError) -> KeyHealth:
        """An epoch of which nothing can be said."""
        return cls(said.key_id[:64], said.epoch, said.state[:32], 0, said.retired_at, None, None, {}, problem)

    @property
    def active(self) -> bool:
        """Whether new jobs run on it."""
        return self.state == "active"

    @property
    def canary(self) -> bool:
        """Whether the key is for drills only, which take its quorum away on purpose."""
        return self.record is not None and self.record.policy.canary

    @property
    def stale(self) -> tuple[str, ...]:
        """Custodians that serve, and lack this epoch."""
        return tuple(name for name, why in self.lacking.items() if why.startswith("stale"))

    @property
    def rotates_at(self) -> int:
        """When its policy has it rotated; 0 for never."""
        after = self.record.policy.rotate_after_seconds if self.record is not None and self.active else 0
        return self.created_at + after if after else 0

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return {
            "key_id": self.key_id,
            "epoch": self.epoch,
            "state": self.state,
            "created_at": self.created_at,
            "retired_at": self.retired_at,
            "rotates_at": self.rotates_at,
            "canary": self.canary,
            "rule": self.record.quorum.rule if self.record is not None else None,
            "committee": list(self.record.quorum.ids) if self.record is not None else [],
            "certificate_sha256": self.record.certificate_sha256 if self.record is not None else "",
            "survival": self.survival.as_dict() if self.survival is not None else None,
            "lacking": dict(self.lacking),
            "stale": list(self.stale),
            "problem": self.problem.as_dict() if self.problem is not None else None,
        }


@dataclass(frozen=True, slots=True)
class RosterHealth:
    """The pinned roster; ``expires_at`` in unix seconds."""

    version: int
    digest: str
    expires_at: int

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LedgerHealth:
    """Leaves in the newest checkpoint, and in the newest that a quorum cosigned; ``witnessed_at``: when custodians say
    that a quorum had cosigned last. Unix seconds, 0 for never."""

    size: int
    signed_at: int
    witnessed_size: int
    witnessed_at: int

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Drill:
    """A kind of drill, and when; unix seconds, 0 for never."""

    kind: str
    last_passed: int
    last_run: int
    next_run: int

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return asdict(self)
