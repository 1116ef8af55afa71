"""The custodian's side of the generate ceremony for the coordinator's tests: real messages and signatures, seeds that
anybody could compute, misbehaviour on demand."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from dataclasses import dataclass, field
from typing import Any

from keyquorum_core.ceremony import CERTIFICATE_TYPE, COMMITMENTS_TYPE, PARTS_TYPE, Commitments, PartsHeader
from keyquorum_core.ceremony_checks import check_certificate, check_commitments
from keyquorum_core.ceremony_plan import PLAN_TYPE, CeremonyPlan
from keyquorum_core.errors import KeyquorumError, Reason, StateError
from keyquorum_core.roster import Roster
from keyquorum_core.signing import open_multi, peek_payload, sign
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2_grpc as rpc
from tests.support.fake_custodian import FakeCommittee, FakeCustodian


@dataclass
class FakeCeremonies(rpc.CeremoniesServicer):
    """``errors``: what to raise at a step, that many times. ``lie``: commit to other seeds than everybody else.
    ``hold``: wait for the event before answering a step."""

    custodian: FakeCustodian
    roster: Roster | None = None
    errors: dict[str, list[KeyquorumError]] = field(default_factory=dict)
    hold: dict[str, asyncio.Event] = field(default_factory=dict)
    lie: bool = False
    calls: list[str] = field(default_factory=list)
    active: list[str] = field(default_factory=list)
    plans: dict[str, CeremonyPlan] = field(default_factory=dict)

    async def _step(self, step: str) -> None:
        self.calls.append(step)
        if step in self.hold:
            await self.hold[step].wait()
        if self.errors.get(step):
            raise self.errors[step].pop(0)

    async def Propose(self, request: pb.ProposeRequest, context: Any) -> pb.ProposeResponse:
        await self._step("propose")
        plan = CeremonyPlan.parse(peek_payload(request.plan, PLAN_TYPE, "plan"))
        self.plans[plan.ceremony_id] = plan
        me = self.custodian.id
        mine = set(plan.quorum.indices_of(me))
        others = [name for name in plan.quorum.ids if name != me and mine & set(plan.quorum.indices_of(name))]
        header = PartsHeader(plan.digest, me, {name: secrets.token_hex(32) for name in others})
        parts = [pb.SealedParts(to=name, sealed=secrets.token_bytes(200)) for name in others]
        for each in parts:
            setattr(each, "from", me)
        return pb.ProposeResponse(header=sign(self.custodian.identity, PARTS_TYPE, header.to_payload()), parts=parts)

    async def Deliver(self, request: pb.DeliverRequest, context: Any) -> pb.DeliverResponse:
        await self._step("deliver")
        plan = self.plans[request.ceremony_id]
        assert all(parts.to == self.custodian.id for parts in request.parts)
        salt = self.custodian.id if self.lie else ""
        seeds = {
            index: hashlib.sha256(f"{plan.ceremony_id}/{index}/{salt}".encode()).digest()
            for index in plan.quorum.indices_of(self.custodian.id)
        }
        opened = [PartsHeader.parse(peek_payload(each, PARTS_TYPE, "header")) for each in request.headers]
        made = Commitments.to_seeds(plan, self.custodian.id, seeds, {each.custodian: each.digest for each in opened})
        return pb.DeliverResponse(commitments=sign(self.custodian.identity, COMMITMENTS_TYPE, made.to_payload()))

    async def Confirm(self, request: pb.ConfirmRequest, context: Any) -> pb.ConfirmResponse:
        await self._step("confirm")
        plan = self.plans[request.ceremony_id]
        stated = [Commitments.parse(peek_payload(each, COMMITMENTS_TYPE, "it")) for each in request.commitments]
        payload = check_commitments(plan, plan.quorum, {each.custodian: each for each in stated}).to_payload()
        return pb.ConfirmResponse(certificate=sign(self.custodian.identity, CERTIFICATE_TYPE, payload))

    async def Activate(self, request: pb.ActivateRequest, context: Any) -> pb.ActivateResponse:
        await self._step("activate")
        assert self.roster is not None
        identities = {each.id: each.identity for each in self.roster.custodians}
        payload, names = open_multi(request.certificate, CERTIFICATE_TYPE, identities, 1, "certificate")
        plan = self.plans[request.ceremony_id]
        check_certificate(payload, plan, plan.quorum, names)
        self.active.append(request.ceremony_id)
        self.custodian.behaviour.keys.append((plan.key_id, plan.epoch, "active"))
        return pb.ActivateResponse()

    async def Give(self, request: pb.GiveRequest, context: Any) -> pb.GiveResponse:
        raise StateError(Reason.UNSUPPORTED, "only real custodians rebuild")

    async def Restore(self, request: pb.RestoreRequest, context: Any) -> pb.RestoreResponse:
        raise StateError(Reason.UNSUPPORTED, "only real custodians rebuild")

    async def Erase(self, request: pb.EraseRequest, context: Any) -> pb.EraseResponse:
        raise StateError(Reason.UNSUPPORTED, "only real custodians destroy")

    async def GetCertificate(self, request: pb.GetCertificateRequest, context: Any) -> pb.GetCertificateResponse:
        raise StateError(Reason.UNKNOWN_KEY, "only real custodians keep certificates")

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:
        await self._step("cancel")
        return pb.CancelResponse(was="proposed")


async def start_committee(**options: Any) -> tuple[FakeCommittee, dict[str, FakeCeremonies]]:
    """A fake committee whose custodians also hold ceremonies."""
    ceremonies: dict[str, FakeCeremonies] = {}

    def prepare(custodian: FakeCustodian) -> None:
        servicer = ceremonies[custodian.id] = FakeCeremonies(custodian)
        custodian.add_services = lambda server: rpc.add_CeremoniesServicer_to_server(servicer, server)

    committee = await FakeCommittee.start(prepare, **options)
    for servicer in ceremonies.values():
        servicer.roster = committee.roster
    return committee, ceremonies
