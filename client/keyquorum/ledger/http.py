"""A log's read side over HTTP/1.1: bounded in bytes and time, patient with what passes, deaf to redirects.

What is read is verified against signatures by whoever asked, so that neither HTTP nor TLS has to be believed; a server
can still waste an auditor's memory and time, or point it at other hosts, and that is what is held off here. Thousands
of small files are read, so this speaks h11 over asyncio: a general HTTP client takes ten times the processor time.
"""

from __future__ import annotations

import asyncio
import ssl
import time
import zlib
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urlsplit

import h11

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, UnavailableError
from keyquorum_protos.wire.retry import Backoff

__all__ = ["CONNECTIONS", "HttpSource"]

CONNECTIONS: Final = 16
FILE_SECONDS: Final = 60.0
"""For one file as a whole, however steadily its bytes drip."""
PATIENCE_SECONDS: Final = 30.0
"""With a server that answered before; a wrong address should not take so long to be told."""
FIRST_CONTACT_SECONDS: Final = 5.0
_CHUNK: Final = 1 << 18
_GZIP_OVERHEAD: Final = 4096
"""Bytes that gzip may add to what it can't compress."""
_PASSING: Final = (408, 425, 429, 500, 502, 503, 504)


class _PassingError(Exception):
    """A failure that may be gone in a moment."""


class _StaleError(_PassingError):
    """The server had closed a connection that was kept open: nothing to worry about."""


@dataclass(frozen=True, slots=True)
class _Place:
    """The URL in parts."""

    host: str
    port: int
    name: str
    path: str
    tls: ssl.SSLContext | None

    @staticmethod
    def of(url: str, authorities: ssl.SSLContext | None) -> _Place:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = SplitResult("", "", "", "", ""), None
        bare = not (parts.query or parts.fragment or parts.username or parts.password)
        if parts.scheme not in ("http", "https") or not parts.hostname or not bare or not url.isascii() or " " in url:
            raise MalformedError(
                Reason.MALFORMED,
                "not the URL of a log",
                expected="http(s)://host[:port][/path]",
                actual=ascii(url[:80]),
            )
        tls = None
        if parts.scheme == "https":
            tls = authorities or ssl.create_default_context()
        return _Place(parts.hostname, port or (443 if tls else 80), parts.netloc, parts.path.rstrip("/"), tls)


def _gunzip(url: str, data: bytes, max_bytes: int) -> bytes:
    """One gzip member, whole; never more than one byte past ``max_bytes``. Raises :class:`MalformedError`."""
    gzip = zlib.decompressobj(wbits=31)
    try:
        out = gzip.decompress(data, max_bytes + 1)
    except zlib.error:
        out = b""
    if len(out) <= max_bytes and (not gzip.eof or gzip.unused_data):
        raise MalformedError(Reason.MALFORMED, f"{url} is no gzip file", expected="one whole gzip member")
    return out


