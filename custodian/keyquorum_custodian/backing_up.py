"""A backup of this custodian as it is: what goes into it, read in pieces, so that releases go on meanwhile.

What changes is read at once, when the snapshot is taken; what is only ever added to or erased whole (seeds, releases)
piece by piece afterwards, up to where it was then. Seeds leave the keystore only to be encrypted under the backup's own
key: who has a recipient's key needs no passphrase, token or officer of this custodian. Its identity, HPKE, witness and
TLS keys are not in it at all: a custodian that is restored is another one in the roster, so that two can never answer
as one. Nor are appraisals, which are made again, and what waits for the operator, which is asked again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from keyquorum_core.backup import KEYSTORE, TOKEN, BackedEpoch, BackupWriter, Statement
from keyquorum_core.backup_body import SEEDS_EACH, Record, join, pack_seeds
from keyquorum_core.certified import peek_certificate
from keyquorum_core.errors import KeyquorumError, Reason, StateError
from keyquorum_core.ledger.log_keys import log_name
from keyquorum_core.roster import MAX_ROSTER, ROSTER_TYPE, Roster
from keyquorum_core.signing import peek_payload
from keyquorum_core.streams import Sink
from keyquorum_custodian.config import CONFIG_NAME, CustodianConfig
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.ledger_store import LedgerStore
from keyquorum_custodian.seed_records import DESTROYED, EpochRow, plain
from keyquorum_custodian.vault import blob, number
from keyquorum_protos.wire.files import read_bytes

__all__ = [
    "CONFIGURATION",
    "NOT_BACKED_UP",
    "OPERATORS",
    "OWNER",
    "POLICY_SIGNERS",
    "Snapshot",
    "epoch_records",
    "write_backup",
    "write_epoch",
]

CONFIGURATION: Final = "configuration"
OPERATORS: Final = "operators"
POLICY_SIGNERS: Final = "policy-signers"
OWNER: Final = "owner/"
"""Names of files in a backup; an owner's has its file's name behind it."""

NOT_BACKED_UP: Final = frozenset({"secrets", "parts", "ceremony_steps", "approvals", "appraisals"})
"""Tables that no record is of, on purpose."""

_SEQUENCE: Final = "backup-sequence"
_RELEASES: Final = 256  # read at a time
_MAX_FILE: Final = 16 << 20


class Snapshot:
    """The custodian of a keystore and its folder as they were when this was made; used from the keystore's thread.
    ``only``: this epoch, with the rosters that it is judged by, and nothing else.

    Raises ``NOT_FOUND`` for one that never served: it has nothing to lose yet.
    """

    def __init__(
        self, keystore: Keystore, config: CustodianConfig, now: int, only: tuple[str, int] | None = None
    ) -> None:
        newest = keystore.newest_roster()
        if newest is None:
            raise StateError(
                Reason.NOT_FOUND,
                "this custodian has never served under a roster: there is nothing to back up",
                next_step="Enrol it and serve first.",
            )
        self._keystore = keystore
        self._config = config
        self.now = now
        self.roster = Roster.parse(newest[2])
        whole = only is None
        self._small = tuple(_small_records(keystore, config) if whole else _rosters(keystore))
        self._epochs = [each for each in _epoch_rows(keystore) if whole or only == (each[0].key_id, each[0].epoch)]
        self._counts = {
            str(ceremony): number(count)
            for ceremony, count in keystore.select("SELECT ceremony_id, count(*) FROM seeds GROUP BY ceremony_id")
        }
        self._after = tuple(_records_after_epochs(keystore)) if whole else ()
        last = number(keystore.select("SELECT coalesce(max(number), 0) FROM releases")[0][0])
        self._last_release = last if whole else 0
        self.highest_time = max(keystore.highest_time(), 0)
        log = log_name(self.roster.log_key)
        checkpoint = LedgerStore(keystore).newest(log) if log and whole else None
        self.ledger_size = checkpoint.size if checkpoint is not None else 0
        self.backed: list[BackedEpoch] = []
        """What :meth:`records` has given so far."""

    def records(self) -> Iterator[Record]:
        """In the order of the format. Raises ``STATE`` when an epoch is destroyed meanwhile: make it anew."""
        yield from self._small
        for row, activated_at, ended_at in self._epochs:
            held = _held(self._keystore)
            expected = self._counts.get(row.ceremony_id, 0) if row.state != DESTROYED and held == KEYSTORE else 0
            given = 0
            for record in epoch_records(self._keystore, row, activated_at=activated_at, ended_at=ended_at):
                given += len(record.data) // 36 if record.kind == "seeds" else 0
                yield record
            if given != expected:
                raise StateError(
                    Reason.STATE,
                    f"epoch {row.epoch} of key {row.key_id} changed while the backup was made",
                    expected=f"{expected} seeds",
                    actual=f"{given} seeds",
                    next_step="Make the backup anew.",
                )
            self.backed.append(BackedEpoch(row.key_id, row.epoch, row.state, _digest(row.certificate), given, held))
        yield from self._after
        yield from self._releases()

    def _releases(self) -> Iterator[Record]:
        after = 0
        columns = (
            "leaf_hash", "leaf", "owner", "released_at", "window", "development", "policy_sha256", "policy_version",
            "decision_sha256",
        )  # fmt: skip
        while True:
            rows = self._keystore.select(
                f"SELECT number, {', '.join(columns)} FROM releases WHERE number > ? AND number <= ?"  # noqa: S608
                " ORDER BY number LIMIT ?",
                after,
                self._last_release,
                _RELEASES,
            )
            if not rows:
                return
            for row in rows:
                found = dict(zip(columns, row[1:], strict=True))
                leaf, digest = blob(found.pop("leaf")), blob(found.pop("leaf_hash")).hex()
                yield Record("release", {**found, "leaf_hash": digest}, leaf)  # type: ignore[dict-item]
            after = number(rows[-1][0])

    def statement(self, writer: BackupWriter, sequence: int) -> Statement:
        """After the last record: what the custodian signs about it."""
        digest, size = writer.close_body()
        opening = writer.opening
        return Statement(
            backup_id=opening.backup_id,
            cluster=opening.cluster,
            custodian=opening.custodian,
            jurisdiction=self._config.jurisdiction,
            created_at=self.now,
            highest_time=self.highest_time,
            sequence=sequence,
            roster_version=self.roster.version,
            roster_digest=self.roster.digest,
            ledger_size=self.ledger_size,
            epochs=tuple(sorted(self.backed, key=lambda each: (each.key_id, each.epoch))),
            opening_sha256=writer.opening_sha256,
            body_sha256=digest,
            body_bytes=size,
        )


def next_sequence(keystore: Keystore) -> int:
    """One more than ever before, on the disk when this returns."""
    rows = keystore.select("SELECT value FROM meta WHERE name = ?", _SEQUENCE)
    following = (int.from_bytes(blob(rows[0][0]), "big") if rows else 0) + 1
    with keystore.transaction():
        keep_sequence(keystore, following)
    return following


def keep_sequence(keystore: Keystore, sequence: int) -> None:
    """Inside a transaction."""
    keystore.change("INSERT OR REPLACE INTO meta VALUES (?, ?)", _SEQUENCE, sequence.to_bytes(8, "big"))


def write_backup(
    sink: Sink, keystore: Keystore, config: CustodianConfig, recipients: Sequence[bytes], now: int
) -> Statement:
    """A whole backup in one go, of a custodian that isn't running. Raises as :class:`Snapshot`, and ``STORAGE``."""
    return _write(sink, keystore, config, recipients, Snapshot(keystore, config, now))


