"""A coordinator killed at every write of every kind of ceremony, before it and after it: enumerated, none left out.

Started again it goes on by itself from what it stored, and ends where it would have ended, once. A step's answers are
stored together, so it is killed at every call to a custodian as well, with that answer in hand and nowhere else: all of
them in ``make soak``, one of each kind of call in the suite.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from keyquorum_coordinator import driving
from keyquorum_coordinator.ceremonies import Ceremonies
from keyquorum_coordinator.database import CeremonyRow, Database, KeyRow, OutboxRow, StaleRow
from keyquorum_core.ceremony_states import Kind
from keyquorum_core.derivation import root
from keyquorum_core.errors import KeyquorumError
from tests.support.ceremony_kinds import LOST, STAGES, ApprovingLink, coordinator_database
from tests.support.custodian import THREE, Committee, build_committee
from tests.support.direct import DirectFanout, DirectLink, end_of
from tests.support.fuses import Death, Fuse

SOAK = bool(os.environ.get("KEYQUORUM_SOAK"))


@dataclass(frozen=True)
class Case:
    """``writes``: the order, who waits for its operator and no longer does, and every move. ``calls``: by step, to each
    that takes part in it, those to be approved twice; and where a certificate is asked for, that."""

    kind: Kind
    writes: int
    calls: tuple[int, ...]
    custodians: tuple[tuple[str, str], ...] = THREE


TWO = (("ch-1", "CH"), ("is-1", "IS"))
CASES = {
    each.kind: each
    for each in (
        Case(Kind.GENERATE, 1 + 4, (3, 3, 3, 3)),
        Case(Kind.ROTATE, 1 + 4, (2, 2, 2, 2), custodians=TWO),
        Case(Kind.REPAIR, 1 + 3, (1, 3, 2, 1)),
        Case(Kind.REPLACE, 1 + 3 * 2 + 3, (1, 3 * 2, 2, 1)),
        Case(Kind.DESTROY, 1 + 2, (3, 3)),
    )
}


def mortal(fuse: Fuse) -> type[DirectLink]:
    """Links whose coordinator dies at a call, before it leaves or with the answer in hand."""

    class MortalLink(ApprovingLink):
        async def call(self, method: str, request: Any) -> Any:
            fuse.writes += 1
            mine = fuse.writes == fuse.number
            if mine and fuse.when == "before":
                raise Death
            answer = await super().call(method, request)
            if mine:
                raise Death
            return answer

    return MortalLink


@pytest.fixture(autouse=True)
def operators_are_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driving, "APPROVAL_POLL", 0.0)


async def killed(
    committee: Committee, database_file: Path, plan: bytes, at_write: Fuse, link: type[DirectLink] = ApprovingLink
) -> None:
    """Drive a ceremony until the coordinator dies, or to its end; nothing of it is left but its files."""
    asyncio.get_running_loop().set_exception_handler(_unless_death)
    database = coordinator_database(committee, database_file)
    database.fuse = at_write
    ceremonies = Ceremonies(database, DirectFanout(committee, link))  # type: ignore[arg-type]
    try:
        async for _ in ceremonies.run(plan):
            pass
    except Death:
        pass
    finally:
        await ceremonies.close()
        database.close()


def _unless_death(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A dead coordinator's tasks have nobody to tell what they died of."""
    if not isinstance(context.get("exception"), Death):
        loop.default_exception_handler(context)


async def started_again(committee: Committee, database_file: Path, plan: bytes) -> Database:
    """What `serve` does, and then what a caller does whose call broke off."""
    database: Database = coordinator_database(committee, database_file)
    ceremonies = Ceremonies(database, DirectFanout(committee, ApprovingLink))  # type: ignore[arg-type]
    await ceremonies.resume()
    assert (await end_of(ceremonies, plan)).step == "done"
    await ceremonies.close()
    return database


def derived(committee: Committee, epoch: int, key_id: str = "key-1") -> bytes:
    together: dict[int, bytes] = {}
    for name in committee.ids:
        try:
            held = committee.open(name).epochs.active(key_id, epoch)
        except KeyquorumError:
            continue
        for index, value in held.contributions(b"c" * 32).items():
            assert together.setdefault(index, value) == value
    return root(together, b"c" * 32)


@pytest.fixture(scope="module", params=list(CASES))
def what(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Committee]:
    case = CASES[request.param]
    template = build_committee(tmp_path_factory.mktemp(request.param), case.custodians, {"at_least": 2})
    STAGES[case.kind].prepare(template)
    template.close()
    return case, template


async def dies_and_is_started_again(
    folder: Path, case: Case, template: Committee, die: Callable[[Committee, Path, bytes], Any]
) -> None:
    committee = template.copy(folder)
    committee.open_all()
    stage = STAGES[case.kind]
    before = [derived(committee, epoch) for epoch in stage.epochs]
    plan, file = stage.order(committee).envelope, folder.with_suffix(".db")
    await die(committee, file, plan)
    database = await started_again(committee, file, plan)
    assert [derived(committee, epoch) for epoch in stage.epochs] == before
    check(database, committee, case.kind)
    database.close()
    committee.close()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_killed_at_any_write_of_any_ceremony_a_coordinator_finishes_it(
    what: tuple[Case, Committee], tmp_path: Path, when: str
) -> None:
    case, template = what
    whole = template.copy(tmp_path / "whole")
    whole.open_all()
    writes, calls = Fuse(), Fuse()
    await killed(whole, tmp_path / "whole.db", STAGES[case.kind].order(whole).envelope, writes, mortal(calls))
    assert (writes.writes, calls.writes) == (case.writes, sum(case.calls))
    whole.close()
    for number in range(1, case.writes + 1):
        fuse = Fuse(number, when)

        async def die(committee: Committee, file: Path, plan: bytes, fuse: Fuse = fuse) -> None:
            await killed(committee, file, plan, fuse)

        await dies_and_is_started_again(tmp_path / f"{number}", case, template, die)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_killed_at_any_call_of_any_ceremony_a_coordinator_finishes_it(
    what: tuple[Case, Committee], tmp_path: Path, when: str
) -> None:
    case, template = what
    last_of_each = [sum(case.calls[: step + 1]) for step in range(len(case.calls))]
    for number in range(1, sum(case.calls) + 1) if SOAK else last_of_each:
        fuse = Fuse(number, when)

        async def die(committee: Committee, file: Path, plan: bytes, fuse: Fuse = fuse) -> None:
            await killed(committee, file, plan, Fuse(), mortal(fuse))

        await dies_and_is_started_again(tmp_path / f"{number}", case, template, die)


def check(database: Database, committee: Committee, what: Kind) -> None:
    with_rows = database.run_read(
        lambda session: (
            [row.step for row in session.scalars(select(CeremonyRow))],
            [(row.epoch, row.state) for row in session.scalars(select(KeyRow))],
            [row.custodian for row in session.scalars(select(StaleRow))],
            len(session.scalars(select(OutboxRow)).all()),
        )
    )
    keys = {"generate": [(1, "active")], "rotate": [(2, "active")]}.get(what, [])
    assert with_rows == (["done"], keys, [], 1), "one ceremony, ended once, told once"
    if what == "rotate":
        assert derived(committee, 2)
    if what == "generate":
        assert derived(committee, 1, "key-2")
    if what in ("repair", "replace"):
        rebuilt = committee.open(LOST).epochs.active("key-1", 2 if what == "repair" else 1)
        assert rebuilt.indices == committee.quorum.indices_of(LOST)
    if what == "destroy":
        states = {committee.open(name).keystore.epochs("key-1")[0].state for name in committee.ids}
        assert states == {"destroyed"}
