"""This custodian's own Cedar policies on ceremonies: what they deny it takes no part in, whoever signed or approved it.

Every epoch after a key's first is action ``rotate`` on the epoch before, also one that is made anew; every destruction
is ``destroy``. About whoever comes to hold a key that it did not hold, in another's place or by a new epoch for another
committee, they are asked ``enrol``. A key's first epoch ends none, and repair gives nobody anything new: nothing is
asked about them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from keyquorum_core.ceremony_plan import CeremonyPlan, OrderedBy
from keyquorum_core.ceremony_states import MAKING, Kind
from keyquorum_core.policy.facts import Entity, custodian_entity
from keyquorum_core.roster import RosterCustodian
from keyquorum_custodian.ceremony_seat import CeremonySeat

__all__ = ["CeremonyPolicy", "OwnPolicy"]


class CeremonyPolicy(Protocol):
    """What decides; raises for what is not permitted. See :class:`PolicySeat`."""

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

    def check_enrolment(self, enrolled: Entity, cluster: str, operators: Iterable[str]) -> object: ...


class OwnPolicy:
    """Asked when a ceremony is proposed, and again before the step that binds; from the keystore's thread."""

    def __init__(self, policy: CeremonyPolicy, seat: CeremonySeat) -> None:
        self._policy = policy
        self._seat = seat

    def check(self, plan: CeremonyPlan, signers: Iterable[str]) -> None:
        """Raises as :meth:`PolicySeat.decide`: ``POLICY`` with the policy that denied, or that none permits."""
        operators = tuple(signers)
        for each in self._newcomers(plan):
            self._policy.check_enrolment(custodian_entity(each.id, each.jurisdiction), plan.cluster, operators)
        if plan.kind in MAKING and plan.epoch > 1:
            self._check_end("rotate", plan, plan.epoch - 1, operators)
        elif plan.kind is Kind.DESTROY:
            self._check_end("destroy", plan, plan.epoch, operators)

    def _check_end(self, action: str, plan: CeremonyPlan, epoch: int, operators: tuple[str, ...]) -> None:
        seat = self._seat
        row = seat.keystore.epoch(plan.key_id, epoch)
        # Of an epoch that it lacks it knows no age: to its policies it is of this moment.
        born = seat.certificates.open_now(row.certificate).plan.created_at if row is not None else seat.now()
        self._policy.check_ceremony(
            action,
            plan.key_id,
            epoch,
            max(0, seat.now() - born),
            operators,
            scheduled=plan.ordered_by is OrderedBy.POLICY,
        )

    def _newcomers(self, plan: CeremonyPlan) -> list[RosterCustodian]:
        """Who would hold the key, and did not in the newest epoch before that is known here: under this name, with
        these keys, in this jurisdiction. Where none is known this custodian has nothing of the key to keep from anyone.
        """
        seat = self._seat
        if plan.kind is Kind.REPLACE:
            return [seat.roster.custodian(plan.target)]
        if plan.kind not in MAKING:
            return []
        before = [row for row in seat.keystore.epochs(plan.key_id) if row.epoch < plan.epoch]
        if not before:
            return []
        certificate = seat.certificates.open_now(before[-1].certificate)
        joining = []
        for name in plan.quorum.ids:
            now, then = seat.roster.custodian(name), seat.certificates.certified(certificate, name)
            if then is None or not now.has_keys_of(then) or now.jurisdiction != then.jurisdiction:
                joining.append(now)
        return joining
