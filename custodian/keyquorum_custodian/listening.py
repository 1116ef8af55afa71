"""One gRPC listener of a custodian, sealed or open: mTLS, a role for each service, health and reflection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_custodian.answering import report
from keyquorum_protos.wire import tls
from keyquorum_protos.wire.guard import ANY_ROLE, Guard

__all__ = ["ADMIN", "BACKUPS", "CANARY", "CEREMONIES", "CUSTODIAN", "RESTORATION", "Listener", "listen"]

CUSTODIAN: Final = "keyquorum.v1.Custodian"
CEREMONIES: Final = "keyquorum.v1.Ceremonies"
CANARY: Final = "keyquorum.v1.CanaryFaults"
RESTORATION: Final = "keyquorum.v1.Restoration"
ADMIN: Final = "keyquorum.v1.CustodianAdmin"
BACKUPS: Final = "keyquorum.v1.Backups"
_OPEN_ROLES = {"/grpc.health.v1.Health/": ANY_ROLE, "/grpc.reflection.v1alpha.ServerReflection/": ANY_ROLE}
_MAX_CALLS = 64  # at once, on each listener: a coordinator has two streams and a few single calls


@dataclass(frozen=True, slots=True)
class Listener:
    """One that listens at ``address``, host:port."""

    server: grpc.aio.Server
    health: health.aio.HealthServicer
    address: str

    async def stop(self, grace: float) -> None:
        """Accept nothing more, and give what is under way ``grace`` seconds."""
        await self.server.stop(grace)


async def listen(
    address: str,
    identity: tls.TlsIdentity,
    client_roots: list[bytes],
    cluster: str,
    services: Mapping[str, str],
    add: Callable[[grpc.aio.Server], None],
    *,
    observe: Callable[[str, str], None],
    serving: bool = True,
) -> Listener:
    """Serve ``services`` (name → the role that may call it), which ``add`` puts on the server. Their health is SERVING
    only if ``serving``. Raises :class:`UnavailableError` when the address cannot be had."""
    roles = {f"/{name}/": frozenset({role}) for name, role in services.items()}
    guard = Guard(cluster, {**roles, **_OPEN_ROLES}, observe=observe, report=report)
    server = grpc.aio.server(interceptors=[guard], options=tls.server_options(), maximum_concurrent_rpcs=_MAX_CALLS)
    add(server)
    state = health.aio.HealthServicer()
    status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
    for name in services:
        await state.set(name, status)
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_secure_port(address, tls.server_credentials(identity, client_roots))
    except RuntimeError:
        port = 0
    if not port:
        await server.stop(0)
        raise UnavailableError(
            Reason.UNAVAILABLE,
            f"cannot listen at {address}",
            next_step="Check that no other process listens there, and that the address is this machine's.",
        )
    await server.start()
    return Listener(server, state, f"{address.rpartition(':')[0]}:{port}")
