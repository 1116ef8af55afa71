"""Malicious twins in ceremonies: custodians that lie in every way in every step.

Whatever they do, whoever is honest names them or the step, the epoch before is as it was, and the next honest ceremony
succeeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from keyquorum_coordinator.ceremonies import Ceremonies
from keyquorum_core import ceremony
from keyquorum_core.ceremony import CERTIFICATE_TYPE, COMMITMENTS_TYPE, PARTS_TYPE, Commitments
from keyquorum_core.ceremony_plan import CeremonyPlan
from keyquorum_core.derivation import encode_contributions
from keyquorum_core.destruction import (
    CONSENT_TYPE,
    Consent,
)
from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_core.parts import SealedPart, parts_header, parts_info, seal_parts, shared_indices
from keyquorum_core.rebuilding import GIFT_TYPE, Gift, gift_info, seal_gift
from keyquorum_core.sealing import seal
from keyquorum_core.signing import Identity, peek_payload, sign
from keyquorum_protos.v1 import custodian_pb2 as pb
from tests.support.ceremonies import Destroy, Make, Rebuild, derived, refused
from tests.support.custodian import THREE, TWO_OF_THREE, Committee, build_committee
from tests.support.direct import DirectFanout, DirectLink, MortalDatabase, end_of, open_database

LIAR, VICTIM, STALE = "is-1", "ch-1", "no-1"


# -- custodians that lie -------------------------------------------------------------------------------------------


class Twin:
    """One custodian of three, with its own identity and keystore, whose answers are not what they should be.

    ``in_step`` is the method it lies in; a subclass's :meth:`lie` makes the answer out of the honest one.
    """

    in_step = ""
    reasons: tuple[Reason, ...] = (Reason.CEREMONY,)

    def __init__(self, committee: Committee, plan: CeremonyPlan) -> None:
        self.committee = committee
        self.plan = plan
        self.store = committee.open(LIAR).keystore
        self.identity = self.store.identity()
        self.keys = {each.id: each.hpke for each in committee.roster.custodians}

    def lie(self, request: Any, answer: Any) -> Any:
        raise NotImplementedError

    def signed(self, payload_type: str, payload: bytes, by: Identity | None = None) -> bytes:
        return sign(by or self.identity, payload_type, payload)

    def header(self, parts: tuple[SealedPart, ...], **changes: Any) -> pb.ProposeResponse:
        """These parts, under a header that fits them but for ``changes``."""
        made = replace(parts_header(self.plan, LIAR, parts), **changes)
        wire = [pb.SealedParts(**{"from": part.sender}, to=part.to, sealed=part.sealed) for part in parts]
        return pb.ProposeResponse(header=self.signed(PARTS_TYPE, made.to_payload()), parts=wire)

    def parts(self, wrong_to: str = "") -> tuple[SealedPart, ...]:
        """Fresh parts for everyone, others for ``wrong_to``."""
        one, two = (ceremony.new_parts(self.plan.quorum, LIAR) for _ in range(2))
        honest = seal_parts(self.plan, LIAR, one, self.keys)
        lies = seal_parts(self.plan, LIAR, two, self.keys)
        return tuple(lie if lie.to == wrong_to else part for part, lie in zip(honest, lies, strict=True))

    def blob(self, to: str, plaintext: bytes) -> SealedPart:
        info = parts_info(self.plan.ceremony_id, LIAR, to, self.keys[to])
        return SealedPart(LIAR, to, seal(self.keys[to], plaintext, info))


class EquivocatesInItsParts(Twin):
    """Other parts to one co-holder than it used itself, under one header that fits both."""

    in_step = "Propose"

    def lie(self, request: Any, answer: pb.ProposeResponse) -> pb.ProposeResponse:
        return self.header(self.parts(VICTIM))


class SendsShortParts(Twin):
    in_step = "Propose"

    def lie(self, request: Any, answer: pb.ProposeResponse) -> pb.ProposeResponse:
        parts = ceremony.new_parts(self.plan.quorum, LIAR)
        shared = shared_indices(self.plan.quorum, LIAR, VICTIM)
        short = self.blob(VICTIM, encode_contributions({index: parts[index] for index in shared[1:]}))
        others = [part for part in self.parts() if part.to != VICTIM]
        return self.header((short, *others))


class SendsLongParts(Twin):
    in_step = "Propose"

    def lie(self, request: Any, answer: pb.ProposeResponse) -> pb.ProposeResponse:
        everything = dict.fromkeys(range(self.plan.quorum.seed_count), b"\x01" * 32)
        others = [part for part in self.parts() if part.to != VICTIM]
        return self.header((self.blob(VICTIM, encode_contributions(everything)), *others))


class RepeatsAnIndexInItsParts(Twin):
    in_step = "Propose"

    def lie(self, request: Any, answer: pb.ProposeResponse) -> pb.ProposeResponse:
        entry = encode_contributions({shared_indices(self.plan.quorum, LIAR, VICTIM)[0]: b"\1" * 32})
        others = [part for part in self.parts() if part.to != VICTIM]
        return self.header((self.blob(VICTIM, entry + entry), *others))


class SendsAHeaderForAnotherEpoch(Twin):
    in_step = "Propose"

    def lie(self, request: Any, answer: pb.ProposeResponse) -> pb.ProposeResponse:
        other = replace(self.plan, epoch=self.plan.epoch + 1)
        return self.header(self.parts(), plan_digest=other.digest)


class LeavesACoHolderOut(Twin):
    in_step = "Propose"

    def lie(self, request: Any, answer: pb.ProposeResponse) -> pb.ProposeResponse:
        return self.header(tuple(part for part in self.parts() if part.to != VICTIM))


class SignsAsAnother(Twin):
    in_step = "Propose"

    def lie(self, request: Any, answer: pb.ProposeResponse) -> pb.ProposeResponse:
        return self.header(self.parts(), custodian=VICTIM)


class ReplaysAHeaderOfAnotherCeremony(Twin):
    in_step = "Propose"

    def lie(self, request: Any, answer: pb.ProposeResponse) -> pb.ProposeResponse:
        old = self.committee.open(LIAR).ceremonies.propose(self.committee.sign_plan(self.committee.plan("another-key")))
        assert old.proposal is not None
        wire = [pb.SealedParts(**{"from": p.sender}, to=p.to, sealed=p.sealed) for p in old.proposal.parts]
        return pb.ProposeResponse(header=old.proposal.header, parts=wire)


class ForgesItsSignature(Twin):
    in_step = "Propose"
    reasons = (Reason.SIGNATURE,)

    def lie(self, request: Any, answer: pb.ProposeResponse) -> pb.ProposeResponse:
        payload = peek_payload(answer.header, PARTS_TYPE, "header")
        answer.header = self.signed(PARTS_TYPE, payload, Identity.generate())
        return answer


class _Commits(Twin):
    in_step = "Deliver"

    def lie(self, request: Any, answer: pb.DeliverResponse) -> pb.DeliverResponse:
        stated = Commitments.parse(peek_payload(answer.commitments, COMMITMENTS_TYPE, "commitments"))
        return pb.DeliverResponse(commitments=self.signed(COMMITMENTS_TYPE, self.stated(stated)))

    def stated(self, honest: Commitments) -> bytes:
        raise NotImplementedError


class CommitsToAnotherSeed(_Commits):
    def stated(self, honest: Commitments) -> bytes:
        first = min(honest.commitments)
        return replace(honest, commitments={**honest.commitments, first: b"\1" * 32}).to_payload()


class CommitsToTooFew(_Commits):
    def stated(self, honest: Commitments) -> bytes:
        first = min(honest.commitments)
        return replace(honest, commitments={i: c for i, c in honest.commitments.items() if i != first}).to_payload()


class CommitsToTooMany(_Commits):
    def stated(self, honest: Commitments) -> bytes:
        extra = next(i for i in range(self.plan.quorum.seed_count) if i not in honest.commitments)
        return replace(honest, commitments={**honest.commitments, extra: b"\1" * 32}).to_payload()


class CommitsToAnIndexTwice(_Commits):
    reasons = (Reason.MALFORMED,)

    def stated(self, honest: Commitments) -> bytes:
        tree = json.loads(honest.to_payload())
        tree["commitments"] = [tree["commitments"][0], *tree["commitments"]]
        return rfc8785.dumps(tree)


class CommitsForAnotherEpoch(_Commits):
    def stated(self, honest: Commitments) -> bytes:
        return replace(honest, plan_digest=replace(self.plan, epoch=self.plan.epoch + 1).digest).to_payload()


class SaysItWentByAnotherHeader(_Commits):
    """As if ``VICTIM`` had signed two."""

    def stated(self, honest: Commitments) -> bytes:
        return replace(honest, headers={**honest.headers, VICTIM: "0" * 64}).to_payload()


class SaysAnotherWasAbsent(_Commits):
    def stated(self, honest: Commitments) -> bytes:
        return replace(honest, headers={n: h for n, h in honest.headers.items() if n != VICTIM}).to_payload()


class SignsAnotherCertificate(Twin):
    in_step = "Confirm"

    def lie(self, request: Any, answer: pb.ConfirmResponse) -> pb.ConfirmResponse:
        payload = peek_payload(answer.certificate, CERTIFICATE_TYPE, "certificate")
        found = ceremony.EpochCertificate.parse(payload)
        other = replace(found, commitments=(b"\1" * 32, *found.commitments[1:]))
        return pb.ConfirmResponse(certificate=self.signed(CERTIFICATE_TYPE, other.to_payload()))


class HalfSigns(Twin):
    in_step = "Confirm"
    reasons = (Reason.SIGNATURE_MISSING,)

    def lie(self, request: Any, answer: pb.ConfirmResponse) -> pb.ConfirmResponse:
        tree = json.loads(answer.certificate)
        tree["signatures"] = tree["signatures"][:1]
        return pb.ConfirmResponse(certificate=json.dumps(tree, separators=(",", ":")).encode())


class _IsSilent(Twin):
    reasons = (Reason.UNAVAILABLE,)

    def lie(self, request: Any, answer: Any) -> Any:
        raise UnavailableError(Reason.UNAVAILABLE, f"{LIAR} does not answer")


class IsSilentWhenDelivering(_IsSilent):
    in_step = "Deliver"


class IsSilentWhenConfirming(_IsSilent):
    in_step = "Confirm"


MAKING_TWINS = [
    EquivocatesInItsParts,
    SendsShortParts,
    SendsLongParts,
    RepeatsAnIndexInItsParts,
    SendsAHeaderForAnotherEpoch,
    LeavesACoHolderOut,
    SignsAsAnother,
    ReplaysAHeaderOfAnotherCeremony,
    ForgesItsSignature,
    CommitsToAnotherSeed,
    CommitsToTooFew,
    CommitsToTooMany,
    CommitsToAnIndexTwice,
    CommitsForAnotherEpoch,
    SaysItWentByAnotherHeader,
    SaysAnotherWasAbsent,
    SignsAnotherCertificate,
    HalfSigns,
    IsSilentWhenDelivering,
    IsSilentWhenConfirming,
]


def links_with(twin: Twin | None) -> type[DirectLink]:
    class Link(DirectLink):
        async def call(self, method: str, request: Any) -> Any:
            answer = await super().call(method, request)
            if twin is not None and self.id == LIAR and method == twin.in_step:
                return twin.lie(request, answer)
            return answer

    return Link


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Committee:
    built = build_committee(tmp_path_factory.mktemp("hostile"), THREE, TWO_OF_THREE)
    built.generate()
    built.close()
    return built


@pytest.fixture
def committee(template: Committee, tmp_path: Path) -> Any:
    copied = template.copy(tmp_path / "custodians")
    copied.open_all()
    yield copied
    copied.close()


@pytest.fixture
async def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MortalDatabase]:
    monkeypatch.setattr("keyquorum_coordinator.driving._RETRIES", ())
    opened = open_database(tmp_path / "coordinator.db")
    yield opened
    opened.close()


def engine(database: MortalDatabase, committee: Committee, twin: Twin | None = None) -> Ceremonies:
    return Ceremonies(database, DirectFanout(committee, links_with(twin)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", MAKING_TWINS, ids=lambda kind: kind.__name__)
async def test_a_custodian_that_lies_while_an_epoch_is_made_stops_it_and_is_named(
    committee: Committee, database: MortalDatabase, kind: type[Twin]
) -> None:
    before = derived(committee, 1)
    make = Make.rotate(committee, "key-1")
    with pytest.raises(KeyquorumError) as caught:
        await end_of(engine(database, committee, kind(committee, make.plan)), make.envelope)
    error = caught.value
    assert error.reason in kind.reasons, error
    step = {"Propose": ("propose", "deliver"), "Deliver": ("deliver", "confirm"), "Confirm": ("confirm",)}
    assert error.details["step"] in step[kind.in_step]
    named = " ".join([error.message, *error.details.values()])
    assert LIAR in named
    for node in committee.nodes.values():
        row = node.keystore.ceremony(make.id)
        assert row is not None
        assert (str(row.state), node.keystore.epochs("key-1")[-1].epoch) == ("cancelled", 1)
    assert derived(committee, 1) == before
    (record,) = await engine(database, committee).records("key-1")
    assert record.step == "cancelled"
    assert record.error is not None
    assert record.error.message == error.message
    again = Make.rotate(committee, "key-1")
    assert (await end_of(engine(database, committee), again.envelope)).step == "done"
    assert derived(committee, 1) == before
    assert derived(committee, 2) != before


async def test_a_custodian_silent_from_the_start_is_absent_and_silent_at_the_end_is_stale(
    committee: Committee, database: MortalDatabase
) -> None:
    class IsSilent(_IsSilent):
        in_step = "Propose"

    make = Make.rotate(committee, "key-1")
    assert LIAR in (await end_of(engine(database, committee, IsSilent(committee, make.plan)), make.envelope)).note
    ceremonies = engine(database, committee)
    assert (await ceremonies.key("key-1")).stale == (LIAR,)
    IsSilent.in_step = "Activate"
    make = Make(committee, committee.plan("key-2"))
    assert LIAR in (await end_of(engine(database, committee, IsSilent(committee, make.plan)), make.envelope)).note


async def test_a_late_custodian_changes_nothing_once_the_others_gave_up(committee: Committee) -> None:
    """Its answer to *deliver* comes when everyone has cancelled: nobody goes on with it, nor does it by itself."""
    make = Make.rotate(committee, "key-1").propose()
    for name in (VICTIM, STALE):
        make.deliver_one(name)
        committee.open(name).ceremonies.cancel(make.id)
    make.deliver_one(LIAR)
    for name in (VICTIM, STALE):
        refused(Reason.STATE, make.confirm_one, name)
    refused(Reason.CEREMONY, committee.open(LIAR).ceremonies.confirm, make.id, [make.commitments[LIAR]])
    committee.open(LIAR).ceremonies.cancel(make.id)
    Make.rotate(committee, "key-1").activate()


# -- co-holders that lie -------------------------------------------------------------------------------------------


def wrong_seeds(twin: Twin, seeds: dict[int, bytes]) -> tuple[Gift, bytes]:
    return seal_gift(twin.plan, LIAR, {index: bytes(31) + b"x" for index in seeds}, twin.keys[STALE])


def of_another_epoch(twin: Twin, seeds: dict[int, bytes]) -> tuple[Gift, bytes]:
    row = twin.store.epoch("key-1", 1)
    assert row is not None
    return seal_gift(twin.plan, LIAR, twin.store.seeds(row), twin.keys[STALE])


def sealed_as(plaintext: Callable[[Twin, dict[int, bytes]], bytes]) -> Callable[[Twin, dict[int, bytes]], Any]:
    def give(twin: Twin, seeds: dict[int, bytes]) -> tuple[Gift, bytes]:
        info = gift_info(twin.plan.ceremony_id, LIAR, STALE, twin.keys[STALE])
        sealed = seal(twin.keys[STALE], plaintext(twin, seeds), info)
        return Gift(twin.plan.digest, LIAR, STALE, hashlib.sha256(sealed).hexdigest()), sealed

    return give


def shared(twin: Twin, seeds: dict[int, bytes]) -> dict[int, bytes]:
    return {index: seeds[index] for index in shared_indices(twin.plan.quorum, LIAR, STALE)}


GIFTS: dict[str, Callable[[Twin, dict[int, bytes]], tuple[Gift, bytes]]] = {
    "wrong seeds": wrong_seeds,
    "seeds of another epoch": of_another_epoch,
    "a short list": sealed_as(lambda twin, seeds: b""),
    "a long list": sealed_as(lambda twin, seeds: encode_contributions(seeds)),
    "an index twice": sealed_as(lambda twin, seeds: 2 * encode_contributions(shared(twin, seeds))),
    "another order": sealed_as(lambda twin, seeds: encode_contributions(shared(twin, seeds))[::-1]),
}


@pytest.mark.parametrize("what", list(GIFTS))
async def test_a_co_holder_that_gives_wrong_seeds_is_named_and_the_others_suffice(
    tmp_path: Path, database: MortalDatabase, what: str
) -> None:
    """Three of five: every seed of the stale one has two holders among the rest."""
    five = (("ch-1", "CH"), ("de-1", "DE"), (LIAR, "IS"), ("jp-1", "JP"), (STALE, "NO"))
    committee = build_committee(tmp_path / "five", five, {"at_least": 3})
    committee.generate()
    Make.rotate(committee, "key-1", present=[name for name in committee.ids if name != STALE]).activate()
    repair = Rebuild(committee, "key-1", 2, STALE)

    class Gives(Twin):
        in_step = "Give"

        def lie(self, request: Any, answer: pb.GiveResponse) -> pb.GiveResponse:
            row = self.store.epoch("key-1", 2)
            assert row is not None
            gift, sealed = GIFTS[what](self, self.store.seeds(row))
            return pb.GiveResponse(statement=self.signed(GIFT_TYPE, gift.to_payload()), sealed=sealed)

    end = await end_of(engine(database, committee, Gives(committee, repair.plan)), repair.envelope)
    assert LIAR in end.note
    assert [each.custodian for each in committee.open(STALE).keystore.accusations()] == [LIAR]
    assert derived(committee, 2)
    committee.close()


async def test_the_only_holder_that_gives_wrong_seeds_stops_the_repair_and_is_named(
    committee: Committee, database: MortalDatabase
) -> None:
    Make.rotate(committee, "key-1", present=(VICTIM, LIAR)).activate()
    repair = Rebuild(committee, "key-1", 2, STALE)

    class Gives(Twin):
        in_step = "Give"

        def lie(self, request: Any, answer: pb.GiveResponse) -> pb.GiveResponse:
            row = self.store.epoch("key-1", 2)
            assert row is not None
            gift, sealed = wrong_seeds(self, self.store.seeds(row))
            return pb.GiveResponse(statement=self.signed(GIFT_TYPE, gift.to_payload()), sealed=sealed)

    with pytest.raises(KeyquorumError) as caught:
        await end_of(engine(database, committee, Gives(committee, repair.plan)), repair.envelope)
    assert LIAR in " ".join(caught.value.details.values())
    assert committee.open(STALE).keystore.epoch("key-1", 2) is None
    assert derived(committee, 1)
    again = Rebuild(committee, "key-1", 2, STALE)
    assert (await end_of(engine(database, committee), again.envelope)).step == "done"


async def test_a_custodian_that_only_says_that_it_agreed_or_erased_is_found_out(
    committee: Committee, database: MortalDatabase
) -> None:
    """A consent, and a receipt, for another plan; and one that somebody else signed."""

    class Consents(Twin):
        in_step = "Propose"

        def lie(self, request: Any, answer: pb.ProposeResponse) -> pb.ProposeResponse:
            return pb.ProposeResponse(statement=self.signed(CONSENT_TYPE, Consent("0" * 64, LIAR).to_payload()))

    destroy = Destroy(committee, "key-1", 1).approve()
    with pytest.raises(KeyquorumError) as caught:
        await end_of(engine(database, committee, Consents(committee, destroy.plan)), destroy.envelope)
    assert LIAR in caught.value.message
    assert derived(committee, 1)
