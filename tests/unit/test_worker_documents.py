"""A job begun under another rule than the worker's roster has: the coordinator brings the epoch's certificate, and the
worker believes it by the roster it pinned or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from keyquorum_core.ceremony_plan import CeremonyPlan, new_ceremony_id
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.quorum import Quorum
from keyquorum_core.roster import Roster, sign_roster
from keyquorum_gpu_worker.documents import open_documents
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.client_world import CLUSTER, World, the_world
from tests.support.coordinator import Owner


@pytest.fixture(scope="module")
def world() -> World:
    return the_world().honest()


def successor(world: World) -> Roster:
    """What the worker pins by now: four of five."""
    return replace(world.roster, version=2, previous=world.roster.digest, quorum={"at_least": 4})


def plan(world: World, **changes: object) -> CeremonyPlan:
    made = CeremonyPlan(
        new_ceremony_id(),
        "k1",
        1,
        "MLKEM768_X25519",
        CLUSTER,
        world.roster.digest,
        world.quorum,
        int(time.time()),
        KeyPolicy(),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def job(world: World) -> pb.Job:
    owner = Owner()
    name, manifest = owner.manifest()
    return pb.Job(
        job_id=name,
        manifest=manifest,
        opening=owner.opening(name, b"bundle"),
        certificate=world.certify(plan(world)),
        rosters=[sign_roster(world.roster, [world.operator])],
    )


def test_the_epochs_own_rule_is_what_answers_are_combined_by(world: World, job: pb.Job) -> None:
    pinned = successor(world)
    documents = open_documents(job, pinned, int(time.time()))
    assert documents.quorum == world.quorum
    assert documents.quorum != pinned.quorum_of()
    job.ClearField("certificate")
    assert open_documents(job, pinned, int(time.time())).quorum == pinned.quorum_of()


def _other_epoch(world: World, job: pb.Job) -> None:
    job.certificate = world.certify(plan(world, key_id="k2"))


def _unsigned(world: World, job: pb.Job) -> None:
    job.certificate = world.certify(plan(world), signers=["ch-1", "de-1"])


def _without_roster(world: World, job: pb.Job) -> None:
    del job.rosters[:]


def _roster_of_its_own(world: World, job: pb.Job) -> None:
    """One that the pinned roster doesn't name as the one before it."""
    easy = replace(world.roster, quorum={"at_least": 2})
    quorum = Quorum(easy.quorum, world.quorum.committee)
    job.certificate = world.certify(plan(world, quorum=quorum, roster_digest=easy.digest))
    job.rosters[0] = sign_roster(easy, [world.operator])


def _easier_rule(world: World, job: pb.Job) -> None:
    """Signed by everyone, for a rule that the roster it names never had."""
    job.certificate = world.certify(plan(world, quorum=Quorum({"at_least": 2}, world.quorum.committee)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_epoch, Reason.EPOCH),
        (_unsigned, Reason.SIGNATURE_MISSING),
        (_without_roster, Reason.ROSTER),
        (_roster_of_its_own, Reason.ROSTER),
        (_easier_rule, Reason.QUORUM_RULE),
    ],
)
def test_a_certificate_that_the_pinned_roster_does_not_bear_out_is_refused(
    world: World, job: pb.Job, change: Callable[[World, pb.Job], None], reason: Reason
) -> None:
    change(world, job)
    with pytest.raises(KeyquorumError) as caught:
        open_documents(job, successor(world), int(time.time()))
    assert caught.value.reason is reason, caught.value
