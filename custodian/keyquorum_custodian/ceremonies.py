"""The *generate* ceremony as one custodian goes through it (DESIGN §9), driven by a coordinator nobody trusts.

:data:`MOVES` is the whole state machine. Each step is persisted, with the digest of its request and its answer, in one
transaction before the answer leaves: a crash at any moment leaves either the step before or the step after, a repeated
request gets the stored answer, and another request under the same ceremony id is refused.

Cancelling after *confirm* keeps the seeds, unusable. A custodian cannot know whether its signature completed the
certificate elsewhere; if it did, *activate* with the whole certificate still brings the epoch to life here, so that no
coordinator can talk a custodian out of seeds that others rely on. They go when another ceremony of that epoch succeeds.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import rfc8785

from keyquorum_core import ceremony, names
from keyquorum_core.ceremony import CeremonyPlan, Commitments, EpochCertificate, PartsHeader
from keyquorum_core.errors import Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.parts import SealedPart, check_header, co_holders, open_parts, parts_header, seal_parts
from keyquorum_core.roster import Roster
from keyquorum_core.sealing import RecipientKey, suite_available
from keyquorum_core.signing import Identity, open_envelope, open_multi, peek_payload, sign
from keyquorum_core.strictjson import Fields, loads
from keyquorum_core.transcript import transcript
from keyquorum_custodian.epochs import Epochs, load_epoch, open_certificate
from keyquorum_custodian.keystore import CeremonyRow, EpochRow, Keystore

__all__ = ["MOVES", "Ceremonies", "Proposal", "SealedPart"]

PROPOSED: Final = "proposed"
DELIVERED: Final = "delivered"
CONFIRMED: Final = "confirmed"
ACTIVE: Final = "active"
CANCELLED: Final = "cancelled"

MOVES: Final[Mapping[str, frozenset[str]]] = {
    "": frozenset({PROPOSED}),
    PROPOSED: frozenset({DELIVERED, CANCELLED}),
    DELIVERED: frozenset({CONFIRMED, CANCELLED}),
    CONFIRMED: frozenset({ACTIVE, CANCELLED}),
    ACTIVE: frozenset(),
    CANCELLED: frozenset({ACTIVE}),  # from confirmed only, and only on a complete certificate
}

_MAX_PROPOSAL = 64 << 20


@dataclass(frozen=True, slots=True)
class Proposal:
    """What *propose* answers: a signed header (DSSE envelope) and one sealed blob for each co-holder."""

    ceremony_id: str
    header: bytes
    parts: tuple[SealedPart, ...]


class Ceremonies:
    """One custodian's part in ceremonies; used from one thread. ``clock`` gives unix seconds."""

    def __init__(
        self,
        custodian_id: str,
        identity: Identity,
        recipient: RecipientKey,
        roster: Roster,
        keystore: Keystore,
        epochs: Epochs,
        clock: Callable[[], float],
    ) -> None:
        self._me = custodian_id
        self._identity = identity
        self._recipient = recipient
        self._roster = roster
        self._roster_digest = roster.digest
        self._quorum = roster.quorum_of()
        self._keystore = keystore
        self._epochs = epochs
        self._clock = clock

    # -- the steps -------------------------------------------------------------------------------------------------

    def propose(self, envelope: bytes) -> Proposal:
        """Draw a part for each seed I shall hold and seal each to its co-holders.

        ``envelope`` is the plan, signed by an operator of the roster. Raises ``SIGNATURE…``, ``CEREMONY`` (a plan for
        another cluster, roster or quorum, or another plan of this id), ``UNSUPPORTED`` (suite), ``EXISTS`` (the key
        exists, or another ceremony of it is under way), ``STATE`` (cancelled), ``STORAGE``.
        """
        payload, _ = open_multi(envelope, ceremony.PLAN_TYPE, self._roster.operator_identities(), 1, "ceremony plan")
        plan = CeremonyPlan.parse(payload)
        row = self._keystore.ceremony(plan.ceremony_id)
        if row is not None:
            if row.plan != payload:
                raise _another_request(row, "plan", hashlib.sha256(row.plan).digest(), hashlib.sha256(payload).digest())
            if row.state == CANCELLED:
                raise _wrong_state(row, PROPOSED)
            return _decode_proposal(row)
        self._check_new(plan)
        parts = ceremony.new_parts(plan.quorum, self._me, os.urandom)
        keys = {custodian.id: custodian.hpke for custodian in self._roster.custodians}
        sealed = seal_parts(plan, self._me, parts, keys)
        header = sign(self._identity, ceremony.PARTS_TYPE, parts_header(plan, self._me, sealed).to_payload())
        proposal = Proposal(plan.ceremony_id, header, sealed)
        row = CeremonyRow(
            plan.ceremony_id,
            plan.key_id,
            plan.epoch,
            PROPOSED,
            None,
            payload,
            _encode_proposal(proposal),
            None,
            None,
            None,
            None,
        )
        with self._keystore.transaction():
            self._keystore.insert_ceremony(row, parts, self._now())
        return proposal

    def deliver(self, ceremony_id: str, headers: list[bytes], parts: list[SealedPart]) -> bytes:
        """Derive my seeds from everybody's parts; returns my signed commitments (DSSE envelope).

        ``headers`` are those of all custodians, ``parts`` those addressed to me. Raises ``NOT_FOUND``, ``STATE``,
        ``CEREMONY`` (naming the custodian at fault), ``SIGNATURE…``, ``STORAGE``.
        """
        row = self._row(ceremony_id)
        request = _digest("deliver", [*headers, *(transcript(p.sender, p.to.encode(), p.sealed) for p in parts)])
        if row.commitments is not None:
            return _stored(row, "deliver", row.deliver_request, request, row.commitments)
        plan = self._plan(row, DELIVERED)
        opened = self._open_headers(plan, headers)
        mine = self._keystore.parts(row)
        given = {self._me: mine}
        for sender, part in self._parts_by_sender(plan, parts).items():
            given[sender] = open_parts(plan, opened[sender], sender, self._me, part, self._recipient)
        seeds = ceremony.derive_seeds(plan.quorum, plan.ceremony_id, self._me, given)
        commitments = Commitments.to_seeds(plan, self._me, seeds)
        answer = sign(self._identity, ceremony.COMMITMENTS_TYPE, commitments.to_payload())
        with self._keystore.transaction():
            self._keystore.replace_parts_by_seeds(row, seeds)
            self._keystore.update_ceremony(
                ceremony_id, self._now(), state=DELIVERED, deliver_request=request, commitments=answer
            )
        return answer

    def confirm(self, ceremony_id: str, commitments: list[bytes]) -> bytes:
        """Check that all holders of each seed committed alike; returns the epoch certificate with my signatures.

        Raises ``NOT_FOUND``, ``STATE``, ``CEREMONY`` (naming custodians and values), ``SIGNATURE…``, ``STORAGE``.
        """
        row = self._row(ceremony_id)
        request = _digest("confirm", commitments)
        if row.confirmation is not None:
            return _stored(row, "confirm", row.confirm_request, request, row.confirmation)
        plan = self._plan(row, CONFIRMED)
        stated: dict[str, Commitments] = {}
        for envelope in commitments:
            name = Commitments.parse(peek_payload(envelope, ceremony.COMMITMENTS_TYPE, "commitments")).custodian
            what = f"the commitments of {name}"
            payload = open_envelope(envelope, ceremony.COMMITMENTS_TYPE, self._roster.custodian(name).identity, what)
            if name in stated:
                raise RefusedError(Reason.CEREMONY, f"{what} came twice", details={"custodians": name})
            stated[name] = Commitments.parse(payload)
        agreed = ceremony.check_commitments(plan, plan.quorum, stated)
        certificate = EpochCertificate(plan, agreed)
        ceremony.check_seeds(certificate, self._me, self._keystore.seeds(row))
        answer = sign(self._identity, ceremony.CERTIFICATE_TYPE, certificate.to_payload())
        with self._keystore.transaction():
            self._keystore.update_ceremony(
                ceremony_id, self._now(), state=CONFIRMED, confirm_request=request, confirmation=answer
            )
        return answer

    def activate(self, ceremony_id: str, certificate: bytes) -> None:
        """The certificate with every custodian's signatures makes the epoch active; then releases are made from it.

        Raises ``NOT_FOUND``, ``STATE``, ``EXISTS`` (another ceremony of this epoch is under way), ``SIGNATURE…``,
        ``CEREMONY`` (another certificate than the one I signed), ``STORAGE``.
        """
        row = self._row(ceremony_id)
        if row.confirmation is None or (row.state == CANCELLED and row.cancelled_from != CONFIRMED):
            raise _wrong_state(row, ACTIVE)
        found, payload = open_certificate(certificate, self._keystore)
        signed = peek_payload(
            row.confirmation, ceremony.CERTIFICATE_TYPE, "my epoch certificate", ceremony.MAX_CERTIFICATE
        )
        if payload != signed:
            raise RefusedError(
                Reason.CEREMONY,
                "this is not the certificate that this custodian confirmed",
                expected=hashlib.sha256(signed).hexdigest(),
                actual=found.digest,
            )
        if row.state == ACTIVE:
            return
        _check_move(row, ACTIVE)
        rival = self._keystore.live_ceremony(row.key_id, row.epoch)
        if rival is not None and rival.ceremony_id != ceremony_id:
            raise _rival(rival)
        now = self._now()
        epoch = EpochRow(row.key_id, row.epoch, ceremony_id, certificate)
        with self._keystore.transaction():
            self._keystore.update_ceremony(ceremony_id, now, state=ACTIVE)
            self._keystore.insert_epoch(epoch, now)
            for other in self._keystore.ceremonies():
                if (other.key_id, other.epoch) == (row.key_id, row.epoch) and other.ceremony_id != ceremony_id:
                    self._keystore.drop_secrets(other.ceremony_id)
            held = load_epoch(self._keystore, epoch, self._me)
        self._epochs.add(held)

    def cancel(self, ceremony_id: str) -> str:
        """Give a ceremony up; returns the state it was in, or ``unknown``. Raises ``STATE`` for an active epoch."""
        row = self._keystore.ceremony(ceremony_id)
        if row is None:
            return "unknown"
        if row.state == CANCELLED:
            return row.cancelled_from or "unknown"
        _check_move(row, CANCELLED)
        with self._keystore.transaction():
            self._keystore.update_ceremony(ceremony_id, self._now(), state=CANCELLED, cancelled_from=row.state)
            if row.state != CONFIRMED:
                self._keystore.drop_secrets(ceremony_id)
        return row.state

    # -- what the steps share --------------------------------------------------------------------------------------

    def _now(self) -> int:
        return int(self._clock())

    def _row(self, ceremony_id: str) -> CeremonyRow:
        row = self._keystore.ceremony(ceremony_id)
        if row is None:
            raise StateError(
                Reason.NOT_FOUND,
                "no such ceremony",
                expected="a ceremony that was proposed to this custodian",
                actual=ascii(ceremony_id[:40]),
            )
        return row

    def _plan(self, row: CeremonyRow, target: str) -> CeremonyPlan:
        """The plan of a ceremony that may move to ``target``, still fitting the roster."""
        _check_move(row, target)
        plan = CeremonyPlan.parse(row.plan)
        ceremony.check_plan(plan, cluster=self._roster.cluster, roster_digest=self._roster_digest, quorum=self._quorum)
        return plan

    def _check_new(self, plan: CeremonyPlan) -> None:
        names.check(names.KEY_ID, plan.key_id, "key id")
        ceremony.check_plan(plan, cluster=self._roster.cluster, roster_digest=self._roster_digest, quorum=self._quorum)
        if not suite_available(plan.suite):
            raise UnavailableError(
                Reason.UNSUPPORTED,
                "this custodian cannot seal with the key's suite",
                expected="a suite it has",
                actual=plan.suite,
                next_step="Choose another suite, or install the library it needs on every custodian.",
            )
        known = [row for row in self._keystore.epochs() if row.key_id == plan.key_id]
        if known:
            raise StateError(
                Reason.EXISTS,
                f"key {plan.key_id} exists",
                expected="a new key id",
                actual=f"{plan.key_id} with epoch {known[-1].epoch}",
            )
        rival = self._keystore.live_ceremony(plan.key_id, plan.epoch)
        if rival is not None:
            raise _rival(rival)

    def _open_headers(self, plan: CeremonyPlan, envelopes: list[bytes]) -> dict[str, PartsHeader]:
        opened: dict[str, PartsHeader] = {}
        for envelope in envelopes:
            name = PartsHeader.parse(peek_payload(envelope, ceremony.PARTS_TYPE, "parts header")).custodian
            what = f"the parts header of {name}"
            payload = open_envelope(envelope, ceremony.PARTS_TYPE, self._roster.custodian(name).identity, what)
            if name in opened:
                raise RefusedError(Reason.CEREMONY, f"{what} came twice", details={"custodians": name})
            opened[name] = PartsHeader.parse(payload)
            check_header(plan, opened[name], name)
        _check_senders("headers", set(plan.quorum.ids), set(opened))
        return opened

    def _parts_by_sender(self, plan: CeremonyPlan, parts: list[SealedPart]) -> dict[str, SealedPart]:
        by_sender = {part.sender: part for part in parts if part.to == self._me}
        if len(by_sender) != len(parts):
            raise RefusedError(
                Reason.CEREMONY,
                "some parts are not addressed to this custodian, or one sender's came twice",
                expected=f"one blob from each co-holder, to {self._me}",
                actual=f"{len(parts)} blobs, {len(by_sender)} of them usable",
            )
        _check_senders("parts", set(co_holders(plan.quorum, self._me)), set(by_sender))
        return by_sender


