"""The gRPC services: protobuf to values and back. They decide nothing; the gate and the ceremonies do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from keyquorum_core.bulletin import peek_bulletin
from keyquorum_core.ceremony_plan import PLAN_TYPE, CeremonyPlan
from keyquorum_core.errors import KeyquorumError, Reason, StateError
from keyquorum_core.release import Leaf
from keyquorum_core.revocations import REVOCATIONS
from keyquorum_core.signing import peek_payload
from keyquorum_custodian import __version__
from keyquorum_custodian.answering import MAX_GROUP, Answering
from keyquorum_custodian.bulletins import Accepted
from keyquorum_custodian.canary import FaultKind
from keyquorum_custodian.ceremonies import SealedPart
from keyquorum_custodian.logs import logger
from keyquorum_custodian.metrics import Metrics
from keyquorum_custodian.node import Node
from keyquorum_custodian.pacing import Work, on_the_spot
from keyquorum_custodian.seed_records import ApprovalRow
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2_grpc as rpc

__all__ = ["AdminService", "CeremoniesService", "CustodianService"]

_Context = Any
_MAX_HELD = 256


@dataclass(eq=False, slots=True)
class _Stream:
    """A release stream under way: the task that serves it, whether it waits for the next request, and the answers that
    a drill holds back, with the loop's time at which each is due."""

    task: asyncio.Task[Any] | None
    requests: AsyncIterator[pb.ReleaseRequest]
    reading: bool = False
    ending: bool = False
    held: list[tuple[float, pb.ReleaseAnswer]] = field(default_factory=list)
    _pending: asyncio.Future[pb.ReleaseRequest] | None = None

    def hold(self, answer: pb.ReleaseAnswer, seconds: float) -> None:
        if len(self.held) < _MAX_HELD:
            self.held.append((asyncio.get_running_loop().time() + seconds, answer))
            self.held.sort(key=lambda each: each[0])

    def due(self) -> Iterator[pb.ReleaseAnswer]:
        while self.held and self.held[0][0] <= asyncio.get_running_loop().time():
            yield self.held.pop(0)[1]

    async def next(self) -> pb.ReleaseRequest | None:
        """The next request; None when an answer that is held back is due before it. Raises ``StopAsyncIteration``."""
        self.reading = True
        try:
            if not self.held and self._pending is None:
                return await anext(self.requests)
            if self._pending is None:
                self._pending = asyncio.ensure_future(anext(self.requests))
            wait = self.held[0][0] - asyncio.get_running_loop().time() if self.held else None
            done, _ = await asyncio.wait({self._pending}, timeout=wait if wait is None else max(0.0, wait))
            if not done:
                return None
            request, self._pending = self._pending, None
            return request.result()
        finally:
            self.reading = False

    def close(self) -> None:
        if self._pending is not None:
            self._pending.cancel()


class CustodianService(rpc.CustodianServicer):
    """What coordinators call."""

    def __init__(self, node: Node, metrics: Metrics) -> None:
        self._node = node
        self._log = logger()
        self._answering = Answering(node, metrics)
        self._streams: set[_Stream] = set()

    async def Release(
        self, request_iterator: AsyncIterable[pb.ReleaseRequest], context: _Context
    ) -> AsyncIterator[pb.ReleaseAnswer]:
        stream = _Stream(asyncio.current_task(), aiter(request_iterator))
        self._streams.add(stream)
        try:
            while not stream.ending:
                for late in stream.due():
                    yield late
                try:
                    request = await stream.next()
                except StopAsyncIteration:
                    return
                if request is None:
                    continue
                answer = self._answering.answer(request)
                if not self._node.canary.any or self._leaves_something(request, answer, stream):
                    yield answer
        except asyncio.CancelledError:
            if not stream.ending:
                raise
        finally:
            stream.close()
            self._streams.discard(stream)

    def _leaves_something(self, request: pb.ReleaseRequest, answer: pb.ReleaseAnswer, stream: _Stream) -> bool:
        """Take out of the answer what a drill keeps back; whether anything is left of it."""
        if not answer.group:
            return not self._keeps_back(request, answer, stream)
        pairs = zip(request.group, list(answer.group), strict=True)
        left = [one for asked, one in pairs if not self._keeps_back(asked, one, stream)]
        del answer.group[:]
        answer.group.extend(left)
        return bool(left)

    def _keeps_back(self, request: pb.ReleaseRequest, answer: pb.ReleaseAnswer, stream: _Stream) -> bool:
        """A drill has this custodian give no answer for the canary that the leaf names, or a late one. Nobody else's
        answers wait for that."""
        try:
            fault = self._node.canary.of(Leaf.parse(request.leaf).key_id) if request.leaf else None
        except KeyquorumError:
            return False
        if fault is None or fault.kind not in (FaultKind.SILENT, FaultKind.SLOW):
            return False
        if fault.kind is FaultKind.SLOW:
            stream.hold(answer, fault.delay_ms / 1000)
        return True

    def end_streams(self) -> None:
        """End every release stream once the request in hand is answered: coordinators never end theirs."""
        for stream in self._streams:
            stream.ending = True
            if stream.reading and stream.task is not None:
                stream.task.cancel()

    async def GetWindow(self, request: pb.GetWindowRequest, context: _Context) -> pb.GetWindowResponse:
        return pb.GetWindowResponse(statement=self._node.windows.current().statement)

    async def Describe(self, request: pb.DescribeRequest, context: _Context) -> pb.DescribeResponse:
        return _describe(self._node)

    async def Revoke(self, request: pb.RevokeRequest, context: _Context) -> pb.RevokeResponse:
        accepted, changed = self._node.withdrawn.accept(request.document)
        if changed:
            self._log.warning("revocations changed", version=accepted.version, changes=changed[:64])
        return pb.RevokeResponse(version=accepted.version, digest=accepted.digest)


