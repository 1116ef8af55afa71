"""How the cluster is, by the coordinator's word: for people and dashboards, never for a decision."""

from __future__ import annotations

import hmac
from dataclasses import asdict, dataclass

from keyquorum.profile import Profile
from keyquorum.session import Connection
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["ClusterStatus", "CustodianHealth", "cluster_status"]


@dataclass(frozen=True, slots=True)
class CustodianHealth:
    """One custodian as the coordinator sees it. Latencies in milliseconds, 0 before the first release."""

    custodian: str
    jurisdiction: str
    reachable: bool
    circuit: str
    latency_ms: float
    latency_p95_ms: float
    last_error: str
    clock_skew_ms: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """``roster_pinned``: the coordinator serves the very roster that the profile pins. ``quorum_reachable``: the
    custodians it can reach would suffice. Jurisdictions are the roster's."""

    version: str
    roster_pinned: bool
    quorum_reachable: bool
    custodians: tuple[CustodianHealth, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


async def cluster_status(connection: Connection, profile: Profile) -> ClusterStatus:
    """Custodians that the roster doesn't have are left out; those that the coordinator leaves out are unreachable."""
    message = await connection.unary(connection.cluster.Describe, pb.DescribeClusterRequest())
    said = {each.custodian: each for each in message.custodians}
    custodians = []
    for entry in profile.roster.custodians:
        health = said.get(entry.id, pb.CustodianHealth(last_error="not mentioned by the coordinator"))
        custodians.append(
            CustodianHealth(
                entry.id,
                entry.jurisdiction,
                health.reachable,
                health.circuit[:16] or "unknown",
                health.latency_ms,
                health.latency_p95_ms,
                health.last_error[:512],
                health.clock_skew_ms,
            )
        )
    return ClusterStatus(
        version=message.version[:64],
        roster_pinned=hmac.compare_digest(message.roster, profile.roster_envelope),
        quorum_reachable=profile.quorum.is_qualified([each.custodian for each in custodians if each.reachable]),
        custodians=tuple(custodians),
    )
