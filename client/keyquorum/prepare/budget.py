"""The privacy ledger: how much of each data set's budget is spent, on this machine, for ever (SQLite).

A spending is in the ledger, on disk, before any noise is drawn. Check and entry are one exclusive transaction, so that
two processes can't both spend the last of a budget; a process killed between entry and output has spent it all the
same.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from keyquorum_core.errors import Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.names import KEY_ID, check

__all__ = ["Budget", "PrivacyLedger", "Spending", "ledger_path"]

_WAIT_SECONDS: Final = 30.0
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS budget (dataset TEXT PRIMARY KEY, epsilon_micro INTEGER NOT NULL CHECK (epsilon_micro > 0))
    STRICT;
CREATE TABLE IF NOT EXISTS spending (
    number INTEGER PRIMARY KEY, dataset TEXT NOT NULL REFERENCES budget, epsilon_micro INTEGER NOT NULL
    CHECK (epsilon_micro > 0), pipeline_sha256 TEXT NOT NULL, input_sha256 TEXT NOT NULL, spent_at INTEGER NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Spending:
    """One run's; ``epsilon_micro`` in millionths, ``spent_at`` unix seconds."""

    epsilon_micro: int
    pipeline_sha256: str
    input_sha256: str
    spent_at: int


@dataclass(frozen=True, slots=True)
class Budget:
    """A data set's, in millionths."""

    dataset: str
    epsilon_micro: int
    spendings: tuple[Spending, ...]

    @property
    def spent_micro(self) -> int:
        return sum(each.epsilon_micro for each in self.spendings)

    @property
    def left_micro(self) -> int:
        return self.epsilon_micro - self.spent_micro

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        return {
            "dataset": self.dataset,
            "epsilon": self.epsilon_micro / 1_000_000,
            "left": self.left_micro / 1_000_000,
            "spendings": [
                {
                    "epsilon": each.epsilon_micro / 1_000_000,
                    "pipeline_sha256": each.pipeline_sha256,
                    "input_sha256": each.input_sha256,
                    "spent_at": each.spent_at,
                }
                for each in self.spendings
            ],
        }


def ledger_path(state_dir: Path) -> Path:
    return state_dir / "privacy.sqlite"


class PrivacyLedger:
    """Opened anew for every operation; the file is made, for its owner alone, when a budget is first set."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def _transaction(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        """Exclusive, and durable when it ends without an error."""
        try:
            if create:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            elif not self._path.exists():
                raise _no_budget("any data set")
            database = sqlite3.connect(self._path, timeout=_WAIT_SECONDS, isolation_level=None)
            try:
                database.execute("PRAGMA synchronous = EXTRA")
                database.execute("PRAGMA foreign_keys = ON")
                database.execute("BEGIN EXCLUSIVE")
                for statement in _SCHEMA.split(";"):
                    database.execute(statement)
                try:
                    yield database
                except BaseException:
                    database.execute("ROLLBACK")
                    raise
                database.execute("COMMIT")
            finally:
                database.close()
        except (sqlite3.Error, OSError) as error:
            raise UnavailableError(
                Reason.STORAGE,
                "the privacy ledger can't be read or written, so nothing may be spent",
                expected=str(self._path),
                actual=str(error)[:120],
            ) from None

    def set_budget(self, dataset: str, epsilon_micro: int, *, replace: bool = False) -> Budget:
        """Declare a data set's budget. Raises :class:`StateError` (``EXISTS``) where there is another one already,
        unless ``replace``; what was spent stays spent."""
        check(KEY_ID, dataset, "data set id")
        with self._transaction(create=True) as database:
            row = database.execute("SELECT epsilon_micro FROM budget WHERE dataset = ?", (dataset,)).fetchone()
            if row is not None and row[0] != epsilon_micro and not replace:
                raise StateError(
                    Reason.EXISTS,
                    f"data set {dataset} has a budget already",
                    expected=_shown(row[0]),
                    actual=_shown(epsilon_micro),
                    next_step="Raising it weakens what was promised; --replace does it all the same.",
                )
            database.execute(
                "INSERT INTO budget VALUES (?1, ?2) ON CONFLICT (dataset) DO UPDATE SET epsilon_micro = ?2",
                (dataset, epsilon_micro),
            )
            return _read(database, dataset)

    def budget(self, dataset: str) -> Budget:
        """Raises :class:`StateError` (``NOT_FOUND``) where none was set."""
        check(KEY_ID, dataset, "data set id")
        with self._transaction() as database:
            return _read(database, dataset)

    def spend(self, dataset: str, spending: Spending) -> Budget:
        """Enter it: on disk when this returns. Raises :class:`RefusedError` (``QUOTA``) where the budget has less
        left, and then nothing is spent."""
        with self._transaction() as database:
            before = _read(database, dataset)
            if spending.epsilon_micro > before.left_micro:
                raise RefusedError(
                    Reason.QUOTA,
                    f"the privacy budget of data set {dataset} is not enough",
                    expected=f"epsilon of at most {_shown(before.left_micro)}, what is left of "
                    f"{_shown(before.epsilon_micro)}",
                    actual=f"epsilon {_shown(spending.epsilon_micro)}",
                    next_step="Ask for less, or leave it: every answer tells something of the people in the data.",
                    details={"field": "epsilon", "dataset": dataset},
                )
            database.execute(
                "INSERT INTO spending (dataset, epsilon_micro, pipeline_sha256, input_sha256, spent_at)"
                " VALUES (?, ?, ?, ?, ?)",
                (
                    dataset,
                    spending.epsilon_micro,
                    spending.pipeline_sha256,
                    spending.input_sha256,
                    spending.spent_at,
                ),
            )
            return _read(database, dataset)


def _read(database: sqlite3.Connection, dataset: str) -> Budget:
    row = database.execute("SELECT epsilon_micro FROM budget WHERE dataset = ?", (dataset,)).fetchone()
    if row is None:
        raise _no_budget(f"data set {dataset}")
    found = database.execute(
        "SELECT epsilon_micro, pipeline_sha256, input_sha256, spent_at FROM spending WHERE dataset = ? ORDER BY number",
        (dataset,),
    )
    return Budget(dataset, row[0], tuple(Spending(*each) for each in found))


def _no_budget(what: str) -> StateError:
    return StateError(
        Reason.NOT_FOUND,
        f"no privacy budget was set for {what}",
        expected="a budget",
        actual="none",
        next_step="Set it with: keyquorum prepare budget DATASET --set EPSILON",
    )


def _shown(micro: int) -> str:
    return f"{micro / 1_000_000:.6f}".rstrip("0").rstrip(".")
