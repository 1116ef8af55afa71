"""What waits for this custodian's own operator, and what the operator has decided once and for all.

A request is kept with the digest of exactly what is asked and with what would change, line by line; approving names
that digest, so that nobody approves what they did not see. Requests survive a restart; a decision is final. Ceremonies
use this, and whatever else has to wait for a person.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Final

from keyquorum_core.ceremony_plan import CeremonyPlan, OrderedBy
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.errors import Reason, RefusedError, StateError
from keyquorum_custodian.config import AUTOMATIC
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.seed_records import ApprovalRow

__all__ = ["APPROVED", "AUTOMATIC", "REJECTED", "Approvals", "category"]

APPROVED: Final = "approved"
REJECTED: Final = "rejected"


def category(plan: CeremonyPlan) -> str:
    """What a plan is to this custodian's operator.

    ``generate``: a key's first epoch. ``rotate``, ``repair``: the routine. ``retire``: a retired epoch goes when the
    key's policy has it go. ``renew``: an epoch for another committee or rule. ``replace``: another custodian in one's
    place. ``destroy``: any other destruction.
    """
    if plan.kind is Kind.GENERATE and plan.epoch > 1:
        return "renew"
    if plan.kind is Kind.DESTROY and plan.ordered_by is OrderedBy.POLICY:
        return "retire"
    return str(plan.kind)


class Approvals:
    """``automatic``: categories that need no asking. ``clock`` gives unix seconds."""

    def __init__(self, keystore: Keystore, automatic: Collection[str], clock: Callable[[], float]) -> None:
        self._keystore = keystore
        self._automatic = frozenset(automatic)
        self._clock = clock

    def automatic(self, kind: str) -> bool:
        """Whether the operator has approved all of this kind beforehand."""
        return kind in self._automatic and kind in AUTOMATIC

    def ask(self, request_id: str, kind: str, subject: str, asked_by: str, difference: Iterable[str]) -> None:
        """Inside a transaction: put it before the operator."""
        row = ApprovalRow(request_id, kind, subject, asked_by, tuple(difference), int(self._clock()))
        self._keystore.ask_approval(row)

    def require(self, request_id: str, subject: str) -> None:
        """Raise :class:`StateError` (``APPROVAL``) until it is approved; :class:`RefusedError` once it is rejected."""
        row = self._keystore.approval(request_id)
        if row is not None and row.subject != subject:
            raise RefusedError(
                Reason.APPROVAL, "what was put before the operator is not this", expected=row.subject, actual=subject
            )
        if row is not None and row.decision == APPROVED:
            return
        if row is not None and row.decision == REJECTED:
            raise RefusedError(
                Reason.APPROVAL,
                "this custodian's operator rejected it",
                expected=APPROVED,
                actual=REJECTED,
                details={"request": request_id},
            )
        raise StateError(
            Reason.APPROVAL,
            "it waits for this custodian's operator",
            expected=APPROVED,
            actual="pending",
            next_step=f"Have the custodian's operator run: keyquorum-custodian approve {request_id}",
            details={"request": request_id},
        )

    def pending(self) -> tuple[ApprovalRow, ...]:
        """What waits, oldest first."""
        return tuple(row for row in self._keystore.approvals() if not row.decision)

    def decide(self, request_id: str, subject: str, *, approve: bool) -> ApprovalRow:
        """The operator's decision about exactly what ``subject`` is the digest of. Deciding the same again is fine.

        Raises ``NOT_FOUND``, ``APPROVAL`` (another subject, or decided otherwise before), ``STORAGE``.
        """
        row = self._keystore.approval(request_id)
        if row is None:
            raise StateError(
                Reason.NOT_FOUND, "no such request", expected="a pending one", actual=ascii(request_id[:64])
            )
        if row.subject != subject:
            raise RefusedError(
                Reason.APPROVAL,
                "the request is not what the operator looked at",
                expected=row.subject,
                actual=ascii(subject[:64]),
                next_step="List the pending requests again.",
            )
        decision = APPROVED if approve else REJECTED
        if row.decision and row.decision != decision:
            raise StateError(Reason.APPROVAL, f"it was {row.decision} before", expected="pending", actual=row.decision)
        if not row.decision:
            with self._keystore.transaction():
                self._keystore.decide_approval(request_id, decision, int(self._clock()))
        return row

    def withdraw(self, request_id: str) -> None:
        """Inside a transaction: what was asked is no longer wanted."""
        row = self._keystore.approval(request_id)
        if row is not None and not row.decision:
            self._keystore.decide_approval(request_id, REJECTED, int(self._clock()))
