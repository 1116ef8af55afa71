"""C2SP tlog-checkpoint: what a log says its tree is, as the text of a signed note.

Three lines: origin, size in decimal, base64 of the root. Extension lines, which the format discourages, are refused:
an ML-DSA-44 signature does not cover them, so what they say would rest on Ed25519 alone.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Final

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.ledger.merkle import EMPTY_ROOT, HASH_SIZE, MAX_SIZE
from keyquorum_core.ledger.verifier_keys import check_key_name, decode_base64

__all__ = ["MAX_TEXT", "Checkpoint", "decode_hash", "parse_decimal"]

MAX_TEXT: Final = 512
"""Bytes in the longest checkpoint text: 255 of origin, 19 digits, 44 of root, three newlines, and room to spare."""
_DECIMAL: Final = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)


def parse_decimal(text: str, what: str) -> int:
    """0 … 2⁶³-1 in ASCII digits without leading zeros. Raises :class:`MalformedError`."""
    if not _DECIMAL.fullmatch(text) or int(text) > MAX_SIZE:
        raise MalformedError(
            Reason.MALFORMED,
            f"bad {what}",
            expected=f"0…{MAX_SIZE} in decimal, no leading zeros",
            actual=ascii(text[:40]),
        )
    return int(text)


def decode_hash(text: str, what: str) -> bytes:
    """32 bytes in canonical base64. Raises :class:`MalformedError`."""
    value = decode_base64(text, what)
    if len(value) != HASH_SIZE:
        raise MalformedError(
            Reason.MALFORMED, f"{what} is not a hash", expected=f"{HASH_SIZE} bytes", actual=f"{len(value)} bytes"
        )
    return value


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A tree of ``size`` leaves under ``root`` (32 bytes), of the log named ``origin``.

    Raises :class:`MalformedError` when made with anything else: ``DIGEST`` for no leaves under another root than the
    empty tree's, else ``MALFORMED``.
    """

    origin: str
    size: int
    root: bytes

    def __post_init__(self) -> None:
        check_key_name(self.origin, "origin of a checkpoint")
        if not 0 <= self.size <= MAX_SIZE:
            raise MalformedError(
                Reason.MALFORMED, "bad size in a checkpoint", expected=f"0…{MAX_SIZE}", actual=self.size
            )
        if len(self.root) != HASH_SIZE:
            raise MalformedError(
                Reason.MALFORMED,
                "the root of a checkpoint is not a hash",
                expected=f"{HASH_SIZE} bytes",
                actual=f"{len(self.root)} bytes",
            )
        if self.size == 0 and self.root != EMPTY_ROOT:
            raise MalformedError(
                Reason.DIGEST,
                "a checkpoint of no leaves with another root than the empty tree's",
                expected=EMPTY_ROOT.hex(),
                actual=self.root.hex(),
            )

    def text(self) -> bytes:
        """The text that is signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n".encode()

    @staticmethod
    def parse(text: bytes) -> Checkpoint:
        """The strict inverse of :meth:`text`. Raises :class:`MalformedError`, ``UNSUPPORTED`` for extension lines."""
        if len(text) > MAX_TEXT:
            raise MalformedError(
                Reason.TOO_LARGE,
                "the text of a checkpoint is too large",
                expected=f"at most {MAX_TEXT} bytes",
                actual=f"{len(text)} bytes",
            )
        try:
            lines = text.decode("utf-8").split("\n")
        except UnicodeDecodeError:
            raise MalformedError(Reason.MALFORMED, "the text of a checkpoint is not UTF-8") from None
        if len(lines) > 4 and lines[-1] == "" and all(lines[:-1]):
            raise MalformedError(
                Reason.UNSUPPORTED,
                "a checkpoint with extension lines",
                expected="origin, size and root",
                actual=f"{len(lines) - 1} lines",
            )
        if len(lines) != 4 or lines[3] != "":
            raise MalformedError(
                Reason.MALFORMED,
                "not the text of a checkpoint",
                expected="three lines: origin, size, root",
                actual=f"{len(lines) - 1} whole lines",
            )
        size = parse_decimal(lines[1], "size in a checkpoint")
        return Checkpoint(lines[0], size, decode_hash(lines[2], "the root of a checkpoint"))
