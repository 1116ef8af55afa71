"""One generate ceremony, from its plan to an active epoch: what is asked of custodians, in which order.

What is carried between custodians is checked here first, so that a stop names the right one; the custodians check it
all again. Every answer is stored before the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import grpc.aio
import structlog
from google.protobuf.message import DecodeError, Message
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from keyquorum_coordinator.database import CeremonyAnswerRow, CeremonyRow, Database, KeyRow
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.leaf_records import ceremony_leaf
from keyquorum_coordinator.link import Link
from keyquorum_coordinator.outbox import enter
from keyquorum_coordinator.stored_errors import dump_error
from keyquorum_core.ceremony import (
    CERTIFICATE_TYPE,
    COMMITMENTS_TYPE,
    MAX_CERTIFICATE,
    PARTS_TYPE,
    CeremonyPlan,
    Commitments,
    EpochCertificate,
    PartsHeader,
    check_certificate,
    check_commitments,
)
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.signing import merge, open_envelope, open_multi
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.wire.errors import from_rpc_error

__all__ = ["ENDED", "Generate", "Progress", "Step"]


class Step(StrEnum):
    PROPOSE = "propose"
    DELIVER = "deliver"
    CONFIRM = "confirm"
    ACTIVATE = "activate"
    DONE = "done"
    CANCELLED = "cancelled"


ENDED = (Step.DONE, Step.CANCELLED)
_STEP_TIMEOUT = 60.0
_CANCEL_TIMEOUT = 5.0
_RETRIES = (0.5, 1.0, 2.0)  # seconds between attempts on a custodian that cannot be reached

M = TypeVar("M", bound=Message)

_log = structlog.get_logger("ceremonies")


@dataclass(frozen=True, slots=True)
class Progress:
    """``done`` of ``total`` custodians are through ``step``; ``custodian`` is who just got through, empty for the step
    itself. ``certificate``: DSSE envelope, with step ``done``."""

    ceremony_id: str
    step: Step
    custodian: str
    done: int
    total: int
    certificate: bytes = b""


class Generate:
    """One generate ceremony, step by step."""

    def __init__(
        self,
        database: Database,
        fanout: Fanout,
        plan: CeremonyPlan,
        plan_envelope: bytes,
        tell: Callable[[Progress], None],
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._links = fanout.links
        self._roster = fanout.roster
        self._identities = {custodian.id: custodian.identity for custodian in fanout.roster.custodians}
        self._plan = plan
        self._envelope = plan_envelope
        self._on_progress = tell
        self._clock = clock

    async def drive(self) -> None:
        certificate = await self._database.read(self._stored_certificate)
        if not certificate:
            try:
                certificate = await self._agree()
            except KeyquorumError as error:
                try:
                    await self._cancel(error)
                except KeyquorumError as failure:  # not recorded: the next start tries again, and cancels then
                    _log.error("ceremony.cancel_not_recorded", reason=str(failure.reason))
                raise error from None
            await self._enter(Step.ACTIVATE, certificate)
        request = pb.ActivateRequest(ceremony_id=self._plan.ceremony_id, certificate=certificate)
        await self._ask_all(Step.ACTIVATE, lambda link: link.ceremonies.Activate(request, timeout=_STEP_TIMEOUT))
        await self._finish(certificate)
        total = len(self._links)
        self._on_progress(Progress(self._plan.ceremony_id, Step.DONE, "", total, total, certificate))

    async def _agree(self) -> bytes:
        """Up to the whole certificate, an envelope signed by every custodian."""
        plan = self._plan
        propose = pb.ProposeRequest(plan=self._envelope)
        proposed = _parse(
            Step.PROPOSE,
            pb.ProposeResponse,
            await self._ask_all(Step.PROPOSE, lambda link: link.ceremonies.Propose(propose, timeout=_STEP_TIMEOUT)),
        )
        deliveries = await asyncio.to_thread(self._deliveries, proposed)
        await self._enter(Step.DELIVER)
        delivered = _parse(
            Step.DELIVER,
            pb.DeliverResponse,
            await self._ask_all(
                Step.DELIVER, lambda link: link.ceremonies.Deliver(deliveries[link.id], timeout=_STEP_TIMEOUT)
            ),
        )
        expected = await asyncio.to_thread(self._expected_certificate, delivered)
        await self._enter(Step.CONFIRM)
        confirm = pb.ConfirmRequest(
            ceremony_id=plan.ceremony_id, commitments=[delivered[name].commitments for name in sorted(delivered)]
        )
        confirmed = _parse(
            Step.CONFIRM,
            pb.ConfirmResponse,
            await self._ask_all(Step.CONFIRM, lambda link: link.ceremonies.Confirm(confirm, timeout=_STEP_TIMEOUT)),
        )
        return await asyncio.to_thread(self._whole_certificate, expected, confirmed)

    # -- what is carried ----------------------------------------------------------------------------------------------

    def _deliveries(self, proposed: Mapping[str, pb.ProposeResponse]) -> dict[str, pb.DeliverRequest]:
        headers = [proposed[name].header for name in sorted(proposed)]
        out = {
            name: pb.DeliverRequest(ceremony_id=self._plan.ceremony_id, headers=headers) for name in sorted(proposed)
        }
        for name, response in sorted(proposed.items()):
            with _blaming(Step.PROPOSE, name):
                header = PartsHeader.parse(self._signed(response.header, PARTS_TYPE, name, "parts header"))
                recipients = sorted(parts.to for parts in response.parts)
                if (
                    (header.plan_digest, header.custodian) != (self._plan.digest, name)
                    or recipients != sorted(header.recipients)
                    or any(getattr(parts, "from") != name for parts in response.parts)
                    or not set(recipients) <= set(out) - {name}
                ):
                    raise RefusedError(
                        Reason.CEREMONY,
                        "sealed parts are not those that their header names",
                        expected=f"one each for {', '.join(sorted(header.recipients))[:200]}, from {name}",
                        actual=", ".join(recipients)[:200],
                    )
            for parts in response.parts:
                out[parts.to].parts.append(parts)
        return out

    def _expected_certificate(self, delivered: Mapping[str, pb.DeliverResponse]) -> bytes:
        stated = {}
        for name, response in delivered.items():
            with _blaming(Step.DELIVER, name):
                payload = self._signed(response.commitments, COMMITMENTS_TYPE, name, "commitments")
                stated[name] = Commitments.parse(payload)
        try:
            agreed = check_commitments(self._plan, self._plan.quorum, stated)
        except KeyquorumError as error:
            raise _stopped(Step.DELIVER, {error.details.get("custodians", "the custodians"): error}) from None
        return EpochCertificate(self._plan, agreed).to_payload()

    def _whole_certificate(self, expected: bytes, confirmed: Mapping[str, pb.ConfirmResponse]) -> bytes:
        for name, response in confirmed.items():
            with _blaming(Step.CONFIRM, name):
                payload = self._signed(response.certificate, CERTIFICATE_TYPE, name, "epoch certificate")
                if payload != expected:
                    raise RefusedError(Reason.CEREMONY, "the certificate it signed is not the one all commitments give")
        certificates = [confirmed[name].certificate for name in sorted(confirmed)]
        whole = merge(certificates, "epoch certificate", max_bytes=MAX_CERTIFICATE)
        payload, signers = open_multi(
            whole,
            CERTIFICATE_TYPE,
            self._identities,
            len(self._identities),
            "epoch certificate",
            max_bytes=MAX_CERTIFICATE,
        )
        check_certificate(payload, self._plan, self._plan.quorum, signers)
        return whole

    def _signed(self, envelope: bytes, payload_type: str, custodian: str, what: str) -> bytes:
        return open_envelope(envelope, payload_type, self._identities[custodian], what, max_bytes=MAX_CERTIFICATE)

    # -- asking -------------------------------------------------------------------------------------------------------

    async def _ask_all(self, step: Step, call: Callable[[Link], Awaitable[Message]]) -> dict[str, bytes]:
        """Every custodian's answer, serialised; those stored by an earlier run are not asked for again."""
        answers = await self._database.read(lambda session: self._stored_answers(session, step))
        total = len(self._links)
        self._tell(step, "", len(answers))
        errors: dict[str, KeyquorumError] = {}

        async def ask(link: Link) -> None:
            try:
                answer = await _attempts(link, call)
                data = answer.SerializeToString()
                await self._database.write(lambda session: self._store_answer(session, step, link.id, data))
            except KeyquorumError as error:
                errors[link.id] = error
                return
            answers[link.id] = data
            self._tell(step, link.id, len(answers))

        await asyncio.gather(*(ask(link) for link in self._links.values() if link.id not in answers))
        if errors:
            raise _stopped(step, errors)
        if len(answers) != total:
            raise KeyquorumError(Reason.INTERNAL, f"the ceremony lost answers at {step}")
        return answers

    def _tell(self, step: Step, custodian: str, done: int) -> None:
        self._on_progress(Progress(self._plan.ceremony_id, step, custodian, done, len(self._links)))

    async def _cancel(self, error: KeyquorumError) -> None:
        """Tell every custodian, as far as they can be reached, and record why. A custodian that was not reached learns
        it when it is asked to go on: it refuses a ceremony that the others gave up."""
        request = pb.CancelRequest(ceremony_id=self._plan.ceremony_id)

        async def cancel(link: Link) -> None:
            try:
                await link.ceremonies.Cancel(request, timeout=_CANCEL_TIMEOUT)
            except (grpc.aio.AioRpcError, KeyquorumError) as failure:
                _log.warning("ceremony.cancel_failed", custodian=link.id, error=type(failure).__name__)

        await asyncio.gather(*(cancel(link) for link in self._links.values()))

        def work(session: Session) -> None:
            row = self._row(session)
            row.step = Step.CANCELLED
            row.error = dump_error(error)
            row.updated_at = now = int(self._clock())
            self._drop_answers(session)
            leaf = ceremony_leaf("generate", self._plan, self._roster, now, reason=str(error.reason))
            enter(session, leaf, self._plan.ceremony_id)

        await self._database.write(work)

    # -- stored -------------------------------------------------------------------------------------------------------

    def _row(self, session: Session) -> CeremonyRow:
        return session.get_one(CeremonyRow, self._plan.ceremony_id)

    def _stored_certificate(self, session: Session) -> bytes:
        return self._row(session).certificate or b""

    def _stored_answers(self, session: Session, step: Step) -> dict[str, bytes]:
        query = select(CeremonyAnswerRow).where(
            CeremonyAnswerRow.ceremony_id == self._plan.ceremony_id, CeremonyAnswerRow.step == step
        )
        return {row.custodian: row.answer for row in session.scalars(query)}

    def _store_answer(self, session: Session, step: Step, custodian: str, data: bytes) -> None:
        session.merge(
            CeremonyAnswerRow(ceremony_id=self._plan.ceremony_id, step=step, custodian=custodian, answer=data)
        )

    def _drop_answers(self, session: Session) -> None:
        # Sealed parts have no use any more, and what is not kept cannot be attacked later.
        session.execute(delete(CeremonyAnswerRow).where(CeremonyAnswerRow.ceremony_id == self._plan.ceremony_id))

    async def _enter(self, step: Step, certificate: bytes | None = None) -> None:
        def work(session: Session) -> None:
            row = self._row(session)
            row.step = step
            row.updated_at = int(self._clock())
            if certificate is not None:
                row.certificate = certificate

        await self._database.write(work)

    async def _finish(self, certificate: bytes) -> None:
        plan = self._plan
        now = int(self._clock())

        def work(session: Session) -> None:
            row = self._row(session)
            row.step = Step.DONE
            row.updated_at = now
            self._drop_answers(session)
            session.add(
                KeyRow(
                    key_id=plan.key_id,
                    epoch=plan.epoch,
                    state="active",
                    certificate=certificate,
                    ceremony_id=plan.ceremony_id,
                    created_at=now,
                )
            )
            leaf = ceremony_leaf("generate", plan, self._roster, now, certificate=certificate)
            enter(session, leaf, plan.ceremony_id)

        await self._database.write(work)


