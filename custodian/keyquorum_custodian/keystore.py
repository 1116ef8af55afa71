"""Everything a custodian must not lose, in one SQLite file; every secret in it is AES-256-GCM under one key.

The key-encryption key (KEK, 32 random bytes) is itself wrapped by a passphrase (``keyquorum_core.keywrap``). A sealed
column holds nonce (12 bytes) ‖ ciphertext ‖ tag, with the associated data ``transcript("keyquorum/v1/keystore", table,
name or ceremony id, key id, u64be(epoch), u64be(index))``: a ciphertext moved to another row does not open.

Changes happen in transactions: all of one or nothing, and callers touch their own memory only after the commit. A disk
that is full or failing raises ``STORAGE`` and leaves the file as it was. Ceremony steps are synced to the disk before
they are answered; release records survive the process but not always the machine (``synchronous=NORMAL``).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keyquorum_core import keywrap
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_core.transcript import transcript, u64be
from keyquorum_custodian import schema

__all__ = ["CeremonyRow", "EpochRow", "Keystore", "ReleaseRecord"]

_PURPOSE = "keyquorum/v1/keystore"
_NONCE = 12


@dataclass(frozen=True, slots=True)
class CeremonyRow:
    """A ceremony as last persisted: the plan's payload, then the answers given and digests of what they answered."""

    ceremony_id: str
    key_id: str
    epoch: int
    state: str
    cancelled_from: str | None
    plan: bytes
    proposal: bytes
    deliver_request: bytes | None
    commitments: bytes | None
    confirm_request: bytes | None
    confirmation: bytes | None


@dataclass(frozen=True, slots=True)
class EpochRow:
    """An active epoch: ``certificate`` is the complete DSSE envelope."""

    key_id: str
    epoch: int
    ceremony_id: str
    certificate: bytes


@dataclass(frozen=True, slots=True)
class ReleaseRecord:
    """What is kept of an answered release; ``released_at`` in unix seconds, digests in hex."""

    leaf_hash: bytes
    leaf: bytes
    owner: str
    released_at: int
    window: int
    development: bool
    policy_sha256: str
    policy_version: int
    decision_sha256: str


