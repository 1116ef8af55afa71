"""One process of the two floors that release latency is compared with.

``empty`` answers with bytes of the right size and does nothing. ``crypto`` does what no release can do without: one
HPKE seal (X-Wing) of a share's plaintext to the recipient in the request, and one Ed25519 signature. Both serve the
request as a unary call and on one ordered stream, over the same mTLS as a custodian.

A request is u32be(len recipient key) ‖ recipient key ‖ u32be(plaintext size) ‖ padding to the real request's size.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keyquorum_core.sealing import seal
from keyquorum_protos.wire import tls

SIGNING_SEED = bytes(range(32))  # the floor's key; it protects nothing
INFO = b"i" * 32
UNARY = "/floor.Floor/Unary"
STREAM = "/floor.Floor/Stream"


def answerer(kind: str) -> Callable[[bytes], bytes]:
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
    answer = answerer(kind)

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
