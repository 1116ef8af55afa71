"""One run of a pipeline: a table in; a table, its signed statement and, where asked for, a sealed mapping out.

Batch by batch, in memory that does not grow with the table. The input's digest is taken on the side, and the run
refuses an input that changed meanwhile. Aggregates are taken exactly, then the budget is spent, and only then is noise
drawn.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from keyquorum.outputs import outputs
from keyquorum.prepare import tables
from keyquorum.prepare.budget import Budget, PrivacyLedger, Spending
from keyquorum.prepare.extra import require
from keyquorum.prepare.mapping import MappingHeader, MappingWriter
from keyquorum.prepare.pipeline import Column, Drop, Generalise, Mask, Pipeline, Tokenize
from keyquorum.prepare.transforms import Tokenizer, check_type, generaliser, mask, projector
from keyquorum.progress import Progress, ProgressCallback, Stage, silent
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.provenance import ProvenanceStatement, sign_provenance

if TYPE_CHECKING:
    from keyquorum.prepare.aggregates import Statistic

__all__ = ["PrepareKeys", "Prepared", "check_input", "columns_out", "run", "statement_path"]


@dataclass(frozen=True, repr=False)
class PrepareKeys:
    """Purpose keys of one threshold-derived key of purpose ``tokenize``, 32 bytes each, and where they come from."""

    tokenize: bytes
    mapping: bytes
    projection: bytes
    header: MappingHeader


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run made."""

    statement: ProvenanceStatement
    output: Path
    statement_file: Path
    budget: Budget | None = None

    def as_dict(self) -> dict[str, object]:
        """JSON-able, for ``--json``."""
        made = self.statement
        return {
            "output": str(self.output),
            "statement": str(self.statement_file),
            "pipeline_sha256": made.pipeline_sha256,
            "input_sha256": made.inputs[0],
            "output_sha256": made.output_sha256,
            "columns_in": list(made.columns_in),
            "columns_out": list(made.columns_out),
            "rows_in": made.rows_in,
            "rows_out": made.rows_out,
            "epsilon": made.epsilon_micro / 1_000_000,
            **({} if self.budget is None else {"epsilon_left": self.budget.left_micro / 1_000_000}),
        }


def statement_path(output: Path) -> Path:
    """Where the statement about ``output`` goes: beside it."""
    return output.with_name(f"{output.name}.provenance.json")


def columns_out(pipeline: Pipeline) -> tuple[str, ...]:
    """Names of the output's columns, in order."""
    if pipeline.aggregates:
        from keyquorum.prepare.aggregates import RESULT_SCHEMA

        return tuple(RESULT_SCHEMA.names)
    kept = [name for name, what in pipeline.columns.items() if not isinstance(what, Drop)]
    return (*kept, *(name for each in pipeline.projections for name in each.names()))


