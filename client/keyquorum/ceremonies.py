"""Ceremonies as an operator orders them: a signed plan, seen through to its end, whoever has to be waited for.

Plans go by certificates that were verified first, so that a coordinator cannot have an operator sign for another epoch
than the one shown. What comes back is verified as well: a certificate by all who made the epoch, a receipt by the
custodian that was rebuilt, receipts by all that erased.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import grpc.aio

from keyquorum.keys import KeyRecord, get_key, open_certificate, record_of
from keyquorum.profile import Profile
from keyquorum.progress import Progress, ProgressCallback, Stage
from keyquorum.session import Connection
from keyquorum_core.ceremony_plan import PLAN_TYPE, CeremonyPlan, new_ceremony_id
from keyquorum_core.ceremony_states import MAKING, Kind
from keyquorum_core.destruction import DESTRUCTION_RECEIPT_TYPE, DestructionReceipt, check_receipts
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.rebuilding import REBUILD_RECEIPT_TYPE, RebuildReceipt, check_rebuilt
from keyquorum_core.sealing import suite_available
from keyquorum_core.signing import open_envelope, peek_payload, sign_many
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.wire.errors import from_status

__all__ = ["Ceremonies", "CeremonyRecord", "Ended", "ceremony_record"]

_CEREMONY_SECONDS = 8 * 86400.0  # custodians' operators may be asleep


@dataclass(frozen=True, slots=True)
class CeremonyRecord:
    """Where a ceremony is, by the coordinator's word."""

    ceremony_id: str
    kind: str
    key_id: str
    epoch: int
    step: str
    custodians: tuple[str, ...]
    """Who takes part, once that is settled."""
    waiting: tuple[str, ...]
    """Whose own operators have to approve."""
    error: KeyquorumError | None
    """Why it was given up, or what keeps it where it is: custodian, step and cause."""
    created_at: int
    updated_at: int

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return {
            "ceremony_id": self.ceremony_id,
            "kind": self.kind,
            "key_id": self.key_id,
            "epoch": self.epoch,
            "step": self.step,
            "custodians": list(self.custodians),
            "waiting": list(self.waiting),
            "error": self.error.as_dict() if self.error is not None else None,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
        }


@dataclass(frozen=True, slots=True)
class Ended:
    """How a ceremony ended well. ``key`` is the epoch it made or rebuilt (None: destroyed), ``receipts`` the custodians
    that signed one, ``note`` what the coordinator adds."""

    ceremony_id: str
    kind: str
    key_id: str
    epoch: int
    key: KeyRecord | None
    receipts: tuple[str, ...]
    wrong: Mapping[str, int]
    """By custodian, how many seeds it gave that were not the certified ones."""
    note: str

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return {
            "ceremony_id": self.ceremony_id,
            "kind": self.kind,
            "key_id": self.key_id,
            "epoch": self.epoch,
            "key": self.key.as_dict() if self.key is not None else None,
            "receipts": list(self.receipts),
            "wrong": dict(self.wrong),
            "note": self.note,
        }


