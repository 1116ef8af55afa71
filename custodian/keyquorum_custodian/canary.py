"""Faults that a drill injects, for canary keys and for nothing else (docs/drills.md).

A canary key guards nothing: its certified policy says that it is for drills only, from its first epoch on and for ever.
Whoever may inject a fault here, a coordinator, therefore gains nothing by it. Faults live in memory, end by themselves,
and end with the process; all but *lost* leave no trace, and that one is what *repair* is for.

The hooks: the service asks :meth:`CanaryFaults.of` whether to keep an answer back, the gate :meth:`lies` and
:meth:`require_one_history`, ceremonies :meth:`hold` and :meth:`lies`. Each is asked for a canary's epoch only.
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import StrEnum
from typing import Final

from keyquorum_core.backup import BackupReader
from keyquorum_core.backup_body import unpack_seeds
from keyquorum_core.backup_checks import BackupCheck
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogKeys
from keyquorum_core.ledger.log_trust import LogTrust
from keyquorum_core.quorum import Quorum
from keyquorum_core.sealing import RecipientKey
from keyquorum_custodian.backing_up import write_epoch
from keyquorum_custodian.certificates import Certificates
from keyquorum_custodian.config import CustodianConfig
from keyquorum_custodian.epochs import Epochs, HeldEpoch, hold
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.ledger_store import Alarm, ScratchLedgerStore
from keyquorum_custodian.seed_records import ACTIVE, EpochRow
from keyquorum_custodian.witness import CheckpointUpdate, Witness

__all__ = ["MAX_SECONDS", "CanaryFaults", "Fault", "FaultKind", "spoilt"]

MAX_SECONDS: Final = 600
MAX_DELAY_MS: Final = 60_000
_DRILL_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_MAX_KEYS: Final = 64


class FaultKind(StrEnum):
    """What goes wrong."""

    SILENT = "silent"
    SLOW = "slow"
    LYING = "lying"
    LOST = "lost"
    RESTORED = "restored"
    SPLIT_VIEW = "split-view"


class Fault:
    """One fault in force: for which key, by which drill, until when (unix seconds). ``seeds``: how many it lost.
    ``witness``: of a split view, this custodian's view of the drill's own log; it is judged by the ledger's code."""

    def __init__(
        self, kind: FaultKind, key_id: str, drill_id: str, until: float, delay_ms: int, witness: Witness | None
    ) -> None:
        self.kind = kind
        self.key_id = key_id
        self.drill_id = drill_id
        self.until = until
        self.delay_ms = delay_ms
        self.witness = witness
        self.seeds = 0
        self.over = asyncio.Event()


