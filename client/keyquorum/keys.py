"""Keys of the cluster, each epoch known by a certificate that those who made it signed."""

from __future__ import annotations

from dataclasses import dataclass

from keyquorum.profile import Profile
from keyquorum.session import Connection
from keyquorum_core.ceremony import EpochCertificate
from keyquorum_core.certified import open_certificate_of
from keyquorum_core.errors import Reason, RefusedError, StateError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.names import MAX_INTEGER
from keyquorum_core.quorum import Quorum
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["KeyRecord", "get_key", "list_epochs", "list_keys", "open_certificate", "record"]


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One epoch of a key. Everything but ``state``, ``retired_at``, ``ended_at`` and ``stale`` comes from its verified
    certificate."""

    key_id: str
    epoch: int
    suite: str
    ceremony_id: str
    created_at: int
    """Unix seconds, by the clock of whoever ordered the epoch."""
    custodians: tuple[str, ...]
    """Who signed the certificate: the committee, but for the absent."""
    absent: tuple[str, ...]
    """Who was missing when the epoch was made, and says so in the certificate."""
    seed_count: int
    quorum: Quorum
    certificate_sha256: str
    policy: KeyPolicy
    state: str
    """The coordinator's word, as the next three."""
    retired_at: int = 0
    ended_at: int = 0
    stale: tuple[str, ...] = ()
    """Custodians that lack the epoch and are to be repaired."""
    roster_digest: str = ""
    """Of the roster that the epoch was made under."""

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return {
            "key_id": self.key_id,
            "epoch": self.epoch,
            "suite": self.suite,
            "ceremony_id": self.ceremony_id,
            "created_at": self.created_at,
            "custodians": list(self.custodians),
            "absent": list(self.absent),
            "seed_count": self.seed_count,
            "quorum": self.quorum.rule,
            "certificate_sha256": self.certificate_sha256,
            "policy": self.policy.as_dict(),
            "state": self.state,
            "retired_at": self.retired_at,
            "ended_at": self.ended_at,
            "stale": list(self.stale),
            "roster_sha256": self.roster_digest,
        }

    def check_usable_by(self, owner: LoadedKeys, profile: Profile) -> None:
        """Raise :class:`RefusedError` unless new jobs can run on the key and it can be released to this owner."""
        if owner.recipient.suite != self.suite:
            raise RefusedError(
                Reason.RECIPIENT,
                f"key {self.key_id} is sealed to recipients of another suite than {owner.name}'s",
                expected=self.suite,
                actual=owner.recipient.suite,
                next_step=f"Make an owner's keys for it: keyquorum identity create NAME --suite {self.suite}",
            )
        if self.quorum != profile.quorum:
            raise RefusedError(
                Reason.QUORUM_RULE,
                "the key was made for another quorum than the roster's",
                expected=profile.quorum.words(),
                actual=self.quorum.words(),
                next_step=f"Have an operator make its next epoch: keyquorum key rotate {self.key_id} --renew",
            )
        if self.state == "destroyed":
            raise RefusedError(
                Reason.KEY_STATE,
                f"key {self.key_id} epoch {self.epoch} was destroyed",
                expected="active",
                actual=self.state,
            )


def record(message: pb.Key, profile: Profile) -> KeyRecord:
    """What the coordinator says of an epoch, as far as its certificate bears it out."""
    return record_of(message, open_certificate(message.certificate, profile))


def record_of(message: pb.Key, certificate: EpochCertificate) -> KeyRecord:
    """As :func:`record`, by the message's certificate, which was opened."""
    plan = certificate.plan
    if (message.key_id, message.epoch) != (plan.key_id, plan.epoch):
        raise RefusedError(
            Reason.UNKNOWN_KEY if message.key_id != plan.key_id else Reason.EPOCH,
            "the coordinator shows the certificate of another key or epoch",
            expected=f"{message.key_id[:128]}, epoch {message.epoch}",
            actual=f"{plan.key_id}, epoch {plan.epoch}",
        )
    return KeyRecord(
        key_id=plan.key_id,
        epoch=plan.epoch,
        suite=plan.suite,
        ceremony_id=plan.ceremony_id,
        created_at=plan.created_at,
        custodians=certificate.signers,
        absent=certificate.absent,
        seed_count=len(certificate.commitments),
        quorum=plan.quorum,
        certificate_sha256=certificate.digest,
        policy=plan.policy,
        state=message.state[:32],
        retired_at=message.retired_at,
        ended_at=message.ended_at,
        stale=tuple(name[:32] for name in message.stale[:64]),
        roster_digest=plan.roster_digest,
    )


def open_certificate(envelope: bytes, profile: Profile) -> EpochCertificate:
    """A certificate signed by everyone that it does not name as absent, for the profile's cluster.

    Who that is, the roster says that its plan names: the pinned one, or an earlier one that the pinned one vouches for.
    A certificate under a roster that is not at hand is verified against the pinned one's custodians of the same ids.
    """
    certificate = open_certificate_of(envelope, profile.roster_of)
    cluster = certificate.plan.cluster
    if cluster != profile.cluster:
        raise RefusedError(
            Reason.CEREMONY, "the certificate is another cluster's", expected=profile.cluster, actual=cluster
        )
    return certificate


async def get_key(connection: Connection, profile: Profile, key_id: str, epoch: int | None = None) -> KeyRecord:
    """The named key's newest epoch, or this one. Raises :class:`RefusedError` where its certificate doesn't verify, or
    is another's than what was asked for; :class:`StateError` (``UNKNOWN_KEY``, ``EPOCH``) where there is none."""
    if epoch is not None and not 0 < epoch <= MAX_INTEGER:
        raise StateError(Reason.EPOCH, f"key {key_id} has no such epoch", expected=f"1…{MAX_INTEGER}", actual=epoch)
    message = await connection.unary(connection.keys.Get, pb.GetKeyRequest(key_id=key_id, epoch=epoch or 0))
    _check_id(message, key_id)
    if epoch is not None and message.epoch != epoch:
        raise RefusedError(
            Reason.EPOCH, "the coordinator gave another epoch of the key", expected=epoch, actual=message.epoch
        )
    return record(message, profile)


async def list_epochs(
    connection: Connection, profile: Profile, key_id: str, *, patient: bool = True
) -> tuple[KeyRecord, ...]:
    """All epochs of a key, newest first. One whose certificate doesn't verify is an error, not an omission."""
    message = await connection.unary(connection.keys.ListEpochs, pb.GetKeyRequest(key_id=key_id), patient=patient)
    for each in message.keys:
        _check_id(each, key_id)
    return tuple(record(each, profile) for each in message.keys)


async def list_keys(connection: Connection, profile: Profile) -> tuple[KeyRecord, ...]:
    """The newest epoch of every key. One whose certificate doesn't verify is an error, not an omission."""
    message = await connection.unary(connection.keys.List, pb.ListKeysRequest())
    return tuple(record(each, profile) for each in message.keys)


def _check_id(message: pb.Key, key_id: str) -> None:
    if message.key_id != key_id:
        raise RefusedError(
            Reason.UNKNOWN_KEY, "the coordinator gave another key", expected=key_id, actual=message.key_id[:128]
        )
