"""*repair* and *replace* as one custodian goes through them: as the one that is rebuilt, or as a co-holder (DESIGN §9).

The one that is rebuilt believes nobody: it takes, seed by seed, what the epoch's certificate commits to, and stores all
of it or nothing. A co-holder gives only to the key that the roster in force names, and only what that custodian holds
by the quorum anyway; when that key is another than the one the epoch was certified with, it is a *replace*, which waits
for this custodian's own operator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from keyquorum_core.ceremony import EpochCertificate, refused
from keyquorum_core.ceremony_plan import CeremonyPlan, check_plan
from keyquorum_core.ceremony_states import MAKING, Kind, State, Step
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, StateError
from keyquorum_core.parts import SealedPart, shared_indices
from keyquorum_core.rebuilding import (
    GIFT_TYPE,
    REBUILD_RECEIPT_TYPE,
    REBUILD_REQUEST_TYPE,
    Gift,
    RebuildReceipt,
    RebuildRequest,
    check_gift,
    check_request,
    choose,
    lacking_error,
    open_gift,
    seal_gift,
)
from keyquorum_core.transcript import transcript
from keyquorum_custodian.ceremony_seat import CeremonySeat
from keyquorum_custodian.epochs import hold
from keyquorum_custodian.seed_records import (
    ACTIVE,
    DESTROYED,
    RETIRED,
    Accusation,
    CeremonyRow,
    EpochRow,
    cannot_give,
    plain,
)

__all__ = ["Rebuilding"]


class Rebuilding:
    """One custodian's part in rebuilding custodians."""

    def __init__(self, seat: CeremonySeat) -> None:
        self._seat = seat

    # -- propose ---------------------------------------------------------------------------------------------------

    async def check(self, plan: CeremonyPlan, envelope: bytes) -> None:
        """Raise what speaks against a new plan: ``CEREMONY``, ``KEY_STATE``, ``EXISTS``, ``ROSTER``, ``SIGNATURE…``.

        ``envelope`` is the certificate that the plan goes by.
        """
        seat = self._seat
        certificate = await seat.certificates.open(envelope, seat.work)
        check_plan(plan, cluster=seat.roster.cluster, roster_digest=seat.roster_digest, quorum=certificate.plan.quorum)
        for what, expected, actual in (
            ("certificate", plan.certificate, certificate.digest),
            ("key", plan.key_id, certificate.plan.key_id),
            ("epoch", plan.epoch, certificate.plan.epoch),
            ("suite", plan.suite, certificate.plan.suite),
        ):
            if expected != actual:
                raise RefusedError(
                    Reason.CEREMONY, f"ceremony plan is for another {what}", expected=expected, actual=actual
                )
        row = seat.keystore.epoch(plan.key_id, plan.epoch)
        if plan.target == seat.me:
            await self._check_lacks(plan, row, certificate)
        else:
            await self._check_holds(plan, row, certificate)

    async def _check_lacks(self, plan: CeremonyPlan, row: EpochRow | None, certificate: EpochCertificate) -> None:
        if row is None:
            return
        held = await self._seat.certificate_of(row)
        if row.state == DESTROYED:
            raise _destroyed(row)
        if held.digest != certificate.digest:
            raise refused(
                "this custodian holds that epoch by another certificate: the epoch was made twice",
                [self._seat.me],
                expected=held.digest,
                actual=certificate.digest,
            )
        raise StateError(
            Reason.EXISTS,
            f"this custodian holds epoch {plan.epoch} of key {plan.key_id}: there is nothing to rebuild",
            expected="an epoch that it lacks",
            actual=row.state,
        )

    async def _check_holds(self, plan: CeremonyPlan, row: EpochRow | None, certificate: EpochCertificate) -> None:
        seat = self._seat
        if row is None:
            raise StateError(
                Reason.KEY_STATE,
                f"this custodian lacks epoch {plan.epoch} of key {plan.key_id} itself",
                expected="an epoch that it holds",
                actual="none",
                details={"stale": seat.me},
            )
        if row.state == DESTROYED:
            raise _destroyed(row)
        seat.standing.require_served(row.key_id, row.epoch)
        if seat.keystore.token_seeds is not None:
            raise cannot_give()
        held = (await seat.certificate_of(row)).digest
        if held != certificate.digest:
            raise refused("this custodian holds that epoch by another certificate", [seat.me], expected=held)
        now = seat.roster.custodian(plan.target)
        then = seat.certificates.certified(certificate, plan.target)
        expected = Kind.REPAIR if then is not None and now.has_keys_of(then) else Kind.REPLACE
        if plan.kind is not expected:
            raise RefusedError(
                Reason.CEREMONY,
                f"{plan.target} is {'the' if expected is Kind.REPAIR else 'not the'} custodian that the epoch was"
                " certified with",
                expected=f"a plan to {expected} it",
                actual=f"a plan to {plan.kind} it",
            )

    async def propose(self, row: CeremonyRow, plan: CeremonyPlan, envelope: bytes, *, fresh: bool) -> bytes:
        """Agree; the one to be rebuilt signs its request. ``fresh``: the row is not stored yet."""
        seat = self._seat
        answer = b""
        if plan.target == seat.me:
            request = RebuildRequest(plan.digest, seat.me).to_payload()
            answer = await seat.work(seat.sign, REBUILD_REQUEST_TYPE, request)
        with seat.keystore.transaction():
            if fresh:
                seat.keystore.insert_ceremony(row, seat.now())
            else:
                seat.keystore.move_ceremony(row.ceremony_id, State.PROPOSED, seat.now())
            seat.keystore.save_answer(row.ceremony_id, Step.PROPOSE, hashlib.sha256(row.plan).digest(), answer)
        return answer

    # -- give, restore ---------------------------------------------------------------------------------------------

    async def give(self, ceremony_id: str, request: bytes) -> tuple[bytes, bytes]:
        """A co-holder's gift: the signed statement (DSSE envelope) and the sealed blob it names.

        ``request`` is the target's. A repeated call seals anew: nothing depends on which blob arrives. Raises
        ``NOT_FOUND``, ``STATE``, ``KEY_STATE``, ``CEREMONY``, ``SIGNATURE…``, ``STORAGE``.
        """
        seat = self._seat
        row = seat.row(ceremony_id)
        plan = CeremonyPlan.parse(row.plan) if row.state is State.GIVEN else seat.plan(row, State.GIVEN)
        await seat.work(self._check_request, plan, request)
        epoch = seat.keystore.epoch(plan.key_id, plan.epoch)
        if epoch is None or epoch.state == DESTROYED:
            raise StateError(
                Reason.KEY_STATE, f"this custodian no longer holds epoch {plan.epoch} of key {plan.key_id}"
            )
        if not shared_indices(plan.quorum, seat.me, plan.target):
            raise refused("shares no seed with the one to be rebuilt", [seat.me])
        statement, sealed = await seat.work(self._gift, plan, plain(await seat.seeds(epoch)))
        if row.state is not State.GIVEN:
            with seat.keystore.transaction():
                seat.keystore.move_ceremony(ceremony_id, State.GIVEN, seat.now())
        return statement, sealed

    def _check_request(self, plan: CeremonyPlan, envelope: bytes) -> None:
        payload = self._seat.open_from(envelope, REBUILD_REQUEST_TYPE, plan.target, "rebuild request")
        check_request(plan, RebuildRequest.parse(payload))

    def _gift(self, plan: CeremonyPlan, seeds: dict[int, bytes]) -> tuple[bytes, bytes]:
        seat = self._seat
        gift, sealed = seal_gift(plan, seat.me, seeds, seat.roster.custodian(plan.target).hpke)
        return seat.sign(GIFT_TYPE, gift.to_payload()), sealed

    async def restore(self, ceremony_id: str, certificate: bytes, gifts: Sequence[tuple[bytes, SealedPart]]) -> bytes:
        """Take my seeds from what co-holders gave, and the epoch into use; returns my signed receipt.

        Raises ``NOT_FOUND``, ``STATE``, ``CEREMONY`` (some seed nobody gave rightly, naming who lied; then nothing
        changed but the evidence kept), ``SIGNATURE…``, ``STORAGE``.
        """
        seat, store = self._seat, self._seat.keystore
        row = seat.row(ceremony_id)
        done = store.answer(ceremony_id, Step.RESTORE)
        if done is not None:  # rebuilt is rebuilt, by whichever gifts
            return done[1]
        plan = seat.plan(row, State.RESTORED)
        found = await seat.certificates.open(certificate, seat.work)
        if found.digest != plan.certificate:
            raise RefusedError(
                Reason.CEREMONY, "this is not the plan's certificate", expected=plan.certificate, actual=found.digest
            )
        given = {}
        for statement, part in gifts:  # one at a time: together they may be a million seeds
            if part.sender in given:
                raise refused("gave twice", [part.sender])
            given[part.sender] = await seat.work(self._open_gift, plan, statement, part)
        rebuilt = await seat.work(choose, found, seat.me, given)
        statements = {part.sender: (statement, part.sealed) for statement, part in gifts}
        accusations = [
            Accusation(ceremony_id, name, f"{count} seeds were not the certified ones", *statements[name])
            for name, count in sorted(rebuilt.wrong.items())
        ]
        if rebuilt.lacking:
            with store.transaction():
                for accusation in accusations:
                    store.save_accusation(accusation, seat.now())
            raise lacking_error(found, seat.me, rebuilt)
        receipt = RebuildReceipt(plan.digest, seat.me, found.digest, len(rebuilt.seeds), rebuilt.wrong)
        answer = await seat.work(seat.sign, REBUILD_RECEIPT_TYPE, receipt.to_payload())
        request = seat.digest(Step.RESTORE, [*(transcript(n, *both) for n, both in statements.items())])
        await self._enter(row, found, certificate, rebuilt.seeds, accusations, request, answer)
        return answer

    def _open_gift(self, plan: CeremonyPlan, statement: bytes, part: SealedPart) -> dict[int, bytes] | None:
        """The seeds that a co-holder gave; None from one that signed for its blob, which cannot be used."""
        payload = self._seat.open_from(statement, GIFT_TYPE, part.sender, "gift")
        check_gift(plan, Gift.parse(payload), part.sender, part.sealed)
        try:
            return open_gift(plan, part, self._seat.recipient)
        except KeyquorumError:
            return None

    async def _enter(
        self,
        row: CeremonyRow,
        found: EpochCertificate,
        envelope: bytes,
        seeds: Mapping[int, bytes],
        accusations: Sequence[Accusation],
        request: bytes,
        answer: bytes,
    ) -> None:
        seat, store, now = self._seat, self._seat.keystore, self._seat.now()
        plan = found.plan
        followed_by = min(
            (held.created_at for held in seat.epochs.all() if held.key_id == plan.key_id and held.epoch > plan.epoch),
            default=None,
        )
        state = ACTIVE if followed_by is None else RETIRED
        epoch = EpochRow(plan.key_id, plan.epoch, plan.ceremony_id, envelope, state, followed_by)
        held = await seat.work(hold, found, epoch, dict(sorted(seeds.items())), seat.me)
        with store.transaction():
            # What an unfinished making of this epoch left: the certificate says what counts.
            for other in store.ceremonies_of(plan.key_id, plan.epoch):
                store.drop_secrets(other.ceremony_id)
                if other.kind in MAKING and other.state not in (State.ACTIVE, State.CANCELLED):
                    store.move_ceremony(other.ceremony_id, State.CANCELLED, now, f"rebuilt by {row.ceremony_id}")
            store.insert_seeds(plan.ceremony_id, plan.key_id, plan.epoch, seeds)
            store.insert_epoch(epoch, now)
            if followed_by is None:
                store.retire_epochs(plan.key_id, plan.epoch, plan.created_at)
            for accusation in accusations:
                store.save_accusation(accusation, now)
            store.move_ceremony(row.ceremony_id, State.RESTORED, now)
            store.save_answer(row.ceremony_id, Step.RESTORE, request, answer)
        seat.epochs.add(held)


def _destroyed(row: EpochRow) -> StateError:
    return StateError(
        Reason.KEY_STATE, f"epoch {row.epoch} of key {row.key_id} was destroyed", expected=ACTIVE, actual=DESTROYED
    )
