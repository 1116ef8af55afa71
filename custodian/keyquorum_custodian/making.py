"""*generate* and *rotate* as one custodian goes through them (DESIGN §9), driven by a coordinator nobody trusts.

Cancelling after *confirm* keeps the seeds, unusable. A custodian cannot know whether its signature completed the
certificate elsewhere; if it did, *activate* with the whole certificate still brings the epoch to life here, so that no
coordinator can talk a custodian out of seeds that others rely on. They go when another ceremony of that epoch succeeds.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

from keyquorum_core import ceremony, jcs
from keyquorum_core.ceremony import Commitments, EpochCertificate, PartsHeader, Seed
from keyquorum_core.ceremony_checks import check_commitments, check_present, check_seeds
from keyquorum_core.ceremony_plan import CeremonyPlan, check_order, check_plan
from keyquorum_core.ceremony_states import Kind, State, Step
from keyquorum_core.errors import Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.parts import SealedPart, check_header, co_holders, open_parts, parts_header, seal_parts
from keyquorum_core.sealing import suite_available
from keyquorum_core.signing import peek_payload
from keyquorum_core.strictjson import Fields, loads
from keyquorum_core.transcript import transcript
from keyquorum_custodian.canary import spoilt
from keyquorum_custodian.ceremony_seat import CeremonySeat, check_move, check_senders, wrong_state
from keyquorum_custodian.epochs import hold
from keyquorum_custodian.seed_records import ACTIVE, CeremonyRow, EpochRow

__all__ = ["Making", "Proposal"]

_MAX_PROPOSAL = 64 << 20


@dataclass(frozen=True, slots=True)
class Proposal:
    """What *propose* answers: a signed header (DSSE envelope) and one sealed blob for each co-holder. ``went_by``: once
    delivered, whose headers this custodian went by, for a coordinator that takes the ceremony over."""

    header: bytes
    parts: tuple[SealedPart, ...]
    went_by: tuple[str, ...] = ()


class Making:
    """One custodian's part in making epochs."""

    def __init__(self, seat: CeremonySeat) -> None:
        self._seat = seat

    # -- propose ---------------------------------------------------------------------------------------------------

    async def check(self, plan: CeremonyPlan) -> None:
        """Raise what speaks against a new plan: ``CEREMONY``, ``UNSUPPORTED``, ``EXISTS``, ``KEY_STATE``, ``STATE``."""
        seat = self._seat
        check_plan(plan, cluster=seat.roster.cluster, roster_digest=seat.roster_digest, quorum=seat.quorum)
        if not suite_available(plan.suite):
            raise UnavailableError(
                Reason.UNSUPPORTED,
                "this custodian cannot seal with the key's suite",
                expected="a suite it has",
                actual=plan.suite,
                next_step="Choose another suite, or install the library it needs on every custodian.",
            )
        newest = seat.keystore.newest_epoch(plan.key_id)
        if newest is not None and newest.epoch >= plan.epoch:
            raise StateError(
                Reason.EXISTS,
                f"key {plan.key_id} exists" if plan.epoch == 1 else f"key {plan.key_id} has that epoch already",
                expected="a new key id" if plan.epoch == 1 else f"epoch {newest.epoch + 1}",
                actual=f"{plan.key_id} with epoch {newest.epoch}",
            )
        rival = seat.keystore.live_ceremony(plan.key_id, plan.epoch)
        if rival is not None and rival.ceremony_id != plan.ceremony_id:
            raise _rival(rival)
        if newest is not None and plan.epoch > 1:
            await self._check_follows(plan, newest)
        elif plan.kind is Kind.ROTATE:
            raise self._stale(plan, None)

    async def _check_follows(self, plan: CeremonyPlan, newest: EpochRow) -> None:
        """The plan goes by the newest epoch there is here, and may follow it."""
        before = await self._seat.certificate_of(newest)
        if newest.epoch != plan.epoch - 1:
            raise self._stale(plan, newest)
        if before.digest != plan.certificate:
            raise RefusedError(
                Reason.CEREMONY,
                "ceremony plan goes by another certificate of the epoch before",
                expected=before.digest,
                actual=plan.certificate,
            )
        if before.plan.policy.canary != plan.policy.canary:
            raise RefusedError(
                Reason.CANARY,
                "whether a key is a canary is decided with its first epoch",
                expected=f"canary {str(before.plan.policy.canary).lower()}",
                actual=f"canary {str(plan.policy.canary).lower()}",
                next_step="Make another key.",
            )
        if plan.kind is Kind.GENERATE:
            return
        if newest.state != ACTIVE:
            raise StateError(
                Reason.KEY_STATE,
                f"epoch {newest.epoch} of key {plan.key_id} cannot be rotated",
                expected=ACTIVE,
                actual=newest.state,
                next_step="Generate the next epoch anew.",
            )
        kept = self._seat.keystore.token_seeds
        if kept is not None and not kept.hashes:
            raise StateError(
                Reason.KEY_STATE,
                "this custodian's hardware module does not hash its keys, so that it cannot take part in a rotation",
                expected="a module whose C_DigestKey takes seeds",
                actual="one that refuses",
                next_step=f"Rotate without it, then: keyquorum key repair {plan.key_id} --custodian {self._seat.me}",
                details={"stale": self._seat.me},
            )
        if before.plan.quorum != plan.quorum:
            raise RefusedError(
                Reason.QUORUM_RULE,
                "a rotation keeps the committee and the quorum rule",
                expected=before.plan.quorum,
                actual=plan.quorum,
                next_step="Generate the key's next epoch for the new rule.",
            )
        now = self._seat.now()
        check_order(plan, before.plan, now, activated_at=before.plan.created_at, retired_at=newest.retired_at)

    def _stale(self, plan: CeremonyPlan, newest: EpochRow | None) -> StateError:
        return StateError(
            Reason.KEY_STATE,
            f"this custodian lacks epoch {plan.epoch - 1} of key {plan.key_id}: it is stale",
            expected=f"epoch {plan.epoch - 1}",
            actual=f"epoch {newest.epoch}" if newest else "none",
            next_step=f"Repair it: keyquorum key repair {plan.key_id} --custodian {self._seat.me}",
            details={"stale": self._seat.me},
        )

    async def propose(self, row: CeremonyRow, plan: CeremonyPlan, *, fresh: bool) -> bytes:
        """Draw a part for each seed I shall hold and seal each to its co-holders. ``fresh``: there is no row yet."""
        seat = self._seat
        parts, answer = await seat.work(self._draw, plan)
        with seat.keystore.transaction():
            if fresh:
                seat.keystore.insert_ceremony(row, seat.now())
            else:
                seat.keystore.move_ceremony(row.ceremony_id, State.PROPOSED, seat.now())
            seat.keystore.insert_parts(row, parts)
            seat.keystore.save_answer(row.ceremony_id, Step.PROPOSE, hashlib.sha256(row.plan).digest(), answer)
        return answer

    def _draw(self, plan: CeremonyPlan) -> tuple[dict[int, bytes], bytes]:
        seat = self._seat
        parts = ceremony.new_parts(plan.quorum, seat.me, os.urandom)
        keys = {custodian.id: custodian.hpke for custodian in seat.roster.custodians}
        sealed = seal_parts(plan, seat.me, parts, keys)
        header = seat.sign(ceremony.PARTS_TYPE, parts_header(plan, seat.me, sealed).to_payload())
        return parts, _encode_proposal(Proposal(header, sealed))

    def proposal(self, row: CeremonyRow, answer: bytes) -> Proposal:
        """The proposal in a stored answer, with what was delivered since."""
        header, parts = _decode_proposal(answer)
        delivered = self._seat.keystore.answer(row.ceremony_id, Step.DELIVER)
        if delivered is None:
            return Proposal(header, parts)
        stated = Commitments.parse(peek_payload(delivered[1], ceremony.COMMITMENTS_TYPE, "my commitments"))
        return Proposal(header, parts, tuple(sorted(stated.headers)))

    # -- deliver, confirm, activate --------------------------------------------------------------------------------

    async def deliver(self, ceremony_id: str, headers: list[bytes], parts: list[SealedPart]) -> bytes:
        """Derive my seeds from everybody's parts; returns my signed commitments (DSSE envelope).

        ``headers`` are those of all who take part, ``parts`` those they addressed to me. Raises ``NOT_FOUND``,
        ``STATE``, ``CEREMONY`` (naming the custodian at fault), ``SIGNATURE…``, ``STORAGE``.
        """
        seat = self._seat
        row = seat.row(ceremony_id)
        request = seat.digest(Step.DELIVER, [*headers, *(transcript(p.sender, p.to.encode(), p.sealed) for p in parts)])
        stored = seat.stored(row, Step.DELIVER, request, State.DELIVERED)
        if stored is not None:
            return stored
        plan = seat.plan(row, State.DELIVERED)
        before = await self._before(plan)
        lies = plan.policy.canary and seat.canary.lies(plan.key_id)
        seeds, answer = await seat.work(self._derive, plan, headers, parts, seat.keystore.parts(row), before, lies)
        with seat.keystore.transaction():
            seat.keystore.replace_parts_by_seeds(row, seeds)
            seat.keystore.move_ceremony(ceremony_id, State.DELIVERED, seat.now())
            seat.keystore.save_answer(ceremony_id, Step.DELIVER, request, answer)
        return answer

    def _derive(
        self,
        plan: CeremonyPlan,
        headers: list[bytes],
        parts: list[SealedPart],
        mine: dict[int, bytes],
        before: Mapping[int, Seed] | None,
        lies: bool,
    ) -> tuple[dict[int, bytes], bytes]:
        """My seeds, and what I say about them; ``lies``: a drill wants it wrong."""
        seat = self._seat
        opened = self._open_headers(plan, headers)
        given = {seat.me: mine}
        for sender, part in self._parts_by_sender(plan, set(opened), parts).items():
            given[sender] = open_parts(plan, opened[sender], sender, seat.me, part, seat.recipient)
        seeds = ceremony.derive_seeds(
            plan.quorum, plan.ceremony_id, seat.me, given, present=opened.keys(), before=before
        )
        digests = {name: header.digest for name, header in opened.items()}
        commitments = Commitments.to_seeds(plan, seat.me, spoilt(seeds) if lies else seeds, digests)
        return seeds, seat.sign(ceremony.COMMITMENTS_TYPE, commitments.to_payload())

    async def _before(self, plan: CeremonyPlan) -> Mapping[int, Seed] | None:
        """My seeds of the epoch that is rotated."""
        if plan.kind is not Kind.ROTATE:
            return None
        row = self._seat.keystore.epoch(plan.key_id, plan.epoch - 1)
        if row is None or row.state != ACTIVE:
            raise self._stale(plan, row)
        return await self._seat.seeds(row)

    async def confirm(self, ceremony_id: str, commitments: list[bytes]) -> bytes:
        """Check that all holders of each seed committed alike; returns the epoch certificate with my signatures.

        Raises ``NOT_FOUND``, ``STATE``, ``CEREMONY`` (naming custodians and values), ``SIGNATURE…``, ``STORAGE``.
        """
        seat = self._seat
        row = seat.row(ceremony_id)
        request = seat.digest(Step.CONFIRM, commitments)
        stored = seat.stored(row, Step.CONFIRM, request, State.CONFIRMED)
        if stored is not None:
            return stored
        plan = seat.plan(row, State.CONFIRMED)
        answer = await seat.work(self._agree, plan, commitments, await seat.seeds(row))
        with seat.keystore.transaction():
            seat.keystore.move_ceremony(ceremony_id, State.CONFIRMED, seat.now())
            seat.keystore.save_answer(ceremony_id, Step.CONFIRM, request, answer)
        return answer

    def _agree(self, plan: CeremonyPlan, commitments: list[bytes], seeds: Mapping[int, Seed]) -> bytes:
        """The certificate that the commitments give, signed."""
        seat = self._seat
        stated: dict[str, Commitments] = {}
        for envelope in commitments:
            statement = seat.open_said(envelope, ceremony.COMMITMENTS_TYPE, Commitments.parse, "commitments")
            if statement.custodian in stated:
                raise ceremony.refused(f"the commitments of {statement.custodian} came twice", [statement.custodian])
            stated[statement.custodian] = statement
        certificate = check_commitments(plan, plan.quorum, stated)
        if seat.me in certificate.absent:
            raise ceremony.refused("the commitments leave out one who made its own", [seat.me])
        check_seeds(certificate, seat.me, seeds)
        return seat.sign(ceremony.CERTIFICATE_TYPE, certificate.to_payload())

    async def activate(self, ceremony_id: str, certificate: bytes) -> None:
        """The certificate with everyone's signatures makes the epoch active, and the one before retired.

        Raises ``NOT_FOUND``, ``STATE``, ``EXISTS`` (another ceremony of this epoch is under way), ``SIGNATURE…``,
        ``CEREMONY`` (another certificate than the one I signed), ``STORAGE``.
        """
        seat, store = self._seat, self._seat.keystore
        row = seat.row(ceremony_id)
        confirmed = store.answer(ceremony_id, Step.CONFIRM)
        if confirmed is None or (row.state is State.CANCELLED and row.cancelled_from is not State.CONFIRMED):
            raise wrong_state(row, State.ACTIVE)
        found = await seat.certificates.open(certificate, seat.work)
        signed = await seat.work(_signed, confirmed[1])
        if found.to_payload() != signed:
            raise RefusedError(
                Reason.CEREMONY,
                "this is not the certificate that this custodian confirmed",
                expected=hashlib.sha256(signed).hexdigest(),
                actual=found.digest,
            )
        if row.state is State.ACTIVE:
            if store.epoch(row.key_id, row.epoch) is None:
                raise StateError(
                    Reason.KEY_STATE,
                    f"this custodian had epoch {row.epoch} of key {row.key_id}, and lost it",
                    expected="the epoch in the keystore",
                    actual="none",
                    next_step=f"Repair it: keyquorum key repair {row.key_id} --custodian {seat.me}",
                    details={"stale": seat.me},
                )
            return
        check_move(row, State.ACTIVE)
        rival = store.live_ceremony(row.key_id, row.epoch)
        if rival is not None and rival.ceremony_id != ceremony_id:
            raise _rival(rival)
        await self._enter(found, certificate, row)

    async def _enter(self, found: EpochCertificate, envelope: bytes, row: CeremonyRow) -> None:
        """The epoch is active, in one change with everything that follows from it."""
        seat, store, now = self._seat, self._seat.keystore, self._seat.now()
        epoch = EpochRow(row.key_id, row.epoch, row.ceremony_id, envelope)
        held = await seat.work(hold, found, epoch, await seat.seeds(row), seat.me)
        with store.transaction():
            store.move_ceremony(row.ceremony_id, State.ACTIVE, now)
            store.insert_epoch(epoch, now)
            store.retire_epochs(row.key_id, row.epoch, found.plan.created_at)
            for other in store.ceremonies_of(row.key_id, row.epoch):
                if other.ceremony_id != row.ceremony_id:
                    store.drop_secrets(other.ceremony_id)
        seat.epochs.add(held)

    # -- what the steps share --------------------------------------------------------------------------------------

    def _open_headers(self, plan: CeremonyPlan, envelopes: list[bytes]) -> dict[str, PartsHeader]:
        """The headers by custodian; their authors are those who take part, which must do."""
        opened: dict[str, PartsHeader] = {}
        for envelope in envelopes:
            header = self._seat.open_said(envelope, ceremony.PARTS_TYPE, PartsHeader.parse, "parts header")
            name = header.custodian
            if name in opened:
                raise ceremony.refused(f"the parts header of {name} came twice", [name])
            check_header(plan, header, name)
            opened[name] = header
        check_present(plan, opened)
        if self._seat.me not in opened:
            raise ceremony.refused("the headers leave out one who made its own", [self._seat.me])
        return opened

    def _parts_by_sender(self, plan: CeremonyPlan, present: set[str], parts: list[SealedPart]) -> dict[str, SealedPart]:
        me = self._seat.me
        by_sender = {part.sender: part for part in parts if part.to == me}
        if len(by_sender) != len(parts):
            raise RefusedError(
                Reason.CEREMONY,
                "some parts are not addressed to this custodian, or one sender's came twice",
                expected=f"one blob from each co-holder, to {me}",
                actual=f"{len(parts)} blobs, {len(by_sender)} of them usable",
            )
        check_senders("parts", set(co_holders(plan.quorum, me)) & present, set(by_sender))
        return by_sender


