"""What a ceremony would change at this custodian, in words for the person who approves it."""

from __future__ import annotations

from datetime import UTC, datetime

from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.roster import RosterCustodian
from keyquorum_custodian.ceremony_seat import CeremonySeat

__all__ = ["asked_by", "difference"]


def asked_by(signers: tuple[str, ...]) -> str:
    """Who ordered it."""
    return f"operators {', '.join(signers)}" if signers else "the key's own policy"


def difference(seat: CeremonySeat, plan: CeremonyPlan) -> list[str]:
    """Line by line: what is there, what would be, and what cannot be undone."""
    key = f"key {plan.key_id}"
    lines = [f"{plan.kind}: {key} epoch {plan.epoch}, ordered {_when(plan.created_at)}"]
    lines.append(f"roster: version {seat.roster.version}, {plan.roster_digest}")
    if plan.kind is Kind.DESTROY:
        return lines + _destroyed(seat, plan)
    if plan.kind is Kind.REPLACE:
        return lines + _replaced(seat, plan)
    if plan.kind is Kind.REPAIR:
        return [*lines, f"custodian {plan.target} gets its seeds of this epoch back from those who hold them"]
    newest = seat.keystore.newest_epoch(plan.key_id)
    if newest is None:
        return [*lines, f"+ {key}: a new key, {plan.quorum.words()}", f"+ policy: {_policy(plan)}"]
    before = seat.certificates.open_now(newest.certificate).plan
    lines.append(f"- {key} epoch {before.epoch}: {newest.state} becomes retired")
    lines.append(f"+ {key} epoch {plan.epoch}: active, the one that new jobs use")
    for what, old, new in (
        ("quorum", before.quorum.words(), plan.quorum.words()),
        ("committee", _committee(before), _committee(plan)),
        ("suite", before.suite, plan.suite),
        ("policy", _policy(before), _policy(plan)),
    ):
        if old != new:
            lines += [f"- {what}: {old}", f"+ {what}: {new}"]
    return lines


def _destroyed(seat: CeremonySeat, plan: CeremonyPlan) -> list[str]:
    row = seat.keystore.epoch(plan.key_id, plan.epoch)
    count = len(plan.quorum.indices_of(seat.me)) if row is not None and seat.me in plan.quorum.ids else 0
    state = row.state if row is not None else "not held here"
    return [
        f"- key {plan.key_id} epoch {plan.epoch}: {state}, certificate {plan.certificate}",
        f"- {count} seeds at this custodian, and all of them at every other",
        "! what was encrypted under this epoch and is not open anywhere can never be read again",
    ]


def _replaced(seat: CeremonySeat, plan: CeremonyPlan) -> list[str]:
    row = seat.keystore.epoch(plan.key_id, plan.epoch)
    lines = []
    if row is not None:
        then = seat.certificates.certified(seat.certificates.open_now(row.certificate), plan.target)
        lines = [f"- {_who(then)}"] if then is not None else []
    lines.append(f"+ {_who(seat.roster.custodian(plan.target))}")
    return [*lines, "! the seeds that the first one holds of this epoch are given to the second"]


def _who(custodian: RosterCustodian) -> str:
    return (
        f"custodian {custodian.id} ({custodian.jurisdiction}) at {custodian.address},"
        f" fingerprint {custodian.identity.fingerprint}"
    )


def _committee(plan: CeremonyPlan) -> str:
    return ", ".join(f"{each.id} ({each.jurisdiction})" for each in plan.quorum.committee)


def _policy(plan: CeremonyPlan) -> str:
    return ", ".join(f"{name} {str(value).lower()}" for name, value in sorted(plan.policy.as_dict().items()))


def _when(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
