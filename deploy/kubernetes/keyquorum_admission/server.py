"""The process: TLS whose files may change at any time, signals, and an end that finishes what is being answered."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import uvicorn
from cryptography import x509

from keyquorum_admission.config import ListenConfig, Settings, read_file
from keyquorum_admission.logs import logger
from keyquorum_admission.metrics import Metrics
from keyquorum_admission.service import admission_app
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, UnavailableError

__all__ = ["Certificate", "serve"]

_MAX_CONNECTIONS: Final = 256
_BACKLOG: Final = 128
_MAX_PEM: Final = 64 << 10
_log = logger()


class Certificate:
    """A server's TLS context that follows its files: new connections get the new certificate, and files that cannot be
    used, or of which only one has changed yet, change nothing."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises as :meth:`reload` does."""
        self._paths = (certificate, key)
        self._seen = b""
        self.context = _context()
        self.expires = 0
        self.reload()

    def reload(self) -> bool:
        """Whether the files changed, and are in use now. Raises :class:`MalformedError` or what reading raises; the
        certificate in use stays."""
        certificate = read_file(self._paths[0], "the TLS certificate", _MAX_PEM)
        key = read_file(self._paths[1], "the TLS key", _MAX_PEM)
        seen = hashlib.sha256(certificate).digest() + hashlib.sha256(key).digest()
        if seen == self._seen:
            return False
        try:
            expires = int(x509.load_pem_x509_certificate(certificate).not_valid_after_utc.timestamp())
            _load(_context(), certificate, key)  # a context that fails to load may be left with half of it
            _load(self.context, certificate, key)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise MalformedError(
                Reason.MALFORMED, "the TLS certificate and key cannot be used", actual=str(error)[:200]
            ) from None
        self._seen, self.expires = seen, expires
        return True


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    return context


def _load(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """From exactly the bytes that were looked at. ``ssl`` reads files alone, so they pass through one that only this
    user can read, in memory where the machine has a tmpfs for it."""
    with tempfile.NamedTemporaryFile(dir=_memory()) as file:
        file.write(certificate + b"\n" + key)
        file.flush()
        context.load_cert_chain(file.name, password=_no_passphrase)


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a file only its user can read


def _no_passphrase() -> str:
    raise ValueError("the TLS key is encrypted, and nobody is here to ask for a passphrase")


class _Server(uvicorn.Server):
    """Signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(listen: ListenConfig, settings: Settings, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. ``ready`` is told the URL in use. Raises :class:`UnavailableError` for an address
    that cannot be had, and as :class:`Certificate` does."""
    metrics = Metrics()
    certificate = Certificate(listen.certificate, listen.key)
    metrics.certificate_expires.set(certificate.expires)
    listener = _listen(listen)
    config = uvicorn.Config(
        admission_app(settings, metrics),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=listen.grace_seconds,
        ssl_context_factory=lambda *_: certificate.context,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _end, server)
    follower = asyncio.create_task(_follow(certificate, metrics, listen.reload_seconds))
    host = f"[{listen.host}]" if ":" in listen.host else listen.host
    try:
        ready(f"https://{host}:{listener.getsockname()[1]}")
        await server.serve(sockets=[listener])
    finally:
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)
        listener.close()
    _log.info("admission.ended")


def _end(server: uvicorn.Server) -> None:
    server.should_exit = True


async def _follow(certificate: Certificate, metrics: Metrics, seconds: int) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            changed = certificate.reload()
        except KeyquorumError as error:
            metrics.certificate_refused.set(1)
            _log.error("certificate.refused", reason=str(error.reason), message=error.message, actual=error.actual)
            continue
        metrics.certificate_refused.set(0)
        if changed:
            metrics.certificate_expires.set(certificate.expires)
            _log.info("certificate.reloaded", expires=certificate.expires)


def _listen(listen: ListenConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((listen.host, listen.port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UnavailableError(
            Reason.UNAVAILABLE, f"cannot listen at {listen.host}:{listen.port}", actual=error.strerror
        ) from None
    return listener