def _rival(row: CeremonyRow) -> StateError:
    return StateError(
        Reason.EXISTS,
        f"another ceremony of key {row.key_id} epoch {row.epoch} is {row.state}",
        expected="no other ceremony of this epoch",
        actual=row.ceremony_id,
        next_step=f"Finish or cancel ceremony {row.ceremony_id}.",
    )


def _signed(envelope: bytes) -> bytes:
    """The certificate that this custodian signed, from its stored answer."""
    return peek_payload(envelope, ceremony.CERTIFICATE_TYPE, "my epoch certificate", ceremony.MAX_CERTIFICATE)


def _encode_proposal(proposal: Proposal) -> bytes:
    parts = [
        {"from": part.sender, "to": part.to, "sealed": base64.b64encode(part.sealed).decode()}
        for part in proposal.parts
    ]
    return jcs.dumps({"header": base64.b64encode(proposal.header).decode(), "parts": parts})


def _decode_proposal(answer: bytes) -> tuple[bytes, tuple[SealedPart, ...]]:
    fields = Fields(loads(answer, "stored proposal", max_bytes=_MAX_PROPOSAL), "stored proposal")
    header = fields.base64("header", max_bytes=_MAX_PROPOSAL)
    parts = []
    for item in fields.list("parts", max_items=64):
        entry = Fields(item, "stored part")
        sealed = entry.base64("sealed", max_bytes=_MAX_PROPOSAL)
        parts.append(SealedPart(entry.text("from"), entry.text("to"), sealed))
    return header, tuple(parts)
