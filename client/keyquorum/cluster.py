"""How the cluster is: which custodians serve, and how much more each key survives. For people and alarms, never for a
decision.

What is verified here: the pinned roster, and each epoch's certificate with its committee and quorum rule, from which
the losses that it survives are worked out. What is the coordinator's word alone: who can be reached, what custodians
said of themselves (they don't sign it), epochs' states, ceremonies under way, drills.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from keyquorum.ceremonies import CeremonyRecord, ceremony_record
from keyquorum.findings import Finding, find
from keyquorum.health import CustodianHealth, Drill, KeyHealth, LedgerHealth, RosterHealth, custodian_health
from keyquorum.keys import KeyRecord, list_epochs
from keyquorum.profile import Profile
from keyquorum.session import Connection
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError
from keyquorum_core.survival import survival
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["Certificates", "ClusterStatus", "cluster_status"]

_MAX_EPOCHS = 10_000
_SETTLING = 30  # seconds for a ceremony to end, and for clocks to differ

Certificates = MutableMapping[str, KeyRecord]
"""Verified certificates by digest: they never change, and are fetched once."""


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The cluster at one moment. Jurisdictions, committees and rules are the roster's and the certificates'.

    ``roster_pinned``: the coordinator serves the very roster that the profile pins. ``quorum_reachable``: the
    custodians that serve would suffice for a new key. ``coordinator_skew_ms``: its clock against the caller's.
    """

    now: int
    version: str
    coordinator_skew_ms: int
    roster_pinned: bool
    quorum_reachable: bool
    roster: RosterHealth
    custodians: tuple[CustodianHealth, ...]
    keys: tuple[KeyHealth, ...]
    """Every epoch that was not destroyed, by key id, newest first."""
    ceremonies: tuple[CeremonyRecord, ...]
    """Those under way; latest first."""
    ledger: LedgerHealth
    drills: tuple[Drill, ...]
    findings: tuple[Finding, ...]
    """What somebody should look at, the worst first."""

    @property
    def healthy(self) -> bool:
        """Whether every key has a quorum."""
        return not any(each.critical for each in self.findings)

    @property
    def jurisdictions(self) -> Mapping[str, tuple[CustodianHealth, ...]]:
        """Custodians by jurisdiction."""
        out: dict[str, list[CustodianHealth]] = {}
        for each in self.custodians:
            out.setdefault(each.jurisdiction, []).append(each)
        return {name: tuple(out[name]) for name in sorted(out)}

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return {
            "now": self.now,
            "healthy": self.healthy,
            "findings": [each.as_dict() for each in self.findings],
            "coordinator": {
                "version": self.version,
                "clock_skew_ms": self.coordinator_skew_ms,
                "roster_pinned": self.roster_pinned,
            },
            "roster": self.roster.as_dict(),
            "quorum_reachable": self.quorum_reachable,
            "jurisdictions": [
                {
                    "jurisdiction": name,
                    "custodians": [each.custodian for each in members],
                    "serving": [each.custodian for each in members if each.serving],
                }
                for name, members in self.jurisdictions.items()
            ],
            "custodians": [each.as_dict() for each in self.custodians],
            "keys": [each.as_dict() for each in self.keys],
            "ceremonies": [each.as_dict() for each in self.ceremonies],
            "ledger": self.ledger.as_dict(),
            "drills": [each.as_dict() for each in self.drills],
        }


