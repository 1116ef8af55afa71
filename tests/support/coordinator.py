"""A coordinator for tests, in this process or as one of its own, with callers and documents for it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from keyquorum_coordinator.config import CoordinatorConfig, load_config, load_trust
from keyquorum_coordinator.init import initialise, issue_certificate
from keyquorum_coordinator.jobs import NewJob
from keyquorum_coordinator.objects import ObjectStorage
from keyquorum_coordinator.server import CoordinatorServer
from keyquorum_core.ceremony_plan import PLAN_TYPE, CeremonyPlan, new_ceremony_id
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.ledger.leaves import NO_POLICY, JobSubmitted
from keyquorum_core.manifest import (
    ArtifactDigest,
    Manifest,
    Opening,
    Resources,
    ResultStatement,
    Subject,
    job_id,
    payload,
    sign_manifest,
    sign_opening,
    sign_result,
)
from keyquorum_core.release import WINDOW_TYPE, Window
from keyquorum_core.roster import Roster, sign_roster
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity, peek_payload, sign
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.v1 import coordinator_pb2_grpc as rpc
from keyquorum_protos.v1 import drills_pb2_grpc
from keyquorum_protos.wire.errors import from_rpc_error
from keyquorum_protos.wire.tls import TlsIdentity, dns_name, open_channel
from tests.support import policies
from tests.support.custodian import Committee
from tests.support.fake_custodian import CLUSTER, FakeCommittee
from tests.support.vendor import evidence_document


@dataclass
class Owner:
    """Signs manifests and openings; ``name`` is that of its certificate."""

    name: str = "alice"
    identity: Identity = field(default_factory=Identity.generate)
    recipient: RecipientKey = field(default_factory=RecipientKey.generate)

    def manifest(self, **changes: Any) -> tuple[str, bytes]:
        """(job id, envelope) of a fresh job."""
        now = int(time.time())
        values: dict[str, Any] = {
            "subjects": (Subject("job.py", secrets.token_hex(32)),),
            "key_id": "k1",
            "epoch": 1,
            "classification": "internal",
            "export_control": "",
            "regions": ("CH",),
            "evidence_types": ("sev-snp",),
            "resources": Resources(1, 256, 0, 60, 16),
            "owner": self.name,
            "owner_identity": self.identity.public,
            "owner_hpke": self.recipient.public,
            "entrypoint": ("python", "job.py"),
            "not_before": now - 10,
            "not_after": now + 3600,
            "issued_at": now - 10,
            "nonce": secrets.token_hex(16),
        }
        manifest = Manifest(**(values | changes))
        return job_id(payload(manifest)), sign_manifest(manifest, self.identity)

    def opening(self, job: str, bundle: bytes) -> bytes:
        opening = Opening(job, secrets.token_hex(16), hashlib.sha256(bundle).hexdigest(), len(bundle), True)
        return sign_opening(opening, self.identity)


@dataclass
class Worker:
    """A worker's keys for one job: development evidence, and statements."""

    identity: Identity = field(default_factory=Identity.generate)
    recipient: RecipientKey = field(default_factory=RecipientKey.generate)

    def evidence(self, statements: Iterable[bytes]) -> bytes:
        windows = [Window.parse(peek_payload(each, WINDOW_TYPE, "window")) for each in statements]
        return evidence_document(
            {window.custodian: (window.window, window.nonce_bytes) for window in windows},
            hpke_key=self.recipient.public,
            signing_key=self.identity.public.to_bytes(),
        )

    def statement(self, job: str, outcome: str = "completed", **artifacts: bytes) -> bytes:
        digests = {k: ArtifactDigest(hashlib.sha256(v).hexdigest(), len(v)) for k, v in artifacts.items()}
        now = int(time.time())
        fingerprint = self.identity.public.fingerprint
        code, why = (0, "") if outcome == "completed" else (1, "it said no")
        return sign_result(ResultStatement(job, fingerprint, code, outcome, why, digests, now, now), self.identity)


def new_job(job: str = "a" * 26, manifest: bytes = b"manifest", not_after: int = 1 << 40) -> NewJob:
    """What admission makes of a manifest, without one."""
    leaf = JobSubmitted(
        **NO_POLICY.members(),  # type: ignore[arg-type]
        job_id=job,
        manifest_sha256="0" * 64,
        owner_sha256="1" * 64,
        key_id="k1",
        epoch=1,
        classification="internal",
        export_control="",
        regions=("CH",),
        time=1,
    )
    return NewJob(job, "alice", "f" * 64, "k1", 1, manifest, not_after, leaf)


