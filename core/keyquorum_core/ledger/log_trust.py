"""Whom a reader of the ledger believes, by the roster: the log's two keys, and a quorum of custodians as witnesses.

The roster's quorum rule takes the place of a witness policy file: a checkpoint counts when the custodians that cosigned
it, each with both its keys, are a quorum. Then, unless a whole quorum colludes, somebody honest has seen it extend what
was cosigned before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.cosignatures import CLOCK_SKEW, Witnessed, witnessed
from keyquorum_core.ledger.log_keys import LogKeys, SignedCheckpoint, open_checkpoint
from keyquorum_core.ledger.verifier_keys import VerifierKey
from keyquorum_core.quorum import Quorum

__all__ = ["LogTrust", "QuorumCheckpoint"]


@dataclass(frozen=True, slots=True)
class QuorumCheckpoint:
    """A checkpoint that the log signed and a quorum of custodians cosigned. ``times`` holds, by custodian, when each
    current cosignature was made; ``quorum_time`` is the latest moment after which a quorum cosigned. POSIX seconds."""

    signed: SignedCheckpoint
    times: Mapping[str, int]
    quorum_time: int

    @property
    def checkpoint(self) -> Checkpoint:
        return self.signed.checkpoint


@dataclass(frozen=True, slots=True)
class LogTrust:
    """``witnesses`` holds each custodian's keys, types 0x04 and 0x06, by custodian id; ``quorum`` is over those ids."""

    log: LogKeys
    witnesses: Mapping[str, Sequence[VerifierKey]]
    quorum: Quorum

    def open(self, data: bytes) -> SignedCheckpoint:
        """By the log's own signatures alone: :func:`open_checkpoint`."""
        return open_checkpoint(data, self.log)

    def verify(self, data: bytes, *, now: int, oldest: int = 0, skew: int = CLOCK_SKEW) -> QuorumCheckpoint:
        """A checkpoint cosigned by a quorum between ``oldest`` (POSIX seconds, 0 for any age) and ``now`` + ``skew``.

        Raises as :func:`open_checkpoint`, then as :meth:`check`.
        """
        return self.check(self.open(data), now=now, oldest=oldest, skew=skew)

    def check(self, signed: SignedCheckpoint, *, now: int, oldest: int = 0, skew: int = CLOCK_SKEW) -> QuorumCheckpoint:
        """The quorum alone. Raises :class:`RefusedError`: ``SIGNATURE`` for a custodian's line that does not verify,
        ``STALE`` when only cosignatures out of their time make a quorum, ``NO_QUORUM`` otherwise."""
        seen = witnessed(signed.note, signed.checkpoint, self.witnesses, now=now, oldest=oldest, skew=skew)
        if not self.quorum.is_qualified(seen.current):
            raise self._refusal(seen, now, oldest, skew)
        counted: list[str] = []
        for custodian in sorted(seen.current, key=lambda name: -seen.current[name]):
            counted.append(custodian)
            if self.quorum.is_qualified(counted):
                break
        return QuorumCheckpoint(signed, dict(seen.current), seen.current[counted[-1]])

    def _refusal(self, seen: Witnessed, now: int, oldest: int, skew: int) -> RefusedError:
        untimely = self.quorum.is_qualified({*seen.current, *seen.stale, *seen.early})
        found = [f"{name} at {time}" for part in (seen.current, seen.stale, seen.early) for name, time in part.items()]
        return RefusedError(
            Reason.STALE if untimely else Reason.NO_QUORUM,
            f"not cosigned{' in time' if untimely else ''} by a quorum of custodians",
            expected=f"{self.quorum.words()}, at {max(oldest, 1)}…{now + skew}",
            actual=", ".join(found) or "no custodian's two cosignatures",
            next_step="Read the checkpoint again later; if it stays so, ask the custodians what they last cosigned.",
        )
