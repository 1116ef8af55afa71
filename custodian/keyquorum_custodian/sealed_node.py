"""A custodian whose keystore is sealed: who it is, how far it is from being open, and how it opens.

It holds no private key of its own but that of its TLS certificate, which lies in a file. What it needs to be reached is
public: its configuration, and the roster, which names the coordinators and was signed by the operators it knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError
from keyquorum_core.roster import Roster
from keyquorum_custodian.config import CustodianConfig, load_config
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.logs import logger
from keyquorum_custodian.node import Node, assemble, load_roster, load_tls
from keyquorum_custodian.sealed_keystore import SealedKeystore
from keyquorum_custodian.sealing.attempts import Attempts
from keyquorum_custodian.sealing.record import Scheme, SealingRecord, ShareSet
from keyquorum_custodian.sealing.schemes import Secret
from keyquorum_custodian.sealing.shares import HeldShares
from keyquorum_protos.wire.tls import TlsIdentity

__all__ = ["Progress", "SealedNode", "open_sealed"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a sealed custodian is from being open. Times in unix seconds; 0: none."""

    scheme: Scheme
    shares_held: int
    shares_needed: int
    forgotten_at: int
    failed_attempts: int
    next_attempt_at: int


class SealedNode:
    """Make it with :func:`open_sealed`; used from one thread. ``clock`` gives unix seconds, ``steady`` seconds that
    never go back."""

    def __init__(
        self,
        config: CustodianConfig,
        store: SealedKeystore,
        roster: Roster,
        tls_identity: TlsIdentity,
        clock: Callable[[], float],
        steady: Callable[[], float],
        keystore: type[Keystore],
    ) -> None:
        self.config = config
        self.roster = roster
        self.tls_identity = tls_identity
        self.clock = clock
        self.started_at = int(clock())
        self._store = store
        self._steady = steady
        self._keystore = keystore
        self._idle_since = steady()
        self._attempts = store.attempts()
        self.scheme = store.scheme
        self._shares = HeldShares(_share_set(store.record), steady) if self.scheme is Scheme.SLIP39 else None

    @property
    def progress(self) -> Progress:
        shares, now = self._shares, int(self.clock())
        return Progress(
            self.scheme,
            len(shares) if shares is not None else 0,
            shares.set.threshold if shares is not None else 0,
            now + int(shares.seconds_left) if shares is not None and len(shares) else 0,
            self._attempts.failed,
            self._attempts.next_at(now, self._idle()),
        )

    def offer(self, secret: str) -> Node | None:
        """The passphrase, the PIN, or one more share. Returns the custodian, open, or None while shares are missing;
        then the keystore is its.

        Raises ``ATTEMPTS`` (too soon after wrong ones), what :meth:`HeldShares.add` does for a share that is none,
        ``PASSPHRASE`` or ``UNSEAL`` for a wrong secret, which counts and forgets all shares, and what
        :func:`open_node` does when the custodian's folder does not fit; then it is sealed as before.
        """
        self._attempts.check(int(self.clock()), self._idle())
        given: Secret = secret
        if self._shares is not None:
            self._shares.add(secret)
            if not self._shares.complete:
                return None
            given = self._shares.words()
        return self._try(given)

    def _try(self, secret: Secret) -> Node:
        before = self._attempts
        self._count(before.another(int(self.clock())))
        try:
            store = self._keystore.unseal(self._store, secret, module=self.config.pkcs11_module)
        except RefusedError as error:
            if error.reason not in (Reason.PASSPHRASE, Reason.UNSEAL):
                self._count(before)
                raise
            error.details["failed_attempts"] = str(self._attempts.failed)
            logger().warning("wrong secret", failed=self._attempts.failed, reason=str(error.reason))
            raise
        except KeyquorumError:
            self._count(before)
            raise
        finally:
            self.forget()
        try:
            store.clear_attempts()
            return assemble(self.config, store, self.clock)
        except BaseException:
            store.close()
            self._store = SealedKeystore.open(self.config.keystore)
            self._attempts = self._store.attempts()
            raise

    def _count(self, attempts: Attempts) -> None:
        self._store.save_attempts(attempts)
        self._attempts = attempts
        self._idle_since = self._steady()

    def _idle(self) -> float:
        return self._steady() - self._idle_since

    def expire(self) -> int:
        """Forget shares that were held for too long; returns how many."""
        return self._shares.expire() if self._shares is not None else 0

    def forget(self) -> int:
        """Forget all shares; returns how many."""
        return self._shares.forget() if self._shares is not None else 0

    def warnings(self) -> list[str]:
        """What the operator should not get used to."""
        progress, out = (
            self.progress,
            ["SEALED: nothing is released until it is unsealed, see section 10 of docs/operators.md"],
        )
        if progress.failed_attempts:
            out.append(f"{progress.failed_attempts} wrong attempts to unseal were made since the last right one")
        return out

    def close(self) -> None:
        self.forget()
        self._store.close()


def open_sealed(
    directory: Path,
    *,
    clock: Callable[[], float] = time.time,
    steady: Callable[[], float] = time.monotonic,
    keystore: type[Keystore] = Keystore,
) -> SealedNode:
    """Open a custodian's folder as far as that needs no secret. Raises the typed error of whatever does not fit, and
    then holds nothing open."""
    config = load_config(directory)
    roster, _ = load_roster(config, int(clock()))
    tls_identity = load_tls(config)
    store = SealedKeystore.open(config.keystore)
    try:
        _check(config, store, roster, tls_identity)
        return SealedNode(config, store, roster, tls_identity, clock, steady, keystore)
    except BaseException:
        store.close()
        raise


def _check(config: CustodianConfig, store: SealedKeystore, roster: Roster, tls_identity: TlsIdentity) -> None:
    newest = store.newest_roster()
    entry = roster.custodian(config.id)
    certificate = tls_identity.certificate.decode("ascii", "replace")
    for what, expected, actual in (
        ("id of the keystore", config.id, store.custodian_id),
        ("TLS certificate", entry.tls_certificate, certificate),
    ):
        if expected != actual:
            raise RefusedError(
                Reason.ROSTER,
                f"the {what} on disk is not the one in the roster",
                expected=expected,
                actual=actual,
                next_step="Serve from the folder that was enrolled.",
            )
    if newest is not None and (
        roster.version < newest[0] or (roster.version == newest[0] and roster.digest != newest[1])
    ):
        raise RefusedError(
            Reason.ROSTER,
            "the roster on disk is older than one this custodian served under, or contradicts it",
            expected=f"version {newest[0]} ({newest[1]}) or newer",
            actual=f"version {roster.version} ({roster.digest})",
        )


def _share_set(record: bytes) -> ShareSet:
    by = SealingRecord.parse(record).by
    if not isinstance(by, ShareSet):
        raise StateError(Reason.STATE, "this keystore is not sealed under shares")
    return by