def _check_senders(what: str, expected: set[str], actual: set[str]) -> None:
    if expected != actual:
        wrong = sorted(expected ^ actual)
        raise RefusedError(
            Reason.CEREMONY,
            f"the {what} are not those of all custodians concerned",
            expected=", ".join(sorted(expected)),
            actual=", ".join(sorted(actual)),
            details={"custodians": ",".join(wrong)},
        )


def _check_move(row: CeremonyRow, target: str) -> None:
    if target not in MOVES[row.state]:
        raise _wrong_state(row, target)


def _wrong_state(row: CeremonyRow, target: str) -> StateError:
    allowed = sorted(state for state, targets in MOVES.items() if target in targets)
    return StateError(
        Reason.STATE,
        f"ceremony {row.ceremony_id} cannot become {target} now",
        expected=" or ".join(state or "new" for state in allowed),
        actual=row.state,
        next_step="Propose a new ceremony." if row.state == CANCELLED else "",
    )


def _rival(row: CeremonyRow) -> StateError:
    return StateError(
        Reason.EXISTS,
        f"another ceremony of key {row.key_id} epoch {row.epoch} is {row.state}",
        expected="no other ceremony of this epoch",
        actual=row.ceremony_id,
        next_step=f"Finish or cancel ceremony {row.ceremony_id}.",
    )


