"""Pipelines, tables and keys for tests of preparation, without a cluster."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from keyquorum.prepare.budget import PrivacyLedger
from keyquorum.prepare.mapping import MappingHeader
from keyquorum.prepare.pipeline import parse_pipeline
from keyquorum.prepare.running import Prepared, PrepareKeys, run
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity

__all__ = ["HEADER", "KEYS", "KEYS_TOML", "NOW", "owner", "prepared", "read", "write"]

NOW = 1_800_000_000
KEYS_TOML = '[keys]\nkey = "demo"\nclassification = "personal"\n'
HEADER = MappingHeader("alice", "demo", 1, "cohort", "personal", "", "0f" * 16)
KEYS = PrepareKeys(b"\x01" * 32, b"\x02" * 32, b"\x03" * 32, HEADER)


@functools.cache
def owner() -> LoadedKeys:
    return LoadedKeys("alice", "owner", Identity.generate(), RecipientKey.generate())


def write(path: Path, columns: Mapping[str, Any]) -> Path:
    """A table in the format that the suffix says."""
    table = pa.table(dict(columns))
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        with ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pacsv.write_csv(table, path)
    return path


def read(path: Path) -> dict[str, list[Any]]:
    if path.suffix == ".parquet":
        return dict(pq.read_table(path).to_pydict())
    if path.suffix == ".arrow":
        with ipc.open_file(path) as file:
            return dict(file.read_all().to_pydict())
    return dict(pacsv.read_csv(path).to_pydict())


def prepared(
    pipeline: str,
    source: Path,
    output: Path,
    *,
    keys: PrepareKeys | None = None,
    ledger: PrivacyLedger | None = None,
    mapping: Path | None = None,
) -> Prepared:
    parsed = parse_pipeline(pipeline.encode())
    if keys is None and parsed.needs_key:
        keys = KEYS
    return run(
        parsed,
        source,
        output,
        owner=owner(),
        now=NOW,
        tool="keyquorum 0.1.0",
        keys=keys,
        ledger=ledger,
        mapping=mapping,
    )
