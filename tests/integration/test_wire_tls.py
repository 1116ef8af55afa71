"""mTLS and the guard over real sockets: who gets in, what they may call, and which key exchange protects it (G4)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest

from keyquorum_core.errors import KeyquorumError, Reason, RefusedError
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2_grpc as rpc
from keyquorum_protos.wire import tls
from keyquorum_protos.wire.errors import from_rpc_error
from keyquorum_protos.wire.guard import Guard, peer_of

NOW = int(time.time())
SERVER = tls.self_signed("demo", "custodian", "ch-1", now=NOW)
PINNED = tls.self_signed("demo", "coordinator", "main", now=NOW)
AUTHORITY = tls.CertificateAuthority.create("demo", now=NOW)
X25519MLKEM768 = 0x11EC  # IANA TLS supported groups


class Node(rpc.CustodianServicer):
    async def Describe(
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DescribeResponse:
        return pb.DescribeResponse(custodian=peer_of(context).name)

    async def Revoke(self, request: pb.RevokeRequest, context: object) -> pb.RevokeResponse:
        return pb.RevokeResponse(version=1)

    async def GetWindow(self, request: pb.GetWindowRequest, context: object) -> pb.GetWindowResponse:
        raise ValueError("the seed is 1234")

    async def Release(
        self, requests: AsyncIterator[pb.ReleaseRequest], context: object
    ) -> AsyncIterator[pb.ReleaseAnswer]:
        async for request in requests:
            if request.request_id == "bad":
                raise RefusedError(Reason.QUOTA, "too many", expected=1, actual=2, details={"custodian": "ch-1"})
            yield pb.ReleaseAnswer(request_id=request.request_id)


@dataclass
class Running:
    address: str
    reports: list[BaseException] = field(default_factory=list)
    observed: list[tuple[str, str]] = field(default_factory=list)

    def channel(self, who: tls.TlsIdentity, name: str = "ch-1") -> grpc.aio.Channel:
        return tls.open_channel(self.address, who, [SERVER.certificate], tls.dns_name("demo", "custodian", name))


@pytest.fixture
async def node() -> AsyncIterator[Running]:
    running = Running("")
    guard = Guard(
        "demo",
        {"/keyquorum.v1.Custodian/": frozenset({"coordinator"})},
        observe=lambda method, reason: running.observed.append((method, reason)),
        report=lambda method, reference, error: running.reports.append(error),
    )
    server = grpc.aio.server(interceptors=[guard], options=tls.server_options())
    rpc.add_CustodianServicer_to_server(Node(), server)
    roots = [PINNED.certificate, AUTHORITY.identity.certificate]
    port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(SERVER, roots))
    running.address = f"127.0.0.1:{port}"
    await server.start()
    yield running
    await server.stop(None)


async def call(channel: grpc.aio.Channel) -> str:
    async with channel:
        stub = rpc.CustodianStub(channel)
        try:
            return (await stub.Describe(pb.DescribeRequest(), timeout=5)).custodian
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, "ch-1") from error


async def test_a_pinned_and_an_issued_certificate_get_in(node: Running) -> None:
    assert await call(node.channel(PINNED)) == "main"
    issued = AUTHORITY.issue("demo", "coordinator", "second", now=NOW)
    assert await call(node.channel(issued)) == "second"


async def test_a_certificate_of_another_role_is_refused_by_name(node: Running) -> None:
    with pytest.raises(RefusedError) as caught:
        await call(node.channel(AUTHORITY.issue("demo", "owner", "alice", now=NOW)))
    assert (caught.value.reason, caught.value.expected, caught.value.actual) == (Reason.ROLE, "coordinator", "owner")


async def test_a_certificate_of_another_cluster_is_refused(node: Running) -> None:
    with pytest.raises(RefusedError, match="another cluster"):
        await call(node.channel(AUTHORITY.issue("prod", "coordinator", "main", now=NOW)))


async def test_a_certificate_that_nobody_pinned_does_not_get_in(node: Running) -> None:
    twin = tls.self_signed("demo", "coordinator", "main", now=NOW)
    with pytest.raises(KeyquorumError) as caught:
        await call(node.channel(twin))
    assert caught.value.reason is Reason.UNAVAILABLE


async def test_an_expired_certificate_does_not_get_in(node: Running) -> None:
    old = AUTHORITY.issue("demo", "coordinator", "old", now=NOW - 400 * 86400)
    with pytest.raises(KeyquorumError) as caught:
        await call(node.channel(old))
    assert caught.value.reason is Reason.UNAVAILABLE


async def test_a_server_that_is_somebody_else_is_not_talked_to(node: Running) -> None:
    with pytest.raises(KeyquorumError) as caught:
        await call(node.channel(PINNED, "ch-2"))
    assert caught.value.reason is Reason.UNAVAILABLE


async def test_an_rpc_that_no_role_is_listed_for_is_refused_for_everybody() -> None:
    guard = Guard("demo", {}, report=lambda *_: None)
    server = grpc.aio.server(interceptors=[guard], options=tls.server_options())
    rpc.add_CustodianServicer_to_server(Node(), server)
    port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(SERVER, [PINNED.certificate]))
    await server.start()
    with pytest.raises(RefusedError) as caught:
        await call(Running(f"127.0.0.1:{port}").channel(PINNED))
    assert (caught.value.reason, caught.value.expected) == (Reason.ROLE, "nobody")
    await server.stop(None)


async def test_an_unforeseen_exception_leaves_without_its_text(node: Running) -> None:
    async with node.channel(PINNED) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.CustodianStub(channel).GetWindow(pb.GetWindowRequest(), timeout=5)
    error = from_rpc_error(caught.value, "ch-1")
    assert error.reason is Reason.INTERNAL
    assert "seed" not in str(error)
    assert "seed" in str(node.reports[0])


async def test_a_typed_error_ends_a_stream_with_its_reason(node: Running) -> None:
    async with node.channel(PINNED) as channel:
        stream = rpc.CustodianStub(channel).Release()
        await stream.write(pb.ReleaseRequest(request_id="1"))
        first = await stream.read()
        assert isinstance(first, pb.ReleaseAnswer)
        assert first.request_id == "1"
        await stream.write(pb.ReleaseRequest(request_id="bad"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
    error = from_rpc_error(caught.value, "ch-1")
    assert (error.reason, error.details) == (Reason.QUOTA, {"custodian": "ch-1"})
    assert node.observed[-1] == ("/keyquorum.v1.Custodian/Release", "QUOTA")


def selected_group(server_hello_record: bytes) -> int:
    """The key_share group of a TLS 1.3 ServerHello (RFC 8446 §4.1.3, §4.2.8), from the connection's first record."""
    assert server_hello_record[0] == 22
    assert server_hello_record[5] == 2
    at = 5 + 4 + 2 + 32
    at += 1 + server_hello_record[at]  # legacy_session_id_echo
    at += 2 + 1  # cipher suite, compression
    end = at + 2 + int.from_bytes(server_hello_record[at : at + 2], "big")
    at += 2
    while at < end:
        kind = int.from_bytes(server_hello_record[at : at + 2], "big")
        size = int.from_bytes(server_hello_record[at + 2 : at + 4], "big")
        if kind == 51:
            return int.from_bytes(server_hello_record[at + 4 : at + 6], "big")
        at += 4 + size
    raise AssertionError("no key_share in the ServerHello")


async def test_g4_the_tls_key_exchange_is_post_quantum(node: Running) -> None:
    """G4: recorded traffic gives a quantum computer nothing, because the handshake is X25519MLKEM768."""
    recorded = bytearray()
    host, port = node.address.split(":")
    done = asyncio.Event()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(host, int(port))

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, keep: bool) -> None:
            while data := await source.read(65536):
                if keep:
                    recorded.extend(data)
                sink.write(data)
            sink.close()

        await asyncio.gather(
            pump(reader, upstream_writer, False), pump(upstream_reader, writer, True), return_exceptions=True
        )
        done.set()

    proxy = await asyncio.start_server(relay, "127.0.0.1", 0)
    address = f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    assert await call(Running(address).channel(PINNED)) == "main"
    await asyncio.wait_for(done.wait(), 10)
    proxy.close()
    assert selected_group(bytes(recorded)) == X25519MLKEM768
