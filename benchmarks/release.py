"""Release latency and throughput over real custodian processes, beside two floors in the same run.

For each committee these are measured in turns, so that a noisy machine disturbs all alike:

- ``empty``: a fan-out with the same payloads to the same number of processes that do nothing;
- ``crypto floor``: the same, with one HPKE seal and one Ed25519 signature per server, and a caller that verifies and
  opens a quorum of them; once by unary calls (what a plain gRPC fan-out is) and once over kept streams (what ours is);
- ``release``: custodians that run the whole gate, and a caller that verifies the answers, opens the shares, combines
  them and meets the key check. Jobs and evidence have been seen before, as when a worker's request follows the owner's,
  or a worker comes back; every release has a leaf of its own, and each custodian records it. The leaves are in the
  ledger already, and each custodian verifies that they are: what entering them costs is the benchmark ``gate``'s.
  Under load, requests that gather share messages and commits, up to eight, as they do in life; the floors send each in
  a message of its own. Latency is that of one release alone, which shares nothing.
- ``cold release``: each request brings a manifest and evidence that no custodian has seen.

A release is done when the caller holds the job's root. Requests carry a manifest and a worker's evidence (some 20 KB).
``cpu_ms`` is the processor time of one, all processes together: what throughput comes down to on any machine.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import keyquorum
from benchmarks.floor import Floor, percentile
from benchmarks.logged import Logged, open_logged
from keyquorum_coordinator.fanout import Fanout, Release
from keyquorum_coordinator.sequencer import Entry
from keyquorum_core import manifest as manifests
from keyquorum_core.attestation.binding import report_data
from keyquorum_core.attestation.development import DevelopmentChip
from keyquorum_core.attestation.evidence import EvidenceDocument, EvidenceItem, WindowNonce
from keyquorum_core.derivation import Combiner, context
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.keywrap import LoadedKeys, load_keys
from keyquorum_core.release import Answer, Leaf, Window, challenge, open_share, open_window, verify_answer
from keyquorum_core.roster import Roster, open_roster
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_local.cluster import Cluster
from keyquorum_local.layout import MEASUREMENT, REGION, Layout, create
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.wire.tls import TlsIdentity

KEY = "bench"
JOBS = 64
JURISDICTIONS = ("CH", "DE", "IS", "JP", "CA")
COMMITTEES: Mapping[str, tuple[int, int]] = {"2-of-3": (2, 3), "3-of-5": (3, 5), "5-of-9": (5, 9)}
TARGET_P50 = 1.35
TARGET_THROUGHPUT = 0.7


@dataclass(frozen=True, slots=True)
class Job:
    """A signed manifest and the worker's evidence to go with it."""

    envelope: bytes
    job_id: str
    subject: bytes
    evidence: bytes
    recipient: RecipientKey


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to be sent, and what its answers are verified against."""

    job: Job
    leaf_hash: bytes
    entry: Entry
    request: pb.ReleaseRequest


class Bench:
    """One committee: real custodians, the coordinator's fan-out in this process, and a worker's part of the work."""

    def __init__(self, layout: Layout, fanout: Fanout, ledger: Logged, roster: Roster, owner: LoadedKeys) -> None:
        self.fanout, self.ledger, self.roster, self._owner = fanout, ledger, roster, owner
        self.quorum = roster.quorum_of()
        names = ("vek.pem", "ask.pem", "ark.pem", "vek-key.pem")
        platform = layout.worker / "platform"
        self._chip = DevelopmentChip.from_files({name: (platform / name).read_bytes() for name in names})
        self._windows: dict[bytes, Window] = {}
        self.jobs: list[Job] = []
        self._ready: deque[Prepared] = deque()
        self._when: dict[str, int] = {}
        self._laid = 0
        self._checks: dict[str, bytes] = {}
        self._count = 0

    async def job(self) -> Job:
        """A new job with a new worker, as custodians have never seen them."""
        now = int(time.time())
        self._count += 1
        signed = manifests.Manifest(
            subjects=(manifests.Subject("main.py", hashlib.sha256(str(self._count).encode()).hexdigest()),),
            key_id=KEY,
            epoch=1,
            classification="research",
            export_control="",
            regions=(REGION,),
            evidence_types=("sev-snp",),
            resources=manifests.Resources(cpus=1, memory_mib=512, gpus=0, wall_seconds=60, output_mib=16),
            owner="alice",
            owner_identity=self._owner.identity.public,
            owner_hpke=self._owner.recipient.public,
            entrypoint=("python", "main.py"),
            not_before=now - 60,
            not_after=now + 3600,
            issued_at=now - 60,
            nonce=secrets.token_hex(16),
        )
        envelope = manifests.sign_manifest(signed, self._owner.identity)
        payload = manifests.payload(signed)
        recipient, signer = RecipientKey.generate(), Identity.generate()
        nonces = [
            WindowNonce(window.custodian, window.window, window.nonce_bytes)
            for window in [self._window(statement) for statement in await self.fanout.windows()]
        ]
        bound = challenge({each.custodian: each.nonce for each in nonces})
        report = self._chip.sign_report(
            report_data(recipient.public, signer.public.to_bytes(), bound), bytes.fromhex(MEASUREMENT)
        )
        evidence = EvidenceDocument(
            nonces=tuple(nonces),
            hpke_key=recipient.public,
            signing_key=signer.public.to_bytes(),
            items=(EvidenceItem("sev-snp", report, self._chip.endorsements),),
        ).to_bytes()
        return Job(envelope, manifests.job_id(payload), manifests.subject(payload), evidence, recipient)

    def _window(self, statement: bytes) -> Window:
        """Verified once per window, when the worker fetches the challenge; not on the release path."""
        window = self._windows.get(statement)
        if window is None:
            for custodian in self.roster.custodians:
                try:
                    window = open_window(
                        statement,
                        custodian.identity,
                        custodian=custodian.id,
                        cluster=self.roster.cluster,
                        now=int(time.time()),
                    )
                except KeyquorumError:
                    continue
                break
            assert window is not None
            self._windows[statement] = window
        return window

    async def meet(self) -> None:
        """Have jobs that custodians have seen."""
        while len(self.jobs) < JOBS:
            fresh = await self.job()
            await self.release(await self.request(fresh, int(time.time())))
            self.jobs.append(fresh)

    async def prepare(self, count: int = 800) -> None:
        """Lay up requests, each with a leaf of its own as in life, for :meth:`next` to take one by one; those left
        over are dropped, since custodians take leaves of two minutes around their clock.

        Everything that is not a release is done here: leaves are made before custodians are asked.
        """
        await self.meet()
        self._ready = deque(await asyncio.gather(*(self.request(*self._another()) for _ in range(count))))

    def _another(self) -> tuple[Job, int]:
        """A job and a time that no leaf had yet."""
        now = int(time.time())
        job = self.jobs[self._laid % JOBS]
        self._laid += 1
        when = self._when[job.job_id] = min(max(self._when.get(job.job_id, 0) + 1, now - 60), now + 110)
        return job, when

    async def request(self, job: Job, when: int) -> Prepared:
        """A request whose leaf is in the ledger when this returns."""
        leaf = self.leaf(job, when)
        entry = await self.ledger.sequencer.append(leaf, hashlib.sha256(leaf).digest())
        request = pb.ReleaseRequest(manifest=job.envelope, evidence=job.evidence, leaf=leaf)
        return Prepared(job, entry.leaf_hash, entry, request)

    @staticmethod
    def leaf(job: Job, when: int) -> bytes:
        return Leaf(
            job_id=job.job_id,
            manifest_sha256=job.subject.hex(),
            recipient="worker",
            recipient_sha256=hashlib.sha256(job.recipient.public).hexdigest(),
            evidence_sha256=hashlib.sha256(job.evidence).hexdigest(),
            key_id=KEY,
            epoch=1,
            time=when,
            development=True,
        ).to_bytes()

    async def next(self) -> None:
        """One release of those laid up."""
        if not self._ready:
            await self.prepare()
        await self.release(self._ready.popleft())

    async def release(self, prepared: Prepared) -> None:
        """From the request to the job's root in hand, checked against the job's key check once that is known."""
        release = await self.ledger.witnesses.release(prepared.entry, prepared.request)
        await self.combine(prepared.job, prepared.leaf_hash, release)

    async def combine(self, job: Job, leaf_hash: bytes, release: Release) -> None:
        """Take answers until they give the job's root."""
        combiner = Combiner(self.quorum, context(KEY, 1, "job", job.subject), self._checks.get(job.job_id))
        async with release:
            async for arrival in release:
                share = arrival.answer.share
                assert arrival.answer.HasField("share"), arrival.answer.refusal
                answer = Answer(
                    arrival.custodian, share.key_id, share.epoch, share.window, share.sealed, share.signature
                )
                window = self._window(arrival.window_statement)
                verify_answer(answer, window, job.subject, leaf_hash, key_id=KEY, epoch=1)
                opened = open_share(answer, job.recipient, leaf_hash, self.quorum)
                combiner.add(arrival.custodian, opened.contributions)
                found = combiner.result()
                if found is not None:
                    self._checks[job.job_id] = found.key.key_check
                    return
        raise AssertionError("no quorum answered")


