"""Which epochs a new job is held against: what ceremonies here ended with, and what custodians describe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keyquorum_coordinator.database import Database, KeyRow
from keyquorum_coordinator.known_epochs import KnownEpochs
from tests.support.direct import open_database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(tmp_path / "coordinator.db")
    yield opened
    opened.close()


def known(database: Database, *described: dict[tuple[str, int], str], **stored: str) -> KnownEpochs:
    def work(session: Any) -> None:
        for epoch, state in stored.items():
            number = int(epoch.removeprefix("epoch_"))
            session.add(KeyRow(key_id="k", epoch=number, state=state, certificate=b"", ceremony_id=epoch, created_at=1))

    database.run_write(work)
    links: dict[str, Any] = {str(number): SimpleNamespace(keys=each) for number, each in enumerate(described)}
    return KnownEpochs(database, links)


def test_what_a_ceremony_made_active_is_so_whatever_a_minority_still_says(database: Database) -> None:
    found = known(database, {("k", 1): "active"}, {("k", 2): "pending"}, {}, epoch_1="retired", epoch_2="active")
    assert (found.state("k", 2), found.state("k", 1)) == ("active", "active")  # of the old one, custodians judge


def test_what_custodians_describe_counts_where_this_coordinator_heard_of_no_ceremony(database: Database) -> None:
    found = known(
        database, {("k", 1): "retired"}, {("k", 1): "active"}, {("k", 1): "retired"}, {("other", 4): "active"}
    )
    assert (found.state("k", 1), found.state("other", 4)) == ("active", "active")
    assert found.state("k", 2) is found.state("nobody's", 1) is None
    assert found.all() == [("k", 1), ("other", 4)]


def test_all_are_those_of_both(database: Database) -> None:
    found = known(database, {("k", 3): "active"}, {("a", 1): "active"}, epoch_2="destroyed", epoch_10="active")
    assert found.all() == [("a", 1), ("k", 2), ("k", 3), ("k", 10)]
    assert found.state("k", 2) == "destroyed"
