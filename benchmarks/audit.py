"""Verifying a log from its first leaf, over HTTP and from a folder, beside plain SHA-256 of the same leaves.

The floor hashes every leaf and every node of the tree with hashlib in a loop, from memory, and does nothing else. The
log is a million leaves of the size of release leaves, served as files by a process of its own; the auditor is a process
of its own, too, so that its peak memory is its own. Memory is compared with that for a log of a tenth of the size.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from keyquorum.ledger.http import HttpSource
from keyquorum.ledger.source import DirectorySource, LogSource
from keyquorum.ledger.verification import verify_log
from keyquorum_core.ledger.compact import CompactRange
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_core.ledger.log_trust import LogTrust
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.ledger.tiles import TILE_WIDTH, Bundle, Tile, encode_bundle
from keyquorum_core.quorum import Custodian, Quorum

LEAVES = 1_000_000
FEWER = LEAVES // 10
CUSTODIANS = ("ch-1", "de-1", "fr-1")


def leaf(number: int) -> bytes:
    """430 bytes, like a ``release.intent``."""
    return b'{"type":"release.intent","number":%d,"filling":"' % number + b"0123456789abcdef" * 23 + b'"}'


def _seed(name: str) -> bytes:
    return hashlib.sha256(b"benchmark " + name.encode()).digest()


def _signer() -> LogSigner:
    keys = _seed("log ed25519"), _seed("log ml-dsa-44")
    return LogSigner(
        "bench/ledger", Ed25519PrivateKey.from_private_bytes(keys[0]), MLDSA44PrivateKey.from_seed_bytes(keys[1])
    )


def _witnesses() -> dict[str, Cosigner]:
    return {name: Cosigner.from_seeds(f"bench/{name}", _seed(name), _seed(name + " ml")) for name in CUSTODIANS}


def trust() -> LogTrust:
    quorum = Quorum({"at_least": 2}, [Custodian(name, name[:2].upper()) for name in CUSTODIANS])
    return LogTrust(_signer().keys, {name: each.keys for name, each in _witnesses().items()}, quorum)


def build(folder: Path, size: int) -> None:
    """A log's files, in one pass and little memory."""
    rows: list[list[bytes]] = [[]]
    tree = CompactRange()

    def write(path: str, data: bytes) -> None:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def visit(level: int, index: int, value: bytes) -> None:
        if level % 8:
            return
        if level // 8 == len(rows):
            rows.append([])
        row = rows[level // 8]
        row.append(value)
        if len(row) == TILE_WIDTH:
            write(Tile(level // 8, index // TILE_WIDTH).path, b"".join(row))
            row.clear()

    for first in range(0, size, TILE_WIDTH):
        leaves = [leaf(number) for number in range(first, min(first + TILE_WIDTH, size))]
        write(Bundle(first // TILE_WIDTH, len(leaves)).path, encode_bundle(leaves))
        for each in leaves:
            tree.append(leaf_hash(each), visit)
    for level, row in enumerate(rows):
        if row:
            write(Tile(level, (size >> (8 * level)) // TILE_WIDTH, len(row)).path, b"".join(row))
    now = int(time.time())
    signed = _signer().sign(size, tree.root(), now)
    lines = [line for each in _witnesses().values() for line in each.cosign(signed.checkpoint, now)]
    write("checkpoint", signed.with_signatures(*lines).encode())


def floor(size: int) -> float:
    """Seconds for hashing every leaf, and every node of the tree, and nothing else."""
    sha256, spent = hashlib.sha256, 0.0
    for first in range(0, size, TILE_WIDTH):
        leaves = [leaf(number) for number in range(first, min(first + TILE_WIDTH, size))]
        started = time.perf_counter()
        row = [sha256(b"\x00" + each).digest() for each in leaves]
        for at in range(len(row) - 1):  # a tree of n leaves has n - 1 nodes
            sha256(b"\x01" + row[at] + row[at + 1]).digest()
        spent += time.perf_counter() - started
    return spent


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder over HTTP, by another process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.audit", "serve", str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def _serve(folder: str) -> None:
    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=folder)  # type: ignore[arg-type]

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


def _verify(where: str) -> None:
    async def run() -> tuple[int, float]:
        source: LogSource = HttpSource(where) if "://" in where else DirectorySource(Path(where))
        started = time.perf_counter()
        done = await verify_log(source, trust())
        await source.close()
        return done.size, time.perf_counter() - started

    size, seconds = asyncio.run(run())
    print(json.dumps({"size": size, "seconds": seconds}))


def verified(where: str) -> tuple[float, float]:
    """Seconds of a verification in a process of its own, and that process's peak resident memory in MiB."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.audit", "verify", where], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    answer = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return float(answer["seconds"]), usage.ru_maxrss / 1024


def measure(scratch: Path) -> dict[str, object]:
    build(scratch / "log", LEAVES)
    build(scratch / "fewer", FEWER)
    least = floor(LEAVES)
    with served(scratch / "log") as url:
        over_http, memory = verified(url)
    with served(scratch / "fewer") as url:
        _, memory_fewer = verified(url)
    from_folder, _ = verified(str(scratch / "log"))
    return {
        "leaves": LEAVES,
        "over_http": _figures(over_http, least),
        "from_a_folder": _figures(from_folder, least),
        "floor_sha256_leaves_per_s": round(LEAVES / least),
        "peak_memory_mib": {
            f"{LEAVES}_leaves": round(memory, 1),
            f"{FEWER}_leaves": round(memory_fewer, 1),
            "ratio": round(memory / memory_fewer, 3),
        },
    }


def _figures(seconds: float, least: float) -> dict[str, float]:
    return {
        "seconds": round(seconds, 1),
        "leaves_per_s": round(LEAVES / seconds),
        "times_the_floor": round(seconds / least, 2),
    }


if __name__ == "__main__":
    {"serve": _serve, "verify": _verify}[sys.argv[1]](sys.argv[2])
