"""The epochs in use, opened in memory: what releases are made from.

An epoch enters only through :func:`load_epoch`, which checks every seed against the epoch's certificate first (DESIGN
§9: start-up checks what is on disk). What is kept of a seed is its HMAC key schedule (RFC 2104 §4): a contribution then
takes under a microsecond, a quarter of what keying HMAC anew takes, and OpenSSL overwrites the schedule when
:meth:`HeldEpoch.wipe` lets go of it. Copies that the interpreter made on the way are beyond reach. Seeds that are keys
of a hardware module stay there: it computes the contributions.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from keyquorum_core.ceremony import EpochCertificate, Seed
from keyquorum_core.ceremony_checks import check_seeds
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_custodian.certificates import Certificates
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.sealing.token_seeds import TokenSeed
from keyquorum_custodian.seed_records import ACTIVE, DESTROYED, RETIRED, EpochRow

__all__ = ["ISSUE_GRACE", "Epochs", "HeldEpoch", "hold", "load_epoch"]

CONTRIBUTION_LABEL: Final = b"keyquorum/v1/contribution"
"""As in :mod:`keyquorum_core.derivation`; a test holds the two together."""

ISSUE_GRACE: Final = 300
"""Seconds after an epoch was retired in which manifests for it may still be issued: owners learn of it late."""


class HeldEpoch:
    """One epoch of a key and this custodian's seeds of it.

    Whoever derives from it holds a :meth:`lease` meanwhile; destruction waits until nobody does (:meth:`close`).
    """

    __slots__ = (
        "_closing",
        "_kept",
        "_keyed",
        "_leases",
        "_lock",
        "ceremony_id",
        "certificate_digest",
        "created_at",
        "epoch",
        "indices",
        "key_id",
        "policy",
        "retired_at",
        "suite",
    )

    def __init__(
        self, certificate: EpochCertificate, seeds: Mapping[int, Seed], *, retired_at: int | None = None
    ) -> None:
        plan = certificate.plan
        self.key_id = plan.key_id
        self.epoch = plan.epoch
        self.suite = plan.suite
        self.policy = plan.policy
        self.ceremony_id = plan.ceremony_id
        self.created_at = plan.created_at
        """Unix seconds, as certified: what the epoch's age is counted from."""
        self.retired_at = retired_at
        """Unix seconds, the date of the epoch that followed; None while this one is the newest."""
        self.certificate_digest = certificate.digest
        self.indices = tuple(seeds)
        self._keyed = {index: HMAC(seed, SHA256()) for index, seed in seeds.items() if isinstance(seed, bytes)}
        self._kept = {index: seed for index, seed in seeds.items() if isinstance(seed, TokenSeed)}
        self._lock = threading.Lock()
        self._leases = 0
        self._closing = False

    def __repr__(self) -> str:
        return f"HeldEpoch({self.key_id}, {self.epoch}, {self.state})"

    @property
    def state(self) -> str:
        return ACTIVE if self.retired_at is None else RETIRED

    def check_serves(self, issued_at: int) -> None:
        """Raise ``KEY_STATE`` where the epoch was retired when a manifest of ``issued_at`` (unix seconds) was made."""
        if self.retired_at is not None and issued_at > self.retired_at + ISSUE_GRACE:
            raise StateError(
                Reason.KEY_STATE,
                f"epoch {self.epoch} of key {self.key_id} is retired and serves only what began before",
                expected=f"a manifest issued by {self.retired_at + ISSUE_GRACE}",
                actual=issued_at,
                next_step="Sign the manifest for the key's newest epoch.",
            )

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """The seeds stay while this is held, which many may do at once. Raises ``KEY_STATE`` once they are to go."""
        with self._lock:
            if self._closing:
                raise StateError(
                    Reason.KEY_STATE,
                    f"epoch {self.epoch} of key {self.key_id} is being destroyed",
                    expected=ACTIVE,
                    actual=DESTROYED,
                )
            self._leases += 1
        try:
            yield
        finally:
            with self._lock:
                self._leases -= 1

    def close(self) -> None:
        """No new lease from now on; wipe the seeds if none is held. Raises ``UNAVAILABLE`` while one is: ask again."""
        with self._lock:
            self._closing = True
            if self._leases:
                raise UnavailableError(
                    Reason.UNAVAILABLE,
                    f"{self._leases} releases from epoch {self.epoch} of key {self.key_id} are under way",
                    expected="none",
                    actual=self._leases,
                    next_step="Ask again in a moment; no new ones begin.",
                )
        self.wipe()

    def contributions(self, context: bytes) -> dict[int, bytes]:
        """One contribution per seed, for a 32-byte context: :func:`keyquorum_core.derivation.contributions`."""
        message = CONTRIBUTION_LABEL + context
        out = {}
        for index, keyed in self._keyed.items():
            mac = keyed.copy()
            mac.update(message)
            out[index] = mac.finalize()
        for index, seed in self._kept.items():
            out[index] = seed.mac(message)
        return out

    def wipe(self) -> None:
        """Let go of the seeds. Whether they are overwritten is up to the libraries; what is sure, sealing does
        (:mod:`keyquorum_custodian.serving`)."""
        self._keyed.clear()
        self._kept.clear()


