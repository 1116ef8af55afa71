"""The coordinator's gRPC services: protobuf to domain values and back. They decide nothing.

Who may call which method is the guard's (:data:`ROLES`); whose job it is, :class:`Desk`'s. Raised errors become
statuses in the guard.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from keyquorum_coordinator import __version__
from keyquorum_coordinator.artifacts import CHUNK, Upload
from keyquorum_coordinator.desk import Desk
from keyquorum_coordinator.fanout import Arrival
from keyquorum_coordinator.messages import (
    artifact_message,
    ceremony_event,
    ceremony_message,
    event_message,
    health_messages,
    job_message,
    key_message,
    outcome_message,
    revocations_message,
)
from keyquorum_coordinator.releases import Shown
from keyquorum_coordinator.standing import Standing
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.v1 import coordinator_pb2_grpc as rpc
from keyquorum_protos.wire.errors import from_status
from keyquorum_protos.wire.guard import ANY_ROLE, peer_of

__all__ = [
    "ROLES",
    "ArtifactsService",
    "ClusterService",
    "JobsService",
    "KeysService",
    "RevocationsService",
    "WorkersService",
]

_S = "/keyquorum.v1."
ROLES = {
    f"{_S}Cluster/Describe": ANY_ROLE,
    f"{_S}Cluster/Status": frozenset({"owner", "operator", "coordinator"}),
    f"{_S}Keys/List": frozenset({"owner", "operator"}),
    f"{_S}Keys/Get": frozenset({"owner", "operator"}),
    f"{_S}Keys/ListEpochs": frozenset({"owner", "operator"}),
    f"{_S}Keys/ListCeremonies": frozenset({"operator"}),
    f"{_S}Keys/RunCeremony": frozenset({"operator"}),
    f"{_S}Keys/CancelCeremony": frozenset({"operator"}),
    f"{_S}Keys/Derive": frozenset({"owner"}),
    f"{_S}Jobs/": frozenset({"owner"}),
    f"{_S}Artifacts/": frozenset({"owner", "worker"}),
    f"{_S}Workers/": frozenset({"worker"}),
    f"{_S}Revocations/": frozenset({"operator"}),
    "/grpc.health.v1.Health/": ANY_ROLE,
    "/grpc.reflection.v1alpha.ServerReflection/": ANY_ROLE,
}

# What grpc.aio calls these methods with does not match the generated signatures' unions; each is annotated as used.
Context = Any


class ClusterService(rpc.ClusterServicer):
    def __init__(self, desk: Desk, standing: Standing) -> None:
        self._desk = desk
        self._standing = standing

    async def Describe(self, request: pb.DescribeClusterRequest, context: Context) -> pb.DescribeClusterResponse:
        return pb.DescribeClusterResponse(
            roster=self._desk.roster_envelope, custodians=health_messages(self._desk.fanout), version=__version__
        )

    async def Status(self, request: pb.ClusterStatusRequest, context: Context) -> pb.ClusterStatusResponse:
        return await self._standing.status()


class KeysService(rpc.KeysServicer):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def RunCeremony(self, request: pb.RunCeremonyRequest, context: Context) -> AsyncIterator[pb.CeremonyEvent]:
        async with aclosing(self._desk.ceremonies.run(request.plan)) as steps:
            async for progress in steps:
                yield ceremony_event(progress)

    async def ListCeremonies(self, request: pb.ListCeremoniesRequest, context: Context) -> pb.ListCeremoniesResponse:
        records = await self._desk.ceremonies.records(request.key_id)
        return pb.ListCeremoniesResponse(ceremonies=[ceremony_message(each) for each in records])

    async def CancelCeremony(self, request: pb.CancelCeremonyRequest, context: Context) -> pb.Ceremony:
        return ceremony_message(await self._desk.ceremonies.cancel(request.ceremony_id, request.why))

    async def List(self, request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:
        newest = await self._desk.ceremonies.keys(certificates=True, newest=True)
        return pb.ListKeysResponse(keys=[key_message(each) for each in newest])

    async def Get(self, request: pb.GetKeyRequest, context: Context) -> pb.Key:
        return key_message(await self._desk.ceremonies.key(request.key_id, request.epoch))

    async def ListEpochs(self, request: pb.GetKeyRequest, context: Context) -> pb.ListKeysResponse:
        await self._desk.ceremonies.key(request.key_id)
        epochs = await self._desk.ceremonies.keys(request.key_id, certificates=True)
        return pb.ListKeysResponse(keys=[key_message(each) for each in epochs])

    async def Derive(self, request: pb.DeriveRequest, context: Context) -> AsyncIterator[pb.AnswerEvent]:
        async with aclosing(self._desk.derive(peer_of(context), request.request)) as answers:
            async for event in _answer_events(answers, request.request_id):
                yield event


class RevocationsService(rpc.RevocationsServicer):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def Accept(self, request: pb.AcceptRevocationsRequest, context: Context) -> pb.RevocationsState:
        changed = await self._desk.withdrawals.accept(request.document)
        await self._desk.withdrawals.relay_once()
        return revocations_message(
            await self._desk.withdrawals.document(), self._desk.fanout, self._desk.withdrawals.problems, changed
        )

    async def Get(self, request: pb.GetRevocationsRequest, context: Context) -> pb.RevocationsState:
        return revocations_message(
            await self._desk.withdrawals.document(), self._desk.fanout, self._desk.withdrawals.problems
        )


class JobsService(rpc.JobsServicer):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.Job:
        return job_message(await self._desk.submit(peer_of(context), request.manifest))

    async def Open(self, request: pb.OpenRequest, context: Context) -> AsyncIterator[pb.AnswerEvent]:
        async with aclosing(self._desk.open(peer_of(context), request.job_id)) as answers:
            async for event in _answer_events(answers, request.request_id):
                yield event

    async def Commit(self, request: pb.CommitRequest, context: Context) -> pb.Job:
        return job_message(await self._desk.commit(peer_of(context), request.job_id, request.opening))

    async def Get(self, request: pb.GetJobRequest, context: Context) -> pb.Job:
        return job_message(await self._desk.owned(peer_of(context), request.job_id))

    async def List(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        jobs = await self._desk.jobs.of_owner(peer_of(context).name, min(request.limit or 100, 1000))
        return pb.ListJobsResponse(jobs=[job_message(job) for job in jobs])

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.JobEvent]:
        async with aclosing(self._desk.watch(peer_of(context), request.job_id, request.after)) as events:
            async for event in events:
                yield event_message(event)

    async def Cancel(self, request: pb.CancelJobRequest, context: Context) -> pb.Job:
        job = await self._desk.owned(peer_of(context), request.job_id)
        return job_message(await self._desk.jobs.cancel(job.job_id, request.why))

    async def GetOutcome(self, request: pb.GetOutcomeRequest, context: Context) -> pb.Outcome:
        return outcome_message(*await self._desk.outcome(peer_of(context), request.job_id))

    async def GetRelease(self, request: pb.GetOutcomeRequest, context: Context) -> pb.Outcome:
        return outcome_message(*await self._desk.release_of(peer_of(context), request.job_id))

    async def GetTelemetry(self, request: pb.GetTelemetryRequest, context: Context) -> AsyncIterator[pb.TelemetryBatch]:
        async with aclosing(self._desk.telemetry_of(peer_of(context), request.job_id)) as batches:
            async for each in batches:
                yield pb.TelemetryBatch(
                    worker=each.worker,
                    statement=each.statement,
                    content=each.content,
                    leaf=each.leaf,
                    leaf_proof=each.leaf_proof,
                )


class ArtifactsService(rpc.ArtifactsServicer):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def Stat(self, request: pb.StatArtifactRequest, context: Context) -> pb.ArtifactState:
        await self._desk.may_stat(peer_of(context), request.job_id)
        return artifact_message(await self._desk.artifacts.state(request.job_id, request.kind))

    async def Upload(self, request_iterator: AsyncIterator[pb.UploadChunk], context: Context) -> pb.ArtifactState:
        peer = peer_of(context)
        upload: Upload | None = None
        try:
            async for chunk in request_iterator:
                part = chunk.WhichOneof("part")
                if upload is None:
                    if part != "start":
                        raise MalformedError(Reason.MALFORMED, "an upload must begin with a start", actual=part)
                    start = chunk.start
                    right = await self._desk.may_upload(peer, start.job_id, start.kind)
                    upload = await self._desk.artifacts.upload(start.job_id, start.kind, start.offset, right)
                elif part == "data":
                    await upload.write(chunk.data)
                    if peer.role == "worker":
                        self._desk.jobs.touch(upload.job_id, peer.name)
                elif part == "finish":
                    return artifact_message(await upload.finish(chunk.finish.size, chunk.finish.sha256))
                else:
                    raise MalformedError(Reason.MALFORMED, "unexpected message in an upload", actual=part)
            raise MalformedError(Reason.MALFORMED, "the upload ended without a finish", expected="finish")
        finally:
            if upload is not None:
                upload.close()

    async def Download(self, request: pb.DownloadRequest, context: Context) -> AsyncIterator[pb.DownloadChunk]:
        peer = peer_of(context)
        await self._desk.may_download(peer, request.job_id, request.kind)
        pieces = self._desk.artifacts.download(request.job_id, request.kind, request.offset)
        async with aclosing(pieces) as stream:
            async for data in stream:
                assert len(data) <= CHUNK  # noqa: S101 - the promise of artifacts.download
                yield pb.DownloadChunk(data=data)
                if peer.role == "worker":
                    self._desk.jobs.touch(request.job_id, peer.name)


class WorkersService(rpc.WorkersServicer):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def Claim(self, request: pb.ClaimRequest, context: Context) -> pb.ClaimResponse:
        job = await self._desk.claim(peer_of(context), request.job_id, request.wait_seconds)
        message = job_message(job)
        handed = await self._desk.handed(job)
        if handed is not None:
            message.certificate = handed.certificate
            message.rosters.extend(handed.rosters)
        return pb.ClaimResponse(job=message)

    async def GetChallenge(self, request: pb.GetChallengeRequest, context: Context) -> pb.GetChallengeResponse:
        return pb.GetChallengeResponse(window_statements=await self._desk.challenge(peer_of(context), request.job_id))

    async def Release(self, request: pb.WorkerReleaseRequest, context: Context) -> AsyncIterator[pb.AnswerEvent]:
        async with aclosing(
            self._desk.release(peer_of(context), request.job_id, request.evidence, request.presentation)
        ) as answers:
            async for event in _answer_events(answers, request.request_id):
                yield event

    async def Report(self, request: pb.ReportRequest, context: Context) -> pb.ReportResponse:
        peer = peer_of(context)
        return pb.ReportResponse(
            proceed=await self._desk.jobs.report(request.job_id, peer.name, request.state, request.detail)
        )

    async def Telemetry(self, request: pb.TelemetryRequest, context: Context) -> pb.TelemetryResponse:
        peer = peer_of(context)
        await self._desk.telemetry.take(peer.name, request.job_id, request.statement, request.content)
        return pb.TelemetryResponse()

    async def Complete(self, request: pb.CompleteRequest, context: Context) -> pb.Job:
        error = from_status(request.error) if request.HasField("error") else None
        return job_message(await self._desk.complete(peer_of(context), request.job_id, request.statement, error))


async def _answer_events(
    answers: AsyncIterator[tuple[Shown, Arrival]], request_id: str
) -> AsyncIterator[pb.AnswerEvent]:
    """Answers under the caller's own request id; the leaf and the ledger's proof of it go with the first."""
    first = True
    async for shown, arrival in answers:
        event = pb.AnswerEvent(answer=arrival.answer, window_statement=arrival.window_statement)
        event.answer.request_id = request_id
        if first:
            event.leaf, event.leaf_proof = shown.leaf, shown.proof
            first = False
        yield event