def _another_request(row: CeremonyRow, step: str, expected: bytes, actual: bytes) -> RefusedError:
    return RefusedError(
        Reason.CEREMONY,
        f"ceremony {row.ceremony_id} had another {step} request before",
        expected=expected.hex(),
        actual=actual.hex(),
        next_step="Repeat the first request, or cancel the ceremony and propose a new one.",
    )


def _stored(row: CeremonyRow, step: str, before: bytes | None, now: bytes, answer: bytes) -> bytes:
    """The stored answer to a repeated request."""
    if row.state == CANCELLED:
        raise _wrong_state(row, DELIVERED if step == "deliver" else CONFIRMED)
    if before != now:
        raise _another_request(row, step, before or b"", now)
    return answer


def _digest(step: str, items: list[bytes]) -> bytes:
    """Of a request whose items may come in any order."""
    return hashlib.sha256(transcript(f"keyquorum/v1/{step}", *sorted(items))).digest()


def _encode_proposal(proposal: Proposal) -> bytes:
    parts = [
        {"from": part.sender, "to": part.to, "sealed": base64.b64encode(part.sealed).decode()}
        for part in proposal.parts
    ]
    return rfc8785.dumps({"header": base64.b64encode(proposal.header).decode(), "parts": parts})


def _decode_proposal(row: CeremonyRow) -> Proposal:
    fields = Fields(loads(row.proposal, "stored proposal", max_bytes=_MAX_PROPOSAL), "stored proposal")
    header = fields.base64("header", max_bytes=_MAX_PROPOSAL)
    parts = []
    for item in fields.list("parts", max_items=64):
        entry = Fields(item, "stored part")
        sealed = entry.base64("sealed", max_bytes=_MAX_PROPOSAL)
        parts.append(SealedPart(entry.text("from"), entry.text("to"), sealed))
    return Proposal(row.ceremony_id, header, tuple(parts))
