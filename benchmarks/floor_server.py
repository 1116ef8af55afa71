"""One process of the floors that release latency is compared with.

``empty`` answers with bytes of the right size and does nothing. ``crypto`` does what no release can do without: one
HPKE seal (X-Wing) of a share's plaintext to the recipient in the request, and one Ed25519 signature. ``witness`` does
what no custodian can do without before it releases on a checkpoint that it has not seen (:func:`pack_step`): verify the
log's two signatures, the consistency proof and the leaf's inclusion, and store the checkpoint durably. All serve the
request as a unary call and on one ordered stream, over the same mTLS as a custodian.

A request to ``empty`` and ``crypto`` is u32be(len recipient key) ‖ recipient key ‖ u32be(plaintext size) ‖ padding to
the real request's size.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keyquorum_core.ledger.log_keys import LogKeys, open_checkpoint
from keyquorum_core.ledger.merkle import verify_consistency, verify_inclusion
from keyquorum_core.sealing import seal
from keyquorum_protos.wire import tls

SIGNING_SEED = bytes(range(32))  # the floor's key; it protects nothing
INFO = b"i" * 32
UNARY = "/floor.Floor/Unary"
STREAM = "/floor.Floor/Stream"


@dataclass(frozen=True, slots=True)
class Step:
    """A checkpoint after another, with the proofs that a custodian verifies: hashes of 32 bytes, lowest first."""

    log: LogKeys
    old_size: int
    old_root: bytes
    checkpoint: bytes
    consistency: tuple[bytes, ...]
    leaf_hash: bytes
    index: int
    inclusion: tuple[bytes, ...]


def pack_step(step: Step, size: int) -> bytes:
    """As bytes, filled up to the size of a release's request."""
    fields = {
        "log": step.log.encode(),
        "old_size": step.old_size,
        "old_root": step.old_root.hex(),
        "checkpoint": step.checkpoint.decode(),
        "consistency": [each.hex() for each in step.consistency],
        "leaf_hash": step.leaf_hash.hex(),
        "index": step.index,
        "inclusion": [each.hex() for each in step.inclusion],
    }
    return json.dumps(fields).encode().ljust(size)


def _witness(database: sqlite3.Connection) -> Callable[[bytes], bytes]:
    """Verify a step from wherever it starts, and keep its end."""
    for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
        database.execute(f"PRAGMA {pragma}")
    database.execute("CREATE TABLE ledger (log TEXT PRIMARY KEY, size INTEGER, root BLOB, note BLOB)")

    def verify(request: bytes) -> bytes:
        step = json.loads(request)
        signed = open_checkpoint(step["checkpoint"].encode(), LogKeys.parse(step["log"]))
        tree = signed.checkpoint
        consistency = [bytes.fromhex(each) for each in step["consistency"]]
        verify_consistency(step["old_size"], bytes.fromhex(step["old_root"]), tree.size, tree.root, consistency)
        inclusion = [bytes.fromhex(each) for each in step["inclusion"]]
        verify_inclusion(bytes.fromhex(step["leaf_hash"]), step["index"], tree.size, inclusion, tree.root)
        row = (tree.origin, tree.size, tree.root, signed.encode())
        database.execute("INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, ?)", row)
        return bytes(1200)

    return verify


def answerer(kind: str, directory: Path) -> Callable[[bytes], bytes]:
    if kind == "witness":
        path = directory / f"witness-{os.getpid()}.db"
        return _witness(sqlite3.connect(path, isolation_level=None))
    key = Ed25519PrivateKey.from_private_bytes(SIGNING_SEED)

    def crypto(request: bytes) -> bytes:
        size = int.from_bytes(request[:4], "big")
        recipient = request[4 : 4 + size]
        plaintext = bytes(int.from_bytes(request[4 + size : 8 + size], "big"))
        sealed = seal(recipient, plaintext, INFO)
        return key.sign(sealed) + sealed

    def empty(request: bytes) -> bytes:
        size = int.from_bytes(request[:4], "big")
        return bytes(64 + 1136 + int.from_bytes(request[4 + size : 8 + size], "big"))

    return crypto if kind == "crypto" else empty


async def serve(kind: str, directory: Path) -> None:
    answer = answerer(kind, directory)

    async def unary(request: bytes, context: object) -> bytes:
        return answer(request)

    async def stream(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        async for request in requests:
            yield answer(request)

    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server = grpc.aio.server(options=tls.server_options())
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor.Floor", handlers),))
    identity = tls.TlsIdentity((directory / "server.pem").read_bytes(), (directory / "server.key").read_bytes())
    roots = [(directory / "client.pem").read_bytes()]
    port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(identity, roots))
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2])))
