"""A committee and a coordinator as a worker sees them: the real services over real TLS, all in this process.

The five custodians have real seeds, identities and windows and answer as real ones do, short of the gate; the
coordinator's side keeps jobs and ciphertext in memory. Malicious twins override one method each: the hooks are the
methods without an underscore.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keyquorum_core.artifact import binding, decrypt_stream, encrypt_stream
from keyquorum_core.attestation.appraisal import Appraisal, appraise
from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.bundle import read_bundle, write_bundle
from keyquorum_core.derivation import DerivedKey, context, contributions, key_check, root
from keyquorum_core.errors import KeyquorumError, Reason, StateError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_core.ledger.witness_keys import witness_name
from keyquorum_core.manifest import (
    Manifest,
    Opening,
    Resources,
    ResultStatement,
    Subject,
    job_id,
    open_result,
    payload,
    sign_manifest,
    sign_opening,
    subject,
)
from keyquorum_core.release import (
    Answer,
    Leaf,
    LeaseTerms,
    encode_share,
    make_nonce,
    make_window,
    share_info,
    sign_answer,
    sign_window,
    window_of,
)
from keyquorum_core.roster import Operator, Roster, RosterCustodian, sign_roster
from keyquorum_core.sealing import RecipientKey, seal
from keyquorum_core.signing import Identity, PublicIdentity
from keyquorum_core.telemetry import Chain, Record, open_records
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.v1 import coordinator_pb2_grpc as rpc
from keyquorum_protos.v1 import custodian_pb2
from keyquorum_protos.wire.errors import from_status, to_status
from keyquorum_protos.wire.guard import Guard
from keyquorum_protos.wire.tls import CertificateAuthority, self_signed, server_credentials, server_options
from tests.support.ledger import MemoryLog
from tests.support.vendor import MEASUREMENT, development_chip, inventory, reference_values

CLUSTER = "demo"
MEMBERS = (("ch-1", "CH"), ("ch-2", "CH"), ("de-1", "DE"), ("is-1", "IS"), ("jp-1", "JP"))
RULE = {"at_least": 3, "jurisdictions": 2}
KEY, EPOCH = "k1", 1
RESOURCES = Resources(cpus=1, memory_mib=256, gpus=0, wall_seconds=20, output_mib=8)


class Custodian:
    """One custodian with its seeds; ``refusal`` is what it answers instead of a share."""

    def __init__(self, name: str, jurisdiction: str) -> None:
        self.name = name
        self.jurisdiction = jurisdiction
        self.identity = Identity.generate()
        self.recipient = RecipientKey.generate()
        self.cosigner = Cosigner.generate(witness_name(CLUSTER, name))
        self.answer_key = Ed25519PrivateKey.generate()
        self.tls = self_signed(CLUSTER, "custodian", name, now=int(time.time()))
        self.boot_secret = secrets.token_bytes(32)
        self.seeds: dict[int, bytes] = {}
        self.refusal: KeyquorumError | None = None
        self.lease = LeaseTerms(3600, 1800)

    def entry(self) -> RosterCustodian:
        return RosterCustodian(
            self.name,
            self.jurisdiction,
            f"{self.name}.example:7400",
            self.identity.public,
            self.recipient.public,
            self.tls.certificate.decode(),
            self.cosigner.witness_key,
        )

    def window(self, now: int) -> bytes:
        public = self.answer_key.public_key().public_bytes_raw()
        return sign_window(make_window(CLUSTER, self.name, window_of(now), self.boot_secret, public), self.identity)

    def contributions(self, subject: bytes) -> dict[int, bytes]:
        return contributions(self.seeds, context(KEY, EPOCH, "job", subject))

    def answer(self, subject: bytes, leaf: Leaf, recipient: bytes, now: int) -> Answer:
        info = share_info(leaf.hash(), self.name, recipient)
        sealed = seal(recipient, encode_share(self.contributions(subject), self.lease), info)
        return sign_answer(self.answer_key, subject, leaf.hash(), self.name, KEY, EPOCH, window_of(now), sealed)


@dataclass
class FakeJob:
    """A job as the owner knows it."""

    id: str
    manifest: Manifest
    envelope: bytes
    subject: bytes
    key: DerivedKey
    opening: bytes
    bundle: bytes
    state: str = "ready"
    artifacts: dict[str, bytes] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    statement: bytes = b""
    error: KeyquorumError | None = None
    reports: list[str] = field(default_factory=list)
    evidence: list[bytes] = field(default_factory=list)
    telemetry: list[tuple[bytes, bytes]] = field(default_factory=list)
    reported: asyncio.Event = field(default_factory=asyncio.Event)

    async def reaches(self, state: str) -> None:
        """Wait until the worker reports it."""
        async with asyncio.timeout(60):
            while state not in self.reports:
                self.reported.clear()
                await self.reported.wait()

    def worker(self) -> PublicIdentity:
        """The signing key that the evidence of the last release binds."""
        return PublicIdentity.from_bytes(EvidenceDocument.parse(self.evidence[-1]).signing_key)

    def result(self) -> ResultStatement:
        """The statement, if it names what every owner asks for."""
        statement = open_result(self.statement, self.worker(), self.id)
        assert set(statement.artifacts) >= ({"result", "log"} if statement.outcome == "completed" else {"log"})
        return statement

    def records(self) -> tuple[Chain, list[Record]]:
        """The worker's telemetry, as its owner reads it."""
        chain = Chain(self.id, self.worker())
        out: list[Record] = []
        for statement, content in self.telemetry:
            batch = chain.take(statement)
            out += open_records(self.key.purpose_key("telemetry"), content, batch, self.worker().to_bytes())
        return chain, out

    def open_artifact(self, kind: str) -> bytes:
        """Plaintext of an artifact that the statement names."""
        data = self.artifacts[kind]
        named = self.result().artifacts[kind]
        assert (named.sha256, named.size) == (hashlib.sha256(data).hexdigest(), len(data))
        out = io.BytesIO()
        purpose = {"result": "result", "log": "telemetry"}[kind]
        bound = binding(self.id, kind, self.worker().to_bytes())
        decrypt_stream(self.key.purpose_key(purpose), io.BytesIO(data), out, bound)
        return out.getvalue()

    def log(self) -> str:
        return self.open_artifact("log").decode()

    def output(self) -> dict[str, bytes]:
        return {
            file.name: file.reader.readall() or b"" for file in read_bundle(io.BytesIO(self.open_artifact("result")))
        }


