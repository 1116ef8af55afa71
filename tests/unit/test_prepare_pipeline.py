"""Pipelines: strict to the last member, and what each transform does to a column."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum.cli import run as command
from keyquorum.prepare.extra import require
from keyquorum.prepare.pipeline import Generalise, Mask, Projection, epsilon_micro, parse_pipeline
from keyquorum.prepare.running import run
from keyquorum.prepare.transforms import Tokenizer, generaliser, labels, mask, projector
from keyquorum.progress import Progress
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.provenance import open_provenance
from tests.support.preparing import KEYS, KEYS_TOML, NOW, owner, prepared, read, write

HEAD = 'name = "cohort"\n'
SUM = '[[aggregate]]\nname = "s"\nwhat = "sum"\ncolumn = "x"\nbounds = [0, 10]\nepsilon = 0.5\n'


def refused(text: str) -> KeyquorumError:
    with pytest.raises(MalformedError) as caught:
        parse_pipeline(text.encode())
    assert caught.value.expected
    return caught.value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name = ",
        'name = "Cohort"\n[columns.a]\ndo = "keep"\n',
        HEAD,
        HEAD + '[columns.a]\ndo = "drop"\n',
        HEAD + '[columns.a]\ndo = "encrypt"\n',
        HEAD + '[columns.a]\ndo = "keep"\nwhy = "x"\n',
        HEAD + 'extra = 1\n[columns.a]\ndo = "keep"\n',
        HEAD + '[columns.a]\ndo = "tokenize"\n',
        HEAD + '[columns.a]\ndo = "keep"\n' + KEYS_TOML,
        HEAD + '[columns.a]\ndo = "generalise"\n',
        HEAD + '[columns.a]\ndo = "generalise"\nbins = [1]\nprefix = 2\n',
        HEAD + '[columns.a]\ndo = "generalise"\nbins = []\n',
        HEAD + '[columns.a]\ndo = "generalise"\nbins = [2, 1]\n',
        HEAD + '[columns.a]\ndo = "generalise"\nbins = [nan]\n',
        HEAD + '[columns.a]\ndo = "generalise"\nbins = [inf]\n',
        HEAD + '[columns.a]\ndo = "generalise"\nbins = [true]\n',
        HEAD + '[columns.a]\ndo = "generalise"\ndate = "decade"\n',
        HEAD + '[columns.a]\ndo = "generalise"\nprefix = 0\n',
        HEAD + '[columns.a]\ndo = "mask"\nkeep_first = -1\n',
        HEAD + '[columns.a]\ndo = "mask"\ncharacter = "**"\n',
        HEAD + '[columns.a]\ndo = "keep"\n[types]\nb = "int64"\n',
        HEAD + '[columns.a]\ndo = "keep"\n[types]\na = "money"\n',
        HEAD + '[columns.a]\ndo = "keep"\n[[project]]\nname = "p"\ncolumns = ["a"]\ndimensions = 2\n' + KEYS_TOML,
        HEAD + SUM,
        HEAD + 'dataset = "d"\n[columns.a]\ndo = "keep"\n' + SUM,
        HEAD + 'dataset = "d"\n' + SUM + SUM,
        HEAD + 'dataset = "d"\n' + SUM.replace("[0, 10]", "[10, 0]"),
        HEAD + 'dataset = "d"\n' + SUM.replace("[0, 10]", "[0, nan]"),
        HEAD + 'dataset = "d"\n' + SUM.replace("[0, 10]", "[-inf, inf]"),
        HEAD + 'dataset = "d"\n' + SUM.replace("[0, 10]", "[0, 1e300]"),
        HEAD + 'dataset = "d"\n' + SUM.replace("bounds = [0, 10]\n", ""),
        HEAD + 'dataset = "d"\n' + SUM.replace("0.5", "0"),
        HEAD + 'dataset = "d"\n' + SUM.replace("0.5", "nan"),
        HEAD + 'dataset = "d"\n' + SUM.replace("0.5", "0.0000001"),
        HEAD + 'dataset = "d"\n' + SUM + "step = 3\n",
        HEAD + 'dataset = "d"\n' + SUM + "step = 1e-15\n",
        HEAD + 'dataset = "d"\n' + SUM + "missing = 11\n",
        HEAD + 'dataset = "d"\n' + SUM + 'group_by = "g"\ngroups = ["a", "a"]\n',
        HEAD + 'dataset = "d"\n' + SUM.replace("sum", "median"),
    ],
)
def test_what_is_not_exactly_a_pipeline_is_refused(text: str) -> None:
    refused(text)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_pipeline_or_a_typed_refusal(data: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_pipeline(data)


def test_budgets_are_whole_millionths() -> None:
    assert epsilon_micro("0.5") == 500_000
    for text in ("", "half", "-1", "0.0000001", "NaN", "Infinity"):
        with pytest.raises(MalformedError):
            epsilon_micro(text)


# -- transforms --------------------------------------------------------------------------------------------------------

TEXTS = st.lists(st.none() | st.text(st.characters(codec="utf-8"), max_size=12), max_size=30)


@settings(deadline=None, max_examples=50)
@given(TEXTS, st.binary(min_size=32, max_size=32))
def test_tokens_are_deterministic_and_one_to_one_for_a_key(values: list[str | None], key: bytes) -> None:
    array = pa.array(values, pa.string())
    tokens = Tokenizer(key, "d")(array).to_pylist()
    assert Tokenizer(key, "d")(array.dictionary_encode()).to_pylist() == tokens
    assert [token is None for token in tokens] == [value is None for value in values]
    assert len(set(tokens)) == len(set(values))
    assert all(len(token) == 32 for token in tokens if token)
    others = set(Tokenizer(key, "e")(array).to_pylist()) | set(Tokenizer(key[::-1] + b"x", "d")(array).to_pylist())
    assert not (others & set(tokens)) - {None}


@settings(deadline=None, max_examples=50)
@given(TEXTS, st.integers(0, 4), st.integers(0, 4))
def test_a_mask_shows_no_more_than_it_says(values: list[str | None], first: int, last: int) -> None:
    masked = mask(Mask(first, last, "*"), pa.array(values, pa.string())).to_pylist()
    for value, shown in zip(values, masked, strict=True):
        if value is None:
            assert shown is None
            continue
        assert len(shown) == len(value)
        if len(value) <= first + last:
            assert shown == "*" * len(value)
        else:
            middle = "*" * (len(value) - first - last)
            assert shown == value[:first] + middle + (value[-last:] if last else "")


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.none() | st.floats(allow_nan=False), max_size=30),
    st.lists(st.integers(-50, 50), min_size=1, max_size=6, unique=True).map(sorted),
)
def test_each_number_is_in_the_bin_that_names_it(values: list[float | None], edges: list[int]) -> None:
    what = Generalise(bins=tuple(map(float, edges)))
    found = generaliser(what, "x")(pa.array(values, pa.float64())).to_pylist()
    names = labels(what.bins)
    for value, name in zip(values, found, strict=True):
        expected = None if value is None else names[sum(edge <= value for edge in what.bins)]
        assert name == expected


def test_generalising_dates_prefixes_and_categories() -> None:
    import datetime

    day = pa.array([datetime.date(2026, 3, 17), None])
    month = generaliser(Generalise(date="month"), "d")(day).to_pylist()
    assert month == [datetime.date(2026, 3, 1), None]
    assert generaliser(Generalise(prefix=3), "c")(pa.array(["E11.9", "Z", None])).to_pylist() == ["E11", "Z", None]
    known = Generalise(categories={"Bern": "CH"}, other="elsewhere")
    assert generaliser(known, "c")(pa.array(["Bern", "Oslo", None])).to_pylist() == ["CH", "elsewhere", None]
    with pytest.raises(RefusedError):
        generaliser(Generalise(categories={"Bern": "CH"}), "c")(pa.array(["Oslo"]))
    with pytest.raises(RefusedError):
        generaliser(Generalise(bins=(0.0,)), "x")(pa.array([1.0, math.nan]))


def test_a_projection_keeps_distances_and_depends_on_its_key() -> None:
    columns = tuple(f"c{number}" for number in range(64))
    what = Projection("p", columns, 256, None)
    values = np.random.default_rng(1).normal(size=(20, 64))
    batch = pa.record_batch([pa.array(values[:, number]) for number in range(64)], names=list(columns))
    made = np.stack([each.to_numpy() for each in projector(what, b"k" * 32)(batch)], axis=1)
    other = np.stack([each.to_numpy() for each in projector(what, b"l" * 32)(batch)], axis=1)
    assert made.shape == (20, 256)
    assert not np.allclose(made, other)
    for a in range(0, 20, 3):
        for b in range(a + 1, 20, 3):
            ratio = np.linalg.norm(made[a] - made[b]) / np.linalg.norm(values[a] - values[b])
            assert 0.6 < ratio < 1.4


# -- files -------------------------------------------------------------------------------------------------------------

ROWS = (
    HEAD
    + '[columns.id]\ndo = "tokenize"\n[columns.age]\ndo = "generalise"\nbins = [18, 65]\n'
    + '[columns.name]\ndo = "drop"\n[columns.phone]\ndo = "mask"\nkeep_last = 2\n[columns.score]\ndo = "keep"\n'
    + '[types]\nage = "int64"\nscore = "float64"\n'
    + KEYS_TOML
)
DATA: dict[str, Any] = {
    "id": ["p1", "p2", "p1"],
    "age": [17, 65, 40],
    "name": ["Ada", "Ben", "Cy"],
    "phone": ["12345", "9", "6789"],
    "score": [0.5, 1.5, 2.5],
}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv"])
def test_every_format_in_gives_the_same_rows_out(tmp_path: Path, suffix: str) -> None:
    made = prepared(ROWS, write(tmp_path / f"in{suffix}", DATA), tmp_path / f"out{suffix}")
    rows = read(tmp_path / f"out{suffix}")
    assert list(rows) == ["id", "age", "phone", "score"]
    assert rows["age"] == ["< 18", ">= 65", "[18, 65)"]
    assert rows["phone"] == ["***45", "*", "**89"]
    assert rows["id"][0] == rows["id"][2] != rows["id"][1]
    assert (made.statement.rows_in, made.statement.rows_out) == (3, 3)
    assert made.statement.columns_in == ("age", "id", "name", "phone", "score")
    assert made.statement.columns_out == ("age", "id", "phone", "score")


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize("change", [{"name": None}, {"diagnosis": ["x", "y", "z"]}])
def test_a_column_too_few_or_too_many_is_refused(tmp_path: Path, suffix: str, change: dict[str, Any]) -> None:
    data = {name: value for name, value in {**DATA, **change}.items() if value is not None}
    with pytest.raises(RefusedError) as caught:
        prepared(ROWS, write(tmp_path / f"in{suffix}", data), tmp_path / "out.parquet")
    assert next(iter(change)) in caught.value.details["missing"] + caught.value.details["undeclared"]
    assert [each.name for each in tmp_path.iterdir()] == [f"in{suffix}"]


@pytest.mark.parametrize(("name", "values"), [("age", ["x", "y", "z"]), ("id", [0.5, 1.5, 2.5]), ("phone", [1, 2, 3])])
def test_a_column_of_another_type_is_refused(tmp_path: Path, name: str, values: list[Any]) -> None:
    with pytest.raises(RefusedError) as caught:
        prepared(ROWS, write(tmp_path / "in.parquet", {**DATA, name: values}), tmp_path / "out.parquet")
    assert (caught.value.reason, name in caught.value.message) == (Reason.MALFORMED, True)
    assert caught.value.expected
    assert caught.value.actual
    assert [each.name for each in tmp_path.iterdir()] == ["in.parquet"]


def test_text_where_a_csv_should_have_numbers_is_refused(tmp_path: Path) -> None:
    data = {**DATA, "age": ["17", "old", "40"]}
    with pytest.raises(MalformedError) as caught:
        prepared(ROWS, write(tmp_path / "in.csv", data), tmp_path / "out.parquet")
    assert "old" not in caught.value.expected
    assert [each.name for each in tmp_path.iterdir()] == ["in.csv"]


def test_nothing_is_overwritten_and_no_half_output_stays(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", DATA)
    (tmp_path / "out.parquet").write_bytes(b"mine")
    with pytest.raises(KeyquorumError) as caught:
        prepared(ROWS, source, tmp_path / "out.parquet")
    assert caught.value.reason is Reason.EXISTS
    assert (tmp_path / "out.parquet").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_table_without_rows_keeps_its_columns(tmp_path: Path) -> None:
    empty = {name: pa.array([], pa.array(values).type) for name, values in DATA.items()}
    made = prepared(ROWS, write(tmp_path / "in.parquet", empty), tmp_path / "out.parquet")
    assert read(made.output) == {"id": [], "age": [], "phone": [], "score": []}


def test_an_input_that_changes_while_it_is_read_gives_no_output(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", DATA)

    def meddle(progress: Progress) -> None:
        with source.open("a") as file:
            file.write("p9,1,Dee,1,1\n")

    pipeline = parse_pipeline(ROWS.encode())
    with pytest.raises(StateError) as caught:
        run(pipeline, source, tmp_path / "o.csv", owner=owner(), now=NOW, tool="t", keys=KEYS, progress=meddle)
    assert caught.value.reason is Reason.DIGEST
    assert [each.name for each in tmp_path.iterdir()] == ["in.csv"]


def test_the_statement_binds_the_very_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", DATA)
    made = prepared(ROWS, source, tmp_path / "out.parquet")
    statement = open_provenance(made.statement_file.read_bytes(), owner().identity.public)
    assert statement == made.statement
    assert statement.inputs == (hashlib.sha256(source.read_bytes()).hexdigest(),)
    assert statement.output_sha256 == hashlib.sha256(made.output.read_bytes()).hexdigest()
    assert statement.pipeline_sha256 == hashlib.sha256(ROWS.encode()).hexdigest()


def test_what_is_not_installed_is_asked_for_by_name() -> None:
    with pytest.raises(UnavailableError) as caught:
        require("pyarrow", "no_such_module")
    assert caught.value.actual == "without no_such_module"
    assert "keyquorum[prepare]" in caught.value.next_step


def test_the_command_says_what_a_pipeline_makes_and_whether_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.toml").write_text(ROWS)
    source = write(tmp_path / "in.parquet", DATA)
    assert command(["prepare", "check", str(tmp_path / "p.toml"), str(source), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["columns_out"] == ["id", "age", "phone", "score"]
    assert (facts["needs_key"], facts["epsilon"]) == (True, 0)
    write(source, {**DATA, "diagnosis": ["x", "y", "z"]})
    assert command(["prepare", "check", str(tmp_path / "p.toml"), str(source), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["details"]["undeclared"] == "diagnosis"
