"""Changing what opens a keystore: a new key, everything sealed again under it, all of it or nothing.

The new scheme is ready before anything changes: shares are in their officers' hands, the token has its key. Then one
transaction opens every sealed value with the old key, seals it with the new one and puts the new sealing record in
place; whatever fails or dies before its commit leaves the keystore as it was. After the commit the old record and the
old ciphertexts are overwritten in the file and its log, at the latest by the next start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.logs import logger
from keyquorum_custodian.sealed_keystore import ATTEMPTS, RECORD, UNSCRUBBED
from keyquorum_custodian.sealing.record import Scheme, SealingRecord, TokenKey, scheme_of
from keyquorum_custodian.sealing.schemes import Wrapping
from keyquorum_custodian.sealing.token import Token

__all__ = ["FOREIGN", "SEALED_TABLES", "SealedTable", "reseal"]


@dataclass(frozen=True, slots=True)
class SealedTable:
    """A table with a column ``sealed``: its primary ``key``, and a query for that and for what each value is bound to:
    name, key id, epoch, index (:mod:`keyquorum_custodian.vault`), then the value itself."""

    key: tuple[str, ...]
    query: str


_OF_CEREMONY: Final = (
    "SELECT s.ceremony_id, s.idx, s.ceremony_id, coalesce(e.key_id, c.key_id, ''), coalesce(e.epoch, c.epoch, 0),"
    " s.idx, s.sealed FROM {table} s LEFT JOIN epochs e USING (ceremony_id)"
    " LEFT JOIN ceremonies c USING (ceremony_id)"
)
SEALED_TABLES: Final = {
    "secrets": SealedTable(("name",), "SELECT name, name, '', 0, 0, sealed FROM secrets"),
    "parts": SealedTable(("ceremony_id", "idx"), _OF_CEREMONY.format(table="parts")),
    "seeds": SealedTable(("ceremony_id", "idx"), _OF_CEREMONY.format(table="seeds")),
    "appraisals": SealedTable(
        ("evidence_digest", "context"),
        "SELECT evidence_digest, context, lower(hex(evidence_digest)), lower(hex(context)), expires_at, 0, sealed"
        " FROM appraisals",
    ),
    "tpm_states": SealedTable(("ak",), "SELECT ak, ak, '', 0, 0, sealed FROM tpm_states"),
    "leases": SealedTable(
        ("job_id", "recipient_sha256"),
        "SELECT job_id, recipient_sha256, job_id || '/' || recipient_sha256, '', 0, 0, sealed FROM leases",
    ),
}
FOREIGN: Final = frozenset({"accusations"})
"""Their ``sealed`` is what another custodian sealed to somebody: evidence, not ours."""


def reseal(store: Keystore, wrapping: Wrapping) -> None:
    """Have ``store``, which stays open, open by another scheme, or by another secret of the same.

    Raises ``STORAGE`` for a value that does not open, ``UNSUPPORTED`` where a table is not known here, and whatever the
    scheme raises; then the old scheme is in force, whole. A token that the old scheme used no longer holds its key.
    """
    before = store.sealing_record()
    kek = AESGCM.generate_key(256)
    record = wrapping.wrap(kek, store.custodian_id)
    try:
        _check_tables(store)
        with store.transaction():
            for table, row in _rows(store):
                store.reseal_row(AESGCM(kek), table, SEALED_TABLES[table].key, row)
            store.put_meta(RECORD, record)
            store.put_meta(UNSCRUBBED, b"")
            store.change("DELETE FROM meta WHERE name = ?", ATTEMPTS)
    except BaseException:
        _forget_key(wrapping.token, record)
        raise
    old = store.take_key(AESGCM(kek), wrapping.token)
    try:
        store.scrub()
        with store.transaction():
            store.change("DELETE FROM meta WHERE name = ?", UNSCRUBBED)
    except KeyquorumError as error:  # the new scheme is in force all the same
        logger().warning("what was sealed before is overwritten at the next start", why=error.message)
    _forget_key(old, before)
    if old is not None and old is not wrapping.token:
        old.close()


def _check_tables(store: Keystore) -> None:
    """Raise ``UNSUPPORTED`` rather than leave a value sealed under a key that is no more."""
    found = {
        str(name)
        for (name,) in store.select(
            "SELECT m.name FROM sqlite_schema m JOIN pragma_table_info(m.name) c"
            " WHERE m.type = 'table' AND c.name = 'sealed'"
        )
    }
    unknown = found - SEALED_TABLES.keys() - FOREIGN
    if unknown:
        raise UnavailableError(
            Reason.UNSUPPORTED,
            "the keystore has sealed values that this release cannot seal again; nothing was changed",
            expected=", ".join(sorted(SEALED_TABLES)),
            actual=", ".join(sorted(unknown)),
        )


def _rows(store: Keystore) -> Iterator[tuple[str, tuple[object, ...]]]:
    for table, spec in SEALED_TABLES.items():
        for row in store.select(spec.query):
            yield table, row


def _forget_key(token: Token | None, record: bytes) -> None:
    """The token's key that a record names has nothing left to open. One that stays is no danger, so that is said and no
    more."""
    if token is None or scheme_of(record) is Scheme.PASSPHRASE:
        return
    by = SealingRecord.parse(record).by
    if isinstance(by, TokenKey):
        try:
            token.destroy_wrapping_key(by)
        except KeyquorumError as error:
            logger().warning("a token keeps a key that opens nothing any more", key=by.key_id.hex(), why=error.message)
