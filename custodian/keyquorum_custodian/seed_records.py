"""What the keystore remembers of ceremonies, of the epochs they made, and of what its operator was asked.

A ceremony's row says where it is; each step's answer is kept with the digest of its request, so that a repeated request
gets the stored answer and another one is refused. All writers here run inside :meth:`Vault.transaction`, so that the
step, its answer and the secrets it made or erased are one change.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from keyquorum_core.ceremony import Seed
from keyquorum_core.ceremony_states import MAKING, Kind, State, Step
from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_custodian.vault import Vault, blob, number

__all__ = [
    "ACTIVE",
    "DESTROYED",
    "RETIRED",
    "Accusation",
    "ApprovalRow",
    "CeremonyRow",
    "EpochRow",
    "SeedRecords",
    "cannot_give",
    "plain",
]

ACTIVE: Final = "active"
RETIRED: Final = "retired"
"""A newer epoch of the key is active; what runs on this one still may."""
DESTROYED: Final = "destroyed"
_PIECE: Final = 512  # seeds read at a time: about 2 ms


@dataclass(frozen=True, slots=True)
class CeremonyRow:
    """A ceremony as last persisted. ``plan`` is the plan's payload, ``signers`` the operators that signed it (none: the
    key's policy ordered it), ``cause`` why it was given up."""

    ceremony_id: str
    kind: Kind
    key_id: str
    epoch: int
    state: State
    cancelled_from: State | None
    plan: bytes
    signers: tuple[str, ...]
    cause: str = ""


@dataclass(frozen=True, slots=True)
class EpochRow:
    """An epoch with a whole certificate (DSSE envelope). ``ceremony_id`` is of the ceremony that made it;
    ``retired_at``, in unix seconds, the date of the epoch that followed."""

    key_id: str
    epoch: int
    ceremony_id: str
    certificate: bytes
    state: str = ACTIVE
    retired_at: int | None = None


@dataclass(frozen=True, slots=True)
class ApprovalRow:
    """Something this custodian's operator is to decide. ``subject`` is the digest (hex) of exactly what is asked,
    ``difference`` what would change, line by line; times are unix seconds."""

    request_id: str
    kind: str
    subject: str
    asked_by: str
    difference: tuple[str, ...]
    requested_at: int
    decision: str = ""
    decided_at: int | None = None


@dataclass(frozen=True, slots=True)
class Accusation:
    """``custodian`` signed ``statement``, which was found to be wrong; ``sealed`` is the blob it names."""

    ceremony_id: str
    custodian: str
    what: str
    statement: bytes
    sealed: bytes


def plain(seeds: Mapping[int, Seed]) -> dict[int, bytes]:
    """Seeds as bytes. Raises ``UNSUPPORTED`` where they are a token's keys."""
    out = {index: seed for index, seed in seeds.items() if isinstance(seed, bytes)}
    if len(out) != len(seeds):
        raise cannot_give()
    return out


def cannot_give() -> UnavailableError:
    """Seeds in a hardware module stay there."""
    return UnavailableError(
        Reason.UNSUPPORTED,
        "this custodian's seeds are keys of its hardware module, which does not give them away",
        expected="a co-holder that keeps its seeds in its keystore",
        actual="pkcs11-seeds",
        next_step="Have the other co-holders give; each seed needs one that can.",
    )


