"""This custodian as a witness of the ledger (DESIGN §6 step 2, §8; guarantee G3): what it saw, and what that proves.

One state serves the release gate, a coordinator that asks for cosignatures, and C2SP's ``add-checkpoint``: the newest
checkpoint accepted. Another is accepted when the log signed it with both keys and a proof shows that it extends that
one; it is on the disk before anything is said or released on its strength.

What is *proof* of a misdeed and what is only a bad answer decides who can stop this custodian
(docs/adr/0011-provable-forks.md). Two checkpoints of one size that the log signed with different roots are a **fork**.
This custodian's own cosignature on a tree larger than the newest it remembers is a **rollback** of its disk: it signs
only what it has stored. Both are kept, with both notes, and stop releases until an operator clears them. A proof that
does not verify is refused, and no more: anybody between could have spoilt it. A checkpoint older than the newest is
neither; whoever shows it is told where this custodian is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.ledger.checkpoints import Checkpoint
from keyquorum_core.ledger.cosignatures import CLOCK_SKEW, Cosigner, verify_signature
from keyquorum_core.ledger.log_keys import SignedCheckpoint, log_name
from keyquorum_core.ledger.log_trust import LogTrust
from keyquorum_core.ledger.merkle import EMPTY_ROOT, MAX_PROOF, verify_consistency, verify_inclusion
from keyquorum_core.ledger.notes import Note, NoteSignature
from keyquorum_core.transcript import H
from keyquorum_custodian.ledger_store import Alarm, LedgerStore, StoredCheckpoint

__all__ = ["NOWHERE", "CheckpointUpdate", "Inclusion", "Witness"]

FORK: Final = "fork"
ROLLBACK: Final = "rollback"
_REMEMBERED: Final = 256
"""Accepted checkpoints that releases under way may still name."""


@dataclass(frozen=True, slots=True)
class CheckpointUpdate:
    """What takes a custodian to ``checkpoint``, a signed note.

    ``proof`` leads there from ``old_size``, which the sender takes for the newest size seen. ``cosigned`` is the latest
    checkpoint that a quorum cosigned, empty when it was sent before, and ``cosigned_proof`` leads from there.
    """

    old_size: int
    proof: tuple[bytes, ...]
    checkpoint: bytes
    cosigned: bytes = b""
    cosigned_proof: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Inclusion:
    """Where the ledger shows a leaf: its index, the size of the tree that ``proof`` leads to, 32-byte hashes."""

    index: int
    size: int
    proof: tuple[bytes, ...]


NOWHERE: Final = Inclusion(0, 0, ())
"""What a request says that shows nothing."""


class Witness:
    """One custodian's view of the log; used from one thread. ``clock`` gives unix seconds. ``trust`` is the roster's
    word on the log and its witnesses; without a log nothing is ever shown.

    ``max_age``: seconds for which a quorum's cosignatures vouch for the log. ``on_alarm`` hears of each new alarm once
    it is on the disk; ``may_cosign`` raises where nothing is to be cosigned, while checkpoints are accepted as ever.
    Raises ``STORAGE`` when what is on the disk is not of this log.
    """

    def __init__(
        self,
        trust: LogTrust | None,
        cosigner: Cosigner,
        store: LedgerStore,
        clock: Callable[[], float],
        *,
        max_age: int,
        on_alarm: Callable[[Alarm], None] = lambda alarm: None,
        may_cosign: Callable[[], None] = lambda: None,
    ) -> None:
        self._trust = trust
        self._may_cosign = may_cosign
        self._name = "" if trust is None else log_name(trust.log)
        self._cosigner = cosigner
        self._store = store
        self._clock = clock
        self._max_age = max_age
        self._on_alarm = on_alarm
        self._open_alarms: tuple[Alarm, ...] = ()
        self._forgiven = 0
        self._read_alarms()
        self._last = self._restore()
        self._seen: OrderedDict[int, StoredCheckpoint] = OrderedDict({self._last.size: self._last})
        self._cosigned = b""
        self._witnessed_at = 0

    def _restore(self) -> StoredCheckpoint:
        row = self._store.newest(self._name) if self._trust is not None else None
        if self._trust is None or row is None:
            return StoredCheckpoint(0, EMPTY_ROOT, b"")  # the tree that every log begins with; nobody signed it
        try:
            checkpoint = self._trust.open(row.note).checkpoint
        except KeyquorumError as error:
            raise _damaged(f"{error.reason}: {error.message}") from None
        if (checkpoint.size, checkpoint.root) != (row.size, row.root):
            raise _damaged(f"a note of size {checkpoint.size} in the row of size {row.size}")
        return row

    def _read_alarms(self) -> None:
        alarms = self._store.alarms()
        self._open_alarms = tuple(alarm for alarm in alarms if alarm.cleared_at is None)
        # What this custodian cosigned before an operator cleared a rollback is known to be missing from its disk.
        self._forgiven = max((alarm.cleared_at or 0 for alarm in alarms if alarm.kind == ROLLBACK), default=0)

    # -- what it knows ---------------------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """What its log is called in the keystore; empty without one."""
        return self._name

    @property
    def size(self) -> int:
        """Leaves in the newest checkpoint accepted; 0 before the first."""
        return self._last.size

    @property
    def root(self) -> bytes:
        return self._last.root

    @property
    def witnessed_at(self) -> int:
        """Unix seconds at which the latest quorum known here had cosigned; 0 while none is known since the start."""
        return self._witnessed_at

    @property
    def open_alarms(self) -> tuple[Alarm, ...]:
        """What stops releases."""
        return self._open_alarms

    def alarms(self) -> tuple[Alarm, ...]:
        """All of them, cleared ones too."""
        return self._store.alarms()

    def clear(self, number: int, why: str) -> None:
        """An operator looked into an alarm: once none is left releases go on, from the checkpoint accepted last. The
        same fork shown again is refused and stops nothing. Raises ``MALFORMED`` without a reason, ``NOT_FOUND``."""
        self._store.clear_alarm(number, why, int(self._clock()))
        self._read_alarms()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def update(self, update: CheckpointUpdate) -> None:
        """Accept a checkpoint and, where there is one, a quorum's word on the log. What was seen before costs nothing.

        Raises :class:`MalformedError`; ``LEDGER_ORIGIN`` (another log, or a roster that names none);
        ``SIGNATURE_MISSING``, ``SIGNATURE``; ``LEDGER_FORK``, ``LEDGER_ROLLBACK`` (an alarm; one not cleared);
        ``LEDGER_CONFLICT`` (not built on the newest seen, whose size is in the details); ``LEDGER_PROOF``;
        ``LEDGER_UNWITNESSED`` for ``cosigned``, whatever becomes of which the checkpoint stays accepted; ``STORAGE``.
        """
        cosigned = None
        if update.cosigned and update.cosigned != self._cosigned:
            self.require_quiet()
            # Before the checkpoint is accepted: what is compared with is what this custodian remembered till now.
            cosigned = self._open(update.cosigned)
        reached = self._advance(update.old_size, update.proof, update.checkpoint)
        if cosigned is not None:
            self._take_cosigned(cosigned, update, reached)

    def cosign(self, old_size: int, proof: tuple[bytes, ...], note: bytes) -> tuple[NoteSignature, NoteSignature]:
        """C2SP ``add-checkpoint``: accept a checkpoint and say so under both keys. Raises as :meth:`update`; also
        ``LEDGER_CONFLICT`` unless ``old_size`` is the newest size seen."""
        self._may_cosign()
        self.require_quiet()
        signed = self._open(note)  # also one seen before: only what the log signed is cosigned
        self._accept(old_size, proof, signed, note)
        return self._cosigner.cosign(signed.checkpoint, int(self._clock()))

    def serve(self, update: CheckpointUpdate, *, cosign: bool) -> tuple[NoteSignature, ...]:
        """:meth:`update`, and where it is asked for both cosignatures of the checkpoint, which has to be the newest one
        seen. Raises as :meth:`update`; ``LEDGER_CONFLICT`` for an older one."""
        self.update(update)
        if not cosign:
            return ()
        self._may_cosign()
        checkpoint = self._open(update.checkpoint).checkpoint
        if checkpoint.size < self._last.size:
            raise self._conflict(f"a tree of {checkpoint.size}")
        return self._cosigner.cosign(checkpoint, int(self._clock()))

    def require_shown(self, leaf_hash: bytes, inclusion: Inclusion) -> None:
        """The log shows ``leaf_hash``, and a quorum vouched for the log a short while ago (G3).

        Raises ``LEDGER_ORIGIN``, ``LEDGER_FORK``, ``LEDGER_CONFLICT`` (a tree this custodian has not accepted),
        ``LEDGER_PROOF``, ``LEDGER_UNWITNESSED``.
        """
        trust = self._require_log()
        self.require_quiet()
        if inclusion.size == 0 or len(inclusion.proof) > MAX_PROOF:
            raise MalformedError(
                Reason.LEDGER_PROOF,
                "the request does not show that the ledger has its leaf",
                expected=f"an inclusion proof of at most {MAX_PROOF} hashes in a tree of one leaf or more",
                actual=f"{len(inclusion.proof)} hashes in a tree of {inclusion.size}",
            )
        seen = self._seen.get(inclusion.size)
        if seen is None:
            raise self._conflict(f"a tree of {inclusion.size}")
        verify_inclusion(leaf_hash, inclusion.index, seen.size, inclusion.proof, seen.root)
        age = int(self._clock()) - self._witnessed_at
        if not -CLOCK_SKEW <= age <= self._max_age:  # a clock that was set back makes nothing young
            raise RefusedError(
                Reason.LEDGER_UNWITNESSED,
                "no quorum of custodians has cosigned the ledger in time",
                expected=f"cosignatures of the last {self._max_age} s by {trust.quorum.words()}",
                actual=f"{age} s old" if self._witnessed_at else "none seen since this custodian started",
                next_step="Have the coordinator collect cosignatures; it can when a quorum of custodians is up.",
            )

    # -- inside ----------------------------------------------------------------------------------------------------

    def _require_log(self) -> LogTrust:
        if self._trust is None:
            raise RefusedError(
                Reason.LEDGER_ORIGIN,
                "the roster names no ledger, so nothing could show a release",
                expected="a roster with a log_key",
                actual="none",
                next_step="Have the operators sign a roster with the coordinator's log.vkey.",
            )
        return self._trust

    def require_quiet(self) -> None:
        """Raises :class:`StateError` (``LEDGER_FORK``) while an alarm is open."""
        if self._open_alarms:
            first = self._open_alarms[0]
            raise StateError(
                Reason.LEDGER_FORK,
                f"this custodian holds proof of a {first.kind} and releases nothing until its operator clears it",
                expected="no open ledger alarm",
                actual=", ".join(f"alarm {alarm.number} ({alarm.kind})" for alarm in self._open_alarms[:8]),
                next_step="Its operator runs `keyquorum-custodian ledger alarms`.",
                details={"alarm": first.kind, "evidence": first.evidence.hex()},
            )

    def _open(self, note: bytes) -> SignedCheckpoint:
        """A checkpoint of the log that contradicts nothing known here. Raises an alarm where it proves that it does."""
        signed = self._require_log().open(note)
        checkpoint = signed.checkpoint
        known = self._seen.get(checkpoint.size)
        if known is not None and known.root != checkpoint.root:
            self._alarm(FORK, known, signed)
        if checkpoint.size > self._last.size and self._cosigned_at(signed.note, checkpoint) > self._forgiven:
            self._alarm(ROLLBACK, self._last, signed)
        return signed

    def _cosigned_at(self, note: Note, checkpoint: Checkpoint) -> int:
        """When this custodian cosigned it, by both its keys; 0 where it did not. Raises ``SIGNATURE``."""
        lines = [(key, line) for key in self._cosigner.keys if (line := note.signature_of(key)) is not None]
        times = [verify_signature(key, checkpoint, line) for key, line in lines]
        return min(times) if len(times) == len(self._cosigner.keys) else 0

    def _alarm(self, kind: str, known: StoredCheckpoint, shown: SignedCheckpoint) -> None:
        """Keep both notes, stop releases, and say so. Raises in any case."""
        now = int(self._clock())
        text = known.note.partition(b"\n\n")[0]
        evidence = H("keyquorum/v1/ledger-alarm", kind.encode(), text, shown.checkpoint.text())
        if self._store.raise_alarm(kind, evidence, known.note, shown.encode(), now):
            self._read_alarms()
            self._on_alarm(self._open_alarms[-1])
        theirs = shown.checkpoint
        raise RefusedError(
            Reason.LEDGER_FORK if kind == FORK else Reason.LEDGER_ROLLBACK,
            f"the log signed two trees of {theirs.size} leaves"
            if kind == FORK
            else "this custodian cosigned a larger tree than its disk remembers: the disk was turned back",
            expected=f"size {known.size}, root {known.root.hex()}",
            actual=f"size {theirs.size}, root {theirs.root.hex()}",
            next_step="This custodian keeps both checkpoints; its operator runs `keyquorum-custodian ledger alarms`.",
            details={"alarm": kind, "evidence": evidence.hex()},
        )

    def _advance(self, old_size: int, proof: tuple[bytes, ...], note: bytes) -> StoredCheckpoint:
        """The checkpoint in ``note``, accepted now or before."""
        self.require_quiet()
        if note == self._last.note and note:
            return self._last
        signed = self._open(note)
        known = self._seen.get(signed.checkpoint.size)
        return known if known is not None else self._accept(old_size, proof, signed, note)

    def _accept(
        self, old_size: int, proof: tuple[bytes, ...], signed: SignedCheckpoint, note: bytes
    ) -> StoredCheckpoint:
        """The newest checkpoint from now on, if it is shown to extend the one that is."""
        size, root = signed.checkpoint.size, signed.checkpoint.root
        if old_size > size:
            raise MalformedError(
                Reason.MALFORMED,
                "a proof from a larger tree than the one it leads to",
                expected=f"an old size of at most {size}",
                actual=old_size,
            )
        if old_size != self._last.size:
            raise self._conflict(f"a proof from {old_size} to {size}")
        verify_consistency(self._last.size, self._last.root, size, root, proof)
        if size == self._last.size and self._last.note:
            return self._last
        seen = StoredCheckpoint(size, root, note)
        self._store.accept(self._name, seen, int(self._clock()))
        self._last = self._seen[size] = seen
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return seen

    def _take_cosigned(self, cosigned: SignedCheckpoint, update: CheckpointUpdate, reached: StoredCheckpoint) -> None:
        """A quorum's word on the log, when the log it cosigned is the one seen here."""
        checkpoint = cosigned.checkpoint
        known = self._seen.get(checkpoint.size)
        if known is None:
            verify_consistency(checkpoint.size, checkpoint.root, reached.size, reached.root, update.cosigned_proof)
        elif known.root != checkpoint.root:  # accepted a moment ago, under another root
            self._alarm(FORK, known, cosigned)
        now = int(self._clock())
        try:
            vouched = self._require_log().check(cosigned, now=now, oldest=now - self._max_age)
        except RefusedError as error:
            if error.reason not in (Reason.STALE, Reason.NO_QUORUM):
                raise
            raise RefusedError(
                Reason.LEDGER_UNWITNESSED, error.message, expected=error.expected, actual=error.actual
            ) from None
        self._cosigned = update.cosigned
        self._witnessed_at = max(self._witnessed_at, min(vouched.quorum_time, now))

    def _conflict(self, actual: str) -> StateError:
        return StateError(
            Reason.LEDGER_CONFLICT,
            "this custodian is at another checkpoint of the ledger",
            expected=f"built on a tree of {self._last.size}",
            actual=actual,
            next_step="Send a proof from the size this custodian is at.",
            details={"size": str(self._last.size)},
        )


def _damaged(actual: str) -> UnavailableError:
    return UnavailableError(
        Reason.STORAGE,
        "the ledger checkpoint in the keystore is not one of the roster's log",
        expected="a checkpoint that this log signed",
        actual=actual,
        next_step="Restore the keystore from a backup.",
    )
