"""Intel's quote generation service (QGS) over vsock, as its message library 1.1 speaks.

A message is its length (u32, big-endian) and the message proper: a header of version (u16, u16), type, size and error
(u32 each, little-endian), then for a request the sizes of TDREPORT and of a list of ids, and the TDREPORT; for a
response the sizes of the chosen id and of the quote, and both.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from contextlib import closing

from keyquorum_core.errors import UnavailableError
from keyquorum_gpu_worker.evidence.source import unavailable

__all__ = ["Connect", "QuotingService"]

Connect = Callable[[], socket.socket]

_HOST = 2  # VMADDR_CID_HOST
_SECONDS = 30.0
_VERSION = (1, 1)
_GET_QUOTE, _QUOTE = 0, 1
_HEADER = struct.Struct("<HHIII")
_SIZES = struct.Struct("<II")
_MAX_MESSAGE = 64 << 10


class QuotingService:
    """The service that listens on ``port`` of the host; ``connect`` stands in for it in tests."""

    def __init__(self, port: int, connect: Connect | None = None) -> None:
        self._port = port
        self._connect = connect or self._vsock

    def quote(self, td_report: bytes) -> bytes:
        """A quote of a TDREPORT. Raises :class:`UnavailableError` (``EVIDENCE_TYPE``)."""
        size = _HEADER.size + _SIZES.size + len(td_report)
        request = _HEADER.pack(*_VERSION, _GET_QUOTE, size, 0) + _SIZES.pack(len(td_report), 0) + td_report
        try:
            with closing(self._connect()) as connection:
                connection.sendall(len(request).to_bytes(4, "big") + request)
                length = int.from_bytes(_exactly(connection, 4), "big")
                if not _HEADER.size + _SIZES.size <= length <= _MAX_MESSAGE:
                    raise self._wrong(f"a message of {length} bytes")
                return self._parse(_exactly(connection, length))
        except OSError as error:
            raise unavailable(
                "the quote generation service does not answer",
                expected=f"a QGS on vsock port {self._port} of the host",
                actual=error.strerror or str(error),
                next_step="Have the host run Intel's qgsd with a vsock port, or use Linux 6.7 with configfs-tsm.",
            ) from None

    def _parse(self, message: bytes) -> bytes:
        major, _minor, kind, size, error = _HEADER.unpack_from(message)
        if error:
            raise self._wrong(f"error {error:#x}")
        if (major, kind, size) != (_VERSION[0], _QUOTE, len(message)):
            raise self._wrong(f"version {major}, type {kind}, size {size} in {len(message)} bytes")
        id_size, quote_size = _SIZES.unpack_from(message, _HEADER.size)
        start = _HEADER.size + _SIZES.size
        if not quote_size or start + id_size + quote_size != len(message):
            raise self._wrong(f"an id of {id_size} and a quote of {quote_size} bytes in {len(message)}")
        return message[start + id_size :]

    def _wrong(self, actual: str) -> UnavailableError:
        return unavailable(
            "the quote generation service gave no quote",
            expected="a response of version 1, type 1, without an error",
            actual=actual,
            next_step="See the host's log of qgsd; error 0x12009 says that the host's PCK certificate is not set up.",
        )

    def _vsock(self) -> socket.socket:
        connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            connection.settimeout(_SECONDS)
            connection.connect((_HOST, self._port))
        except BaseException:
            connection.close()
            raise
        return connection


def _exactly(connection: socket.socket, size: int) -> bytes:
    """Raises :class:`OSError` where the connection ends before."""
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionResetError(f"it closed after {len(data)} of {size} bytes")
        data += piece
    return bytes(data)
