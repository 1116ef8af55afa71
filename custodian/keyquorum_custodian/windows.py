"""The custodian's 30-second windows: a nonce for fresh evidence, an answer key for cheap signatures (DESIGN §6).

Each window has a nonce, HMAC of its number under a secret made at start, and a short-lived Ed25519 key that signs the
answers given in it. The custodian's hybrid identity certifies both in one statement per window; that costs an ML-DSA
signature (about a millisecond), so :meth:`Windows.prepare` is called ahead of time, from a thread. A restart makes
everything anew: evidence collected against the old nonces is not fresh any more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keyquorum_core.release import make_nonce, make_window, sign_window, window_of
from keyquorum_core.signing import Identity

__all__ = ["OpenWindow", "Windows"]


@dataclass(frozen=True, slots=True)
class OpenWindow:
    """One window: its number, the private half of its answer key, and the signed statement (DSSE envelope)."""

    number: int
    answer_key: Ed25519PrivateKey = field(repr=False)
    statement: bytes


class Windows:
    """``clock`` gives unix seconds. Prepared windows are kept until the one after the next begins."""

    def __init__(self, cluster: str, custodian_id: str, identity: Identity, clock: Callable[[], float]) -> None:
        self._cluster = cluster
        self._custodian_id = custodian_id
        self._identity = identity
        self._clock = clock
        self._boot_secret = os.urandom(32)
        self._open: dict[int, OpenWindow] = {}

    def number(self) -> int:
        """The number of this moment's window."""
        return window_of(int(self._clock()))

    def current(self) -> OpenWindow:
        """The window of this moment; prepared here and now if nobody did it before."""
        number = self.number()
        return self._open.get(number) or self.prepare(number)

    def prepare(self, number: int) -> OpenWindow:
        """Make and sign a window, once; safe to call from another thread."""
        window = self._open.get(number)
        if window is None:
            key = Ed25519PrivateKey.generate()
            public = key.public_key().public_bytes_raw()
            statement = make_window(self._cluster, self._custodian_id, number, self._boot_secret, public)
            made = OpenWindow(number, key, sign_window(statement, self._identity))
            # Whoever comes first wins, so that a window never has two answer keys.
            window = self._open.setdefault(number, made)
            # A copy: another thread may be preparing a window too.
            for old in [each for each in list(self._open) if each < number - 2]:
                self._open.pop(old, None)
        return window

    def prepare_next(self) -> OpenWindow:
        """The window after this moment's."""
        return self.prepare(self.number() + 1)

    def current_nonces(self) -> dict[int, bytes]:
        """The nonces (32 bytes) of this moment's window and of the one before it, by window number."""
        number = self.number()
        return {each: make_nonce(self._boot_secret, each) for each in (number - 1, number)}
