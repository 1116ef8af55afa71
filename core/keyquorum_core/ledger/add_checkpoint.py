"""The body of a witness's ``add-checkpoint`` request, by C2SP tlog-witness.

``old <size>``, the consistency proof in base64 a line, an empty line, the signed checkpoint. A witness answers with
its signature lines: :func:`keyquorum_core.ledger.notes.parse_signature_lines`.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Final

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.ledger.checkpoints import decode_hash, parse_decimal
from keyquorum_core.ledger.merkle import MAX_PROOF, MAX_SIZE, check_hash
from keyquorum_core.ledger.notes import MAX_NOTE

__all__ = ["MAX_ADD_CHECKPOINT", "AddCheckpoint"]

_MAX_HEAD: Final = 4096
MAX_ADD_CHECKPOINT: Final = _MAX_HEAD + MAX_NOTE


@dataclass(frozen=True, slots=True)
class AddCheckpoint:
    """``old_size`` is what the sender thinks the witness saw last; ``proof`` leads from there; ``checkpoint`` is a
    signed note as bytes. Raises :class:`MalformedError` when made with anything that can't be sent."""

    old_size: int
    proof: tuple[bytes, ...]
    checkpoint: bytes

    def __post_init__(self) -> None:
        if not 0 <= self.old_size <= MAX_SIZE or len(self.proof) > MAX_PROOF:
            raise MalformedError(
                Reason.MALFORMED,
                "not an add-checkpoint request",
                expected=f"an old size under 2⁶³ and at most {MAX_PROOF} hashes",
                actual=f"old size {self.old_size}, {len(self.proof)} hashes",
            )
        for value in self.proof:
            check_hash(value, "an element of a consistency proof")

    def encode(self) -> bytes:
        lines = [f"old {self.old_size}", *(base64.b64encode(value).decode() for value in self.proof)]
        return "\n".join(lines).encode() + b"\n\n" + self.checkpoint

    @staticmethod
    def parse(data: bytes) -> AddCheckpoint:
        """The strict inverse of :meth:`encode`; the checkpoint is left unread. Raises :class:`MalformedError`."""
        if len(data) > MAX_ADD_CHECKPOINT:
            raise MalformedError(
                Reason.TOO_LARGE,
                "an add-checkpoint request is too large",
                expected=f"at most {MAX_ADD_CHECKPOINT} bytes",
                actual=f"{len(data)} bytes",
            )
        head, separator, checkpoint = data.partition(b"\n\n")
        if not separator or len(head) > _MAX_HEAD or not head.isascii() or not head.startswith(b"old "):
            raise MalformedError(
                Reason.MALFORMED,
                "not an add-checkpoint request",
                expected="old <size>, a consistency proof, an empty line, a checkpoint",
                actual=ascii(head[:40].decode("latin-1")),
            )
        first, *lines = head.decode("ascii").split("\n")
        old_size = parse_decimal(first.removeprefix("old "), "old size")
        return AddCheckpoint(old_size, tuple(decode_hash(line, "a line of a proof") for line in lines), checkpoint)
