"""A coordinator in memory, over real TLS: the real services, an owner's and a worker's side of them, nothing stored.

It is honest. Malicious ones are subclasses that override one of the methods named in "what a liar can change". Jobs run
inside :meth:`Jobs.Commit`, on a worker that is a function; custodians are those of :mod:`tests.support.client_world`.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from keyquorum_core.ceremony import CERTIFICATE_TYPE
from keyquorum_core.ceremony_plan import PLAN_TYPE, CeremonyPlan
from keyquorum_core.errors import KeyquorumError, Reason, StateError, UnavailableError
from keyquorum_core.key_request import open_asked
from keyquorum_core.ledger.leaves import Telemetry as TelemetryLeaf
from keyquorum_core.manifest import (
    Manifest,
    open_manifest,
    subject,
)
from keyquorum_core.release import Answer, Leaf
from keyquorum_core.signing import open_envelope, peek_payload
from keyquorum_core.telemetry import (
    TELEMETRY_TYPE,
    Batch,
)
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.v1 import coordinator_pb2_grpc as rpc
from keyquorum_protos.v1 import custodian_pb2 as custodian_pb
from keyquorum_protos.wire.errors import to_status
from keyquorum_protos.wire.guard import ANY_ROLE, Guard
from keyquorum_protos.wire.tls import server_credentials, server_options
from tests.support.client_world import CLUSTER, World, id_of
from tests.support.fake_worker import Worker
from tests.support.ledger import MemoryLog

Files = dict[str, bytes]
Runner = Callable[[Files], tuple[int, Files, bytes]]
"""What the worker runs: bundle files in; exit code, result files and log out."""

ROLES = {
    "/keyquorum.v1.Cluster/": ANY_ROLE,
    "/keyquorum.v1.Keys/Create": frozenset({"operator"}),
    "/keyquorum.v1.Keys/Derive": frozenset({"owner"}),
    "/keyquorum.v1.Keys/": frozenset({"owner", "operator"}),
    "/keyquorum.v1.Jobs/": frozenset({"owner"}),
    "/keyquorum.v1.Artifacts/": frozenset({"owner"}),
    "/keyquorum.v1.Drills/": frozenset({"operator"}),
    "/keyquorum.v1.Revocations/": frozenset({"operator"}),
}


def echo(files: Files) -> tuple[int, Files, bytes]:
    return 0, {"result.json": b'{"files": %d}' % len(files), "out/copy.bin": files.get("data/input.bin", b"")}, b"ran\n"


@dataclass
class JobRecord:
    """What a coordinator keeps of a job: documents and ciphertext."""

    manifest_envelope: bytes
    manifest: Manifest
    payload: bytes
    state: str = "submitted"
    opening: bytes = b""
    artifacts: dict[str, bytearray] = field(default_factory=dict)
    complete: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    events: list[pb.JobEvent] = field(default_factory=list)
    leaf: bytes = b""
    evidence: bytes = b""
    telemetry: list[pb.TelemetryBatch] = field(default_factory=list)
    receipts: list[pb.Receipt] = field(default_factory=list)
    statement: bytes = b""
    error: KeyquorumError | None = None
    open_answers: list[pb.AnswerEvent] = field(default_factory=list)


class FakeCoordinator(rpc.ClusterServicer, rpc.KeysServicer, rpc.JobsServicer, rpc.ArtifactsServicer):
    def __init__(self, world: World, *, run: Runner = echo, clock: Callable[[], float] = time.time) -> None:
        self.world = world
        self.run = run
        self.clock = clock
        self.ledger = MemoryLog(world.log, clock, {name: each.cosigner for name, each in world.custodians.items()})
        self.jobs: dict[str, JobRecord] = {}
        self.certificates = dict(world.certificates)
        self.ceremonies: list[pb.Ceremony] = []
        self.down: dict[str, KeyquorumError] = {}
        """Custodians that refuse or can't be reached, with what they say."""
        self.silent: set[str] = set()
        self.opens = 0
        self.asked = asyncio.Event()
        self.break_upload_at = -1
        self.break_download_at = -1
        self.break_watch = False
        self.workers: list[Worker] = []
        """Every worker that ran a job, in order."""
        self.seen: list[bytes] = []
        """Everything that passed through: what a coordinator could have kept."""

    # -- what a liar can change ---------------------------------------------------------------------------------------

    def roster(self) -> bytes:
        return self.world.roster_envelope

    def key_message(self, key_id: str, epoch: int = 0) -> pb.Key:
        """The newest epoch, which is the only one, or this one."""
        if key_id not in self.certificates:
            raise StateError(Reason.UNKNOWN_KEY, f"there is no key {key_id}")
        if epoch not in (0, 1):
            raise StateError(Reason.EPOCH, f"key {key_id} has no such epoch", expected="1", actual=epoch)
        return pb.Key(key_id=key_id, epoch=1, state="active", certificate=self.certificates[key_id])

    def job_message(self, job: JobRecord) -> pb.Job:
        message = pb.Job(
            job_id=id_of(job.manifest_envelope),
            state=job.state,
            owner=job.manifest.owner,
            key_id=job.manifest.key_id,
            epoch=job.manifest.epoch,
            created_at=1,
            updated_at=2,
            worker="w-1" if job.statement else "",
            manifest=job.manifest_envelope,
            opening=job.opening,
        )
        if job.error is not None:
            message.error.CopyFrom(to_status(job.error))
        return message

    def leaf_for_owner(self, job: JobRecord) -> Leaf:
        return Leaf(
            job_id=id_of(job.manifest_envelope),
            manifest_sha256=subject(job.payload).hex(),
            recipient_sha256=hashlib.sha256(job.manifest.owner_hpke).hexdigest(),
            evidence_sha256=Leaf.NO_EVIDENCE,
            key_id=job.manifest.key_id,
            epoch=job.manifest.epoch,
            time=int(self.clock()),
            recipient="owner",
        )

    def leaf_for_worker(self, job: JobRecord, worker: Worker) -> Leaf:
        return Leaf(
            job_id=id_of(job.manifest_envelope),
            manifest_sha256=subject(job.payload).hex(),
            recipient_sha256=hashlib.sha256(worker.recipient.public).hexdigest(),
            evidence_sha256=hashlib.sha256(job.evidence).hexdigest(),
            key_id=job.manifest.key_id,
            epoch=job.manifest.epoch,
            time=int(self.clock()),
            recipient="worker",
            development=True,
        )

    def work(self, job: JobRecord) -> None:
        """Have a worker run the job."""
        self.workers.append(Worker(self, job))
        job.receipts.clear()
        self.workers[-1].work()

    async def open_events(self, job: JobRecord) -> AsyncIterator[pb.AnswerEvent]:
        """The answers to an owner's opening."""
        leaf = self.leaf_for_owner(job)
        yield pb.AnswerEvent(leaf=leaf.to_bytes(), leaf_proof=self.leaf_proof(leaf.to_bytes()))
        for event in self.answers(job, leaf, job.manifest.owner_hpke):
            yield event
        if self.silent:
            await asyncio.sleep(30)

    def leaf_proof(self, leaf: bytes, *, cosigned: bool = False) -> bytes:
        return self.ledger.shown(leaf, cosigned=cosigned)

    def answers(self, job: JobRecord, leaf: Leaf, recipient: bytes) -> Iterable[pb.AnswerEvent]:
        return self.shares(job.manifest_envelope, leaf, recipient)

    def shares(self, envelope: bytes, leaf: Leaf, recipient: bytes) -> Iterable[pb.AnswerEvent]:
        for name, custodian in self.world.custodians.items():
            if name in self.silent:
                continue
            if name in self.down:
                yield refusal(name, self.down[name])
                continue
            now = self.clock()
            answer = custodian.answer(envelope, leaf, recipient, now)
            yield share(answer, custodian.window_statement(now))

    def outcome(self, job: JobRecord) -> pb.Outcome:
        return pb.Outcome(
            job=self.job_message(job),
            leaf=job.leaf,
            leaf_proof=self.leaf_proof(job.leaf, cosigned=True) if job.leaf else b"",
            evidence=job.evidence,
            receipts=job.receipts,
            statement=job.statement,
        )

    def telemetry(self, job: JobRecord) -> list[pb.TelemetryBatch]:
        """The worker's batches, each with its leaf and the ledger's proof of that."""
        return [self.told(batch) for batch in job.telemetry]

    def told(self, batch: pb.TelemetryBatch, **changes: Any) -> pb.TelemetryBatch:
        """``batch`` with a leaf about it; ``changes`` are lies in it."""
        parsed = Batch.parse(peek_payload(batch.statement, TELEMETRY_TYPE, "telemetry batch"))
        members: dict[str, Any] = {
            "job_id": parsed.job_id,
            "worker_sha256": parsed.worker,
            "evidence_sha256": "33" * 32,
            "sequence": parsed.sequence,
            "previous_sha256": parsed.previous_sha256,
            "statement_sha256": hashlib.sha256(batch.statement).hexdigest(),
            "content_sha256": parsed.content_sha256,
            "records": parsed.records,
            "last": parsed.last,
            "development": True,
            "time": int(self.clock()),
        }
        leaf = TelemetryLeaf(**{**members, **changes}).to_bytes()
        return pb.TelemetryBatch(
            statement=batch.statement,
            content=batch.content,
            leaf=leaf,
            leaf_proof=self.leaf_proof(leaf, cosigned=True),
        )

    def artifact(self, job: JobRecord, kind: str) -> bytes:
        return bytes(job.artifacts.get(kind, b""))

    def stored(self, job: JobRecord, kind: str) -> pb.ArtifactState:
        size, digest = job.complete.get(kind, (0, b""))
        return pb.ArtifactState(
            job_id=id_of(job.manifest_envelope),
            kind=kind,
            committed=len(job.artifacts.get(kind, b"")),
            complete=kind in job.complete,
            size=size,
            sha256=digest,
        )

    def history(self, job: JobRecord) -> list[pb.JobEvent]:
        return list(job.events)

    # -- the services -------------------------------------------------------------------------------------------------

    async def Describe(self, request: pb.DescribeClusterRequest, context: Any) -> pb.DescribeClusterResponse:
        health = [
            pb.CustodianHealth(custodian=name, reachable=name not in self.down, circuit="closed", latency_ms=1.5)
            for name in self.world.custodians
        ]
        return pb.DescribeClusterResponse(roster=self.roster(), custodians=health, version="0.1.0")

    async def Status(self, request: pb.ClusterStatusRequest, context: Any) -> pb.ClusterStatusResponse:
        now = int(time.time())
        message = pb.ClusterStatusResponse(roster=self.roster(), version="0.1.0", now=now)
        for key_id, envelope in self.certificates.items():
            payload = peek_payload(envelope, CERTIFICATE_TYPE, "certificate")
            digest = hashlib.sha256(payload).hexdigest()
            message.epochs.add(key_id=key_id, epoch=1, state="active", certificate_digest=digest)
        held = [
            custodian_pb.KeyEpoch(
                key_id=each.key_id, epoch=each.epoch, state="active", certificate_digest=each.certificate_digest
            )
            for each in message.epochs
        ]
        for name in self.world.custodians:
            message.custodians.add(
                health=pb.CustodianHealth(custodian=name, reachable=name not in self.down, circuit="closed"),
                described=custodian_pb.DescribeResponse(custodian=name, now=now, keys=held),
                described_at=now,
            )
        return message

    async def RunCeremony(self, request: pb.RunCeremonyRequest, context: Any) -> AsyncIterator[pb.CeremonyEvent]:
        plan = CeremonyPlan.parse(open_envelope(request.plan, PLAN_TYPE, self.world.operator.public, "plan"))
        if plan.key_id in self.certificates:
            raise StateError(Reason.EXISTS, f"key {plan.key_id} is there already")
        for step in ("propose", "deliver", "confirm", "activate"):
            yield pb.CeremonyEvent(ceremony_id=plan.ceremony_id, step=step, done=5, total=5)
        self.certificates[plan.key_id] = self.world.certify(plan)
        certificate = self.certificates[plan.key_id]
        ran = pb.Ceremony(
            ceremony_id=plan.ceremony_id, kind=plan.kind, key_id=plan.key_id, epoch=plan.epoch, step="done"
        )
        ran.plan = request.plan
        self.ceremonies.append(ran)
        yield pb.CeremonyEvent(ceremony_id=plan.ceremony_id, step="done", done=5, total=5, certificate=certificate)

    async def ListCeremonies(self, request: pb.ListCeremoniesRequest, context: Any) -> pb.ListCeremoniesResponse:
        ran = [each for each in self.ceremonies if request.key_id in ("", each.key_id)]
        return pb.ListCeremoniesResponse(ceremonies=ran[::-1])

    async def CancelCeremony(self, request: pb.CancelCeremonyRequest, context: Any) -> pb.Ceremony:
        for each in self.ceremonies:
            if each.ceremony_id == request.ceremony_id and each.step != "done":
                each.step = "cancelled"
                return each
        raise StateError(Reason.NOT_FOUND, "no such ceremony")

    async def ListEpochs(self, request: pb.GetKeyRequest, context: Any) -> pb.ListKeysResponse:
        return pb.ListKeysResponse(keys=[self.key_message(request.key_id)])

    async def List(self, request: Any, context: Any) -> Any:
        if isinstance(request, pb.ListKeysRequest):
            return pb.ListKeysResponse(keys=[self.key_message(name) for name in sorted(self.certificates)])
        return pb.ListJobsResponse(jobs=[self.job_message(job) for job in self.jobs.values()])

    async def Get(self, request: Any, context: Any) -> Any:
        if isinstance(request, pb.GetKeyRequest):
            return self.key_message(request.key_id, request.epoch)
        return self.job_message(self._job(request.job_id))

    async def Derive(self, request: pb.DeriveRequest, context: Any) -> AsyncIterator[pb.AnswerEvent]:
        self.seen.append(request.SerializeToString())
        asked = open_asked(request.request, self.world.owner.public)
        binding, recipient = asked.binding(), asked.document.owner_hpke
        leaf = Leaf(
            job_id=binding.job_id,
            manifest_sha256=binding.subject.hex(),
            recipient_sha256=hashlib.sha256(recipient).hexdigest(),
            evidence_sha256=Leaf.NO_EVIDENCE,
            key_id=binding.key_id,
            epoch=binding.epoch,
            time=int(self.clock()),
            recipient="owner",
        )
        yield pb.AnswerEvent(leaf=leaf.to_bytes(), leaf_proof=self.leaf_proof(leaf.to_bytes()))
        for event in self.shares(request.request, leaf, recipient):
            yield event

    def _job(self, job_id: str) -> JobRecord:
        if job_id not in self.jobs:
            raise StateError(Reason.NOT_FOUND, f"there is no job {job_id}")
        return self.jobs[job_id]

    def _move(self, job: JobRecord, state: str, detail: str = "") -> None:
        job.state = state
        job.events.append(pb.JobEvent(sequence=len(job.events) + 1, time=3, state=state, detail=detail))

    async def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.Job:
        self.seen.append(request.SerializeToString())
        manifest, payload = open_manifest(request.manifest, self.world.owner.public)
        job = self.jobs.setdefault(id_of(request.manifest), JobRecord(request.manifest, manifest, payload))
        if not job.events:
            self._move(job, "submitted")
        return self.job_message(job)

    async def Open(self, request: pb.OpenRequest, context: Any) -> AsyncIterator[pb.AnswerEvent]:
        self.opens += 1
        self.asked.set()
        job = self._job(request.job_id)
        if job.state == "submitted":
            self._move(job, "opened")
        async for event in self.open_events(job):
            self.seen.append(event.SerializeToString())
            job.open_answers.append(event)
            yield event

    async def Commit(self, request: pb.CommitRequest, context: Any) -> pb.Job:
        self.seen.append(request.SerializeToString())
        job = self._job(request.job_id)
        job.opening = request.opening
        self._move(job, "ready")
        response = self.job_message(job)
        self._move(job, "claimed", "w-1")
        try:
            self.work(job)
        except KeyquorumError as error:
            job.error = error
            self._move(job, "failed", error.message)
        return response

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.JobEvent]:
        for event in self.history(self._job(request.job_id)):
            if event.sequence > request.after:
                yield event
                if self.break_watch:
                    self.break_watch = False
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")

    async def Cancel(self, request: pb.CancelJobRequest, context: Any) -> pb.Job:
        job = self._job(request.job_id)
        self._move(job, "cancelled", request.why)
        return self.job_message(job)

    async def GetOutcome(self, request: pb.GetOutcomeRequest, context: Any) -> pb.Outcome:
        out = self.outcome(self._job(request.job_id))
        self.seen.append(out.SerializeToString())
        return out

    async def GetRelease(self, request: pb.GetOutcomeRequest, context: Any) -> pb.Outcome:
        return await self.GetOutcome(request, context)

    async def GetTelemetry(self, request: pb.GetTelemetryRequest, context: Any) -> AsyncIterator[pb.TelemetryBatch]:
        for batch in self.telemetry(self._job(request.job_id)):
            self.seen.append(batch.SerializeToString())
            yield batch

    async def Stat(self, request: pb.StatArtifactRequest, context: Any) -> pb.ArtifactState:
        return self.stored(self._job(request.job_id), request.kind)

    async def Upload(self, request_iterator: Any, context: Any) -> pb.ArtifactState:
        job, kind, data = None, "", bytearray()
        async for chunk in request_iterator:
            part = chunk.WhichOneof("part")
            if part == "start":
                kind = chunk.start.kind
                job = self._job(chunk.start.job_id)
                data = job.artifacts.setdefault(kind, bytearray())
                assert chunk.start.offset == len(data)
            elif part == "data":
                self.seen.append(chunk.data)
                data += chunk.data
                if 0 <= self.break_upload_at < len(data):
                    self.break_upload_at = -1
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
            else:
                assert job is not None
                job.complete[kind] = (len(data), hashlib.sha256(data).digest())
        assert job is not None
        return self.stored(job, kind)

    async def Download(self, request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.DownloadChunk]:
        data = self.artifact(self._job(request.job_id), request.kind)
        for start in range(request.offset, len(data), 1000):
            if 0 <= self.break_download_at < start:
                self.break_download_at = -1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
            yield pb.DownloadChunk(data=data[start : start + 1000])


