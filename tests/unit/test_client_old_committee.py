"""A result whose release was vouched for by custodians that others took the place of since."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from keyquorum.outcomes import outcome_from_wire
from keyquorum.verify import MadeFor, OutcomeBytes, VerifiedOutcome, verify_outcome
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.quorum import Quorum
from keyquorum_core.roster import Roster
from keyquorum_core.signing import Identity
from tests.support.client_world import World, the_world
from tests.support.deceit import deceived, submit
from tests.support.fake_coordinator import FakeCoordinator


@pytest.fixture(scope="module")
def world() -> World:
    return the_world().honest()


async def ended(world: World, folder: Path) -> tuple[str, OutcomeBytes]:
    async with deceived(FakeCoordinator(world), folder) as client:
        job = await submit(client, folder)
        await client.result(job)
        return job, outcome_from_wire(await client._outcome(client._connection("owner"), job))


async def test_receipts_count_by_the_committee_that_the_epoch_was_made_for(world: World, tmp_path: Path) -> None:
    job, outcome = await ended(world, tmp_path)
    others = tuple(replace(each, identity=Identity.generate().public) for each in world.roster.custodians)
    pinned = replace(world.roster, version=2, previous=world.roster.digest, custodians=others)

    def verify(quorum: Quorum, roster: Roster) -> VerifiedOutcome:
        return verify_outcome(
            outcome,
            job=job,
            owner=world.owner.public,
            roster=pinned,
            made_for=MadeFor(quorum, roster),
            now=int(time.time()),
        )

    assert verify(world.quorum, world.roster).custodians == world.quorum.ids
    # By nobody else: the ones in their places signed nothing.
    with pytest.raises(KeyquorumError) as caught:
        verify(world.quorum, pinned)
    assert caught.value.reason is Reason.SIGNATURE
