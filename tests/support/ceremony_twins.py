"""Custodians that lie in ceremonies: for each phase of each kind, a twin for each way of lying there.

A twin is one custodian, with its own identity and keystore, that answers one method otherwise than it should; where
there is nothing to lie about, the table says why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import rfc8785

from keyquorum_core import ceremony
from keyquorum_core.ceremony import CERTIFICATE_TYPE, COMMITMENTS_TYPE, PARTS_TYPE, Commitments, EpochCertificate
from keyquorum_core.ceremony_plan import CeremonyPlan, new_ceremony_id
from keyquorum_core.ceremony_states import MAKING, REBUILDING, Kind, Step
from keyquorum_core.derivation import encode_contributions
from keyquorum_core.destruction import CONSENT_TYPE, DESTRUCTION_RECEIPT_TYPE, Consent, DestructionReceipt
from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_core.parts import SealedPart, parts_header, parts_info, seal_parts, shared_indices
from keyquorum_core.rebuilding import (
    GIFT_TYPE,
    REBUILD_RECEIPT_TYPE,
    REBUILD_REQUEST_TYPE,
    Gift,
    RebuildReceipt,
    RebuildRequest,
    gift_info,
    seal_gift,
)
from keyquorum_core.sealing import seal
from keyquorum_core.signing import Identity, peek_payload, sign
from keyquorum_protos.v1 import custodian_pb2 as pb
from tests.support.ceremony_kinds import LOST, ApprovingLink
from tests.support.custodian import Committee

__all__ = ["IMPOSSIBLE", "LIAR", "LIES", "VICTIM", "Behaviour", "Lie", "Phase", "Twin", "cells", "links_with"]

LIAR, VICTIM = "is-1", "ch-1"
Lie = Callable[["Twin", Any], Any]
"""What a twin makes of its honest answer."""
_Table = dict[Step, dict["Behaviour", dict[str, Lie]]]


class Behaviour(StrEnum):
    EQUIVOCATING = "equivocating"
    SILENT = "silent"
    """It hears nothing and does nothing."""
    LATE = "late"
    """It does what it is asked; its answer comes when nobody waits any more."""
    REPLAYING = "replaying"
    """What it answers is of an earlier ceremony."""
    WRONG_EPOCH = "wrong epoch"
    SHORT_LIST = "short list"
    LONG_LIST = "long list"
    DUPLICATE_INDEX = "duplicate index"


@dataclass(frozen=True)
class Phase:
    """A step of a kind, and whose part in it is played wrongly: in rebuilding, the target's or a co-holder's."""

    kind: Kind
    step: Step
    target: bool = False

    @property
    def liar(self) -> str:
        return LOST if self.target else LIAR

    def __str__(self) -> str:
        role = ("-target" if self.target else "-giver") if self.kind in REBUILDING else ""
        return f"{self.kind}-{self.step}{role}"


class Twin:
    """The liar of one ceremony, in one phase of it."""

    def __init__(self, committee: Committee, plan: CeremonyPlan, phase: Phase, lie: Lie) -> None:
        self.plan = plan
        self.me = me = phase.liar
        self.method = str(phase.step).capitalize()
        self.lie = lie
        self.store = committee.open(me).keystore
        self.identity = self.store.identity()
        self.keys = {each.id: each.hpke for each in committee.roster.custodians}

    async def answer(self, honest: Callable[[], Awaitable[Any]]) -> Any:
        """Instead of the honest one, which it makes first unless it is one of :data:`UNHEARING`."""
        return self.lie(self, None if self.lie in UNHEARING else await honest())

    def signed(self, payload_type: str, payload: bytes, by: Identity | None = None) -> bytes:
        return sign(by or self.identity, payload_type, payload)

    # -- making --------------------------------------------------------------------------------------------------------

    def header(self, parts: tuple[SealedPart, ...], **changes: Any) -> pb.ProposeResponse:
        """These parts, under a header that fits them but for ``changes``."""
        made = replace(parts_header(self.plan, self.me, parts), **changes)
        wire = [pb.SealedParts(**{"from": part.sender}, to=part.to, sealed=part.sealed) for part in parts]
        return pb.ProposeResponse(header=self.signed(PARTS_TYPE, made.to_payload()), parts=wire)

    def parts(self, plan: CeremonyPlan | None = None) -> dict[str, SealedPart]:
        """Fresh parts, by whom they are for."""
        plan = plan or self.plan
        drawn = ceremony.new_parts(plan.quorum, self.me)
        return {part.to: part for part in seal_parts(plan, self.me, drawn, self.keys)}

    def instead(self, plaintext: bytes) -> pb.ProposeResponse:
        """Fresh parts, but this for :data:`VICTIM`."""
        info = parts_info(self.plan.ceremony_id, self.me, VICTIM, self.keys[VICTIM])
        blob = SealedPart(self.me, VICTIM, seal(self.keys[VICTIM], plaintext, info))
        return self.header(tuple({**self.parts(), VICTIM: blob}.values()))

    def commitments(self, answer: pb.DeliverResponse) -> Commitments:
        return Commitments.parse(peek_payload(answer.commitments, COMMITMENTS_TYPE, "commitments"))

    def commits(self, stated: Commitments | bytes) -> pb.DeliverResponse:
        payload = stated if isinstance(stated, bytes) else stated.to_payload()
        return pb.DeliverResponse(commitments=self.signed(COMMITMENTS_TYPE, payload))

    def certificate(self, answer: pb.ConfirmResponse) -> EpochCertificate:
        return EpochCertificate.parse(peek_payload(answer.certificate, CERTIFICATE_TYPE, "certificate"))

    def certifies(self, payload: bytes) -> pb.ConfirmResponse:
        return pb.ConfirmResponse(certificate=self.signed(CERTIFICATE_TYPE, payload))

    # -- rebuilding, destroying ----------------------------------------------------------------------------------------

    def seeds(self, epoch: int) -> dict[int, bytes]:
        row = self.store.epoch("key-1", epoch)
        assert row is not None
        return dict(self.store.seeds(row))

    def shared(self) -> dict[int, bytes]:
        """The right seeds that it shares with the target."""
        seeds = self.seeds(self.plan.epoch)
        return {index: seeds[index] for index in shared_indices(self.plan.quorum, self.me, self.plan.target)}

    def gives(self, gift: Gift, sealed: bytes) -> pb.GiveResponse:
        return pb.GiveResponse(statement=self.signed(GIFT_TYPE, gift.to_payload()), sealed=sealed)

    def gives_seeds(self, seeds: Mapping[int, bytes], plan: CeremonyPlan | None = None) -> pb.GiveResponse:
        return self.gives(*seal_gift(plan or self.plan, self.me, seeds, self.keys[self.plan.target]))

    def gives_bytes(self, plaintext: bytes) -> pb.GiveResponse:
        to = self.plan.target
        sealed = seal(self.keys[to], plaintext, gift_info(self.plan.ceremony_id, self.me, to, self.keys[to]))
        return self.gives(Gift(self.plan.digest, self.me, to, hashlib.sha256(sealed).hexdigest()), sealed)

    def requests(self, request: RebuildRequest) -> pb.ProposeResponse:
        return pb.ProposeResponse(statement=self.signed(REBUILD_REQUEST_TYPE, request.to_payload()))

    def rebuilt(self, answer: pb.RestoreResponse, **changes: Any) -> pb.RestoreResponse:
        receipt = RebuildReceipt.parse(peek_payload(answer.receipt, REBUILD_RECEIPT_TYPE, "receipt"))
        payload = replace(receipt, **changes).to_payload()
        return pb.RestoreResponse(receipt=self.signed(REBUILD_RECEIPT_TYPE, payload))

    def consents(self, **changes: Any) -> pb.ProposeResponse:
        payload = replace(Consent(self.plan.digest, self.me), **changes).to_payload()
        return pb.ProposeResponse(statement=self.signed(CONSENT_TYPE, payload))

    def erased(self, answer: pb.EraseResponse, **changes: Any) -> pb.EraseResponse:
        receipt = DestructionReceipt.parse(peek_payload(answer.receipt, DESTRUCTION_RECEIPT_TYPE, "receipt"))
        payload = replace(receipt, **changes).to_payload()
        return pb.EraseResponse(receipt=self.signed(DESTRUCTION_RECEIPT_TYPE, payload))

    # -- other plans ---------------------------------------------------------------------------------------------------

    @property
    def earlier(self) -> CeremonyPlan:
        """As it was ordered before and given up."""
        return replace(self.plan, ceremony_id=new_ceremony_id())

    @property
    def next_epoch(self) -> CeremonyPlan:
        return replace(self.plan, epoch=self.plan.epoch + 1)


# -- what is not lied about, but left out ------------------------------------------------------------------------------


def is_silent(twin: Twin, answer: Any) -> Any:
    raise UnavailableError(Reason.UNAVAILABLE, f"{twin.me} does not answer")


def is_late(twin: Twin, answer: Any) -> Any:
    raise UnavailableError(Reason.UNAVAILABLE, f"{twin.me} does not answer in time")


def pretends(twin: Twin, answer: Any) -> Any:
    """Says that it activated the epoch, and did not."""
    return pb.ActivateResponse()


UNHEARING = (is_silent, pretends)
ABSENT: dict[Behaviour, dict[str, Lie]] = {
    Behaviour.SILENT: {"": is_silent},
    Behaviour.LATE: {"": is_late},
}

# -- making ------------------------------------------------------------------------------------------------------------


def _an_old_header(twin: Twin, answer: Any) -> Any:
    old = twin.earlier
    return twin.header(tuple(twin.parts(old).values()), plan_digest=old.digest)


def _a_part_short(twin: Twin, answer: Any) -> Any:
    shared = shared_indices(twin.plan.quorum, twin.me, VICTIM)
    return twin.instead(encode_contributions(dict.fromkeys(shared[1:], b"\1" * 32)))


def _parts_of_all_seeds(twin: Twin, answer: Any) -> Any:
    return twin.instead(encode_contributions(dict.fromkeys(range(twin.plan.quorum.seed_count), b"\1" * 32)))


def _a_part_twice(twin: Twin, answer: Any) -> Any:
    entry = encode_contributions({shared_indices(twin.plan.quorum, twin.me, VICTIM)[0]: b"\1" * 32})
    return twin.instead(entry + entry)


def _a_forged_header(twin: Twin, answer: pb.ProposeResponse) -> Any:
    payload = peek_payload(answer.header, PARTS_TYPE, "header")
    answer.header = twin.signed(PARTS_TYPE, payload, Identity.generate())
    return answer


def _another_seed(twin: Twin, answer: Any) -> Any:
    stated = twin.commitments(answer)
    changed = {**stated.commitments, min(stated.commitments): b"\1" * 32}
    return twin.commits(replace(stated, commitments=changed))


def _another_header(twin: Twin, answer: Any) -> Any:
    """As if :data:`VICTIM` had signed two."""
    stated = twin.commitments(answer)
    return twin.commits(replace(stated, headers={**stated.headers, VICTIM: "0" * 64}))


def _one_fewer_present(twin: Twin, answer: Any) -> Any:
    stated = twin.commitments(answer)
    return twin.commits(replace(stated, headers={n: h for n, h in stated.headers.items() if n != VICTIM}))


def _too_few(twin: Twin, answer: Any) -> Any:
    stated = twin.commitments(answer)
    kept = {index: each for index, each in stated.commitments.items() if index != min(stated.commitments)}
    return twin.commits(replace(stated, commitments=kept))


def _too_many(twin: Twin, answer: Any) -> Any:
    stated = twin.commitments(answer)
    extra = next(index for index in range(twin.plan.quorum.seed_count) if index not in stated.commitments)
    return twin.commits(replace(stated, commitments={**stated.commitments, extra: b"\1" * 32}))


def _one_twice(twin: Twin, answer: Any) -> Any:
    tree = json.loads(twin.commitments(answer).to_payload())
    tree["commitments"] = [tree["commitments"][0], *tree["commitments"]]
    return twin.commits(rfc8785.dumps(tree))


def _for_plan(which: Callable[[Twin], CeremonyPlan]) -> Lie:
    def lie(twin: Twin, answer: Any) -> Any:
        return twin.commits(replace(twin.commitments(answer), plan_digest=which(twin).digest))

    return lie


def _certifies(change: Callable[[Twin, EpochCertificate], EpochCertificate]) -> Lie:
    def lie(twin: Twin, answer: Any) -> Any:
        return twin.certifies(change(twin, twin.certificate(answer)).to_payload())

    return lie


def _listing(change: Callable[[tuple[bytes, ...]], tuple[bytes, ...]]) -> Lie:
    return _certifies(lambda twin, found: replace(found, commitments=change(found.commitments)))


def _half_signed(twin: Twin, answer: Any) -> Any:
    tree = json.loads(answer.certificate)
    tree["signatures"] = tree["signatures"][:1]
    return pb.ConfirmResponse(certificate=json.dumps(tree, separators=(",", ":")).encode())


_MAKE: _Table = {
    Step.PROPOSE: {
        Behaviour.EQUIVOCATING: {
            "other parts to one": lambda t, a: t.header(tuple({**t.parts(), VICTIM: t.parts()[VICTIM]}.values())),
            "in another's name": lambda t, a: t.header(tuple(t.parts().values()), custodian=VICTIM),
            "forged": _a_forged_header,
        },
        Behaviour.REPLAYING: {
            "header": _an_old_header,
            "parts": lambda t, a: t.header(tuple(t.parts(t.earlier).values())),
        },
        Behaviour.WRONG_EPOCH: {"": lambda t, a: t.header(tuple(t.parts().values()), plan_digest=t.next_epoch.digest)},
        Behaviour.SHORT_LIST: {
            "of parts": _a_part_short,
            "of co-holders": lambda t, a: t.header(tuple(each for to, each in t.parts().items() if to != VICTIM)),
        },
        Behaviour.LONG_LIST: {"": _parts_of_all_seeds},
        Behaviour.DUPLICATE_INDEX: {"": _a_part_twice},
    },
    Step.DELIVER: {
        Behaviour.EQUIVOCATING: {
            "about a seed": _another_seed,
            "about a header": _another_header,
            "about who is there": _one_fewer_present,
        },
        Behaviour.REPLAYING: {"": _for_plan(lambda twin: twin.earlier)},
        Behaviour.WRONG_EPOCH: {"": _for_plan(lambda twin: twin.next_epoch)},
        Behaviour.SHORT_LIST: {"": _too_few},
        Behaviour.LONG_LIST: {"": _too_many},
        Behaviour.DUPLICATE_INDEX: {"": _one_twice},
    },
    Step.CONFIRM: {
        Behaviour.EQUIVOCATING: {"": _listing(lambda found: (b"\1" * 32, *found[1:])), "half signed": _half_signed},
        Behaviour.REPLAYING: {"": _certifies(lambda twin, found: replace(found, plan=twin.earlier))},
        Behaviour.WRONG_EPOCH: {"": _certifies(lambda twin, found: replace(found, plan=twin.next_epoch))},
        Behaviour.SHORT_LIST: {"": _listing(lambda found: found[:-1])},
        Behaviour.LONG_LIST: {"": _listing(lambda found: (*found, b"\1" * 32))},
        Behaviour.DUPLICATE_INDEX: {"": _listing(lambda found: (found[0], found[0], *found[2:]))},
    },
    Step.ACTIVATE: {Behaviour.EQUIVOCATING: {"": pretends}},
}

# -- rebuilding --------------------------------------------------------------------------------------------------------


def _another_blob(twin: Twin, answer: Any) -> Any:
    (gift, _), (_, sealed) = (
        seal_gift(twin.plan, twin.me, twin.seeds(twin.plan.epoch), twin.keys[twin.plan.target]) for _ in range(2)
    )
    return twin.gives(gift, sealed)


def _an_old_blob(twin: Twin, answer: Any) -> Any:
    _, sealed = seal_gift(twin.earlier, twin.me, twin.seeds(twin.plan.epoch), twin.keys[twin.plan.target])
    return twin.gives(Gift(twin.plan.digest, twin.me, twin.plan.target, hashlib.sha256(sealed).hexdigest()), sealed)


def _a_forged_request(twin: Twin, answer: Any) -> Any:
    payload = RebuildRequest(twin.plan.digest, twin.me).to_payload()
    return pb.ProposeResponse(statement=twin.signed(REBUILD_REQUEST_TYPE, payload, Identity.generate()))


_REBUILD_TARGET: _Table = {
    Step.PROPOSE: {
        Behaviour.EQUIVOCATING: {
            "in another's name": lambda t, a: t.requests(RebuildRequest(t.plan.digest, VICTIM)),
            "forged": _a_forged_request,
        },
        Behaviour.REPLAYING: {"": lambda t, a: t.requests(RebuildRequest(t.earlier.digest, t.me))},
        Behaviour.WRONG_EPOCH: {"": lambda t, a: t.requests(RebuildRequest(t.next_epoch.digest, t.me))},
    },
    Step.RESTORE: {
        Behaviour.EQUIVOCATING: {
            "about the certificate": lambda t, a: t.rebuilt(a, certificate="0" * 64),
            "in another's name": lambda t, a: t.rebuilt(a, custodian=VICTIM),
            "about a stranger": lambda t, a: t.rebuilt(a, wrong={"xx-1": 1}),
        },
        Behaviour.REPLAYING: {"": lambda t, a: t.rebuilt(a, plan_digest=t.earlier.digest)},
        Behaviour.WRONG_EPOCH: {"": lambda t, a: t.rebuilt(a, plan_digest=t.next_epoch.digest)},
        Behaviour.SHORT_LIST: {"": lambda t, a: t.rebuilt(a, seeds=len(t.plan.quorum.indices_of(t.me)) - 1)},
        Behaviour.LONG_LIST: {"": lambda t, a: t.rebuilt(a, seeds=t.plan.quorum.seed_count)},
    },
}
_REBUILD_GIVER: _Table = {
    Step.PROPOSE: {},
    Step.GIVE: {
        Behaviour.EQUIVOCATING: {
            "wrong seeds": lambda t, a: t.gives_seeds(dict.fromkeys(t.seeds(t.plan.epoch), b"\1" * 32)),
            "another blob": _another_blob,
        },
        Behaviour.REPLAYING: {
            "statement": lambda t, a: t.gives_seeds(t.seeds(t.plan.epoch), t.earlier),
            "blob": _an_old_blob,
        },
        Behaviour.WRONG_EPOCH: {"": lambda t, a: t.gives_seeds(t.seeds(t.plan.epoch), t.next_epoch)},
        Behaviour.SHORT_LIST: {"": lambda t, a: t.gives_bytes(b"")},
        Behaviour.LONG_LIST: {"": lambda t, a: t.gives_bytes(encode_contributions(t.seeds(t.plan.epoch)))},
        Behaviour.DUPLICATE_INDEX: {"": lambda t, a: t.gives_bytes(2 * encode_contributions(t.shared()))},
    },
}

# -- destroying --------------------------------------------------------------------------------------------------------

_DESTROY: _Table = {
    Step.PROPOSE: {
        Behaviour.EQUIVOCATING: {"": lambda t, a: t.consents(custodian=VICTIM)},
        Behaviour.REPLAYING: {"": lambda t, a: t.consents(plan_digest=t.earlier.digest)},
        Behaviour.WRONG_EPOCH: {"": lambda t, a: t.consents(plan_digest=t.next_epoch.digest)},
    },
    Step.ERASE: {
        Behaviour.EQUIVOCATING: {"": lambda t, a: t.erased(a, custodian=VICTIM)},
        Behaviour.REPLAYING: {"": lambda t, a: t.erased(a, plan_digest=t.earlier.digest)},
        Behaviour.WRONG_EPOCH: {"": lambda t, a: t.erased(a, plan_digest=t.next_epoch.digest)},
    },
}

# -- the matrix --------------------------------------------------------------------------------------------------------

_TABLES: dict[Phase, dict[Behaviour, dict[str, Lie]]] = {
    **{Phase(kind, step): lies for kind in sorted(MAKING) for step, lies in _MAKE.items()},
    **{Phase(kind, step, target=True): lies for kind in sorted(REBUILDING) for step, lies in _REBUILD_TARGET.items()},
    **{Phase(kind, step): lies for kind in sorted(REBUILDING) for step, lies in _REBUILD_GIVER.items()},
    **{Phase(Kind.DESTROY, step): lies for step, lies in _DESTROY.items()},
}
LIES: dict[Phase, dict[Behaviour, dict[str, Lie]]] = {phase: {**lies, **ABSENT} for phase, lies in _TABLES.items()}

_SAYS_NOTHING = "its answer is an empty message"
_LISTS_NOTHING = "it names a plan, and lists nothing"
_COUNTS = "it says how many, and lists nothing"
_ONLY_IT_KNOWS = "it says how many it erased, which nobody else can know"
_LISTS = (Behaviour.SHORT_LIST, Behaviour.LONG_LIST, Behaviour.DUPLICATE_INDEX)
_OF_ANOTHER = (Behaviour.REPLAYING, Behaviour.WRONG_EPOCH)


def _nothing_to_say(kind: Kind, step: Step, *, target: bool) -> dict[Behaviour, str]:
    if step is Step.ACTIVATE:
        return dict.fromkeys((*_OF_ANOTHER, *_LISTS), _SAYS_NOTHING)
    if step is Step.ERASE:
        return dict.fromkeys(_LISTS, _ONLY_IT_KNOWS)
    if step is Step.RESTORE:
        return {Behaviour.DUPLICATE_INDEX: _COUNTS}
    if step is Step.PROPOSE and kind in REBUILDING and not target:
        return dict.fromkeys((Behaviour.EQUIVOCATING, *_OF_ANOTHER, *_LISTS), _SAYS_NOTHING)
    if step is Step.PROPOSE and kind not in MAKING:
        return dict.fromkeys(_LISTS, _LISTS_NOTHING)
    return {}


IMPOSSIBLE: dict[Phase, dict[Behaviour, str]] = {
    phase: _nothing_to_say(phase.kind, phase.step, target=phase.target) for phase in LIES
}
"""Where a phase leaves nothing to lie about in that way, and why."""


def cells(phase: Phase) -> dict[str, tuple[Behaviour, Lie]]:
    """Every lie of a phase by its name."""
    return {
        " ".join(filter(None, (behaviour, name))): (behaviour, lie)
        for behaviour, named in LIES[phase].items()
        for name, lie in named.items()
    }


def links_with(twin: Twin | None) -> type[ApprovingLink]:
    """Links to custodians of which ``twin`` is one."""

    class Link(ApprovingLink):
        async def call(self, method: str, request: Any) -> Any:
            if twin is None or (self.id, method) != (twin.me, twin.method):
                return await super().call(method, request)
            return await twin.answer(lambda: super(Link, self).call(method, request))

    return Link
