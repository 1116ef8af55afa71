"""Tokens back into what they stand for, at home."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from keyquorum.outputs import outputs
from keyquorum.prepare import tables
from keyquorum.prepare.transforms import plain
from keyquorum.progress import Progress, ProgressCallback, Stage
from keyquorum_core.errors import Reason, RefusedError, UnavailableError

__all__ = ["replace_tokens"]


def replace_tokens(
    source: Path, output: Path, columns: tuple[str, ...], table: Mapping[str, str], progress: ProgressCallback
) -> int:
    """See :func:`keyquorum.prepare.detokenize`. Integers come back as text."""

    def wanted(names: list[str]) -> list[str]:
        missing = sorted(set(columns) - set(names))
        if missing or not columns:
            raise RefusedError(
                Reason.MALFORMED,
                "the input has not the columns to detokenize",
                expected=", ".join(map(ascii, missing)) or "at least one column",
                actual=", ".join(map(ascii, names))[:200],
            )
        return names

    def restored(batch: Any) -> Any:
        arrays = [
            _values(column, name, table) if name in columns else column
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        ]
        return pa.record_batch(arrays, names=batch.schema.names)

    kind = tables.format_of(output)
    rows = 0
    try:
        with source.open("rb") as file, outputs() as made:
            given = tables.open_table(file, tables.format_of(source), wanted, {})
            out = made.create(output)
            empty = pa.record_batch([pa.array([], each.type) for each in given.schema], schema=given.schema)
            with tables.writing(out, kind, restored(empty).schema) as sink:
                for batch in given.batches():
                    sink.write_batch(restored(batch))
                    rows += batch.num_rows
                    progress(Progress(Stage.PREPARE, rows, given.rows))
            made.publish()
    except OSError as error:
        raise UnavailableError(Reason.NOT_FOUND, f"{source} can't be read", actual=error.strerror) from None
    return rows


def _values(column: Any, name: str, table: Mapping[str, str]) -> Any:
    encoded = plain(column).cast(pa.string()).dictionary_encode()
    tokens = encoded.dictionary.to_pylist()
    unknown = [token for token in tokens if token not in table]
    if unknown:
        raise RefusedError(
            Reason.NOT_FOUND,
            f"column {name!a} has tokens that the mapping lacks",
            expected="tokens of the run that made the mapping",
            actual=f"{len(unknown)} others in one batch",
        )
    return pa.array([table[token] for token in tokens], pa.string()).take(encoded.indices)
