"""Malicious twins in ceremonies: custodians that lie in every way in every phase of every kind.

Whatever they do, whoever is honest names them, the step and the cause, every earlier key derives as before, and the
next honest ceremony succeeds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from keyquorum_coordinator.ceremonies import Ceremonies
from keyquorum_core.ceremony_states import MAKING, PHASES, REBUILDING, Kind, State, Step
from keyquorum_core.ceremony_states import phase as phase_of
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.parts import shared_indices
from tests.support.ceremonies import Make, Rebuild, derived, derived_by_holders, refused
from tests.support.ceremony_kinds import LOST, STAGES, Ordered, coordinator_database
from tests.support.ceremony_twins import (
    IMPOSSIBLE,
    LIAR,
    LIES,
    VICTIM,
    Behaviour,
    Lie,
    Phase,
    Twin,
    cells,
    links_with,
)
from tests.support.custodian import THREE, TWO_OF_THREE, Committee, build_committee
from tests.support.direct import DirectFanout, MortalDatabase, end_of

WHERE_FOUND = {
    Step.PROPOSE: ("propose", "deliver", "give", "restore"),
    Step.DELIVER: ("deliver", "confirm"),
    Step.GIVE: ("give", "restore"),
}
"""A lie is found in its own step, or where others use what it said."""


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Committee]:
    made: dict[Kind, Committee] = {}

    def template(kind: Kind) -> Committee:
        if kind not in made:
            made[kind] = build_committee(tmp_path_factory.mktemp(str(kind)), THREE, TWO_OF_THREE)
            STAGES[kind].prepare(made[kind])
            made[kind].close()
        return made[kind]

    return template


@dataclass
class Scene:
    """A committee before a ceremony of a kind, and a coordinator's database."""

    committee: Committee
    database: MortalDatabase

    def ceremonies(self, twin: Twin | None = None) -> Ceremonies:
        return Ceremonies(self.database, DirectFanout(self.committee, links_with(twin)))  # type: ignore[arg-type]


@pytest.fixture
async def scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[Committee], Scene]]:
    monkeypatch.setattr("keyquorum_coordinator.driving._RETRIES", ())
    monkeypatch.setattr("keyquorum_coordinator.driving.APPROVAL_POLL", 0.0)
    # Nobody waits for one that fell silent once its operator approved.
    monkeypatch.setattr("keyquorum_coordinator.driving.phase", lambda *which: replace(phase_of(*which), patience=0))
    opened: list[Scene] = []

    def scene(template: Committee) -> Scene:
        committee = template.copy(tmp_path / f"{len(opened)}")
        committee.open_all()
        opened.append(Scene(committee, coordinator_database(committee, tmp_path / f"{len(opened)}.db")))
        return opened[-1]

    yield scene
    for each in opened:
        each.database.close()
        each.committee.close()


def test_there_is_a_lie_of_every_kind_in_every_phase_of_every_ceremony_or_a_reason_why_not() -> None:
    assert {(phase.kind, phase.step) for phase in LIES} == {(kind, each.step) for kind in Kind for each in PHASES[kind]}
    both = [phase for phase in LIES if phase.kind in REBUILDING and phase.step is Step.PROPOSE]
    assert sorted(phase.target for phase in both) == [False, False, True, True]
    for phase, lies in LIES.items():
        assert lies.keys() | IMPOSSIBLE[phase].keys() == set(Behaviour), phase
        assert not lies.keys() & IMPOSSIBLE[phase].keys(), phase
    assert (len(LIES), sum(map(len, LIES.values())), sum(len(cells(phase)) for phase in LIES)) == (18, 108, 132)


def goes_on(phase: Phase, behaviour: Behaviour) -> bool:
    """The rest can do without it: a rotation without who says nothing, any making once its certificate is whole."""
    unheard = behaviour in (Behaviour.SILENT, Behaviour.LATE)
    return phase.step is Step.ACTIVATE or (phase.kind is Kind.ROTATE and phase.step is Step.PROPOSE and unheard)


