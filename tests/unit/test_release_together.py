"""Releases asked for together: judged one after the other, kept in one commit, and none answered that is not kept."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.errors import KeyquorumError
from keyquorum_core.release import Answer, Leaf
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_custodian.gate import ReleaseRequest
from keyquorum_custodian.node import Node
from tests.support.custodian import Committee, build_committee
from tests.support.fuses import Death, Fuse, MortalKeystore, burning, restart
from tests.support.gate import Clock, signed
from tests.support.vendor import CREATED_AT, development_chip, development_vendor, inventory_json

CHIPS = (development_chip(), development_vendor().chip(now=CREATED_AT))
MACHINES = {
    "machines": [
        inventory_json(CHIPS[0])["machines"][0],
        {**inventory_json(CHIPS[1])["machines"][0], "name": "zrh-2"},
    ]
}
QUOTA = 9


class Scene:
    """Committee and clock; a scene of its own so that a failing example stays readable."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.committee = build_committee(folder, clock=self.clock, inventory=MACHINES, quota=QUOTA)
        self.committee.keystore = MortalKeystore
        self.committee.open_all()
        self.committee.generate()

    def anew(self) -> Committee:
        """Hours later: no lease runs, nobody is in quarantine, the owner's hour is empty."""
        self.clock.now += 7200
        for node in self.committee.nodes.values():
            for entry in node.quarantine.entries():
                if entry.lifted_at is None:
                    node.quarantine.lift(entry.number, "the next test", int(self.clock.now))
        return self.committee


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    built = Scene(tmp_path_factory.mktemp("together"))
    yield built
    burning.clear()
    built.committee.close()


@pytest.fixture
def committee(scene: Scene) -> Committee:
    return scene.anew()


@pytest.fixture
def node(committee: Committee) -> Node:
    return committee.nodes["ch-1"]


class Asking:
    """One job and its worker: its requests, each with a leaf of its own."""

    def __init__(self, committee: Committee) -> None:
        self._committee = committee
        self.envelope = signed(committee)
        self.recipient, self.identity = RecipientKey.generate(), Identity.generate()
        self._count = 0

    def owner(self) -> ReleaseRequest:
        self._count += 1
        return self._committee.owner_request(self.envelope, time=int(self._committee.clock()) + self._count)

    def worker(self, chip: int = 0) -> ReleaseRequest:
        self._count += 1
        document = self._committee.evidence(self.recipient, self.identity, chip=CHIPS[chip])
        when = int(self._committee.clock()) + self._count
        return self._committee.worker_request(document, self.envelope, self.identity, time=when)

    def unknown(self) -> ReleaseRequest:
        return self._committee.owner_request(self.envelope, job_id="a" * 26)


def told(outcomes: list[Answer | Exception]) -> list[str]:
    return [str(each.reason) if isinstance(each, KeyquorumError) else type(each).__name__ for each in outcomes]


def commits(node: Node, act: Callable[[], object]) -> int:
    fuse = burning[node.keystore.path] = Fuse()
    act()
    del burning[node.keystore.path]
    return fuse.writes


def recorded(node: Node, *requests: ReleaseRequest) -> list[bool]:
    return [node.keystore.has_release(Leaf.parse(each.leaf).hash()) for each in requests]


def test_those_that_pass_are_kept_by_one_commit_and_one_that_fails_takes_none_down(
    committee: Committee, node: Node
) -> None:
    asking = Asking(committee)
    requests = [asking.owner(), asking.unknown(), asking.worker(), asking.owner()]
    outcomes: list[Answer | Exception] = []
    before = node.keystore.release_count()
    count = commits(node, lambda: outcomes.extend(node.gate.release_together([*requests, requests[0]])))
    assert told(outcomes) == ["Answer", "WRONG_JOB", "Answer", "Answer", "Answer"]
    assert count == 1
    assert recorded(node, *requests) == [True, False, True, True]
    assert node.keystore.release_count() == before + 3
    assert len(node.leases.all(int(committee.clock()))) == 1