class Epochs:
    """All epochs in use by this custodian, by key and number."""

    def __init__(self, keystore: Keystore) -> None:
        self._keystore = keystore
        self._held: dict[tuple[str, int], HeldEpoch] = {}

    def add(self, held: HeldEpoch) -> None:
        """From now on releases are made from it; older epochs of the key are retired."""
        for other in self._held.values():
            if other.key_id == held.key_id and other.epoch < held.epoch and other.retired_at is None:
                other.retired_at = held.created_at
        self._held[held.key_id, held.epoch] = held

    def replace(self, held: HeldEpoch) -> None:
        """The same epoch, opened anew."""
        before = self._held.get((held.key_id, held.epoch))
        self._held[held.key_id, held.epoch] = held
        if before is not None:
            before.wipe()

    def remove(self, key_id: str, epoch: int) -> None:
        """Wipe it, once no release holds it. Raises ``UNAVAILABLE``."""
        held = self._held.get((key_id, epoch))
        if held is not None:
            held.close()
            del self._held[key_id, epoch]

    def all(self) -> tuple[HeldEpoch, ...]:
        return tuple(self._held.values())

    def newest(self, key_id: str) -> HeldEpoch | None:
        """The key's newest epoch that is held here."""
        return max((held for held in self._held.values() if held.key_id == key_id), key=lambda h: h.epoch, default=None)

    def active(self, key_id: str, epoch: int) -> HeldEpoch:
        """An epoch in use, active or retired.

        Raises ``UNKNOWN_KEY``, ``EPOCH`` (others of the key are in use) or ``KEY_STATE`` (not active yet, destroyed).
        """
        held = self._held.get((key_id, epoch))
        if held is not None:
            return held
        row = self._keystore.epoch(key_id, epoch)
        underway = self._keystore.live_ceremony(key_id, epoch)
        if row is not None or underway is not None:
            state = row.state if row is not None else str(underway.state) if underway is not None else ""
            raise StateError(
                Reason.KEY_STATE,
                f"epoch {epoch} of key {key_id} is not in use",
                expected=ACTIVE,
                actual=state,
                next_step="Finish its ceremony." if row is None else "",
            )
        others = sorted(number for key, number in self._held if key == key_id)
        if others:
            raise RefusedError(
                Reason.EPOCH,
                f"key {key_id} has no such epoch in use",
                expected=", ".join(str(number) for number in others),
                actual=epoch,
            )
        raise StateError(
            Reason.UNKNOWN_KEY, "no such key", expected="a key whose seeds this custodian holds", actual=key_id
        )

    def wipe(self) -> None:
        """Let go of every seed."""
        for held in self._held.values():
            held.wipe()
        self._held.clear()


def load_epoch(keystore: Keystore, row: EpochRow, me: str, certificates: Certificates | None = None) -> HeldEpoch:
    """Open an epoch's seeds and check each against the certificate, which ``certificates`` may have opened before.

    Raises the error of the check that failed, naming key and epoch, and the index where there is one.
    """
    try:
        certificate = (certificates or Certificates(keystore)).open_now(row.certificate)
        seeds = keystore.held_seeds(row)
    except KeyquorumError as error:
        raise _named(error, row) from None
    return hold(certificate, row, seeds, me)


def hold(certificate: EpochCertificate, row: EpochRow, seeds: Mapping[int, Seed], me: str) -> HeldEpoch:
    """The epoch of ``row`` from its verified certificate and from seeds that are checked against it now; in any thread.
    Raises as :func:`load_epoch`."""
    try:
        plan = certificate.plan
        if (plan.key_id, plan.epoch, plan.ceremony_id) != (row.key_id, row.epoch, row.ceremony_id):
            raise RefusedError(
                Reason.CEREMONY,
                "the stored certificate is of another epoch",
                expected=f"{row.key_id} epoch {row.epoch}",
                actual=f"{plan.key_id} epoch {plan.epoch}",
            )
        check_seeds(certificate, me, seeds)
    except KeyquorumError as error:
        raise _named(error, row) from None
    return HeldEpoch(certificate, seeds, retired_at=row.retired_at)


def _named(error: KeyquorumError, row: EpochRow) -> KeyquorumError:
    error.message = f"key {row.key_id} epoch {row.epoch}: {error.message}"
    error.details |= {"key_id": row.key_id, "epoch": str(row.epoch)}
    return error
