"""Addresses as ``host:port``, and choosing a port now that somebody will listen on later.

Asking the system for any free port gives one of its ephemeral range, and until the server starts any client on the
machine may be given the same. Ports below that range are only taken by those who ask for them by number.
"""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from keyquorum_core.errors import MalformedError, Reason, UnavailableError

__all__ = ["choose_port", "parse_address"]

_ADDRESS: Final = re.compile(r"(?:\[[0-9a-fA-F:]{2,45}\]|[A-Za-z0-9.-]{1,253}):[0-9]{1,5}")
_LOWEST: Final = 10_240
_EPHEMERAL: Final = 32_768  # Linux's default; IANA's range begins later
_TRIES: Final = 64

_draw: Callable[[int], int] = secrets.randbelow
"""Which of so many ports to try; the tests draw them so that no two of their processes try the same."""


def parse_address(text: str, what: str) -> tuple[str, int]:
    """``host:port`` (IPv6 in brackets), port 0 … 65535. Raises :class:`MalformedError`."""
    host, _, port = text.rpartition(":")
    if not _ADDRESS.fullmatch(text) or int(port) > 65535:
        raise MalformedError(Reason.MALFORMED, f"{what} is not an address", expected="host:port", actual=text[:80])
    return host, int(port)


def choose_port(host: str = "127.0.0.1") -> int:
    """A port of ``host`` (IPv6 without brackets) that nobody listens on now, below the ephemeral range.

    Raises :class:`UnavailableError` when the host is not this machine's, or nothing is free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    highest = max(_first_ephemeral(), _LOWEST + 1)
    why = ""
    for _ in range(_TRIES):
        port = _LOWEST + _draw(highest - _LOWEST)
        try:
            with socket.socket(family) as probe:
                probe.bind((host, port))
        except OSError as error:
            why = error.strerror or str(error)
            continue
        return port
    raise UnavailableError(Reason.UNAVAILABLE, f"no free port at {host}", actual=why)


def _first_ephemeral() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _EPHEMERAL