def write_epoch(
    sink: Sink, keystore: Keystore, config: CustodianConfig, recipient: bytes, now: int, where: tuple[str, int]
) -> Statement:
    """One epoch in the form of a backup, which is in nobody's count of backups: for a drill to restore from. Raises as
    :class:`Snapshot`."""
    return _write(sink, keystore, config, [recipient], Snapshot(keystore, config, now, only=where), sequence=1)


def _write(
    sink: Sink,
    keystore: Keystore,
    config: CustodianConfig,
    recipients: Sequence[bytes],
    snapshot: Snapshot,
    sequence: int = 0,
) -> Statement:
    writer = BackupWriter(sink, recipients, cluster=config.cluster, custodian=config.id)
    for record in snapshot.records():
        writer.add(record)
    statement = snapshot.statement(writer, sequence or next_sequence(keystore))
    writer.finish(statement, keystore.identity())
    return statement


def epoch_records(keystore: Keystore, row: EpochRow, *, activated_at: int = 0, ended_at: int = 0) -> Iterator[Record]:
    """One epoch: its certificate, and its seeds in pieces unless it is destroyed or they are in a token."""
    yield Record(
        "epoch",
        {
            "activated_at": activated_at,
            "ceremony_id": row.ceremony_id,
            "ended_at": ended_at,
            "epoch": row.epoch,
            "held": _held(keystore),
            "key_id": row.key_id,
            "retired_at": row.retired_at or 0,
            "state": row.state,
        },
        row.certificate,
    )
    if row.state == DESTROYED or _held(keystore) == TOKEN:
        return
    for piece in keystore.seeds_in_pieces(row):
        for some in _in_runs(plain(piece), SEEDS_EACH):
            yield Record("seeds", {"epoch": row.epoch, "key_id": row.key_id}, pack_seeds(some))


