"""A coordinator that holds the ledger's keys and lies about the log, against real custodians (guarantee G3).

Each attack is a class: it sees an honest request and turns it into what the liar sends. Whatever it sends, no custodian
gives a share for a leaf that the log they all see does not show.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import pytest

from keyquorum_core import manifest
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_custodian.gate import ReleaseRequest
from keyquorum_custodian.node import Node
from keyquorum_custodian.witness import NOWHERE, CheckpointUpdate, Inclusion
from tests.support.custodian import Committee, build_committee
from tests.support.ledger import MemoryLog

START = 1_800_000_000


class Clock:
    now: float = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def committee(tmp_path: Path, clock: Clock) -> Iterator[Committee]:
    built = build_committee(tmp_path, clock=clock)
    built.open_all()
    built.generate()
    built.owner_request()  # an honest release before, so that everybody has seen something of the log
    yield built
    built.close()


def unlogged(committee: Committee) -> ReleaseRequest:
    """A request whose leaf nobody entered anywhere."""
    envelope = manifest.sign_manifest(committee.manifest(), committee.owner.identity)
    return ReleaseRequest(envelope, b"", committee.leaf(envelope, b"").to_bytes())


def answers(committee: Committee, request: ReleaseRequest, only: str = "") -> dict[str, Reason | None]:
    """What each custodian, or one, says: None for a share, or the reason of its refusal, which must be the ledger's."""
    out: dict[str, Reason | None] = {}
    for name, node in committee.nodes.items():
        if only in ("", name):
            out[name] = answer(node, request)
    return out


def answer(node: Node, request: ReleaseRequest) -> Reason | None:
    before = node.keystore.release_count()
    refusal: KeyquorumError | None = None
    try:
        node.gate.release(request)
    except KeyquorumError as error:
        refusal = error
    assert node.keystore.release_count() == before + (refusal is None)
    assert refusal is None or refusal.details["check"] == "ledger"
    return None if refusal is None else refusal.reason


class Attack(ABC):
    """``refusal``: what every custodian answers to what :meth:`send` makes of an unlogged request."""

    refusal: Reason
    halts = False

    def __init__(self, committee: Committee) -> None:
        self.committee = committee
        self.log = committee.ledger

    @abstractmethod
    def send(self, request: ReleaseRequest) -> ReleaseRequest:
        """What goes to every custodian."""


class HidesTheLog(Attack):
    """Sends no proof at all."""

    refusal = Reason.LEDGER_PROOF

    def send(self, request: ReleaseRequest) -> ReleaseRequest:
        return dataclasses.replace(request, inclusion=NOWHERE)


class SwapsInclusionProofs(Attack):
    """Sends the proof of another leaf that the log does show."""

    refusal = Reason.LEDGER_PROOF

    def send(self, request: ReleaseRequest) -> ReleaseRequest:
        return dataclasses.replace(request, inclusion=self.log.inclusion(0))


class ReplaysAnOldCheckpoint(Attack):
    """Shows the leaf in a branch that ends before what the custodians saw last."""

    refusal = Reason.LEDGER_CONFLICT

    def send(self, request: ReleaseRequest) -> ReleaseRequest:
        self.log.fill(9)
        self.log.bring(*(node.witness for node in self.committee.nodes.values()))
        past = self.log.fork(3)
        inclusion = past.append(request.leaf)
        return dataclasses.replace(request, inclusion=inclusion, update=past.update(1))


class InflatesTheSize(Attack):
    """Names a tree that no checkpoint was shown for, with the proof that it would take."""

    refusal = Reason.LEDGER_CONFLICT

    def send(self, request: ReleaseRequest) -> ReleaseRequest:
        twin = self.log.fork(self.log.size)
        inclusion = twin.append(request.leaf)
        return dataclasses.replace(request, inclusion=inclusion)


class SignsALargerTreeThatDoesNotExtend(Attack):
    """The log's real signatures on a history that dropped what custodians saw, with the best proof there is."""

    refusal = Reason.LEDGER_PROOF

    def send(self, request: ReleaseRequest) -> ReleaseRequest:
        size = self.log.size
        other = self.log.fork(0)
        other.fill(size + 3)
        inclusion = other.append(request.leaf)
        return dataclasses.replace(request, inclusion=inclusion, update=other.update(size))


