"""What the ledger adds to a release, beside what it cannot do without, at ten leaves and at a million.

In turns, so that a noisy machine disturbs all alike:

- ``gated``: a release as it is: the leaf is entered, and each custodian sees a checkpoint of its own with its proofs;
- ``ungated``: the same by custodians that leave the ledger out (:mod:`benchmarks.ungated`), and no leaf is entered;
- ``append``: a leaf entered, durably and under a signed checkpoint, and nothing else;
- ``witness``: what a custodian must do before it releases on a new checkpoint, and nothing else: both of the log's
  signatures, consistency, inclusion, one durable commit; by as many processes, to the same quorum. ``empty``: the same
  fan-out of the same bytes to processes that do nothing, to be taken off it.

``added_over_parts`` is (gated - ungated) / (append + witness - empty), medians of p50s within one turn. The throughput
is that of 64 callers at once, gated beside ungated.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import keyquorum
from benchmarks.floor import Floor, percentile
from benchmarks.floor_server import Step, pack_step
from benchmarks.logged import open_logged
from benchmarks.release import KEY, Bench, lift_quota, open_parties
from keyquorum_coordinator.config import load_config
from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.ledger.setup import open_log
from keyquorum_coordinator.sequencer import Entry
from keyquorum_local.cluster import Cluster
from keyquorum_local.layout import Layout, create
from keyquorum_protos.v1 import custodian_pb2 as pb

MEMBERS = (("c-1", "CH"), ("c-2", "DE"), ("c-3", "IS"), ("c-4", "JP"), ("c-5", "CA"))
THRESHOLD = 3
SIZES = (10, 1_000_000)
CALLERS = 64
TARGET_ADDED = 1.2
TARGET_THROUGHPUT = 0.75
_BATCH = 1024


def _fill(layout: Layout, size: int) -> None:
    """Leaves for a log that is to have ``size`` of them."""
    log = open_log(load_config(layout.coordinator))
    try:
        while (at := log.latest.checkpoint.size) < size:
            count = min(_BATCH, size - at)
            log.add([(b"fill%d" % number, b"filler %d" % number) for number in range(at, at + count)])
            log.seal()
    finally:
        log.close()


@dataclass(slots=True)
class Side:
    """One cluster with a key and jobs that its custodians have seen."""

    bench: Bench
    made: int = 0

    def leaf(self) -> tuple[int, bytes]:
        """A job's number and a leaf for it that nobody has seen."""
        jobs, now = self.bench.jobs, int(time.time())
        number, turn = self.made % len(jobs), self.made // len(jobs)
        self.made += 1
        return number, self.bench.leaf(jobs[number], now - 110 + turn % 220)

    async def gated(self) -> None:
        number, leaf = self.leaf()
        entry = await self.bench.ledger.sequencer.append(leaf, hashlib.sha256(leaf).digest())
        await self._release(number, leaf, entry)

    async def ungated(self) -> None:
        number, leaf = self.leaf()
        await self._release(number, leaf, None)

    async def _release(self, number: int, leaf: bytes, entry: Entry | None) -> None:
        job = self.bench.jobs[number]
        request = pb.ReleaseRequest(manifest=job.envelope, evidence=job.evidence, leaf=leaf)
        if entry is None:
            release = self.bench.fanout.release(request)
        else:
            release = await self.bench.ledger.witnesses.release(entry, request)
        await self.bench.combine(job, hashlib.sha256(b"\0" + leaf).digest(), release)


class Parts:
    """The parts alone. Steps are kept as they are made, for the witness floor to verify."""

    def __init__(self, side: Side, witness: Floor, empty: Floor, size: int) -> None:
        self._side = side
        self._sequencer = side.bench.ledger.sequencer
        self._witness, self._empty = witness, empty
        self._size = size
        self._last = self._sequencer.latest.checkpoint
        self._steps: list[bytes] = []
        self._blank = empty.request(size, 36)

    async def append(self) -> None:
        _, leaf = self._side.leaf()
        self._entry = await self._sequencer.append(leaf, hashlib.sha256(leaf).digest())

    async def keep_step(self) -> None:
        """Off the clock: the step that the last append was, as a request."""
        entry, tree = self._entry, self._entry.checkpoint.checkpoint
        consistency = await self._sequencer.consistency(self._last.size, tree.size)
        step = Step(
            self._sequencer.keys,
            self._last.size,
            self._last.root,
            entry.checkpoint.encode(),
            consistency,
            entry.leaf_hash,
            entry.index,
            entry.proof,
        )
        self._last = tree
        self._steps.append(pack_step(step, self._size))

    async def witness(self) -> None:
        await self._witness.streams(self._steps.pop(0), THRESHOLD)

    async def empty(self) -> None:
        await self._empty.streams(self._blank, THRESHOLD)