def plan_envelope(committee: FakeCommittee, key_id: str = "k2", **changes: Any) -> bytes:
    values: dict[str, Any] = {
        "ceremony_id": new_ceremony_id(),
        "key_id": key_id,
        "epoch": 1,
        "suite": "MLKEM768_X25519",
        "cluster": CLUSTER,
        "roster_digest": committee.roster.digest,
        "quorum": committee.roster.quorum_of(),
        "created_at": int(time.time()),
    }
    signer = changes.pop("signer", committee.operator)
    return sign(signer, PLAN_TYPE, CeremonyPlan(**(values | changes)).to_payload())


def make_folder(directory: Path, committee: FakeCommittee | Committee, **changes: Any) -> CoordinatorConfig:
    """A folder as ``init`` makes it, with the committee's roster; the coordinator has the identity that it names."""
    if isinstance(committee, FakeCommittee):
        tls, operator = committee.coordinator, committee.operator
    else:
        tls, operator = committee.coordinator_tls, committee.operator.identity
    config = CoordinatorConfig(directory, "main", CLUSTER, "127.0.0.1:0", "")
    config = initialise(config, now=int(time.time()), signer=committee.log)
    config.path(config.tls_certificate).write_bytes(tls.certificate)
    config.path(config.tls_key).write_bytes(tls.key)
    write_roster(config, committee.roster, operator)
    bundle = policies.bundle([operator], cluster=CLUSTER)
    (directory / config.bulletins / "policy.json").write_bytes(bundle)
    with (directory / "coordinator.toml").open("a") as file:
        for name, value in changes.items():
            file.write(f"{name} = {json.dumps(value)}\n")
    return load_config(directory)


def write_roster(config: CoordinatorConfig, roster: Roster, operator: Identity) -> None:
    operators = {roster.operators[0].name: base64.b64encode(operator.public.to_bytes()).decode()}
    config.path(config.operators).write_text(json.dumps({"threshold": 1, "operators": operators}))
    config.path(config.roster).write_bytes(sign_roster(roster, [operator]))


class Caller:
    """Stubs of one caller, over mTLS."""

    def __init__(self, config: CoordinatorConfig, role: str, name: str) -> None:
        out = config.directory / "callers" / role
        if not (out / f"{name}-cert.pem").exists():
            issue_certificate(config.directory, role, name, out, now=int(time.time()))
        identity = TlsIdentity((out / f"{name}-cert.pem").read_bytes(), (out / f"{name}-key.pem").read_bytes())
        roots = [config.path(config.tls_certificate).read_bytes()]
        self.channel = open_channel(config.listen, identity, roots, dns_name(CLUSTER, "coordinator", "main"))
        self.cluster = rpc.ClusterStub(self.channel)
        self.keys = rpc.KeysStub(self.channel)
        self.jobs = rpc.JobsStub(self.channel)
        self.artifacts = rpc.ArtifactsStub(self.channel)
        self.workers = rpc.WorkersStub(self.channel)
        self.revocations = rpc.RevocationsStub(self.channel)
        self.drills = drills_pb2_grpc.DrillsStub(self.channel)

    async def upload(self, job: str, kind: str, data: bytes, offset: int = 0, piece: int = 1 << 20) -> pb.ArtifactState:
        async def chunks() -> Any:
            yield pb.UploadChunk(start=pb.UploadStart(job_id=job, kind=kind, offset=offset))
            for start in range(offset, len(data), piece):
                yield pb.UploadChunk(data=data[start : start + piece])
            yield pb.UploadChunk(finish=pb.UploadFinish(size=len(data), sha256=hashlib.sha256(data).digest()))

        return await self.artifacts.Upload(chunks())

    async def download(self, job: str, kind: str, offset: int = 0) -> bytes:
        call = self.artifacts.Download(pb.DownloadRequest(job_id=job, kind=kind, offset=offset))
        return b"".join([chunk.data async for chunk in call])

    async def stat(self, job: str, kind: str) -> pb.ArtifactState:
        return await self.artifacts.Stat(pb.StatArtifactRequest(job_id=job, kind=kind))

    async def open(self, job: str) -> list[pb.AnswerEvent]:
        return [event async for event in self.jobs.Open(pb.OpenRequest(job_id=job, request_id="mine"))]

    async def release(self, job: str, evidence: bytes) -> list[pb.AnswerEvent]:
        request = pb.WorkerReleaseRequest(job_id=job, request_id="mine", evidence=evidence)
        return [event async for event in self.workers.Release(request)]

    async def watch(self, job: str, after: int = 0) -> list[pb.JobEvent]:
        return [event async for event in self.jobs.Watch(pb.WatchRequest(job_id=job, after=after))]

    async def report(self, job: str, state: str, detail: str = "") -> bool:
        answer = await self.workers.Report(pb.ReportRequest(job_id=job, state=state, detail=detail))
        return answer.proceed

    async def close(self) -> None:
        await self.channel.close()


