"""Typed errors on the wire: a gRPC status whose details hold one ``google.rpc.ErrorInfo``.

``reason`` is the reason code, ``domain`` is ``keyquorum``, and the metadata holds kind, expected, actual, next step
and the error's own details (google.rpc error model, AIP-193). What a peer sends is untrusted: it is bounded here,
and an unknown reason becomes ``INTERNAL`` with the text kept.
"""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from keyquorum_core.errors import (
    KeyquorumError,
    MalformedError,
    Reason,
    RefusedError,
    StateError,
    UnavailableError,
)

__all__ = ["from_rpc_error", "from_status", "to_status"]

DOMAIN = "keyquorum"
_MAX_TEXT = 2048
_RESERVED = ("kind", "expected", "actual", "next_step")

_KINDS: dict[str, type[KeyquorumError]] = {
    kind.kind: kind for kind in (MalformedError, RefusedError, UnavailableError, StateError, KeyquorumError)
}
_CODES = {
    "malformed": grpc.StatusCode.INVALID_ARGUMENT,
    "refused": grpc.StatusCode.PERMISSION_DENIED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "state": grpc.StatusCode.FAILED_PRECONDITION,
    "error": grpc.StatusCode.INTERNAL,
}
_SPECIFIC = {
    Reason.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.UNKNOWN_KEY: grpc.StatusCode.NOT_FOUND,
    Reason.EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Reason.QUOTA: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def to_status(error: KeyquorumError) -> Status:
    """The error as a ``google.rpc.Status`` for a stream message or an RPC's end."""
    code = _SPECIFIC.get(error.reason, _CODES.get(error.kind, grpc.StatusCode.INTERNAL))
    info = ErrorInfo(reason=str(error.reason), domain=DOMAIN)
    for name, value in error.details.items():
        if name not in _RESERVED:
            info.metadata[name] = value[:_MAX_TEXT]
    info.metadata["kind"] = error.kind
    for name, value in (("expected", error.expected), ("actual", error.actual), ("next_step", error.next_step)):
        if value:
            info.metadata[name] = value[:_MAX_TEXT]
    packed = Any()
    packed.Pack(info)
    return Status(code=code.value[0], message=error.message[:_MAX_TEXT], details=[packed])


def from_status(status: Status) -> KeyquorumError:
    """The error that a peer's status stands for; never raises."""
    for packed in status.details[:8]:
        info = ErrorInfo()
        try:
            ours = packed.Is(ErrorInfo.DESCRIPTOR) and packed.Unpack(info) and info.domain == DOMAIN
        except DecodeError:
            continue
        if ours:
            metadata = {name[:64]: value[:_MAX_TEXT] for name, value in list(info.metadata.items())[:32]}
            kind = _KINDS.get(metadata.pop("kind", ""), KeyquorumError)
            try:
                reason = Reason(info.reason)
            except ValueError:
                reason = Reason.INTERNAL
                metadata["peer_reason"] = info.reason[:64]
            return kind(
                reason,
                status.message[:_MAX_TEXT],
                expected=metadata.pop("expected", None),
                actual=metadata.pop("actual", None),
                next_step=metadata.pop("next_step", ""),
                details=metadata,
            )
    return KeyquorumError(Reason.INTERNAL, status.message[:_MAX_TEXT] or "the peer gave no reason")


def from_rpc_error(error: grpc.aio.AioRpcError, peer: str) -> KeyquorumError:
    """What a failed call means. A status without our ErrorInfo comes from the transport: the peer was not reached
    (:class:`UnavailableError`) or did not answer in time."""
    status = rpc_status.from_call(error)
    if status is not None and status.details:
        return from_status(status)
    code = error.code()
    text = error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(Reason.TIMEOUT, f"{peer} did not answer in time", actual=text[:200])
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED):
        return UnavailableError(
            Reason.UNAVAILABLE,
            f"{peer} could not be reached",
            actual=text[:200],
            next_step="Check that it runs, its address, and that both sides trust each other's TLS certificates",
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return RefusedError(Reason.TOO_LARGE, f"{peer} refused the message", actual=text[:200])
    return KeyquorumError(Reason.INTERNAL, f"{peer} failed: {code.name}", actual=text[:200])
