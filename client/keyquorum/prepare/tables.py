"""Tables in and out as streams of Arrow record batches: Parquet, Arrow IPC and CSV, by the file's suffix.

Memory is a few batches at any size. CSV columns are text unless the pipeline names a type; an empty field is null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from keyquorum_core.errors import MalformedError, Reason, RefusedError, UnavailableError

__all__ = ["BATCH_ROWS", "Sink", "Table", "open_table", "writing"]

BATCH_ROWS: Final = 1 << 16
_CSV_BLOCK: Final = 4 << 20
_TYPES: Final = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
}
FORMATS: Final = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".csv": "csv"}


def format_of(path: Path) -> str:
    """Raises :class:`MalformedError` (``UNSUPPORTED``)."""
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise MalformedError(
            Reason.UNSUPPORTED, f"{path.name} is of no known format", expected=", ".join(FORMATS), actual=path.suffix
        )
    return found


class Table:
    """``schema``: of the columns in the file. ``rows``: how many, 0 where that is not known beforehand."""

    def __init__(self, schema: Any, rows: int, batches: Callable[[], Iterator[Any]]) -> None:
        self.schema = schema
        self.rows = rows
        self._batches = batches

    def batches(self) -> Iterator[Any]:
        """Batches of the columns asked for. Raises :class:`MalformedError` for data that can't be read."""
        try:
            yield from self._batches()
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise _unreadable(error) from None


def _unreadable(error: Exception) -> MalformedError:
    return MalformedError(
        Reason.MALFORMED, "the input can't be read", expected="a table of the declared types", actual=str(error)[:200]
    )


def open_table(file: BinaryIO, kind: str, columns: Callable[[list[str]], list[str]], types: Mapping[str, str]) -> Table:
    """``columns`` is told all names and says which to read; it may refuse. ``types``: of CSV columns."""
    try:
        if kind == "parquet":
            return _parquet(file, columns)
        if kind == "arrow":
            return _arrow(file, columns)
        return _csv(file, columns, types)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowKeyError, pa.ArrowNotImplementedError, OSError) as error:
        raise _unreadable(error) from None


def _parquet(file: BinaryIO, columns: Callable[[list[str]], list[str]]) -> Table:
    # Buffering ahead would keep all of the file that was read so far.
    source = pq.ParquetFile(file, pre_buffer=False)
    wanted = columns(list(source.schema_arrow.names))
    schema = pa.schema([source.schema_arrow.field(name) for name in wanted])
    return Table(schema, source.metadata.num_rows, lambda: source.iter_batches(batch_size=BATCH_ROWS, columns=wanted))


def _arrow(file: BinaryIO, columns: Callable[[list[str]], list[str]]) -> Table:
    try:
        random = ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        stream = ipc.open_stream(file)
        wanted = columns(list(stream.schema.names))
        schema, source = stream.schema, iter(stream)
    else:
        wanted = columns(list(random.schema.names))
        schema = random.schema
        source = (random.get_batch(number) for number in range(random.num_record_batches))

    def batches() -> Iterator[Any]:
        for batch in source:
            part = batch.select(wanted)
            for start in range(0, part.num_rows, BATCH_ROWS):
                yield part.slice(start, BATCH_ROWS)

    return Table(pa.schema([schema.field(name) for name in wanted]), 0, batches)


def _csv(file: BinaryIO, columns: Callable[[list[str]], list[str]], types: Mapping[str, str]) -> Table:
    names = _header(file)
    wanted = columns(names)
    convert = pacsv.ConvertOptions(
        include_columns=wanted,
        column_types={name: _TYPES[types.get(name, "string")] for name in wanted},
        null_values=[""],
        strings_can_be_null=True,
        true_values=["true", "1"],
        false_values=["false", "0"],
    )
    reader = pacsv.open_csv(file, pacsv.ReadOptions(block_size=_CSV_BLOCK), convert_options=convert)
    return Table(reader.schema, 0, lambda: iter(reader))


def _header(file: BinaryIO) -> list[str]:
    """The names in the first line, as the reader itself finds them."""
    start = file.tell()
    line = file.readline(1 << 20)
    file.seek(start)
    found = pacsv.read_csv(pa.BufferReader(line), pacsv.ReadOptions(block_size=1 << 20))
    return list(found.schema.names)


class Sink(Protocol):
    """Where batches go."""

    def write_batch(self, batch: Any) -> None: ...


class _PlainCsv:
    """CSV knows no dictionaries."""

    def __init__(self, file: BinaryIO, schema: Any) -> None:
        fields = [
            pa.field(each.name, each.type.value_type if pa.types.is_dictionary(each.type) else each.type)
            for each in schema
        ]
        self._schema = pa.schema(fields)
        self._writer = pacsv.CSVWriter(file, self._schema)

    def write_batch(self, batch: Any) -> None:
        arrays = [column.cast(field.type) for column, field in zip(batch.columns, self._schema, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


@contextmanager
def writing(file: BinaryIO, kind: str, schema: Any) -> Iterator[Sink]:
    """A sink for batches of ``schema``; the file is whole once this ends without an error."""
    try:
        writer: Any
        if kind == "parquet":
            writer = pq.ParquetWriter(file, schema, compression="snappy")
        elif kind == "arrow":
            writer = ipc.new_file(file, schema)
        else:
            writer = _PlainCsv(file, schema)
        try:
            yield writer
        finally:
            writer.close()
    except OSError as error:
        raise UnavailableError(Reason.STORAGE, "the output can't be written", actual=str(error)[:120]) from None
    except pa.ArrowInvalid as error:
        raise RefusedError(
            Reason.MALFORMED, "the output can't be written in this format", actual=str(error)[:120]
        ) from None
