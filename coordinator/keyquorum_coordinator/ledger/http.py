"""The read side: the log over HTTP, as C2SP tlog-tiles has it, on a listener of its own.

``/checkpoint``, ``/tile/<L>/<N>[.p/<W>]`` and ``/tile/entries/<N>[.p/<W>]``, GET and HEAD, no queries, each path in its
one spelling. What is served is public and vouches for itself by the log's and the witnesses' signatures; TLS, where the
configuration names a certificate, only keeps others from seeing who reads what.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from keyquorum_coordinator.sequencer import Sequencer
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, StateError, UnavailableError
from keyquorum_core.ledger.tiles import Bundle, parse_path
from keyquorum_protos.wire.ports import parse_address

__all__ = ["LedgerReader", "ledger_app"]

_CHECKPOINT = {"Cache-Control": "no-store"}
_IMMUTABLE = {"Cache-Control": "public, max-age=31536000, immutable"}
_MAX_PATH = 200
_MAX_CONNECTIONS = 512
_STOP_SECONDS = 2
_BACKLOG = 128

_log = structlog.get_logger("ledger")


def ledger_app(sequencer: Sequencer) -> Starlette:
    """The three resources of the log."""

    async def checkpoint(request: Request) -> Response:
        try:
            _check_query(request)
            data = (await sequencer.published()).encode()
        except KeyquorumError as error:
            return _refusal(error)
        return Response(data, media_type="text/plain", headers=_CHECKPOINT)

    async def tile(request: Request) -> Response:
        try:
            _check_query(request)
            name = parse_path(_path(request))
            data = await sequencer.tile(name)
        except KeyquorumError as error:
            return _refusal(error)
        headers = dict(_IMMUTABLE)
        if isinstance(name, Bundle):  # leaves are JSON; hashes would not get smaller
            headers["Vary"] = "Accept-Encoding"
            if "gzip" in request.headers.get("accept-encoding", ""):
                headers["Content-Encoding"] = "gzip"
                data = await asyncio.to_thread(gzip.compress, data, 6, mtime=0)
        return Response(data, media_type="application/octet-stream", headers=headers)

    app = Starlette(routes=[Route("/checkpoint", checkpoint), Route("/tile/{rest:path}", tile)])
    app.router.redirect_slashes = False
    return app


def _check_query(request: Request) -> None:
    if request.url.query:
        raise MalformedError(Reason.MALFORMED, "the ledger takes no queries", expected="a path alone")


def _path(request: Request) -> str:
    """The path as it was sent: percent-encoding would be a second spelling."""
    raw: bytes = request.scope["raw_path"].split(b"?", 1)[0]
    return raw[:_MAX_PATH].decode("latin-1").removeprefix("/")


def _refusal(error: KeyquorumError) -> Response:
    if isinstance(error, MalformedError):
        status = 400
    elif isinstance(error, StateError):
        status = 404
    elif isinstance(error, UnavailableError):
        status = 503
    else:
        status = 500
    if status >= 500:
        _log.error("ledger.not_read", reason=str(error.reason), message=error.message)
    headers = {"Cache-Control": "no-store", **({"Retry-After": "1"} if status == 503 else {})}
    return PlainTextResponse(f"{error.reason}: {error.message}\n", status, headers)


class _Server(uvicorn.Server):
    """One that leaves signals to the coordinator."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class LedgerReader:
    """Serves :func:`ledger_app` in this event loop."""

    def __init__(self, sequencer: Sequencer) -> None:
        self._app = ledger_app(sequencer)
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, address: str, certificate: Path | None = None, key: Path | None = None) -> str:
        """Listen at ``host:port``; returns the URL in use. Raises :class:`UnavailableError`, and
        :class:`MalformedError` for TLS files that cannot be used."""
        listener = _listen(address)
        options: dict[str, Any] = {}
        if certificate is not None:
            options = {"ssl_certfile": certificate, "ssl_keyfile": key}
        config = uvicorn.Config(
            self._app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=_STOP_SECONDS,
            **options,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            listener.close()
            raise MalformedError(
                Reason.MALFORMED, "the ledger's TLS certificate or key cannot be used", actual=str(error)[:200]
            ) from None
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        host = address.rpartition(":")[0]
        return f"{'https' if certificate else 'http'}://{host}:{listener.getsockname()[1]}"

    async def stop(self) -> None:
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await self._task
            self._server = self._task = None


def _listen(address: str) -> socket.socket:
    host, port = parse_address(address, "ledger_listen")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
        listener.listen(_BACKLOG)  # from here on callers get in, and wait for the event loop
    except OSError as error:
        listener.close()
        raise UnavailableError(
            Reason.UNAVAILABLE, f"cannot serve the ledger at {address}", actual=error.strerror
        ) from None
    return listener