async def _sample(call: Callable[[], Awaitable[object]], count: int) -> list[float]:
    out = []
    for _ in range(count):
        started = time.perf_counter()
        await call()
        out.append(time.perf_counter() - started)
        # Servers beyond the quorum are still at work on this one; the next starts on a quiet machine.
        await asyncio.sleep(0.004)
    return out


@dataclass(frozen=True, slots=True)
class Way:
    """One of the things compared: how to do it once, and the processes that answer."""

    call: Callable[[], Awaitable[object]]
    servers: Sequence[int]


def _cpu_seconds(servers: Sequence[int]) -> float:
    """Processor time used so far by this process and by the servers (Linux)."""
    spent = time.process_time()
    for pid in servers:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


async def _rate(way: Way, seconds: float, concurrency: int = 16) -> tuple[float, float]:
    """Calls per second of a closed loop with ``concurrency`` callers; and processor seconds per call, all told."""
    done = 0
    deadline = time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < deadline:
            await way.call()
            done += 1

    spent = _cpu_seconds(way.servers)
    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    elapsed = time.perf_counter() - started
    await asyncio.sleep(0.05)  # servers beyond the quorum are still at work
    return done / elapsed, (_cpu_seconds(way.servers) - spent) / done


@dataclass(frozen=True, slots=True)
class Parties:
    """Who takes part, from a cluster's folder; ``identity`` is the coordinator's."""

    owner: LoadedKeys
    roster: Roster
    identity: TlsIdentity


