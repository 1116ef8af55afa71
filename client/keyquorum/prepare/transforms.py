"""What happens to one column of one batch. Each function is vectorised; text goes through its distinct values where
Python has to look at them, so that a column of few values costs little.

Refusals name the column. Nulls stay null.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from keyquorum.prepare.pipeline import Column, Generalise, Keep, Mask, Projection, Tokenize
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.transcript import transcript

__all__ = ["TOKEN_DIGITS", "Tokenizer", "finite", "generaliser", "mask", "projector"]

TOKEN_DIGITS: Final = 32
Transform = Callable[[Any], Any]


def _text_type(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _refuse_type(name: str, expected: str, kind: Any) -> RefusedError:
    return RefusedError(
        Reason.MALFORMED,
        f"column {name!a} is of another type",
        expected=expected,
        actual=str(kind)[:80],
        next_step="For CSV, name the column's type in [types].",
    )


def check_type(name: str, what: Column, kind: Any) -> None:
    """Raise :class:`RefusedError` unless the column's Arrow type is one that its transform works on."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text, whole = _text_type(kind), bool(pa.types.is_integer(kind))
    number = whole or bool(pa.types.is_floating(kind))
    if isinstance(what, Keep):
        return
    if isinstance(what, Tokenize) and not (text or whole):
        raise _refuse_type(name, "text or integers, to tokenize", kind)
    if isinstance(what, Mask) and not text:
        raise _refuse_type(name, "text, to mask", kind)
    if isinstance(what, Generalise):
        if what.bins and not number:
            raise _refuse_type(name, "numbers, for bins", kind)
        if what.date and not (pa.types.is_date(kind) or pa.types.is_timestamp(kind)):
            raise _refuse_type(name, "dates or timestamps", kind)
        if (what.prefix or what.categories is not None) and not text:
            raise _refuse_type(name, "text", kind)


