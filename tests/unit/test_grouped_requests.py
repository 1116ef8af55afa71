"""Requests that gather at the coordinator share a message, as far as the custodian takes such groups."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyquorum_coordinator.fanout import Fanout
from keyquorum_coordinator.lane import framed
from keyquorum_protos.v1 import custodian_pb2 as pb
from tests.support.fake_custodian import FakeCommittee

COUNT = 10
BIG = bytes(300_000)


@pytest.fixture
async def committee() -> AsyncIterator[FakeCommittee]:
    committee = await FakeCommittee.start()
    yield committee
    await committee.stop()


@pytest.fixture
async def fanout(committee: FakeCommittee) -> AsyncIterator[Fanout]:
    """One takes no groups, as an older release does; one small ones; three more than are ever sent."""
    for name, group in (("ch-1", 0), ("de-1", 3), ("de-2", 99), ("is-1", 99), ("jp-1", 99)):
        committee.custodians[name].behaviour.group = group
    async with Fanout(committee.roster, committee.coordinator, deadline=20, hedge_at_least=60) as fanout:
        await fanout.ready()
        for link in fanout.links.values():
            await link.first_stream.wait()
        yield fanout


async def ask(fanout: Fanout, count: int, manifest: bytes = b"manifest") -> list[tuple[str, dict[str, str]]]:
    """Releases begun at once: each one's id, and by custodian the id that its share came under."""
    requests = [pb.ReleaseRequest(manifest=manifest, leaf=b"leaf %d" % number) for number in range(count)]
    releases = [fanout.release(request) for request in requests]

    async def collect(place: int) -> tuple[str, dict[str, str]]:
        got = {a.custodian: a.answer.request_id async for a in releases[place] if a.answer.HasField("share")}
        return requests[place].request_id, got

    return await asyncio.gather(*(collect(place) for place in range(count)))


async def test_each_release_has_its_answers_however_requests_travelled(
    committee: FakeCommittee, fanout: Fanout
) -> None:
    outcomes = await ask(fanout, COUNT)
    for request_id, answers in outcomes:
        assert answers == dict.fromkeys(committee.custodians, request_id)
    for name, custodian in committee.custodians.items():
        assert [each.leaf for each in custodian.requests] == [b"leaf %d" % number for number in range(COUNT)], name
    assert committee.custodians["ch-1"].groups == []
    assert committee.custodians["de-1"].groups
    assert max(committee.custodians["de-1"].groups) <= 3
    assert max(committee.custodians["de-2"].groups) <= 8


async def test_one_alone_goes_as_it_is(committee: FakeCommittee, fanout: Fanout) -> None:
    for _ in range(3):
        await ask(fanout, 1)
    assert all(custodian.groups == [] for custodian in committee.custodians.values())


async def test_a_group_is_bounded_in_bytes(committee: FakeCommittee, fanout: Fanout) -> None:
    outcomes = await ask(fanout, COUNT, BIG)
    assert all(set(answers) == set(committee.custodians) for _, answers in outcomes)
    assert max(committee.custodians["de-2"].groups) == 3


@given(st.lists(st.binary(max_size=300) | st.integers(0, 70_000).map(bytes), min_size=1, max_size=4))
def test_framing_is_protobuf_s_own(manifests: list[bytes]) -> None:
    requests = [pb.ReleaseRequest(manifest=each) for each in manifests]
    wire = b"".join(part for each in requests for part in framed(each.SerializeToString()))
    assert wire == pb.ReleaseRequest(group=requests).SerializeToString()
