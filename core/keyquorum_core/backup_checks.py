"""A backup against itself: every seed, certificate, roster, document and checkpoint in it, without restoring anything.

What anchors it all is the roster that the statement names: its custodian signed the statement, its predecessors are
known by the digests that they name, and each certificate by the roster it was made under. Whose roster it is, the
operators say who are passed to :meth:`BackupCheck.finish`; without them the backup is shown to fit together, and no
more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from keyquorum_core.backup import TOKEN, BackedEpoch, BackupReader, Statement, open_statement
from keyquorum_core.backup_body import Record, split, unpack_seeds
from keyquorum_core.bulletin import peek_bulletin
from keyquorum_core.ceremony import EpochCertificate
from keyquorum_core.ceremony_checks import check_seeds
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.ceremony_states import State
from keyquorum_core.certified import open_certificate_of
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.ledger.log_keys import log_name, open_checkpoint
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.roster import MAX_ROSTER, ROSTER_TYPE, Roster, open_roster
from keyquorum_core.signing import PublicIdentity, peek_payload
from keyquorum_core.strictjson import loads

__all__ = ["BackupCheck", "Checked"]

_MAX_SUBJECTS: Final = 64 << 10
_STATES: Final = frozenset(map(str, State))


@dataclass(frozen=True, slots=True)
class Checked:
    """A backup that holds together. ``roster`` is the one it was made under; ``without_seeds`` names epochs, as (key,
    number), whose seeds are in a token and not in the backup; ``operators_checked`` whether somebody vouched for it."""

    statement: Statement
    roster: Roster
    without_seeds: tuple[tuple[str, int], ...]
    operators_checked: bool


class BackupCheck:
    """Takes a backup's records one by one, each checked as it comes; used once."""

    def __init__(self, cluster: str, custodian: str) -> None:
        self._cluster = cluster
        self._custodian = custodian
        self._rosters: dict[str, Roster] = {}
        self._envelopes: dict[str, bytes] = {}
        self._epochs: list[BackedEpoch] = []
        self._under: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._files: set[str] = set()
        self._open: tuple[Record, EpochCertificate] | None = None
        self._seeds: dict[int, bytes] = {}

    def take(self, record: Record) -> None:
        """Raises the error of the check that failed, naming what it is about."""
        if record.kind != "seeds":
            self._close_epoch()
        match record.kind:
            case "roster":
                self._roster(record)
            case "roster-file":
                roster = _roster_in(record.data)
                _same("version of a roster's file", record.number("version"), roster.version)
                self._envelopes[roster.digest] = record.data
            case "checkpoint":
                self._checkpoint(record)
            case "alarm" | "accusation":
                split(record.data)
            case "bulletin":
                found = peek_bulletin(record.data)
                for what, expected, actual in (
                    ("kind", record.text("kind"), found.kind),
                    ("version", record.number("version"), found.version),
                    ("digest", record.text("digest"), found.digest),
                    ("cluster", self._cluster, found.cluster),
                ):
                    _same(f"{what} of the document {record.text('kind')}", expected, actual)
            case "epoch":
                self._epoch(record)
            case "seeds":
                self._take_seeds(record)
            case "evidence":
                _same("evidence in quarantine", record.text("sha256"), hashlib.sha256(record.data).hexdigest())
            case "file":
                if record.text("name") in self._files:
                    raise MalformedError(Reason.MALFORMED, "a file twice in a backup", actual=record.text("name")[:80])
                self._files.add(record.text("name"))
            case "ceremony":
                self._ceremony(record)
            case "quarantine":
                subjects = loads(record.data, "subjects in quarantine", max_bytes=_MAX_SUBJECTS, max_depth=1)
                if not isinstance(subjects, list) or not all(isinstance(each, str) for each in subjects):
                    raise MalformedError(Reason.MALFORMED, "a worker in quarantine goes by no names")
            case "release":
                _same("leaf of a release", record.text("leaf_hash"), leaf_hash(record.data).hex())
            case _:
                pass  # its form was checked; nothing else speaks for it

    def finish(
        self, reader: BackupReader, operators: Mapping[str, PublicIdentity] | None = None, threshold: int = 1
    ) -> Checked:
        """After the last record: the statement, its signature, and that nothing is missing.

        ``operators``: who are trusted to name the cluster's custodians, at least ``threshold`` of whom signed the
        roster. Raises ``ROSTER``, ``SIGNATURE…``, ``DIGEST``, ``CEREMONY``.
        """
        self._close_epoch()
        claimed = reader.statement
        roster = self._rosters.get(claimed.roster_digest)
        if roster is None:
            raise RefusedError(
                Reason.ROSTER, "the backup lacks the roster that it was made under", expected=claimed.roster_digest
            )
        statement = open_statement(reader.envelope, roster.custodian(claimed.custodian).identity)
        for what, expected, actual in (
            ("cluster", self._cluster, statement.cluster),
            ("custodian", self._custodian, statement.custodian),
            ("version of the roster", roster.version, statement.roster_version),
            (
                "list of epochs",
                statement.epochs,
                tuple(sorted(self._epochs, key=lambda each: (each.key_id, each.epoch))),
            ),
            ("size of the ledger", statement.ledger_size, self._sizes.get(log_name(roster.log_key), 0)),
        ):
            _same(what, expected, actual)
        self._check_chain(roster)
        if operators is not None:
            self._check_operators(roster, statement, operators, threshold)
        elsewhere = tuple((each.key_id, each.epoch) for each in statement.epochs if each.held == TOKEN)
        return Checked(statement, roster, elsewhere, operators is not None)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _roster(self, record: Record) -> None:
        _same("digest of a roster", record.text("digest"), hashlib.sha256(record.data).hexdigest())
        roster = Roster.parse(record.data)
        _same("version of a roster", record.number("version"), roster.version)
        _same("cluster of a roster", self._cluster, roster.cluster)
        self._rosters[roster.digest] = roster

    def _checkpoint(self, record: Record) -> None:
        log = record.text("log")
        keys = next((each.log_key for each in self._rosters.values() if log and log_name(each.log_key) == log), None)
        if keys is None or log in self._sizes:
            raise RefusedError(Reason.LEDGER_ORIGIN, "a checkpoint of a log that no roster in the backup names, or two")
        checkpoint = open_checkpoint(record.data, keys).checkpoint
        _same("size of a checkpoint", record.number("size"), checkpoint.size)
        _same("root of a checkpoint", record.text("root"), checkpoint.root.hex())
        self._sizes[log] = checkpoint.size

    def _epoch(self, record: Record) -> None:
        where = f"key {record.text('key_id')} epoch {record.number('epoch')}"
        try:
            certificate = open_certificate_of(record.data, self._known_roster)
            plan = certificate.plan
            for what, expected, actual in (
                ("key", record.text("key_id"), plan.key_id),
                ("epoch", record.number("epoch"), plan.epoch),
                ("ceremony", record.text("ceremony_id"), plan.ceremony_id),
            ):
                _same(f"{what} of the certificate", expected, actual)
        except KeyquorumError as error:
            error.message = f"{where}: {error.message}"
            raise
        self._under[where] = plan.roster_digest
        self._open = record, certificate

    def _known_roster(self, digest: str) -> Roster:
        roster = self._rosters.get(digest)
        if roster is None:
            raise RefusedError(Reason.ROSTER, "the certificate's roster is not in the backup", expected=digest)
        return roster

    def _ceremony(self, record: Record) -> None:
        plan = CeremonyPlan.parse(record.data)
        for what, expected, actual in (
            ("id", record.text("ceremony_id"), plan.ceremony_id),
            ("kind", record.text("kind"), str(plan.kind)),
            ("key", record.text("key_id"), plan.key_id),
            ("epoch", record.number("epoch"), plan.epoch),
        ):
            _same(f"{what} of a ceremony", expected, actual)
        came_from = record.text("cancelled_from")
        if record.text("state") not in _STATES or came_from not in ("", *_STATES):
            raise MalformedError(
                Reason.MALFORMED,
                "a ceremony in no state that there is",
                expected=", ".join(sorted(_STATES)),
                actual=ascii(f"{record.text('state')}, cancelled from {came_from}"[:120]),
            )

    def _take_seeds(self, record: Record) -> None:
        if self._open is None or any(
            record.members[name] != self._open[0].members[name] for name in ("key_id", "epoch")
        ):
            raise MalformedError(Reason.MALFORMED, "seeds that do not follow their epoch")
        found = unpack_seeds(record.data)
        if self._seeds.keys() & found.keys():
            raise MalformedError(Reason.MALFORMED, "the same seed twice in a backup")
        self._seeds |= found

    def _close_epoch(self) -> None:
        if self._open is None:
            return
        record, certificate = self._open
        key_id, epoch, state, held = (
            record.text("key_id"), record.number("epoch"), record.text("state"), record.text("held"),
        )  # fmt: skip
        seeds, self._seeds, self._open = self._seeds, {}, None
        if state == "destroyed" or held == TOKEN:
            _same(f"number of seeds of key {key_id} epoch {epoch}, {state}, held in the {held}", 0, len(seeds))
        else:
            try:
                check_seeds(certificate, self._custodian, seeds)
            except KeyquorumError as error:
                error.message = f"key {key_id} epoch {epoch}: {error.message}"
                raise
        self._epochs.append(BackedEpoch(key_id, epoch, state, certificate.digest, len(seeds), held))

    def _check_chain(self, roster: Roster) -> None:
        """Every certificate was made under a roster from which this one descends."""
        line = {roster.digest}
        while (earlier := self._rosters.get(roster.previous)) is not None:
            roster = earlier
            line.add(roster.digest)
        for where, digest in self._under.items():
            if digest not in line:
                raise RefusedError(
                    Reason.ROSTER,
                    f"{where} was certified under a roster that the present one does not descend from",
                    expected="one of its predecessors",
                    actual=digest,
                )

    def _check_operators(
        self, roster: Roster, statement: Statement, operators: Mapping[str, PublicIdentity], threshold: int
    ) -> None:
        envelope = self._envelopes.get(roster.digest)
        if envelope is None:
            raise RefusedError(
                Reason.ROSTER, "the backup lacks the signatures on the roster it was made under", expected=roster.digest
            )
        # As of its own date: a backup outlives its roster.
        open_roster(
            envelope, operators, threshold, min(statement.created_at, roster.expires_at - 1), cluster=roster.cluster
        )


def _roster_in(envelope: bytes) -> Roster:
    return Roster.parse(peek_payload(envelope, ROSTER_TYPE, "roster", max_bytes=2 * MAX_ROSTER))


def _same(what: str, expected: object, actual: object) -> None:
    if expected != actual:
        raise RefusedError(
            Reason.DIGEST, f"the backup contradicts itself: another {what}", expected=expected, actual=actual
        )
