"""The coordinator's log: appends beside bare SQLite commits and pymerkle's, proofs at a million leaves and ten.

- **append**: callers wait at once for a leaf of 430 bytes each to be durable under a signed checkpoint, with a proof.
  The floor, in the same run and turn by turn: as many callers wait for a bare SQLite commit each of the same bytes, on
  a connection as durable as the log's (WAL, synchronous FULL), hashing and signing nothing. The peer: pymerkle's
  ``append_entry`` on SQLite with its own settings, which signs nothing either. Ratios are medians over turns.
- **proofs**: built from tiles on disk for leaves chosen at random, and verified.
- **memory**: peak of a process that opens a log, appends and proves, at ten leaves and at a million.
- **worst_case**: ten million leaves built offline.
"""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pymerkle import SqliteTree

from benchmarks.ledger_offline import build, open_built
from keyquorum_coordinator.sequencer import Sequencer
from keyquorum_core.ledger.merkle import verify_consistency, verify_inclusion

CALLERS = (1, 64, 512)
TURNS = 5
LEAVES_PER_TURN = {1: 100, 64: 2000, 512: 4096}
MILLION, TEN_MILLION = 1_000_000, 10_000_000
PROOFS = 2000

_random = random.Random(2026)  # noqa: S311 - which leaves to prove


def leaf(number: int) -> bytes:
    """430 bytes, like a ``release.intent``."""
    return b'{"type":"release.intent","number":%012d,"filling":"' % number + b"0123456789abcdef" * 23 + b'"}'


# -- appends -----------------------------------------------------------------------------------------------------------


async def _drive(append: Callable[[int], Awaitable[object]], callers: int, first: int, count: int) -> dict[str, float]:
    """``count`` appends by ``callers`` at once: rate a second, p50 and p99 in milliseconds."""
    numbers = iter(range(first, first + count))
    seconds: list[float] = []

    async def caller() -> None:
        for number in numbers:
            started = time.perf_counter()
            await append(number)
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    total = time.perf_counter() - started
    cuts = statistics.quantiles(seconds, n=100)
    return {"per_second": count / total, "p50_ms": cuts[49] * 1000, "p99_ms": cuts[98] * 1000}


class BareSqlite:
    """One thread that commits a row at a time."""

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("CREATE TABLE leaves (number INTEGER PRIMARY KEY, leaf BLOB)")

    def _commit(self, number: int) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("INSERT INTO leaves VALUES (?, ?)", (number, leaf(number)))
        self._connection.execute("COMMIT")

    async def append(self, number: int) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._commit, number)

    def close(self) -> None:
        self._thread.shutdown()
        self._connection.close()


class Pymerkle:
    """pymerkle on SQLite, on a thread of its own."""

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._tree = SqliteTree(str(path))

    async def append(self, number: int) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._tree.append_entry, leaf(number))

    def close(self) -> None:
        self._thread.shutdown()
        self._tree.close()