@contextlib.contextmanager
def _storage(path: Path) -> Iterator[None]:
    """SQLite's errors as typed ones, saying whether trying again may help."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "locked" in text or "busy" in text:
            raise StateError(
                Reason.STATE,
                f"{path} is in use by another process",
                next_step="Stop the other custodian process; one keystore is served by one process.",
            ) from None
        raise UnavailableError(
            Reason.STORAGE,
            f"{path} could not be read or written; nothing was changed",
            actual=text,
            next_step="Free space on the disk or repair it, then try again.",
        ) from None
    except sqlite3.IntegrityError as error:
        raise StateError(
            Reason.STATE, f"{path} already holds what must be there only once; nothing was changed", actual=str(error)
        ) from None
    except sqlite3.DatabaseError as error:
        raise UnavailableError(
            Reason.STORAGE,
            f"{path} is damaged or not a keystore",
            expected="a keystore made by `keyquorum-custodian init`",
            actual=str(error),
        ) from None


@dataclass(slots=True)
class Keystore:
    """One open keystore, used from one thread. Make it with :meth:`create` (once) and :meth:`open`."""

    path: Path
    custodian_id: str
    _db: sqlite3.Connection
    _kek: AESGCM = field(repr=False)
    _synchronous: str = "FULL"

    # -- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: Path,
        custodian_id: str,
        identity: Identity,
        recipient: RecipientKey,
        cosigner: Cosigner,
        passphrase: str,
        *,
        opslimit: int = keywrap.DEFAULT_OPSLIMIT,
        memlimit: int = keywrap.DEFAULT_MEMLIMIT,
    ) -> Keystore:
        """A new keystore holding the custodian's private keys. Raises ``EXISTS`` if there is a file."""
        kek = AESGCM.generate_key(256)
        wrapped = keywrap.wrap(kek, passphrase, purpose=_PURPOSE, opslimit=opslimit, memlimit=memlimit)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            raise StateError(Reason.EXISTS, f"{path} exists; a keystore is never overwritten") from None
        except OSError as error:
            raise UnavailableError(Reason.STORAGE, f"{path} could not be made", actual=error.strerror) from None
        store = cls(path, custodian_id, _connect(path), AESGCM(kek))
        ed25519, ml_dsa = identity.seeds()
        witness_ed25519, witness_ml_dsa = cosigner.seeds()
        with _storage(path):
            schema.migrate(store._db, str(path))
        with store.transaction():
            store._put_meta("custodian", custodian_id.encode())
            store._put_meta("kek", wrapped)
            for name, secret in (
                ("ed25519", ed25519),
                ("ml-dsa-65", ml_dsa),
                ("hpke", recipient.to_seed_bytes()),
                ("witness-ed25519", witness_ed25519),
                ("witness-ml-dsa-44", witness_ml_dsa),
            ):
                sealed = store._seal(secret, "secrets", name)
                store._db.execute("INSERT INTO secrets VALUES (?, ?)", (name, sealed))
        return store

    @classmethod
    def open(cls, path: Path, passphrase: str) -> Keystore:
        """Raises ``NOT_FOUND``, ``PASSPHRASE``, ``UNSUPPORTED`` (newer schema), ``STATE`` (in use) or ``STORAGE``."""
        if not path.is_file():
            raise StateError(
                Reason.NOT_FOUND, f"there is no keystore at {path}", next_step="Run `keyquorum-custodian init` first."
            )
        db = _connect(path)
        try:
            with _storage(path):
                schema.refuse_empty(db, str(path))
                schema.migrate(db, str(path))
                meta = dict(db.execute("SELECT name, value FROM meta").fetchall())
            if not {"custodian", "kek"} <= meta.keys():
                raise UnavailableError(Reason.STORAGE, f"{path} has no key-encryption key: it was never completed")
            kek = keywrap.unwrap(meta["kek"], passphrase, _PURPOSE)
            return cls(path, meta["custodian"].decode(), db, AESGCM(kek))
        except BaseException:
            db.close()
            raise

    def close(self) -> None:
        """Checkpoint and close. The file is whole without it too."""
        with contextlib.suppress(sqlite3.Error):
            self._db.close()

    # -- transactions and sealing ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[None]:
        """All the changes made inside, or none. ``durable``: on the disk before this returns."""
        with _storage(self.path):
            self._synchronise("FULL" if durable else "NORMAL")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._commit()
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _synchronise(self, mode: str) -> None:
        if mode != self._synchronous:
            self._db.execute(f"PRAGMA synchronous={mode}")
            self._synchronous = mode

    def _commit(self) -> None:
        self._db.execute("COMMIT")

    def _seal(self, secret: bytes, table: str, name: str, key_id: str = "", epoch: int = 0, index: int = 0) -> bytes:
        nonce = os.urandom(_NONCE)
        return nonce + self._kek.encrypt(nonce, secret, _associated(table, name, key_id, epoch, index))

    def _unseal(self, sealed: bytes, table: str, name: str, key_id: str = "", epoch: int = 0, index: int = 0) -> bytes:
        try:
            return self._kek.decrypt(sealed[:_NONCE], sealed[_NONCE:], _associated(table, name, key_id, epoch, index))
        except (InvalidTag, ValueError):
            raise UnavailableError(
                Reason.STORAGE,
                f"{self.path}: a sealed value was changed or moved",
                expected=f"the row written as {table} {name} {key_id} {epoch} {index}".rstrip(),
                next_step="Restore the keystore from a backup, or have the custodian repaired.",
            ) from None

    def _rows(self, query: str, *values: object) -> list[tuple[object, ...]]:
        with _storage(self.path):
            return self._db.execute(query, values).fetchall()

    def _put_meta(self, name: str, value: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    # -- identity and roster ---------------------------------------------------------------------------------------

    def _secret(self, name: str) -> bytes:
        rows = self._rows("SELECT sealed FROM secrets WHERE name = ?", name)
        if not rows:
            raise UnavailableError(Reason.STORAGE, f"{self.path} lacks the private key {name}")
        return self._unseal(_blob(rows[0][0]), "secrets", name)

    def identity(self) -> Identity:
        """The custodian's signing identity."""
        return Identity.from_seeds(self._secret("ed25519"), self._secret("ml-dsa-65"))

    def recipient(self) -> RecipientKey:
        """The custodian's HPKE key, to which co-holders seal ceremony parts."""
        return RecipientKey.from_seed_bytes(self._secret("hpke"))

    def cosigner(self, name: str) -> Cosigner:
        """The keys this custodian cosigns checkpoints with, as the witness called ``name``."""
        return Cosigner.from_seeds(name, self._secret("witness-ed25519"), self._secret("witness-ml-dsa-44"))

    def accept_roster(self, digest: str, version: int, payload: bytes) -> None:
        """Remember a verified roster; its version never goes back. Raises :class:`RefusedError` (``ROSTER``)."""
        rows = self._rows("SELECT version, digest FROM rosters ORDER BY version DESC LIMIT 1")
        if rows:
            newest, known = rows[0]
            if version < _number(newest) or (version == newest and digest != known):
                raise RefusedError(
                    Reason.ROSTER,
                    "the roster on disk is older than one this custodian served under, or contradicts it",
                    expected=f"version {newest} ({known}) or newer",
                    actual=f"version {version} ({digest})",
                )
            if digest == known:
                return
        with self.transaction():
            self._db.execute("INSERT INTO rosters VALUES (?, ?, ?)", (digest, version, payload))

    def roster_payload(self, digest: str) -> bytes | None:
        """A roster accepted before."""
        rows = self._rows("SELECT payload FROM rosters WHERE digest = ?", digest)
        return _blob(rows[0][0]) if rows else None

    # -- time ------------------------------------------------------------------------------------------------------

    def highest_time(self) -> int:
        """The latest time this custodian's clock is known to have shown, unix seconds; 0 for none."""
        rows = self._rows("SELECT value FROM meta WHERE name = 'highest-time'")
        return int.from_bytes(_blob(rows[0][0]), "big") if rows else 0

    def save_highest_time(self, now: int) -> None:
        """On the disk when this returns."""
        with self.transaction():
            self._put_meta("highest-time", now.to_bytes(8, "big"))

    # -- signed operator documents ---------------------------------------------------------------------------------

    def bulletin(self, kind: str) -> tuple[int, str, bytes] | None:
        """``(version, digest, envelope)`` of the last document of a kind that was accepted."""
        rows = self._rows("SELECT version, digest, envelope FROM bulletins WHERE kind = ?", kind)
        return (_number(rows[0][0]), str(rows[0][1]), _blob(rows[0][2])) if rows else None

    def save_bulletin(self, kind: str, version: int, digest: str, envelope: bytes, now: int) -> None:
        """Remember an accepted document, on the disk when this returns; that it may follow the last one, the caller
        checked."""
        with self.transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO bulletins VALUES (?, ?, ?, ?, ?)", (kind, version, digest, envelope, now)
            )

    # -- ceremonies ------------------------------------------------------------------------------------------------

    def ceremonies(self) -> tuple[CeremonyRow, ...]:
        rows = self._rows(f"SELECT {_CEREMONY} FROM ceremonies ORDER BY updated_at, ceremony_id")  # noqa: S608
        return tuple(CeremonyRow(*row) for row in rows)  # type: ignore[arg-type]

    def ceremony(self, ceremony_id: str) -> CeremonyRow | None:
        rows = self._rows(f"SELECT {_CEREMONY} FROM ceremonies WHERE ceremony_id = ?", ceremony_id)  # noqa: S608
        return CeremonyRow(*rows[0]) if rows else None  # type: ignore[arg-type]

    def live_ceremony(self, key_id: str, epoch: int) -> CeremonyRow | None:
        """The one ceremony of this epoch that is not cancelled."""
        rows = self._rows(
            f"SELECT {_CEREMONY} FROM ceremonies WHERE key_id = ? AND epoch = ? AND state <> 'cancelled'",  # noqa: S608
            key_id,
            epoch,
        )
        return CeremonyRow(*rows[0]) if rows else None  # type: ignore[arg-type]

    def insert_ceremony(self, row: CeremonyRow, parts: dict[int, bytes], now: int) -> None:
        """Inside a transaction: a ceremony's first step, with this custodian's own parts by index."""
        values = tuple(getattr(row, name) for name in _CEREMONY.split(", "))
        self._db.execute(
            f"INSERT INTO ceremonies ({_CEREMONY}, updated_at) VALUES ({'?, ' * len(values)}?)",  # noqa: S608
            (*values, now),
        )
        for index, part in parts.items():
            self._put_indexed("parts", row, index, part)

    def update_ceremony(self, ceremony_id: str, now: int, **columns: str | bytes | None) -> None:
        """Inside a transaction: set columns of a ceremony."""
        if not columns.keys() <= set(_CEREMONY.split(", ")):
            raise TypeError(f"no such columns: {sorted(columns)}")
        assignments = ", ".join(f"{name} = ?" for name in columns)
        self._db.execute(
            f"UPDATE ceremonies SET {assignments}, updated_at = ? WHERE ceremony_id = ?",  # noqa: S608
            (*columns.values(), now, ceremony_id),
        )

    def parts(self, row: CeremonyRow) -> dict[int, bytes]:
        """This custodian's own parts of a proposed ceremony."""
        return self._indexed("parts", row.ceremony_id, row.key_id, row.epoch)

    def replace_parts_by_seeds(self, row: CeremonyRow, seeds: dict[int, bytes]) -> None:
        """Inside a transaction: the parts have done their work; keep what they made."""
        self._db.execute("DELETE FROM parts WHERE ceremony_id = ?", (row.ceremony_id,))
        for index, seed in seeds.items():
            self._put_indexed("seeds", row, index, seed)

    def drop_secrets(self, ceremony_id: str) -> None:
        """Inside a transaction: erase a ceremony's parts and seeds (``secure_delete`` overwrites the pages)."""
        self._db.execute("DELETE FROM parts WHERE ceremony_id = ?", (ceremony_id,))
        self._db.execute("DELETE FROM seeds WHERE ceremony_id = ?", (ceremony_id,))

    def _put_indexed(self, table: str, row: CeremonyRow, index: int, secret: bytes) -> None:
        sealed = self._seal(secret, table, row.ceremony_id, row.key_id, row.epoch, index)
        self._db.execute(f"INSERT INTO {table} VALUES (?, ?, ?)", (row.ceremony_id, index, sealed))  # noqa: S608

    def _indexed(self, table: str, ceremony_id: str, key_id: str, epoch: int) -> dict[int, bytes]:
        rows = self._rows(f"SELECT idx, sealed FROM {table} WHERE ceremony_id = ? ORDER BY idx", ceremony_id)  # noqa: S608
        return {
            _number(index): self._unseal(_blob(sealed), table, ceremony_id, key_id, epoch, _number(index))
            for index, sealed in rows
        }

    # -- epochs ----------------------------------------------------------------------------------------------------

    def epochs(self) -> tuple[EpochRow, ...]:
        rows = self._rows("SELECT key_id, epoch, ceremony_id, certificate FROM epochs ORDER BY key_id, epoch")
        return tuple(EpochRow(*row) for row in rows)  # type: ignore[arg-type]

    def epoch(self, key_id: str, epoch: int) -> EpochRow | None:
        rows = self._rows(
            "SELECT key_id, epoch, ceremony_id, certificate FROM epochs WHERE key_id = ? AND epoch = ?", key_id, epoch
        )
        return EpochRow(*rows[0]) if rows else None  # type: ignore[arg-type]

    def insert_epoch(self, row: EpochRow, now: int) -> None:
        """Inside a transaction."""
        self._db.execute(
            "INSERT INTO epochs VALUES (?, ?, ?, ?, ?)", (row.key_id, row.epoch, row.ceremony_id, row.certificate, now)
        )

    def seeds(self, row: EpochRow | CeremonyRow) -> dict[int, bytes]:
        """The seeds a ceremony made, by index, opened."""
        return self._indexed("seeds", row.ceremony_id, row.key_id, row.epoch)

    # -- other modules' tables -------------------------------------------------------------------------------------

    def select(self, query: str, *values: object) -> list[tuple[object, ...]]:
        """Rows of a module that keeps tables of its own in here."""
        return self._rows(query, *values)

    def change(self, statement: str, *values: object) -> int:
        """Inside a transaction: how many rows a statement of such a module changed."""
        return self._db.execute(statement, values).rowcount

    # -- releases and appraisals -----------------------------------------------------------------------------------

    def record_release(self, record: ReleaseRecord) -> bool:
        """Keep a release before it is answered. False: this leaf was answered before."""
        with _storage(self.path):
            self._synchronise("NORMAL")
            cursor = self._db.execute(
                "INSERT OR IGNORE INTO releases (leaf_hash, leaf, owner, released_at, window, development,"
                " policy_sha256, policy_version, decision_sha256) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    record.leaf_hash,
                    record.leaf,
                    record.owner,
                    record.released_at,
                    record.window,
                    record.development,
                    record.policy_sha256,
                    record.policy_version,
                    record.decision_sha256,
                ),
            )
            return cursor.rowcount == 1

    def has_release(self, leaf_hash: bytes) -> bool:
        return bool(self._rows("SELECT 1 FROM releases WHERE leaf_hash = ?", leaf_hash))

    def release_record(self, leaf_hash: bytes) -> ReleaseRecord | None:
        """What is kept of the release that this leaf announced."""
        rows = self._rows(
            "SELECT leaf_hash, leaf, owner, released_at, window, development, policy_sha256, policy_version,"
            " decision_sha256 FROM releases WHERE leaf_hash = ?",
            leaf_hash,
        )
        return ReleaseRecord(*rows[0]) if rows else None  # type: ignore[arg-type]

    def release_count(self) -> int:
        return _number(self._rows("SELECT count(*) FROM releases")[0][0])

    def releases_since(self, since: int) -> list[tuple[str, int]]:
        """``(owner, unix time)`` of the releases at or after ``since``, oldest first."""
        out: list[tuple[str, int]] = []
        with _storage(self.path):
            for owner, time in self._db.execute("SELECT owner, released_at FROM releases ORDER BY number DESC"):
                if time < since:
                    break
                out.append((str(owner), _number(time)))
        return out[::-1]

    def save_appraisals(
        self, verdicts: Iterable[tuple[bytes, bytes, int, bytes]], tpm_states: Iterable[tuple[str, bytes]], now: int
    ) -> None:
        """Keep ``(evidence digest, context, expires at, verdict)``, and the states that quotes left TPMs in, by
        attestation key; sealed, so that nobody plants one. Forget expired verdicts."""
        with self.transaction(durable=False):
            self._db.execute("DELETE FROM appraisals WHERE expires_at <= ?", (now,))
            for evidence, context, expires_at, verdict in verdicts:
                sealed = self._seal(verdict, "appraisals", evidence.hex(), context.hex(), expires_at)
                self._db.execute(
                    "INSERT OR REPLACE INTO appraisals VALUES (?, ?, ?, ?)", (evidence, context, expires_at, sealed)
                )
            for ak, state in tpm_states:
                self._db.execute(
                    "INSERT OR REPLACE INTO tpm_states VALUES (?, ?)", (ak, self._seal(state, "tpm_states", ak))
                )

    def appraisal(self, evidence: bytes, context: bytes, now: int) -> bytes | None:
        """The verdict kept for this evidence in this context, unless it has expired."""
        rows = self._rows(
            "SELECT expires_at, sealed FROM appraisals WHERE evidence_digest = ? AND context = ? AND expires_at > ?",
            evidence,
            context,
            now,
        )
        return self._verdict(evidence, context, *rows[0]) if rows else None

    def appraisals(self) -> list[tuple[bytes, bytes]]:
        """``(evidence digest, verdict)`` of every appraisal that is kept."""
        rows = self._rows("SELECT evidence_digest, context, expires_at, sealed FROM appraisals")
        return [
            (_blob(evidence), self._verdict(_blob(evidence), _blob(context), expires_at, sealed))
            for evidence, context, expires_at, sealed in rows
        ]

    def drop_appraisals(self, evidence: Iterable[bytes]) -> None:
        """Forget the verdicts on these documents, in every context; on the disk when this returns."""
        with self.transaction():
            self._db.executemany("DELETE FROM appraisals WHERE evidence_digest = ?", [(each,) for each in evidence])

    def _verdict(self, evidence: bytes, context: bytes, expires_at: object, sealed: object) -> bytes:
        return self._unseal(_blob(sealed), "appraisals", evidence.hex(), context.hex(), _number(expires_at))

    def tpm_state(self, ak: str) -> bytes | None:
        """The state that this attestation key's last accepted quote left its TPM in."""
        rows = self._rows("SELECT sealed FROM tpm_states WHERE ak = ?", ak)
        return self._unseal(_blob(rows[0][0]), "tpm_states", ak) if rows else None


_CEREMONY = (
    "ceremony_id, key_id, epoch, state, cancelled_from, plan, proposal, deliver_request, commitments,"
    " confirm_request, confirmation"
)


def _connect(path: Path) -> sqlite3.Connection:
    with _storage(path):
        db = sqlite3.connect(path, timeout=0.5, isolation_level=None, cached_statements=64)
        # Exclusive: one process serves a keystore, and with it the WAL index stays in that process's memory.
        for pragma in (
            "locking_mode=EXCLUSIVE",
            "journal_mode=WAL",
            "synchronous=FULL",
            "secure_delete=ON",
            "foreign_keys=ON",
            "trusted_schema=OFF",
            "cache_size=-2000",
        ):
            db.execute(f"PRAGMA {pragma}")
    return db


def _associated(table: str, name: str, key_id: str, epoch: int, index: int) -> bytes:
    return transcript(
        "keyquorum/v1/keystore", table.encode(), name.encode(), key_id.encode(), u64be(epoch), u64be(index)
    )


def _blob(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise MalformedError(Reason.STORAGE, "the keystore holds a value of the wrong type", expected="bytes")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise MalformedError(Reason.STORAGE, "the keystore holds a value of the wrong type", expected="an integer")
    return value
