"""The sealed mapping: tokens come back for their owner, and for nobody else."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum.prepare.mapping import MAGIC, MappingHeader, MappingWriter, read_header, read_mapping
from keyquorum.prepare.pipeline import Projection
from keyquorum.prepare.reversal import replace_tokens
from keyquorum.prepare.transforms import Tokenizer, projector
from keyquorum.progress import silent
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from tests.support.preparing import HEADER, KEYS, KEYS_TOML, prepared, read, write

PIPELINE = (
    'name = "cohort"\n[columns.id]\ndo = "tokenize"\n[columns.doctor]\ndo = "tokenize"\ndomain = "person"\n'
    '[columns.x]\ndo = "keep"\n' + KEYS_TOML
)
VECTORS = json.loads((Path(__file__).resolve().parents[2] / "docs/spec/vectors/prepare.json").read_text())
DATA: dict[str, Any] = {"id": [7, 8, 7, None], "doctor": ["dr a", "dr b", "", "dr a"], "x": [1.0, 2.0, 3.0, 4.0]}


def sealed(pairs: dict[str, str], key: bytes = KEYS.mapping) -> bytes:
    out = io.BytesIO()
    writer = MappingWriter(out, HEADER, key)
    for token, value in pairs.items():
        writer.add("d", [token], pa.array([value], pa.string()))
    writer.close()
    return out.getvalue()


def opened(data: bytes, key: bytes = KEYS.mapping) -> dict[str, str]:
    file = io.BytesIO(data)
    return dict(read_mapping(file, read_header(file), key))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=20))
def test_detokenizing_inverts_tokenizing(values: list[str]) -> None:
    out = io.BytesIO()
    writer = MappingWriter(out, HEADER, KEYS.mapping)
    tokens = Tokenizer(KEYS.tokenize, "d", writer.add)(pa.array(values, pa.string())).to_pylist()
    writer.close()
    table = opened(out.getvalue())
    assert [table[token] for token in tokens] == values


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_prepared_file_comes_back(tmp_path: Path, suffix: str) -> None:
    prepared(
        PIPELINE, write(tmp_path / "in.parquet", DATA), tmp_path / f"out{suffix}", mapping=tmp_path / "ids.mapping"
    )
    table = opened((tmp_path / "ids.mapping").read_bytes())
    rows = replace_tokens(tmp_path / f"out{suffix}", tmp_path / "back.parquet", ("id", "doctor"), table, silent)
    back = read(tmp_path / "back.parquet")
    assert rows == 4
    assert back["id"] == ["7", "8", "7", None]
    assert back["doctor"] == DATA["doctor"]
    with pytest.raises(RefusedError) as caught:
        replace_tokens(tmp_path / "in.parquet", tmp_path / "no.parquet", ("doctor",), table, silent)
    assert caught.value.reason is Reason.NOT_FOUND
    assert not (tmp_path / "no.parquet").exists()


def test_no_value_is_in_the_clear(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", {**DATA, "doctor": ["a very private name"] * 4})
    prepared(PIPELINE, source, tmp_path / "out.arrow", mapping=tmp_path / "ids.mapping")
    for each in (tmp_path / "out.arrow", tmp_path / "ids.mapping", tmp_path / "out.arrow.provenance.json"):
        assert b"very private" not in each.read_bytes()


def test_a_mapping_that_was_changed_or_cut_or_opened_with_another_key_is_refused() -> None:
    data = sealed({"t1": "v1", "t2": "v2"})
    assert opened(data) == {"t1": "v1", "t2": "v2"}
    start = len(MAGIC) + 4
    renamed = data.replace(b'"owner":"alice"', b'"owner":"carol"')
    for bad in (data[:-1], data[: len(data) // 2], data[:-20] + b"x" + data[-19:], renamed, data + b"x", MAGIC):
        with pytest.raises(KeyquorumError):
            opened(bad)
    with pytest.raises(RefusedError) as caught:
        opened(data, b"\x09" * 32)
    assert caught.value.reason is Reason.ARTIFACT
    with pytest.raises(MalformedError):
        opened(data[:start] + b" " + data[start + 1 :])


def test_the_layout_of_the_header_is_pinned() -> None:
    header = HEADER.to_bytes()
    assert header == (
        b'{"classification":"personal","epoch":1,"export_control":"","key_check":"0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f",'
        b'"key_id":"demo","name":"cohort","owner":"alice"}'
    )
    assert MappingHeader.parse(header) == HEADER
    assert sealed({}).startswith(b"keyquorum-mapping-v1\n" + len(header).to_bytes(4, "big") + header)


def test_tokens_and_projections_are_those_of_the_vectors() -> None:
    for vector in VECTORS["tokens"]:
        made = Tokenizer(bytes.fromhex(vector["key"]), vector["domain"])(pa.array([vector["value"]]))
        assert made.to_pylist() == [vector["token"]]
    for vector in VECTORS["projections"]:
        what = Projection(vector["name"], (vector["column"],), vector["dimensions"], None)
        batch = pa.record_batch([pa.array([1.0])], names=[vector["column"]])
        row = [each[0].as_py() for each in projector(what, bytes.fromhex(vector["key"]))(batch)]
        assert row == pytest.approx([sign / math.sqrt(what.dimensions) for sign in vector["signs"]])


def test_the_vectors_are_current() -> None:
    script = Path(__file__).resolve().parents[2] / "scripts" / "make_prepare_vectors.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0