class _Connection:
    """One connection, used for one request at a time."""

    def __init__(self, place: _Place, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._place, self._reader, self._writer = place, reader, writer
        self._http = h11.Connection(h11.CLIENT)
        self._used = False

    @staticmethod
    async def open(place: _Place) -> _Connection:
        return _Connection(place, *await asyncio.open_connection(place.host, place.port, ssl=place.tls, limit=_CHUNK))

    async def get(self, path: str, max_bytes: int) -> tuple[h11.Response, bytes]:
        """The answer and at most ``max_bytes`` of body. Raises :class:`_PassingError`, :class:`MalformedError`."""
        target = f"{self._place.path}/{path}"
        headers = [("Host", self._place.name), ("Accept-Encoding", "gzip, identity"), ("User-Agent", "keyquorum")]
        used, self._used = self._used, True
        response: h11.Response | None = None
        body, size = [], 0
        try:
            self._writer.write(
                self._http.send(h11.Request(method="GET", target=target, headers=headers))
                + self._http.send(h11.EndOfMessage())
            )
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    self._http.receive_data(await self._reader.read(_CHUNK))
                elif isinstance(event, h11.Response):
                    response = event
                elif isinstance(event, h11.Data):
                    size += len(event.data)
                    if size > max_bytes:
                        raise MalformedError(
                            Reason.TOO_LARGE, f"{target} is too large", expected=f"at most {max_bytes} bytes"
                        )
                    body.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    break
                elif event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                    raise _PassingError("the connection was closed")
        except (OSError, h11.RemoteProtocolError) as error:
            kind = _StaleError if used and response is None else _PassingError
            raise kind(str(error)[:200] or type(error).__name__) from None
        if response is None:
            raise _PassingError("no answer")
        return response, b"".join(body)

    def reusable(self) -> bool:
        """Whether the server keeps the connection open; it is then ready for the next request."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    def close(self) -> None:
        self._writer.close()


class HttpSource:
    """``url`` has no slash at its end. Proxies, cookies and credentials of the environment are not used."""

    def __init__(
        self,
        url: str,
        *,
        authorities: ssl.SSLContext | None = None,
        file_seconds: float = FILE_SECONDS,
        patience: float = PATIENCE_SECONDS,
        connections: int = CONNECTIONS,
    ) -> None:
        """``authorities`` verifies an https server; the system's by default. Raises :class:`MalformedError`."""
        self._url = url.rstrip("/")
        self._place = _Place.of(self._url, authorities)
        self._file_seconds, self._patience = file_seconds, patience
        self._slots = asyncio.Semaphore(connections)
        self._idle: list[_Connection] = []
        self._reached = False

    @property
    def where(self) -> str:
        return self._url

    async def read(self, path: str, max_bytes: int) -> bytes:
        """As :meth:`LogSource.read`; tries again what may pass, for a while."""
        patience = self._patience if self._reached else min(self._patience, FIRST_CONTACT_SECONDS)
        backoff, deadline = Backoff(patience), time.monotonic() + patience
        async with self._slots:
            while True:
                try:
                    async with asyncio.timeout(self._file_seconds):
                        response, body = await self._get(path, max_bytes + _GZIP_OVERHEAD)
                    self._reached = True
                    return self._content(path, response, body, max_bytes)
                except _StaleError:
                    continue  # each such failure uses up one idle connection
                except ssl.SSLCertVerificationError as error:
                    raise UnavailableError(
                        Reason.CHAIN,
                        f"{self._url} has a certificate that is not trusted here",
                        expected="one issued by an authority known to this machine, or given",
                        actual=error.verify_message,
                        next_step="Give the authority's certificate with --ca.",
                    ) from None
                except (TimeoutError, OSError, _PassingError) as error:
                    # Backoff alone takes each file that drips until its time is over for a first failure.
                    if time.monotonic() > deadline or not await backoff.wait():
                        raise self._gave_up(path, error, patience) from None

    async def _get(self, path: str, max_bytes: int) -> tuple[h11.Response, bytes]:
        connection = self._idle.pop() if self._idle else await _Connection.open(self._place)
        try:
            answer = await connection.get(path, max_bytes)
        except BaseException:
            connection.close()
            raise
        if connection.reusable():
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    def _content(self, path: str, response: h11.Response, body: bytes, max_bytes: int) -> bytes:
        status, url = response.status_code, f"{self._url}/{path}"
        headers = {name: value.decode("latin-1") for name, value in response.headers}
        if status == 404:
            raise UnavailableError(
                Reason.NOT_FOUND,
                f"the log has no {path}",
                expected=url,
                actual="404",
                next_step="Check the log's URL; if other files are there, the log hides this one.",
            )
        if status in _PASSING:
            raise _PassingError(f"status {status}")
        if 300 <= status < 400:
            raise RefusedError(
                Reason.UNAVAILABLE,
                f"{url} redirects, which is not followed",
                expected="the file itself",
                actual=f"{status} to {headers.get(b'location', 'nowhere')[:200]!a}",
                next_step="Give the log's own URL with --log.",
            )
        if status != 200:
            raise UnavailableError(Reason.UNAVAILABLE, f"{url} can't be read", expected="200", actual=status)
        coding = headers.get(b"content-encoding", "identity").lower()
        if coding == "gzip":  # which logs may use for entry bundles, asked or not (C2SP tlog-tiles)
            body = _gunzip(url, body, max_bytes)
        elif coding != "identity":
            raise MalformedError(
                Reason.UNSUPPORTED,
                f"{url} came in an encoding that was not asked for",
                expected="gzip or identity",
                actual=ascii(coding[:40]),
            )
        if len(body) > max_bytes:
            raise MalformedError(Reason.TOO_LARGE, f"{url} is too large", expected=f"at most {max_bytes} bytes")
        return body

    def _gave_up(self, path: str, error: Exception, patience: float) -> KeyquorumError:
        late = isinstance(error, TimeoutError)
        return UnavailableError(
            Reason.TIMEOUT if late else Reason.UNAVAILABLE,
            f"{self._url}/{path} can't be read",
            expected=f"the file within {self._file_seconds:g} s, tried for {patience:g} s",
            actual="no answer in time" if late else str(error)[:200] or type(error).__name__,
            next_step="Check the address and the network, and try again.",
        )

    async def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
