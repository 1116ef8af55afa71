"""`keyquorum-custodian restore`: a new custodian's folder that holds what an old one's backup remembers.

Identity, HPKE key, witness key and TLS certificates are new, as ``init`` makes them: the operators put the new card in
the old one's place in the roster, and whoever follows that roster takes no answer of the old one any more. What was
under way in ceremonies is cancelled, since only the old identity could go on with it. The keystore is marked, in the
same transaction that fills it, so that it serves nothing before it has proved itself
(:mod:`keyquorum_custodian.restoration`).

One pass over the backup checks and writes; what is written counts only when all of it, and the custodian's signature on
it, was checked. A death leaves what a death of ``init`` leaves: a folder ``NAME.init`` that the next attempt removes.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from keyquorum_core import keywrap
from keyquorum_core.backup import TOKEN, BackupReader
from keyquorum_core.backup_body import Record, split, unpack_seeds
from keyquorum_core.backup_checks import BackupCheck, Checked
from keyquorum_core.ceremony_states import FINAL, State
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_core.roster import EnrolmentCard
from keyquorum_core.sealing import RecipientKey, Suite
from keyquorum_core.streams import Source
from keyquorum_core.transcript import H
from keyquorum_custodian import init
from keyquorum_custodian.approvals import Approvals
from keyquorum_custodian.backing_up import CONFIGURATION, OPERATORS, OWNER, POLICY_SIGNERS, keep_sequence
from keyquorum_custodian.config import CustodianConfig, parse_config
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.sealing.schemes import Wrapping
from keyquorum_custodian.seed_records import DESTROYED, Accusation
from keyquorum_custodian.standing import RESTORE, Mark, write_mark
from keyquorum_custodian.trust import Operators

__all__ = ["Restored", "restore"]

_HEAD: Final = ("roster", "roster-file", "file")
_CANCELLED: Final = "its identity went with the custodian that this one was restored from"


@dataclasses.dataclass(frozen=True, slots=True)
class Restored:
    """What was made: where, from what, and the card that the operators put into the roster."""

    config: CustodianConfig
    card: EnrolmentCard
    checked: Checked
    request_id: str


def restore(
    source: Source,
    recipient: RecipientKey,
    directory: Path,
    sealing: str | Wrapping,
    operators: Operators,
    operators_file: bytes,
    *,
    now: int,
    changes: Mapping[str, str] | None = None,
    address: str = "",
    suite: str = Suite.MLKEM768_X25519,
    opslimit: int = keywrap.DEFAULT_OPSLIMIT,
    memlimit: int = keywrap.DEFAULT_MEMLIMIT,
    keystore: type[Keystore] = Keystore,
) -> Restored:
    """Make ``directory`` from a backup; ``sealing`` is a passphrase, or another scheme ready to seal. ``operators``
    (``operators_file`` as it was read) are whom its operator trusts to name the cluster's custodians; ``changes``
    replaces members of the configuration in the backup.

    Raises what :class:`BackupReader` and :class:`BackupCheck` refuse, and as `init` does; then nothing is left.
    """
    reader = BackupReader(source)
    check = BackupCheck(reader.opening.cluster, reader.opening.custodian)
    records = _checked(reader.records(recipient), check)
    head, files, first = _head(records)
    config = _config(files, directory, reader, changes or {})
    done: list[Checked] = []

    def furnish(folder: Path, store: Keystore) -> None:
        _write_files(folder, config, files, head, operators_file)
        with store.transaction():
            for record in (*head, *first, *records):
                _insert(store, record, now)
            checked = check.finish(reader, operators.identities, operators.threshold)
            _finish(store, checked, now)
        done.append(checked)

    card = init.initialise(
        config,
        sealing,
        now=now,
        address=address,
        suite=suite,
        opslimit=opslimit,
        memlimit=memlimit,
        keystore=keystore,
        furnish=furnish,
    )
    return Restored(config, card, done[0], _request_id(done[0]))


def _checked(records: Iterator[Record], check: BackupCheck) -> Iterator[Record]:
    for record in records:
        check.take(record)
        yield record


def _head(records: Iterator[Record]) -> tuple[list[Record], dict[str, bytes], list[Record]]:
    """What is needed before a keystore can be made: rosters and files; and the first record behind them."""
    head: list[Record] = []
    files: dict[str, bytes] = {}
    for record in records:
        if record.kind not in _HEAD:
            return head, files, [record]
        if record.kind == "file":
            files[record.text("name")] = record.data
        else:
            head.append(record)
    return head, files, []


def _config(
    files: Mapping[str, bytes], directory: Path, reader: BackupReader, changes: Mapping[str, str]
) -> CustodianConfig:
    if CONFIGURATION not in files:
        raise MalformedError(Reason.MALFORMED, "the backup lacks the custodian's configuration")
    found = parse_config(files[CONFIGURATION], directory)
    if (found.id, found.cluster) != (reader.opening.custodian, reader.opening.cluster):
        raise RefusedError(Reason.DIGEST, "the configuration in the backup is another custodian's", actual=found.id)
    usual = CustodianConfig(directory, found.id, found.jurisdiction, found.cluster, found.listen, "", "")
    # A file that stood elsewhere on the old machine stands in the folder of the new one.
    places = {
        name: getattr(usual, name)
        for name in ("roster", "operators", "owners", "bulletins", "policy_signers", "rosters")
        if not _inside(getattr(found, name))
    }
    # Nor does a backup choose what library is loaded here.
    return dataclasses.replace(found, **{**places, "pkcs11_module": "", **changes})


def _inside(name: str) -> bool:
    return len(Path(name).parts) == 1 and name not in ("", ".", "..")


def _write_files(
    folder: Path, config: CustodianConfig, files: Mapping[str, bytes], head: list[Record], operators: bytes
) -> None:
    """What the operator had put there; except for the operators, who are those that were named now."""
    init.write_file(folder / config.operators, operators)
    if config.policy_signers != config.operators and POLICY_SIGNERS in files:
        init.write_file(folder / config.policy_signers, files[POLICY_SIGNERS])
    for name, data in files.items():
        if name.startswith(OWNER):
            if not _inside(name.removeprefix(OWNER)):
                raise MalformedError(Reason.MALFORMED, "a bad name of a file in the backup", actual=ascii(name[:80]))
            init.write_file(folder / config.owners / f"{name.removeprefix(OWNER)}.json", data)
        elif name not in (CONFIGURATION, OPERATORS, POLICY_SIGNERS):
            raise MalformedError(Reason.MALFORMED, "a file of no known use in the backup", actual=ascii(name[:80]))
    (folder / config.rosters).mkdir(mode=0o700)
    for record in head:
        if record.kind == "roster-file":
            init.write_file(folder / config.rosters / f"{record.number('version')}.json", record.data)


def _insert(store: Keystore, record: Record, now: int) -> None:
    """Inside the transaction: what a checked record says."""
    text, number, data = record.text, record.number, record.data
    match record.kind:
        case "roster":
            store.change("INSERT INTO rosters VALUES (?, ?, ?)", text("digest"), number("version"), data)
        case "checkpoint":
            root = bytes.fromhex(text("root"))
            store.change(
                "INSERT INTO ledgers VALUES (?, ?, ?, ?, ?)",
                text("log"),
                number("size"),
                root,
                data,
                number("accepted_at"),
            )
        case "alarm":
            known, shown = split(data)
            store.change(
                "INSERT INTO ledger_alarms (kind, evidence, known, shown, raised_at, cleared_at, why)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                text("kind"),
                bytes.fromhex(text("evidence")),
                known,
                shown,
                number("raised_at"),
                number("cleared_at") or None,
                text("why") or None,
            )
        case "bulletin":
            values = (text("kind"), number("version"), text("digest"), data, number("accepted_at"))
            store.change("INSERT INTO bulletins VALUES (?, ?, ?, ?, ?)", *values)
        case "epoch":
            _insert_epoch(store, record)
        case "seeds":
            (row,) = (each for each in store.epochs(text("key_id")) if each.epoch == number("epoch"))
            store.insert_seeds(row.ceremony_id, row.key_id, row.epoch, unpack_seeds(data))
        case "ceremony":
            _insert_ceremony(store, record, now)
        case "accusation":
            statement, sealed = split(data)
            accusation = Accusation(text("ceremony_id"), text("custodian"), text("what"), statement, sealed)
            store.save_accusation(accusation, number("found_at"))
        case "lease":
            _insert_lease(store, record)
        case "quarantine":
            _insert_quarantine(store, record)
        case "evidence":
            store.change("INSERT INTO quarantine_evidence VALUES (?, ?)", text("sha256"), data)
        case "tpm":
            store.change(
                "INSERT INTO tpm_states VALUES (?, ?)", text("ak"), store.seal_row(data, "tpm_states", text("ak"))
            )
        case "release":
            _insert_release(store, record)


def _insert_epoch(store: Keystore, record: Record) -> None:
    state = record.text("state")
    if record.text("held") == TOKEN and state != DESTROYED:
        return  # its seeds are where no backup gets them: it is lacking here, and comes back by a ceremony
    store.change(
        "INSERT INTO epochs (key_id, epoch, ceremony_id, certificate, activated_at, state, retired_at, ended_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        record.text("key_id"),
        record.number("epoch"),
        record.text("ceremony_id"),
        record.data,
        record.number("activated_at"),
        state,
        record.number("retired_at") or None,
        record.number("ended_at") or None,
    )


def _insert_ceremony(store: Keystore, record: Record, now: int) -> None:
    state, cause, came_from = record.text("state"), record.text("cause"), record.text("cancelled_from")
    updated_at = record.number("updated_at")
    if state == State.ERASED:  # what it erased is gone; the receipt was the old identity's to sign
        state = State.DESTROYED
    elif state not in FINAL and state != State.CANCELLED:
        state, cause, came_from, updated_at = State.CANCELLED, _CANCELLED, state, now
    store.change(
        "INSERT INTO ceremonies (ceremony_id, kind, key_id, epoch, state, cancelled_from, plan, signers, cause,"
        " updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        record.text("ceremony_id"),
        record.text("kind"),
        record.text("key_id"),
        record.number("epoch"),
        str(state),
        came_from or None,
        record.data,
        record.text("signers"),
        cause,
        updated_at,
    )


def _insert_lease(store: Keystore, record: Record) -> None:
    name = record.text("job_id"), record.text("recipient_sha256")
    store.change(
        "INSERT INTO leases (job_id, recipient_sha256, key_id, epoch, granted_at, until, renewals, revoked, sealed)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        *name,
        record.text("key_id"),
        record.number("epoch"),
        record.number("granted_at"),
        record.number("until"),
        record.number("renewals"),
        record.text("revoked"),
        store.seal_row(record.data, "leases", *name),
    )


def _insert_quarantine(store: Keystore, record: Record) -> None:
    store.change(
        "INSERT INTO quarantine (subjects, reason, message, job_id, evidence_sha256, raised_at, lifted_at, why)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        record.data.decode("utf-8", "replace"),
        record.text("reason"),
        record.text("message"),
        record.text("job_id"),
        record.text("evidence_sha256"),
        record.number("raised_at"),
        record.number("lifted_at") or None,
        record.text("why") or None,
    )


def _insert_release(store: Keystore, record: Record) -> None:
    store.change(
        "INSERT INTO releases (leaf_hash, leaf, owner, released_at, window, development, policy_sha256, policy_version,"
        " decision_sha256) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        bytes.fromhex(record.text("leaf_hash")),
        record.data,
        record.text("owner"),
        record.number("released_at"),
        record.number("window"),
        record.number("development"),
        record.text("policy_sha256"),
        record.number("policy_version"),
        record.text("decision_sha256"),
    )


def _finish(store: Keystore, checked: Checked, now: int) -> None:
    """Inside the transaction: the mark, and the question to the operator."""
    statement = checked.statement
    keep_sequence(store, statement.sequence)
    time = max(statement.highest_time, statement.created_at)
    store.change("INSERT OR REPLACE INTO meta VALUES ('highest-time', ?)", time.to_bytes(8, "big"))
    request_id = _request_id(checked)
    write_mark(store, Mark(statement.backup_id, statement.digest, request_id, now))
    approvals = Approvals(store, (), lambda: now)
    approvals.ask(request_id, RESTORE, statement.digest, "whoever restored the backup", _difference(checked, now))


def _request_id(checked: Checked) -> str:
    return H("keyquorum/v1/restore", checked.statement.backup_id.encode()).hex()[:32]


def _difference(checked: Checked, now: int) -> list[str]:
    """What the operator is asked, line by line."""
    statement = checked.statement
    age = max(0, now - statement.created_at)
    held = [each for each in statement.epochs if each.state != DESTROYED]
    lines = [
        f"restore: custodian {statement.custodian} of {statement.cluster}, from backup {statement.backup_id}",
        f"made {_when(statement.created_at)}, {age // 86400} days and {age % 86400 // 3600} hours before the restore",
        f"number {statement.sequence} of this custodian's backups",
        f"roster: version {statement.roster_version}, {statement.roster_digest}",
        f"ledger: {statement.ledger_size} leaves; later ones it has to be shown, with proof that they extend those",
        "- the custodian's old identity, HPKE key, witness key and TLS certificates: the roster in force names others",
    ]
    lines += [
        f"+ key {each.key_id} epoch {each.epoch}: {each.state}, "
        + ("its seeds are in a token and not in the backup" if each.held == TOKEN else f"{each.seeds} seeds")
        + f", certificate {each.certificate}"
        for each in held
    ]
    lines.append("! whoever holds the old machine, or another copy of this backup's key, holds the same seeds:")
    lines.append("! have the operators rotate these keys afterwards")
    return lines


def _when(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