async def _p50(call: Callable[[], Awaitable[object]], count: int, after: Callable[[], Awaitable[None]] | None) -> float:
    out = []
    for _ in range(count):
        started = time.perf_counter()
        await call()
        out.append(time.perf_counter() - started)
        if after is not None:
            await after()
        await asyncio.sleep(0.004)  # those beyond the quorum are still at work
    return percentile(out, 0.5)


async def _rate(call: Callable[[], Awaitable[object]], seconds: float) -> float:
    done = 0
    until = time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < until:
            await call()
            done += 1

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return done / (time.perf_counter() - started)


async def _measure(gated: Layout, ungated: Layout, scratch: Path, turns: int, seconds: float) -> dict[str, object]:
    async with AsyncExitStack() as stack:
        sides = []
        for layout in (gated, ungated):
            parties = open_parties(layout)
            fanout = await stack.enter_async_context(Fanout(parties.roster, parties.identity))
            ledger = await stack.enter_async_context(open_logged(layout, fanout))
            await fanout.ready()
            bench = Bench(layout, fanout, ledger, parties.roster, parties.owner)
            await bench.meet()
            sides.append(Side(bench))
        count = len(MEMBERS)
        witness = await stack.enter_async_context(Floor("witness", count, scratch / "witness"))
        empty = await stack.enter_async_context(Floor("empty", count, scratch / "empty"))
        with_, without = sides
        request = pb.ReleaseRequest(manifest=with_.bench.jobs[0].envelope, evidence=with_.bench.jobs[0].evidence)
        parts = Parts(with_, witness, empty, request.ByteSize() + 8192)
        calls: dict[str, tuple[Callable[[], Awaitable[object]], Callable[[], Awaitable[None]] | None]] = {
            "gated": (with_.gated, None),
            "ungated": (without.ungated, None),
            "append": (parts.append, parts.keep_step),
            "witness": (parts.witness, None),
            "empty": (parts.empty, None),
        }
        p50: dict[str, list[float]] = {name: [] for name in calls}
        rates: dict[str, list[float]] = {"gated": [], "ungated": []}
        for call, after in calls.values():
            await _p50(call, 25, after)
        for _ in range(turns):
            for name, (call, after) in calls.items():
                p50[name].append(await _p50(call, 25, after))
            for name in rates:
                rates[name].append(await _rate(calls[name][0], seconds))
        added = [
            (p50["gated"][i] - p50["ungated"][i]) / (p50["append"][i] + p50["witness"][i] - p50["empty"][i])
            for i in range(turns)
        ]
        kept = [a / b for a, b in zip(rates["gated"], rates["ungated"], strict=True)]
        return {
            "p50_ms": {name: round(percentile(each, 0.5) * 1e3, 3) for name, each in p50.items()},
            "added_over_parts": {"median": round(percentile(added, 0.5), 3), "target": f"at most {TARGET_ADDED}"},
            "per_second_by_64": {name: round(percentile(each, 0.5), 1) for name, each in rates.items()},
            "throughput_kept": {"median": round(percentile(kept, 0.5), 3), "target": f"at least {TARGET_THROUGHPUT}"},
        }


def _start(scratch: Path, *, gate: bool) -> Cluster:
    layout = create(scratch, custodians=MEMBERS, quorum={"at_least": THRESHOLD})
    for custodian, _ in MEMBERS:
        lift_quota(layout.custodian(custodian) / "custodian.toml")
    cluster = Cluster(layout)
    try:
        cluster.start([*cluster.custodians.values(), cluster.coordinator])
        with keyquorum.connect(layout.profile, passphrase=layout.owner_passphrase.read_text()) as client:
            client.key_create(KEY)
        cluster.coordinator.stop()
        if not gate:
            for name, process in cluster.custodians.items():
                process.stop()
                process.command = [sys.executable, "-m", "benchmarks.ungated", str(layout.custodian(name))]
            cluster.start(cluster.custodians.values())
    except BaseException:
        cluster.stop()
        raise
    return cluster


def measure(scratch: Path, *, turns: int = 9, seconds: float = 1.0) -> dict[str, object]:
    """Figures by leaves in the log. Takes about two minutes, most of them to fill a log with a million leaves."""
    out: dict[str, object] = {}
    gated = _start(scratch / "gated", gate=True)
    try:
        ungated = _start(scratch / "ungated", gate=False)
        try:
            for size in SIZES:
                _fill(gated.layout, size)
                found = asyncio.run(_measure(gated.layout, ungated.layout, scratch / str(size), turns, seconds))
                out[f"{size}_leaves"] = found
        finally:
            ungated.stop()
    finally:
        gated.stop()
    return out
