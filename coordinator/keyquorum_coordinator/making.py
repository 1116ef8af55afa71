"""Drives *generate* and *rotate*: propose, deliver, confirm, activate, each on all who take part at once (DESIGN §9).

A rotation goes on without custodians that cannot be reached, or that lack the epoch before, as far as the key's policy
allows it; they are *stale* from then on. A stop before the certificate is whole cancels the ceremony everywhere; after
that it only goes forward, because a custodian may have made the epoch active already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from sqlalchemy import update
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import KeyRow, StaleRow
from keyquorum_coordinator.driving import Asked, Driver, Progress, blaming, parse, stopped
from keyquorum_core.ceremony import (
    CERTIFICATE_TYPE,
    COMMITMENTS_TYPE,
    MAX_CERTIFICATE,
    PARTS_TYPE,
    Commitments,
    EpochCertificate,
    PartsHeader,
)
from keyquorum_core.ceremony_checks import check_certificate, check_commitments, check_present, check_signed
from keyquorum_core.ceremony_states import Kind, Step, phase
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.signing import merge, open_multi
from keyquorum_protos.v1 import custodian_pb2 as pb

__all__ = ["Making"]


class Making(Driver):
    """One generate or rotate ceremony."""

    async def run(self) -> None:
        certificate = self.certificate
        if certificate:
            found = await asyncio.to_thread(self._opened, certificate)
        else:
            certificate, found = await self._agree()
            await self.enter(Step.ACTIVATE, certificate=certificate)
        request = pb.ActivateRequest(ceremony_id=self.plan.ceremony_id, certificate=certificate)
        asked = await self.ask(
            Step.ACTIVATE,
            found.signers,
            lambda link: link.ceremonies.Activate(request, timeout=self._attempt(Step.ACTIVATE)),
            enough=self.plan.quorum.is_qualified,
        )
        late = self._late(asked)
        await self._finish(certificate, found, late)
        note = f"stale, to be repaired: {', '.join(sorted({*found.absent, *late}))}" if found.absent or late else ""
        total = len(found.signers)
        done = total - len(late)
        self.tell(Progress(self.plan.ceremony_id, Step.DONE, "", done, total, certificate, note=note))

    def _attempt(self, step: Step) -> float:
        return phase(self.plan.kind, step).attempt

    def _late(self, asked: Asked) -> dict[str, str]:
        """Who could not be told of the whole certificate; the epoch is active all the same if the rest is a quorum."""
        refusals = {name: error for name, error in asked.errors.items() if not isinstance(error, UnavailableError)}
        if refusals or (asked.errors and not self.plan.quorum.is_qualified(asked.answers)):
            raise stopped(Step.ACTIVATE, asked.errors)
        return {name: f"{error.reason}: {error.message}" for name, error in asked.errors.items()}

    async def _agree(self) -> tuple[bytes, EpochCertificate]:
        """Up to the whole certificate, and its envelope, signed by everyone who takes part."""
        plan = self.plan
        proposed = await self._propose()
        deliveries = await asyncio.to_thread(self._deliveries, proposed)
        await self.enter(Step.DELIVER, present=proposed)
        delivered = parse(
            Step.DELIVER,
            pb.DeliverResponse,
            await self.ask_all(
                Step.DELIVER,
                proposed,
                lambda link: link.ceremonies.Deliver(deliveries[link.id], timeout=self._attempt(Step.DELIVER)),
            ),
        )
        expected = await asyncio.to_thread(self._expected_certificate, delivered)
        await self.enter(Step.CONFIRM)
        confirm = pb.ConfirmRequest(
            ceremony_id=plan.ceremony_id, commitments=[delivered[name].commitments for name in sorted(delivered)]
        )
        confirmed = parse(
            Step.CONFIRM,
            pb.ConfirmResponse,
            await self.ask_all(
                Step.CONFIRM,
                proposed,
                lambda link: link.ceremonies.Confirm(confirm, timeout=self._attempt(Step.CONFIRM)),
            ),
        )
        return await asyncio.to_thread(self._whole_certificate, expected, confirmed), expected

    async def _propose(self) -> dict[str, pb.ProposeResponse]:
        """The proposals of those who take part.

        Once it is settled who takes part it stays so: by this coordinator's own record, or, when another one drove the
        ceremony before, by what custodians say they went by.
        """
        settled = self.settled
        propose = pb.ProposeRequest(plan=self.envelope)
        asked = await self.ask(
            Step.PROPOSE,
            settled or self.plan.quorum.ids,
            lambda link: link.ceremonies.Propose(propose, timeout=self._attempt(Step.PROPOSE)),
            enough=lambda answers: not settled and self._may_go_on(answers),
        )
        answers = parse(Step.PROPOSE, pb.ProposeResponse, asked.answers)
        went_by = next((set(each.went_by) for _, each in sorted(answers.items()) if each.went_by), set(settled))
        absent = {name: error for name, error in asked.errors.items() if _may_be_absent(self.plan.kind, error)}
        if len(absent) != len(asked.errors) or went_by - set(answers):
            raise stopped(Step.PROPOSE, asked.errors or {"": _lost(went_by - set(answers))})
        present = {name: each for name, each in answers.items() if not went_by or name in went_by}
        try:
            check_present(self.plan, present)
        except KeyquorumError as error:
            raise stopped(Step.PROPOSE, absent or {error.details.get("custodians", ""): error}) from None
        return present

    def _may_go_on(self, answers: Mapping[str, bytes]) -> bool:
        """Those who answered can make the epoch without the rest, and none of the rest took part before."""
        if self.plan.kind is not Kind.ROTATE:
            return False
        proposed = parse(Step.PROPOSE, pb.ProposeResponse, answers)
        if any(set(each.went_by) - set(answers) for each in proposed.values()):
            return False
        try:
            check_present(self.plan, answers)
        except KeyquorumError:
            return False
        return True

    # -- what is carried ----------------------------------------------------------------------------------------------

    def _deliveries(self, proposed: Mapping[str, pb.ProposeResponse]) -> dict[str, pb.DeliverRequest]:
        headers = [proposed[name].header for name in sorted(proposed)]
        out = {name: pb.DeliverRequest(ceremony_id=self.plan.ceremony_id, headers=headers) for name in sorted(proposed)}
        for name, response in sorted(proposed.items()):
            with blaming(Step.PROPOSE, name):
                header = PartsHeader.parse(self.signed(response.header, PARTS_TYPE, name, "parts header"))
                recipients = sorted(parts.to for parts in response.parts)
                if (
                    (header.plan_digest, header.custodian) != (self.plan.digest, name)
                    or recipients != sorted(header.recipients)
                    or any(getattr(parts, "from") != name for parts in response.parts)
                    or not set(recipients) <= set(self.plan.quorum.ids) - {name}
                ):
                    raise RefusedError(
                        Reason.CEREMONY,
                        "sealed parts are not those that their header names",
                        expected=f"one each for {', '.join(sorted(header.recipients))[:200]}, from {name}",
                        actual=", ".join(recipients)[:200],
                    )
            for parts in response.parts:
                if parts.to in out:
                    out[parts.to].parts.append(parts)
        return out

    def _expected_certificate(self, delivered: Mapping[str, pb.DeliverResponse]) -> EpochCertificate:
        stated = {}
        for name, response in delivered.items():
            with blaming(Step.DELIVER, name):
                payload = self.signed(response.commitments, COMMITMENTS_TYPE, name, "commitments")
                stated[name] = Commitments.parse(payload)
        try:
            return check_commitments(self.plan, self.plan.quorum, stated)
        except KeyquorumError as error:
            raise stopped(Step.DELIVER, {error.details.get("custodians", "the custodians"): error}) from None

    def _whole_certificate(self, expected: EpochCertificate, confirmed: Mapping[str, pb.ConfirmResponse]) -> bytes:
        for name, response in confirmed.items():
            with blaming(Step.CONFIRM, name):
                payload = self.signed(response.certificate, CERTIFICATE_TYPE, name, "epoch certificate")
                if payload != expected.to_payload():
                    raise RefusedError(Reason.CEREMONY, "the certificate it signed is not the one all commitments give")
        certificates = [confirmed[name].certificate for name in sorted(confirmed)]
        whole = merge(certificates, "epoch certificate", max_bytes=MAX_CERTIFICATE)
        check_signed(expected, self.plan, self.plan.quorum, confirmed)  # each signature was verified above
        return whole

    def _opened(self, certificate: bytes) -> EpochCertificate:
        payload, signers = open_multi(
            certificate, CERTIFICATE_TYPE, self.identities, 1, "epoch certificate", max_bytes=MAX_CERTIFICATE
        )
        return check_certificate(payload, self.plan, self.plan.quorum, signers)

    # -- the end ------------------------------------------------------------------------------------------------------

    async def _finish(self, certificate: bytes, found: EpochCertificate, late: Mapping[str, str]) -> None:
        plan, now = self.plan, int(self.clock())
        stale = {**dict.fromkeys(found.absent, "it was absent when the epoch was made"), **late}

        def work(session: Session) -> None:
            row = self.move(session, Step.DONE)
            row.error = None
            self.enter_leaf(session, found.digest)
            session.execute(
                update(KeyRow)
                .where(KeyRow.key_id == plan.key_id, KeyRow.epoch < plan.epoch, KeyRow.state == "active")
                .values(state="retired", retired_at=plan.created_at)
            )
            session.merge(
                KeyRow(
                    key_id=plan.key_id,
                    epoch=plan.epoch,
                    state="active",
                    certificate=certificate,
                    ceremony_id=plan.ceremony_id,
                    created_at=plan.created_at,
                )
            )
            for name, cause in stale.items():
                session.merge(
                    StaleRow(key_id=plan.key_id, epoch=plan.epoch, custodian=name, since=now, cause=cause[:500])
                )

        await self.end(work)


def _may_be_absent(kind: Kind, error: KeyquorumError) -> bool:
    """Out of reach, or lacking the epoch before; a custodian that refuses otherwise has a reason to be heard."""
    return kind is Kind.ROTATE and (isinstance(error, UnavailableError) or "stale" in error.details)


def _lost(names: set[str]) -> KeyquorumError:
    return UnavailableError(
        Reason.UNAVAILABLE,
        f"the ceremony went by the parts of {', '.join(sorted(names))}, which cannot be had any more",
        next_step="Bring them back, or cancel the ceremony",
    )