@contextlib.contextmanager
def _blaming(step: Step, custodian: str) -> Iterator[None]:
    """An error inside is that custodian's."""
    try:
        yield
    except KeyquorumError as error:
        raise _stopped(step, {custodian: error}) from None


def _stopped(step: Step, errors: Mapping[str, KeyquorumError]) -> KeyquorumError:
    """One error for a step: kind and reason of the first custodian's, and everybody's cause."""
    names = sorted(errors)
    first = errors[names[0]]
    causes = "; ".join(f"{name}: {errors[name].reason}: {errors[name].message}" for name in names)
    return type(first)(
        first.reason,
        f"the ceremony stopped at {step}: {causes}",
        expected=first.expected or None,
        actual=first.actual or None,
        next_step=first.next_step or "Clear the cause, then run a new ceremony",
        details={**first.details, "step": step, "custodian": ",".join(names), "cause": causes},
    )


async def _attempts(link: Link, call: Callable[[Link], Awaitable[Message]]) -> Message:
    for pause in (*_RETRIES, None):
        try:
            return await call(link)
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure, link.id)
        except UnavailableError as failure:
            error = failure
        if pause is None or not isinstance(error, UnavailableError):
            raise error
        await asyncio.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _parse(step: Step, kind: type[M], answers: Mapping[str, bytes]) -> dict[str, M]:
    out: dict[str, M] = {}
    for name, data in answers.items():
        message = kind()
        try:
            message.ParseFromString(data)
        except DecodeError:
            raise KeyquorumError(Reason.INTERNAL, f"a stored answer of {name} at {step} cannot be read") from None
        out[name] = message
    return out
