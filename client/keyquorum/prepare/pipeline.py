"""A pipeline as it is declared in TOML: what happens to each column, or which aggregates are taken (docs/prepare.md).

A pipeline makes rows or aggregates, never both. Every column of the input is declared, if only to be dropped: what
nobody thought of does not leave home. Reading is strict: an unknown member, a value of another type or out of bounds is
refused with its place, and nothing is assumed that matters. A pipeline's digest is the SHA-256 of its file.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import pairwise
from pathlib import Path
from typing import Final, TypeAlias

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.names import KEY_ID, check
from keyquorum_core.strictjson import Fields
from keyquorum_protos.wire.files import read_bytes

__all__ = [
    "Aggregate",
    "Column",
    "Drop",
    "Generalise",
    "Keep",
    "KeySettings",
    "Mask",
    "Pipeline",
    "Projection",
    "Tokenize",
    "load_pipeline",
    "parse_pipeline",
]

MAX_PIPELINE: Final = 1 << 20
MAX_COLUMNS: Final = 1024
MICRO: Final = 1_000_000
CSV_TYPES: Final = ("string", "int64", "float64", "bool", "date", "timestamp")
UNITS: Final = ("year", "quarter", "month", "week", "day", "hour")
AGGREGATES: Final = ("count", "sum", "mean", "histogram")
_LARGEST: Final = 2**62


@dataclass(frozen=True, slots=True)
class Keep:
    """As it is."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Not read at all."""


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Each value becomes 32 hex digits, the same for the same value in the same ``domain``."""

    domain: str


@dataclass(frozen=True, slots=True)
class Generalise:
    """Exactly one of: numeric ``bins`` (ascending edges), a ``date`` unit, a ``prefix`` of so many characters,
    ``categories`` by value, with ``other`` for those not listed (``None``: they are refused)."""

    bins: tuple[float, ...] = ()
    date: str = ""
    prefix: int = 0
    categories: Mapping[str, str] | None = None
    other: str | None = None


@dataclass(frozen=True, slots=True)
class Mask:
    """All characters but the first and last few become ``character``; a value that would show whole shows nothing."""

    first: int
    last: int
    character: str


Column: TypeAlias = Keep | Drop | Tokenize | Generalise | Mask


@dataclass(frozen=True, slots=True)
class Projection:
    """``columns`` become ``NAME_0 … NAME_(dimensions-1)``. ``missing``: what stands for null, NaN and infinity;
    ``None``: they are refused."""

    name: str
    columns: tuple[str, ...]
    dimensions: int
    missing: float | None

    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.name}_{number}" for number in range(self.dimensions))


@dataclass(frozen=True, slots=True)
class Aggregate:
    """One differentially private aggregate. ``step``: what sums are counted in; the column's values are rounded to it.
    ``missing``: as in :class:`Projection`, within ``bounds``. The privacy unit is a row."""

    name: str
    what: str
    column: str
    epsilon_micro: int
    bounds: tuple[Decimal, Decimal] | None = None
    step: Decimal = Decimal(1)
    edges: tuple[float, ...] = ()
    group_by: str = ""
    groups: tuple[str, ...] = ()
    missing: Decimal | None = None


@dataclass(frozen=True, slots=True)
class KeySettings:
    """Under which key tokens and projections are made; ``epoch`` ``None`` is the active one. ``key_check``: hex."""

    key: str
    classification: str
    export_control: str = ""
    epoch: int | None = None
    key_check: str = ""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What :func:`parse_pipeline` makes of the file with digest ``sha256`` (hex)."""

    name: str
    sha256: str
    dataset: str
    columns: Mapping[str, Column]
    types: Mapping[str, str]
    projections: tuple[Projection, ...]
    aggregates: tuple[Aggregate, ...]
    keys: KeySettings | None

    @property
    def epsilon_micro(self) -> int:
        """What one run spends, in millionths: by basic composition, the sum."""
        return sum(each.epsilon_micro for each in self.aggregates)

    @property
    def tokenizes(self) -> bool:
        return any(isinstance(each, Tokenize) for each in self.columns.values())

    @property
    def needs_key(self) -> bool:
        return self.tokenizes or bool(self.projections)

    def declared(self) -> frozenset[str]:
        """Every column of the input."""
        return frozenset(self.columns) | {name for each in self.projections for name in each.columns} | self.measured()

    def measured(self) -> frozenset[str]:
        """Columns that aggregates read."""
        return frozenset(name for each in self.aggregates for name in (each.column, each.group_by) if name)

    def read(self) -> tuple[str, ...]:
        """Columns that are read, in order of declaration."""
        kept = [name for name, what in self.columns.items() if not isinstance(what, Drop)]
        more = [name for each in self.projections for name in each.columns] + sorted(self.measured())
        return tuple(dict.fromkeys(kept + more))


