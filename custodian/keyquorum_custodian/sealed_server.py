"""A sealed custodian on the network: the same two listeners, and nothing on them but what needs no secret.

Coordinators are told that it is sealed, and may ask who it is; everything else is refused with ``SEALED``. Its operator
may ask for its state, and unseal it. Health says that the custodian does not serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, NoReturn

import grpc
import grpc.aio

from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_custodian import __version__
from keyquorum_custodian.answering import report
from keyquorum_custodian.init import ADMIN_CERTIFICATE
from keyquorum_custodian.listening import ADMIN, BACKUPS, CANARY, CEREMONIES, CUSTODIAN, RESTORATION, Listener, listen
from keyquorum_custodian.logs import logger
from keyquorum_custodian.metrics import Metrics
from keyquorum_custodian.node import Node
from keyquorum_custodian.sealed_node import Progress, SealedNode
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2_grpc as rpc
from keyquorum_protos.v1 import drills_pb2_grpc as drills
from keyquorum_protos.v1 import restoration_pb2 as restoration_pb
from keyquorum_protos.v1 import restoration_pb2_grpc as restoration
from keyquorum_protos.wire.files import read_bytes

__all__ = ["SealedServer"]

_EXPIRE_SECONDS = 1.0
_Context = Any


class SealedServer:
    """The listeners around one :class:`SealedNode`. ``changed`` is set once it is open; then :attr:`opened` is it."""

    def __init__(self, node: SealedNode) -> None:
        self._node = node
        self.changed = asyncio.Event()
        self.opened: Node | None = None
        self.address = ""
        self.admin_address = ""
        self.witness_address = ""
        self._listeners: list[Listener] = []
        self._expiring: asyncio.Task[None] | None = None
        self._stop_metrics: Callable[[], None] | None = None
        self.metrics = Metrics(node.config.id, node.config.jurisdiction)

    async def start(self) -> None:
        """Listen. Raises :class:`UnavailableError` when an address cannot be had."""
        node = self._node
        config = node.config
        self.metrics.sealed.set(1)
        if config.metrics_listen:
            self._stop_metrics = self.metrics.serve(config.metrics_listen)

        def add_services(server: grpc.aio.Server) -> None:
            rpc.add_CustodianServicer_to_server(_Sealed(node), server)
            rpc.add_CeremoniesServicer_to_server(_NoCeremonies(), server)
            drills.add_CanaryFaultsServicer_to_server(_NoDrills(), server)
            restoration.add_RestorationServicer_to_server(_NoRestoration(), server)

        def add_operators_services(server: grpc.aio.Server) -> None:
            rpc.add_CustodianAdminServicer_to_server(_Admin(node, self._open), server)
            restoration.add_BackupsServicer_to_server(_NoBackups(), server)

        coordinators = [certificate.encode() for certificate in node.roster.coordinator_tls]
        custodian = await listen(
            config.listen,
            node.tls_identity,
            coordinators,
            config.cluster,
            dict.fromkeys((CUSTODIAN, CEREMONIES, CANARY, RESTORATION), "coordinator"),
            add_services,
            observe=self._observe,
            serving=False,
        )
        self._listeners.append(custodian)
        self.address = custodian.address
        operator = read_bytes(config.path(ADMIN_CERTIFICATE), "the operator's certificate", 64 << 10)
        admin = await listen(
            config.admin_listen,
            node.tls_identity,
            [operator],
            config.cluster,
            dict.fromkeys((ADMIN, BACKUPS), "operator"),
            add_operators_services,
            observe=self._observe,
        )
        self._listeners.append(admin)
        self.admin_address = admin.address
        self._expiring = asyncio.create_task(self._expire())
        for warning in node.warnings():
            logger().warning(warning, custodian=config.id)

    def _open(self, opened: Node) -> None:
        self.opened = opened
        self.changed.set()

    def _observe(self, method: str, reason: str) -> None:
        self.metrics.calls.labels(method, reason or "OK").inc()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_SECONDS)
            try:
                forgotten = self._node.expire()
            except Exception as error:
                report("forgetting shares", secrets.token_hex(8), error)
            else:
                if forgotten:
                    logger().warning("shares forgotten: the rest did not come in time", shares=forgotten)

    async def stop(self, grace: float) -> None:
        """Accept nothing more, give what is under way ``grace`` seconds, then close everything."""
        for each in self._listeners:
            await each.health.enter_graceful_shutdown()
        await asyncio.gather(*(each.stop(grace) for each in self._listeners))
        if self._expiring is not None:
            self._expiring.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._expiring
        if self._stop_metrics is not None:
            await asyncio.to_thread(self._stop_metrics)


def _refuse() -> NoReturn:
    raise UnavailableError(
        Reason.SEALED,
        "this custodian is sealed: its keys are not open",
        expected="an open keystore",
        actual="a sealed one",
        next_step="Its operator unseals it: keyquorum-custodian unseal.",
    )


def _none() -> Iterable[Any]:
    _refuse()


class _Sealed(rpc.CustodianServicer):
    """What coordinators may ask of a sealed custodian."""

    def __init__(self, node: SealedNode) -> None:
        self._node = node

    async def Release(self, request_iterator: object, context: _Context) -> AsyncIterator[pb.ReleaseAnswer]:
        for answer in _none():
            yield answer

    async def GetWindow(self, request: pb.GetWindowRequest, context: _Context) -> NoReturn:
        _refuse()

    async def Describe(self, request: pb.DescribeRequest, context: _Context) -> pb.DescribeResponse:
        return _describe(self._node)

    async def Revoke(self, request: pb.RevokeRequest, context: _Context) -> NoReturn:
        _refuse()


class _NoCeremonies(rpc.CeremoniesServicer):
    """None without keys."""

    async def _refused(self, request: object, context: _Context) -> NoReturn:
        _refuse()

    Propose = Deliver = Confirm = Activate = Give = Restore = Erase = Cancel = GetCertificate = _refused


class _NoDrills(drills.CanaryFaultsServicer):
    """Nothing is injected into what does not serve."""

    async def _refused(self, request: object, context: _Context) -> NoReturn:
        _refuse()

    Inject = Lift = Show = _refused


class _NoRestoration(restoration.RestorationServicer):
    """Who can't sign proves nothing and testifies to nothing."""

    async def _refused(self, request: object, context: _Context) -> NoReturn:
        _refuse()

    Challenge = Testify = Vouch = _refused