def open_parties(layout: Layout) -> Parties:
    """Read a local cluster's roster and keys."""
    passphrase = layout.owner_passphrase.read_text()
    owner = load_keys((layout.root / "alice.key.json").read_bytes(), passphrase)
    operator = load_keys((layout.root / "ops.key.json").read_bytes(), passphrase).identity.public
    roster = open_roster((layout.root / "roster.json").read_bytes(), {"ops": operator}, 1, int(time.time()))
    where = layout.coordinator
    identity = TlsIdentity((where / "tls-cert.pem").read_bytes(), (where / "tls-key.pem").read_bytes())
    return Parties(owner, roster, identity)


async def _measure(cluster: Cluster, threshold: int, scratch: Path, rounds: int, seconds: float) -> dict[str, object]:
    layout, parties = cluster.layout, open_parties(cluster.layout)
    roster = parties.roster
    count = len(layout.custodians)
    async with (
        Fanout(roster, parties.identity) as fanout,
        open_logged(layout, fanout) as ledger,
        Floor("empty", count, scratch / "empty") as empty,
        Floor("crypto", count, scratch / "crypto") as crypto,
    ):
        await fanout.ready()
        bench = Bench(layout, fanout, ledger, roster, parties.owner)
        example = await bench.request(await bench.job(), int(time.time()))
        await bench.release(example)
        size, plaintext = example.request.ByteSize(), 36 * len(bench.quorum.indices_of(roster.custodians[0].id))
        payload, empty_payload = crypto.request(size, plaintext), empty.request(size, plaintext)
        ways = {
            "empty_unary": Way(lambda: empty.unary(empty_payload, threshold), empty.pids),
            "empty_streams": Way(lambda: empty.streams(empty_payload, threshold), empty.pids),
            "crypto_unary": Way(lambda: crypto.unary(payload, threshold), crypto.pids),
            "crypto_streams": Way(lambda: crypto.streams(payload, threshold), crypto.pids),
            "release": Way(bench.next, [process.pid for process in cluster.custodians.values()]),
        }
        figures = await _compare(ways, bench.prepare, rounds, seconds)
        cold = []
        for _ in range(30):
            fresh = await bench.request(await bench.job(), int(time.time()))
            cold += await _sample(lambda fresh=fresh: bench.release(fresh), 1)  # type: ignore[misc]
    figures["cold_release"] = {"p50_ms": _ms(percentile(cold, 0.5)), "p99_ms": _ms(percentile(cold, 0.99))}
    figures["request_bytes"] = size
    return figures


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