class _Input:
    """The open input. ``names``: all its columns."""

    def __init__(self, pipeline: Pipeline, path: Path, file: BufferedReader) -> None:
        self.names: tuple[str, ...] = ()
        self._pipeline = pipeline
        self._path = path
        self._file = file
        self._before = self._stamp()
        self.table = tables.open_table(file, tables.format_of(path), self._columns, pipeline.types)
        self._check_types()

    def _stamp(self) -> tuple[int, int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _columns(self, names: list[str]) -> list[str]:
        if len(set(names)) != len(names):
            raise MalformedError(Reason.MALFORMED, "two columns of the input have one name", expected="different names")
        self.names = tuple(names)
        declared = self._pipeline.declared()
        missing, unknown = sorted(declared - set(names)), sorted(set(names) - declared)
        if missing or unknown:
            raise RefusedError(
                Reason.MALFORMED,
                "the input has not the columns that the pipeline declares",
                expected=f"columns {', '.join(map(ascii, missing))[:160]}" if missing else "a declaration of each",
                actual=f"not declared: {', '.join(map(ascii, unknown))[:160]}" if unknown else "without them",
                next_step="Declare every column: drop what must not leave.",
                details={"missing": ", ".join(missing)[:400], "undeclared": ", ".join(unknown)[:400]},
            )
        return list(self._pipeline.read())

    def _check_types(self) -> None:
        schema = self.table.schema
        for name, what in self._pipeline.columns.items():
            if not isinstance(what, Drop):
                check_type(name, what, schema.field(name).type)
        for projection in self._pipeline.projections:
            for name in projection.columns:
                check_type(name, Generalise(bins=(0.0,)), schema.field(name).type)

    def unchanged(self) -> None:
        """Raise :class:`StateError` if somebody wrote to the file meanwhile."""
        if self._stamp() != self._before:
            raise StateError(
                Reason.DIGEST,
                f"{self._path.name} changed while it was read",
                next_step="Run again when nothing writes to it",
            )


def _open(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise UnavailableError(Reason.NOT_FOUND, f"{path} can't be read", actual=error.strerror) from None


def check_input(pipeline: Pipeline, path: Path) -> tuple[str, ...]:
    """Whether the pipeline fits the file's columns and types, without reading its rows; returns the columns in it.

    Raises what :func:`run` would raise.
    """
    with _open(path) as file:
        found = _Input(pipeline, path, file)
        for each in _statistics(pipeline):
            each.check(found.table.schema)
        return found.names


def _statistics(pipeline: Pipeline) -> list[Statistic]:
    if not pipeline.aggregates:
        return []
    require("opendp")
    from keyquorum.prepare.aggregates import Statistic

    return [Statistic(each) for each in pipeline.aggregates]


def run(
    pipeline: Pipeline,
    source: Path,
    output: Path,
    *,
    owner: LoadedKeys,
    now: int,
    tool: str,
    keys: PrepareKeys | None = None,
    ledger: PrivacyLedger | None = None,
    mapping: Path | None = None,
    progress: ProgressCallback = silent,
) -> Prepared:
    """Prepare ``source`` into ``output``, with a statement beside it that ``owner`` signs, and a sealed ``mapping``
    where a path for one is given.

    Raises :class:`MalformedError` or :class:`RefusedError` for data that the pipeline does not fit, ``QUOTA`` for a
    budget that is not enough, ``EXISTS`` for an output that is there; then no file appears. A budget stays spent once
    noise was drawn, whatever happens after.
    """
    if (pipeline.needs_key and keys is None) or (pipeline.aggregates and ledger is None):
        raise StateError(Reason.STATE, "this pipeline needs keys, or a privacy ledger", expected="them", actual="none")
    if mapping is not None and not pipeline.tokenizes:
        raise RefusedError(Reason.MALFORMED, "a mapping of nothing", expected="a column to tokenize", actual="none")
    kind = tables.format_of(output)
    with ExitStack() as stack:
        made = stack.enter_context(outputs())
        sealed = made.create(mapping) if mapping is not None else None
        statement_file = made.create(statement_path(output))
        out = made.create(output)
        file = stack.enter_context(_open(source))
        given = _Input(pipeline, source, file)
        digest = stack.enter_context(ThreadPoolExecutor(1)).submit(_digest, file)
        spent: Budget | None = None
        if pipeline.aggregates:
            rows_in, rows_out, spent = _aggregate(
                pipeline, given, out, kind, lambda: digest.result(), ledger, now, progress
            )
        else:
            rows_in = rows_out = _rows(pipeline, given, out, kind, keys, sealed, progress)
        input_sha256 = digest.result()
        given.unchanged()
        out.flush()
        out.seek(0)
        statement = ProvenanceStatement(
            pipeline_sha256=pipeline.sha256,
            inputs=(input_sha256,),
            output_sha256=hashlib.file_digest(out, "sha256").hexdigest(),
            columns_in=given.names,
            columns_out=columns_out(pipeline),
            rows_in=rows_in,
            rows_out=rows_out,
            epsilon_micro=pipeline.epsilon_micro,
            tool=tool,
            issued_at=now,
        )
        statement_file.write(sign_provenance(statement, owner.identity))
        made.publish()
    return Prepared(statement, output, statement_path(output), spent)


def _digest(file: BufferedReader) -> str:
    """Of the open file itself, whatever its name leads to by now, and without moving the position it is read at."""
    digest, offset = hashlib.sha256(), 0
    while piece := os.pread(file.fileno(), 1 << 20, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()


def _counted(given: _Input, progress: ProgressCallback) -> Iterator[Any]:
    done = 0
    for batch in given.table.batches():
        yield batch
        done += batch.num_rows
        progress(Progress(Stage.PREPARE, done, given.table.rows))


def _transform(name: str, what: Column, keys: PrepareKeys | None, writer: MappingWriter | None) -> Callable[[Any], Any]:
    if isinstance(what, Tokenize) and keys is not None:
        return Tokenizer(keys.tokenize, what.domain, writer.add if writer is not None else None)
    if isinstance(what, Mask):
        return lambda array: mask(what, array)
    if isinstance(what, Generalise):
        return generaliser(what, name)
    return lambda array: array


def _rows(
    pipeline: Pipeline,
    given: _Input,
    out: BufferedRandom,
    kind: str,
    keys: PrepareKeys | None,
    sealed: BufferedRandom | None,
    progress: ProgressCallback,
) -> int:
    writer = MappingWriter(sealed, keys.header, keys.mapping) if sealed is not None and keys is not None else None
    steps = [
        (name, _transform(name, what, keys, writer))
        for name, what in pipeline.columns.items()
        if not isinstance(what, Drop)
    ]
    projections = [projector(each, keys.projection) for each in pipeline.projections if keys is not None]
    names = columns_out(pipeline)
    rows = 0

    def transformed(batch: Any) -> Any:
        arrays = [step(batch.column(name)) for name, step in steps]
        for each in projections:
            arrays += each(batch)
        return pa.record_batch(arrays, names=list(names))

    try:
        # The empty batch shows the output's schema, also for a table without rows.
        empty = pa.record_batch([pa.array([], each.type) for each in given.table.schema], schema=given.table.schema)
        with tables.writing(out, kind, transformed(empty).schema) as sink:
            for batch in _counted(given, progress):
                sink.write_batch(transformed(batch))
                rows += batch.num_rows
        if writer is not None:
            writer.close()
    finally:
        if writer is not None:
            writer.abort()
    return rows


def _aggregate(
    pipeline: Pipeline,
    given: _Input,
    out: BufferedRandom,
    kind: str,
    digest: Callable[[], str],
    ledger: PrivacyLedger | None,
    now: int,
    progress: ProgressCallback,
) -> tuple[int, int, Budget]:
    statistics = _statistics(pipeline)
    from keyquorum.prepare.aggregates import RESULT_SCHEMA, release

    for each in statistics:
        each.check(given.table.schema)
    rows = 0
    for batch in _counted(given, progress):
        for each in statistics:
            each.add(batch)
        rows += batch.num_rows
    given.unchanged()
    if ledger is None:
        raise StateError(Reason.STATE, "noise is drawn only against a budget", expected="a privacy ledger")
    spent = ledger.spend(pipeline.dataset, Spending(pipeline.epsilon_micro, pipeline.sha256, digest(), now))
    released = release(statistics)
    with tables.writing(out, kind, RESULT_SCHEMA) as sink:
        sink.write_batch(pa.RecordBatch.from_pylist(list(released.rows), schema=RESULT_SCHEMA))
    return rows, len(released.rows), spent
