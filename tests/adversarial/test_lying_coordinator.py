"""Malicious coordinators, one class for each lie, over real TLS: until the job runs. Each is told by its reason code.

The coordinator sees and relays everything between an owner, custodians and workers. Guarantee G1 says that this gets it
no key; what follows here besides is that it can withhold, but make nobody believe anything.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keyquorum.profile import load_profile
from keyquorum_core.ceremony import CERTIFICATE_TYPE, EpochCertificate
from keyquorum_core.derivation import context, contributions, purpose_key
from keyquorum_core.derivation import root as combine_root
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.witness_keys import witness_name
from keyquorum_core.manifest import subject
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.release import Leaf, sign_window
from keyquorum_core.roster import sign_roster
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity, open_multi, sign_many
from keyquorum_protos.v1 import coordinator_pb2 as pb
from keyquorum_protos.wire.tls import self_signed
from tests.support.client_world import (
    CLUSTER,
    COMMITTEE,
    COORDINATOR,
    FakeCustodian,
    World,
    job_folder,
    make_roster,
    the_world,
)
from tests.support.deceit import deceived, reason_of_submitting_to, submit
from tests.support.fake_coordinator import FakeCoordinator, JobRecord, share


@pytest.fixture
def world() -> World:
    return the_world().honest()


# -- G1: what passes through it is of no use to it --------------------------------------------------------------------


def secrets_of(world: World, job: JobRecord) -> list[bytes]:
    """The job's root, purpose keys, contributions and plaintext."""
    job_context = context(job.manifest.key_id, job.manifest.epoch, "job", subject(job.payload))
    shares = {
        index: value
        for custodian in world.custodians.values()
        for index, value in contributions(custodian.seeds, job_context).items()
    }
    key = combine_root(shares, job_context)
    purposes = [purpose_key(key, job_context, name) for name in ("bundle", "result", "telemetry")]
    return [key, *purposes, *shares.values(), b"print('hello')", bytes(range(256)), b'{"files": 2}']


async def test_g1_nothing_that_passes_through_the_coordinator_holds_key_contribution_or_plaintext(
    world: World, tmp_path: Path
) -> None:
    coordinator = FakeCoordinator(world)
    async with deceived(coordinator, tmp_path) as client:
        job = await submit(client, tmp_path)
        await client.result(job)
    everything = b"".join(coordinator.seen) + b"".join(coordinator.jobs[job].artifacts.values())
    assert len(everything) > 50_000
    assert not [secret for secret in secrets_of(world, coordinator.jobs[job]) if secret in everything]


class NamesItselfAsRecipient(FakeCoordinator):
    """Asks custodians to seal to its own key, with a leaf to match, and hands the owner what they say to that."""

    own = RecipientKey.generate()

    def leaf_for_owner(self, job: JobRecord) -> Leaf:
        return replace(super().leaf_for_owner(job), recipient_sha256=hashlib.sha256(self.own.public).hexdigest())


async def test_g1_a_coordinator_that_names_its_own_key_as_recipient_is_caught(world: World, tmp_path: Path) -> None:
    assert await reason_of_submitting_to(NamesItselfAsRecipient(world), tmp_path) is Reason.RECIPIENT


class PlantsAKey(FakeCoordinator):
    """Seals contributions of its own choice to the owner, which anybody can, so as to know the job's key."""

    key = Ed25519PrivateKey.generate()

    def answers(self, job: JobRecord, leaf: Leaf, recipient: bytes) -> Iterable[pb.AnswerEvent]:
        for honest in self.world.custodians.values():
            seeds = {index: secrets.token_bytes(32) for index in honest.seeds}
            twin = replace(honest, seeds=seeds, answer_key=self.key)
            now = self.clock()
            yield share(twin.answer(job.manifest_envelope, leaf, recipient, now), honest.window_statement(now))


async def test_g1_a_coordinator_cannot_plant_a_key_of_its_own(world: World, tmp_path: Path) -> None:
    assert await reason_of_submitting_to(PlantsAKey(world), tmp_path) is Reason.SIGNATURE


