"""Drives *repair* and *replace*: propose, give, restore (DESIGN §9).

Whoever of the co-holders can be reached gives; what matters is that every seed has a giver. Nothing changes anywhere
before the last step, so that a stop loses nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Mapping

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from keyquorum_coordinator.certificates import fetch_certificate, older_rosters
from keyquorum_coordinator.database import CeremonyReceiptRow, KeyRow, StaleRow
from keyquorum_coordinator.driving import Driver, Progress, blaming, parse, stopped
from keyquorum_core.ceremony_states import Step, phase
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.parts import co_holders
from keyquorum_core.rebuilding import (
    GIFT_TYPE,
    REBUILD_RECEIPT_TYPE,
    Gift,
    RebuildReceipt,
    check_gift,
    check_rebuilt,
)
from keyquorum_protos.v1 import custodian_pb2 as pb

__all__ = ["Rebuilding"]


class Rebuilding(Driver):
    """One repair or replacement."""

    async def run(self) -> None:
        plan = self.plan
        certificate = await self._certificate()
        rosters = await self.database.read(lambda session: older_rosters(session, self.roster))
        propose = pb.ProposeRequest(plan=self.envelope, certificate=certificate, rosters=rosters)
        names = [plan.target, *co_holders(plan.quorum, plan.target)]
        asked = await self.ask(
            Step.PROPOSE,
            names,
            lambda link: link.ceremonies.Propose(propose, timeout=phase(plan.kind, Step.PROPOSE).attempt),
            enough=lambda answered: plan.target in answered and self._uncovered(answered) is None,
        )
        if plan.target not in asked.answers or self._refused(asked.errors):
            raise stopped(Step.PROPOSE, asked.errors or {plan.target: _not_in_roster(plan.target)})
        agreed = parse(Step.PROPOSE, pb.ProposeResponse, asked.answers)
        self._check_covered(Step.PROPOSE, agreed, asked.errors)
        await self.enter(Step.GIVE, present=agreed)
        gifts = await self._gifts([name for name in agreed if name != plan.target], agreed[plan.target].statement)
        await self.enter(Step.RESTORE)
        request = pb.RestoreRequest(ceremony_id=plan.ceremony_id, certificate=certificate, gifts=gifts)
        restored = await self.ask_all(
            Step.RESTORE,
            [plan.target],
            lambda link: link.ceremonies.Restore(request, timeout=phase(plan.kind, Step.RESTORE).attempt),
        )
        receipt = parse(Step.RESTORE, pb.RestoreResponse, restored)[plan.target].receipt
        await self._finish(certificate, receipt)

    @staticmethod
    def _refused(errors: Mapping[str, KeyquorumError]) -> bool:
        """Whether somebody said no; those out of reach, or stale themselves, may be missing."""
        return any(
            not isinstance(error, UnavailableError) and "stale" not in error.details for error in errors.values()
        )

    def _check_covered(self, step: Step, givers: Mapping[str, object], errors: Mapping[str, KeyquorumError]) -> None:
        """Every seed of the target has a giver."""
        index = self._uncovered(givers)
        if index is not None:
            holders = [name for name in self.plan.quorum.holders(index) if name != self.plan.target]
            missing = {name: errors[name] for name in holders if name in errors}
            raise stopped(step, missing or {",".join(holders): _nobody_holds(index, self.plan.target)})

    def _uncovered(self, givers: Collection[str]) -> int | None:
        """The first of the target's seeds that none of the givers holds."""
        quorum, target = self.plan.quorum, self.plan.target
        covered = {index for name in givers if name != target for index in quorum.indices_of(name)}
        return next((index for index in quorum.indices_of(target) if index not in covered), None)

    async def _gifts(self, givers: list[str], request: bytes) -> list[pb.Gift]:
        plan = self.plan
        give = pb.GiveRequest(ceremony_id=plan.ceremony_id, request=request)
        asked = await self.ask(
            Step.GIVE,
            givers,
            lambda link: link.ceremonies.Give(give, timeout=phase(plan.kind, Step.GIVE).attempt),
            enough=lambda answered: self._uncovered(answered) is None,
        )
        if self._refused(asked.errors):
            raise stopped(Step.GIVE, asked.errors)
        given = parse(Step.GIVE, pb.GiveResponse, asked.answers)
        self._check_covered(Step.GIVE, given, asked.errors)
        gifts = []
        for name, response in sorted(given.items()):
            with blaming(Step.GIVE, name):
                gift = Gift.parse(self.signed(response.statement, GIFT_TYPE, name, "gift"))
                await asyncio.to_thread(check_gift, plan, gift, name, response.sealed)
            gifts.append(pb.Gift(**{"from": name}, statement=response.statement, sealed=response.sealed))
        return gifts

    async def _certificate(self) -> bytes:
        """The certificate that the plan goes by: this coordinator's own, or a custodian's."""
        plan = self.plan
        row = await self.database.read(
            lambda session: session.scalars(
                select(KeyRow.certificate).where(KeyRow.key_id == plan.key_id, KeyRow.epoch == plan.epoch)
            ).first()
        )
        return row or await fetch_certificate(self.links, plan.key_id, plan.epoch, plan.certificate)

    async def _finish(self, certificate: bytes, envelope: bytes) -> None:
        plan = self.plan
        with blaming(Step.RESTORE, plan.target):
            payload = self.signed(envelope, REBUILD_RECEIPT_TYPE, plan.target, "receipt")
            receipt = RebuildReceipt.parse(payload)
            check_rebuilt(plan, receipt)
        wrong = ", ".join(f"{name} ({count} seeds)" for name, count in sorted(receipt.wrong.items()))

        def work(session: Session) -> None:
            row = self.move(session, Step.DONE)
            row.error = None
            row.certificate = certificate
            self.enter_leaf(session, hashlib.sha256(payload).hexdigest())
            session.merge(CeremonyReceiptRow(ceremony_id=plan.ceremony_id, custodian=plan.target, receipt=envelope))
            session.execute(
                delete(StaleRow).where(
                    StaleRow.key_id == plan.key_id, StaleRow.epoch == plan.epoch, StaleRow.custodian == plan.target
                )
            )

        await self.end(work)
        note = f"gave wrong seeds: {wrong}" if wrong else ""
        self.tell(Progress(plan.ceremony_id, Step.DONE, plan.target, 1, 1, certificate, note=note))


def _not_in_roster(name: str) -> KeyquorumError:
    return RefusedError(Reason.UNKNOWN_CUSTODIAN, "it is not in the roster", actual=name)


def _nobody_holds(index: int, target: str) -> KeyquorumError:
    return UnavailableError(
        Reason.NO_QUORUM, f"nobody at hand holds seed {index} of {target}", next_step="Bring a co-holder back"
    )
