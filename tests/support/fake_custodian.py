"""A custodian of the coordinator's tests: the real services over real gRPC and TLS, with seeds and gate left out.

Its window statements are real; its shares are random bytes, since the coordinator cannot look into them. How it
behaves is set on :class:`Behaviour` while it runs.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from keyquorum_core.bulletin import peek_bulletin
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_core.ledger.notes import parse_note
from keyquorum_core.ledger.witness_keys import witness_name
from keyquorum_core.release import make_window, sign_window, window_of
from keyquorum_core.roster import Operator, Roster, RosterCustodian
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2_grpc as rpc
from keyquorum_protos.wire.errors import to_status
from keyquorum_protos.wire.guard import Guard
from keyquorum_protos.wire.tls import TlsIdentity, self_signed, server_credentials, server_options

CLUSTER = "demo"
MEMBERS = (("ch-1", "CH"), ("de-1", "DE"), ("de-2", "DE"), ("is-1", "IS"), ("jp-1", "JP"))
RULE = {"at_least": 3, "jurisdictions": 2}


@dataclass
class Behaviour:
    """``delay``: seconds before each answer. ``refusal``: what to answer instead of a share. ``name``: in whose name.
    ``break_after``: end the stream with an error after so many requests. ``stall``: never answer on the first stream
    that carried a request. ``holding``: answers wait until it is set. ``reverse``: hold this many requests, then answer
    them last first. ``sealed``: size of a share. ``group``: how
    many requests it says that it takes in one message; those in a group all get what it otherwise answers."""

    delay: float = 0.0
    refusal: KeyquorumError | None = None
    name: str = ""
    break_after: int = -1
    stall: bool = False
    holding: asyncio.Event | None = None
    reverse: int = 0
    window_shift: int = 0
    sealed: int = 1500
    clock_shift: int = 0
    revoke_error: KeyquorumError | None = None
    group: int = 0
    keys: list[tuple[str, int, str]] = field(default_factory=lambda: [("k1", 1, "active")])


class FakeCustodian(rpc.CustodianServicer):
    def __init__(self, custodian_id: str, jurisdiction: str, port: int = 0) -> None:
        self.id = custodian_id
        self.jurisdiction = jurisdiction
        self.identity = Identity.generate()
        self.recipient = RecipientKey.generate()
        self.cosigner = Cosigner.generate(witness_name(CLUSTER, custodian_id))
        self.tls = self_signed(CLUSTER, "custodian", custodian_id, now=int(time.time()))
        self.behaviour = Behaviour()
        self.ledger_size = 0
        self.revocations = 0, ""
        self.requests: list[pb.ReleaseRequest] = []
        self.groups: list[int] = []
        self.streams = 0
        self.asked: dict[int, list[str]] = {}  # request ids by stream, streams numbered from 1 as they were opened
        self.open: set[int] = set()
        self.port = port
        self.add_services: Callable[[grpc.aio.Server], None] = lambda server: None
        self._boot = secrets.token_bytes(32)
        self._server: grpc.aio.Server | None = None

    async def start(self, callers: list[bytes]) -> None:
        guard = Guard(
            CLUSTER,
            {f"/keyquorum.v1.{service}/": frozenset({"coordinator"}) for service in ("Custodian", "Ceremonies")},
            report=lambda method, reference, error: print(method, repr(error)),
        )
        self._server = grpc.aio.server(interceptors=[guard], options=server_options())
        rpc.add_CustodianServicer_to_server(self, self._server)
        self.add_services(self._server)
        self.port = self._server.add_secure_port(f"127.0.0.1:{self.port}", server_credentials(self.tls, callers))
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def roster_entry(self) -> RosterCustodian:
        return RosterCustodian(
            self.id,
            self.jurisdiction,
            f"127.0.0.1:{self.port}",
            self.identity.public,
            self.recipient.public,
            self.tls.certificate.decode(),
            self.cosigner.witness_key,
        )

    # -- the services -------------------------------------------------------------------------------------------------

    async def Release(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.ReleaseAnswer]:
        self.streams += 1
        stream = self.streams
        self.open.add(stream)
        try:
            async for answer in self._release(stream, request_iterator, context):
                yield answer
        finally:
            self.open.discard(stream)

    async def _release(self, stream: int, request_iterator: Any, context: Any) -> AsyncIterator[pb.ReleaseAnswer]:
        held: list[pb.ReleaseRequest] = []
        count = 0
        async for request in request_iterator:
            if request.group:
                self.groups.append(len(request.group))
                self.requests += request.group
                yield pb.ReleaseAnswer(group=[self._answer(each) for each in request.group if each.leaf])
                continue
            if request.HasField("update") and not request.leaf:
                yield self.cosign(request)
                continue
            self.requests.append(request)
            self.asked.setdefault(stream, []).append(request.request_id)
            count += 1
            if 0 <= self.behaviour.break_after < count:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            if self.behaviour.stall and stream == next(iter(self.asked)):
                continue
            if self.behaviour.holding is not None:
                await self.behaviour.holding.wait()
            if self.behaviour.reverse:
                held.append(request)
                if len(held) < self.behaviour.reverse:
                    continue
                for each in reversed(held):
                    yield self._answer(each)
                held.clear()
                continue
            if self.behaviour.delay:
                await asyncio.sleep(self.behaviour.delay)
            yield self._answer(request)

    def cosign(self, request: pb.ReleaseRequest) -> pb.ReleaseAnswer:
        """As a witness that believes everything."""
        answer = pb.ReleaseAnswer(request_id=request.request_id, custodian=self.id, cosignatures=b"")
        if request.update.cosign:
            checkpoint = Checkpoint.parse(parse_note(request.update.checkpoint).text)
            self.ledger_size = checkpoint.size
            lines = self.cosigner.cosign(checkpoint, int(self.now()))
            answer.cosignatures = "".join(line.line() for line in lines).encode()
        return answer

    def _answer(self, request: pb.ReleaseRequest) -> pb.ReleaseAnswer:
        answer = pb.ReleaseAnswer(request_id=request.request_id, custodian=self.behaviour.name or self.id)
        if self.behaviour.refusal is not None:
            answer.refusal.CopyFrom(to_status(self.behaviour.refusal))
            return answer
        answer.share.key_id = "k1"
        answer.share.epoch = 1
        answer.share.window = window_of(self.now()) + self.behaviour.window_shift
        answer.share.sealed = secrets.token_bytes(self.behaviour.sealed)
        answer.share.signature = bytes(64)
        return answer

    def now(self) -> int:
        return int(time.time()) + self.behaviour.clock_shift

    async def GetWindow(self, request: pb.GetWindowRequest, context: Any) -> pb.GetWindowResponse:
        window = make_window(CLUSTER, self.id, window_of(self.now()), self._boot, self.identity.public.ed25519)
        return pb.GetWindowResponse(statement=sign_window(window, self.identity))

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        keys = [pb.KeyEpoch(key_id=key, epoch=epoch, state=state) for key, epoch, state in self.behaviour.keys]
        return pb.DescribeResponse(
            custodian=self.id,
            jurisdiction=self.jurisdiction,
            cluster=CLUSTER,
            keys=keys,
            now=self.now(),
            revocations_version=self.revocations[0],
            revocations_digest=self.revocations[1],
            release_group=self.behaviour.group,
        )

    async def Revoke(self, request: pb.RevokeRequest, context: Any) -> pb.RevokeResponse:
        if self.behaviour.revoke_error is not None:
            raise self.behaviour.revoke_error
        bulletin = peek_bulletin(request.document)
        self.revocations = bulletin.version, bulletin.digest
        return pb.RevokeResponse(version=bulletin.version, digest=bulletin.digest)


@dataclass
class FakeCommittee:
    """Five custodians, an operator and a coordinator's TLS identity, with a roster of all of them."""

    custodians: dict[str, FakeCustodian]
    coordinator: TlsIdentity
    operator: Identity
    log: LogSigner
    roster: Roster

    @classmethod
    async def start(
        cls, prepare: Callable[[FakeCustodian], None] = lambda custodian: None, rule: dict[str, object] | None = None
    ) -> FakeCommittee:
        now = int(time.time())
        coordinator = self_signed(CLUSTER, "coordinator", "main", now=now)
        custodians = {name: FakeCustodian(name, country) for name, country in MEMBERS}
        for custodian in custodians.values():
            prepare(custodian)
            await custodian.start([coordinator.certificate])
        operator = Identity.generate()
        log = LogSigner.generate(f"{CLUSTER}/ledger")
        roster = Roster(
            cluster=CLUSTER,
            version=1,
            issued_at=now - 60,
            expires_at=now + 86400,
            committee="main",
            custodians=tuple(custodian.roster_entry() for custodian in custodians.values()),
            quorum=rule or RULE,
            operators=(Operator("root", operator.public),),
            operator_threshold=1,
            coordinator_tls=(coordinator.certificate.decode(),),
            log_key=log.keys,
        )
        return cls(custodians, coordinator, operator, log, roster)

    async def restart(self, name: str) -> None:
        await self.custodians[name].start([self.coordinator.certificate])

    async def stop(self) -> None:
        await asyncio.gather(*(custodian.stop() for custodian in self.custodians.values()))
