"""C2SP tlog-proof: that a leaf is in the log, in one file that verifies offline.

``c2sp.org/tlog-proof@v1``, optionally ``extra <base64>``, ``index <decimal>``, the inclusion proof in base64 a line,
the leaf's sibling first, an empty line, and the checkpoint as it was signed, cosignatures and all.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Final

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.ledger.checkpoints import Checkpoint, decode_hash, parse_decimal
from keyquorum_core.ledger.log_keys import LogKeys, SignedCheckpoint, open_checkpoint
from keyquorum_core.ledger.merkle import MAX_PROOF, MAX_SIZE, check_hash, inclusion_length, verify_inclusion
from keyquorum_core.ledger.notes import MAX_NOTE, parse_note
from keyquorum_core.ledger.verifier_keys import decode_base64
from keyquorum_core.ledger.witness_policy import WitnessedCheckpoint, WitnessPolicy

__all__ = ["MAX_EXTRA", "MAX_TLOG_PROOF", "TlogProof"]

_HEADER: Final = "c2sp.org/tlog-proof@v1"
MAX_EXTRA: Final = 65_535
"""Bytes of extra data: a whole leaf fits."""
_MAX_HEAD: Final = 96_000
MAX_TLOG_PROOF: Final = _MAX_HEAD + MAX_NOTE


@dataclass(frozen=True, slots=True)
class TlogProof:
    """Leaf ``index``, its ``proof`` (32-byte hashes, lowest first), and ``checkpoint``, a signed note as bytes.

    ``extra`` is signed by nobody, and only a hint to what was logged. Raises :class:`MalformedError` when made with
    anything that is no proof; whether it proves anything is for :meth:`verify`.
    """

    index: int
    proof: tuple[bytes, ...]
    checkpoint: bytes
    extra: bytes | None = None

    def __post_init__(self) -> None:
        if self.extra is not None and not 1 <= len(self.extra) <= MAX_EXTRA:
            raise MalformedError(
                Reason.TOO_LARGE,
                "bad extra data in a proof",
                expected=f"1…{MAX_EXTRA} bytes",
                actual=f"{len(self.extra)} bytes",
            )
        size = Checkpoint.parse(parse_note(self.checkpoint, "the checkpoint of a proof").text).size
        if not 0 <= self.index < size <= MAX_SIZE or len(self.proof) != inclusion_length(self.index, size):
            raise MalformedError(
                Reason.LEDGER_PROOF,
                "a proof that does not fit its checkpoint",
                expected=f"an index under {size} and as many hashes as it takes",
                actual=f"index {self.index}, {len(self.proof)} hashes",
            )
        for value in self.proof:
            check_hash(value, "an element of a proof")

    def encode(self) -> bytes:
        lines = [_HEADER]
        if self.extra is not None:
            lines.append(f"extra {base64.b64encode(self.extra).decode()}")
        lines.append(f"index {self.index}")
        lines += [base64.b64encode(value).decode() for value in self.proof]
        return "\n".join(lines).encode() + b"\n\n" + self.checkpoint

    @staticmethod
    def parse(data: bytes) -> TlogProof:
        """The strict inverse of :meth:`encode`. Raises :class:`MalformedError`."""
        if len(data) > MAX_TLOG_PROOF:
            raise MalformedError(
                Reason.TOO_LARGE,
                "a proof is too large",
                expected=f"at most {MAX_TLOG_PROOF} bytes",
                actual=f"{len(data)} bytes",
            )
        head, separator, checkpoint = data.partition(b"\n\n")
        if not separator or len(head) > _MAX_HEAD or not head.isascii():
            raise _bad("a header in ASCII, an empty line, a checkpoint", head)
        lines = head.decode("ascii").split("\n")
        if lines.pop(0) != _HEADER:
            raise _bad(_HEADER, head)
        extra = None
        if lines and lines[0].startswith("extra "):
            extra = decode_base64(lines.pop(0).removeprefix("extra "), "extra data in a proof")
        if not lines or not lines[0].startswith("index "):
            raise _bad("an index line", lines[0].encode() if lines else b"")
        index = parse_decimal(lines.pop(0).removeprefix("index "), "index in a proof")
        if len(lines) > MAX_PROOF:
            raise MalformedError(
                Reason.LEDGER_PROOF, "a proof is too long", expected=f"at most {MAX_PROOF} hashes", actual=len(lines)
            )
        return TlogProof(index, tuple(decode_hash(line, "a line of a proof") for line in lines), checkpoint, extra)

    def verify(self, leaf_hash: bytes, log: LogKeys) -> SignedCheckpoint:
        """Whether ``log`` has ``leaf_hash`` at :attr:`index`, by its own two signatures; cosignatures are left alone.

        Raises as :func:`open_checkpoint` and :func:`verify_inclusion`.
        """
        signed = open_checkpoint(self.checkpoint, log)
        self._verify_inclusion(leaf_hash, signed.checkpoint)
        return signed

    def verify_witnessed(
        self, leaf_hash: bytes, policy: WitnessPolicy, *, now: int, oldest: int = 0
    ) -> WitnessedCheckpoint:
        """The same by a policy: its log's signatures, and cosignatures of its quorum from ``oldest`` to ``now``.

        A proof is kept, so by default any age will do. Raises as :meth:`WitnessPolicy.verify` and
        :func:`verify_inclusion`.
        """
        done = policy.verify(self.checkpoint, now=now, oldest=oldest)
        self._verify_inclusion(leaf_hash, done.checkpoint)
        return done

    def _verify_inclusion(self, leaf_hash: bytes, checkpoint: Checkpoint) -> None:
        verify_inclusion(leaf_hash, self.index, checkpoint.size, self.proof, checkpoint.root)


def _bad(expected: str, actual: bytes) -> MalformedError:
    return MalformedError(
        Reason.MALFORMED, "not a tlog-proof", expected=expected, actual=ascii(actual[:40].decode("latin-1"))
    )
