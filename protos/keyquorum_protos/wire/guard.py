"""The one interceptor of every server: who may call what, and how errors leave.

Each RPC is listed with the roles that may call it; an RPC that is not listed is refused for everybody. Typed errors
become statuses; anything else becomes INTERNAL with a log reference and no text, since an unforeseen exception could
carry anything.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import grpc
import grpc.aio
from grpc_status import rpc_status

from keyquorum_core.errors import KeyquorumError, Reason, RefusedError
from keyquorum_protos.wire.errors import to_status

__all__ = ["ANY_ROLE", "Guard", "Peer", "peer_of"]

ANY_ROLE = frozenset({"*"})


@dataclass(frozen=True, slots=True)
class Peer:
    """The authenticated caller, from its certificate's SPIFFE URI."""

    cluster: str
    role: str
    name: str


def peer_of(context: grpc.aio.ServicerContext[Any, Any]) -> Peer:
    """Raises :class:`RefusedError` (``ROLE``) unless the certificate names exactly one well-formed SPIFFE URI."""
    auth = cast(Mapping[str, list[bytes]], context.auth_context())
    names = [san.decode("utf-8", "replace") for san in auth.get("x509_subject_alternative_name", [])]
    uris = [name for name in names if name.startswith("spiffe://")]
    if len(uris) != 1:
        raise RefusedError(
            Reason.ROLE, "the caller's certificate must name one SPIFFE URI", expected="1", actual=len(uris)
        )
    parts = uris[0].removeprefix("spiffe://").split("/")
    if len(parts) != 3 or not all(parts):
        raise RefusedError(
            Reason.ROLE, "the caller's SPIFFE URI is malformed", expected="spiffe://<cluster>/<role>/<name>"
        )
    return Peer(*parts)


class Guard(grpc.aio.ServerInterceptor):
    """``roles`` maps ``/package.Service/Method`` or ``/package.Service/`` (all its methods) to the roles allowed.

    ``observe(method, reason)`` is called once per finished call, with an empty reason on success; ``report(method,
    reference, exception)`` for exceptions that nobody foresaw.
    """

    def __init__(
        self,
        cluster: str,
        roles: Mapping[str, frozenset[str]],
        *,
        observe: Callable[[str, str], None] = lambda method, reason: None,
        report: Callable[[str, str, BaseException], None],
    ) -> None:
        self._cluster = cluster
        self._roles = dict(roles)
        self._observe = observe
        self._report = report

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return handler
        if handler.response_streaming:
            streaming = handler.stream_stream if handler.request_streaming else handler.unary_stream
            wrapped = self._streaming(method, cast(Callable[..., Any], streaming))
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
        else:
            single = handler.stream_unary if handler.request_streaming else handler.unary_unary
            wrapped = self._single(method, cast(Callable[..., Any], single))
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
        return make(
            cast(Any, wrapped),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _check(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        service = method.rsplit("/", 1)[0] + "/"
        allowed = self._roles.get(method) or self._roles.get(service) or frozenset()
        peer = peer_of(context)
        if peer.cluster != self._cluster:
            raise RefusedError(
                Reason.ROLE, "the caller belongs to another cluster", expected=self._cluster, actual=peer.cluster
            )
        if "*" not in allowed and peer.role not in allowed:
            raise RefusedError(
                Reason.ROLE,
                f"role {peer.role!r} may not call {method}",
                expected=" or ".join(sorted(allowed)) or "nobody",
                actual=peer.role,
            )

    async def _fail(self, method: str, error: Exception, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if not isinstance(error, KeyquorumError):
            reference = secrets.token_hex(8)
            self._report(method, reference, error)
            error = KeyquorumError(Reason.INTERNAL, f"an unforeseen failure; the log entry is {reference}")
        self._observe(method, str(error.reason))
        status = rpc_status.to_status(to_status(error))
        context.set_trailing_metadata(status.trailing_metadata)
        await context.abort(cast(grpc.StatusCode, status.code), cast(str, status.details))

    def _single(self, method: str, call: Callable[..., Any]) -> Callable[..., Any]:
        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                self._check(method, context)
                response = await call(request, context)
            except (grpc.aio.AbortError, grpc.aio.BaseError):
                raise
            except Exception as error:
                await self._fail(method, error, context)
                raise
            self._observe(method, "")
            return response

        return guarded

    def _streaming(self, method: str, call: Callable[..., Any]) -> Callable[..., Any]:
        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                self._check(method, context)
                if inspect.isasyncgenfunction(call):
                    async for response in call(request, context):
                        yield response
                else:  # servicers that write through the context, as grpcio-health-checking's does
                    await call(request, context)
            except (grpc.aio.AbortError, grpc.aio.BaseError):
                raise
            except Exception as error:
                await self._fail(method, error, context)
                raise
            self._observe(method, "")

        return guarded
