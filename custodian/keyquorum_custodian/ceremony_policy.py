"""This custodian's own Cedar policies on ceremonies: what they deny it takes no part in, whoever signed or approved it.

Every epoch after a key's first is action ``rotate`` on the epoch before, also one that is made anew; every destruction
is ``destroy``. A key's first epoch ends none, and repair and replacement change no key: nothing is asked about them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from keyquorum_core.ceremony_plan import CeremonyPlan, OrderedBy
from keyquorum_core.ceremony_states import MAKING, REBUILDING
from keyquorum_custodian.ceremony_seat import CeremonySeat

__all__ = ["CeremonyPolicy", "OwnPolicy"]


class CeremonyPolicy(Protocol):
    """What decides; raises for what is not permitted. See :meth:`PolicySeat.check_ceremony`."""

    def check_ceremony(
        self,
        action: str,
        key_id: str,
        epoch: int,
        age_seconds: int,
        operators: Iterable[str],
        *,
        scheduled: bool = False,
    ) -> object: ...


class OwnPolicy:
    """Asked when a ceremony is proposed, and again before the step that binds; from the keystore's thread."""

    def __init__(self, policy: CeremonyPolicy, seat: CeremonySeat) -> None:
        self._policy = policy
        self._seat = seat

    def check(self, plan: CeremonyPlan, signers: Iterable[str]) -> None:
        """Raises as :meth:`PolicySeat.decide`: ``POLICY`` with the policy that denied, or that none permits."""
        if plan.kind in REBUILDING or (plan.kind in MAKING and plan.epoch == 1):
            return
        action, epoch = ("rotate", plan.epoch - 1) if plan.kind in MAKING else ("destroy", plan.epoch)
        seat = self._seat
        row = seat.keystore.epoch(plan.key_id, epoch)
        # Of an epoch that it lacks it knows no age: to its policies it is of this moment.
        born = seat.certificates.open_now(row.certificate).plan.created_at if row is not None else seat.now()
        self._policy.check_ceremony(
            action,
            plan.key_id,
            epoch,
            max(0, seat.now() - born),
            signers,
            scheduled=plan.ordered_by is OrderedBy.POLICY,
        )