def load_pipeline(path: Path) -> Pipeline:
    """Raises :class:`MalformedError`, and ``NOT_FOUND`` where there is no file."""
    return parse_pipeline(read_bytes(path, "pipeline", MAX_PIPELINE))


def _bad(what: str, expected: str, actual: object = None) -> MalformedError:
    return MalformedError(Reason.MALFORMED, f"pipeline: {what}", expected=expected, actual=actual)


def parse_pipeline(data: bytes) -> Pipeline:
    """Strict. Raises :class:`MalformedError` naming the member, what was expected and what came."""
    if len(data) > MAX_PIPELINE:
        raise MalformedError(
            Reason.TOO_LARGE, "the pipeline is too large", expected=f"at most {MAX_PIPELINE} bytes", actual=len(data)
        )
    try:
        document = tomllib.loads(data.decode(), parse_float=Decimal)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError, InvalidOperation, ValueError) as error:
        raise _bad("not TOML", "TOML in UTF-8", str(error)[:120]) from None
    fields = Fields(document, "pipeline")
    name = fields.text("name", max_length=64)
    check(KEY_ID, name, "pipeline name")
    dataset = fields.text("dataset", max_length=64) if "dataset" in fields else ""
    if dataset:
        check(KEY_ID, dataset, "data set id")
    columns = {each: _column(fields_of, each) for each, fields_of in _tables(fields, "columns")}
    types = _types(fields)
    projections = tuple(_projection(each) for each in _items(fields, "project"))
    aggregates = tuple(_aggregate(each) for each in _items(fields, "aggregate"))
    keys = _keys(fields.object("keys")) if "keys" in fields else None
    fields.done()
    pipeline = Pipeline(name, hashlib.sha256(data).hexdigest(), dataset, columns, types, projections, aggregates, keys)
    _check_whole(pipeline)
    return pipeline


def _check_whole(pipeline: Pipeline) -> None:
    rows = bool(pipeline.projections) or any(not isinstance(each, Drop) for each in pipeline.columns.values())
    if rows == bool(pipeline.aggregates):
        raise _bad(
            "it makes both rows and aggregates, or neither",
            "columns to keep, or [[aggregate]] with all other columns dropped",
        )
    if len(pipeline.declared()) > MAX_COLUMNS:
        raise _bad("too many columns", f"at most {MAX_COLUMNS}", len(pipeline.declared()))
    projected = [name for each in pipeline.projections for name in each.columns]
    used = [*pipeline.columns, *projected] if pipeline.projections else [*pipeline.columns, *pipeline.measured()]
    twice = {name for name in used if used.count(name) > 1}
    if twice:
        raise _bad("a column is declared twice", "one declaration each", ascii(min(twice)))
    out = [name for name, what in pipeline.columns.items() if not isinstance(what, Drop)]
    out += [name for each in pipeline.projections for name in each.names()]
    if len(set(out)) != len(out):
        raise _bad("two columns of the output have one name", "different names", "a projection's name")
    names = [each.name for each in pipeline.aggregates]
    if len(set(names)) != len(names):
        raise _bad("two aggregates have one name", "different names")
    if pipeline.needs_key and pipeline.keys is None:
        raise _bad("tokens and projections need a key", "[keys] with key and classification", "nothing")
    if pipeline.keys is not None and not pipeline.needs_key:
        raise _bad("[keys] is not used", "a column to tokenize, or [[project]]", "neither")
    if pipeline.aggregates and not pipeline.dataset:
        raise _bad("aggregates spend a data set's budget", "dataset = its id", "nothing")
    for name in pipeline.types:
        if name not in pipeline.declared():
            raise _bad("a type for a column that is not declared", "a declared column", ascii(name[:40]))