@dataclass
class Running:
    """A coordinator in this process with its committee, fake or real."""

    config: CoordinatorConfig
    committee: FakeCommittee | Committee
    server: CoordinatorServer
    callers: list[Caller] = field(default_factory=list)

    @classmethod
    async def start(
        cls,
        directory: Path,
        committee: FakeCommittee | Committee,
        *,
        clock: Callable[[], float] = time.time,
        objects: ObjectStorage | None = None,
        **changes: Any,
    ) -> Running:
        config = make_folder(directory, committee, **changes)
        return await cls.again(config, committee, clock=clock, objects=objects)

    @classmethod
    async def again(cls, config: CoordinatorConfig, committee: FakeCommittee | Committee, **options: Any) -> Running:
        server = CoordinatorServer(config, load_trust(config, int(time.time())), **options)
        await server.start()
        await server.fanout.ready()
        return cls(config, committee, server)

    def caller(self, role: str, name: str) -> Caller:
        caller = Caller(self.config, role, name)
        self.callers.append(caller)
        return caller

    async def stop(self) -> None:
        for caller in self.callers:
            await caller.close()
        await self.server.stop(1)


class Process:
    """``keyquorum-coordinator serve`` as a process of its own, which can be killed."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self.config = config
        self.command: tuple[str, ...] = ("-m", "keyquorum_coordinator", "serve", "--dir", str(config.directory))
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> dict[str, Any]:
        """Returns what it announces."""
        environment = {**os.environ, "GRPC_VERBOSITY": "NONE"}
        with (self.config.directory / "stderr.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self.command,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), 20)
        assert line, (self.config.directory / "stderr.log").read_text()
        announced: dict[str, Any] = json.loads(line)
        return announced

    async def kill(self) -> None:
        await self._end(signal.SIGKILL)

    async def terminate(self) -> int:
        return await self._end(signal.SIGTERM)

    async def ended(self) -> int:
        """Once it has, by itself: how."""
        assert self._process is not None
        return await self._process.wait()

    async def _end(self, number: signal.Signals) -> int:
        process = self._process
        if process is None:
            return 0
        if process.returncode is None:
            # Not process.send_signal: it polls, and would reap a process that just ended under asyncio's child watcher.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        code = await asyncio.wait_for(process.wait(), 20)
        process._transport.close()  # type: ignore[attr-defined]
        self._process = None
        return code


async def run_job(owner: Owner, as_owner: Caller, bundle: bytes = b"bundle" * 1000) -> str:
    """Submit, open, upload and commit a job: it is ready."""
    job, manifest = owner.manifest()
    await as_owner.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    await as_owner.open(job)
    await as_owner.upload(job, "bundle", bundle)
    await as_owner.jobs.Commit(pb.CommitRequest(job_id=job, opening=owner.opening(job, bundle)))
    return job


async def claim(as_worker: Caller, job: str = "", wait: int = 0) -> pb.Job:
    answer = await as_worker.workers.Claim(pb.ClaimRequest(job_id=job, wait_seconds=wait))
    return answer.job


async def refusal(call: Awaitable[Any]) -> KeyquorumError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value, "coordinator")


async def submit(alice: Caller, owner: Owner, **changes: Any) -> str:
    job, manifest = owner.manifest(**changes)
    answer = await alice.jobs.Submit(pb.SubmitRequest(manifest=manifest))
    assert (answer.job_id, answer.state, answer.manifest) == (job, "submitted", manifest)
    return job
