"""Drives *destroy*: propose, erase (DESIGN §9).

Every custodian of the roster agrees before any is asked to erase; from then on the ceremony only goes forward. A
custodian out of reach keeps it waiting at *erase*: an epoch counts as destroyed when all have signed that it is.
"""

from __future__ import annotations

from sqlalchemy import delete, update
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import CeremonyReceiptRow, KeyRow, StaleRow
from keyquorum_coordinator.driving import Driver, Progress, blaming, parse
from keyquorum_core.ceremony_states import Step, phase
from keyquorum_core.destruction import (
    CONSENT_TYPE,
    DESTRUCTION_RECEIPT_TYPE,
    Consent,
    DestructionReceipt,
    check_consents,
    check_receipts,
)
from keyquorum_core.transcript import H
from keyquorum_protos.v1 import custodian_pb2 as pb

__all__ = ["Destroying"]


class Destroying(Driver):
    """One destruction."""

    async def run(self) -> None:
        plan, everyone = self.plan, sorted(self.links)
        propose = pb.ProposeRequest(plan=self.envelope)
        proposed = await self.ask_all(
            Step.PROPOSE,
            everyone,
            lambda link: link.ceremonies.Propose(propose, timeout=phase(plan.kind, Step.PROPOSE).attempt),
        )
        envelopes = {name: each.statement for name, each in parse(Step.PROPOSE, pb.ProposeResponse, proposed).items()}
        consents: dict[str, Consent] = {}
        for name, envelope in envelopes.items():
            with blaming(Step.PROPOSE, name):
                consents[name] = Consent.parse(self.signed(envelope, CONSENT_TYPE, name, "consent"))
        check_consents(plan, everyone, consents)
        await self.enter(Step.ERASE, present=everyone)
        request = pb.EraseRequest(ceremony_id=plan.ceremony_id, consents=[envelopes[name] for name in everyone])
        erased = await self.ask_all(
            Step.ERASE,
            everyone,
            lambda link: link.ceremonies.Erase(request, timeout=phase(plan.kind, Step.ERASE).attempt),
        )
        await self._finish({name: each.receipt for name, each in parse(Step.ERASE, pb.EraseResponse, erased).items()})

    async def _finish(self, envelopes: dict[str, bytes]) -> None:
        plan, now = self.plan, int(self.clock())
        payloads: dict[str, bytes] = {}
        for name, envelope in envelopes.items():
            with blaming(Step.ERASE, name):
                payloads[name] = self.signed(envelope, DESTRUCTION_RECEIPT_TYPE, name, "receipt")
        receipts = {name: DestructionReceipt.parse(payload) for name, payload in payloads.items()}
        check_receipts(plan, sorted(self.links), receipts)

        def work(session: Session) -> None:
            row = self.move(session, Step.DONE)
            row.error = None
            digest = H("keyquorum/v1/receipts", *(payloads[name] for name in sorted(payloads))).hex()
            self.enter_leaf(session, digest)
            for name, envelope in envelopes.items():
                session.merge(CeremonyReceiptRow(ceremony_id=plan.ceremony_id, custodian=name, receipt=envelope))
            where = (KeyRow.key_id == plan.key_id, KeyRow.epoch == plan.epoch)
            session.execute(update(KeyRow).where(*where).values(state="destroyed", ended_at=now))
            session.execute(delete(StaleRow).where(StaleRow.key_id == plan.key_id, StaleRow.epoch == plan.epoch))

        await self.end(work)
        total = len(receipts)
        erased = sum(receipt.erased for receipt in receipts.values())
        note = f"{erased} seeds erased, {total} receipts"
        self.tell(Progress(plan.ceremony_id, Step.DONE, "", total, total, note=note))
