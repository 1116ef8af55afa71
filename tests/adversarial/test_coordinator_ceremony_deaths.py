"""A coordinator killed at every write of every kind of ceremony, before it and after it: enumerated, none left out.

Started again it goes on by itself from what it stored, and ends where it would have ended, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from keyquorum_coordinator.ceremonies import Ceremonies
from keyquorum_coordinator.database import CeremonyRow, Database, KeyRow, OutboxRow, StaleRow
from keyquorum_core.ceremony_plan import OrderedBy
from keyquorum_core.derivation import root
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.key_policy import KeyPolicy
from tests.support.ceremonies import Destroy, Make, Rebuild
from tests.support.custodian import THREE, TWO_OF_THREE, Committee, build_committee
from tests.support.direct import DirectFanout, end_of, open_database
from tests.support.fuses import Death, Fuse

LOST = "no-1"
POLICY = KeyPolicy(retain_seconds=0)


def rotation(committee: Committee) -> bytes:
    return Make.rotate(committee, "key-1").envelope


def repair(committee: Committee) -> bytes:
    return Rebuild(committee, "key-1", 2, LOST).envelope


def destruction(committee: Committee) -> bytes:
    return Destroy(committee, "key-1", 1, ordered_by=OrderedBy.POLICY).envelope


def generated(committee: Committee) -> None:
    committee.generate(policy=POLICY)


def stale(committee: Committee) -> None:
    generated(committee)
    Make.rotate(committee, "key-1", present=("ch-1", "is-1")).activate()


def rotated(committee: Committee) -> None:
    generated(committee)
    Make.rotate(committee, "key-1").activate()


TWO = (("ch-1", "CH"), ("is-1", "IS"))
CASES: dict[str, tuple[Any, Any, Callable[[Committee], None], Callable[[Committee], bytes], int]] = {
    # committee, rule, what there is, what is ordered, writes: the order, an answer each, and every move
    "rotate": (TWO, {"at_least": 2}, generated, rotation, 1 + 4 * 2 + 4),
    "repair": (THREE, TWO_OF_THREE, stale, repair, 1 + (3 + 2 + 1) + 3),
    "destroy": (THREE, TWO_OF_THREE, rotated, destruction, 1 + (3 + 3) + 2),
}


async def killed(committee: Committee, database_file: Path, plan: bytes, fuse: Fuse) -> None:
    """Drive a ceremony until the coordinator dies, or to its end; nothing of it is left but its files."""
    asyncio.get_running_loop().set_exception_handler(_unless_death)
    database = open_database(database_file)
    database.fuse = fuse
    ceremonies = Ceremonies(database, DirectFanout(committee))  # type: ignore[arg-type]
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
    database = open_database(database_file)
    ceremonies = Ceremonies(database, DirectFanout(committee))  # type: ignore[arg-type]
    await ceremonies.resume()
    assert (await end_of(ceremonies, plan)).step == "done"
    await ceremonies.close()
    return database


def derived(committee: Committee, epoch: int) -> bytes:
    together: dict[int, bytes] = {}
    for name in committee.ids:
        try:
            held = committee.open(name).epochs.active("key-1", epoch)
        except KeyquorumError:
            continue
        for index, value in held.contributions(b"c" * 32).items():
            assert together.setdefault(index, value) == value
    return root(together, b"c" * 32)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", list(CASES))
async def test_killed_at_any_write_of_any_ceremony_a_coordinator_finishes_it(
    tmp_path: Path, what: str, when: str
) -> None:
    custodians, rule, prepare, order, expected = CASES[what]
    template = build_committee(tmp_path / "template", custodians, rule)
    prepare(template)
    template.close()
    whole = template.copy(tmp_path / "whole")
    whole.open_all()
    fuse = Fuse()
    await killed(whole, tmp_path / "whole.db", order(whole), fuse)
    assert fuse.writes == expected
    whole.close()
    for number in range(1, expected + 1):
        committee = template.copy(tmp_path / f"{number}-{when}")
        committee.open_all()
        epochs = (2,) if what == "destroy" else (1,)
        before = [derived(committee, epoch) for epoch in epochs]
        plan, file = order(committee), tmp_path / f"{number}-{when}.db"
        await killed(committee, file, plan, Fuse(number, when))
        database = await started_again(committee, file, plan)
        assert [derived(committee, epoch) for epoch in epochs] == before
        check(database, committee, what)
        database.close()
        committee.close()


def check(database: Database, committee: Committee, what: str) -> None:
    with_rows = database.run_read(
        lambda session: (
            [row.step for row in session.scalars(select(CeremonyRow))],
            [(row.epoch, row.state) for row in session.scalars(select(KeyRow))],
            [row.custodian for row in session.scalars(select(StaleRow))],
            len(session.scalars(select(OutboxRow)).all()),
        )
    )
    keys = [(2, "active")] if what == "rotate" else []
    assert with_rows == (["done"], keys, [], 1), "one ceremony, ended once, told once"
    if what == "rotate":
        assert derived(committee, 2)
    if what == "repair":
        assert committee.open(LOST).epochs.active("key-1", 2).indices == committee.quorum.indices_of(LOST)
    if what == "destroy":
        states = {committee.open(name).keystore.epochs("key-1")[0].state for name in committee.ids}
        assert states == {"destroyed"}
