"""The one way keyquorum binds values together (DESIGN §4, "transcript hash").

``transcript(label, p1, …, pk)`` = u16be(len label) ‖ label ‖ for each part: u64be(len part) ‖ part.
The encoding is injective, so two different lists of values never hash alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

__all__ = ["H", "H_each", "transcript", "u64be"]


def u64be(value: int) -> bytes:
    """``value`` as 8 bytes, big-endian. Raises :class:`OverflowError` outside 0 … 2⁶⁴-1."""
    return value.to_bytes(8, "big")


def transcript(label: str, *parts: bytes) -> bytes:
    """The length-prefixed encoding of a label (UTF-8, under 64 KiB) and any number of parts."""
    name = label.encode()
    out = bytearray(len(name).to_bytes(2, "big"))
    out += name
    for part in parts:
        out += len(part).to_bytes(8, "big")
        out += part
    return bytes(out)


def H(label: str, *parts: bytes) -> bytes:
    """SHA-256 of :func:`transcript`, 32 bytes."""
    return hashlib.sha256(transcript(label, *parts)).digest()


def H_each(label: str, first: bytes, rest: Iterable[tuple[bytes, ...]]) -> Iterator[bytes]:
    """``H(label, first, *parts)`` for each of ``rest``, whose common beginning is hashed once."""
    begun = hashlib.sha256(transcript(label, first))
    for parts in rest:
        one = begun.copy()
        for part in parts:
            one.update(len(part).to_bytes(8, "big") + part)
        yield one.digest()
