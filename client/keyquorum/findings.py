"""What somebody should look at, out of a cluster's status."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from keyquorum.ceremonies import CeremonyRecord
from keyquorum.health import CustodianHealth, Drill, KeyHealth, LedgerHealth, RosterHealth

__all__ = ["Finding", "find"]

_ROSTER_WARNING = 30 * 86400
_LEDGER_WARNING = 300  # custodians release nothing once a quorum's cosignatures are 600 s old, unless set otherwise


@dataclass(frozen=True, slots=True)
class Finding:
    """``critical``: a key that jobs begin on has no quorum, or nobody can tell. ``about``: what it is of."""

    critical: bool
    about: str
    text: str

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return {"severity": "critical" if self.critical else "warning", "about": self.about, "text": self.text}


def find(
    *,
    now: int,
    roster: RosterHealth,
    roster_pinned: bool,
    coordinator_skew_ms: int,
    custodians: Sequence[CustodianHealth],
    keys: Sequence[KeyHealth],
    ceremonies: Sequence[CeremonyRecord],
    ledger: LedgerHealth,
    drills: Sequence[Drill],
    max_skew: float,
) -> tuple[Finding, ...]:
    """The worst first. ``max_skew`` in seconds."""
    found = [finding for key in keys for finding in _of_key(key)]
    found += [finding for each in custodians for finding in _of_custodian(each, roster, max_skew)]
    if len({each.revocations_version for each in custodians if each.described_at}) > 1:
        newest = max(each.revocations_version for each in custodians)
        behind = [each.custodian for each in custodians if each.described_at and each.revocations_version < newest]
        found.append(Finding(False, "revocations", f"version {newest} has not come to {', '.join(behind)}"))
    if not roster_pinned:
        found.append(Finding(False, "roster", "the coordinator serves another roster than the one pinned here"))
    if roster.expires_at - now < _ROSTER_WARNING:
        found.append(Finding(False, "roster", f"expires in {max(0, roster.expires_at - now) // 86400} days"))
    if abs(coordinator_skew_ms) > 1000 * max(max_skew, 2):  # told in whole seconds
        found.append(
            Finding(False, "coordinator", f"its clock is {coordinator_skew_ms / 1000:+.0f} s off this machine's")
        )
    if ledger.witnessed_at and now - ledger.witnessed_at > _LEDGER_WARNING:
        found.append(
            Finding(False, "ledger", f"no quorum has cosigned for {now - ledger.witnessed_at} s: releases will stop")
        )
    elif not ledger.witnessed_at and ledger.size:
        found.append(Finding(False, "ledger", "no custodian at hand has seen a quorum's cosignatures"))
    found += [finding for each in ceremonies for finding in _of_ceremony(each)]
    found += [
        Finding(False, f"drill {each.kind}", "its last run did not pass")
        for each in drills
        if each.last_run > each.last_passed
    ]
    return tuple(sorted(found, key=lambda each: not each.critical))


def _of_key(key: KeyHealth) -> Iterator[Finding]:
    about = f"{key.key_id} epoch {key.epoch}"
    survival, problem = key.survival, key.problem
    if survival is None:
        said = f"{problem.reason}: {problem.message}" if problem is not None else "its certificate is not at hand"
        yield Finding(key.active, about, said)
    elif not survival.quorum:
        without = ", ".join(f"{name} ({why})" for name, why in key.lacking.items())
        yield Finding(key.active and not key.canary, about, f"no quorum: without {without}")
    elif not survival.losses:
        yield Finding(False, about, f"no loss may follow: it needs each of {', '.join(survival.indispensable)}")
    if survival is not None and survival.quorum and survival.losses and not survival.jurisdiction_losses:
        yield Finding(False, about, f"it needs jurisdiction {', '.join(survival.indispensable_jurisdictions)}")
    if key.stale:
        yield Finding(False, about, f"stale: {', '.join(key.stale)}")


def _of_custodian(custodian: CustodianHealth, roster: RosterHealth, max_skew: float) -> Iterator[Finding]:
    if custodian.why:
        last = f" ({custodian.last_error})" if custodian.last_error and custodian.why != "sealed" else ""
        yield Finding(False, custodian.custodian, custodian.why + last)
    if abs(custodian.clock_skew_ms) > 1000 * max_skew:
        yield Finding(
            False, custodian.custodian, f"its clock is {custodian.clock_skew_ms / 1000:+.1f} s off the coordinator's"
        )
    if custodian.roster_digest and custodian.roster_digest != roster.digest:
        yield Finding(
            False, custodian.custodian, f"has roster version {custodian.roster_version}, not {roster.version}"
        )


def _of_ceremony(ceremony: CeremonyRecord) -> Iterator[Finding]:
    about = f"{ceremony.kind} of {ceremony.key_id} epoch {ceremony.epoch}"
    if ceremony.waiting:
        yield Finding(False, about, f"waits for the operators of {', '.join(ceremony.waiting)}")
    elif ceremony.error is not None:
        yield Finding(False, about, f"stopped at {ceremony.step}: {ceremony.error.message}")
