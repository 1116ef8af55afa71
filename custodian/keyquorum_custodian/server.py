"""`keyquorum-custodian serve`: a node on the network, from the first socket to a graceful end.

Two listeners, both mTLS. Coordinators named by the roster reach ``Custodian`` and ``Ceremonies``; the operator's own
certificate, and no other, reaches ``CustodianAdmin``. Health and reflection answer on both. A third one, in plain HTTP
and only where it is configured, is for whoever asks a witness. Nothing here creates or replaces a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_custodian import __version__
from keyquorum_custodian.canary_service import CanaryService
from keyquorum_custodian.init import ADMIN_CERTIFICATE
from keyquorum_custodian.logs import logger
from keyquorum_custodian.metrics import Metrics
from keyquorum_custodian.node import Node
from keyquorum_custodian.pacing import Beside
from keyquorum_custodian.services import AdminService, CeremoniesService, CustodianService, report
from keyquorum_custodian.witness_http import WitnessListener
from keyquorum_protos.v1 import custodian_pb2_grpc, drills_pb2_grpc
from keyquorum_protos.wire import tls
from keyquorum_protos.wire.files import read_bytes
from keyquorum_protos.wire.guard import ANY_ROLE, Guard

__all__ = ["CustodianServer", "serve"]

_CUSTODIAN = "keyquorum.v1.Custodian"
_CEREMONIES = "keyquorum.v1.Ceremonies"
_CANARY = "keyquorum.v1.CanaryFaults"
_ADMIN = "keyquorum.v1.CustodianAdmin"
_OPEN_ROLES = {"/grpc.health.v1.Health/": ANY_ROLE, "/grpc.reflection.v1alpha.ServerReflection/": ANY_ROLE}
_FLUSH_SECONDS = 1.0
_PREPARE_SECONDS = 10.0
_MAX_CALLS = 64  # at once, on each listener: a coordinator has two streams and a few single calls


class CustodianServer:
    """The listeners around one :class:`Node`."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._log = logger()
        self._tasks: list[asyncio.Task[None]] = []
        self._servers: list[grpc.aio.Server] = []
        self._health: list[health.aio.HealthServicer] = []
        self._stop_metrics: Callable[[], None] | None = None
        self._witness: WitnessListener | None = None
        self.metrics = Metrics(node.config.id, node.config.jurisdiction)
        self._custodian = CustodianService(node, self.metrics)
        self._beside = Beside()
        self.address = ""
        self.admin_address = ""
        self.witness_address = ""

    async def start(self) -> None:
        """Listen. Raises :class:`UnavailableError` when an address cannot be had."""
        node = self._node
        self._prepare_metrics()
        coordinators = [certificate.encode() for certificate in node.roster.coordinator_tls]

        def add_services(server: grpc.aio.Server) -> None:
            custodian_pb2_grpc.add_CustodianServicer_to_server(self._custodian, server)
            custodian_pb2_grpc.add_CeremoniesServicer_to_server(CeremoniesService(node, self._beside), server)
            drills_pb2_grpc.add_CanaryFaultsServicer_to_server(CanaryService(node), server)

        self.address = await self._listen(
            node.config.listen,
            coordinators,
            {f"/{name}/": frozenset({"coordinator"}) for name in (_CUSTODIAN, _CEREMONIES, _CANARY)},
            (_CUSTODIAN, _CEREMONIES, _CANARY),
            add_services,
        )
        operator = read_bytes(node.config.path(ADMIN_CERTIFICATE), "the operator's certificate", 64 << 10)
        self.admin_address = await self._listen(
            node.config.admin_listen,
            [operator],
            {f"/{_ADMIN}/": frozenset({"operator"})},
            (_ADMIN,),
            lambda server: custodian_pb2_grpc.add_CustodianAdminServicer_to_server(AdminService(node), server),
        )
        if node.config.witness_listen:
            self._witness = WitnessListener(node.witness, report)
            self.witness_address = await self._witness.start(node.config.witness_listen)
        self._tasks = [asyncio.create_task(self._prepare_windows()), asyncio.create_task(self._flush())]
        for warning in node.warnings():
            self._log.warning(warning, custodian=node.config.id)

    async def _listen(
        self,
        address: str,
        client_roots: list[bytes],
        roles: Mapping[str, frozenset[str]],
        services: tuple[str, ...],
        add: Callable[[grpc.aio.Server], None],
    ) -> str:
        node = self._node
        guard = Guard(node.config.cluster, {**roles, **_OPEN_ROLES}, observe=self._observe, report=report)
        server = grpc.aio.server(interceptors=[guard], options=tls.server_options(), maximum_concurrent_rpcs=_MAX_CALLS)
        add(server)
        state = health.aio.HealthServicer()
        for name in services:
            await state.set(name, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(state, server)
        reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            port = server.add_secure_port(address, tls.server_credentials(node.tls_identity, client_roots))
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
        self._servers.append(server)
        self._health.append(state)
        return f"{address.rpartition(':')[0]}:{port}"

    def _observe(self, method: str, reason: str) -> None:
        self.metrics.calls.labels(method, reason or "OK").inc()

    def _prepare_metrics(self) -> None:
        node = self._node
        self.metrics.track_window(node.windows.number)
        self.metrics.epochs.set_function(lambda: len(node.epochs.all()))
        self.metrics.seeds.set_function(lambda: sum(len(held.indices) for held in node.epochs.all()))
        self.metrics.ledger_size.set_function(lambda: node.witness.size)
        self.metrics.ledger_witnessed.set_function(lambda: node.witness.witnessed_at)
        self.metrics.ledger_alarms.set_function(lambda: len(node.witness.open_alarms))
        self.metrics.quarantined.set_function(lambda: node.quarantine.in_force)
        self._look_at_bulletins()
        if node.config.metrics_listen:
            self._stop_metrics = self.metrics.serve(node.config.metrics_listen)

    async def _prepare_windows(self) -> None:
        """Sign each window's statement before it begins, in a thread: no release waits for that millisecond."""
        while True:
            with self._reported("preparing windows"):
                await asyncio.to_thread(self._node.windows.prepare_next)
            await asyncio.sleep(_PREPARE_SECONDS)

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            with self._reported("saving appraisals"):
                self._flush_now()
            with self._reported("counting leases"):
                # In this thread, which is the keystore's.
                self.metrics.leases.set(self._node.leases.count(int(self._node.clock())))
            with self._reported("looking at the bulletins"):
                self._look_at_bulletins()

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        """Work that goes on for as long as the custodian does: a failure is logged, and it is tried again."""
        try:
            yield
        except Exception as error:
            report(what, secrets.token_hex(8), error)

    def _flush_now(self) -> None:
        try:
            self._node.gate.flush()
        except KeyquorumError as error:
            self._log.error("appraisals could not be saved", **error.as_dict())

    def _look_at_bulletins(self) -> None:
        """Files are also looked at when they are needed; this is for the log, the metrics and an idle custodian."""
        bulletins = self._node.bulletins
        bulletins.refresh()
        with contextlib.suppress(KeyquorumError):  # what stops releases is said at each, and in `status`
            self._node.withdrawn.current()
        self.metrics.development.set(self._node.trusts_development)
        for message, members in bulletins.take_events():
            (self._log.error if "reason" in members else self._log.info)(message, **members)
        for kind, accepted, problem in bulletins.states():
            self.metrics.bulletin_version.labels(kind).set(accepted.version if accepted else 0)
            self.metrics.bulletin_expires.labels(kind).set(accepted.expires_at if accepted else 0)
            self.metrics.bulletin_refused.labels(kind).set(bool(problem))

    async def stop(self, grace: float) -> None:
        """Accept nothing more, give what is under way ``grace`` seconds, then close everything."""
        for state in self._health:
            await state.enter_graceful_shutdown()
        self._custodian.end_streams()
        await asyncio.gather(*(server.stop(grace) for server in self._servers))
        await asyncio.to_thread(self._beside.close)
        if self._witness is not None:
            await self._witness.stop()
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._stop_metrics is not None:
            await asyncio.to_thread(self._stop_metrics)
        self._flush_now()


async def serve(node: Node, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is under way and close the keystore. ``announce`` gets one line
    of JSON once the custodian can be reached."""
    log = logger()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = CustodianServer(node)
    try:
        await server.start()
        announce(
            json.dumps(
                {
                    "ready": True,
                    "custodian": node.config.id,
                    "address": server.address,
                    "admin": server.admin_address,
                    "metrics": node.config.metrics_listen,
                    "witness": server.witness_address,
                    "pid": os.getpid(),
                    "version": __version__,
                }
            )
        )
        log.info("serving", custodian=node.config.id, address=server.address, epochs=len(node.epochs.all()))
        await stop.wait()
        log.info("stopping", custodian=node.config.id, grace=node.config.shutdown_grace)
    finally:
        await server.stop(node.config.shutdown_grace)
        node.close()
    log.info("stopped", custodian=node.config.id)
