"""Keys of the cluster: made by a ceremony that an operator orders, known by certificates that all custodians signed."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass

import grpc.aio

from keyquorum.profile import Profile
from keyquorum.progress import Progress, ProgressCallback, Stage
from keyquorum.session import Connection
from keyquorum_core.ceremony import (
    CERTIFICATE_TYPE,
    MAX_CERTIFICATE,
    PLAN_TYPE,
    CeremonyPlan,
    EpochCertificate,
    new_ceremony_id,
)
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.sealing import suite_available
from keyquorum_core.signing import open_multi, sign
from keyquorum_protos.v1 import coordinator_pb2 as pb

__all__ = ["KeyRecord", "create_key", "get_key", "list_keys"]

_CEREMONY_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One epoch of a key. Everything but ``state`` comes from its verified certificate."""

    key_id: str
    epoch: int
    suite: str
    ceremony_id: str
    created_at: int
    """Unix seconds, by the operator's clock."""
    custodians: tuple[str, ...]
    """Who signed the certificate: the whole committee."""
    seed_count: int
    certificate_sha256: str
    policy: KeyPolicy
    state: str
    """The coordinator's word."""

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return {
            "key_id": self.key_id,
            "epoch": self.epoch,
            "suite": self.suite,
            "ceremony_id": self.ceremony_id,
            "created_at": self.created_at,
            "custodians": list(self.custodians),
            "seed_count": self.seed_count,
            "certificate_sha256": self.certificate_sha256,
            "policy": self.policy.as_dict(),
            "state": self.state,
        }

    def check_usable_by(self, owner: LoadedKeys) -> None:
        """Raise :class:`RefusedError` unless the key can be released to this owner: custodians refuse another suite."""
        if owner.recipient.suite != self.suite:
            raise RefusedError(
                Reason.RECIPIENT,
                f"key {self.key_id} is sealed to recipients of another suite than {owner.name}'s",
                expected=self.suite,
                actual=owner.recipient.suite,
                next_step=f"Make an owner's keys for it: keyquorum identity create NAME --suite {self.suite}",
            )


def _record(message: pb.Key, profile: Profile) -> KeyRecord:
    certificate = _open_certificate(message.certificate, profile)
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
        custodians=profile.quorum.ids,
        seed_count=len(certificate.commitments),
        certificate_sha256=certificate.digest,
        policy=plan.policy,
        state=message.state[:32],
    )


def _open_certificate(envelope: bytes, profile: Profile) -> EpochCertificate:
    """A certificate signed by every custodian of the pinned roster, for its cluster and its own quorum rule.

    The roster's digest may be an earlier version's: what matters is that committee and rule are today's.
    """
    signers = {each.id: each.identity for each in profile.roster.custodians}
    payload, _ = open_multi(
        envelope, CERTIFICATE_TYPE, signers, len(signers), "epoch certificate", max_bytes=MAX_CERTIFICATE
    )
    certificate = EpochCertificate.parse(payload)
    plan = certificate.plan
    if plan.cluster != profile.cluster:
        raise RefusedError(
            Reason.CEREMONY, "the certificate is another cluster's", expected=profile.cluster, actual=plan.cluster
        )
    if plan.quorum != profile.quorum:
        raise RefusedError(
            Reason.QUORUM_RULE,
            "the key was made for another quorum than the roster's",
            expected=profile.quorum.words(),
            actual=plan.quorum.words(),
        )
    return certificate


async def get_key(connection: Connection, profile: Profile, key_id: str) -> KeyRecord:
    """The named key's current epoch. Raises :class:`RefusedError` where its certificate doesn't verify."""
    message = await connection.unary(connection.keys.Get, pb.GetKeyRequest(key_id=key_id))
    if message.key_id != key_id:
        raise RefusedError(
            Reason.UNKNOWN_KEY, "the coordinator gave another key", expected=key_id, actual=message.key_id[:128]
        )
    return _record(message, profile)


async def list_keys(connection: Connection, profile: Profile) -> tuple[KeyRecord, ...]:
    """All keys. One whose certificate doesn't verify is an error, not an omission."""
    message = await connection.unary(connection.keys.List, pb.ListKeysRequest())
    return tuple(_record(each, profile) for each in message.keys)


async def create_key(
    connection: Connection,
    profile: Profile,
    operator: LoadedKeys,
    key_id: str,
    *,
    suite: str,
    policy: KeyPolicy,
    now: int,
    progress: ProgressCallback,
) -> KeyRecord:
    """Order the generate ceremony and see it through; a broken connection goes on with the same plan.

    Raises :class:`RefusedError` (``UNKNOWN_OPERATOR``) where the roster doesn't name this operator, and what the
    coordinator reports, naming custodian, step and cause.
    """
    if operator.identity.public not in profile.roster.operator_identities().values():
        raise RefusedError(
            Reason.UNKNOWN_OPERATOR,
            "the roster doesn't name this operator, so no custodian would follow",
            expected=", ".join(sorted(profile.roster.operator_identities())),
            actual=f"{operator.name} ({operator.identity.public.fingerprint[:16]})",
        )
    if not suite_available(suite):
        raise RefusedError(Reason.UNSUPPORTED, "this installation doesn't know the sealing suite", actual=suite[:64])
    plan = CeremonyPlan(
        ceremony_id=new_ceremony_id(),
        key_id=key_id,
        epoch=1,
        suite=suite,
        cluster=profile.cluster,
        roster_digest=profile.roster.digest,
        quorum=profile.quorum,
        created_at=now,
        policy=policy,
    )
    request = pb.CreateKeyRequest(plan=sign(operator.identity, PLAN_TYPE, plan.to_payload()))
    backoff = connection.backoff()
    while True:
        try:
            certificate = await _run_ceremony(connection, request, progress)
            break
        except grpc.aio.AioRpcError as error:
            if not (connection.transient(error) and await backoff.wait()):
                raise connection.error(error) from None
    made = _open_certificate(certificate, profile)
    if made.plan != plan:
        raise RefusedError(
            Reason.CEREMONY, "the certificate is for another plan", expected=plan.digest, actual=made.plan.digest
        )
    message = pb.Key(key_id=key_id, epoch=plan.epoch, state="active", certificate=certificate)
    return _record(message, profile)


async def _run_ceremony(connection: Connection, request: pb.CreateKeyRequest, progress: ProgressCallback) -> bytes:
    async with aclosing(connection.stream(connection.keys.Create, request, timeout=_CEREMONY_SECONDS)) as events:
        async for event in events:
            progress(Progress(Stage.CEREMONY, event.done, event.total, f"{event.step} {event.custodian}".strip()[:64]))
            if event.certificate:
                return event.certificate
    raise RefusedError(Reason.CEREMONY, "the ceremony ended without a certificate")
