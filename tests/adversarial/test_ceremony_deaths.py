"""A custodian killed at every write of every kind of ceremony, before it and after it: enumerated, none left out.

Started again, it finishes the ceremony, or gives it up with the epoch before intact; and the keys of everything that
ran before derive as they did. The suite goes through one custodian in each part of each kind for 2 of 3; ``make soak``
through all custodians, and 3 of 5.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core import derivation
from keyquorum_core.ceremony_states import MOVES, Kind, State
from keyquorum_core.errors import KeyquorumError, Reason, StateError
from keyquorum_core.parts import SealedPart
from keyquorum_custodian.making import Proposal
from tests.support.ceremonies import Destroy, Make, Rebuild
from tests.support.custodian import THREE, TWO_OF_THREE, Committee, build_committee, new_roster
from tests.support.fuses import Death, Fuse, MortalKeystore, burning, restart, survive

CONTEXT = b"c" * 32
LOST = "no-1"
SOAK = bool(os.environ.get("KEYQUORUM_SOAK"))
FIVE = (("ch-1", "CH"), ("de-1", "DE"), ("is-1", "IS"), ("jp-1", "JP"), (LOST, "NO"))
COMMITTEES = {"2 of 3": (THREE, TWO_OF_THREE), "3 of 5": (FIVE, {"at_least": 3})}
WHICH = list(COMMITTEES) if SOAK else ["2 of 3"]


# -- ceremonies whose custodians may die in any step -------------------------------------------------------------------


class SturdyMake(Make):
    def propose_one(self, name: str) -> Proposal:
        return survive(self.committee, name, lambda: super(SturdyMake, self).propose_one(name))

    def deliver_one(self, name: str) -> bytes:
        return survive(self.committee, name, lambda: super(SturdyMake, self).deliver_one(name))

    def confirm_one(self, name: str) -> bytes:
        return survive(self.committee, name, lambda: super(SturdyMake, self).confirm_one(name))

    def activate_one(self, name: str) -> None:
        survive(self.committee, name, lambda: super(SturdyMake, self).activate_one(name))


def asked_until_approved(committee: Committee, name: str, step: Callable[[], Any]) -> Any:
    """Propose; where its operator has to approve, it does. Any of it may kill the custodian."""
    try:
        return survive(committee, name, step)
    except StateError as error:
        if error.reason is not Reason.APPROVAL:
            raise

    def decide() -> None:
        approvals = committee.open(name).ceremonies.approvals
        for row in approvals.pending():
            approvals.decide(row.request_id, row.subject, approve=True)

    survive(committee, name, decide)
    return survive(committee, name, step)


class SturdyRebuild(Rebuild):
    def propose_one(self, name: str) -> None:
        asked_until_approved(self.committee, name, lambda: super(SturdyRebuild, self).propose_one(name))

    def give_one(self, name: str) -> tuple[bytes, SealedPart]:
        return survive(self.committee, name, lambda: super(SturdyRebuild, self).give_one(name))

    def restore_one(self) -> bytes:
        return survive(self.committee, self.target, lambda: super(SturdyRebuild, self).restore_one())


class SturdyDestroy(Destroy):
    def propose_one(self, name: str) -> None:
        asked_until_approved(self.committee, name, lambda: super(SturdyDestroy, self).propose_one(name))

    def erase_one(self, name: str) -> bytes:
        return survive(self.committee, name, lambda: super(SturdyDestroy, self).erase_one(name))


# -- what there is before, what is done, who may die -------------------------------------------------------------------


class Case(ABC):
    """A kind of ceremony: ``prepare`` a committee on disk once, then ``run`` it as often as there are deaths."""

    def prepare(self, committee: Committee) -> None:
        committee.generate()
        Make.rotate(committee, "key-1").activate()

    @abstractmethod
    def run(self, committee: Committee) -> Any:
        """To the end, whoever dies on the way; returns the ceremony."""

    def parts(self, committee: Committee) -> dict[str, list[str]]:
        """Who plays which part; the suite kills the first of each."""
        return {"each": ["is-1", *(name for name in committee.ids if name != "is-1")]}

    def epochs(self) -> tuple[int, ...]:
        """Those that derive afterwards."""
        return (1, 2)


class Generates(Case):
    def run(self, committee: Committee) -> Make:
        make = SturdyMake(committee, committee.plan("key-2"))
        make.activate()
        return make


class Rotates(Case):
    def run(self, committee: Committee) -> Make:
        make = SturdyMake.rotate(committee, "key-1")
        make.activate()
        return make

    def epochs(self) -> tuple[int, ...]:
        return (1, 2, 3)


class Repairs(Case):
    kind = Kind.REPAIR

    def prepare(self, committee: Committee) -> None:
        committee.generate()
        Make.rotate(committee, "key-1", present=[name for name in committee.ids if name != LOST]).activate()

    def run(self, committee: Committee) -> Rebuild:
        rebuild = SturdyRebuild(committee, "key-1", 2, LOST, kind=self.kind)
        rebuild.rosters = self.rosters(committee)
        rebuild.restore()
        return rebuild

    def rosters(self, committee: Committee) -> list[bytes]:
        return []

    def parts(self, committee: Committee) -> dict[str, list[str]]:
        givers = [name for name in committee.ids if name != LOST]
        return {"the one rebuilt": [LOST], "a co-holder": ["is-1", *(name for name in givers if name != "is-1")]}


class Replaces(Repairs):
    kind = Kind.REPLACE

    def prepare(self, committee: Committee) -> None:
        committee.generate()
        Make.rotate(committee, "key-1").activate()
        committee.close()
        (committee.folder / "first-roster.json").write_bytes(committee.roster_envelope)
        shutil.rmtree(committee.directory(LOST))
        new_roster(committee, replace=LOST)

    def rosters(self, committee: Committee) -> list[bytes]:
        return [(committee.folder / "first-roster.json").read_bytes()]

    def epochs(self) -> tuple[int, ...]:
        return (2,)


class Destroys(Case):
    def run(self, committee: Committee) -> Destroy:
        destroy = SturdyDestroy(committee, "key-1", 1)
        destroy.erase()
        return destroy

    def epochs(self) -> tuple[int, ...]:
        return (2,)


CASES = {case.__name__.lower(): case() for case in (Generates, Rotates, Repairs, Replaces, Destroys)}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Committee]]:
    made: dict[tuple[str, str], Committee] = {}

    def template(which: str, what: str) -> Committee:
        if (which, what) not in made:
            custodians, rule = COMMITTEES[which]
            committee = build_committee(tmp_path_factory.mktemp("deaths"), custodians, rule)
            CASES[what].prepare(committee)
            committee.close()
            committee.keystore = MortalKeystore
            made[which, what] = committee
        return made[which, what]

    yield template
    burning.clear()


def derived(committee: Committee, key_id: str, epoch: int) -> bytes:
    together: dict[int, bytes] = {}
    holders = 0
    for name in committee.ids:
        try:
            held = committee.open(name).epochs.active(key_id, epoch)
        except KeyquorumError:
            continue
        holders += 1
        for index, value in held.contributions(CONTEXT).items():
            assert together.setdefault(index, value) == value, (name, index)
    assert holders
    return derivation.root(together, CONTEXT)


def writes(committee: Committee, case: Case, name: str) -> int:
    """How often ``name`` writes in the ceremony."""
    fuse = burning[committee.directory(name) / "keystore.db"] = Fuse()
    case.run(committee)
    burning.clear()
    return fuse.writes


EXPECTED = {
    ("generates", "each"): 4,
    ("rotates", "each"): 4,
    ("repairs", "the one rebuilt"): 2,
    ("repairs", "a co-holder"): 2,
    ("replaces", "the one rebuilt"): 4 + 1,
    ("replaces", "a co-holder"): 4,
    ("destroys", "each"): 6,
}
"""Writes in each part: steps, what is put before the operator and decided, an earlier roster that is learned, and, of
*erase*, tables, file and receipt."""


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("what", list(CASES))
def test_killed_at_any_write_of_any_ceremony_a_custodian_finishes_it(
    templates: Callable[[str, str], Committee], tmp_path: Path, what: str, which: str
) -> None:
    case, template = CASES[what], templates(which, what)
    count, deaths = 0, 0
    for part, names in case.parts(template).items():
        for name in names if SOAK else names[:1]:
            committee = template.copy(tmp_path / f"{count}")
            committee.open_all()
            total = writes(committee, case, name)
            committee.close()
            assert total == EXPECTED[what, part]
            for number in range(1, total + 1):
                for when in ("before", "after"):
                    count += 1
                    committee = template.copy(tmp_path / f"{count}-{number}")
                    committee.open_all()
                    before = {epoch: derived(committee, "key-1", epoch) for epoch in case.epochs() if epoch < 3}
                    burning[committee.directory(name) / "keystore.db"] = Fuse(number, when)
                    ceremony = case.run(committee)
                    assert not burning, "it did not die"
                    deaths += 1
                    check_finished(committee, case, ceremony, before)
                    committee.close()
    assert deaths == 2 * sum(
        EXPECTED[what, part] * (len(names) if SOAK else 1) for part, names in case.parts(template).items()
    )


def check_finished(committee: Committee, case: Case, ceremony: Any, before: dict[int, bytes]) -> None:
    """Now, and after everyone was started anew."""
    for _ in range(2):
        for name in committee.ids:
            row = committee.open(name).keystore.ceremony(ceremony.id)
            assert row is None or str(row.state) in ("active", "given", "restored", "destroyed"), (name, row)
        for epoch in case.epochs():
            root = derived(committee, "key-1", epoch)
            assert before.get(epoch, root) == root
        if isinstance(case, Generates):
            assert derived(committee, "key-2", 1)
        if isinstance(case, Repairs):
            assert committee.open(LOST).epochs.active("key-1", 2).indices == committee.quorum.indices_of(LOST)
        if isinstance(case, Destroys):
            with pytest.raises(AssertionError):
                derived(committee, "key-1", 1)
        committee.close()
        committee.open_all()


class GivenUpError(Exception):
    """What an operator decides when a custodian died of a ceremony."""


def give_up(committee: Committee, name: str, step: Callable[[], Any]) -> Any:
    try:
        return step()
    except Death:
        restart(committee, name)
        raise GivenUpError from None


@pytest.mark.parametrize("what", ["rotates", "repairs", "destroys"])
def test_killed_at_any_write_before_it_is_binding_it_can_be_given_up(
    templates: Callable[[str, str], Committee], tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every custodian cancels where the ceremony stood; then everything is as it was, and the same can be done anew."""
    case, template = CASES[what], templates("2 of 3", what)
    binding = {"rotates": 4, "repairs": 2, "destroys": 4}[what]
    name = next(iter(case.parts(template).values()))[0]
    for number in range(1, binding):
        committee = template.copy(tmp_path / str(number))
        committee.open_all()
        before = derived(committee, "key-1", 1)
        burning[committee.directory(name) / "keystore.db"] = Fuse(number, "after")
        monkeypatch.setattr("tests.adversarial.test_ceremony_deaths.survive", give_up)
        with pytest.raises(GivenUpError):
            case.run(committee)
        monkeypatch.undo()
        for node in committee.nodes.values():
            for row in node.keystore.ceremonies():
                if State.CANCELLED in MOVES[row.kind][row.state]:
                    node.ceremonies.cancel(row.ceremony_id)
        assert derived(committee, "key-1", 1) == before
        assert committee.open("ch-1").epochs.active("key-1", 2).indices
        case.run(committee)
        committee.close()
