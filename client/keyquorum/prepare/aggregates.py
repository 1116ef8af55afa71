"""Differentially private aggregates: exact integer statistics in one pass, then OpenDP's noise, once.

A statistic is a vector of 64-bit integers: counts, or sums of values clamped to the declared bounds and counted in
steps, so that nothing of floating point reaches the noise. One row more or less changes it, in L1, by the
*sensitivity*: 1 for counts and histograms, the larger bound in steps for sums, whatever the groups, since a row is in
one. The noise is OpenDP's discrete Laplace over such vectors, its scale the smallest whose privacy map stays within
the aggregate's epsilon; a mean is a sum and a count at half of it each. One run's loss is the sum of all maps (basic
composition).

Groups are declared, so that which ones appear says nothing; rows of others are not counted. A sum that could pass 2⁶²
is refused before it is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

import numpy as np
import opendp.prelude as dp
import pyarrow as pa
import pyarrow.compute as pc

from keyquorum.prepare.pipeline import MICRO, Aggregate
from keyquorum.prepare.transforms import labels, numbers, plain
from keyquorum_core.errors import Reason, RefusedError, StateError

__all__ = ["RESULT_SCHEMA", "Released", "Statistic", "release"]

_MOST: Final = 2**62
RESULT_SCHEMA: Final = pa.schema(
    [
        ("aggregate", pa.string()),
        ("what", pa.string()),
        ("column", pa.string()),
        ("group", pa.string()),
        ("bin", pa.string()),
        ("value", pa.float64()),
        ("noise_scale", pa.float64()),
        ("epsilon", pa.float64()),
    ]
)


@dataclass
class Statistic:
    """One aggregate's exact statistics, over batches. Secret until :func:`release`."""

    what: Aggregate
    counts: Any = field(init=False, repr=False)
    sums: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros((self._groups, self._bins), np.int64)
        self.sums = [0] * self._groups
        self._rows = 0

    @property
    def _groups(self) -> int:
        return max(1, len(self.what.groups))

    @property
    def _bins(self) -> int:
        return len(self.what.edges) + 1 if self.what.edges else 1

    def check(self, schema: Any) -> None:
        """Raise :class:`RefusedError` unless the columns are of types that can be aggregated."""
        for name, wanted in ((self.what.column, "numbers"), (self.what.group_by, "text")):
            if not name:
                continue
            kind = schema.field(name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if not (number if wanted == "numbers" else text):
                raise RefusedError(
                    Reason.MALFORMED,
                    f"column {name!a} is of another type",
                    expected=f"{wanted}, for aggregate {self.what.name}",
                    actual=str(kind)[:80],
                )

    def add(self, batch: Any) -> None:
        """Take one batch in. Raises :class:`RefusedError` for what is no number, and for sums that could overflow."""
        what = self.what
        inside = np.ones(batch.num_rows, bool)
        group = np.zeros(batch.num_rows, np.int64)
        if what.group_by:
            found = pc.index_in(plain(batch.column(what.group_by)), pa.array(what.groups, pa.string()))
            inside = found.is_valid().to_numpy(zero_copy_only=False)
            group = pc.fill_null(found, 0).to_numpy(zero_copy_only=False).astype(np.int64)[inside]
        self._rows += batch.num_rows
        bins = np.zeros(len(group), np.int64)
        if what.column:
            missing = None if what.missing is None else float(what.missing)
            values = numbers(batch.column(what.column), what.column, missing)[inside]
            if what.edges:
                bins = np.searchsorted(np.asarray(what.edges), values, side="right")
            if what.bounds is not None:
                self._sum(values, group)
        flat = np.bincount(group * self._bins + bins, minlength=self.counts.size)
        self.counts += flat.reshape(self.counts.shape)

    def _sum(self, values: Any, group: Any) -> None:
        if self._rows * self.unit > _MOST:
            raise RefusedError(
                Reason.MALFORMED,
                f"aggregate {self.what.name} could overflow",
                expected=f"rows × largest bound / step of at most {_MOST}",
                actual=f"{self._rows} × {self.unit}",
                next_step="Use narrower bounds, or a coarser step.",
            )
        low, high = self._bounds()
        # Within 2⁵³ (the bounds are at most 10¹⁵, and a step divides them): float64 holds each value exactly enough to
        # round it to a whole step, and rounding it one way or the other stays within the bounds.
        steps = np.clip(np.rint(values / float(self.what.step)), low, high).astype(np.int64)
        for number in range(self._groups):
            self.sums[number] += int(steps[group == number].sum()) if self.what.groups else int(steps.sum())

    def _bounds(self) -> tuple[int, int]:
        bounds = self.what.bounds
        assert bounds is not None  # noqa: S101 - sums and means have them
        return int(bounds[0] / self.what.step), int(bounds[1] / self.what.step)

    @property
    def unit(self) -> int:
        """The largest change of a sum by one row, in steps."""
        return max(map(abs, self._bounds()))


@dataclass(frozen=True, slots=True)
class Released:
    """Noisy rows in :data:`RESULT_SCHEMA`'s columns, and the loss by OpenDP's maps, in millionths, rounded up."""

    rows: tuple[dict[str, object], ...]
    loss_micro: int


@dataclass(frozen=True, slots=True)
class _Noise:
    """A measurement of vectors with this sensitivity, and what it costs."""

    measurement: Any
    scale: float
    loss: Fraction

    @staticmethod
    def of(sensitivity: int, epsilon: Fraction) -> _Noise:
        dp.enable_features("contrib")
        space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l1_distance(T="i64")

        def make(scale: float) -> Any:
            return dp.m.make_laplace(*space, scale=scale)

        # Rounded down, so that the float is never more than the budget.
        most = float(epsilon) if Fraction(float(epsilon)) <= epsilon else float(np.nextafter(float(epsilon), 0.0))
        scale = dp.binary_search_param(make, d_in=sensitivity, d_out=most)
        measurement = make(scale)
        return _Noise(measurement, float(scale), Fraction(measurement.map(sensitivity)))

    def add(self, values: Sequence[int]) -> list[int]:
        return [int(each) for each in self.measurement(list(values))]


def release(statistics: Sequence[Statistic]) -> Released:
    """Add noise, once. Raises :class:`StateError` if OpenDP's maps came to more than was declared: nothing leaves
    then."""
    noises = [_noises(each.what, each) for each in statistics]
    loss = sum((noise.loss for group in noises for noise in group), Fraction(0))
    declared = sum(each.what.epsilon_micro for each in statistics)
    if loss * MICRO > declared:
        raise StateError(
            Reason.INTERNAL, "the noise would cost more than was declared", expected=declared, actual=float(loss)
        )
    rows = [row for each, group in zip(statistics, noises, strict=True) for row in _rows(each, group)]
    return Released(tuple(rows), -(-(loss.numerator * MICRO) // loss.denominator))


def _noises(what: Aggregate, statistic: Statistic) -> list[_Noise]:
    epsilon = Fraction(what.epsilon_micro, MICRO)
    if what.what == "sum":
        return [_Noise.of(statistic.unit, epsilon)]
    if what.what == "mean":
        return [_Noise.of(statistic.unit, epsilon / 2), _Noise.of(1, epsilon / 2)]
    return [_Noise.of(1, epsilon)]


def _rows(statistic: Statistic, noises: list[_Noise]) -> list[dict[str, object]]:
    what, step = statistic.what, float(statistic.what.step)
    groups: list[str | None] = [*what.groups] or [None]
    counts = [int(each) for each in statistic.counts.reshape(-1)]
    bins: list[str | None] = [None]
    if what.what == "sum":
        values = [each * step for each in noises[0].add(statistic.sums)]
    elif what.what == "mean":
        low, high = (float(each) for each in what.bounds or ())
        sums, sizes = noises[0].add(statistic.sums), noises[1].add(counts)
        values = [min(high, max(low, total * step / max(1, size))) for total, size in zip(sums, sizes, strict=True)]
    else:
        values = [float(each) for each in noises[0].add(counts)]
        if what.edges:
            bins = list(labels(what.edges))
    names = [(group, each) for group in groups for each in bins]
    return [
        {
            "aggregate": what.name,
            "what": what.what,
            "column": what.column or None,
            "group": group,
            "bin": each,
            "value": value,
            "noise_scale": noises[0].scale * (step if what.what in ("sum", "mean") else 1),
            "epsilon": what.epsilon_micro / MICRO,
        }
        for (group, each), value in zip(names, values, strict=True)
    ]