class _NoBackups(restoration.BackupsServicer):
    """What it would back up is not open."""

    async def Make(self, request: object, context: _Context) -> AsyncIterator[restoration_pb.BackupPiece]:
        for piece in _none():
            yield piece


class _Admin(rpc.CustodianAdminServicer):
    """What a sealed custodian's operator may ask of it."""

    def __init__(self, node: SealedNode, opened: Callable[[Node], None]) -> None:
        self._node = node
        self._opened = opened
        self._open = False

    async def Status(self, request: pb.StatusRequest, context: _Context) -> pb.StatusResponse:
        return pb.StatusResponse(
            description=_describe(self._node),
            started_at=self._node.started_at,
            warnings=self._node.warnings(),
            sealing=_progress(self._node.progress),
        )

    async def Unseal(self, request: pb.UnsealRequest, context: _Context) -> pb.UnsealResponse:
        if self._open:
            return pb.UnsealResponse(open=True)
        node = self._node.offer(request.secret)
        if node is None:
            progress = self._node.progress
            logger().info("share accepted", held=progress.shares_held, needed=progress.shares_needed)
            return pb.UnsealResponse(sealing=_progress(progress))
        self._open = True
        logger().warning("unsealed", custodian=node.config.id)
        self._opened(node)
        return pb.UnsealResponse(open=True)

    async def Seal(self, request: pb.SealRequest, context: _Context) -> pb.SealResponse:
        forgotten = self._node.forget()
        if forgotten:
            logger().warning("shares forgotten on the operator's word", shares=forgotten)
        return pb.SealResponse()

    async def _refused(self, request: object, context: _Context) -> NoReturn:
        _refuse()

    ListLedgerAlarms = ClearLedgerAlarm = AcceptBulletin = ListApprovals = Decide = _refused
    ListQuarantine = LiftQuarantine = _refused


def _describe(node: SealedNode) -> pb.DescribeResponse:
    return pb.DescribeResponse(
        custodian=node.config.id,
        jurisdiction=node.config.jurisdiction,
        cluster=node.config.cluster,
        roster_version=node.roster.version,
        roster_digest=node.roster.digest,
        version=__version__,
        now=int(node.clock()),
        sealed=True,
        scheme=str(node.scheme),
    )


def _progress(progress: Progress) -> pb.SealState:
    return pb.SealState(
        shares_held=progress.shares_held,
        shares_needed=progress.shares_needed,
        forgotten_at=progress.forgotten_at,
        failed_attempts=progress.failed_attempts,
        next_attempt_at=progress.next_attempt_at,
    )