def _held(keystore: Keystore) -> str:
    """Where its seeds are: a token gives none out, so that no backup has them."""
    return KEYSTORE if keystore.token_seeds is None else TOKEN


def _in_runs(seeds: dict[int, bytes], size: int) -> Iterator[dict[int, bytes]]:
    indices = sorted(seeds)
    for start in range(0, len(indices), size):
        yield {index: seeds[index] for index in indices[start : start + size]}


# -- the small tables --------------------------------------------------------------------------------------------------


def _rosters(keystore: Keystore) -> Iterator[Record]:
    for digest, version, payload in keystore.select("SELECT digest, version, payload FROM rosters ORDER BY version"):
        yield Record("roster", {"digest": str(digest), "version": number(version)}, blob(payload))


def _small_records(keystore: Keystore, config: CustodianConfig) -> Iterator[Record]:
    yield from _rosters(keystore)
    yield from _roster_files(config)
    yield from _files(config)
    for log, size, root, note, accepted_at in keystore.select(
        "SELECT log, size, root, note, accepted_at FROM ledgers ORDER BY log"
    ):
        members: dict[str, str | int] = {
            "accepted_at": number(accepted_at),
            "log": str(log),
            "root": blob(root).hex(),
            "size": number(size),
        }
        yield Record("checkpoint", members, blob(note))
    for alarm in LedgerStore(keystore).alarms():
        yield Record(
            "alarm",
            {
                "cleared_at": alarm.cleared_at or 0,
                "evidence": alarm.evidence.hex(),
                "kind": alarm.kind,
                "raised_at": alarm.raised_at,
                "why": alarm.why or "",
            },
            join(alarm.known, alarm.shown),
        )
    for kind, version, digest, envelope, accepted_at in keystore.select(
        "SELECT kind, version, digest, envelope, accepted_at FROM bulletins ORDER BY kind"
    ):
        yield Record(
            "bulletin",
            {
                "accepted_at": number(accepted_at),
                "digest": str(digest),
                "kind": str(kind),
                "version": number(version),
            },
            blob(envelope),
        )


def _roster_files(config: CustodianConfig) -> Iterator[Record]:
    found: dict[int, bytes] = {}
    paths = [config.path(config.roster)]
    with contextlib.suppress(OSError):
        paths += sorted(config.path(config.rosters).glob("*.json"))
    for path in paths:
        with contextlib.suppress(KeyquorumError):  # what is no roster is none of this custodian's
            envelope = read_bytes(path, "a roster", _MAX_FILE)
            payload = peek_payload(envelope, ROSTER_TYPE, "roster", max_bytes=2 * MAX_ROSTER)
            found.setdefault(Roster.parse(payload).version, envelope)
    for version in sorted(found):
        yield Record("roster-file", {"version": version}, found[version])


