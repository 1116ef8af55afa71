"""The active epochs, opened in memory: what releases are made from.

An epoch enters only through :func:`load_epoch`, which checks every seed against the epoch's certificate first (DESIGN
§9: start-up checks what is on disk). What is kept of a seed is its HMAC key schedule (RFC 2104 §4): a contribution then
takes under a microsecond, a quarter of what keying HMAC anew takes, and OpenSSL overwrites the schedule when
:meth:`Epochs.wipe` lets go of it. Copies that the interpreter made on the way are beyond reach.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from keyquorum_core import ceremony
from keyquorum_core.ceremony import EpochCertificate
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.roster import Roster
from keyquorum_core.signing import open_multi, peek_payload
from keyquorum_custodian.keystore import EpochRow, Keystore

__all__ = ["Epochs", "HeldEpoch", "load_epoch", "open_certificate"]

CONTRIBUTION_LABEL: Final = b"keyquorum/v1/contribution"
"""As in :mod:`keyquorum_core.derivation`; a test holds the two together."""


@dataclass(frozen=True, slots=True)
class HeldEpoch:
    """One active epoch of a key and this custodian's seeds of it."""

    key_id: str
    epoch: int
    suite: str
    certificate_digest: str
    indices: tuple[int, ...]
    policy: KeyPolicy
    _keyed: dict[int, HMAC] = field(repr=False)

    def contributions(self, context: bytes) -> dict[int, bytes]:
        """One contribution per seed, for a 32-byte context: :func:`keyquorum_core.derivation.contributions`."""
        message = CONTRIBUTION_LABEL + context
        out = {}
        for index, keyed in self._keyed.items():
            mac = keyed.copy()
            mac.update(message)
            out[index] = mac.finalize()
        return out

    def wipe(self) -> None:
        self._keyed.clear()


class Epochs:
    """All active epochs of this custodian, by key and number."""

    def __init__(self, keystore: Keystore) -> None:
        self._keystore = keystore
        self._held: dict[tuple[str, int], HeldEpoch] = {}

    def add(self, held: HeldEpoch) -> None:
        """From now on releases are made from it."""
        self._held[held.key_id, held.epoch] = held

    def all(self) -> tuple[HeldEpoch, ...]:
        return tuple(self._held.values())

    def active(self, key_id: str, epoch: int) -> HeldEpoch:
        """Raises ``UNKNOWN_KEY``, ``EPOCH`` (another epoch of the key is active) or ``KEY_STATE`` (not active yet)."""
        held = self._held.get((key_id, epoch))
        if held is not None:
            return held
        others = sorted(number for key, number in self._held if key == key_id)
        underway = self._keystore.live_ceremony(key_id, epoch)
        if underway is not None:
            raise StateError(
                Reason.KEY_STATE,
                f"epoch {epoch} of key {key_id} is not active",
                expected="active",
                actual=underway.state,
                next_step="Finish its ceremony.",
            )
        if others:
            raise RefusedError(
                Reason.EPOCH,
                f"key {key_id} has no such active epoch",
                expected=", ".join(str(number) for number in others),
                actual=epoch,
            )
        raise StateError(
            Reason.UNKNOWN_KEY, "no such key", expected="a key whose seeds this custodian holds", actual=key_id
        )

    def wipe(self) -> None:
        """Overwrite and forget every seed."""
        for held in self._held.values():
            held.wipe()
        self._held.clear()


def open_certificate(envelope: bytes, keystore: Keystore) -> tuple[EpochCertificate, bytes]:
    """An epoch certificate and its exact payload, signed by every custodian of the roster that its plan names.

    That roster was accepted once by this custodian, and is known by its digest. Raises ``SIGNATURE…``, ``CEREMONY``, or
    ``ROSTER`` for a roster never seen here.
    """
    what = "epoch certificate"
    limit = ceremony.MAX_CERTIFICATE
    claimed = EpochCertificate.parse(peek_payload(envelope, ceremony.CERTIFICATE_TYPE, what, limit))
    digest = claimed.plan.roster_digest
    stored = keystore.roster_payload(digest)
    if stored is None or hashlib.sha256(stored).hexdigest() != digest:
        raise RefusedError(
            Reason.ROSTER,
            "the epoch certificate names a roster that this custodian never served under",
            expected="a roster it accepted",
            actual=digest,
        )
    signers = {custodian.id: custodian.identity for custodian in Roster.parse(stored).custodians}
    payload, signed = open_multi(envelope, ceremony.CERTIFICATE_TYPE, signers, len(signers), what, limit)
    return ceremony.check_certificate(payload, claimed.plan, claimed.plan.quorum, signed), payload


def load_epoch(keystore: Keystore, row: EpochRow, me: str) -> HeldEpoch:
    """Open an active epoch's seeds and check each against the certificate.

    Raises the error of the check that failed, naming key and epoch, and the index where there is one.
    """
    try:
        certificate, _ = open_certificate(row.certificate, keystore)
        plan = certificate.plan
        if (plan.key_id, plan.epoch, plan.ceremony_id) != (row.key_id, row.epoch, row.ceremony_id):
            raise RefusedError(
                Reason.CEREMONY,
                "the stored certificate is of another epoch",
                expected=f"{row.key_id} epoch {row.epoch}",
                actual=f"{plan.key_id} epoch {plan.epoch}",
            )
        seeds = keystore.seeds(row)
        ceremony.check_seeds(certificate, me, seeds)
    except KeyquorumError as error:
        error.message = f"key {row.key_id} epoch {row.epoch}: {error.message}"
        error.details |= {"key_id": row.key_id, "epoch": str(row.epoch)}
        raise
    return HeldEpoch(
        key_id=row.key_id,
        epoch=row.epoch,
        suite=plan.suite,
        certificate_digest=certificate.digest,
        indices=tuple(seeds),
        policy=plan.policy,
        _keyed={index: HMAC(seed, SHA256()) for index, seed in seeds.items()},
    )
