"""Release latency and throughput over real custodian processes, beside two floors in the same run.

For each committee the same loop is measured in turns, so that a noisy machine disturbs all alike:

- ``empty``: a fan-out with the same payloads to the same number of processes that do nothing;
- ``crypto floor``: the same, with one HPKE seal and one Ed25519 signature per server, and a caller that verifies and
  opens a quorum of them; once by unary calls (what a plain gRPC fan-out is) and once over kept streams (what ours is);
- ``release``: custodians that run the whole gate, and a caller that verifies the answers, opens the shares, combines
  them and meets the key check. The job and the evidence have been seen before, as when a worker's request follows the
  owner's, or a worker comes back.
- ``cold release``: each request brings a manifest and evidence that no custodian has seen.

A release is done when the caller holds the job's root. Requests carry a manifest and a worker's evidence (some 20 KB).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import keyquorum
from benchmarks.floor import Floor, percentile
from keyquorum_coordinator.fanout import Fanout
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


class Bench:
    """One committee: real custodians, the coordinator's fan-out in this process, and a worker's part of the work."""

    def __init__(self, layout: Layout, fanout: Fanout, roster: Roster, owner: LoadedKeys) -> None:
        self.fanout, self.roster, self._owner = fanout, roster, owner
        self.quorum = roster.quorum_of()
        names = ("vek.pem", "ask.pem", "ark.pem", "vek-key.pem")
        platform = layout.worker / "platform"
        self._chip = DevelopmentChip.from_files({name: (platform / name).read_bytes() for name in names})
        self._windows: dict[bytes, Window] = {}
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

    def leaf(self, job: Job) -> Leaf:
        return Leaf(
            job_id=job.job_id,
            manifest_sha256=job.subject.hex(),
            recipient="worker",
            recipient_sha256=hashlib.sha256(job.recipient.public).hexdigest(),
            evidence_sha256=hashlib.sha256(job.evidence).hexdigest(),
            key_id=KEY,
            epoch=1,
            time=int(time.time()),
            development=True,
        )

    def request_bytes(self, job: Job) -> int:
        leaf = self.leaf(job).to_bytes()
        return pb.ReleaseRequest(manifest=job.envelope, evidence=job.evidence, leaf=leaf).ByteSize() + 32

    async def release(self, job: Job, key_check: bytes | None) -> bytes:
        """From the request to the job's root in hand; the key check of the root."""
        leaf = self.leaf(job)
        leaf_hash = leaf.hash()
        combiner = Combiner(self.quorum, context(KEY, 1, "job", job.subject), key_check)
        request = pb.ReleaseRequest(manifest=job.envelope, evidence=job.evidence, leaf=leaf.to_bytes())
        async with self.fanout.release(request) as release:
            async for arrival in release:
                share = arrival.answer.share
                assert arrival.answer.HasField("share"), arrival.answer.refusal
                answer = Answer(
                    arrival.custodian, share.key_id, share.epoch, share.window, share.sealed, share.signature
                )
                verify_answer(
                    answer, self._window(arrival.window_statement), job.subject, leaf_hash, key_id=KEY, epoch=1
                )
                combiner.add(arrival.custodian, open_share(answer, job.recipient, leaf_hash, self.quorum))
                found = combiner.result()
                if found is not None:
                    return found.key.key_check
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


async def _rate(call: Callable[[], Awaitable[object]], seconds: float, concurrency: int = 16) -> float:
    """Calls per second of a closed loop with ``concurrency`` callers."""
    done = 0
    deadline = time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < deadline:
            await call()
            done += 1

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return done / (time.perf_counter() - started)