class FakeCluster(rpc.WorkersServicer, rpc.ArtifactsServicer):
    """``await FakeCluster.start()``; :meth:`submit` makes a job that is ready; :meth:`worker_dir` sets a worker up."""

    def __init__(self) -> None:
        now = int(time.time())
        self.custodians = {name: Custodian(name, country) for name, country in MEMBERS}
        self.operator = Identity.generate()
        self.owner = Identity.generate()
        self.owner_recipient = RecipientKey.generate()
        self.tls = self_signed(CLUSTER, "coordinator", "main", now=now)
        self.authority = CertificateAuthority.create(CLUSTER, now=now)
        self.log = LogSigner.generate(f"{CLUSTER}/ledger")
        self.roster = Roster(
            cluster=CLUSTER,
            version=1,
            issued_at=now - 60,
            expires_at=now + 86400,
            committee="main",
            custodians=tuple(each.entry() for each in self.custodians.values()),
            quorum=RULE,
            operators=(Operator("root", self.operator.public),),
            operator_threshold=1,
            coordinator_tls=(self.tls.certificate.decode(),),
            log_key=self.log.keys,
        )
        self.quorum = self.roster.quorum_of()
        self.seeds = {index: secrets.token_bytes(32) for index in range(self.quorum.seed_count)}
        for name, custodian in self.custodians.items():
            custodian.seeds = {index: self.seeds[index] for index in self.quorum.indices_of(name)}
        self.ledger = MemoryLog(self.log, self.now)
        self.jobs: dict[str, FakeJob] = {}
        self.proceed = True
        self.break_downloads = 0
        self.break_uploads = 0
        self.break_with = grpc.StatusCode.UNAVAILABLE
        self.break_calls = 0
        """Reports and Completes that end with ``break_with``."""
        self.lose_records = 0
        """How often the coordinator is killed before it wrote a release down."""
        self.hold_at = ""
        """The first call that gets there is never answered: claimed, attesting, downloading, running, uploading,
        completing."""
        self.held = asyncio.Event()
        self.calls: list[str] = []
        self.port = 0
        self._server: grpc.aio.Server | None = None
        self.unforeseen: list[BaseException] = []

    async def start(self) -> None:
        guard = Guard(
            CLUSTER,
            {f"/keyquorum.v1.{name}/": frozenset({"worker"}) for name in ("Workers", "Artifacts")},
            report=lambda method, reference, error: self.unforeseen.append(error),
        )
        self._server = grpc.aio.server(interceptors=[guard], options=server_options())
        rpc.add_WorkersServicer_to_server(self, self._server)
        rpc.add_ArtifactsServicer_to_server(self, self._server)
        credentials = server_credentials(self.tls, [self.authority.identity.certificate])
        self.port = self._server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    # -- what a test does ---------------------------------------------------------------------------------------------

    def worker_dir(self, directory: Path, *, scratch: Path | None = None, extra: str = "") -> Path:
        """A folder as an operator sets it up for a worker."""
        directory.mkdir(parents=True, exist_ok=True)
        operators = {"root": base64.b64encode(self.operator.public.to_bytes()).decode()}
        tls = self.authority.issue(CLUSTER, "worker", "gpu-1", now=int(time.time()))
        files = {
            "roster.json": sign_roster(self.roster, [self.operator]),
            "operators.json": json.dumps({"threshold": 1, "operators": operators}).encode(),
            "gpu-1-cert.pem": tls.certificate,
            "gpu-1-key.pem": tls.key,
            **{f"platform/{name}": data for name, data in development_chip().to_files().items()},
            "platform/measurement": MEASUREMENT.hex().encode(),
            "worker.toml": (
                f'name = "gpu-1"\ncluster = "{CLUSTER}"\ncoordinator = "127.0.0.1:{self.port}"\n'
                'coordinator_name = "main"\nroster = "roster.json"\noperators = "operators.json"\n'
                'tls_certificate = "gpu-1-cert.pem"\ntls_key = "gpu-1-key.pem"\n'
                + (f'scratch = "{scratch}"\n' if scratch else "")
                + extra
                + '[development]\ndir = "platform"\n'
            ).encode(),
        }
        for name, data in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(data)
            (directory / name).chmod(0o600)
        return directory

    def submit(
        self,
        files: Mapping[str, bytes],
        entrypoint: tuple[str, ...] = ("python", "main.py"),
        resources: Resources = RESOURCES,
        *,
        bundle: bytes | None = None,
        subjects: Mapping[str, bytes] | None = None,
        window: tuple[int, int] | None = None,
    ) -> FakeJob:
        """A job that is ready. ``bundle`` replaces the plaintext tar, ``subjects`` what the manifest says of files."""
        now = int(time.time())
        named = files if subjects is None else subjects
        not_before, not_after = window or (now - 60, now + 3600)
        manifest = Manifest(
            subjects=tuple(Subject(name, hashlib.sha256(data).hexdigest()) for name, data in named.items()),
            key_id=KEY,
            epoch=EPOCH,
            classification="research",
            export_control="",
            regions=("CH",),
            evidence_types=("sev-snp",),
            resources=resources,
            owner="alice",
            owner_identity=self.owner.public,
            owner_hpke=self.owner_recipient.public,
            entrypoint=entrypoint,
            not_before=not_before,
            not_after=not_after,
            issued_at=min(now, not_after - 1),
            nonce=secrets.token_hex(16),
        )
        data = payload(manifest)
        key = self.derive(subject(data))
        if bundle is None:
            plain = io.BytesIO()
            write_bundle([(name, len(content), io.BytesIO(content)) for name, content in files.items()], plain)
            bundle = plain.getvalue()
        sealed = io.BytesIO()
        encrypt_stream(key.purpose_key("bundle"), io.BytesIO(bundle), sealed, binding(job_id(data), "bundle"))
        ciphertext = sealed.getvalue()
        opening = Opening(
            job_id(data), key.key_check.hex(), hashlib.sha256(ciphertext).hexdigest(), len(ciphertext), True
        )
        job = FakeJob(
            id=job_id(data),
            manifest=manifest,
            envelope=sign_manifest(manifest, self.owner),
            subject=subject(data),
            key=key,
            opening=sign_opening(opening, self.owner),
            bundle=ciphertext,
        )
        self.jobs[job.id] = job
        return job

    def derive(self, job_subject: bytes) -> DerivedKey:
        bound = context(KEY, EPOCH, "job", job_subject)
        secret = root(contributions(self.seeds, bound), bound)
        return DerivedKey(bound, secret, key_check(secret, bound))

    # -- hooks for malicious twins ------------------------------------------------------------------------------------

    def now(self) -> int:
        return int(time.time())

    def claimed(self, job: FakeJob) -> pb.Job:
        return pb.Job(job_id=job.id, state="claimed", manifest=job.envelope, opening=job.opening, owner="alice")

    def windows(self) -> list[bytes]:
        return [each.window(self.now()) for each in self.custodians.values()]

    def leaf(self, job: FakeJob, document: EvidenceDocument, evidence: bytes) -> bytes:
        return Leaf(
            job_id=job.id,
            manifest_sha256=job.subject.hex(),
            recipient_sha256=hashlib.sha256(document.hpke_key).hexdigest(),
            evidence_sha256=hashlib.sha256(evidence).hexdigest(),
            key_id=KEY,
            epoch=EPOCH,
            time=self.now(),
            recipient="worker",
            development=True,
        ).to_bytes()

    def leaf_proof(self, leaf: bytes) -> bytes:
        return self.ledger.shown(leaf)

    def judge(self, custodian: Custodian, evidence: bytes) -> Appraisal:
        """As a custodian's gate does it."""
        now = self.now()
        nonces = {number: make_nonce(custodian.boot_secret, number) for number in (window_of(now), window_of(now) - 1)}
        return appraise(
            evidence,
            reference_values(),
            inventory(),
            required_types=["sev-snp"],
            now=now,
            own_id=custodian.name,
            current_nonces=nonces,
        )

    def share(self, custodian: Custodian, job: FakeJob, leaf: Leaf, recipient: bytes) -> Answer:
        return custodian.answer(job.subject, leaf, recipient, self.now())

    def bundle_of(self, job: FakeJob) -> bytes:
        return job.bundle

    async def holding(self, step: str) -> None:
        if self.hold_at == step:
            self.hold_at = ""
            self.held.set()
            await asyncio.sleep(120)  # until the caller hangs up

    async def breaking(self, context: Any) -> None:
        if self.break_calls:
            self.break_calls -= 1
            await context.abort(self.break_with, "gone")

    # -- the services -------------------------------------------------------------------------------------------------

    async def Claim(self, request: pb.ClaimRequest, context: Any) -> pb.ClaimResponse:
        self.calls.append("Claim")
        for job in self.jobs.values():
            if job.state in ("ready", "claimed") and request.job_id in ("", job.id):
                job.state = "claimed"
                await self.holding("claimed")
                return pb.ClaimResponse(job=self.claimed(job))
        raise StateError(Reason.NOT_FOUND, "no job to run")

    async def GetChallenge(self, request: pb.GetChallengeRequest, context: Any) -> pb.GetChallengeResponse:
        self.calls.append("GetChallenge")
        await self.holding("attesting")
        return pb.GetChallengeResponse(window_statements=self.windows())

    async def Release(self, request: pb.WorkerReleaseRequest, context: Any) -> AsyncIterator[pb.AnswerEvent]:
        self.calls.append("Release")
        job = self.jobs[request.job_id]
        job.evidence.append(request.evidence)
        document = EvidenceDocument.parse(request.evidence)
        leaf_bytes = self.leaf(job, document, request.evidence)
        first = True
        for custodian in self.custodians.values():
            answer = custodian_pb2.ReleaseAnswer(request_id=request.request_id, custodian=custodian.name)
            try:
                if custodian.refusal is not None:
                    raise custodian.refusal
                self.judge(custodian, request.evidence)
                share = self.share(custodian, job, Leaf.parse(leaf_bytes), document.hpke_key)
            except KeyquorumError as error:
                answer.refusal.CopyFrom(to_status(error))
            else:
                answer.custodian = share.custodian
                answer.share.key_id, answer.share.epoch, answer.share.window = share.key_id, share.epoch, share.window
                answer.share.sealed, answer.share.signature = share.sealed, share.signature
            event = pb.AnswerEvent(answer=answer)
            if first:
                event.leaf, event.leaf_proof = leaf_bytes, self.leaf_proof(leaf_bytes)
            yield event
            first = False

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:
        await self.breaking(context)
        job = self.jobs[request.job_id]
        job.reports.append(request.state)
        job.reported.set()
        if request.state == "running":
            await self.holding("running")
        return pb.ReportResponse(proceed=self.proceed)

    async def Telemetry(self, request: pb.TelemetryRequest, context: Any) -> pb.TelemetryResponse:
        await self.breaking(context)
        self.jobs[request.job_id].telemetry.append((request.statement, request.content))
        return pb.TelemetryResponse()

    async def Complete(self, request: pb.CompleteRequest, context: Any) -> pb.Job:
        self.calls.append("Complete")
        await self.breaking(context)
        await self.holding("completing")
        job = self.jobs[request.job_id]
        if request.statement and self.lose_records:
            self.lose_records -= 1
            job.evidence.clear()
        if request.statement and not job.evidence:
            raise StateError(Reason.STATE, "no release of this job to this worker is on record")
        job.statement = request.statement
        job.error = from_status(request.error) if request.HasField("error") else None
        job.state = "failed" if job.error else "completed"
        return pb.Job(job_id=job.id, state=job.state)

    async def Stat(self, request: pb.StatArtifactRequest, context: Any) -> pb.ArtifactState:
        return self._state(self.jobs[request.job_id], request.kind)

    def _state(self, job: FakeJob, kind: str) -> pb.ArtifactState:
        data = job.artifacts.get(kind, b"")
        done = kind in job.complete
        digest = hashlib.sha256(data).digest() if done else b""
        return pb.ArtifactState(
            job_id=job.id, kind=kind, committed=len(data), complete=done, size=len(data) if done else 0, sha256=digest
        )

    async def Upload(self, request_iterator: Any, context: Any) -> pb.ArtifactState:
        job, kind = None, ""
        async for chunk in request_iterator:
            which = chunk.WhichOneof("part")
            if which == "start":
                job, kind = self.jobs[chunk.start.job_id], chunk.start.kind
                self.calls.append(f"Upload {kind} from {chunk.start.offset}")
                if chunk.start.offset != len(job.artifacts.get(kind, b"")) and chunk.start.offset != 0:
                    raise StateError(Reason.STATE, "go on from what is committed")
                job.artifacts[kind] = job.artifacts.get(kind, b"")[: chunk.start.offset]
                job.complete.discard(kind)
            elif which == "data":
                assert job is not None
                job.artifacts[kind] += chunk.data
                await self.holding("uploading")
                if self.break_uploads:
                    self.break_uploads -= 1
                    await context.abort(self.break_with, "gone")
            else:
                assert job is not None
                digest = hashlib.sha256(job.artifacts[kind]).digest()
                if (len(job.artifacts[kind]), digest) != (chunk.finish.size, chunk.finish.sha256):
                    raise KeyquorumError(Reason.DIGEST, "another digest")
                job.complete.add(kind)
        assert job is not None
        return self._state(job, kind)

    async def Download(self, request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.DownloadChunk]:
        self.calls.append(f"Download {request.kind} from {request.offset}")
        data = self.bundle_of(self.jobs[request.job_id])
        step = max(1, min(1 << 20, len(data) // 3))
        for at in range(request.offset, len(data), step):
            yield pb.DownloadChunk(data=data[at : at + step])
            await self.holding("downloading")
            if self.break_downloads:
                self.break_downloads -= 1
                await context.abort(self.break_with, "gone")
