"""Noise and budget: bounds that hold, losses that add up, and a budget that nobody spends twice."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from keyquorum.prepare.aggregates import Statistic
from keyquorum.prepare.budget import PrivacyLedger, Spending
from keyquorum.prepare.pipeline import parse_pipeline
from keyquorum_core.errors import Reason, RefusedError, StateError, UnavailableError
from tests.support.preparing import NOW, prepared, read, write

HEAD = 'name = "ages"\ndataset = "clinic"\n[columns.name]\ndo = "drop"\n'
COUNT = '[[aggregate]]\nname = "n"\nwhat = "count"\nepsilon = 1\n'
SUM = '[[aggregate]]\nname = "s"\nwhat = "sum"\ncolumn = "age"\nbounds = [0, 100]\nepsilon = 1\n'
MEAN = SUM.replace('"s"', '"m"').replace("sum", "mean")
HISTOGRAM = '[[aggregate]]\nname = "h"\nwhat = "histogram"\ncolumn = "age"\nedges = [0, 50, 100]\nepsilon = 1\n'
BY_WARD = 'group_by = "ward"\ngroups = ["a", "b", "empty"]\n'
DATA: dict[str, Any] = {
    "name": ["x"] * 1000,
    "age": [20] * 600 + [70] * 400,
    "ward": ["a"] * 300 + ["b"] * 600 + ["z"] * 100,
}
SPENDING = Spending(600_000, "11" * 32, "22" * 32, NOW)


@pytest.fixture
def ledger(tmp_path: Path) -> PrivacyLedger:
    made = PrivacyLedger(tmp_path / "state" / "privacy.sqlite")
    made.set_budget("clinic", 20_000_000)
    return made


def pipeline(*aggregates: str) -> str:
    unused = "".join(
        f'[columns.{name}]\ndo = "drop"\n'
        for name in ("age", "ward")
        if not any(f'"{name}"' in each for each in aggregates)
    )
    return HEAD + unused + "".join(aggregates)


def values(tmp_path: Path, ledger: PrivacyLedger, *aggregates: str, **data: Any) -> list[float]:
    source = write(tmp_path / "in.parquet", {**DATA, **data})
    made = prepared(pipeline(*aggregates), source, tmp_path / "out.parquet", ledger=ledger)
    assert made.statement.epsilon_micro == 1_000_000 * len(aggregates)
    return [float(each) for each in read(made.output)["value"]]


# Each wide bound below is missed with a probability under 10⁻⁹: 50 scales of a discrete Laplace are e⁻⁵⁰.


def test_aggregates_are_near_the_truth_and_their_loss_is_what_was_declared(
    tmp_path: Path, ledger: PrivacyLedger
) -> None:
    found = values(tmp_path, ledger, COUNT, SUM, MEAN, HISTOGRAM)
    count, total, mean, *bins = found
    assert abs(count - 1000) < 50
    assert abs(total - 40_000) < 5000
    assert 0 <= mean <= 100
    assert abs(mean - 40) < 25
    assert [abs(each - truth) < 50 for each, truth in zip(bins, (0, 600, 400, 0), strict=True)] == [True] * 4
    assert ledger.budget("clinic").spent_micro == 4_000_000


def test_noise_differs_from_run_to_run(tmp_path: Path, ledger: PrivacyLedger) -> None:
    source = write(tmp_path / "in.parquet", DATA)
    low = SUM.replace("epsilon = 1", "epsilon = 0.01")
    made = [prepared(pipeline(low), source, tmp_path / f"{n}.parquet", ledger=ledger).output for n in range(4)]
    assert len({read(each)["value"][0] for each in made}) > 1


def test_declared_groups_only_and_all_of_them(tmp_path: Path, ledger: PrivacyLedger) -> None:
    a, b, empty, *sums = values(tmp_path, ledger, COUNT + BY_WARD, SUM + BY_WARD)
    assert [abs(a - 300) < 50, abs(b - 600) < 50, abs(empty) < 50] == [True] * 3
    assert abs(sums[0] - 6000) < 5000
    assert abs(sums[1] - 27_000) < 5000


def test_values_outside_the_bounds_count_as_the_bound(tmp_path: Path, ledger: PrivacyLedger) -> None:
    (total,) = values(tmp_path, ledger, SUM, age=[1e9] * 500 + [-1e9] * 500)
    assert abs(total - 50_000) < 5000


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_what_is_no_number_is_refused_or_imputed_as_declared(
    tmp_path: Path, ledger: PrivacyLedger, bad: float | None
) -> None:
    age = [20.0] * 999 + [bad]
    with pytest.raises(RefusedError) as caught:
        values(tmp_path, ledger, SUM, age=age)
    assert "age" in caught.value.message
    assert ledger.budget("clinic").spent_micro == 0
    assert not (tmp_path / "out.parquet").exists()
    (total,) = values(tmp_path, ledger, SUM + "missing = 0\n", age=age)
    assert abs(total - 19_980) < 5000


def test_a_sum_that_could_overflow_is_refused_before_anything_is_spent(tmp_path: Path, ledger: PrivacyLedger) -> None:
    wide = SUM.replace("[0, 100]", "[0, 1e12]")
    assert values(tmp_path, ledger, wide)
    (tmp_path / "out.parquet").unlink()
    spent = ledger.budget("clinic").spent_micro
    made = Statistic(parse_pipeline(pipeline(wide).encode()).aggregates[0])
    made._rows = 2**62

    with pytest.raises(RefusedError) as caught:
        made.add(pa.record_batch([pa.array([1])], names=["age"]))
    assert "overflow" in caught.value.message
    assert ledger.budget("clinic").spent_micro == spent


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_a_budget_is_not_overspent_and_says_what_is_left(ledger: PrivacyLedger) -> None:
    ledger.set_budget("small", 1_000_000)
    assert ledger.spend("small", SPENDING).left_micro == 400_000
    with pytest.raises(RefusedError) as caught:
        ledger.spend("small", SPENDING)
    error = caught.value
    assert (error.reason, error.details["field"]) == (Reason.QUOTA, "epsilon")
    assert "0.4" in error.expected
    assert "0.6" in error.actual
    assert ledger.budget("small").spendings == (SPENDING,)


def test_a_budget_is_set_once(ledger: PrivacyLedger) -> None:
    assert ledger.set_budget("clinic", 20_000_000).left_micro == 20_000_000
    with pytest.raises(StateError) as caught:
        ledger.set_budget("clinic", 30_000_000)
    assert caught.value.reason is Reason.EXISTS
    assert ledger.set_budget("clinic", 30_000_000, replace=True).epsilon_micro == 30_000_000
    with pytest.raises(StateError) as absent:
        ledger.budget("other")
    assert absent.value.reason is Reason.NOT_FOUND


def test_without_a_budget_nothing_is_released(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", DATA)
    with pytest.raises(StateError):
        prepared(pipeline(COUNT), source, tmp_path / "out.parquet", ledger=PrivacyLedger(tmp_path / "none.sqlite"))
    assert [each.name for each in tmp_path.iterdir()] == ["in.parquet"]


def test_a_ledger_that_is_no_database_permits_nothing(tmp_path: Path) -> None:
    (tmp_path / "privacy.sqlite").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(UnavailableError) as caught:
        PrivacyLedger(tmp_path / "privacy.sqlite").spend("clinic", SPENDING)
    assert caught.value.reason is Reason.STORAGE


SPENDER = """
import sys
from pathlib import Path
from keyquorum.prepare.budget import PrivacyLedger, Spending
from keyquorum_core.errors import KeyquorumError
ledger = PrivacyLedger(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
try:
    ledger.spend("contested", Spending(600_000, "11" * 32, "22" * 32, 1))
    print("spent", flush=True)
except KeyquorumError as error:
    print(error.reason, flush=True)
"""


def spenders(path: Path, count: int) -> Iterator[subprocess.Popen[str]]:
    for _ in range(count):
        process = subprocess.Popen(
            [sys.executable, "-c", SPENDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def test_of_processes_that_spend_the_same_budget_at_once_one_does(tmp_path: Path) -> None:
    path = tmp_path / "privacy.sqlite"
    ledger = PrivacyLedger(path)
    ledger.set_budget("contested", 1_000_000)
    processes = list(spenders(path, 4))
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert said == ["QUOTA", "QUOTA", "QUOTA", "spent"]
    assert ledger.budget("contested").spent_micro == 600_000


RUNNER = """
import os, signal, sys
from pathlib import Path
import keyquorum.prepare.budget as budget
import keyquorum.outputs as outputs
import keyquorum.prepare.running as running
from tests.support import preparing

point, folder = sys.argv[1], Path(sys.argv[2])

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function):
    def wrapped(*args, **kwargs):
        function(*args, **kwargs)
        die()
    return wrapped