async def _measure(layout: Layout, threshold: int, scratch: Path, rounds: int, seconds: float) -> dict[str, object]:
    passphrase = layout.owner_passphrase.read_text()
    owner = load_keys((layout.root / "alice.key.json").read_bytes(), passphrase)
    operator = load_keys((layout.root / "ops.key.json").read_bytes(), passphrase).identity.public
    roster = open_roster((layout.root / "roster.json").read_bytes(), {"ops": operator}, 1, int(time.time()))
    where = layout.coordinator
    identity = TlsIdentity((where / "tls-cert.pem").read_bytes(), (where / "tls-key.pem").read_bytes())
    count = len(layout.custodians)
    async with (
        Fanout(roster, identity) as fanout,
        Floor("empty", count, scratch / "empty") as empty,
        Floor("crypto", count, scratch / "crypto") as crypto,
    ):
        await fanout.ready()
        bench = Bench(layout, fanout, roster, owner)
        job = await bench.job()
        check = await bench.release(job, None)
        size, plaintext = bench.request_bytes(job), 36 * len(bench.quorum.indices_of(roster.custodians[0].id))
        payload, empty_payload = crypto.request(size, plaintext), empty.request(size, plaintext)

        async def release() -> None:
            await bench.release(job, check)

        ways: dict[str, Callable[[], Awaitable[object]]] = {
            "empty_unary": lambda: empty.unary(empty_payload, threshold),
            "empty_streams": lambda: empty.streams(empty_payload, threshold),
            "crypto_unary": lambda: crypto.unary(payload, threshold),
            "crypto_streams": lambda: crypto.streams(payload, threshold),
            "release": release,
        }
        samples: dict[str, list[float]] = {name: [] for name in ways}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for call in ways.values():
            await _sample(call, 20)
        for _ in range(rounds):
            for name, call in ways.items():
                samples[name] += await _sample(call, 40)
        for _ in range(3):
            for name, call in ways.items():
                rates[name].append(await _rate(call, seconds))
        cold = []
        for _ in range(30):
            fresh = await bench.job()
            cold += await _sample(lambda fresh=fresh: bench.release(fresh, None), 1)  # type: ignore[misc]
        samples["cold_release"] = cold
    figures: dict[str, object] = {
        name: {
            "p50_ms": round(percentile(values, 0.5) * 1e3, 3),
            "p99_ms": round(percentile(values, 0.99) * 1e3, 3),
            **({"per_second": round(percentile(rates[name], 0.5), 1)} if name in rates else {}),
        }
        for name, values in samples.items()
    }
    p50 = {name: percentile(values, 0.5) for name, values in samples.items()}
    rate = {name: percentile(values, 0.5) for name, values in rates.items()}
    figures["request_bytes"] = size
    figures["p50_over_crypto_floor"] = {
        "unary": round(p50["release"] / p50["crypto_unary"], 3),
        "streams": round(p50["release"] / p50["crypto_streams"], 3),
        "target": f"at most {TARGET_P50}",
    }
    figures["throughput_over_crypto_floor"] = {
        "unary": round(rate["release"] / rate["crypto_unary"], 3),
        "streams": round(rate["release"] / rate["crypto_streams"], 3),
        "target": f"at least {TARGET_THROUGHPUT}",
    }
    return figures


def measure(scratch: Path, *, rounds: int = 5, seconds: float = 2.0) -> dict[str, object]:
    """Figures by committee. Takes about a minute and a half for each."""
    out: dict[str, object] = {}
    for name, (threshold, count) in COMMITTEES.items():
        members = tuple((f"c-{i + 1}", JURISDICTIONS[i % len(JURISDICTIONS)]) for i in range(count))
        layout = create(scratch / name, custodians=members, quorum={"at_least": threshold})
        for custodian, _ in members:
            _lift_quota(layout.custodian(custodian) / "custodian.toml")
        cluster = Cluster(layout)
        try:
            cluster.start([*cluster.custodians.values(), cluster.coordinator])
            with keyquorum.connect(layout.profile, passphrase=layout.owner_passphrase.read_text()) as client:
                client.key_create(KEY)
            cluster.coordinator.stop()
            out[name] = asyncio.run(_measure(layout, threshold, scratch / f"{name}-floor", rounds, seconds))
        finally:
            cluster.stop()
    return out


def _lift_quota(config: Path) -> None:
    lines = [line for line in config.read_text().splitlines() if not line.startswith("releases_per_owner_per_hour")]
    config.write_text("\n".join([*lines, "releases_per_owner_per_hour = 1000000000", ""]))
