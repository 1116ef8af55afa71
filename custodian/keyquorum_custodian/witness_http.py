"""C2SP tlog-witness over HTTP: ``POST /add-checkpoint``, for logs and tools that speak nothing else.

Whoever can reach it may ask: the log's signatures are what counts, and a bad request changes nothing. It decides
nothing itself; :class:`keyquorum_custodian.witness.Witness` does, and its errors become the status codes of the
specification.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Callable, Iterator
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, StateError, UnavailableError
from keyquorum_core.ledger.add_checkpoint import MAX_ADD_CHECKPOINT, AddCheckpoint
from keyquorum_custodian.witness import Witness
from keyquorum_protos.wire.ports import parse_address

__all__ = ["WitnessListener", "witness_app"]

_SIZE: Final = "text/x.tlog.size"
_TEXT: Final = "text/plain; charset=utf-8"
_MAX_CONNECTIONS: Final = 64
_BODY_SECONDS: Final = 10.0
_GRACE_SECONDS: Final = 2

_Report = Callable[[str, str, BaseException], None]


def _status(error: KeyquorumError) -> int:
    """The specification's code. 422 is for proofs and for a tree of no leaves under another root than the empty one."""
    match error.reason:
        case Reason.LEDGER_ORIGIN:
            return 404
        case Reason.LEDGER_PROOF | Reason.DIGEST:
            return 422
        case Reason.LEDGER_CONFLICT:
            return 409
        case Reason.LEDGER_FORK | Reason.LEDGER_ROLLBACK:
            return 503 if isinstance(error, StateError) else 409
        case Reason.SIGNATURE | Reason.SIGNATURE_MISSING if not isinstance(error, MalformedError):
            return 403
        case _:
            return 400 if isinstance(error, MalformedError) else 503


async def _body(request: Request) -> bytes:
    """Raises :class:`MalformedError` past what a request may have, :class:`UnavailableError` for one that dawdles."""
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MAX_ADD_CHECKPOINT:
                    break
    except TimeoutError:
        raise UnavailableError(Reason.TIMEOUT, "the request did not come in time") from None
    return bytes(data)


def witness_app(witness: Witness, report: _Report) -> Starlette:
    """The HTTP application around a witness. ``report`` hears of failures nobody foresaw."""

    async def add_checkpoint(request: Request) -> Response:
        try:
            asked = AddCheckpoint.parse(await _body(request))
            lines = witness.cosign(asked.old_size, asked.proof, asked.checkpoint)
        except KeyquorumError as error:
            if error.reason is Reason.LEDGER_CONFLICT:
                # As a header of its own: a media type of text would get a charset, which clients do not expect.
                return Response(f"{error.details['size']}\n", 409, headers={"Content-Type": _SIZE})
            return Response(f"{error}\n", _status(error), media_type=_TEXT)
        except Exception as error:
            reference = secrets.token_hex(8)
            report("/add-checkpoint", reference, error)
            return Response(f"an unforeseen failure; the log entry is {reference}\n", 500, media_type=_TEXT)
        return Response("".join(line.line() for line in lines), media_type=_TEXT)

    return Starlette(routes=[Route("/add-checkpoint", add_checkpoint, methods=["POST"])])


class _Server(uvicorn.Server):
    """Signals are the custodian's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class WitnessListener:
    """The application on a socket of its own, in the running event loop."""

    def __init__(self, witness: Witness, report: _Report) -> None:
        config = uvicorn.Config(
            witness_app(witness, report),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self, address: str) -> str:
        """Listen at ``host:port``; returns the address in use. Raises :class:`UnavailableError`."""
        host, port = parse_address(address, "witness_listen")
        name = host.strip("[]")
        try:
            listening = socket.create_server((name, port), family=socket.AF_INET6 if ":" in name else socket.AF_INET)
        except OSError as error:
            raise UnavailableError(Reason.UNAVAILABLE, f"cannot listen at {address}", actual=error.strerror) from None
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))
        return f"{host}:{listening.getsockname()[1]}"

    async def stop(self) -> None:
        """Finish what is being answered."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