class CeremoniesService(rpc.CeremoniesServicer):
    """The steps of a ceremony; each is logged, since each is rare. ``work`` does what takes long."""

    def __init__(self, node: Node, work: Work = on_the_spot) -> None:
        self._node = node
        self._steps = node.ceremonies.steps(work)
        self._log = logger()

    async def _hold(self, ceremony_id: str) -> None:
        """Where a drill has this custodian be late or silent about a canary's ceremony, be that."""
        if self._node.canary.any:
            row = self._node.keystore.ceremony(ceremony_id)
            if row is not None:
                await self._node.canary.hold(row.key_id)

    async def Propose(self, request: pb.ProposeRequest, context: _Context) -> pb.ProposeResponse:
        if self._node.canary.any:
            plan = peek_payload(request.plan, PLAN_TYPE, "ceremony plan")
            await self._node.canary.hold(CeremonyPlan.parse(plan).key_id)
        proposed = await self._steps.propose(request.plan, request.certificate, list(request.rosters))
        self._log.info("ceremony proposed", ceremony=proposed.ceremony_id)
        if proposed.proposal is None:
            return pb.ProposeResponse(statement=proposed.statement)
        made = proposed.proposal
        return pb.ProposeResponse(
            header=made.header, parts=[_part_out(part) for part in made.parts], went_by=made.went_by
        )

    async def Deliver(self, request: pb.DeliverRequest, context: _Context) -> pb.DeliverResponse:
        await self._hold(request.ceremony_id)
        parts = [SealedPart(getattr(part, "from"), part.to, part.sealed) for part in request.parts]
        commitments = await self._steps.deliver(request.ceremony_id, list(request.headers), parts)
        self._log.info("ceremony delivered", ceremony=request.ceremony_id)
        return pb.DeliverResponse(commitments=commitments)

    async def Confirm(self, request: pb.ConfirmRequest, context: _Context) -> pb.ConfirmResponse:
        await self._hold(request.ceremony_id)
        certificate = await self._steps.confirm(request.ceremony_id, list(request.commitments))
        self._log.info("ceremony confirmed", ceremony=request.ceremony_id)
        return pb.ConfirmResponse(certificate=certificate)

    async def Activate(self, request: pb.ActivateRequest, context: _Context) -> pb.ActivateResponse:
        await self._hold(request.ceremony_id)
        await self._steps.activate(request.ceremony_id, request.certificate)
        self._log.info("epoch active", ceremony=request.ceremony_id)
        return pb.ActivateResponse()

    async def Give(self, request: pb.GiveRequest, context: _Context) -> pb.GiveResponse:
        await self._hold(request.ceremony_id)
        statement, sealed = await self._steps.give(request.ceremony_id, request.request)
        self._log.info("seeds given", ceremony=request.ceremony_id)
        return pb.GiveResponse(statement=statement, sealed=sealed)

    async def Restore(self, request: pb.RestoreRequest, context: _Context) -> pb.RestoreResponse:
        await self._hold(request.ceremony_id)
        me = self._node.config.id
        gifts = [(gift.statement, SealedPart(getattr(gift, "from"), me, gift.sealed)) for gift in request.gifts]
        receipt = await self._steps.restore(request.ceremony_id, request.certificate, gifts)
        self._log.info("seeds restored", ceremony=request.ceremony_id)
        return pb.RestoreResponse(receipt=receipt)

    async def Erase(self, request: pb.EraseRequest, context: _Context) -> pb.EraseResponse:
        await self._hold(request.ceremony_id)
        receipt = await self._steps.erase(request.ceremony_id, list(request.consents))
        self._log.warning("epoch destroyed", ceremony=request.ceremony_id)
        return pb.EraseResponse(receipt=receipt)

    async def Cancel(self, request: pb.CancelRequest, context: _Context) -> pb.CancelResponse:
        was = await self._steps.cancel(request.ceremony_id, request.cause)
        self._log.warning("ceremony cancelled", ceremony=request.ceremony_id[:64], was=was)
        return pb.CancelResponse(was=was)

    async def GetCertificate(self, request: pb.GetCertificateRequest, context: _Context) -> pb.GetCertificateResponse:
        return pb.GetCertificateResponse(certificate=self._node.ceremonies.certificate(request.key_id, request.epoch))


