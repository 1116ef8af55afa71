"""Preparing a million rows beside the same transforms in plain PyArrow and in Polars; memory at one and ten million.

The peers make the same columns from the same file into the same format, with no declarations checked, no digest, no
statement and no mapping: the floor. Tokens are HMAC-SHA-256 in all three, in Python, over distinct values. Figures are
medians of alternating runs in processes of their own, so that each one's memory is its own.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["measure"]

ROWS = 1_000_000
REPEAT = 3
PIPELINE = """
name = "bench"
[columns.patient]
do = "tokenize"
[columns.age]
do = "generalise"
bins = [0, 18, 40, 65, 80]
[columns.diagnosis]
do = "generalise"
prefix = 3
[columns.phone]
do = "mask"
keep_last = 2
[columns.name]
do = "drop"
[columns.score]
do = "keep"
[keys]
key = "demo"
classification = "personal"
"""
KEY = b"\x01" * 32
LABELS = ["< 0", "[0, 18)", "[18, 40)", "[40, 65)", "[65, 80)", ">= 80"]
EDGES = [0.0, 18.0, 40.0, 65.0, 80.0]


def table_of(rows: int, path: Path) -> None:
    """Written in pieces, so that this process is no larger for it."""
    rng = np.random.default_rng(1)
    with pq.ParquetWriter(path, _piece(rng, 0, 1).schema) as writer:
        for start in range(0, rows, 1 << 17):
            writer.write_table(_piece(rng, start, min(1 << 17, rows - start)))


def _piece(rng: Any, start: int, count: int) -> Any:
    numbers = rng.integers(0, 400_000, count)
    return pa.table(
        {
            "patient": pa.array([f"patient-{number}" for number in numbers]),
            "age": rng.integers(0, 100, count),
            "diagnosis": pa.array([f"E{number % 90 + 10}.{number % 9}" for number in numbers]),
            "phone": pa.array([f"+41{number:09d}" for number in numbers]),
            "name": pa.array([f"name {number}" for number in numbers]),
            "score": rng.normal(size=count),
        }
    )


def ours(source: Path, out: Path) -> None:
    from tests.support.preparing import prepared

    prepared(PIPELINE, source, out)


def _tokens(values: list[str]) -> list[str]:
    import hmac

    return [hmac.digest(KEY, value.encode(), "sha256")[:16].hex() for value in values]


def arrow(source: Path, out: Path) -> None:
    """What somebody would write by hand, streaming like ours."""
    import pyarrow.compute as pc

    labels = pa.array(LABELS)
    file = pq.ParquetFile(source)
    writer = None
    for batch in file.iter_batches(batch_size=1 << 16, columns=["patient", "age", "diagnosis", "phone", "score"]):
        encoded = batch.column("patient").dictionary_encode()
        phone = batch.column("phone")
        made = pa.record_batch(
            {
                "patient": pa.array(_tokens(encoded.dictionary.to_pylist())).take(encoded.indices),
                "age": pa.DictionaryArray.from_arrays(
                    pa.array(np.searchsorted(EDGES, batch.column("age").to_numpy(), side="right"), pa.int32()), labels
                ),
                "diagnosis": pc.utf8_slice_codeunits(batch.column("diagnosis"), 0, 3),
                "phone": pc.binary_join_element_wise(
                    pc.binary_repeat("*", pc.subtract(pc.utf8_length(phone), 2)),
                    pc.utf8_slice_codeunits(phone, -2, None),
                    "",
                ),
                "score": batch.column("score"),
            }
        )
        if writer is None:
            writer = pq.ParquetWriter(out, made.schema)
        writer.write_batch(made)
    if writer is not None:
        writer.close()


def polars(source: Path, out: Path) -> None:
    """The whole table at once, as Polars is used."""
    import polars as pl

    frame = pl.read_parquet(source, columns=["patient", "age", "diagnosis", "phone", "score"])
    distinct = frame["patient"].unique()
    tokens = pl.Series(_tokens(distinct.to_list()))
    hidden = pl.col("phone").str.len_chars() - 2
    frame.with_columns(
        pl.col("patient").replace_strict(distinct, tokens),
        pl.col("age").bin_intervals(EDGES, labels=LABELS),
        pl.col("diagnosis").str.slice(0, 3),
        (pl.lit("*").repeat_by(hidden).list.join("") + pl.col("phone").str.slice(-2)).alias("phone"),
    ).write_parquet(out, compression="snappy")


def _one(what: str, source: Path, scratch: Path) -> dict[str, float]:
    """In a process of its own: seconds of the work without imports, and the most memory it held, in MiB."""
    out = scratch / f"{what}-{time.monotonic_ns()}.parquet"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.prepare", what, str(source), str(out)],
        check=True,
        capture_output=True,
        text=True,
    )
    for each in scratch.glob(f"{out.name}*"):
        each.unlink()
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(scratch: Path, rows: int = ROWS, repeat: int = REPEAT, tenfold: bool = True) -> dict[str, object]:
    """Rows a second of each, ours as a ratio of the peers', and peak memory."""
    source = scratch / "table.parquet"
    table_of(rows, source)
    found: dict[str, list[dict[str, float]]] = {"ours": [], "arrow": [], "polars": []}
    for _ in range(repeat):
        for name, runs in found.items():
            runs.append(_one(name, source, scratch))
    rate = {name: rows / statistics.median(run["seconds"] for run in runs) for name, runs in found.items()}
    peak = {name: max(run["peak_mib"] for run in runs) for name, runs in found.items()}
    out: dict[str, object] = {
        "rows": rows,
        "rows_per_second": rate,
        "of_plain_pyarrow": rate["ours"] / rate["arrow"],
        "of_plain_polars": rate["ours"] / rate["polars"],
        "peak_mib": peak,
    }
    if tenfold:
        source.unlink()
        table_of(10 * rows, source)
        more = _one("ours", source, scratch)["peak_mib"]
        out["peak_mib_at_tenfold"] = more
        out["memory_growth"] = more / peak["ours"]
    return out


def main() -> None:
    what, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    work = {"ours": ours, "arrow": arrow, "polars": polars}[what]
    if what == "ours":
        import tests.support.preparing

        tests.support.preparing.owner()
    elif what == "polars":
        import polars as loaded

        loaded.DataFrame()
    started = time.perf_counter()
    work(source, out)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(json.dumps({"seconds": seconds, "peak_mib": peak}))


if __name__ == "__main__":
    main()
