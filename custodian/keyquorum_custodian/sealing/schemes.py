"""Wrapping a keystore's key, and unwrapping it, by each scheme."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keyquorum_core import keywrap
from keyquorum_core.errors import Reason, RefusedError, StateError
from keyquorum_custodian.sealing.record import KEY_ID_SIZE, Scheme, SealingRecord, ShareSet, TokenKey, scheme_of
from keyquorum_custodian.sealing.shares import combine, share_key, wrong_shares
from keyquorum_custodian.sealing.token import Token

__all__ = [
    "PassphraseWrapping",
    "Secret",
    "SharesWrapping",
    "TokenWrapping",
    "Unwrapped",
    "Wrapping",
    "unwrap",
]

PURPOSE: Final = "keyquorum/v1/keystore"
_NONCE: Final = 12

Secret = str | Sequence[str]
"""What opens a keystore: its passphrase, its token's PIN, or the words of as many shares as it takes."""


class Wrapping(Protocol):
    """A scheme ready to seal a keystore."""

    @property
    def scheme(self) -> Scheme: ...

    @property
    def token(self) -> Token | None:
        """Where the scheme keeps keys."""

    @property
    def token_key(self) -> TokenKey | None:
        """The key that :meth:`wrap` makes there."""

    def wrap(self, kek: bytes, custodian: str) -> bytes:
        """The record that opens to ``kek``."""


@dataclass(frozen=True, slots=True)
class PassphraseWrapping:
    """Argon2id over a passphrase; ``memlimit`` in bytes."""

    passphrase: str = field(repr=False)
    opslimit: int = keywrap.DEFAULT_OPSLIMIT
    memlimit: int = keywrap.DEFAULT_MEMLIMIT
    scheme: Scheme = Scheme.PASSPHRASE
    token: Token | None = None
    token_key: TokenKey | None = None

    def wrap(self, kek: bytes, custodian: str) -> bytes:
        return keywrap.wrap(kek, self.passphrase, purpose=PURPOSE, opslimit=self.opslimit, memlimit=self.memlimit)


@dataclass(frozen=True, slots=True)
class SharesWrapping:
    """The secret that shares, handed out before this is used, combine to."""

    shares: ShareSet
    secret: bytes = field(repr=False)
    rng: Callable[[int], bytes] = secrets.token_bytes
    scheme: Scheme = Scheme.SLIP39
    token: Token | None = None
    token_key: TokenKey | None = None

    def wrap(self, kek: bytes, custodian: str) -> bytes:
        record = SealingRecord(self.scheme, custodian, self.shares, self.rng(_NONCE))
        cipher = AESGCM(share_key(self.shares, custodian, self.secret))
        return replace(record, ciphertext=cipher.encrypt(record.nonce, kek, record.associated_data())).to_bytes()


@dataclass(frozen=True, slots=True)
class TokenWrapping:
    """A new key in a PKCS#11 token, named before it is made; with ``Scheme.PKCS11_SEEDS`` seeds are its keys as well.
    Wraps once."""

    token: Token
    scheme: Scheme
    key_id: bytes = field(default_factory=lambda: os.urandom(KEY_ID_SIZE))

    @property
    def token_key(self) -> TokenKey:
        return TokenKey(self.token.label, self.token.serial, self.key_id)

    def wrap(self, kek: bytes, custodian: str) -> bytes:
        key = self.token.make_wrapping_key(self.key_id, custodian)
        record = SealingRecord(self.scheme, custodian, key, os.urandom(_NONCE))
        try:
            ciphertext = self.token.encrypt(key, record.nonce, kek, record.associated_data())
        except BaseException:
            self.token.destroy_wrapping_key(key)
            raise
        return replace(record, ciphertext=ciphertext).to_bytes()


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """A keystore's key (32 bytes), and the token that it came from, which is then open."""

    kek: bytes = field(repr=False)
    token: Token | None = None


def unwrap(record: bytes, custodian: str, secret: Secret, module: str = "") -> Unwrapped:
    """Open the sealing record of ``custodian``'s keystore; ``module`` is the PKCS#11 library.

    Raises :class:`RefusedError` (``PASSPHRASE``: wrong passphrase or PIN; ``UNSEAL``: wrong shares or a changed
    record), ``SEALED`` where shares are asked for and something else came, :class:`MalformedError`, or what
    :meth:`Token.open` raises.
    """
    scheme = scheme_of(record)
    if scheme is Scheme.PASSPHRASE:
        return Unwrapped(keywrap.unwrap(record, _text(secret, scheme), PURPOSE))
    parsed = SealingRecord.parse(record)
    if parsed.custodian != custodian:
        raise RefusedError(
            Reason.UNSEAL,
            "the sealing record is of another custodian's keystore",
            expected=custodian,
            actual=parsed.custodian,
            next_step="Restore the keystore from a backup.",
        )
    by = parsed.by
    if isinstance(by, ShareSet):
        if isinstance(secret, str):
            raise StateError(
                Reason.SEALED,
                "this keystore is sealed under officers' shares",
                expected=f"{by.threshold} of {by.count} shares",
                actual="a passphrase",
                next_step="Serve it sealed and have each officer run `keyquorum-custodian unseal`.",
            )
        cipher = AESGCM(share_key(by, custodian, combine(by, secret)))
        try:
            return Unwrapped(cipher.decrypt(parsed.nonce, parsed.ciphertext, parsed.associated_data()))
        except InvalidTag:
            raise wrong_shares() from None
    return _from_token(parsed, by, _text(secret, scheme), module)


def _from_token(record: SealingRecord, key: TokenKey, pin: str, module: str) -> Unwrapped:
    token = Token.open(module, pin, key.label, key.serial)
    try:
        kek = token.decrypt(key, record.nonce, record.ciphertext, record.associated_data())
    except BaseException:
        token.close()
        raise
    return Unwrapped(kek, token)


def _text(secret: Secret, scheme: Scheme) -> str:
    if isinstance(secret, str):
        return secret
    raise StateError(
        Reason.SEALED,
        "this keystore is not sealed under shares",
        expected="its passphrase" if scheme is Scheme.PASSPHRASE else "its token's PIN",
        actual=f"{len(secret)} shares",
    )
