"""k of n officers: SLIP-39 shares (SatoshiLabs, 2017) of a secret that opens the keystore.

One group, no passphrase of SLIP-39's own, extendable backup flag set, iteration exponent 0: the secret is 32 random
bytes, so that stretching it would add nothing. A share is 33 words of the SLIP-39 list; it carries the identifier of
its set, its own number, the threshold and a checksum, so that a slip of the pen, a share of another set and one entered
twice are each found before anything is combined. Fewer than the threshold say nothing about the secret.

What errors say of a share is its number and the place of a bad word, never a word. The library's arithmetic takes time
that depends on the secret; it runs when an officer unseals, where nobody times it from outside
(docs/adr/0015-sealing.md).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final

from keyquorum_core.derivation import hkdf_sha256
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError
from keyquorum_core.transcript import H
from keyquorum_custodian.sealing.record import SALT_SIZE, ShareSet

__all__ = ["HOLD_SECONDS", "WORDS", "HeldShares", "combine", "new_shares", "share_key"]

WORDS: Final = 33
"""Of a share of a 32-byte secret."""
HOLD_SECONDS: Final = 600
"""After the first share was entered, the last must have come; then all are forgotten."""
_SECRET_SIZE: Final = 32
_MAX_TEXT: Final = 1024


def new_shares(
    threshold: int, count: int, rng: Callable[[int], bytes] = secrets.token_bytes
) -> tuple[ShareSet, bytes, tuple[str, ...]]:
    """A new secret: the set, the secret (32 bytes), and its shares, each 33 words. Raises :class:`MalformedError`."""
    from shamir_mnemonic import shamir

    made = ShareSet(int.from_bytes(rng(2), "big") >> 1, threshold, count, rng(SALT_SIZE))
    secret = rng(_SECRET_SIZE)
    encrypted = shamir.EncryptedMasterSecret.from_master_secret(secret, b"", made.identifier, True, 0)
    ((*shares,),) = shamir.split_ems(1, [(threshold, count)], encrypted)
    words = tuple(share.mnemonic() for share in shares)
    if combine(made, words[-threshold:]) != secret:  # before anybody relies on them
        raise MalformedError(Reason.INTERNAL, "the shares made do not combine to what they were made from")
    return made, secret, words


def share_key(shares: ShareSet, custodian: str, secret: bytes) -> bytes:
    """The AES-256 key that wraps the KEK: HKDF-SHA-256(secret, salt, H("keyquorum/v1/keystore-shares", custodian))."""
    info = H("keyquorum/v1/keystore-shares", custodian.encode())
    return hkdf_sha256(secret, salt=shares.salt, info=info, length=32)


def combine(shares: ShareSet, texts: Sequence[str]) -> bytes:
    """The secret from at least as many shares as it takes. Raises as :meth:`HeldShares.add` and ``take``."""
    held = HeldShares(shares, lambda: 0.0)
    for text in texts:
        held.add(text)
    return held.take()


class HeldShares:
    """The shares entered so far, in memory only. ``clock``: seconds that never go back."""

    def __init__(self, shares: ShareSet, clock: Callable[[], float]) -> None:
        self.set = shares
        self._clock = clock
        self._held: dict[int, Any] = {}
        self._first = 0.0

    def __repr__(self) -> str:
        return f"HeldShares({len(self)} of {self.set.threshold})"

    def __len__(self) -> int:
        self.expire()
        return len(self._held)

    @property
    def complete(self) -> bool:
        return len(self) >= self.set.threshold

    @property
    def seconds_left(self) -> float:
        """Until the shares held are forgotten; 0 while none is held."""
        return self._first + HOLD_SECONDS - self._clock() if len(self) else 0.0

    def expire(self) -> int:
        """Forget what was held for too long; returns how many shares."""
        if not self._held or self._clock() - self._first < HOLD_SECONDS:
            return 0
        return self.forget()

    def forget(self) -> int:
        count = len(self._held)
        self._held.clear()
        return count

    def add(self, text: str) -> None:
        """One share's words. Raises :class:`MalformedError` (not a share: which word), :class:`RefusedError`
        (``UNSEAL``: of another set) or :class:`StateError` (``EXISTS``: entered before); what is held stays."""
        share = _read(text)
        self._check_set(share)
        self.expire()
        if share.index in self._held:
            if self._held[share.index] == share:
                raise StateError(
                    Reason.EXISTS,
                    f"share {share.index + 1} was entered before",
                    expected="another officer's share",
                    actual=f"share {share.index + 1} again",
                )
            raise RefusedError(
                Reason.UNSEAL,
                f"another share {share.index + 1} was entered before: one of the two is forged",
                next_step="Forget all shares with `keyquorum-custodian seal`, then enter each anew.",
            )
        if not self._held:
            self._first = self._clock()
        self._held[share.index] = share

    def _check_set(self, share: Any) -> None:
        wanted = self.set
        for what, expected, actual in (
            ("identifier", wanted.identifier, share.identifier),
            ("threshold", wanted.threshold, share.member_threshold),
            ("kind", (True, 0, 0, 1, 1), (share.extendable, share.iteration_exponent, *_group(share))),
            ("number", True, share.index < wanted.count),
            ("size", _SECRET_SIZE, len(share.value)),
        ):
            if expected != actual:
                raise RefusedError(
                    Reason.UNSEAL,
                    f"this share is of another set: its {what} is not that of this keystore's shares",
                    expected=expected if what in ("identifier", "threshold") else "as they were made",
                    actual=actual if what in ("identifier", "threshold") else "another",
                    next_step="Take a share that was made when this custodian was last sealed under shares.",
                )

    def words(self) -> tuple[str, ...]:
        """The shares held, as they are written."""
        return tuple(share.mnemonic() for share in self._held.values())

    def take(self) -> bytes:
        """The secret; whatever comes of it, no share is held any more. Raises :class:`StateError` (too few) and
        :class:`RefusedError` (``UNSEAL``: they are not shares of one secret)."""
        from shamir_mnemonic import MnemonicError
        from shamir_mnemonic.shamir import ShareGroup, recover_ems

        if not self.complete:
            raise StateError(
                Reason.SEALED, "too few shares", expected=f"{self.set.threshold} shares", actual=f"{len(self)}"
            )
        group = ShareGroup()
        for share in list(self._held.values())[: self.set.threshold]:
            group.add(share)
        self.forget()
        try:
            return bytes(recover_ems({0: group}).decrypt(b""))
        except MnemonicError:
            raise wrong_shares() from None


def wrong_shares() -> RefusedError:
    """Each share is well-formed and of the right set, and yet they open nothing."""
    return RefusedError(
        Reason.UNSEAL,
        "the shares do not fit together: at least one of them is forged",
        expected="shares as they were handed out",
        actual="others",
        next_step="All are forgotten. Enter each again, with other officers' shares instead of those in doubt.",
    )


def _group(share: Any) -> tuple[int, int, int]:
    return share.group_index, share.group_threshold, share.group_count


def _read(text: str) -> Any:
    from shamir_mnemonic import MnemonicError
    from shamir_mnemonic.share import Share
    from shamir_mnemonic.wordlist import WORD_INDEX_MAP

    if len(text) > _MAX_TEXT:
        raise MalformedError(
            Reason.TOO_LARGE, "that is no share", expected=f"{WORDS} words", actual=f"{len(text)} letters"
        )
    words = text.lower().split()
    if len(words) != WORDS:
        raise MalformedError(
            Reason.MALFORMED, "that is no share", expected=f"{WORDS} words", actual=f"{len(words)} words"
        )
    unknown = [number for number, word in enumerate(words, 1) if word not in WORD_INDEX_MAP]
    if unknown:
        raise MalformedError(
            Reason.MALFORMED,
            "the share has words that are not of the SLIP-39 list",
            expected="words of the list",
            actual=f"another at place {', '.join(map(str, unknown[:5]))}",
            next_step="Look at these words again.",
        )
    try:
        return Share.from_mnemonic(" ".join(words))
    except MnemonicError:
        raise MalformedError(
            Reason.MALFORMED,
            "the share's checksum is wrong: a word is not the one that was written down, or two are swapped",
            expected="the share's own words in their order",
            actual="others",
            next_step="Enter the share again.",
        ) from None
