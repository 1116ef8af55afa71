"""The worker's one channel to the coordinator: typed errors, and patience while the coordinator is being restarted.

Every call of the worker is idempotent, so one that did not get through is made again. Only the transport is retried;
an error that the coordinator itself gave is its answer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TypeVar

import grpc
import grpc.aio

from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_core.roster import Roster
from keyquorum_gpu_worker.config import WorkerConfig
from keyquorum_protos.v1 import coordinator_pb2_grpc as rpc
from keyquorum_protos.wire.errors import from_rpc_error
from keyquorum_protos.wire.retry import BROKEN, Backoff
from keyquorum_protos.wire.tls import TlsIdentity, dns_name, open_channel

__all__ = ["PATIENCE_SECONDS", "Link"]

Request = TypeVar("Request")
Response = TypeVar("Response")

PATIENCE_SECONDS = 120.0
"""How long a coordinator may be away, in the middle of a job, before the worker gives the job up."""
_TRANSIENT = (*BROKEN, grpc.StatusCode.DEADLINE_EXCEEDED)


class Link:
    """Stubs over one mTLS channel. The coordinator is known by the certificate that the roster pins."""

    def __init__(
        self, config: WorkerConfig, roster: Roster, identity: TlsIdentity, *, patience: float = PATIENCE_SECONDS
    ) -> None:
        self._peer = f"coordinator {config.coordinator_name} at {config.coordinator}"
        self._patience = patience
        self._channel = open_channel(
            config.coordinator,
            identity,
            [pem.encode() for pem in roster.coordinator_tls],
            dns_name(config.cluster, "coordinator", config.coordinator_name),
        )
        self.workers = rpc.WorkersStub(self._channel)
        self.artifacts = rpc.ArtifactsStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    def backoff(self) -> Backoff:
        return Backoff(self._patience)

    def error(self, error: grpc.aio.AioRpcError) -> KeyquorumError:
        """What a failed call means; one that failed on the way is always an :class:`UnavailableError`."""
        meant = from_rpc_error(error, self._peer)
        if self.transient(error) and not isinstance(meant, UnavailableError):
            return UnavailableError(Reason.UNAVAILABLE, f"the call to {self._peer} broke", actual=meant.actual)
        return meant

    def transient(self, error: grpc.aio.AioRpcError) -> bool:
        """Whether the call failed on the way, rather than by the coordinator's decision."""
        decided = any(name == "grpc-status-details-bin" for name, _ in error.trailing_metadata() or ())
        return error.code() in _TRANSIENT and not decided

    async def once(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        timeout: float = 30.0,
    ) -> Response:
        """One call. Raises the typed error that the coordinator gave, or that the transport means."""
        try:
            return await method(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise self.error(error) from None

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        timeout: float = 30.0,
    ) -> Response:
        """Call until it gets through or patience ends. Raises as :meth:`once`."""
        backoff = self.backoff()
        while True:
            try:
                return await method(request, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                if not (self.transient(error) and await backoff.wait()):
                    raise self.error(error) from None

    async def stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Request, Response],
        request: Request,
        *,
        timeout: float,
    ) -> AsyncGenerator[Response, None]:
        """Responses of one call, not retried. Raises :class:`grpc.aio.AioRpcError`, for callers that know how to go on.

        Leaving the loop early hangs up; use :func:`contextlib.aclosing`.
        """
        call = method(request, timeout=timeout)
        try:
            async for response in call:
                yield response
        finally:
            call.cancel()