if point == "before spending":
    budget.PrivacyLedger.spend = die
elif point == "after spending":
    budget.PrivacyLedger.spend = after(budget.PrivacyLedger.spend)
elif point == "signing":
    running.sign_provenance = die
elif point == "before publishing":
    outputs.Outputs.publish = die
elif point == "after the first link":
    outputs.sync_file = die
preparing.prepared(
    (folder / "pipeline.toml").read_text(), folder / "in.parquet", folder / "out.parquet",
    ledger=budget.PrivacyLedger(folder / "privacy.sqlite"),
)
"""


@pytest.mark.parametrize(
    ("point", "spent"),
    [
        ("before spending", 0),
        ("after spending", 1_000_000),
        ("signing", 1_000_000),
        ("before publishing", 1_000_000),
        ("after the first link", 1_000_000),
    ],
)
def test_a_run_that_is_killed_leaves_no_output_and_keeps_what_it_spent(tmp_path: Path, point: str, spent: int) -> None:
    (tmp_path / "pipeline.toml").write_text(pipeline(COUNT))
    write(tmp_path / "in.parquet", DATA)
    ledger = PrivacyLedger(tmp_path / "privacy.sqlite")
    ledger.set_budget("clinic", 20_000_000)
    done = subprocess.run([sys.executable, "-c", RUNNER, point, str(tmp_path)], check=False, timeout=100)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out.parquet").exists()
    assert ledger.budget("clinic").spent_micro == spent
    statement = tmp_path / "out.parquet.provenance.json"
    assert statement.exists() == (point == "after the first link")
    statement.unlink(missing_ok=True)
    again = prepared(pipeline(COUNT), tmp_path / "in.parquet", tmp_path / "out.parquet", ledger=ledger)
    assert read(again.output)["aggregate"] == ["n"]