# -- parts -------------------------------------------------------------------------------------------------------------


def _tables(fields: Fields, name: str) -> list[tuple[str, Fields]]:
    if name not in fields:
        return []
    tables = fields.object(name)
    found = tables.names()
    for each in found:
        _check_name(each)
    return [(each, tables.object(each)) for each in found]


def _items(fields: Fields, name: str) -> list[Fields]:
    return [Fields(each, name) for each in fields.list(name, max_items=256)] if name in fields else []


def _check_name(name: str) -> str:
    if not 0 < len(name) <= 128 or not name.isprintable():
        raise _bad("bad column name", "1…128 printable characters", ascii(name[:40]))
    return name


def _types(fields: Fields) -> dict[str, str]:
    if "types" not in fields:
        return {}
    types = fields.object("types")
    out = {}
    for name in types.names():
        out[name] = types.text(name)
        if out[name] not in CSV_TYPES:
            raise _bad(f"unknown type of column {name[:40]!a}", ", ".join(CSV_TYPES), ascii(out[name][:40]))
    return out


def _column(fields: Fields, name: str) -> Column:
    what = fields.text("do", max_length=32)
    out: Column
    if what == "keep":
        out = Keep()
    elif what == "drop":
        out = Drop()
    elif what == "tokenize":
        domain = fields.text("domain", max_length=64) if "domain" in fields else name
        out = Tokenize(domain)
    elif what == "generalise":
        out = _generalise(fields, name)
    elif what == "mask":
        out = _mask(fields, name)
    else:
        raise _bad(f"columns.{name[:40]!a}: unknown 'do'", "keep, drop, tokenize, generalise or mask", ascii(what))
    fields.done()
    return out


def _generalise(fields: Fields, name: str) -> Generalise:
    given = [each for each in ("bins", "date", "prefix", "categories") if each in fields]
    where = f"columns.{name[:40]!a}"
    if len(given) != 1:
        raise _bad(f"{where}: how to generalise", "one of bins, date, prefix, categories", ", ".join(given) or "none")
    if given == ["bins"]:
        return Generalise(bins=_edges(fields, "bins", where))
    if given == ["date"]:
        unit = fields.text("date")
        if unit not in UNITS:
            raise _bad(f"{where}: unknown date unit", ", ".join(UNITS), ascii(unit[:40]))
        return Generalise(date=unit)
    if given == ["prefix"]:
        return Generalise(prefix=fields.integer("prefix", 1, 1024))
    table = fields.object("categories")
    values = {each: table.text(each, allow_empty=True) for each in table.names()}
    if not 1 <= len(values) <= 65536:
        raise _bad(f"{where}: bad categories", "1…65536 of them", len(values))
    return Generalise(categories=values, other=fields.text("other", allow_empty=True) if "other" in fields else None)


def _mask(fields: Fields, name: str) -> Mask:
    first = fields.integer("keep_first", 0, 1024) if "keep_first" in fields else 0
    last = fields.integer("keep_last", 0, 1024) if "keep_last" in fields else 0
    character = fields.text("character") if "character" in fields else "*"
    if len(character) != 1 or not character.isprintable():
        raise _bad(f"columns.{name[:40]!a}: bad character", "one printable character", ascii(character[:8]))
    return Mask(first, last, character)


def _number(value: object, where: str, most: float = 1e300) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise _bad(f"{where}: not a number", "a finite number", type(value).__name__)
    number = Decimal(value)
    if not number.is_finite() or abs(number) > Decimal(most):
        raise _bad(f"{where}: not a number to go by", f"a finite number of at most {most:g}", str(number)[:40])
    return number