class ForksAtTheSameSize(Attack):
    """Signs another history of the very size that custodians are at."""

    refusal = Reason.LEDGER_FORK
    halts = True

    def send(self, request: ReleaseRequest) -> ReleaseRequest:
        other = MemoryLog(self.log.signer, self.log.clock, self.log.witnesses)
        other.fill(self.log.size - 1)
        inclusion = other.append(request.leaf)
        return dataclasses.replace(request, inclusion=inclusion, update=other.update(0))


class UsesAnotherLogsKey(Attack):
    """Runs a log of its own under the same name, which shows the leaf."""

    refusal = Reason.SIGNATURE_MISSING

    def send(self, request: ReleaseRequest) -> ReleaseRequest:
        own = MemoryLog(LogSigner.generate(self.log.signer.origin), self.log.clock, self.log.witnesses)
        inclusion = own.append(request.leaf)
        return dataclasses.replace(request, inclusion=inclusion, update=own.update(0))


class NamesAnotherLog(Attack):
    """The same, under another name."""

    refusal = Reason.LEDGER_ORIGIN

    def send(self, request: ReleaseRequest) -> ReleaseRequest:
        own = MemoryLog(LogSigner.generate("elsewhere/ledger"), self.log.clock, self.log.witnesses)
        inclusion = own.append(request.leaf)
        return dataclasses.replace(request, inclusion=inclusion, update=own.update(0))


class CosignsItself(Attack):
    """Forks, and vouches for the fork with keys of its own under the custodians' names."""

    refusal = Reason.LEDGER_PROOF

    def send(self, request: ReleaseRequest) -> ReleaseRequest:
        size = self.log.size
        other = self.log.fork(0)
        other.fill(size + 3)
        inclusion = other.append(request.leaf)
        return dataclasses.replace(request, inclusion=inclusion, update=other.update(size, cosigned=other.checkpoint()))