def share(answer: Answer, window_statement: bytes) -> pb.AnswerEvent:
    return pb.AnswerEvent(
        answer=custodian_pb.ReleaseAnswer(
            custodian=answer.custodian,
            share=custodian_pb.Share(
                key_id=answer.key_id,
                epoch=answer.epoch,
                window=answer.window,
                sealed=answer.sealed,
                signature=answer.signature,
            ),
        ),
        window_statement=window_statement,
    )


def refusal(custodian: str, error: KeyquorumError) -> pb.AnswerEvent:
    return pb.AnswerEvent(answer=custodian_pb.ReleaseAnswer(custodian=custodian, refusal=to_status(error)))


def unreachable(custodian: str) -> KeyquorumError:
    return UnavailableError(Reason.UNAVAILABLE, f"{custodian} could not be reached")


@asynccontextmanager
async def serving(
    coordinator: FakeCoordinator,
    further: Callable[[grpc.aio.Server], None] = lambda server: None,
    address: str = "127.0.0.1:0",
) -> AsyncIterator[str]:
    """Serve over mTLS, on a free port unless an ``address`` is given, with ``further`` services; yields the address."""

    def report(method: str, reference: str, error: BaseException) -> None:
        raise AssertionError(f"{method} failed") from error

    server = grpc.aio.server(interceptors=[Guard(CLUSTER, ROLES, report=report)], options=server_options())
    rpc.add_ClusterServicer_to_server(coordinator, server)
    rpc.add_KeysServicer_to_server(coordinator, server)
    rpc.add_JobsServicer_to_server(coordinator, server)
    rpc.add_ArtifactsServicer_to_server(coordinator, server)
    further(server)
    world = coordinator.world
    credentials = server_credentials(world.coordinator_tls, [world.authority.identity.certificate])
    port = server.add_secure_port(address, credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