class AdminService(rpc.CustodianAdminServicer):
    """What this custodian's own operator calls; ``seal`` has it sealed once the answer is on its way."""

    def __init__(self, node: Node, seal: Callable[[], None]) -> None:
        self._node = node
        self._seal = seal
        self._log = logger()

    async def Status(self, request: pb.StatusRequest, context: _Context) -> pb.StatusResponse:
        node = self._node
        return pb.StatusResponse(
            description=_describe(node),
            releases=node.releases,
            refusals=node.refusals,
            started_at=node.started_at,
            warnings=node.warnings(),
            ceremonies=[
                pb.CeremonyState(
                    ceremony_id=row.ceremony_id,
                    key_id=row.key_id,
                    epoch=row.epoch,
                    state=row.state,
                    kind=row.kind,
                    cause=row.cause,
                    about_me=CeremonyPlan.parse(row.plan).target == node.config.id,
                )
                for row in node.keystore.ceremonies()
            ],
            bulletins=[_bulletin_out(*state) for state in node.bulletins.states()],
            pending=[_approval_out(row) for row in node.ceremonies.approvals.pending()],
            accused=[
                pb.Accused(ceremony_id=each.ceremony_id, custodian=each.custodian, what=each.what)
                for each in node.keystore.accusations()
            ],
            leases=[
                pb.LeaseState(**{name: getattr(lease, name) for name in pb.LeaseState.DESCRIPTOR.fields_by_name})
                for lease in node.leases.all(int(node.clock()))
            ],
            quarantined=node.quarantine.in_force,
        )

    async def ListQuarantine(self, request: pb.ListQuarantineRequest, context: _Context) -> pb.ListQuarantineResponse:
        return _quarantine(self._node, evidence=request.evidence)

    async def LiftQuarantine(self, request: pb.LiftQuarantineRequest, context: _Context) -> pb.ListQuarantineResponse:
        self._node.quarantine.lift(request.number, request.why, int(self._node.clock()))
        logger().warning("quarantine lifted", entry=request.number, why=request.why)
        return _quarantine(self._node, evidence=False)

    async def ListLedgerAlarms(
        self, request: pb.ListLedgerAlarmsRequest, context: _Context
    ) -> pb.ListLedgerAlarmsResponse:
        return _alarms(self._node)

    async def ClearLedgerAlarm(
        self, request: pb.ClearLedgerAlarmRequest, context: _Context
    ) -> pb.ListLedgerAlarmsResponse:
        self._node.witness.clear(request.number, request.why)
        logger().warning("ledger alarm cleared", alarm=request.number, why=request.why)
        return _alarms(self._node)

    async def AcceptBulletin(self, request: pb.AcceptBulletinRequest, context: _Context) -> pb.AcceptBulletinResponse:
        changed: tuple[str, ...] = ()
        if peek_bulletin(request.envelope).kind == REVOCATIONS.name:
            accepted, changed = self._node.withdrawn.accept(request.envelope)
        else:
            accepted = self._node.bulletins.accept(request.envelope)
        return pb.AcceptBulletinResponse(accepted=_bulletin_out(accepted.kind, accepted, ""), changes=changed)

    async def ListApprovals(self, request: pb.ListApprovalsRequest, context: _Context) -> pb.ListApprovalsResponse:
        pending = self._node.ceremonies.approvals.pending()
        return pb.ListApprovalsResponse(pending=[_approval_out(row) for row in pending])

    async def Decide(self, request: pb.DecideRequest, context: _Context) -> pb.DecideResponse:
        approvals = self._node.ceremonies.approvals
        row = approvals.decide(request.request_id, request.subject, approve=request.approve)
        self._log.warning("operator decided", request=row.request_id, kind=row.kind, approved=request.approve)
        return pb.DecideResponse(decided=_approval_out(row))

    async def Unseal(self, request: pb.UnsealRequest, context: _Context) -> pb.UnsealResponse:
        raise StateError(
            Reason.STATE, "this custodian is open: there is nothing to unseal", expected="sealed", actual="serving"
        )

    async def Seal(self, request: pb.SealRequest, context: _Context) -> pb.SealResponse:
        self._log.warning("sealed on the operator's word", custodian=self._node.config.id)
        self._seal()
        return pb.SealResponse()