def test_a_commit_that_fails_fails_those_in_it_and_leaves_nothing_of_them(
    committee: Committee, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = Asking(committee)
    requests = [asking.worker(), asking.unknown(), *(asking.owner() for _ in range(QUOTA - 1))]

    def full(_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(MortalKeystore, "_commit", full)
        assert told(node.gate.release_together(requests)) == ["STORAGE", "WRONG_JOB", *["STORAGE"] * (QUOTA - 1)]
    assert not any(recorded(node, *requests))
    assert node.leases.all(int(committee.clock())) == ()
    # Nothing of it is in memory either: the worker's first release is a first one, and the owner's hour is empty.
    assert told(node.gate.release_together(requests)) == ["Answer", "WRONG_JOB", *["Answer"] * (QUOTA - 1)]
    assert [lease.renewals for lease in node.leases.all(int(committee.clock()))] == [0]
    assert told(node.gate.release_together([asking.owner()])) == ["QUOTA"]


def test_what_is_written_for_one_of_them_keeps_the_releases_before_it(committee: Committee, node: Node) -> None:
    """The second shows that the machine is another one than that of the first, a moment ago: it is quarantined, and
    the lease that the first began is revoked although it was not committed yet."""
    asking, other = Asking(committee), Asking(committee)
    requests = [asking.worker(), asking.worker(chip=1), asking.worker(), other.owner()]
    assert told(node.gate.release_together(requests)) == ["Answer", "PROVENANCE", "QUARANTINED", "Answer"]
    assert [lease.revoked for lease in node.leases.all(int(committee.clock()))] == ["PROVENANCE"]
    assert recorded(node, *requests) == [True, False, False, True]
    assert node.quarantine.in_force == 1


def test_a_commit_that_fails_on_the_way_fails_those_before_it_alone(
    committee: Committee, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking, other = Asking(committee), Asking(committee)
    requests = [asking.worker(), asking.worker(chip=1), other.owner()]
    commit, failed = MortalKeystore._commit, list[bool]()

    def full_at_first(store: MortalKeystore) -> None:
        if not failed:
            failed.append(True)
            raise sqlite3.OperationalError("database or disk is full")
        commit(store)

    with monkeypatch.context() as patch:
        patch.setattr(MortalKeystore, "_commit", full_at_first)
        assert told(node.gate.release_together(requests)) == ["STORAGE", "PROVENANCE", "Answer"]
    assert recorded(node, *requests) == [False, False, True]
    assert node.leases.all(int(committee.clock())) == ()


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_the_commit_it_remembers_all_or_nothing_and_then_answers(
    committee: Committee, node: Node, when: str
) -> None:
    asking = Asking(committee)
    requests = [asking.owner(), asking.worker(), asking.owner()]
    burning[node.keystore.path] = Fuse(1, when)
    with pytest.raises(Death):
        node.gate.release_together(requests)
    del burning[node.keystore.path]
    restart(committee, "ch-1")
    node = committee.nodes["ch-1"]
    assert recorded(node, *requests) == [when == "after"] * 3
    again = [committee.logged(each) for each in requests]
    # Nobody was answered, so all ask again; the worker's evidence was over a window that went with the process.
    assert told(node.gate.release_together([again[0], again[2]])) == ["Answer", "Answer"]
    assert recorded(node, *requests) == [True, when == "after", True]


def test_a_full_disk_at_a_write_loses_the_group_and_the_next_one_is_kept(
    committee: Committee, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = Asking(committee)
    requests = [asking.owner(), asking.worker(), asking.owner()]
    change = MortalKeystore.change

    def full(store: MortalKeystore, statement: str, *values: object) -> int:
        if statement.startswith("INSERT INTO leases"):
            raise sqlite3.OperationalError("database or disk is full")
        return change(store, statement, *values)

    with monkeypatch.context() as patch:
        patch.setattr(MortalKeystore, "change", full)
        assert told(node.gate.release_together(requests)) == ["STORAGE", "STORAGE", "Answer"]
    assert recorded(node, *requests) == [False, False, True]


ACTS = ("owner", "worker", "other machine", "unknown", "again")


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from(ACTS)),
        min_size=1,
        max_size=14,
    ),
    st.data(),
)
def test_together_they_fare_as_one_by_one(scene: Scene, acts: list[tuple[int, str]], data: st.DataObject) -> None:
    """ch-1 is asked in groups, is-1 one by one: the same answers and refusals, records, leases and quarantine."""
    twins = scene.anew()
    asking = Asking(twins), Asking(twins)
    requests: list[ReleaseRequest] = []
    for who, act in acts:
        if act == "again" and requests:
            requests.append(requests[who % len(requests)])
        elif act == "unknown":
            requests.append(asking[who].unknown())
        elif act == "owner":
            requests.append(asking[who].owner())
        else:
            requests.append(asking[who].worker(int(act == "other machine")))
    grouped, single = twins.nodes["ch-1"], twins.nodes["is-1"]
    left, outcomes = list(requests), []
    while left:
        size = data.draw(st.integers(1, len(left)))
        outcomes += grouped.gate.release_together(left[:size])
        del left[:size]
    alone = [outcome for each in requests for outcome in single.gate.release_together([each])]
    assert told(outcomes) == told(alone)
    assert recorded(grouped, *requests) == recorded(single, *requests)
    now = int(twins.clock())
    assert grouped.leases.all(now) == single.leases.all(now)
    assert grouped.quarantine.in_force == single.quarantine.in_force
