"""Drives *destroy*: propose, erase (DESIGN §9).

Every custodian of the roster agrees before any is asked to erase; from then on the ceremony only goes forward. A
custodian out of reach keeps it waiting at *erase*: an epoch counts as destroyed when all have signed that it is. What
one signed is looked at as it comes, so that a wrong receipt is never stored, and its author is asked again.
"""

from __future__ import annotations

from sqlalchemy import delete, update
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import CeremonyReceiptRow, KeyRow, StaleRow
from keyquorum_coordinator.driving import Driver, Progress, parse
from keyquorum_coordinator.link import Link
from keyquorum_core.ceremony_states import Step, phase
from keyquorum_core.destruction import (
    CONSENT_TYPE,
    DESTRUCTION_RECEIPT_TYPE,
    Consent,
    DestructionReceipt,
    check_consents,
    check_receipts,
)
from keyquorum_core.signing import peek_payload
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
            lambda link: self._consent(link, propose),
        )
        envelopes = {name: each.statement for name, each in parse(Step.PROPOSE, pb.ProposeResponse, proposed).items()}
        await self.enter(Step.ERASE, present=everyone)
        request = pb.EraseRequest(ceremony_id=plan.ceremony_id, consents=[envelopes[name] for name in everyone])
        erased = await self.ask_all(
            Step.ERASE,
            everyone,
            lambda link: self._receipt(link, request),
        )
        await self._finish({name: each.receipt for name, each in parse(Step.ERASE, pb.EraseResponse, erased).items()})

    async def _consent(self, link: Link, request: pb.ProposeRequest) -> pb.ProposeResponse:
        attempt = phase(self.plan.kind, Step.PROPOSE).attempt
        response: pb.ProposeResponse = await link.ceremonies.Propose(request, timeout=attempt)
        consent = Consent.parse(self.signed(response.statement, CONSENT_TYPE, link.id, "consent"))
        check_consents(self.plan, [link.id], {link.id: consent})
        return response

    async def _receipt(self, link: Link, request: pb.EraseRequest) -> pb.EraseResponse:
        attempt = phase(self.plan.kind, Step.ERASE).attempt
        response: pb.EraseResponse = await link.ceremonies.Erase(request, timeout=attempt)
        payload = self.signed(response.receipt, DESTRUCTION_RECEIPT_TYPE, link.id, "receipt")
        check_receipts(self.plan, [link.id], {link.id: DestructionReceipt.parse(payload)})
        return response

    async def _finish(self, envelopes: dict[str, bytes]) -> None:
        """With everyone's receipt: :meth:`ask_all` raises where one is missing."""
        plan, now = self.plan, int(self.clock())
        payloads = {
            name: peek_payload(envelope, DESTRUCTION_RECEIPT_TYPE, "receipt") for name, envelope in envelopes.items()
        }
        receipts = {name: DestructionReceipt.parse(payload) for name, payload in payloads.items()}

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