def _files(config: CustodianConfig) -> Iterator[Record]:
    files = {
        CONFIGURATION: config.path(CONFIG_NAME),
        OPERATORS: config.path(config.operators),
        POLICY_SIGNERS: config.path(config.policy_signers),
    }
    with contextlib.suppress(OSError):
        files |= {f"{OWNER}{path.stem}": path for path in sorted(config.path(config.owners).glob("*.json"))}
    for name, path in files.items():
        yield Record("file", {"name": name}, read_bytes(path, f"the custodian's {name}", _MAX_FILE))


def _epoch_rows(keystore: Keystore) -> list[tuple[EpochRow, int, int]]:
    times = {
        (str(key_id), number(epoch)): (number(activated_at), number(ended_at))
        for key_id, epoch, activated_at, ended_at in keystore.select(
            "SELECT key_id, epoch, activated_at, coalesce(ended_at, 0) FROM epochs"
        )
    }
    return [(row, *times[row.key_id, row.epoch]) for row in keystore.epochs()]


def _digest(certificate: bytes) -> str:
    return peek_certificate(certificate).digest


def _records_after_epochs(keystore: Keystore) -> Iterator[Record]:
    times = keystore.select("SELECT ceremony_id, updated_at FROM ceremonies")
    updated = {str(ceremony): number(at) for ceremony, at in times}
    for row in keystore.ceremonies():
        yield Record(
            "ceremony",
            {
                "cancelled_from": str(row.cancelled_from or ""),
                "cause": row.cause,
                "ceremony_id": row.ceremony_id,
                "epoch": row.epoch,
                "key_id": row.key_id,
                "kind": str(row.kind),
                "signers": " ".join(row.signers),
                "state": str(row.state),
                "updated_at": updated[row.ceremony_id],
            },
            row.plan,
        )
    found_at = {
        (str(ceremony), str(name)): number(at)
        for ceremony, name, at in keystore.select("SELECT ceremony_id, custodian, found_at FROM accusations")
    }
    for each in keystore.accusations():
        about: dict[str, str | int] = {
            "ceremony_id": each.ceremony_id,
            "custodian": each.custodian,
            "found_at": found_at[each.ceremony_id, each.custodian],
            "what": each.what,
        }
        yield Record("accusation", about, join(each.statement, each.sealed))
    yield from _leases(keystore)
    yield from _quarantine(keystore)
    for ak, sealed in keystore.select("SELECT ak, sealed FROM tpm_states ORDER BY ak"):
        yield Record("tpm", {"ak": str(ak)}, keystore.unseal_row(sealed, "tpm_states", str(ak)))


def _leases(keystore: Keystore) -> Iterator[Record]:
    columns = ("job_id", "recipient_sha256", "key_id", "epoch", "granted_at", "until", "renewals", "revoked")
    rows = keystore.select(f"SELECT sealed, {', '.join(columns)} FROM leases ORDER BY granted_at, job_id")  # noqa: S608
    for sealed, *row in rows:
        members = dict(zip(columns, row, strict=True))
        name = str(members["job_id"]), str(members["recipient_sha256"])
        yield Record("lease", members, keystore.unseal_row(sealed, "leases", *name))  # type: ignore[arg-type]


def _quarantine(keystore: Keystore) -> Iterator[Record]:
    columns = ("reason", "message", "job_id", "evidence_sha256", "raised_at", "lifted_at", "why")
    kept: Iterable[tuple[object, ...]] = keystore.select(
        f"SELECT subjects, {', '.join(columns)} FROM quarantine ORDER BY number"  # noqa: S608
    )
    for subjects, *row in kept:
        members = dict(zip(columns, row, strict=True))
        members |= {"lifted_at": members["lifted_at"] or 0, "why": members["why"] or ""}
        yield Record("quarantine", members, str(subjects).encode())  # type: ignore[arg-type]
    for sha256, document in keystore.select("SELECT sha256, document FROM quarantine_evidence ORDER BY sha256"):
        yield Record("evidence", {"sha256": str(sha256)}, blob(document))
