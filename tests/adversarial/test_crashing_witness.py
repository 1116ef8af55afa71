"""A custodian killed at every write of what it keeps of the ledger.

It comes back before or after the write, never beside it; it has said nothing on the strength of what is not on its
disk; and it forgets no alarm.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_custodian import ledger_alarms
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.v1 import custodian_pb2_grpc as rpc
from keyquorum_protos.wire.errors import from_status
from tests.support.custodian import Committee, build_committee
from tests.support.ledger import update_message
from tests.support.mortal import MortalCustodian

ME = "ch-1"


class Mortal(MortalCustodian):
    """Asked over its release stream, as a coordinator does."""

    def __init__(self, committee: Committee) -> None:
        super().__init__(committee, ME)
        self.committee = committee

    async def ask(self, message: pb.ReleaseRequest) -> pb.ReleaseAnswer:
        """Raises :class:`UnavailableError` when the custodian died of it."""

        async def release(channel: grpc.aio.Channel) -> pb.ReleaseAnswer:
            call = rpc.CustodianStub(channel).Release(timeout=10)
            await call.write(message)
            answer = await call.read()
            if not isinstance(answer, pb.ReleaseAnswer):
                raise AssertionError(await call.code())
            return answer

        return await self.call(release)

    async def size(self) -> int:
        """Leaves of the ledger that it has accepted."""
        described = await self.call(lambda channel: rpc.CustodianStub(channel).Describe(pb.DescribeRequest()))
        return described.ledger_size


@pytest.fixture
async def mortal(tmp_path: Path) -> AsyncIterator[Mortal]:
    committee = build_committee(tmp_path)
    committee.generate()
    committee.close()
    custodian = Mortal(committee)
    yield custodian
    custodian.stop()
    committee.close()


def reason(answer: pb.ReleaseAnswer) -> Reason | None:
    return None if answer.HasField("share") else from_status(answer.refusal).reason


@pytest.mark.parametrize("when", ["before", "after"])
async def test_killed_while_it_accepts_a_checkpoint(mortal: Mortal, when: str) -> None:
    committee = mortal.committee
    message = committee.message(ME, committee.owner_request())
    await mortal.start(1, when)
    with pytest.raises(UnavailableError):
        await mortal.ask(message)
    mortal.wait_for_death()
    await mortal.start()
    assert await mortal.size() == (1 if when == "after" else 0)
    assert reason(await mortal.ask(message)) is None
    second = committee.message(ME, committee.owner_request())
    assert reason(await mortal.ask(second)) is None
    assert await mortal.size() == 2


@pytest.mark.parametrize("when", ["before", "after"])
async def test_killed_while_it_cosigns_it_has_signed_nothing_that_it_does_not_remember(
    mortal: Mortal, when: str
) -> None:
    ledger = mortal.committee.ledger
    ledger.fill(3)
    update = update_message(ledger.update(0))
    update.cosign = True
    await mortal.start(1, when)
    with pytest.raises(UnavailableError):
        await mortal.ask(pb.ReleaseRequest(request_id="w", update=update))
    mortal.wait_for_death()
    await mortal.start()
    answer = await mortal.ask(pb.ReleaseRequest(request_id="w", update=update))
    assert answer.cosignatures.count(b"\n") == 2
    assert await mortal.size() == 3


@pytest.mark.parametrize("when", ["before", "after"])
async def test_killed_while_it_keeps_the_proof_of_a_fork(mortal: Mortal, when: str) -> None:
    committee = mortal.committee
    honest = committee.message(ME, committee.owner_request())
    fork = pb.ReleaseRequest(request_id="f", update=update_message(committee.ledger.fork(0).update(1)))
    await mortal.start(3, when)  # after the commits of the checkpoint and of the release
    assert reason(await mortal.ask(honest)) is None
    with pytest.raises(UnavailableError):
        await mortal.ask(fork)
    mortal.wait_for_death()
    await mortal.start()
    alarms = await ledger_alarms.fetch(committee.directory(ME))
    assert len(alarms) == (when == "after")
    assert reason(await mortal.ask(honest)) is (Reason.LEDGER_FORK if alarms else None)
    assert reason(await mortal.ask(fork)) is Reason.LEDGER_FORK
    assert reason(await mortal.ask(honest)) is Reason.LEDGER_FORK
    (alarm,) = await ledger_alarms.fetch(committee.directory(ME))
    assert (alarm["kind"], alarm["cleared_at"]) == ("fork", 0)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_killed_while_its_operator_clears_an_alarm(mortal: Mortal, when: str) -> None:
    committee = mortal.committee
    directory = committee.directory(ME)
    honest = committee.message(ME, committee.owner_request())
    fork = pb.ReleaseRequest(request_id="f", update=update_message(committee.ledger.fork(0).update(1)))
    await mortal.start(4, when)
    assert reason(await mortal.ask(honest)) is None
    assert reason(await mortal.ask(fork)) is Reason.LEDGER_FORK
    with pytest.raises(UnavailableError):
        await ledger_alarms.clear(directory, 1, "looked into it")
    mortal.wait_for_death()
    await mortal.start()
    (alarm,) = await ledger_alarms.fetch(directory)
    assert bool(alarm["cleared_at"]) == (when == "after")
    assert reason(await mortal.ask(honest)) is (None if when == "after" else Reason.LEDGER_FORK)
    if when == "before":
        (alarm,) = await ledger_alarms.clear(directory, 1, "looked into it")
    assert alarm["why"] == "looked into it"
    assert reason(await mortal.ask(committee.message(ME, committee.owner_request()))) is None
