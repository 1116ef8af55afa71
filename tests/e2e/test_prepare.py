"""From a table at home to a job abroad: prepared under a key of the custodians', demanded by them, and turned back."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_local.layout import CUSTODIANS, program
from tests.support.cluster import Running, deciding, operator_of
from tests.support.preparing import read, write

PIPELINE = """
name = "cohort"
[keys]
key = "e2e"
classification = "research"
[columns.patient]
do = "tokenize"
[columns.age]
do = "generalise"
bins = [18, 65]
[columns.name]
do = "drop"
[types]
age = "int64"
"""
AGGREGATES = """
name = "ages"
dataset = "clinic"
[columns.patient]
do = "drop"
[columns.name]
do = "drop"
[[aggregate]]
name = "mean age"
what = "mean"
column = "age"
bounds = [0, 120]
epsilon = 0.6
[types]
age = "int64"
"""
DATA: dict[str, Any] = {"patient": ["p1", "p2", "p1"], "age": [17, 40, 70], "name": ["Ada", "Ben", "Cy"]}
DEMANDS = (
    '@id("own.prepared") forbid (principal, action == Action::"release", resource)\n'
    'when { resource.purposes.contains("cohort-study") }\n'
    'unless { !resource.prepared.isEmpty() && ["age", "patient"].containsAll(resource.columns) };\n'
)


def command(running: Running, *arguments: object) -> tuple[int, dict[str, Any]]:
    """``keyquorum prepare … --json``: exit status and what it printed."""
    environment = {
        **os.environ,
        "KEYQUORUM_PROFILE": str(running.layout.profile),
        "KEYQUORUM_PASSPHRASE": running.layout.owner_passphrase.read_text(),
    }
    done = subprocess.run(
        [*program("keyquorum"), "prepare", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    facts: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, facts.get("error", facts)


@pytest.mark.timeout(240)
def test_prepared_data_runs_where_policies_demand_it_and_nothing_else_does(
    running: Running, job: Path, tmp_path: Path
) -> None:
    (tmp_path / "cohort.toml").write_text(PIPELINE)
    source = write(tmp_path / "cohort.csv", DATA)
    out, mapping = job / "cohort.parquet", tmp_path / "cohort.mapping"
    status, made = command(running, "run", tmp_path / "cohort.toml", source, out, "--mapping", mapping)
    assert status == 0, made
    assert made["columns_out"] == ["age", "patient"]
    rows = read(out)
    assert rows["age"] == ["< 18", "[18, 65)", ">= 65"]
    assert rows["patient"][0] == rows["patient"][2] != rows["patient"][1]

    again = tmp_path / "again.csv"
    assert command(running, "run", tmp_path / "cohort.toml", source, again)[0] == 0
    assert read(again)["patient"] == rows["patient"]  # the custodians give the same key every time

    statement = out.with_name("cohort.parquet.provenance.json").rename(tmp_path / "statement.json")
    with (
        running.connect() as client,
        deciding(running, operator_of(running), DEMANDS, *(name for name, _ in CUSTODIANS)),
    ):
        changes: dict[str, Any] = {"key": running.key, "regions": [running.region], "purposes": ["cohort-study"]}
        with pytest.raises(KeyquorumError) as caught:
            client.submit(job, **changes)
        assert caught.value.reason is Reason.POLICY
        assert "own.prepared" in str(caught.value) + str(caught.value.details)
        submitted = client.submit(job, provenance=[statement], **changes)
        assert client.result(submitted.id).files["result.json"]

    back = tmp_path / "back.csv"
    status, undone = command(running, "detokenize", out, back, "--mapping", mapping, "--column", "patient")
    assert status == 0, undone
    assert read(back)["patient"] == DATA["patient"]


def test_a_budget_is_spent_once_and_no_further(running: Running, tmp_path: Path) -> None:
    (tmp_path / "ages.toml").write_text(AGGREGATES)
    source = write(tmp_path / "cohort.csv", DATA)
    status, refused = command(running, "run", tmp_path / "ages.toml", source, tmp_path / "none.parquet")
    assert (status, refused["reason"]) == (1, "NOT_FOUND")
    assert command(running, "budget", "clinic", "--set", "1")[1]["left"] == 1
    status, made = command(running, "run", tmp_path / "ages.toml", source, tmp_path / "ages.parquet")
    assert (status, made["epsilon"], made["epsilon_left"]) == (0, 0.6, 0.4)
    status, refused = command(running, "run", tmp_path / "ages.toml", source, tmp_path / "more.parquet")
    assert (status, refused["reason"], refused["details"]["field"]) == (1, "QUOTA", "epsilon")
    assert not (tmp_path / "more.parquet").exists()
    assert len(command(running, "budget", "clinic")[1]["spendings"]) == 1
