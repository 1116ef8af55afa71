"""Wrapping keys in tokens that are to go: those of a sealing scheme that was, and of one that never came to be.

A token's key can't be made or destroyed together with the keystore's record of it. So the keystore names each before it
is made, and when its scheme ends, and takes the name off when it is gone: what a death leaves in a token is destroyed
by the next start, or the next change of scheme, that is logged in to that token. Only keys named here are destroyed; a
token may hold those of other keystores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from keyquorum_core import jcs
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.strictjson import Fields, canonical
from keyquorum_custodian.logs import logger
from keyquorum_custodian.sealed_keystore import RECORD, TOKEN_KEYS
from keyquorum_custodian.sealing.record import KEY_ID_SIZE, TokenKey, token_key_of
from keyquorum_custodian.sealing.token import Token
from keyquorum_custodian.vault import blob

if TYPE_CHECKING:
    from keyquorum_custodian.keystore import Keystore

__all__ = ["abandon", "clear_leftovers", "name_leftovers", "named_leftovers"]

_MAX: Final = 1 << 20
_MAX_KEYS: Final = 1024


def abandon(store: Keystore) -> None:
    """Nothing of this keystore, which is new and never came to be, stays in its token. What can't go is said."""
    key = token_key_of(store.sealing_record())
    if store.token is None or key is None:
        return
    try:
        if store.token_seeds is not None:
            store.token_seeds.sweep((), {(row.key_id, row.epoch) for row in store.epochs()})
        store.token.destroy_wrapping_key(key)
    except KeyquorumError as error:
        logger().warning("a token keeps keys that open nothing", key=key.key_id.hex(), why=error.message)


def named_leftovers(store: Keystore) -> list[TokenKey]:
    """Raises :class:`MalformedError` for what :func:`name_leftovers` did not write."""
    rows = store.select("SELECT value FROM meta WHERE name = ?", TOKEN_KEYS)
    if not rows:
        return []
    fields, out = canonical(blob(rows[0][0]), "names of a token's keys", _MAX), []
    for value in fields.list("keys", max_items=_MAX_KEYS):
        entry = Fields(value, "name of a token's key")
        out.append(
            TokenKey(
                entry.text("token_label", max_length=32),
                entry.text("token_serial", max_length=32, allow_empty=True),
                entry.hex("key", KEY_ID_SIZE),
            )
        )
        entry.done()
    fields.done()
    return out


def name_leftovers(store: Keystore, keys: Iterable[TokenKey]) -> None:
    """Inside a transaction: these, and no others."""
    named = [
        {"key": each.key_id.hex(), "token_label": each.label, "token_serial": each.serial}
        for each in dict.fromkeys(keys)
    ]
    if named:
        store.change("INSERT OR REPLACE INTO meta VALUES (?, ?)", TOKEN_KEYS, jcs.dumps({"keys": named}))
    else:
        store.change("DELETE FROM meta WHERE name = ?", TOKEN_KEYS)


def clear_leftovers(store: Keystore, *tokens: Token | None) -> None:
    """Destroy those that are in these tokens. One that can't be is no danger, so that is said and no more; it stays
    named. The key that opens the keystore is none of them, whatever is named."""
    named = named_leftovers(store)
    if not named:
        return
    in_use = token_key_of(blob(store.select("SELECT value FROM meta WHERE name = ?", RECORD)[0][0]))
    left = []
    for key in named:
        token = next((each for each in tokens if each is not None and each.keeps(key)), None)
        if key == in_use:
            continue
        try:
            if token is not None:
                token.destroy_wrapping_key(key)
                continue
        except KeyquorumError as error:
            logger().warning("a token keeps a key that opens nothing any more", key=key.key_id.hex(), why=error.message)
        left.append(key)
    if left != named:
        with store.transaction():
            name_leftovers(store, left)
