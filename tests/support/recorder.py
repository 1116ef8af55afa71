"""A TCP relay that keeps every byte: what somebody who owns the network records."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self


class Recorder:
    """Listens on ``listen`` and relays to ``target`` (both loopback ports); :attr:`traffic` grows as bytes pass."""

    def __init__(self, listen: int, target: int) -> None:
        self.traffic = bytearray()
        self._target = target
        self._server = socket.create_server(("127.0.0.1", listen))
        self._sockets: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in [self._server, *self._sockets]:
            with contextlib.suppress(OSError):  # closed by its peer already
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._accepting.join(5)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=10)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.traffic += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return
