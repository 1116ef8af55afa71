"""Changing what opens a keystore: a new key, everything sealed again under it, all of it or nothing.

The new scheme is ready before anything changes: shares are in their officers' hands, the token has its key. Then one
transaction opens every sealed value with the old key, seals it with the new one and puts the new sealing record in
place; whatever fails or dies before its commit leaves the keystore as it was. After the commit the old record and the
old ciphertexts are overwritten in the file and its log, at the latest by the next start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keyquorum_core.errors import KeyquorumError, Reason, StateError, UnavailableError
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.logs import logger
from keyquorum_custodian.sealed_keystore import ATTEMPTS, RECORD, TOKEN_SEEDS, UNSCRUBBED
from keyquorum_custodian.sealing.record import Scheme, token_key_of
from keyquorum_custodian.sealing.schemes import Wrapping
from keyquorum_custodian.sealing.token import Token
from keyquorum_custodian.sealing.token_seeds import INSTANCE_SIZE, TokenSeeds
from keyquorum_custodian.token_leftovers import clear_leftovers, name_leftovers, named_leftovers
from keyquorum_custodian.vault import blob

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
    scheme raises; then the old scheme is in force, whole. The token that the old scheme used no longer holds its key,
    nor one that an earlier attempt left there.
    """
    clear_leftovers(store, store.token, wrapping.token)
    before = token_key_of(store.sealing_record())
    kept = _seeds_after(store, wrapping)
    earlier, made = named_leftovers(store), wrapping.token_key
    if made is not None:
        with store.transaction():
            name_leftovers(store, [*earlier, made])
    kek = AESGCM.generate_key(256)
    moving = kept if kept is not store.token_seeds else None
    try:
        record = wrapping.wrap(kek, store.custodian_id)
        _check_tables(store)
        with store.transaction():
            for table, row in _rows(store):
                into = moving if table == "seeds" else None
                store.reseal_row(AESGCM(kek), table, SEALED_TABLES[table].key, row, into)
            store.put_meta(RECORD, record)
            store.put_meta(UNSCRUBBED, b"")
            store.change("DELETE FROM meta WHERE name = ?", ATTEMPTS)
            name_leftovers(store, [*earlier, before] if before is not None else earlier)
    except BaseException:
        if moving is not None:
            moving.forget_new()
        _clear(store, wrapping.token)
        raise
    if moving is not None:
        moving.settle()
    old = store.take_key(AESGCM(kek), wrapping.token, kept)
    try:
        store.scrub()
        with store.transaction():
            store.change("DELETE FROM meta WHERE name = ?", UNSCRUBBED)
    except KeyquorumError as error:  # the new scheme is in force all the same
        logger().warning("what was sealed before is overwritten at the next start", why=error.message)
    _clear(store, old, wrapping.token)
    if old is not None and old is not wrapping.token:
        old.close()


def _clear(store: Keystore, *tokens: Token | None) -> None:
    try:
        clear_leftovers(store, *tokens)
    except KeyquorumError as error:
        logger().warning("keys in a token that open nothing any more go at the next start", why=error.message)


def _seeds_after(store: Keystore, wrapping: Wrapping) -> TokenSeeds | None:
    """Where seeds will be. Raises ``STATE`` where they cannot get there: what is in a token stays in it."""
    token, now = wrapping.token, store.token_seeds
    if now is not None and (wrapping.scheme is not Scheme.PKCS11_SEEDS or token is not now.token):
        if store.select("SELECT 1 FROM seeds LIMIT 1"):
            raise StateError(
                Reason.STATE,
                "the seeds are keys of the token, which does not give them away",
                expected="the same token",
                actual=str(wrapping.scheme),
                next_step="Make a new custodian with the other scheme and have this one replaced by it.",
            )
        now = None
    if wrapping.scheme is not Scheme.PKCS11_SEEDS or token is None or now is not None:
        return now
    instance = os.urandom(INSTANCE_SIZE)
    found = store.select("SELECT value FROM meta WHERE name = ?", TOKEN_SEEDS)
    if found:  # an attempt before this one died: what it left in the token goes now
        instance = blob(found[0][0])
    else:
        with store.transaction():
            store.put_meta(TOKEN_SEEDS, instance)
    made = TokenSeeds(token, instance, store.custodian_id)
    made.sweep((), _epochs_of(store))
    return made


def _epochs_of(store: Keystore) -> set[tuple[str, int]]:
    known = {(row.key_id, row.epoch) for row in store.epochs()}
    return known | {(row.key_id, row.epoch) for row in store.ceremonies()}


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