async def _compare(
    ways: Mapping[str, Way], prepare: Callable[[], Awaitable[None]], rounds: int, seconds: float
) -> dict[str, object]:
    """Every way in turns, short ones and many: each ratio is the median of those within one round, so that whatever
    else the machine is doing comes and goes between rounds and not between the two that are compared."""
    samples: dict[str, list[list[float]]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    await prepare()
    for way in ways.values():
        await _sample(way.call, 20)
    for _ in range(rounds):
        await prepare()
        for name, way in ways.items():
            samples[name].append(await _sample(way.call, 25))
        for name, way in ways.items():
            rate, cpu = await _rate(way, seconds)
            rates[name].append(rate)
            spent[name].append(cpu)
    middles = {name: [percentile(each, 0.5) for each in rounds_] for name, rounds_ in samples.items()}

    def over_floors(figures: Mapping[str, list[float]]) -> dict[str, object]:
        return {
            floor: round(
                percentile([a / b for a, b in zip(figures["release"], figures[f"crypto_{floor}"], strict=True)], 0.5), 3
            )
            for floor in ("unary", "streams")
        }

    out: dict[str, object] = {}
    for name in ways:
        every = [sample for each in samples[name] for sample in each]
        out[name] = {
            "p50_ms": _ms(percentile(every, 0.5)),
            "p99_ms": _ms(percentile(every, 0.99)),
            "per_second": round(percentile(rates[name], 0.5), 1),
            "cpu_ms": _ms(percentile(spent[name], 0.5)),
        }
    out["p50_over_crypto_floor"] = {**over_floors(middles), "target": f"at most {TARGET_P50}"}
    out["throughput_over_crypto_floor"] = {**over_floors(rates), "target": f"at least {TARGET_THROUGHPUT}"}
    out["cpu_over_crypto_floor"] = over_floors(spent)
    return out


def measure(scratch: Path, *, rounds: int = 9, seconds: float = 0.7) -> dict[str, object]:
    """Figures by committee. Takes about a minute and a half for each."""
    out: dict[str, object] = {}
    for name, (threshold, count) in COMMITTEES.items():
        members = tuple((f"c-{i + 1}", JURISDICTIONS[i % len(JURISDICTIONS)]) for i in range(count))
        layout = create(scratch / name, custodians=members, quorum={"at_least": threshold})
        for custodian, _ in members:
            lift_quota(layout.custodian(custodian) / "custodian.toml")
        cluster = Cluster(layout)
        try:
            cluster.start([*cluster.custodians.values(), cluster.coordinator])
            with keyquorum.connect(layout.profile, passphrase=layout.owner_passphrase.read_text()) as client:
                client.key_create(KEY)
            cluster.coordinator.stop()
            out[name] = asyncio.run(_measure(cluster, threshold, scratch / f"{name}-floor", rounds, seconds))
        finally:
            cluster.stop()
    return out


def lift_quota(config: Path) -> None:
    lines = [line for line in config.read_text().splitlines() if not line.startswith("releases_per_owner_per_hour")]
    config.write_text("\n".join([*lines, "releases_per_owner_per_hour = 1000000000", ""]))