class CanaryFaults:
    """The faults of one custodian; used from one thread. ``clock`` gives unix seconds, ``ledger`` is the real log."""

    def __init__(
        self,
        config: CustodianConfig,
        keystore: Keystore,
        epochs: Epochs,
        certificates: Certificates,
        recipient: RecipientKey,
        quorum: Quorum,
        ledger: LogKeys | None,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._me = config.id
        self._keystore = keystore
        self._epochs = epochs
        self._certificates = certificates
        self._recipient = recipient
        self._quorum = quorum
        self._ledger = ledger
        self._clock = clock
        self._faults: dict[str, Fault] = {}

    @property
    def any(self) -> bool:
        """Whether there may be one in force."""
        return bool(self._faults)

    def of(self, key_id: str) -> Fault | None:
        """The fault in force for this key."""
        fault = self._faults.get(key_id)
        if fault is not None and self._clock() >= fault.until:
            self._end(fault)
            return None
        return fault

    # -- injecting -----------------------------------------------------------------------------------------------------

    def inject(
        self, drill_id: str, key_id: str, kind: str, *, seconds: int, delay_ms: int = 0, log_key: str = ""
    ) -> Fault:
        """Have a fault from now on, in the place of the one there is.

        Raises ``MALFORMED``; ``UNKNOWN_KEY``; ``CANARY`` for a key that is not for drills, whatever the caller says;
        ``LEDGER_ORIGIN`` for a *split-view* of the cluster's own log; ``STORAGE``.
        """
        if kind not in list(FaultKind):
            raise _bad("no such fault", ", ".join(FaultKind), kind)
        what = FaultKind(kind)
        if not _DRILL_ID.fullmatch(drill_id):
            raise _bad("a drill's id is 16 bytes in hex", "32 hex digits", drill_id)
        if not 1 <= seconds <= MAX_SECONDS:
            raise _bad("a fault ends by itself", f"1…{MAX_SECONDS} seconds", seconds)
        if (what is FaultKind.SLOW) != bool(delay_ms) or not 0 <= delay_ms <= MAX_DELAY_MS:
            raise _bad("only a slow custodian has a delay", f"1…{MAX_DELAY_MS} ms for slow, 0 otherwise", delay_ms)
        held = self._canary(key_id)
        fault = Fault(what, key_id, drill_id, self._clock() + seconds, delay_ms, self._scratch_witness(what, log_key))
        if what in (FaultKind.LOST, FaultKind.RESTORED) and held.state != ACTIVE:  # it was lost a moment ago
            raise StateError(
                Reason.KEY_STATE,
                "only an epoch in use is lost: the newest one that is here is not",
                expected=ACTIVE,
                actual=f"epoch {held.epoch}, {held.state}",
            )
        if what is FaultKind.LOST:
            fault.seeds = self._lose(held)
        elif what is FaultKind.RESTORED:
            fault.seeds = self._lose_and_restore(held)
        before = self._faults.get(key_id)
        if before is not None:
            self._end(before)
        if what not in (FaultKind.LOST, FaultKind.RESTORED):  # those have happened, and are over
            self._faults[key_id] = fault
            while len(self._faults) > _MAX_KEYS:
                self._end(next(iter(self._faults.values())))
        return fault

    def lift(self, drill_id: str, key_id: str) -> Fault | None:
        """End the fault of this key; returns it, None where there was none. Raises ``STATE`` for another drill's."""
        fault = self.of(key_id)
        if fault is None:
            return None
        if fault.drill_id != drill_id:
            raise StateError(
                Reason.STATE, "the fault is another drill's", expected=fault.drill_id, actual=ascii(drill_id[:40])
            )
        self._end(fault)
        return fault

    def show(self, drill_id: str, key_id: str, update: CheckpointUpdate) -> Alarm | None:
        """A checkpoint of the drill's log, for *split-view*: the alarm that this custodian has raised by now. Raises
        ``STATE`` where no such fault of this drill is in force, and as :meth:`Witness.update`, but for the alarm."""
        fault = self.of(key_id)
        if fault is None or fault.drill_id != drill_id or fault.witness is None:
            raise StateError(
                Reason.STATE,
                "no such fault is in force",
                expected=f"{FaultKind.SPLIT_VIEW}, injected by this drill",
                actual=f"{fault.kind} of drill {fault.drill_id}" if fault is not None else "none",
            )
        witness = fault.witness
        try:
            witness.update(update)
        except KeyquorumError:
            if not witness.open_alarms:
                raise
        return witness.open_alarms[0] if witness.open_alarms else None

    def end(self) -> None:
        """End all of them."""
        for fault in list(self._faults.values()):
            self._end(fault)

    def _end(self, fault: Fault) -> None:
        if self._faults.get(fault.key_id) is fault:
            del self._faults[fault.key_id]
        fault.over.set()

    def _canary(self, key_id: str) -> HeldEpoch:
        """The newest epoch of a canary key."""
        held = self._epochs.newest(key_id)
        if held is None:
            raise StateError(
                Reason.UNKNOWN_KEY,
                "no such key",
                expected="a canary key whose seeds this custodian holds",
                actual=ascii(key_id[:64]),
            )
        if not held.policy.canary:
            raise RefusedError(
                Reason.CANARY,
                f"key {key_id} is not for drills: no fault is injected for it",
                expected="a key whose certified policy says canary",
                actual="one that says it is not",
                next_step="Make a key for drills: keyquorum key create NAME --canary",
            )
        return held

    def _scratch_witness(self, kind: FaultKind, log_key: str) -> Witness | None:
        """A view of the drill's log that is nowhere but in memory, and cosigns nothing."""
        if kind is not FaultKind.SPLIT_VIEW:
            if log_key:
                raise _bad("only a split view has a log", "no log key", log_key)
            return None
        log = LogKeys.parse(log_key)
        real = set() if self._ledger is None else {self._ledger.ed25519.public, self._ledger.ml_dsa_44.public}
        if real & {log.ed25519.public, log.ml_dsa_44.public} or (self._ledger and log.origin == self._ledger.origin):
            raise RefusedError(
                Reason.LEDGER_ORIGIN,
                "a drill never forks the cluster's own log",
                expected="a log of the drill's own",
                actual=log.origin,
            )
        cosigner = Cosigner.generate(f"drill/{self._me}")
        return Witness(
            LogTrust(log, {}, self._quorum), cosigner, ScratchLedgerStore(), self._clock, max_age=MAX_SECONDS
        )

    # -- what is lost --------------------------------------------------------------------------------------------------

    def _row(self, held: HeldEpoch) -> EpochRow:
        row = self._keystore.epoch(held.key_id, held.epoch)
        assert row is not None  # noqa: S101 - what is held came from there
        return row

    def _lose(self, held: HeldEpoch) -> int:
        """As if the disk had forgotten the epoch: neither its seeds nor its certificate are here any more."""
        row = self._row(held)
        count = len(held.indices)
        with self._keystore.transaction():
            self._keystore.drop_secrets(row.ceremony_id)
            self._keystore.forget_epoch(row.key_id, row.epoch)
        self._epochs.remove(held.key_id, held.epoch)
        self._keystore.scrub()
        return count

    def _lose_and_restore(self, held: HeldEpoch) -> int:
        """Back the epoch up, erase its seeds, and bring them back from that: a custodian's own format, encrypted to its
        HPKE key, checked as a restore checks it, in memory. One transaction: dying in between changes nothing.

        Raises ``UNSUPPORTED`` where a token holds the seeds, which no backup has."""
        row = self._row(held)
        certificate = self._certificates.open_now(row.certificate)
        self._keystore.seeds(row)  # raises where nothing could be restored, before anything is erased
        backup = io.BytesIO()
        recipient = self._recipient.public
        write_epoch(backup, self._keystore, self._config, recipient, int(self._clock()), (row.key_id, row.epoch))
        with self._keystore.transaction():
            self._keystore.drop_secrets(row.ceremony_id)
            if self._keystore.seeds(row):
                raise StateError(Reason.STATE, "the seeds were not erased", expected="none", actual="some")
            restored = self._restored(backup)
            again = hold(certificate, row, restored, self._me)
            self._keystore.insert_seeds(row.ceremony_id, row.key_id, row.epoch, restored)
        self._epochs.replace(again)
        return len(restored)

    def _restored(self, backup: io.BytesIO) -> dict[int, bytes]:
        """The seeds in it, once all of it is known to fit together, certificate and signature too."""
        backup.seek(0)
        reader, check = BackupReader(backup), BackupCheck(self._config.cluster, self._me)
        seeds: dict[int, bytes] = {}
        for record in reader.records(self._recipient):
            check.take(record)
            if record.kind == "seeds":
                seeds |= unpack_seeds(record.data)
        check.finish(reader)
        return seeds

    # -- the hooks -----------------------------------------------------------------------------------------------------

    def lies(self, key_id: str) -> bool:
        """Whether this custodian is to say what is not so: :func:`spoilt` contributions and commitments."""
        fault = self.of(key_id)
        return fault is not None and fault.kind is FaultKind.LYING

    def require_one_history(self, key_id: str) -> None:
        """Raises as the witness does while it holds proof of a fork, here of the drill's log."""
        fault = self.of(key_id)
        if fault is not None and fault.witness is not None:
            fault.witness.require_quiet()

    async def hold(self, key_id: str) -> None:
        """Before a step of a canary's ceremony: wait as long as a *slow* custodian takes, or a *silent* one says
        nothing."""
        fault = self.of(key_id)
        if fault is None or fault.kind not in (FaultKind.SILENT, FaultKind.SLOW):
            return
        seconds = fault.until - self._clock()
        if fault.kind is FaultKind.SLOW:
            seconds = min(seconds, fault.delay_ms / 1000)
        with suppress(TimeoutError):
            await asyncio.wait_for(fault.over.wait(), max(0.0, seconds))


def spoilt(secrets: Mapping[int, bytes]) -> dict[int, bytes]:
    """Other values under the same indices."""
    return {index: bytes(each ^ 0xFF for each in value) for index, value in secrets.items()}


def _bad(what: str, expected: str, actual: object) -> KeyquorumError:
    return MalformedError(Reason.MALFORMED, what, expected=expected, actual=ascii(str(actual)[:80]))