def binds(phase: Phase, behaviour: Behaviour) -> bool:
    """Something is other than before when it is over."""
    return goes_on(phase, behaviour) or phase.step in (Step.RESTORE, Step.ERASE)


@pytest.mark.parametrize("phase", list(LIES), ids=str)
async def test_a_custodian_that_lies_is_named_with_the_step_and_harms_nothing(
    templates: Callable[[Kind], Committee], scenes: Callable[[Committee], Scene], phase: Phase
) -> None:
    """One lie after another, as long as they change nothing; then an honest ceremony succeeds."""
    scene, spoilt, ended = scenes(templates(phase.kind)), False, None
    for name, (behaviour, lie) in cells(phase).items():
        if spoilt:
            scene = scenes(templates(phase.kind))
        spoilt = binds(phase, behaviour)
        try:
            ended = await check_lie(scene, phase, behaviour, lie)
            if spoilt and not goes_on(phase, behaviour):
                await check_honest(scene, phase, behaviour, ended)
        except BaseException as error:
            error.add_note(f"{phase}: {name}")
            raise
    if not spoilt:
        assert ended is not None
        await check_honest(scene, phase, behaviour, ended)


async def check_lie(scene: Scene, phase: Phase, behaviour: Behaviour, lie: Lie) -> Ordered:
    committee = scene.committee
    before = {epoch: derived_by_holders(committee, epoch) for epoch in STAGES[phase.kind].epochs}
    ordered = STAGES[phase.kind].order(committee)
    lied = scene.ceremonies(Twin(committee, ordered.plan, phase, lie))
    if goes_on(phase, behaviour):
        end = await end_of(lied, ordered.envelope)
        assert (end.step, LIAR in end.note) == ("done", behaviour is not Behaviour.EQUIVOCATING)
        check_made_by_the_rest(committee, ordered, phase)
    else:
        with pytest.raises(KeyquorumError) as caught:
            await end_of(lied, ordered.envelope)
        check_named(caught.value, phase)
        record = next(each for each in await lied.records() if each.ceremony_id == ordered.plan.ceremony_id)
        assert record.error is not None
        assert (record.error.message, record.error.details) == (caught.value.message, caught.value.details)
        assert record.step == ("erase" if phase.step is Step.ERASE else "cancelled")
        if phase.step is not Step.ERASE:
            check_given_up(committee, ordered)
    assert {epoch: derived_by_holders(committee, epoch) for epoch in before} == before
    return ordered


def check_named(error: KeyquorumError, phase: Phase) -> None:
    assert error.details["step"] in WHERE_FOUND.get(phase.step, (str(phase.step),)), error
    assert error.details["custodian"], error
    assert error.details["cause"], error
    assert phase.liar in " ".join([error.message, *error.details.values()]), error


def check_made_by_the_rest(committee: Committee, ordered: Ordered, phase: Phase) -> None:
    plan = ordered.plan
    honest = [name for name in committee.ids if name != phase.liar]
    assert all(committee.open(name).epochs.active(plan.key_id, plan.epoch) for name in honest)
    made = derived_by_holders(committee, plan.epoch, plan.key_id)
    if phase.step is Step.ACTIVATE:  # it is told once more, by whoever has the certificate
        row = committee.open(VICTIM).keystore.epoch(plan.key_id, plan.epoch)
        assert row is not None
        committee.open(phase.liar).ceremonies.activate(plan.ceremony_id, row.certificate)
    else:
        committee.open(phase.liar).ceremonies.cancel(plan.ceremony_id)
        Rebuild(committee, plan.key_id, plan.epoch, phase.liar).restore()
    assert derived(committee, plan.epoch, plan.key_id) == made


def check_given_up(committee: Committee, ordered: Ordered) -> None:
    """By everyone that had not done its part."""
    plan = ordered.plan
    for node in committee.nodes.values():
        row = node.keystore.ceremony(plan.ceremony_id)
        if plan.kind in MAKING:
            assert row is None or row.state is State.CANCELLED
            assert node.keystore.epoch(plan.key_id, plan.epoch) is None
        assert row is None or row.state in (State.CANCELLED, State.GIVEN, State.RESTORED), row


