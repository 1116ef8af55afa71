"""One mTLS channel to the coordinator: typed errors, and patience with a coordinator that is being restarted.

Every call of this library is idempotent (submissions, commits and uploads by the job's digest, ceremonies by their
id), so a call that didn't get through is simply made again. Only the transport is retried: an error that the
coordinator itself gave is its answer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TypeVar

import grpc
import grpc.aio

from keyquorum.profile import Profile
from keyquorum_core.errors import KeyquorumError
from keyquorum_protos.v1 import coordinator_pb2_grpc as rpc
from keyquorum_protos.v1 import drills_pb2_grpc as drills_rpc
from keyquorum_protos.wire.errors import from_rpc_error
from keyquorum_protos.wire.retry import BROKEN, Backoff
from keyquorum_protos.wire.tls import TlsIdentity, dns_name, open_channel

__all__ = ["Connection"]

Request = TypeVar("Request")
Response = TypeVar("Response")

FIRST_CONTACT_SECONDS = 5.0  # a wrong address or certificate should not take long to be told
PATIENCE_SECONDS = 60.0  # a coordinator that was there before is probably being restarted


class Connection:
    """Stubs over one channel, dialled as ``identity``. The peer is known by the certificate that the roster pins."""

    def __init__(self, profile: Profile, identity: TlsIdentity, *, patience: float = PATIENCE_SECONDS) -> None:
        self._peer = f"coordinator {profile.coordinator_name} at {profile.coordinator}"
        self._patience = patience
        self._reached = False
        self._channel = open_channel(
            profile.coordinator,
            identity,
            [pem.encode() for pem in profile.roster.coordinator_tls],
            dns_name(profile.cluster, "coordinator", profile.coordinator_name),
        )
        self.cluster = rpc.ClusterStub(self._channel)
        self.keys = rpc.KeysStub(self._channel)
        self.revocations = rpc.RevocationsStub(self._channel)
        self.drills = drills_rpc.DrillsStub(self._channel)
        self.jobs = rpc.JobsStub(self._channel)
        self.artifacts = rpc.ArtifactsStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    def backoff(self) -> Backoff:
        return Backoff(self._patience if self._reached else min(self._patience, FIRST_CONTACT_SECONDS))

    def reached(self) -> None:
        """The coordinator answered: from now on, be patient."""
        self._reached = True

    def error(self, error: grpc.aio.AioRpcError) -> KeyquorumError:
        return from_rpc_error(error, self._peer)

    def decided(self, error: grpc.aio.AioRpcError) -> bool:
        """Whether the error is the coordinator's own answer."""
        trailing = error.trailing_metadata() or ()
        decided = any(name == "grpc-status-details-bin" for name, _ in trailing)
        if decided:
            self.reached()
        return decided

    def transient(self, error: grpc.aio.AioRpcError) -> bool:
        """Whether the call failed on the way, rather than by the coordinator's decision."""
        decided = self.decided(error)
        return error.code() in BROKEN and not decided

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        timeout: float = 30.0,
        patient: bool = True,
    ) -> Response:
        """Call until it gets through; once and briefly, unless ``patient``. Raises the typed error that the coordinator
        gave, or that the transport means."""
        backoff = self.backoff()
        timeout = timeout if patient else min(timeout, FIRST_CONTACT_SECONDS)
        while True:
            try:
                response = await method(request, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                if not (self.transient(error) and patient and await backoff.wait()):
                    raise self.error(error) from None
            else:
                self.reached()
                return response

    async def stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Request, Response],
        request: Request,
        *,
        timeout: float | None = None,
    ) -> AsyncGenerator[Response, None]:
        """Responses of one call, not retried. Raises :class:`grpc.aio.AioRpcError`, for callers that know how to go on.

        Leaving the loop early hangs up; use :func:`contextlib.aclosing`.
        """
        call = method(request, timeout=timeout)
        try:
            async for response in call:
                self.reached()
                yield response
        finally:
            call.cancel()