class Ceremonies:
    """What operators may order over one connection. ``operators`` sign together; the first is the profile's own."""

    def __init__(self, connection: Connection, profile: Profile, operators: Sequence[LoadedKeys]) -> None:
        self._connection = connection
        self._profile = profile
        self._operators = tuple(operators)
        known = profile.roster.operator_identities()
        for operator in operators:
            if operator.identity.public not in known.values():
                raise RefusedError(
                    Reason.UNKNOWN_OPERATOR,
                    "the roster doesn't name this operator, so no custodian would follow",
                    expected=", ".join(sorted(known)),
                    actual=f"{operator.name} ({operator.identity.public.fingerprint[:16]})",
                )

    # -- ordering -----------------------------------------------------------------------------------------------------

    async def generate(
        self, key_id: str, *, suite: str, policy: KeyPolicy, now: int, progress: ProgressCallback
    ) -> KeyRecord:
        """A new key. Raises what the coordinator reports, naming custodian, step and cause."""
        if not suite_available(suite):
            raise RefusedError(
                Reason.UNSUPPORTED, "this installation doesn't know the sealing suite", actual=suite[:64]
            )
        plan = self._plan(Kind.GENERATE, key_id, 1, suite, policy, now)
        return await self._made(plan, progress)

    async def rotate(
        self,
        key_id: str,
        *,
        now: int,
        progress: ProgressCallback,
        policy: KeyPolicy | None = None,
        renew: bool = False,
    ) -> KeyRecord:
        """The key's next epoch, out of the present one; with ``renew`` anew, for the roster's committee and rule."""
        before = await get_key(self._connection, self._profile, key_id)
        kind = Kind.GENERATE if renew else Kind.ROTATE
        if not renew and before.quorum != self._profile.quorum:
            raise RefusedError(
                Reason.QUORUM_RULE,
                "the roster's committee or rule is not the key's, so its next epoch takes nothing from this one",
                expected=before.quorum.words(),
                actual=self._profile.quorum.words(),
                next_step=f"keyquorum key rotate {key_id} --renew; each custodian's operator approves it",
            )
        plan = self._plan(
            kind,
            key_id,
            before.epoch + 1,
            before.suite,
            policy or before.policy,
            now,
            certificate=before.certificate_sha256,
        )
        return await self._made(plan, progress)

    async def rebuild(
        self,
        key_id: str,
        custodian: str,
        *,
        now: int,
        progress: ProgressCallback,
        epoch: int = 0,
        replace: bool = False,
    ) -> Ended:
        """Have ``custodian`` get its seeds of an epoch (the newest, by default) from its co-holders.

        ``replace``: it is another than the one that the epoch was certified with, so each custodian's operator
        approves.
        """
        self._profile.roster.custodian(custodian)
        of = await get_key(self._connection, self._profile, key_id, epoch or None)
        plan = self._plan(
            Kind.REPLACE if replace else Kind.REPAIR,
            key_id,
            of.epoch,
            of.suite,
            of.policy,
            now,
            certificate=of.certificate_sha256,
            target=custodian,
            of=of,
        )
        event = await self._run(plan, progress)
        receipts = await self._receipts(plan)
        identity = self._profile.roster.custodian(custodian).identity
        payload = open_envelope(receipts.get(custodian, b""), REBUILD_RECEIPT_TYPE, identity, "receipt")
        receipt = RebuildReceipt.parse(payload)
        check_rebuilt(plan, receipt)
        key = await get_key(self._connection, self._profile, key_id, of.epoch)
        return Ended(plan.ceremony_id, plan.kind, key_id, of.epoch, key, (custodian,), receipt.wrong, event.note[:500])

    async def destroy(self, key_id: str, epoch: int, *, now: int, progress: ProgressCallback) -> Ended:
        """Have an epoch erased everywhere, once each custodian's operator approved. There is no way back."""
        of = await get_key(self._connection, self._profile, key_id, epoch or None)
        plan = self._plan(
            Kind.DESTROY, key_id, of.epoch, of.suite, of.policy, now, certificate=of.certificate_sha256, of=of
        )
        event = await self._run(plan, progress)
        custodians = {each.id: each.identity for each in self._profile.roster.custodians}
        receipts: dict[str, DestructionReceipt] = {}
        for name, envelope in (await self._receipts(plan)).items():
            identity = self._profile.roster.custodian(name).identity
            payload = open_envelope(envelope, DESTRUCTION_RECEIPT_TYPE, identity, f"the receipt of {name}")
            receipts[name] = DestructionReceipt.parse(payload)
        check_receipts(plan, custodians, receipts)
        return Ended(plan.ceremony_id, plan.kind, key_id, of.epoch, None, tuple(sorted(receipts)), {}, event.note[:500])

    # -- looking ------------------------------------------------------------------------------------------------------

    async def records(self, key_id: str = "") -> tuple[CeremonyRecord, ...]:
        """All ceremonies, or those of one key; the latest first. Their plans' signatures are not looked at."""
        request = pb.ListCeremoniesRequest(key_id=key_id)
        message = await self._connection.unary(self._connection.keys.ListCeremonies, request)
        return tuple(ceremony_record(each) for each in message.ceremonies)

    async def cancel(self, ceremony_id: str, why: str = "") -> CeremonyRecord:
        """Give a ceremony up, before the step from which it can only go forward."""
        request = pb.CancelCeremonyRequest(ceremony_id=ceremony_id, why=why)
        return ceremony_record(await self._connection.unary(self._connection.keys.CancelCeremony, request))

    # -- what they share ----------------------------------------------------------------------------------------------

    def _plan(
        self,
        kind: Kind,
        key_id: str,
        epoch: int,
        suite: str,
        policy: KeyPolicy,
        now: int,
        *,
        certificate: str = "",
        target: str = "",
        of: KeyRecord | None = None,
    ) -> CeremonyPlan:
        return CeremonyPlan(
            ceremony_id=new_ceremony_id(),
            key_id=key_id,
            epoch=epoch,
            suite=suite,
            cluster=self._profile.cluster,
            roster_digest=self._profile.roster.digest,
            quorum=of.quorum if of is not None else self._profile.quorum,
            created_at=now,
            policy=policy,
            kind=kind,
            certificate=certificate,
            target=target,
        )

    def _check_signers(self, plan: CeremonyPlan) -> None:
        needed = self._profile.roster.operator_threshold if plan.kind in (Kind.DESTROY, Kind.REPLACE) else 1
        if len(self._operators) < needed:
            raise RefusedError(
                Reason.SIGNATURE_MISSING,
                f"to {plan.kind} takes more operators than one",
                expected=f"{needed} operators of the roster",
                actual=", ".join(each.name for each in self._operators),
                next_step="Add the others' key files with --operator-key",
            )

    async def _made(self, plan: CeremonyPlan, progress: ProgressCallback) -> KeyRecord:
        event = await self._run(plan, progress)
        made = open_certificate(event.certificate, self._profile)
        if made.plan != plan:
            raise RefusedError(
                Reason.CEREMONY, "the certificate is for another plan", expected=plan.digest, actual=made.plan.digest
            )
        message = pb.Key(key_id=plan.key_id, epoch=plan.epoch, state="active", certificate=event.certificate)
        message.stale.extend(made.absent)
        return record_of(message, made)

    async def _run(self, plan: CeremonyPlan, progress: ProgressCallback) -> pb.CeremonyEvent:
        """Order the ceremony and see it through; a broken connection goes on with the same plan."""
        self._check_signers(plan)
        envelope = sign_many([each.identity for each in self._operators], PLAN_TYPE, plan.to_payload())
        request = pb.RunCeremonyRequest(plan=envelope)
        connection = self._connection
        backoff = connection.backoff()
        while True:
            try:
                return await self._follow(plan, request, progress)
            except grpc.aio.AioRpcError as error:
                if not (connection.transient(error) and await backoff.wait()):
                    raise connection.error(error) from None

    async def _follow(
        self, plan: CeremonyPlan, request: pb.RunCeremonyRequest, progress: ProgressCallback
    ) -> pb.CeremonyEvent:
        connection = self._connection
        stream = connection.stream(connection.keys.RunCeremony, request, timeout=_CEREMONY_SECONDS)
        async with aclosing(stream) as events:
            async for event in events:
                waiting = ", ".join(name[:32] for name in event.waiting[:64])
                detail = f"waits for the operators of {waiting}" if waiting else event.custodian or event.note
                progress(Progress(Stage.CEREMONY, event.done, event.total, detail[:200], event.step[:16]))
                if event.step == "done" and (event.certificate or plan.kind not in MAKING):
                    return event
        raise RefusedError(Reason.CEREMONY, "the ceremony ended without its outcome")

    async def _receipts(self, plan: CeremonyPlan) -> dict[str, bytes]:
        request = pb.ListCeremoniesRequest(key_id=plan.key_id)
        message = await self._connection.unary(self._connection.keys.ListCeremonies, request)
        found = next((each for each in message.ceremonies if each.ceremony_id == plan.ceremony_id), None)
        if found is None:
            raise RefusedError(Reason.CEREMONY, "the coordinator shows no receipts", expected=plan.ceremony_id)
        return {each.custodian: each.receipt for each in found.receipts}