def stranger(name: str) -> FakeCustodian:
    """Somebody in a custodian's name."""
    return FakeCustodian(
        name, Identity.generate(), RecipientKey.generate(), Cosigner.generate(witness_name(CLUSTER, name))
    )


class PlantsAKeyWithItsOwnWindows(PlantsAKey):
    """The same, with window statements for its answer key under an identity that isn't the custodian's."""

    def answers(self, job: JobRecord, leaf: Leaf, recipient: bytes) -> Iterable[pb.AnswerEvent]:
        for name in self.world.custodians:
            twin = replace(stranger(name), answer_key=self.key)
            now = self.clock()
            answer = twin.answer(job.manifest_envelope, leaf, recipient, now)
            yield share(answer, sign_window(twin.window(now), twin.identity))


async def test_g1_window_statements_of_a_stranger_are_caught(world: World, tmp_path: Path) -> None:
    assert await reason_of_submitting_to(PlantsAKeyWithItsOwnWindows(world), tmp_path) is Reason.SIGNATURE


# -- who it is, and who the custodians are ----------------------------------------------------------------------------


async def test_a_coordinator_with_another_certificate_than_the_rosters_is_not_talked_to(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyquorum.session.FIRST_CONTACT_SECONDS", 0.5)
    twin = self_signed(CLUSTER, "coordinator", COORDINATOR, now=int(time.time()))
    coordinator = FakeCoordinator(replace(world, coordinator_tls=twin))
    assert await reason_of_submitting_to(coordinator, tmp_path) is Reason.UNAVAILABLE
    assert not coordinator.jobs


class SwapsTheRoster(FakeCoordinator):
    """Serves a roster of custodians that are all its own."""

    def roster(self) -> bytes:
        operator = Identity.generate()
        custodians = {name: stranger(name) for name, _ in COMMITTEE}
        tls, log = self.world.coordinator_tls, self.world.log
        return sign_roster(make_roster(custodians, operator, tls, log, int(time.time())), [operator])


async def test_a_swapped_roster_is_seen_and_changes_nothing(world: World, tmp_path: Path) -> None:
    async with deceived(SwapsTheRoster(world), tmp_path) as client:
        status = await client.status()
        assert not status.roster_pinned
        assert (await client.result(await submit(client, tmp_path))).custodians == world.quorum.ids


def test_a_roster_swapped_on_disk_is_refused(world: World, tmp_path: Path) -> None:
    profile = world.write_profile(tmp_path, "127.0.0.1:1")
    newer = replace(world.roster, version=2, previous=world.roster.digest)
    (tmp_path / "roster.json").write_bytes(sign_roster(newer, [world.operator]))
    with pytest.raises(KeyquorumError) as pinned:
        load_profile(profile)
    (tmp_path / "roster.json").write_bytes(SwapsTheRoster(world).roster())
    with pytest.raises(KeyquorumError) as forged:
        load_profile(profile)
    assert (pinned.value.reason, forged.value.reason) == (Reason.ROSTER, Reason.SIGNATURE)


class ShowsACertificateOfAnotherKey(FakeCoordinator):
    def key_message(self, key_id: str, epoch: int = 0) -> pb.Key:
        return pb.Key(key_id=key_id, epoch=1, state="active", certificate=self.world.certify(self.world.plan("other")))


class ShowsACertificateOfAnotherEpoch(FakeCoordinator):
    def key_message(self, key_id: str, epoch: int = 0) -> pb.Key:
        message = super().key_message(key_id)
        message.epoch = 2
        return message


class GivesAnotherEpochThanAsked(FakeCoordinator):
    def key_message(self, key_id: str, epoch: int = 0) -> pb.Key:
        return super().key_message(key_id)


class ShowsACertificateThatACustodianDidNotSign(FakeCoordinator):
    def key_message(self, key_id: str, epoch: int = 0) -> pb.Key:
        certificate = self.world.certify(self.world.plan(key_id), ["ch-1", "de-1", "de-2", "fr-1"])
        return pb.Key(key_id=key_id, epoch=1, state="active", certificate=certificate)


class ShowsACertificateOfItsOwn(FakeCoordinator):
    def key_message(self, key_id: str, epoch: int = 0) -> pb.Key:
        signers = {each.id: each.identity for each in self.world.roster.custodians}
        payload, _ = open_multi(self.certificates["demo"], CERTIFICATE_TYPE, signers, 5, "certificate")
        forged = sign_many([Identity.generate() for _ in signers], CERTIFICATE_TYPE, payload)
        return pb.Key(key_id=key_id, epoch=1, state="active", certificate=forged)


class ShowsACertificateForAWeakerQuorum(FakeCoordinator):
    """Properly signed, as in a ceremony for an earlier roster; today's roster asks for more."""

    def key_message(self, key_id: str, epoch: int = 0) -> pb.Key:
        weaker = Quorum({"at_least": 2}, (Custodian(name, where) for name, where in COMMITTEE))
        certificate = self.world.certify(self.world.plan(key_id, quorum=weaker))
        return pb.Key(key_id=key_id, epoch=1, state="active", certificate=certificate)


@pytest.mark.parametrize(
    ("liar", "reason"),
    [
        (ShowsACertificateOfAnotherKey, Reason.UNKNOWN_KEY),
        (ShowsACertificateOfAnotherEpoch, Reason.EPOCH),
        (ShowsACertificateThatACustodianDidNotSign, Reason.SIGNATURE_MISSING),
        (ShowsACertificateOfItsOwn, Reason.SIGNATURE),
        (ShowsACertificateForAWeakerQuorum, Reason.QUORUM_RULE),
    ],
)
async def test_a_key_is_what_all_custodians_certified(
    world: World, tmp_path: Path, liar: type[FakeCoordinator], reason: Reason
) -> None:
    coordinator = liar(world)
    assert await reason_of_submitting_to(coordinator, tmp_path) is reason
    assert not coordinator.jobs


async def test_an_epoch_is_the_one_that_was_asked_for(world: World, tmp_path: Path) -> None:
    async with deceived(GivesAnotherEpochThanAsked(world), tmp_path) as client:
        assert (await client.key("demo", 1)).epoch == 1
        for ask in (client.key("demo", 2), client.data_key("demo", classification="personal", epoch=2)):
            with pytest.raises(RefusedError) as caught:
                await ask
            assert (caught.value.reason, caught.value.expected, caught.value.actual) == (Reason.EPOCH, "2", "1")


class AnswersACeremonyWithAnotherKey(FakeCoordinator):
    async def RunCeremony(self, request: pb.RunCeremonyRequest, context: object) -> AsyncIterator[pb.CeremonyEvent]:
        yield pb.CeremonyEvent(step="done", certificate=self.certificates["demo"])


async def test_a_ceremony_that_ends_with_another_certificate_is_caught(world: World, tmp_path: Path) -> None:
    async with deceived(AnswersACeremonyWithAnotherKey(world), tmp_path) as client:
        with pytest.raises(KeyquorumError) as caught:
            await client.key_create("new")
    assert caught.value.reason is Reason.CEREMONY


# -- the job ----------------------------------------------------------------------------------------------------------


class SwapsTheJob(FakeCoordinator):
    """Answers every question about a job with the first one it got."""

    def job_message(self, job: JobRecord) -> pb.Job:
        return super().job_message(next(iter(self.jobs.values())))


async def test_another_job_in_the_place_of_the_submitted_one_is_caught(world: World, tmp_path: Path) -> None:
    async with deceived(SwapsTheJob(world), tmp_path) as client:
        await submit(client, tmp_path)
        with pytest.raises(KeyquorumError) as caught:
            await client.submit(job_folder(tmp_path / "second", {"main.py": b"2"}), key="demo")
    assert caught.value.reason is Reason.WRONG_JOB


class RenamesTheJob(FakeCoordinator):
    """The right manifest under a wrong name, owner or key."""

    def job_message(self, job: JobRecord) -> pb.Job:
        message = super().job_message(job)
        message.key_id = "other"
        return message


async def test_a_job_said_to_be_under_another_key_is_caught(world: World, tmp_path: Path) -> None:
    assert await reason_of_submitting_to(RenamesTheJob(world), tmp_path) is Reason.WRONG_JOB


class RewritesTheManifest(FakeCoordinator):
    def job_message(self, job: JobRecord) -> pb.Job:
        message = super().job_message(job)
        message.manifest = message.manifest.replace(b'"sig":"', b'"sig":"AAAA', 1)[: len(message.manifest)]
        return message


async def test_a_changed_manifest_is_caught(world: World, tmp_path: Path) -> None:
    reason = await reason_of_submitting_to(RewritesTheManifest(world), tmp_path)
    assert reason in (Reason.SIGNATURE, Reason.MALFORMED)


class StoresAnotherBundle(FakeCoordinator):
    def stored(self, job: JobRecord, kind: str) -> pb.ArtifactState:
        state = super().stored(job, kind)
        if state.complete:
            state.sha256 = bytes(32)
        return state


async def test_a_store_that_confirms_another_bundle_is_caught(world: World, tmp_path: Path) -> None:
    assert await reason_of_submitting_to(StoresAnotherBundle(world), tmp_path) is Reason.ARTIFACT


# -- custodians' answers ----------------------------------------------------------------------------------------------


async def test_hidden_custodians_are_named(world: World, tmp_path: Path) -> None:
    class HidesCustodians(FakeCoordinator):
        async def open_events(self, job: JobRecord) -> AsyncIterator[pb.AnswerEvent]:
            async for event in super().open_events(job):
                if event.answer.custodian in ("", "ch-1", "de-1"):
                    yield event

    async with deceived(HidesCustodians(world), tmp_path) as client:
        with pytest.raises(UnavailableError) as caught:
            await submit(client, tmp_path)
    assert caught.value.reason is Reason.NO_QUORUM
    assert {name for name, why in caught.value.details.items() if why == "no answer"} == {"de-2", "fr-1", "is-1"}


class ForgesSignatures(FakeCoordinator):
    def answers(self, job: JobRecord, leaf: Leaf, recipient: bytes) -> Iterable[pb.AnswerEvent]:
        for event in super().answers(job, leaf, recipient):
            event.answer.share.signature = secrets.token_bytes(64)
            yield event


class ChangesCiphertext(FakeCoordinator):
    def answers(self, job: JobRecord, leaf: Leaf, recipient: bytes) -> Iterable[pb.AnswerEvent]:
        for event in super().answers(job, leaf, recipient):
            sealed = event.answer.share.sealed
            event.answer.share.sealed = sealed[:-1] + bytes([sealed[-1] ^ 1])
            yield event


class AnswersForAnotherEpoch(FakeCoordinator):
    def answers(self, job: JobRecord, leaf: Leaf, recipient: bytes) -> Iterable[pb.AnswerEvent]:
        for event in super().answers(job, leaf, recipient):
            event.answer.share.epoch = 2
            yield event


class AnswersInOneCustodiansName(FakeCoordinator):
    """One custodian's answer, said to be everybody's."""

    def answers(self, job: JobRecord, leaf: Leaf, recipient: bytes) -> Iterable[pb.AnswerEvent]:
        events = list(super().answers(job, leaf, recipient))
        for name in self.world.custodians:
            copy = pb.AnswerEvent()
            copy.CopyFrom(events[0])
            copy.answer.custodian = name
            yield copy


class ReplaysAnOldWindow(FakeCoordinator):
    """Answers of an hour ago, with their windows: made when the answer keys of that hour may have leaked."""

    def answers(self, job: JobRecord, leaf: Leaf, recipient: bytes) -> Iterable[pb.AnswerEvent]:
        then = time.time() - 3600
        for custodian in self.world.custodians.values():
            answer = custodian.answer(job.manifest_envelope, leaf, recipient, then)
            yield share(answer, custodian.window_statement(then))


class GivesNoWindows(FakeCoordinator):
    def answers(self, job: JobRecord, leaf: Leaf, recipient: bytes) -> Iterable[pb.AnswerEvent]:
        for event in super().answers(job, leaf, recipient):
            event.window_statement = b""
            yield event


class GivesNoLeaf(FakeCoordinator):
    async def open_events(self, job: JobRecord) -> AsyncIterator[pb.AnswerEvent]:
        async for event in super().open_events(job):
            if not event.leaf:
                yield event


class ChangesTheLeafMidway(FakeCoordinator):
    async def open_events(self, job: JobRecord) -> AsyncIterator[pb.AnswerEvent]:
        async for event in super().open_events(job):
            yield event
            yield pb.AnswerEvent(leaf=replace(self.leaf_for_owner(job), time=1).to_bytes())


@pytest.mark.parametrize(
    ("liar", "reason"),
    [
        (ForgesSignatures, Reason.SIGNATURE),
        (ChangesCiphertext, Reason.SIGNATURE),
        (AnswersForAnotherEpoch, Reason.EPOCH),
        (AnswersInOneCustodiansName, Reason.NO_QUORUM),
        (ReplaysAnOldWindow, Reason.STALE),
        (GivesNoWindows, Reason.STALE),
        (GivesNoLeaf, Reason.LEAF),
        (ChangesTheLeafMidway, Reason.LEAF),
    ],
)
async def test_answers_that_are_not_the_custodians_own_do_not_count(
    world: World, tmp_path: Path, liar: type[FakeCoordinator], reason: Reason
) -> None:
    assert await reason_of_submitting_to(liar(world), tmp_path) is reason


class ReplaysAnswersOfAnotherJob(FakeCoordinator):
    """Answers a second job's opening with the shares of the first; ``with_leaf``: and with its leaf."""

    with_leaf = False

    async def open_events(self, job: JobRecord) -> AsyncIterator[pb.AnswerEvent]:
        first = next(iter(self.jobs.values()))
        if job is first:
            async for event in super().open_events(job):
                yield event
            return
        if not self.with_leaf:
            leaf = self.leaf_for_owner(job).to_bytes()
            yield pb.AnswerEvent(leaf=leaf, leaf_proof=self.leaf_proof(leaf))
        for event in first.open_answers:
            if self.with_leaf or not event.leaf:
                yield event


@pytest.mark.parametrize(("with_leaf", "reason"), [(False, Reason.SIGNATURE), (True, Reason.WRONG_JOB)])
async def test_answers_of_another_job_are_caught(world: World, tmp_path: Path, with_leaf: bool, reason: Reason) -> None:
    coordinator = ReplaysAnswersOfAnotherJob(world)
    coordinator.with_leaf = with_leaf
    async with deceived(coordinator, tmp_path) as client:
        await submit(client, tmp_path)
        with pytest.raises(KeyquorumError) as caught:
            await client.submit(job_folder(tmp_path / "second", {"main.py": b"2"}), key="demo")
    assert caught.value.reason is reason


async def test_a_coordinator_that_spoils_some_answers_is_survived_and_they_are_named(
    world: World, tmp_path: Path
) -> None:
    class SpoilsTwo(FakeCoordinator):
        def answers(self, job: JobRecord, leaf: Leaf, recipient: bytes) -> Iterable[pb.AnswerEvent]:
            for event in super().answers(job, leaf, recipient):
                if event.answer.custodian in ("ch-1", "de-1") and recipient == job.manifest.owner_hpke:
                    event.answer.share.signature = bytes(64)
                yield event

    async with deceived(SpoilsTwo(world), tmp_path) as client:
        submitted = await client.submit(job_folder(tmp_path / "job"), key="demo")
    assert set(submitted.refused) == {"ch-1", "de-1"}
    assert not submitted.blamed, "nobody is blamed for what he didn't sign"
    assert not submitted.confirmed


def test_certificates_of_the_fake_are_real(world: World) -> None:
    """Else the lies above would be caught for the wrong reason."""
    signers = {each.id: each.identity for each in world.roster.custodians}
    payload, signed = open_multi(world.certificates["demo"], CERTIFICATE_TYPE, signers, 5, "certificate")
    assert signed == world.quorum.ids
    assert EpochCertificate.parse(payload).plan.key_id == "demo"