def _edges(fields: Fields, name: str, where: str) -> tuple[float, ...]:
    values = tuple(float(_number(each, f"{where}: {name}")) for each in fields.list(name, max_items=4096, min_items=1))
    if any(b <= a for a, b in pairwise(values)):
        raise _bad(f"{where}: {name} out of order", "ascending edges, each once")
    return values


def _projection(fields: Fields) -> Projection:
    name = fields.text("name", max_length=64)
    check(re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}", re.ASCII), name, "projection name")
    columns = fields.texts("columns", max_items=MAX_COLUMNS, min_items=1, max_length=128)
    dimensions = fields.integer("dimensions", 1, 512)
    missing = float(_number(fields.raw("missing"), f"project {name}: missing")) if "missing" in fields else None
    fields.done()
    return Projection(name, tuple(_check_name(each) for each in columns), dimensions, missing)


def _aggregate(fields: Fields) -> Aggregate:
    name = fields.text("name", max_length=64)
    where = f"aggregate {name!a}"
    what = fields.text("what", max_length=32)
    if what not in AGGREGATES:
        raise _bad(f"{where}: unknown 'what'", ", ".join(AGGREGATES), ascii(what))
    epsilon = _epsilon(fields.raw("epsilon"), f"{where}: epsilon")
    column = "" if what == "count" else _check_name(fields.text("column", max_length=128))
    group_by, groups = "", tuple[str, ...]()
    if "group_by" in fields:
        group_by = _check_name(fields.text("group_by", max_length=128))
        groups = fields.texts("groups", max_items=4096, min_items=1)
        if len(set(groups)) != len(groups):
            raise _bad(f"{where}: a group twice", "different groups")
    bounds, step, edges = None, Decimal(1), tuple[float, ...]()
    if what in ("sum", "mean"):
        pair = fields.list("bounds", max_items=2, min_items=2)
        bounds = _number(pair[0], f"{where}: bounds", 1e15), _number(pair[1], f"{where}: bounds", 1e15)
        if bounds[0] >= bounds[1]:
            raise _bad(f"{where}: bounds out of order", "lower < upper", f"{bounds[0]}, {bounds[1]}")
        if "step" in fields:
            step = _number(fields.raw("step"), f"{where}: step")
        if step <= 0 or any(each % step for each in bounds) or max(map(abs, bounds)) / step > _LARGEST >> 22:
            raise _bad(f"{where}: bad step", "a positive number that both bounds are multiples of, not too fine", step)
    if what == "histogram":
        edges = _edges(fields, "edges", where)
        if len(edges) < 2:
            raise _bad(f"{where}: too few edges", "2 or more", len(edges))
    missing = None
    if what != "count" and "missing" in fields:
        missing = _number(fields.raw("missing"), f"{where}: missing")
        if bounds is not None and (not bounds[0] <= missing <= bounds[1] or missing % step):
            raise _bad(f"{where}: missing is not a value within bounds", f"{bounds[0]}…{bounds[1]}", missing)
    fields.done()
    return Aggregate(name, what, column, epsilon, bounds, step, edges, group_by, groups, missing)


def epsilon_micro(text: str) -> int:
    """A budget such as ``0.5``, in millionths. Raises :class:`MalformedError`."""
    try:
        return _epsilon(Decimal(text), "epsilon")
    except InvalidOperation:
        raise _bad("epsilon: not a number", "a decimal number such as 0.5", ascii(text[:40])) from None


def _epsilon(value: object, where: str) -> int:
    micro = _number(value, where) * MICRO
    if micro != micro.to_integral_value() or not 1 <= micro <= 1000 * MICRO:
        raise _bad(f"{where}: not a budget", "0.000001…1000 in steps of 0.000001", str(value)[:40])
    return int(micro)


def _keys(fields: Fields) -> KeySettings:
    key = fields.text("key", max_length=64)
    check(KEY_ID, key, "key id")
    settings = KeySettings(
        key=key,
        classification=fields.text("classification", max_length=32),
        export_control=fields.text("export_control", allow_empty=True) if "export_control" in fields else "",
        epoch=fields.integer("epoch") if "epoch" in fields else None,
        key_check=fields.hex("key_check", 16).hex() if "key_check" in fields else "",
    )
    fields.done()
    return settings
