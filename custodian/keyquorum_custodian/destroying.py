"""*destroy* as one custodian goes through it (DESIGN §9).

Nothing is erased before everyone agreed. Then the seeds go in this order: no release begins or is under way any more,
what is in memory is wiped, the tables lose them, the file and its log are overwritten, and only then is the receipt
signed. A custodian killed in between goes on from where it was, with the next request or start.
"""

from __future__ import annotations

import hashlib

from keyquorum_core.ceremony import refused
from keyquorum_core.ceremony_plan import CeremonyPlan, check_date, check_order, check_plan
from keyquorum_core.ceremony_states import State, Step
from keyquorum_core.destruction import (
    CONSENT_TYPE,
    DESTRUCTION_RECEIPT_TYPE,
    Consent,
    DestructionReceipt,
    check_consents,
)
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError
from keyquorum_custodian.ceremony_seat import CeremonySeat, wrong_state
from keyquorum_custodian.epochs import load_epoch
from keyquorum_custodian.seed_records import DESTROYED, CeremonyRow

__all__ = ["Destroying"]


class Destroying:
    """One custodian's part in destroying epochs."""

    def __init__(self, seat: CeremonySeat) -> None:
        self._seat = seat

    def check(self, plan: CeremonyPlan) -> None:
        """Raise what speaks against a new plan: ``CEREMONY``, ``STATE`` (too soon)."""
        seat = self._seat
        check_plan(plan, cluster=seat.roster.cluster, roster_digest=seat.roster_digest, quorum=plan.quorum)
        row = seat.keystore.epoch(plan.key_id, plan.epoch)
        if row is None:
            return  # it holds nothing that it could lose
        certificate = seat.certificates.open_now(row.certificate)
        if certificate.digest != plan.certificate or certificate.plan.quorum != plan.quorum:
            raise RefusedError(
                Reason.CEREMONY,
                "ceremony plan is for another certificate of that epoch",
                expected=certificate.digest,
                actual=plan.certificate,
            )
        if row.state != DESTROYED:
            before = certificate.plan
            check_order(plan, before, seat.now(), activated_at=before.created_at, retired_at=row.retired_at)

    def propose(self, row: CeremonyRow, plan: CeremonyPlan, *, fresh: bool) -> bytes:
        """Agree: my signed consent. ``fresh``: the row is not stored yet."""
        seat = self._seat
        answer = seat.sign(CONSENT_TYPE, Consent(plan.digest, seat.me).to_payload())
        with seat.keystore.transaction():
            if fresh:
                seat.keystore.insert_ceremony(row, seat.now())
            else:
                seat.keystore.move_ceremony(row.ceremony_id, State.PROPOSED, seat.now())
            seat.keystore.save_answer(row.ceremony_id, Step.PROPOSE, hashlib.sha256(row.plan).digest(), answer)
        return answer

    def erase(self, ceremony_id: str, consents: list[bytes]) -> bytes:
        """Erase the epoch's seeds, now that everyone agreed; returns my signed receipt.

        Raises ``NOT_FOUND``, ``STATE`` (cancelled), ``STALE`` (agreed to too long ago), ``CEREMONY`` (somebody's
        consent is missing, naming it), ``UNAVAILABLE`` (releases under way: ask again), ``SIGNATURE…``, ``STORAGE``.
        """
        seat, store = self._seat, self._seat.keystore
        row = seat.row(ceremony_id)
        done = store.answer(ceremony_id, Step.ERASE)
        if done is not None:
            return done[1]
        if row.state is not State.ERASED:
            plan = seat.plan(row, State.ERASED)
            check_date(plan, seat.now())
            self._check_consents(plan, consents)
            seat.epochs.remove(plan.key_id, plan.epoch)
            try:
                self._erase(row)
            except KeyquorumError:  # nothing was changed on the disk, so nothing is changed here either
                epoch = store.epoch(plan.key_id, plan.epoch)
                withheld = (plan.key_id, plan.epoch) in seat.standing.withheld
                if epoch is not None and epoch.state != DESTROYED and not withheld:
                    seat.epochs.add(load_epoch(store, epoch, seat.me, seat.certificates))
                raise
        return self.finish(seat.row(ceremony_id))

    def _check_consents(self, plan: CeremonyPlan, envelopes: list[bytes]) -> None:
        stated: dict[str, Consent] = {}
        for envelope in envelopes:
            consent = self._seat.open_said(envelope, CONSENT_TYPE, Consent.parse, "consent")
            if consent.custodian in stated:
                raise refused(f"the consent of {consent.custodian} came twice", [consent.custodian])
            stated[consent.custodian] = consent
        check_consents(plan, [custodian.id for custodian in self._seat.roster.custodians], stated)

    def _erase(self, row: CeremonyRow) -> None:
        store, now = self._seat.keystore, self._seat.now()
        epoch = store.epoch(row.key_id, row.epoch)
        with store.transaction():
            erased = store.drop_secrets(epoch.ceremony_id) if epoch is not None else 0
            for other in store.ceremonies_of(row.key_id, row.epoch):
                erased += store.drop_secrets(other.ceremony_id)
            store.end_epoch(row.key_id, row.epoch, now)
            store.move_ceremony(row.ceremony_id, State.ERASED, now, f"{erased}")

    def finish(self, row: CeremonyRow) -> bytes:
        """From *erased* to the receipt: the file no longer holds what the tables lost."""
        seat, store = self._seat, self._seat.keystore
        if row.state is not State.ERASED:
            raise wrong_state(row, State.DESTROYED)
        store.scrub()
        plan, now = CeremonyPlan.parse(row.plan), seat.now()
        receipt = DestructionReceipt(plan.digest, seat.me, int(row.cause or 0), now)
        answer = seat.sign(DESTRUCTION_RECEIPT_TYPE, receipt.to_payload())
        with store.transaction():
            store.move_ceremony(row.ceremony_id, State.DESTROYED, now)
            store.save_answer(row.ceremony_id, Step.ERASE, hashlib.sha256(row.plan).digest(), answer)
        return answer
