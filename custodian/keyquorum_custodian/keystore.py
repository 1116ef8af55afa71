"""Everything a custodian must not lose: its own keys, rosters, operators' documents, ceremonies, epochs, releases.

One SQLite file (:mod:`keyquorum_custodian.vault`); the key that seals every secret in it (KEK, 32 random bytes) is
itself wrapped, by a passphrase or otherwise (:mod:`keyquorum_custodian.sealing`). Ceremony steps are synced to the disk
before they are answered; release records survive the process but not always the machine (``synchronous=NORMAL``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keyquorum_core import keywrap
from keyquorum_core.errors import Reason, StateError, UnavailableError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_custodian import schema
from keyquorum_custodian.config import CustodianConfig
from keyquorum_custodian.sealed_keystore import ATTEMPTS, RECORD, TOKEN_SEEDS, SealedKeystore
from keyquorum_custodian.sealing.record import Scheme, scheme_of
from keyquorum_custodian.sealing.schemes import PassphraseWrapping, Secret, Wrapping, unwrap
from keyquorum_custodian.sealing.token import Token
from keyquorum_custodian.sealing.token_seeds import INSTANCE_SIZE, TokenSeeds
from keyquorum_custodian.seed_records import SeedRecords
from keyquorum_custodian.token_leftovers import clear_leftovers
from keyquorum_custodian.vault import blob, connect, number, storage

__all__ = ["Keystore", "ReleaseRecord", "open_keystore"]


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


class Keystore(SeedRecords):
    """One open keystore, used from one thread. Make it with :meth:`create` (once) and :meth:`open`."""

    __slots__ = ()

    # -- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: Path,
        custodian_id: str,
        identity: Identity,
        recipient: RecipientKey,
        cosigner: Cosigner,
        sealing: str | Wrapping,
        *,
        opslimit: int = keywrap.DEFAULT_OPSLIMIT,
        memlimit: int = keywrap.DEFAULT_MEMLIMIT,
    ) -> Keystore:
        """A new keystore holding the custodian's private keys, sealed under a passphrase, which ``opslimit`` and
        ``memlimit`` are for, or by another scheme. Raises ``EXISTS`` if there is a file."""
        if isinstance(sealing, str):
            sealing = PassphraseWrapping(sealing, opslimit, memlimit)
        kek = AESGCM.generate_key(256)
        wrapped = sealing.wrap(kek, custodian_id)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            raise StateError(Reason.EXISTS, f"{path} exists; a keystore is never overwritten") from None
        except OSError as error:
            raise UnavailableError(Reason.STORAGE, f"{path} could not be made", actual=error.strerror) from None
        store = cls(path, custodian_id, connect(path), AESGCM(kek), token=sealing.token)
        instance = os.urandom(INSTANCE_SIZE) if sealing.scheme is Scheme.PKCS11_SEEDS else b""
        ed25519, ml_dsa = identity.seeds()
        witness_ed25519, witness_ml_dsa = cosigner.seeds()
        with storage(path):
            schema.migrate(store._db, str(path))
        with store.transaction():
            store.put_meta("custodian", custodian_id.encode())
            store.put_meta(RECORD, wrapped)
            if instance:
                store.put_meta(TOKEN_SEEDS, instance)
            for name, secret in (
                ("ed25519", ed25519),
                ("ml-dsa-65", ml_dsa),
                ("hpke", recipient.to_seed_bytes()),
                ("witness-ed25519", witness_ed25519),
                ("witness-ml-dsa-44", witness_ml_dsa),
            ):
                sealed = store._seal(secret, "secrets", name)
                store._db.execute("INSERT INTO secrets VALUES (?, ?)", (name, sealed))
        if sealing.token is not None and instance:
            store.token_seeds = TokenSeeds(sealing.token, instance, custodian_id)
        return store

    @classmethod
    def open(cls, path: Path, secret: Secret, *, module: str = "") -> Keystore:
        """``secret`` is what the keystore's scheme asks for, ``module`` the PKCS#11 library where it asks for one.

        Raises ``NOT_FOUND``, ``UNSUPPORTED`` (newer schema), ``STATE`` (in use), ``STORAGE``, or what
        :func:`keyquorum_custodian.sealing.schemes.unwrap` does: ``PASSPHRASE``, ``UNSEAL``, ``SEALED``.
        """
        sealed = SealedKeystore.open(path)
        try:
            return cls.unseal(sealed, secret, module=module)
        except BaseException:
            sealed.close()
            raise

    @classmethod
    def unseal(cls, sealed: SealedKeystore, secret: Secret, *, module: str = "") -> Keystore:
        """The keystore in a file that is open already and from now on is this one's. Raises as :meth:`open`; then it
        is still sealed."""
        opened = unwrap(sealed.record, sealed.custodian_id, secret, module)
        try:
            kept = _token_seeds(opened.token, sealed) if sealed.scheme is Scheme.PKCS11_SEEDS else None
        except BaseException:
            if opened.token is not None:
                opened.token.close()
            raise
        store = cls(sealed.path, sealed.custodian_id, sealed.hand_over(), AESGCM(opened.kek), token=opened.token)
        store.token_seeds = kept
        try:
            store.sweep()
            if opened.token is not None:
                clear_leftovers(store, opened.token)
        except BaseException:
            sealed.take_back(store._db)
            if opened.token is not None:
                opened.token.close()
            raise
        return store

    @property
    def scheme(self) -> Scheme:
        """What opens it."""
        return scheme_of(self.sealing_record())

    def sealing_record(self) -> bytes:
        """How its key is wrapped (docs/spec/keystore-sealing.md)."""
        return blob(self._rows("SELECT value FROM meta WHERE name = ?", RECORD)[0][0])

    def clear_attempts(self) -> None:
        """The right secret came: wrong ones before it count no more."""
        with self.transaction():
            self._db.execute("DELETE FROM meta WHERE name = ?", (ATTEMPTS,))

    def put_meta(self, name: str, value: bytes) -> None:
        """Inside a transaction: one of the keystore's own values."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    # -- identity and roster ---------------------------------------------------------------------------------------

    def _secret(self, name: str) -> bytes:
        rows = self._rows("SELECT sealed FROM secrets WHERE name = ?", name)
        if not rows:
            raise UnavailableError(Reason.STORAGE, f"{self.path} lacks the private key {name}")
        return self._unseal(blob(rows[0][0]), "secrets", name)

    def identity(self) -> Identity:
        """The custodian's signing identity."""
        return Identity.from_seeds(self._secret("ed25519"), self._secret("ml-dsa-65"))

    def recipient(self) -> RecipientKey:
        """The custodian's HPKE key, to which co-holders seal ceremony parts."""
        return RecipientKey.from_seed_bytes(self._secret("hpke"))

    def cosigner(self, name: str) -> Cosigner:
        """The keys this custodian cosigns checkpoints with, as the witness called ``name``."""
        return Cosigner.from_seeds(name, self._secret("witness-ed25519"), self._secret("witness-ml-dsa-44"))

    def newest_roster(self) -> tuple[int, str, bytes] | None:
        """``(version, digest, payload)`` of the newest roster this custodian served under."""
        rows = self._rows("SELECT version, digest, payload FROM rosters ORDER BY version DESC LIMIT 1")
        return (number(rows[0][0]), str(rows[0][1]), blob(rows[0][2])) if rows else None

    def keep_roster(self, digest: str, version: int, payload: bytes) -> None:
        """Remember a roster whose digest is known to be right. Idempotent."""
        if self.roster_payload(digest) is None:
            with self.transaction():
                self._db.execute("INSERT INTO rosters VALUES (?, ?, ?)", (digest, version, payload))

    def roster_payload(self, digest: str) -> bytes | None:
        """A roster accepted before."""
        rows = self._rows("SELECT payload FROM rosters WHERE digest = ?", digest)
        return blob(rows[0][0]) if rows else None

    # -- time ------------------------------------------------------------------------------------------------------

    def highest_time(self) -> int:
        """The latest time this custodian's clock is known to have shown, unix seconds; 0 for none."""
        rows = self._rows("SELECT value FROM meta WHERE name = 'highest-time'")
        return int.from_bytes(blob(rows[0][0]), "big") if rows else 0

    def save_highest_time(self, now: int) -> None:
        """On the disk when this returns."""
        with self.transaction():
            self.put_meta("highest-time", now.to_bytes(8, "big"))

    # -- signed operator documents ---------------------------------------------------------------------------------

    def bulletin(self, kind: str) -> tuple[int, str, bytes] | None:
        """``(version, digest, envelope)`` of the last document of a kind that was accepted."""
        rows = self._rows("SELECT version, digest, envelope FROM bulletins WHERE kind = ?", kind)
        return (number(rows[0][0]), str(rows[0][1]), blob(rows[0][2])) if rows else None

    def save_bulletin(self, kind: str, version: int, digest: str, envelope: bytes, now: int) -> None:
        """Remember an accepted document, on the disk when this returns; that it may follow the last one, the caller
        checked."""
        with self.transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO bulletins VALUES (?, ?, ?, ?, ?)", (kind, version, digest, envelope, now)
            )

    # -- other modules' tables -------------------------------------------------------------------------------------

    def select(self, query: str, *values: object) -> list[tuple[object, ...]]:
        """Rows of a module that keeps tables of its own in here."""
        return self._rows(query, *values)

    def change(self, statement: str, *values: object) -> int:
        """Inside a transaction: how many rows a statement of such a module changed."""
        return self._db.execute(statement, values).rowcount

    def seal_row(self, secret: bytes, table: str, *name: str) -> bytes:
        """Ciphertext that opens only in this row of such a module's table."""
        return self._seal(secret, table, "/".join(name))

    def unseal_row(self, sealed: object, table: str, *name: str) -> bytes:
        """Inverse of :meth:`seal_row`. Raises ``STORAGE`` for what it did not make."""
        return self._unseal(blob(sealed), table, "/".join(name))

    # -- releases and appraisals -----------------------------------------------------------------------------------

    def record_release(self, record: ReleaseRecord) -> bool:
        """Keep a release before it is answered. False: this leaf was answered before."""
        with storage(self.path):
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
        return number(self._rows("SELECT count(*) FROM releases")[0][0])

    def releases_since(self, since: int) -> list[tuple[str, int]]:
        """``(owner, unix time)`` of the releases at or after ``since``, oldest first."""
        out: list[tuple[str, int]] = []
        with storage(self.path):
            for owner, time in self._db.execute("SELECT owner, released_at FROM releases ORDER BY number DESC"):
                if time < since:
                    break
                out.append((str(owner), number(time)))
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
            (blob(evidence), self._verdict(blob(evidence), blob(context), expires_at, sealed))
            for evidence, context, expires_at, sealed in rows
        ]

    def drop_appraisals(self, evidence: Iterable[bytes]) -> None:
        """Forget the verdicts on these documents, in every context; on the disk when this returns."""
        with self.transaction():
            self._db.executemany("DELETE FROM appraisals WHERE evidence_digest = ?", [(each,) for each in evidence])

    def _verdict(self, evidence: bytes, context: bytes, expires_at: object, sealed: object) -> bytes:
        return self._unseal(blob(sealed), "appraisals", evidence.hex(), context.hex(), number(expires_at))

    def tpm_state(self, ak: str) -> bytes | None:
        """The state that this attestation key's last accepted quote left its TPM in."""
        rows = self._rows("SELECT sealed FROM tpm_states WHERE ak = ?", ak)
        return self._unseal(blob(rows[0][0]), "tpm_states", ak) if rows else None


def _token_seeds(token: Token | None, sealed: SealedKeystore) -> TokenSeeds:
    instance = sealed.token_instance()
    if token is None or len(instance) != INSTANCE_SIZE:
        raise UnavailableError(Reason.STORAGE, f"{sealed.path} does not say which keys of the token are its seeds")
    return TokenSeeds(token, instance, sealed.custodian_id)


def open_keystore(config: CustodianConfig, secret: Secret) -> Keystore:
    """The keystore of a custodian that isn't running. Raises as :meth:`Keystore.open`."""
    return Keystore.open(config.keystore, secret, module=config.pkcs11_module)