def plain(array: Any) -> Any:
    """Text in one form: dictionaries decoded, large strings as strings."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.string()) if pa.types.is_large_string(array.type) else array


class Tokenizer:
    """Tokens of one column: the first 16 bytes of HMAC-SHA-256(key of the domain, value), as hex digits.

    The key of a domain is HMAC-SHA-256(``key``, transcript("keyquorum/v1/token-domain", domain)). Integers are
    tokenized as their decimal digits, text as its UTF-8. ``keep(tokens, values)`` is told each batch's distinct pairs.
    """

    def __init__(self, key: bytes, domain: str, keep: Callable[[str, list[str], Any], None] | None = None) -> None:
        self._domain = domain
        self._key = hmac.digest(key, transcript("keyquorum/v1/token-domain", domain.encode()), "sha256")
        self._keep = keep

    def __call__(self, array: Any) -> Any:
        encoded = plain(array).cast(pa.string()).dictionary_encode()
        key, digest = self._key, hmac.digest
        values = encoded.dictionary
        tokens = [digest(key, value.encode(), "sha256")[:16].hex() for value in values.to_pylist()]
        if self._keep is not None and tokens:
            self._keep(self._domain, tokens, values)
        return pa.array(tokens, pa.string()).take(encoded.indices)


def mask(what: Mask, array: Any) -> Any:
    """Characters are code points. A value no longer than what would be shown is masked whole."""
    text = plain(array)
    length = pc.utf8_length(text)
    shown = what.first + what.last
    hidden = pc.if_else(pc.less_equal(length, shown), length, pc.subtract(length, pa.scalar(shown, length.type)))
    middle = pc.binary_repeat(pa.scalar(what.character), hidden)
    whole = pc.greater(length, shown)
    empty = pa.scalar("", pa.string())
    parts = []
    if what.first:
        parts.append(pc.if_else(whole, pc.utf8_slice_codeunits(text, 0, what.first), empty))
    parts.append(middle)
    if what.last:
        parts.append(pc.if_else(whole, pc.utf8_slice_codeunits(text, -what.last, None), empty))
    return pc.binary_join_element_wise(*parts, "", null_handling="emit_null")


def labels(edges: Sequence[float]) -> list[str]:
    """Names of the bins between and beyond ``edges``, lower edge included."""
    shown = [f"{edge:.15g}" for edge in edges]
    inner = [f"[{low}, {high})" for low, high in pairwise(shown)]
    return [f"< {shown[0]}", *inner, f">= {shown[-1]}"]


def _bin(what: Generalise, name: str) -> Transform:
    names = pa.array(labels(what.bins))
    edges = np.asarray(what.bins)

    def transform(array: Any) -> Any:
        values = pc.cast(array, pa.float64())
        finite(values, name, infinite=False)
        indices = np.searchsorted(edges, pc.fill_null(values, 0.0).to_numpy(zero_copy_only=False), side="right")
        mask = values.is_null().to_numpy(zero_copy_only=False)
        return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32(), mask=mask), names)

    return transform


def _categories(what: Generalise, name: str) -> Transform:
    table = what.categories or {}

    def transform(array: Any) -> Any:
        encoded = plain(array).dictionary_encode()
        values = encoded.dictionary.to_pylist()
        unknown = sum(value not in table for value in values)
        if unknown and what.other is None:
            raise RefusedError(
                Reason.MALFORMED,
                f"column {name!a} has values that are in no category",
                expected=f"one of {len(table)} values, or 'other' for the rest",
                actual=f"{unknown} other values in one batch",
            )
        mapped = [table.get(value, what.other) for value in values]
        return pa.array(mapped, pa.string()).take(encoded.indices)

    return transform


def generaliser(what: Generalise, name: str) -> Transform:
    """The transform of one column."""
    if what.bins:
        return _bin(what, name)
    if what.date:
        return lambda array: pc.floor_temporal(array, unit=what.date)
    if what.prefix:
        return lambda array: pc.utf8_slice_codeunits(plain(array), 0, what.prefix)
    return _categories(what, name)


def finite(values: Any, name: str, *, infinite: bool = True) -> None:
    """Raise :class:`RefusedError` where there is NaN, or, with ``infinite``, infinity."""
    bad = pc.is_nan(values)
    if infinite:
        bad = pc.or_kleene(bad, pc.is_inf(values))
    count = pc.sum(pc.cast(bad, pa.int64())).as_py() or 0
    if count:
        raise RefusedError(
            Reason.MALFORMED,
            f"column {name!a} has values that are not numbers",
            expected="finite numbers" if infinite else "no NaN",
            actual=f"{count} of them in one batch",
            next_step="Repair the data, or say with 'missing' what stands for them.",
        )


def numbers(array: Any, name: str, missing: float | None) -> Any:
    """The column as a NumPy array of float64 without NaN, infinity or null: refused, or ``missing`` in their place."""
    values = pc.cast(array, pa.float64(), safe=False)
    if missing is None:
        finite(values, name)
        if values.null_count:
            raise RefusedError(
                Reason.MALFORMED,
                f"column {name!a} has nulls",
                expected="a number in every row",
                actual=f"{values.null_count} nulls in one batch",
                next_step="Repair the data, or say with 'missing' what stands for them.",
            )
        return values.to_numpy(zero_copy_only=False)
    found = pc.fill_null(values, missing).to_numpy(zero_copy_only=False)
    return np.where(np.isfinite(found), found, missing)


def projector(what: Projection, key: bytes) -> Callable[[Any], list[Any]]:
    """Random projection of a batch: x·R, where R is columns × dimensions with entries ±1/√dimensions (Achlioptas
    2003), so that distances are kept up to the Johnson–Lindenstrauss bound. A column's signs are the bits, least
    significant first, of HMAC-SHA-256(key, transcript("keyquorum/v1/projection", name, column) ‖ u32be(block)), block
    after block.
    """
    rows = []
    for column in what.columns:
        seed = transcript("keyquorum/v1/projection", what.name.encode(), column.encode())
        blocks = -(-what.dimensions // 256)
        stream = b"".join(hmac.digest(key, seed + block.to_bytes(4, "big"), "sha256") for block in range(blocks))
        bits = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")[: what.dimensions]
        rows.append(np.where(bits == 1, 1.0, -1.0))
    matrix = np.stack(rows) / np.sqrt(what.dimensions)

    def transform(batch: Any) -> list[Any]:
        table = np.stack([numbers(batch.column(name), name, what.missing) for name in what.columns], axis=1)
        projected = table @ matrix
        if not np.isfinite(projected).all():
            raise RefusedError(Reason.MALFORMED, f"projection {what.name} overflows", expected="smaller numbers")
        return [pa.array(np.ascontiguousarray(projected[:, number])) for number in range(what.dimensions)]

    return transform