async def _appends(scratch: Path) -> dict[str, object]:
    build(scratch / "log", 0, leaf)
    batches: list[int] = []
    sequencer = Sequencer(open_built(scratch / "log"), on_batch=lambda count, seconds: batches.append(count))
    bare, peer = BareSqlite(scratch / "bare.db"), Pymerkle(scratch / "pymerkle.db")

    async def ours(number: int) -> None:
        await sequencer.append(leaf(number), b"%d" % number)

    out: dict[str, object] = {}
    first = 0
    for callers in CALLERS:
        count = LEAVES_PER_TURN[callers]
        batches.clear()
        turns: dict[str, list[dict[str, float]]] = {"keyquorum": [], "sqlite_commits": [], "pymerkle": []}
        for _ in range(TURNS):
            for name, append in (("keyquorum", ours), ("sqlite_commits", bare.append), ("pymerkle", peer.append)):
                # Slow ones get fewer: their rate is what is asked for, and their queue is as long.
                fewer = count if name == "keyquorum" else max(callers, count // 8)
                turns[name].append(await _drive(append, callers, first, fewer))
            first += count
        found: dict[str, object] = {
            name: {what: round(statistics.median(turn[what] for turn in each), 3) for what in each[0]}
            for name, each in turns.items()
        }
        for name in ("sqlite_commits", "pymerkle"):
            pairs = list(zip(turns["keyquorum"], turns[name], strict=True))
            found[f"over_{name}"] = {
                "rate": round(statistics.median(a["per_second"] / b["per_second"] for a, b in pairs), 2),
                "p99": round(statistics.median(a["p99_ms"] / b["p99_ms"] for a, b in pairs), 2),
            }
        found["leaves_per_checkpoint"] = round(statistics.mean(batches), 1)
        out[f"{callers}_callers"] = found
    await sequencer.close()
    bare.close()
    peer.close()
    return out


# -- proofs ------------------------------------------------------------------------------------------------------------


def _rate(count: int, call: Callable[[int], object]) -> float:
    started = time.perf_counter()
    for number in range(count):
        call(number)
    return round(count / (time.perf_counter() - started), 1)


def _proofs(folder: Path, size: int) -> dict[str, object]:
    started = time.perf_counter()
    log = open_built(folder)
    opened = time.perf_counter() - started
    last = log.latest.checkpoint
    indices = [_random.randrange(size) for _ in range(PROOFS)]
    sizes = sorted(_random.randrange(1, size) for _ in range(PROOFS // 4))
    inclusion = [log.inclusion(index, size) for index in indices[:50]]  # the tiles above the leaves are read once
    build_rate = _rate(PROOFS, lambda number: inclusion.append(log.inclusion(indices[number], size)))
    proofs = inclusion[50:]
    hashes = [log.leaf_hash(index) for index in indices]
    consistency: list[tuple[bytes, ...]] = []
    consistency_rate = _rate(len(sizes), lambda number: consistency.append(log.consistency(sizes[number], size)))
    roots = [log.root(old) for old in sizes]
    found: dict[str, object] = {
        "open_seconds": round(opened, 3),
        "inclusion_built_per_second": build_rate,
        "inclusion_verified_per_second": _rate(
            PROOFS, lambda n: verify_inclusion(hashes[n], indices[n], size, proofs[n], last.root)
        ),
        "inclusion_hashes_at_most": max(map(len, proofs)),
        "consistency_built_per_second": consistency_rate,
        "consistency_verified_per_second": _rate(
            len(sizes), lambda n: verify_consistency(sizes[n], roots[n], size, last.root, consistency[n])
        ),
        "consistency_hashes_at_most": max(map(len, consistency)),
    }
    log.close()
    return found


# -- memory ------------------------------------------------------------------------------------------------------------

_PROCESS = """
import asyncio, json, random, resource, sys
from pathlib import Path
from benchmarks.ledger import leaf
from benchmarks.ledger_offline import open_built
from keyquorum_coordinator.sequencer import Sequencer

async def main():
    sequencer = Sequencer(open_built(Path(sys.argv[1])))
    choose = random.Random(1)
    for start in range(0, 4096, 64):
        numbers = range(start, start + 64)
        await asyncio.gather(*(sequencer.append(leaf(number), b"memory %d" % number) for number in numbers))
        size = sequencer.latest.checkpoint.size
        await sequencer.inclusion(choose.randrange(size), size)
        await sequencer.consistency(choose.randrange(size), size)
    await sequencer.close()

asyncio.run(main())
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
"""


def _peak_mib(folder: Path) -> float:
    """Peak resident memory of a process that appends 4096 leaves to a log and proves 128 times."""
    done = subprocess.run([sys.executable, "-c", _PROCESS, str(folder)], capture_output=True, check=True, timeout=600)
    return round(float(json.loads(done.stdout)) / 1024, 1)


def measure(scratch: Path) -> dict[str, object]:
    (scratch / "append").mkdir()
    appends = asyncio.run(_appends(scratch / "append"))
    build(scratch / "ten", 10, leaf)
    started = time.perf_counter()
    build(scratch / "million", MILLION, leaf)
    built = time.perf_counter() - started
    proofs = _proofs(scratch / "million", MILLION)
    few, many = _peak_mib(scratch / "ten"), _peak_mib(scratch / "million")
    started = time.perf_counter()
    build(scratch / "ten-million", TEN_MILLION, leaf)
    worst = {"built_offline_seconds": round(time.perf_counter() - started, 1)}
    return {
        "append": appends,
        "proofs_at_million": {"built_offline_seconds": round(built, 1), **proofs},
        "memory": {"peak_mib_at_ten": few, "peak_mib_at_million": many, "ratio": round(many / few, 3)},
        "worst_case_ten_million": {**worst, **_proofs(scratch / "ten-million", TEN_MILLION)},
    }
