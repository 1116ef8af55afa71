"""How far a long operation is: plain values handed to a callback, drawn by whoever wants to.

The library never prints. ``keyquorum.cli.bars`` draws these as progress bars; an orchestrator can feed its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Progress", "ProgressCallback", "Stage", "silent"]


class Stage(StrEnum):
    """What is going on; the unit of ``done`` and ``total`` is in the comment."""

    OPEN = "open"  # custodians that answered
    ENCRYPT = "encrypt"  # bytes of plaintext
    UPLOAD = "upload"  # bytes of ciphertext
    WAIT = "wait"  # events of the job; total unknown
    DOWNLOAD = "download"  # bytes of ciphertext
    DECRYPT = "decrypt"  # bytes of plaintext
    CEREMONY = "ceremony"  # custodians done with the step named in ``part``
    VERIFY = "verify"  # leaves of the ledger
    PREPARE = "prepare"  # rows; total unknown for some formats
    PROVE = "prove"  # leaves of the ledger
    REWRAP = "rewrap"  # bytes of ciphertext, copied


@dataclass(frozen=True, slots=True)
class Progress:
    """One report. ``total`` is 0 where it isn't known; ``detail`` is for people; ``part``: which part of the stage."""

    stage: Stage
    done: int
    total: int = 0
    detail: str = ""
    part: str = ""


ProgressCallback = Callable[[Progress], None]
"""Called often and, from the synchronous client, on its background thread: return quickly and don't raise."""


def silent(progress: Progress) -> None:
    """The default callback."""