def ceremony_record(message: pb.Ceremony) -> CeremonyRecord:
    """What the coordinator says of a ceremony, as far as its plan bears it out."""
    kind = message.kind
    if kind not in list(Kind):
        raise MalformedError(Reason.CEREMONY, "a ceremony of a kind that isn't known", actual=kind[:16])
    try:  # the plan says what it is about; the coordinator's members beside it must agree
        plan = CeremonyPlan.parse(peek_payload(message.plan, PLAN_TYPE, "ceremony plan"))
    except KeyquorumError as error:
        raise MalformedError(Reason.CEREMONY, "a ceremony's plan cannot be read", actual=error.message) from None
    if (plan.ceremony_id, plan.kind, plan.key_id, plan.epoch) != (
        message.ceremony_id,
        kind,
        message.key_id,
        message.epoch,
    ):
        raise RefusedError(
            Reason.CEREMONY, "the coordinator shows another plan than it says", expected=plan.ceremony_id
        )
    return CeremonyRecord(
        ceremony_id=plan.ceremony_id,
        kind=str(plan.kind),
        key_id=plan.key_id,
        epoch=plan.epoch,
        step=message.step[:16],
        custodians=tuple(name[:32] for name in message.present[:64]),
        waiting=tuple(name[:32] for name in message.waiting[:64]),
        error=from_status(message.error) if message.HasField("error") else None,
        created_at=message.created_at,
        updated_at=message.updated_at,
    )