ATTACKS = (
    HidesTheLog,
    SwapsInclusionProofs,
    ReplaysAnOldCheckpoint,
    InflatesTheSize,
    SignsALargerTreeThatDoesNotExtend,
    ForksAtTheSameSize,
    UsesAnotherLogsKey,
    NamesAnotherLog,
    CosignsItself,
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_g3_no_key_is_released_that_the_ledger_does_not_show(committee: Committee, attack: type[Attack]) -> None:
    """G3: a share is released only against an inclusion proof in a checkpoint that extends what this custodian saw."""
    liar = attack(committee)
    sent = liar.send(unlogged(committee))
    assert set(answers(committee, sent).values()) == {liar.refusal}
    alarms = {len(node.witness.open_alarms) for node in committee.nodes.values()}
    assert alarms == {1 if attack.halts else 0}
    if not attack.halts:  # the liar gained nothing, and nobody lost anything
        assert set(answers(committee, committee.owner_request()).values()) == {None}


class ShowsHalfOfThemAFork:
    """Grows two histories from a common past and keeps every custodian on one of them."""

    def __init__(self, committee: Committee, deceived: tuple[str, ...]) -> None:
        self.committee = committee
        self.deceived = deceived
        self.honest = committee.ledger
        self.fork = self.honest.fork(self.honest.size)
        self.honest.fill(1)

    def of(self, name: str) -> MemoryLog:
        return self.fork if name in self.deceived else self.honest

    def release(self, name: str, request: ReleaseRequest) -> Reason | None:
        """One custodian is asked, with the leaf in its branch; each branch is cosigned by those who are kept on it."""
        node, log = self.committee.nodes[name], self.of(name)
        inclusion = log.append(request.leaf)
        on_it = [each for each in self.committee.ids if self.of(each) is log]
        for each in on_it:
            self.committee.nodes[each].witness.update(log.update(self.committee.nodes[each].witness.size))
        update = log.update(node.witness.size, cosigned=log.cosigned(by=on_it))
        return answer(node, dataclasses.replace(request, inclusion=inclusion, update=update))


def test_g3_a_fork_shown_to_half_of_the_custodians_runs_dry(committee: Committee, clock: Clock) -> None:
    """Two of three are a quorum here, so one custodian alone on its branch is vouched for by nobody."""
    liar = ShowsHalfOfThemAFork(committee, deceived=("no-1",))
    clock.now += 601
    assert liar.release("no-1", unlogged(committee)) is Reason.LEDGER_UNWITNESSED
    assert liar.release("ch-1", unlogged(committee)) is None
    assert liar.release("is-1", unlogged(committee)) is None
    # The moment the branches meet, the fork is proven, whichever way round.
    witness = committee.nodes["no-1"].witness
    there = witness.size
    with pytest.raises(KeyquorumError) as caught:
        witness.update(liar.honest.update(0, size=there))
    assert caught.value.reason is Reason.LEDGER_FORK
    (alarm,) = witness.open_alarms
    assert alarm.known != alarm.shown


def test_g3_the_quorums_word_on_one_branch_does_not_vouch_for_the_other(committee: Committee, clock: Clock) -> None:
    liar = ShowsHalfOfThemAFork(committee, deceived=("no-1",))
    clock.now += 601
    for name in ("ch-1", "is-1"):
        liar.release(name, unlogged(committee))
    request = unlogged(committee)
    node = committee.nodes["no-1"]
    inclusion = liar.fork.append(request.leaf)
    liar.fork.fill(5)
    cosigned = liar.honest.cosigned(by=["ch-1", "is-1"])
    update = dataclasses.replace(
        liar.fork.update(node.witness.size), cosigned=cosigned.encode(), cosigned_proof=(bytes(32),) * 3
    )
    sent = dataclasses.replace(request, inclusion=liar.fork.inclusion(inclusion.index), update=update)
    assert answer(node, sent) in (Reason.LEDGER_PROOF, Reason.LEDGER_FORK)


class OmitsCosignatures:
    """Shows an honest log and nobody's word on it: custodians that were cut off could be on a branch of their own."""

    def __init__(self, committee: Committee) -> None:
        self.log = committee.ledger

    def send(self, node: Node, request: ReleaseRequest, update: CheckpointUpdate | None = None) -> Reason | None:
        inclusion: Inclusion = self.log.append(request.leaf)
        update = update or self.log.update(node.witness.size)
        return answer(node, dataclasses.replace(request, inclusion=inclusion, update=update))


def test_g3_a_log_that_no_quorum_cosigned_in_time_releases_nothing(committee: Committee, clock: Clock) -> None:
    liar, node = OmitsCosignatures(committee), committee.nodes["ch-1"]
    stale = liar.log.cosigned()
    clock.now += 601
    assert liar.send(node, unlogged(committee)) is Reason.LEDGER_UNWITNESSED
    liar.log.fill(1)
    update = liar.log.update(node.witness.size, cosigned=stale)  # an old word, once more
    assert answer(node, dataclasses.replace(unlogged(committee), update=update)) is Reason.LEDGER_UNWITNESSED
    assert set(answers(committee, committee.owner_request()).values()) == {None}


def test_g3_a_custodian_whose_disk_was_turned_back_stops_when_it_meets_its_own_word(committee: Committee) -> None:
    """The log forks from where the restored custodian is; its own cosignature on what it forgot gives that away."""
    node = committee.nodes["ch-1"]
    row = node.keystore.select("SELECT * FROM ledgers")[0]
    before = node.witness.size
    committee.ledger.fill(5)
    lines = node.witness.serve(committee.ledger.update(before), cosign=True)
    vouched = committee.ledger.cosigned(by=["is-1", "no-1"]).with_signatures(*lines)
    with node.keystore.transaction():
        node.keystore.change("INSERT OR REPLACE INTO ledgers VALUES (?, ?, ?, ?, ?)", *row)
    committee.nodes.pop("ch-1").close()
    node = committee.open("ch-1", shown=False)
    assert node.witness.size == before
    request = unlogged(committee)
    inclusion = committee.ledger.append(request.leaf)
    update = committee.ledger.update(before, cosigned=vouched)
    sent = dataclasses.replace(request, inclusion=inclusion, update=update)
    assert answer(node, sent) is Reason.LEDGER_ROLLBACK
    assert any("LEDGER ALARM" in warning for warning in node.warnings())
    assert answer(node, sent) is Reason.LEDGER_FORK, "and nothing else passes either"
    node.witness.clear(1, "restored from a backup")
    assert answer(node, sent) is None