async def cluster_status(
    connection: Connection,
    profile: Profile,
    *,
    now: int,
    certificates: Certificates,
    max_skew: float,
    patient: bool = True,
) -> ClusterStatus:
    """Custodians that the roster doesn't have are left out; those that the coordinator leaves out are unreachable.

    ``certificates`` holds what was verified before, and is added to. ``max_skew``: seconds that a clock may be off
    without being told of. ``patient``: wait for a coordinator that is being restarted.
    """
    message = await connection.unary(connection.cluster.Status, pb.ClusterStatusRequest(), patient=patient)
    said = {each.health.custodian: each for each in message.custodians}
    custodians = tuple(custodian_health(entry, said.get(entry.id), message.now) for entry in profile.roster.custodians)
    keys = await _keys(connection, profile, message, custodians, certificates, patient=patient)
    roster = RosterHealth(profile.roster.version, profile.roster.digest, profile.roster.expires_at)
    witnessed_at = max((each.ledger_witnessed_at for each in custodians), default=0)
    ledger = LedgerHealth(message.ledger.size, message.ledger.signed_at, message.ledger.witnessed_size, witnessed_at)
    ceremonies = tuple(ceremony_record(each) for each in message.ceremonies[:_MAX_EPOCHS])
    drills = tuple(
        Drill(each.kind[:32], each.last_passed, each.last_run, each.next_run) for each in message.drills[:64]
    )
    pinned = hmac.compare_digest(message.roster, profile.roster_envelope)
    skew = 1000 * (message.now - now)
    return ClusterStatus(
        now=now,
        version=message.version[:64],
        coordinator_skew_ms=skew,
        roster_pinned=pinned,
        quorum_reachable=profile.quorum.is_qualified([each.custodian for each in custodians if each.serving]),
        roster=roster,
        custodians=custodians,
        keys=keys,
        ceremonies=ceremonies,
        ledger=ledger,
        drills=drills,
        findings=find(
            now=now,
            roster=roster,
            roster_pinned=pinned,
            coordinator_skew_ms=skew,
            custodians=custodians,
            keys=keys,
            ceremonies=ceremonies,
            ledger=ledger,
            drills=drills,
            max_skew=max_skew,
        ),
    )


async def _keys(
    connection: Connection,
    profile: Profile,
    message: pb.ClusterStatusResponse,
    custodians: tuple[CustodianHealth, ...],
    certificates: Certificates,
    *,
    patient: bool,
) -> tuple[KeyHealth, ...]:
    epochs = message.epochs[:_MAX_EPOCHS]
    wanted = {each.key_id for each in epochs if each.certificate_digest not in certificates}
    problems: dict[str, KeyquorumError] = {}
    for key_id in sorted(wanted):
        try:
            for record in await list_epochs(connection, profile, key_id, patient=patient):
                certificates[record.certificate_sha256] = record
        except (
            MalformedError,
            RefusedError,
            StateError,
        ) as error:  # its certificate doesn't verify: the other keys are still worth seeing
            problems[key_id] = error
    return tuple(
        _key_health(each, certificates.get(each.certificate_digest), problems.get(each.key_id), custodians)
        for each in epochs
    )


def _key_health(
    said: pb.EpochStatus,
    record: KeyRecord | None,
    problem: KeyquorumError | None,
    custodians: tuple[CustodianHealth, ...],
) -> KeyHealth:
    if record is None or (record.key_id, record.epoch) != (said.key_id, said.epoch):
        problem = problem or RefusedError(
            Reason.CEREMONY, "the coordinator shows no certificate of this epoch", expected=said.certificate_digest[:64]
        )
        return KeyHealth.unverified(said, problem)
    health = {each.custodian: each for each in custodians}
    lacking: dict[str, str] = {}
    for name in record.quorum.ids:
        why = _why_not(health.get(name), record, name in said.stale)
        if why:
            lacking[name] = why
    serving = [name for name in record.quorum.ids if name not in lacking]
    return KeyHealth(
        key_id=record.key_id,
        epoch=record.epoch,
        state=said.state[:32],
        created_at=record.created_at,
        retired_at=said.retired_at,
        record=record,
        survival=survival(record.quorum, serving),
        lacking=lacking,
        problem=None,
    )


def _why_not(custodian: CustodianHealth | None, record: KeyRecord, known_stale: bool) -> str:
    """Why a custodian of the epoch's committee doesn't serve it; empty when it does."""
    if custodian is None:
        return "not in the roster any more"
    if not custodian.serving:
        return custodian.why
    holds = custodian.holds.get((record.key_id, record.epoch))
    missed = known_stale or custodian.custodian in record.absent
    if holds is None and not missed and custodian.described_at < record.created_at + _SETTLING:
        return "not heard from since this epoch was made"
    if holds is None:
        return "stale: it has no seeds of this epoch" + (", and is to be repaired" if known_stale else "")
    if holds != record.certificate_sha256:
        return "it names another certificate of this epoch"
    return ""
