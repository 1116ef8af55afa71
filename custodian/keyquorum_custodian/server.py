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
import sys
from collections.abc import Callable, Iterator, Mapping

import grpc
import grpc.aio

from keyquorum_core.errors import KeyquorumError
from keyquorum_custodian import __version__
from keyquorum_custodian.answering import report
from keyquorum_custodian.canary_service import CanaryService
from keyquorum_custodian.init import ADMIN_CERTIFICATE
from keyquorum_custodian.listening import ADMIN, BACKUPS, CANARY, CEREMONIES, CUSTODIAN, RESTORATION, Listener, listen
from keyquorum_custodian.logs import logger
from keyquorum_custodian.metrics import Metrics
from keyquorum_custodian.node import Node
from keyquorum_custodian.pacing import Beside
from keyquorum_custodian.restoration_services import BackupsService, RestorationService
from keyquorum_custodian.sealed_node import SealedNode
from keyquorum_custodian.sealed_server import SealedServer
from keyquorum_custodian.services import AdminService, CeremoniesService, CustodianService
from keyquorum_custodian.witness_http import WitnessListener
from keyquorum_protos.v1 import custodian_pb2_grpc, drills_pb2_grpc, restoration_pb2_grpc
from keyquorum_protos.wire.files import read_bytes

__all__ = ["CustodianServer", "serve"]

_FLUSH_SECONDS = 1.0
_PREPARE_SECONDS = 10.0


class CustodianServer:
    """The listeners around one :class:`Node`. ``changed`` is set once its operator wants it sealed."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.changed = asyncio.Event()
        self._log = logger()
        self._tasks: list[asyncio.Task[None]] = []
        self._listeners: list[Listener] = []
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
            restoration_pb2_grpc.add_RestorationServicer_to_server(RestorationService(node), server)

        def add_operators_services(server: grpc.aio.Server) -> None:
            custodian_pb2_grpc.add_CustodianAdminServicer_to_server(AdminService(node, self.changed.set), server)
            restoration_pb2_grpc.add_BackupsServicer_to_server(BackupsService(node, self._beside), server)

        self.address = await self._listen(
            node.config.listen,
            coordinators,
            dict.fromkeys((CUSTODIAN, CEREMONIES, CANARY, RESTORATION), "coordinator"),
            add_services,
        )
        operator = read_bytes(node.config.path(ADMIN_CERTIFICATE), "the operator's certificate", 64 << 10)
        self.admin_address = await self._listen(
            node.config.admin_listen,
            [operator],
            dict.fromkeys((ADMIN, BACKUPS), "operator"),
            add_operators_services,
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
        services: Mapping[str, str],
        add: Callable[[grpc.aio.Server], None],
    ) -> str:
        node = self._node
        made = await listen(
            address, node.tls_identity, client_roots, node.config.cluster, services, add, observe=self._observe
        )
        self._listeners.append(made)
        return made.address

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
        for each in self._listeners:
            await each.health.enter_graceful_shutdown()
        self._custodian.end_streams()
        await asyncio.gather(*(each.stop(grace) for each in self._listeners))
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


async def serve(node: Node | SealedNode, announce: Callable[[str], None]) -> bool:
    """Serve, open or sealed, until SIGTERM or SIGINT, or until its operator seals an open one; then finish what is
    under way and close the keystore. True: it is to go on, sealed, without anything that this process's memory holds.

    ``announce`` gets one line of JSON once the custodian can be reached. Unsealing changes over in place: the same
    process, the same addresses, which are not listened at for a moment.
    """
    log = logger()
    # Seconds after which the thread that computes in ceremonies makes room for this one, when both are in Python code.
    sys.setswitchinterval(0.001)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    announced = False
    while True:
        server = CustodianServer(node) if isinstance(node, Node) else SealedServer(node)
        following: Node | None = None
        try:
            await server.start()
            if not announced:
                announce(json.dumps(_ready(node, server)))
                announced = True
            _say_serving(node, server)
            await _first(stop, server.changed)
            log.info("stopping" if stop.is_set() else "changing over", custodian=node.config.id)
        finally:
            await server.stop(node.config.shutdown_grace)
            following = server.opened if isinstance(server, SealedServer) else None
            if following is None:
                node.close()
            elif stop.is_set():
                following.close()
        if stop.is_set() or following is None:
            log.info("stopped" if stop.is_set() else "sealing", custodian=node.config.id)
            return not stop.is_set()
        node = following


def _ready(node: Node | SealedNode, server: CustodianServer | SealedServer) -> dict[str, object]:
    return {
        "ready": True,
        "custodian": node.config.id,
        "address": server.address,
        "admin": server.admin_address,
        "metrics": node.config.metrics_listen,
        "witness": server.witness_address,
        "pid": os.getpid(),
        "version": __version__,
        "sealed": isinstance(node, SealedNode),
    }


def _say_serving(node: Node | SealedNode, server: CustodianServer | SealedServer) -> None:
    if isinstance(node, SealedNode):
        logger().warning("sealed: serving status only", custodian=node.config.id, address=server.address)
    else:
        epochs = len(node.epochs.all())
        logger().info("serving", custodian=node.config.id, address=server.address, epochs=epochs)


async def _first(*events: asyncio.Event) -> None:
    """Return once one of them is set."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
