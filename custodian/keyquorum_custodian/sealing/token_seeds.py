"""Seeds that are keys of a PKCS#11 token: they go in when they are made, and never come out.

The keystore's row for a seed holds, sealed, what finds the key in the token and proves it: ``CKA_ID`` (32 bytes) and a
check value (32 bytes), HMAC-SHA-256 under the seed over the commitment that it was checked against on its way in. At
each start the token hashes its keys for the commitments in the certificate (C_DigestKey); one that refuses to hash keys
proves them by their check values, which only the token and this row, under the keystore's key, can bring together.

``CKA_ID`` is 16 random bytes and a tag of keystore, key and epoch: a key in the token whose row was never committed, or
is gone, is found by that and destroyed. A key of an epoch that this keystore never heard of stays: an older copy of a
keystore must not erase what its successor made.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final

from keyquorum_core.ceremony import SEED_SIZE, commitment
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, UnavailableError
from keyquorum_core.transcript import H, u64be
from keyquorum_custodian.logs import logger
from keyquorum_custodian.sealing.token import Token

__all__ = ["INSTANCE_SIZE", "TokenSeed", "TokenSeeds"]

INSTANCE_SIZE: Final = 16
_ID: Final = 32
_RANDOM: Final = 16
_CHECK: Final = 32
_CHECK_LABEL: Final = b"keyquorum/v1/token-seed-check"


@dataclass(frozen=True, slots=True)
class TokenSeed:
    """One seed in the token (:class:`keyquorum_core.ceremony.KeptSeed`). ``check`` is its check value."""

    token: Token
    key: Any = field(repr=False)
    check: bytes = field(repr=False)
    hashes: bool

    def mac(self, message: bytes) -> bytes:
        return self.token.mac(self.key, message)

    def sha256(self, before: bytes, after: bytes) -> bytes:
        return self.token.digest(self.key, before, after)

    def is_committed(self, before: bytes, commitment: bytes) -> bool:
        if self.hashes:
            return hmac.compare_digest(self.sha256(before, b""), commitment)
        return hmac.compare_digest(self.mac(_CHECK_LABEL + commitment), self.check)


class TokenSeeds:
    """The seeds of one keystore, ``instance`` by its random name, in one token."""

    def __init__(self, token: Token, instance: bytes, custodian: str) -> None:
        self.token = token
        self.instance = instance
        self._label = f"keyquorum seed {custodian}"
        self._keys = token.seeds(self._label)
        self._new: list[bytes] = []
        self._doomed: list[bytes] = []
        self.hashes = self._can_hash()

    def _can_hash(self) -> bool:
        """Whether the token hashes keys that it does not give away, tried on one that says nothing."""
        probe = self.token.put_seed(os.urandom(_RANDOM), "keyquorum probe", os.urandom(SEED_SIZE))
        try:
            self.token.digest(probe, b"probe", b"")
        except UnavailableError:
            return False
        finally:
            self.token.destroy(probe)
        return True

    def _tag(self, key_id: str, epoch: int) -> bytes:
        return H("keyquorum/v1/token-seed", self.instance, key_id.encode(), u64be(epoch))[: _ID - _RANDOM]

    def put(self, ceremony_id: str, key_id: str, epoch: int, index: int, seed: bytes) -> bytes:
        """A seed into the token; what its row is to hold. It goes again with :meth:`forget_new`."""
        object_id = os.urandom(_RANDOM) + self._tag(key_id, epoch)
        self._new.append(object_id)
        self._keys[object_id] = self.token.put_seed(object_id, self._label, seed)
        message = _CHECK_LABEL + commitment(ceremony_id, index, seed)
        return object_id + hmac.digest(seed, message, "sha256")

    def get(self, value: bytes) -> TokenSeed:
        """The seed that a row speaks of. Raises ``STORAGE`` for a row of another kind, or a key that is not there."""
        if len(value) != _ID + _CHECK:
            raise MalformedError(Reason.STORAGE, "a seed's row does not speak of a key in a token")
        key = self._keys.get(value[:_ID])
        if key is None:
            raise UnavailableError(
                Reason.STORAGE,
                "the token lacks a seed that the keystore speaks of",
                expected=f"a key with CKA_ID {value[:_ID].hex()}",
                actual="none",
                next_step="Use the token that the seeds are in, or have this custodian repaired by its peers.",
            )
        return TokenSeed(self.token, key, value[_ID:], self.hashes)

    def drop(self, value: bytes) -> None:
        """The row of this seed is to go: with :meth:`settle`, so does the key."""
        self._doomed.append(value[:_ID])

    def settle(self) -> None:
        """The rows are on the disk as they are: what is new stays, and what was dropped goes. One that cannot go now
        goes with :meth:`sweep`."""
        doomed, self._doomed, self._new = self._doomed, [], []
        for object_id in doomed:
            self._destroy(object_id)

    def forget_new(self) -> None:
        """The rows were lost: what is new goes, and what was to be dropped stays."""
        new, self._new, self._doomed = self._new, [], []
        for object_id in new:
            self._destroy(object_id)

    def _destroy(self, object_id: bytes) -> None:
        key = self._keys.get(object_id)
        if key is None:
            return
        try:
            self.token.destroy(key)
        except KeyquorumError as error:
            logger().warning("a seed could not be destroyed in the token yet", key=object_id.hex(), why=error.message)
        else:
            del self._keys[object_id]

    def sweep(self, rows: Collection[bytes], epochs: Collection[tuple[str, int]]) -> int:
        """Destroy the keys of these epochs that no row speaks of; returns how many. Raises ``UNAVAILABLE`` when one
        cannot be."""
        self._keys = self.token.seeds(self._label)
        tags = {self._tag(key_id, epoch) for key_id, epoch in epochs}
        known = {value[:_ID] for value in rows}
        orphans = [found for found in self._keys if found[_RANDOM:] in tags and found not in known]
        for object_id in orphans:
            self.token.destroy(self._keys[object_id])
            del self._keys[object_id]
        return len(orphans)