class SeedRecords(Vault):
    """The part of the keystore that ceremonies use."""

    __slots__ = ()

    # -- seeds in a token ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[None]:
        """See :meth:`Vault.transaction`. Seeds go into a token before their rows are committed, and out of it after: a
        death in between leaves keys without rows, which :meth:`sweep` destroys, and never a row without its key."""
        try:
            with super().transaction(durable=durable):
                yield
        except BaseException:
            if self.token_seeds is not None:
                self.token_seeds.forget_new()
            raise
        if self.token_seeds is not None:
            self.token_seeds.settle()

    def scrub(self) -> None:
        """See :meth:`Vault.scrub`; the token too holds nothing of what was deleted."""
        super().scrub()
        self.sweep()

    def sweep(self) -> int:
        """Destroy keys in the token that no row speaks of; returns how many. Raises ``UNAVAILABLE``."""
        if self.token_seeds is None:
            return 0
        rows = [value for row in self._seed_owners() for value in self._indexed("seeds", *row).values()]
        known = {(key_id, epoch) for _, key_id, epoch in self._seed_owners()}
        known |= {(row.key_id, row.epoch) for row in self.epochs()}
        known |= {(row.key_id, row.epoch) for row in self.ceremonies()}
        return self.token_seeds.sweep(rows, known)

    def _seed_owners(self) -> list[tuple[str, str, int]]:
        """``(ceremony id, key id, epoch)`` of everything that seeds are kept of."""
        rows = self._rows(
            "SELECT DISTINCT s.ceremony_id, coalesce(e.key_id, c.key_id, ''), coalesce(e.epoch, c.epoch, 0)"
            " FROM seeds s LEFT JOIN epochs e USING (ceremony_id) LEFT JOIN ceremonies c USING (ceremony_id)"
        )
        return [(str(ceremony_id), str(key_id), number(epoch)) for ceremony_id, key_id, epoch in rows]

    # -- ceremonies ------------------------------------------------------------------------------------------------

    def ceremonies(self) -> tuple[CeremonyRow, ...]:
        return self._ceremonies("ORDER BY updated_at, ceremony_id")

    def ceremonies_of(self, key_id: str, epoch: int) -> tuple[CeremonyRow, ...]:
        """All that were ever about this epoch."""
        return self._ceremonies("WHERE key_id = ? AND epoch = ? ORDER BY updated_at, ceremony_id", key_id, epoch)

    def ceremony(self, ceremony_id: str) -> CeremonyRow | None:
        return next(iter(self._ceremonies("WHERE ceremony_id = ?", ceremony_id)), None)

    def live_ceremony(self, key_id: str, epoch: int) -> CeremonyRow | None:
        """The one ceremony that makes, or made, this epoch and is not cancelled."""
        where = f"WHERE key_id = ? AND epoch = ? AND state <> 'cancelled' AND kind IN {_MAKING}"
        return next(iter(self._ceremonies(where, key_id, epoch)), None)

    def _ceremonies(self, where: str, *values: object) -> tuple[CeremonyRow, ...]:
        return tuple(
            CeremonyRow(
                str(ceremony_id),
                Kind(str(kind)),
                str(key_id),
                number(epoch),
                State(str(state)),
                State(str(cancelled_from)) if cancelled_from is not None else None,
                blob(plan),
                tuple(str(signers).split()),
                str(cause),
            )
            for ceremony_id, kind, key_id, epoch, state, cancelled_from, plan, signers, cause in self._rows(
                "SELECT ceremony_id, kind, key_id, epoch, state, cancelled_from, plan, signers, cause"  # noqa: S608
                f" FROM ceremonies {where}",
                *values,
            )
        )

    def insert_ceremony(self, row: CeremonyRow, now: int) -> None:
        """Inside a transaction: a ceremony's first record."""
        self._db.execute(
            "INSERT INTO ceremonies (ceremony_id, kind, key_id, epoch, state, cancelled_from, plan, signers, cause,"
            " updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                row.ceremony_id,
                str(row.kind),
                row.key_id,
                row.epoch,
                str(row.state),
                row.cancelled_from and str(row.cancelled_from),
                row.plan,
                " ".join(row.signers),
                row.cause,
                now,
            ),
        )

    def move_ceremony(self, ceremony_id: str, state: State, now: int, cause: str = "") -> None:
        """Inside a transaction. A cancelled ceremony remembers what it was cancelled from, and why."""
        came_from = "state" if state is State.CANCELLED else "cancelled_from"
        self._db.execute(
            f"UPDATE ceremonies SET cancelled_from = {came_from}, state = ?, cause = ?, updated_at = ?"  # noqa: S608
            " WHERE ceremony_id = ?",
            (str(state), cause, now, ceremony_id),
        )

    def answer(self, ceremony_id: str, step: Step) -> tuple[bytes, bytes] | None:
        """``(digest of the request, answer)`` of a step that was answered."""
        rows = self._rows(
            "SELECT request, answer FROM ceremony_steps WHERE ceremony_id = ? AND step = ?", ceremony_id, str(step)
        )
        return (blob(rows[0][0]), blob(rows[0][1])) if rows else None

    def save_answer(self, ceremony_id: str, step: Step, request: bytes, answer: bytes) -> None:
        """Inside a transaction."""
        self._db.execute("INSERT INTO ceremony_steps VALUES (?, ?, ?, ?)", (ceremony_id, str(step), request, answer))

    def save_accusation(self, accusation: Accusation, now: int) -> None:
        """Inside a transaction: keep what proves that a custodian lied."""
        self._db.execute(
            "INSERT OR REPLACE INTO accusations VALUES (?, ?, ?, ?, ?, ?)",
            (
                accusation.ceremony_id,
                accusation.custodian,
                accusation.what,
                accusation.statement,
                accusation.sealed,
                now,
            ),
        )

    def accusations(self) -> tuple[Accusation, ...]:
        rows = self._rows(
            "SELECT ceremony_id, custodian, what, statement, sealed FROM accusations ORDER BY found_at, custodian"
        )
        return tuple(
            Accusation(str(ceremony_id), str(name), str(what), blob(statement), blob(sealed))
            for ceremony_id, name, what, statement, sealed in rows
        )

    # -- parts and seeds -------------------------------------------------------------------------------------------

    def insert_parts(self, row: CeremonyRow, parts: Mapping[int, bytes]) -> None:
        """Inside a transaction: this custodian's own parts by index."""
        self._put_indexed("parts", row.ceremony_id, row.key_id, row.epoch, parts)

    def parts(self, row: CeremonyRow) -> dict[int, bytes]:
        """This custodian's own parts of a proposed ceremony."""
        return self._indexed("parts", row.ceremony_id, row.key_id, row.epoch)

    def replace_parts_by_seeds(self, row: CeremonyRow, seeds: Mapping[int, bytes]) -> None:
        """Inside a transaction: the parts have done their work; keep what they made."""
        self._db.execute("DELETE FROM parts WHERE ceremony_id = ?", (row.ceremony_id,))
        self.insert_seeds(row.ceremony_id, row.key_id, row.epoch, seeds)

    def insert_seeds(self, ceremony_id: str, key_id: str, epoch: int, seeds: Mapping[int, bytes]) -> None:
        """Inside a transaction: the seeds that ceremony ``ceremony_id`` made."""
        kept = self.token_seeds
        if kept is not None:
            seeds = {index: kept.put(ceremony_id, key_id, epoch, index, seed) for index, seed in seeds.items()}
        self._put_indexed("seeds", ceremony_id, key_id, epoch, seeds)

    def drop_secrets(self, ceremony_id: str) -> int:
        """Inside a transaction: erase a ceremony's parts and seeds (``secure_delete`` overwrites the pages; see
        :meth:`Vault.scrub`). Returns how many seeds."""
        self._db.execute("DELETE FROM parts WHERE ceremony_id = ?", (ceremony_id,))
        if self.token_seeds is not None:
            for row in self._seed_owners():
                for value in self._indexed("seeds", *row).values() if row[0] == ceremony_id else ():
                    self.token_seeds.drop(value)
        return self._db.execute("DELETE FROM seeds WHERE ceremony_id = ?", (ceremony_id,)).rowcount

    def seeds(self, row: EpochRow | CeremonyRow) -> dict[int, bytes]:
        """The seeds a ceremony made, by index, opened. Raises ``UNSUPPORTED`` where they are a token's keys."""
        return plain(self.held_seeds(row))

    def held_seeds(self, row: EpochRow | CeremonyRow) -> dict[int, Seed]:
        """The seeds a ceremony made, by index, wherever they are kept."""
        return self._held(self._indexed("seeds", row.ceremony_id, row.key_id, row.epoch))

    def _held(self, found: dict[int, bytes]) -> dict[int, Seed]:
        kept = self.token_seeds
        return {index: value if kept is None else kept.get(value) for index, value in found.items()}

    def seeds_in_pieces(self, row: EpochRow | CeremonyRow) -> Iterator[dict[int, Seed]]:
        """:meth:`held_seeds`, some hundreds at a time; each piece is read when it is asked for."""
        after, more = -1, True
        while more:
            piece = self._indexed("seeds", row.ceremony_id, row.key_id, row.epoch, after, _PIECE)
            yield self._held(piece)
            after, more = max(piece, default=after), len(piece) == _PIECE

    def _put_indexed(self, table: str, ceremony_id: str, key_id: str, epoch: int, secrets: Mapping[int, bytes]) -> None:
        sealed = self._seal_each(table, ceremony_id, key_id, epoch, secrets)
        rows = ((ceremony_id, index, value) for index, value in zip(secrets, sealed, strict=True))
        self._db.executemany(f"INSERT INTO {table} VALUES (?, ?, ?)", rows)  # noqa: S608

    def _indexed(
        self, table: str, ceremony_id: str, key_id: str, epoch: int, after: int = -1, limit: int = -1
    ) -> dict[int, bytes]:
        query = f"SELECT idx, sealed FROM {table} WHERE ceremony_id = ? AND idx > ? ORDER BY idx LIMIT ?"  # noqa: S608
        rows = self._rows(query, ceremony_id, after, limit)
        sealed = {number(index): blob(value) for index, value in rows}
        return dict(zip(sealed, self._unseal_each(table, ceremony_id, key_id, epoch, sealed), strict=True))

    # -- epochs ----------------------------------------------------------------------------------------------------

    def epochs(self, key_id: str = "") -> tuple[EpochRow, ...]:
        """All epochs, destroyed ones too, or those of one key, in order."""
        return self._epochs("WHERE ? IN ('', key_id) ORDER BY key_id, epoch", key_id)

    def newest_epoch(self, key_id: str) -> EpochRow | None:
        """The last of a key's epochs, whatever became of it."""
        return next(iter(self._epochs("WHERE key_id = ? ORDER BY epoch DESC LIMIT 1", key_id)), None)

    def epoch(self, key_id: str, epoch: int) -> EpochRow | None:
        return next(iter(self._epochs("WHERE key_id = ? AND epoch = ?", key_id, epoch)), None)

    def _epochs(self, where: str, *values: object) -> tuple[EpochRow, ...]:
        columns = "key_id, epoch, ceremony_id, certificate, state, retired_at"
        rows = self._rows(f"SELECT {columns} FROM epochs {where}", *values)  # noqa: S608
        return tuple(EpochRow(*row) for row in rows)  # type: ignore[arg-type]

    def insert_epoch(self, row: EpochRow, now: int) -> None:
        """Inside a transaction."""
        self._db.execute(
            "INSERT INTO epochs (key_id, epoch, ceremony_id, certificate, activated_at, state, retired_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row.key_id, row.epoch, row.ceremony_id, row.certificate, now, row.state, row.retired_at),
        )

    def retire_epochs(self, key_id: str, before: int, retired_at: int) -> None:
        """Inside a transaction: a newer epoch is active, so the older ones are no longer."""
        self._db.execute(
            "UPDATE epochs SET state = 'retired', retired_at = ? WHERE key_id = ? AND epoch < ? AND state = 'active'",
            (retired_at, key_id, before),
        )

    def end_epoch(self, key_id: str, epoch: int, now: int) -> None:
        """Inside a transaction: the epoch is destroyed. Its certificate stays."""
        self._db.execute(
            "UPDATE epochs SET state = 'destroyed', ended_at = ? WHERE key_id = ? AND epoch = ?", (now, key_id, epoch)
        )

    def forget_epoch(self, key_id: str, epoch: int) -> None:
        """Inside a transaction: as if it had never been here. Only a drill's canary is ever forgotten."""
        self._db.execute("DELETE FROM epochs WHERE key_id = ? AND epoch = ?", (key_id, epoch))

    # -- approvals -------------------------------------------------------------------------------------------------

    def ask_approval(self, row: ApprovalRow) -> None:
        """Inside a transaction: something for the operator to decide."""
        self._db.execute(
            "INSERT INTO approvals (request_id, kind, subject, asked_by, difference, requested_at)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (row.request_id, row.kind, row.subject, row.asked_by, json.dumps(row.difference), row.requested_at),
        )

    def decide_approval(self, request_id: str, decision: str, now: int) -> None:
        """Inside a transaction."""
        self._db.execute(
            "UPDATE approvals SET decision = ?, decided_at = ? WHERE request_id = ?", (decision, now, request_id)
        )

    def approvals(self) -> tuple[ApprovalRow, ...]:
        """All of them, oldest first."""
        return self._approvals("")

    def approval(self, request_id: str) -> ApprovalRow | None:
        return next(iter(self._approvals(request_id)), None)

    def _approvals(self, request_id: str) -> tuple[ApprovalRow, ...]:
        rows = self._rows(
            "SELECT request_id, kind, subject, asked_by, difference, requested_at, decision, decided_at FROM approvals"
            " WHERE ? IN ('', request_id) ORDER BY requested_at, request_id",
            request_id,
        )
        return tuple(
            ApprovalRow(
                str(found),
                str(kind),
                str(subject),
                str(asked_by),
                tuple(json.loads(str(difference))),
                number(requested_at),
                str(decision),
                None if decided_at is None else number(decided_at),
            )
            for found, kind, subject, asked_by, difference, requested_at, decision, decided_at in rows
        )


_MAKING = "(" + ", ".join(f"'{kind}'" for kind in sorted(MAKING)) + ")"
