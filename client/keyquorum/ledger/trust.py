"""Whom an auditor believes: the roster, by the operators that the auditor pinned, and nobody else."""

from __future__ import annotations

import hmac
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from keyquorum.ledger.http import HttpSource
from keyquorum.ledger.source import DirectorySource, LogSource
from keyquorum.profile import load_profile
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError
from keyquorum_core.ledger.log_trust import LogTrust
from keyquorum_core.roster import Roster, open_roster, parse_operators
from keyquorum_protos.wire.files import read_bytes

__all__ = ["Auditor", "of_profile", "of_roster_files", "open_source"]


@dataclass(frozen=True, slots=True)
class Auditor:
    """A verified roster, and what it says about the ledger."""

    roster: Roster
    trust: LogTrust

    @property
    def url(self) -> str:
        return self.roster.log_url


def of_profile(path: Path, *, at: int | None = None) -> Auditor:
    """By a client profile whose roster is valid at ``at``, POSIX seconds, by default now. Raises as
    :func:`load_profile`, and :class:`StateError` where no log runs yet."""
    return _auditor(load_profile(path, now=at).roster)


def of_roster_files(roster: Path, operators: Path, *, sha256: str | None = None, at: int | None = None) -> Auditor:
    """By a roster and the ``operators.json`` that says who may sign one; with ``sha256`` by that roster alone.

    ``at`` is when the roster must be valid, POSIX seconds, by default now. Raises as :func:`open_roster`, and
    :class:`RefusedError` (``ROSTER``) for another roster than the pinned one.
    """
    trusted, threshold = parse_operators(read_bytes(operators, "operators file"))
    opened = open_roster(
        read_bytes(roster, "roster", max_bytes=8 << 20), trusted, threshold, int(time.time()) if at is None else at
    )
    if sha256 is not None and not hmac.compare_digest(opened.digest.encode(), sha256.lower().encode()):
        raise RefusedError(
            Reason.ROSTER, "another roster than the one asked for", expected=sha256, actual=opened.digest
        )
    return _auditor(opened)


def _auditor(roster: Roster) -> Auditor:
    if roster.log_key is None:
        raise StateError(
            Reason.STATE,
            "the roster names no ledger",
            expected="log_key in the roster",
            actual=f"version {roster.version} without one",
            next_step="Ask the operators for a roster with the ledger's keys.",
        )
    return Auditor(roster, LogTrust(roster.log_key, roster.witnesses(), roster.quorum_of()))


def open_source(auditor: Auditor, log: str | None, *, ca: Path | None = None) -> LogSource:
    """The log at ``log``, a URL or a folder, by default where the roster says. ``ca`` is a PEM file of authorities."""
    where = log or auditor.url
    if not where:
        raise StateError(
            Reason.STATE,
            "the roster does not say where the ledger is read",
            expected="log_url in the roster, or --log",
            next_step="Give --log URL, or --log DIR for an exported log.",
        )
    if "://" not in where:
        return DirectorySource(Path(where))
    return HttpSource(where, authorities=None if ca is None else _authorities(ca))


def _authorities(path: Path) -> ssl.SSLContext:
    pem = read_bytes(path, "file of authorities")
    try:
        return ssl.create_default_context(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise MalformedError(
            Reason.MALFORMED, f"{path} holds no certificates", expected="PEM certificates", actual="something else"
        ) from None
