"""Fan-out to five custodians over real gRPC and TLS: slow, failing, lying, disconnecting, out of order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from keyquorum_coordinator.circuit import CircuitState
from keyquorum_coordinator.fanout import Arrival, Fanout, Release
from keyquorum_core.errors import Reason, RefusedError, UnavailableError
from keyquorum_protos.v1 import custodian_pb2 as pb
from keyquorum_protos.wire.errors import from_status
from tests.support.fake_custodian import FakeCommittee


@pytest.fixture
async def committee() -> AsyncIterator[FakeCommittee]:
    committee = await FakeCommittee.start()
    yield committee
    await committee.stop()


HEDGE = 0.1


@pytest.fixture
async def fanout(committee: FakeCommittee) -> AsyncIterator[Fanout]:
    """Hedges nothing, however loaded the machine is."""
    async with Fanout(
        committee.roster, committee.coordinator, deadline=1.5, hedge_at_least=60, max_releases=8
    ) as fanout:
        await fanout.ready()
        yield fanout


async def connected(fanout: Fanout, custodian: str, within: float) -> bool:
    until = time.monotonic() + within
    while not fanout.links[custodian].connected:
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.05)
    return True


def request() -> pb.ReleaseRequest:
    return pb.ReleaseRequest(manifest=b"manifest", leaf=b"leaf")


async def collect(release: Release) -> dict[str, Arrival]:
    arrivals = [arrival async for arrival in release]
    assert len({arrival.custodian for arrival in arrivals}) == len(arrivals)
    return {arrival.custodian: arrival for arrival in arrivals}


def shares(arrivals: dict[str, Arrival]) -> set[str]:
    return {name for name, arrival in arrivals.items() if arrival.answer.HasField("share")}


def reason(arrival: Arrival) -> Reason:
    return from_status(arrival.answer.refusal).reason


async def test_all_five_answer_with_statements_and_the_stream_ends(committee: FakeCommittee, fanout: Fanout) -> None:
    release = fanout.release(request())
    arrivals = await collect(release)
    assert shares(arrivals) == set(committee.custodians)
    assert all(arrival.window_statement for arrival in arrivals.values())
    assert release.quorum_after is not None
    release.conclude()
    assert fanout.running == 0
    for custodian in committee.custodians.values():
        assert [(r.manifest, r.leaf) for r in custodian.requests] == [(b"manifest", b"leaf")]


async def test_a_slow_custodian_does_not_delay_a_quorum(committee: FakeCommittee, fanout: Fanout) -> None:
    holding = committee.custodians["ch-1"].behaviour.holding = asyncio.Event()
    async with fanout.release(request()) as release:
        first = [(await anext(release)).custodian for _ in range(4)]
        assert release.quorum_after is not None
        release.conclude()
        assert not holding.is_set()  # nobody waited for it
        holding.set()
        assert (await anext(release)).custodian == "ch-1"
    assert set(first) == {"de-1", "de-2", "is-1", "jp-1"}


async def test_answers_out_of_order_reach_the_release_they_belong_to(committee: FakeCommittee, fanout: Fanout) -> None:
    for custodian in committee.custodians.values():
        custodian.behaviour.reverse = 3
    releases = [fanout.release(request()) for _ in range(3)]
    outcomes = await asyncio.gather(*(collect(release) for release in releases))
    for outcome in outcomes:
        assert shares(outcome) == set(committee.custodians)
    ids = [{arrival.answer.request_id for arrival in outcome.values()} for outcome in outcomes]
    assert all(len(each) == 1 for each in ids)
    assert len(set.union(*ids)) == 3


async def test_a_stalled_stream_is_hedged_over_a_second_one(committee: FakeCommittee) -> None:
    stalled = committee.custodians["jp-1"]
    stalled.behaviour.stall = True
    async with Fanout(committee.roster, committee.coordinator, deadline=60, hedge_at_least=HEDGE) as hedging:
        arrivals = await collect(hedging.release(request()))
        assert shares(arrivals) == set(committee.custodians)
        # The first stream is open still, and silent: nothing but hedging sent the request again, over a second one.
        request_id = arrivals["jp-1"].answer.request_id
        first, second = stalled.asked
        assert stalled.asked == {first: [request_id], second: [request_id]}
        assert {first, second} <= stalled.open
        # What was measured is the wait for the answer, from the request's being sent: it was hedged no sooner.
        assert hedging.links["jp-1"].latency.mean >= HEDGE


async def test_a_stalled_stream_is_not_hedged_before_its_time(committee: FakeCommittee, fanout: Fanout) -> None:
    stalled = committee.custodians["jp-1"]
    stalled.behaviour.stall = True
    assert reason((await collect(fanout.release(request())))["jp-1"]) is Reason.TIMEOUT
    assert len(stalled.asked) == 1


async def test_two_down_of_five_still_make_a_quorum(committee: FakeCommittee, fanout: Fanout) -> None:
    for name in ("de-1", "jp-1"):
        await committee.custodians[name].stop()
    release = fanout.release(request())
    arrivals = await collect(release)
    assert shares(arrivals) == {"ch-1", "de-2", "is-1"}
    assert {reason(arrivals[name]) for name in ("de-1", "jp-1")} == {Reason.UNAVAILABLE}
    release.conclude()


async def test_three_down_of_five_is_a_prompt_refusal_that_names_them(committee: FakeCommittee, fanout: Fanout) -> None:
    down = {"de-1", "is-1", "jp-1"}
    for name in down:
        await committee.custodians[name].stop()
    release = fanout.release(request())
    arrivals = await collect(release)
    assert shares(arrivals) == {"ch-1", "de-2"}
    assert {reason(arrivals[name]) for name in down} == {Reason.UNAVAILABLE}  # not TIMEOUT: the deadline was not used
    with pytest.raises(UnavailableError) as caught:
        release.conclude()
    assert caught.value.reason is Reason.NO_QUORUM
    assert set(caught.value.details) == down
    assert all(name in caught.value.message for name in down)


async def test_refusals_make_it_final_and_carry_each_reason(committee: FakeCommittee, fanout: Fanout) -> None:
    for name, why in (("ch-1", Reason.EXPIRED), ("de-1", Reason.QUOTA), ("jp-1", Reason.STALE)):
        committee.custodians[name].behaviour.refusal = RefusedError(why, "no")
    release = fanout.release(request())
    await collect(release)
    with pytest.raises(RefusedError) as caught:
        release.conclude()
    assert caught.value.details == {"ch-1": "EXPIRED: no", "de-1": "QUOTA: no", "jp-1": "STALE: no"}
    assert fanout.links["ch-1"].circuit_state() is CircuitState.CLOSED


async def test_one_that_answers_in_anothers_name_counts_for_nobody(committee: FakeCommittee, fanout: Fanout) -> None:
    committee.custodians["ch-1"].behaviour.name = "de-1"
    arrivals = await collect(fanout.release(request()))
    assert shares(arrivals) == {"de-1", "de-2", "is-1", "jp-1"}
    assert reason(arrivals["ch-1"]) is Reason.UNKNOWN_CUSTODIAN


async def test_an_answer_of_a_window_without_a_statement_is_held_back(committee: FakeCommittee, fanout: Fanout) -> None:
    committee.custodians["ch-1"].behaviour.window_shift = 7
    arrivals = await collect(fanout.release(request()))
    assert reason(arrivals["ch-1"]) is Reason.STALE


async def test_a_broken_stream_is_asked_once_more(committee: FakeCommittee, fanout: Fanout) -> None:
    breaking = committee.custodians["de-2"]
    breaking.behaviour.break_after = 1
    assert "de-2" in shares(await collect(fanout.release(request())))
    arrivals = await collect(fanout.release(request()))
    assert "de-2" in shares(arrivals)
    assert breaking.streams == 2


async def test_silence_ends_at_the_deadline_and_opens_the_circuit(committee: FakeCommittee, fanout: Fanout) -> None:
    committee.custodians["is-1"].behaviour.delay = 30
    outcomes = await asyncio.gather(*(collect(fanout.release(request())) for _ in range(4)))
    assert all(reason(outcome["is-1"]) is Reason.TIMEOUT for outcome in outcomes)
    await asyncio.sleep(0.2)
    assert fanout.links["is-1"].circuit_state() is not CircuitState.CLOSED
    # Of two, one at most is sent as a trial; the other is refused at once, since it is not asked.
    outcomes = await asyncio.gather(*(collect(fanout.release(request())) for _ in range(2)))
    assert Reason.UNAVAILABLE in {reason(outcome["is-1"]) for outcome in outcomes}


async def test_a_custodian_that_comes_back_is_used_again(committee: FakeCommittee, fanout: Fanout) -> None:
    await committee.custodians["ch-1"].stop()
    await collect(fanout.release(request()))
    await asyncio.sleep(0.5)
    assert not await connected(fanout, "ch-1", within=0)
    await committee.restart("ch-1")
    assert await connected(fanout, "ch-1", within=5)
    assert "ch-1" in shares(await collect(fanout.release(request())))
    assert fanout.links["ch-1"].circuit_state() is CircuitState.CLOSED


async def test_releases_at_once_are_bounded(committee: FakeCommittee, fanout: Fanout) -> None:
    committee.custodians["ch-1"].behaviour.delay = 0.3
    releases = [fanout.release(request()) for _ in range(8)]
    with pytest.raises(RefusedError) as caught:
        fanout.release(request())
    assert caught.value.reason is Reason.QUOTA
    for release in releases:
        release.close()
    assert fanout.running == 0


async def test_custodians_are_ranked_by_recent_latency(committee: FakeCommittee, fanout: Fanout) -> None:
    committee.custodians["ch-1"].behaviour.delay = 0.05
    committee.custodians["jp-1"].behaviour.delay = 0.1
    for _ in range(3):
        await collect(fanout.release(request()))
    assert [link.id for link in fanout.ranked()][3:] == ["ch-1", "jp-1"]


async def test_skewed_clocks_are_seen_and_statements_of_all_are_had(committee: FakeCommittee, fanout: Fanout) -> None:
    committee.custodians["de-1"].behaviour.clock_shift = 20
    await fanout.links["de-1"].probe()
    assert 18 < fanout.links["de-1"].clock_skew < 22
    assert len(await fanout.windows()) == 5


async def test_closing_ends_what_runs(committee: FakeCommittee, fanout: Fanout) -> None:
    committee.custodians["ch-1"].behaviour.delay = 30
    release = fanout.release(request())
    waiting = asyncio.create_task(collect(release))
    await asyncio.sleep(0.1)
    await fanout.close()
    assert len(await asyncio.wait_for(waiting, 1)) >= 4