async def check_honest(scene: Scene, phase: Phase, behaviour: Behaviour, lied: Ordered) -> None:
    """An honest one of the same kind succeeds: a destruction that some began goes on, everything else begins anew."""
    plan, honest, committee = lied.plan, scene.ceremonies(), scene.committee
    if phase.step is Step.ERASE:
        assert (await end_of(honest, lied.envelope)).step == "done"
        assert {node.keystore.epochs("key-1")[0].state for node in committee.nodes.values()} == {"destroyed"}
        return
    again = STAGES[plan.kind].order(committee)
    if phase.step is Step.RESTORE and behaviour is not Behaviour.SILENT:  # whatever it said, it was rebuilt
        with pytest.raises(KeyquorumError) as caught:
            await end_of(honest, again.envelope)
        assert caught.value.reason is Reason.EXISTS
    else:
        assert (await end_of(honest, again.envelope)).step == "done"
    if plan.kind is not Kind.DESTROY:
        assert derived(committee, plan.epoch, plan.key_id)


async def test_a_late_custodian_changes_nothing_once_the_others_gave_up(
    templates: Callable[[Kind], Committee], scenes: Callable[[Committee], Scene]
) -> None:
    """Its answer to *deliver* comes when everyone has cancelled: nobody goes on with it, nor does it by itself."""
    committee = scenes(templates(Kind.ROTATE)).committee
    make = Make.rotate(committee, "key-1").propose()
    for name in (VICTIM, LOST):
        make.deliver_one(name)
        committee.open(name).ceremonies.cancel(make.id)
    make.deliver_one(LIAR)
    for name in (VICTIM, LOST):
        refused(Reason.STATE, make.confirm_one, name)
    refused(Reason.CEREMONY, committee.open(LIAR).ceremonies.confirm, make.id, [make.commitments[LIAR]])
    committee.open(LIAR).ceremonies.cancel(make.id)
    Make.rotate(committee, "key-1").activate()


# -- co-holders that lie where there are others ------------------------------------------------------------------------

GIVING = Phase(Kind.REPAIR, Step.GIVE)


def _of_another_epoch(twin: Twin, answer: object) -> object:
    return twin.gives_seeds(twin.seeds(1))


GIFTS: dict[str, Lie] = {
    "wrong seeds": LIES[GIVING][Behaviour.EQUIVOCATING]["wrong seeds"],
    "seeds of another epoch": _of_another_epoch,
    "a short list": LIES[GIVING][Behaviour.SHORT_LIST][""],
    "a long list": LIES[GIVING][Behaviour.LONG_LIST][""],
    "an index twice": LIES[GIVING][Behaviour.DUPLICATE_INDEX][""],
    "silence": LIES[GIVING][Behaviour.SILENT][""],
}


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Committee:
    """Three of five: every seed of the stale one has two holders among the rest."""
    custodians = ((VICTIM, "CH"), ("de-1", "DE"), (LIAR, "IS"), ("jp-1", "JP"), (LOST, "NO"))
    built = build_committee(tmp_path_factory.mktemp("five"), custodians, {"at_least": 3})
    STAGES[Kind.REPAIR].prepare(built)
    built.close()
    return built


@pytest.mark.parametrize("what", list(GIFTS))
async def test_a_co_holder_that_gives_wrong_seeds_is_named_and_the_others_suffice(
    five: Committee, scenes: Callable[[Committee], Scene], what: str
) -> None:
    scene = scenes(five)
    repair = Rebuild(scene.committee, "key-1", 2, LOST)
    assert len(shared_indices(repair.plan.quorum, LIAR, LOST)) > 1
    twin = Twin(scene.committee, repair.plan, GIVING, GIFTS[what])
    end = await end_of(scene.ceremonies(twin), repair.envelope)
    accused = [each.custodian for each in scene.committee.open(LOST).keystore.accusations()]
    assert (LIAR in end.note, accused) == ((False, []) if what == "silence" else (True, [LIAR]))
    assert derived(scene.committee, 2)