def _approval_out(row: ApprovalRow) -> pb.PendingApproval:
    return pb.PendingApproval(
        request_id=row.request_id,
        kind=row.kind,
        subject=row.subject,
        asked_by=row.asked_by,
        difference=row.difference,
        requested_at=row.requested_at,
    )


def _bulletin_out(kind: str, accepted: Accepted[Any] | None, problem: str) -> pb.BulletinState:
    if accepted is None:
        return pb.BulletinState(kind=kind, problem=problem)
    return pb.BulletinState(
        kind=kind,
        version=accepted.version,
        digest=accepted.digest,
        issued_at=accepted.issued_at,
        expires_at=accepted.expires_at,
        signers=accepted.signers,
        problem=problem,
    )


def _quarantine(node: Node, *, evidence: bool) -> pb.ListQuarantineResponse:
    return pb.ListQuarantineResponse(
        entries=[
            pb.QuarantineEntry(
                number=entry.number,
                subjects=entry.subjects,
                reason=entry.reason,
                message=entry.message,
                job_id=entry.job_id,
                evidence_sha256=entry.evidence_sha256,
                evidence=node.quarantine.evidence(entry.number) if evidence and entry.evidence_sha256 else b"",
                raised_at=entry.raised_at,
                lifted_at=entry.lifted_at or 0,
                why=entry.why or "",
            )
            for entry in node.quarantine.entries()
        ]
    )


def _alarms(node: Node) -> pb.ListLedgerAlarmsResponse:
    return pb.ListLedgerAlarmsResponse(
        alarms=[
            pb.LedgerAlarm(
                number=alarm.number,
                kind=alarm.kind,
                known=alarm.known,
                shown=alarm.shown,
                raised_at=alarm.raised_at,
                cleared_at=alarm.cleared_at or 0,
                why=alarm.why or "",
            )
            for alarm in node.witness.alarms()
        ]
    )


def _part_out(part: SealedPart) -> pb.SealedParts:
    return pb.SealedParts(**{"from": part.sender}, to=part.to, sealed=part.sealed)


def _describe(node: Node) -> pb.DescribeResponse:
    revoked = node.bulletins.accepted(REVOCATIONS)
    return pb.DescribeResponse(
        release_group=MAX_GROUP,
        custodian=node.config.id,
        jurisdiction=node.config.jurisdiction,
        cluster=node.config.cluster,
        roster_version=node.roster.version,
        roster_digest=node.roster_digest,
        keys=[
            pb.KeyEpoch(
                key_id=held.key_id,
                epoch=held.epoch,
                state=held.state,
                seeds=len(held.indices),
                certificate_digest=held.certificate_digest,
                created_at=held.created_at,
                retired_at=held.retired_at or 0,
            )
            for held in node.epochs.all()
        ],
        trusts_development_hardware=node.trusts_development,
        version=__version__,
        now=int(node.clock()),
        ledger_size=node.witness.size,
        ledger_witnessed_at=node.witness.witnessed_at,
        ledger_alarms=len(node.witness.open_alarms),
        revocations_version=revoked.version if revoked is not None else 0,
        revocations_digest=revoked.digest if revoked is not None else "",
        scheme=str(node.keystore.scheme),
        restored=node.standing.restored,
    )
