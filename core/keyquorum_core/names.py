"""The grammar of every name that travels in a signed structure: one place, so that readers and writers agree.

Names are ASCII and lower case, so that no two of them look alike, none needs escaping in JSON, and all may stand in
file names, SPIFFE ids and metrics.
"""

from __future__ import annotations

import re
from typing import Final

from keyquorum_core.errors import MalformedError, Reason

__all__ = ["CLUSTER", "CUSTODIAN_ID", "JOB_ID", "KEY_ID", "MAX_INTEGER", "PRINCIPAL", "SHA256_HEX", "check", "within"]

CLUSTER: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,62}[a-z0-9])?", re.ASCII)
CUSTODIAN_ID: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?", re.ASCII)
KEY_ID: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?", re.ASCII)
JOB_ID: Final = re.compile(r"[a-z2-7]{26}", re.ASCII)
PRINCIPAL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?", re.ASCII)
"""Owners, operators and committees."""
SHA256_HEX: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)

MAX_INTEGER: Final = 2**53 - 1
"""The largest integer that every JSON reader keeps exact (RFC 8785 §3.2.2.3)."""


def check(pattern: re.Pattern[str], value: str, what: str) -> None:
    """Raise :class:`MalformedError` unless all of ``value`` matches."""
    if not pattern.fullmatch(value):
        raise MalformedError(Reason.MALFORMED, f"bad {what}", expected=pattern.pattern, actual=ascii(value[:80]))


def within(value: int, what: str, minimum: int = 0, maximum: int = MAX_INTEGER) -> None:
    """Raise :class:`MalformedError` unless ``minimum`` ≤ ``value`` ≤ ``maximum``."""
    if not minimum <= value <= maximum:
        raise MalformedError(Reason.MALFORMED, f"bad {what}", expected=f"{minimum}…{maximum}", actual=value)
