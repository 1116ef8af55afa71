"""Charts as inline SVG, drawn by hand: no script, no font, no colour of their own but the page's variables.

Each is one image to a screen reader, with its numbers in words; pages put a table of the same numbers beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["bars", "columns", "nice_step"]

_WIDTH = 640
_WIDE = 1080
_ROW = 30
_LABEL = 200
_MOST_BARS = 12


def nice_step(most: int, steps: int = 4) -> int:
    """A round distance between ticks, so that ``steps`` of them reach ``most``: 1, 2 or 5 times a power of ten."""
    least = max(1, math.ceil(most / steps))
    power = int("1" + "0" * (len(str(least)) - 1))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def _svg(width: int, height: float, title: str, words: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(f"{title}: {words}")}" '
        f'preserveAspectRatio="xMinYMin meet">{"".join(body)}</svg>'
    )


def bars(title: str, values: Mapping[str, int], colour: str = "c1") -> str:
    """Horizontal bars, the largest first; those past the twelfth are added up. Empty without values."""
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) > _MOST_BARS:
        rest = sum(value for _, value in ordered[_MOST_BARS - 1 :])
        ordered = [*ordered[: _MOST_BARS - 1], (f"{len(values) - _MOST_BARS + 1} others", rest)]
    if not ordered:
        return ""
    most = max(1, *(value for _, value in ordered))
    room = _WIDTH - _LABEL - 70
    body = []
    for number, (name, value) in enumerate(ordered):
        y = number * _ROW
        shown = name if len(name) <= 26 else name[:25] + "…"
        width = max(2.0, room * value / most)
        body.append(
            f"<g><title>{escape(name)}: {value:,}</title>"
            f'<text class="label" x="{_LABEL - 10}" y="{y + 20}" text-anchor="end">{escape(shown)}</text>'
            f'<rect class="{colour}" x="{_LABEL}" y="{y + 5}" width="{width:.1f}" height="{_ROW - 10}" rx="3"/>'
            f'<text class="value" x="{_LABEL + width + 8:.1f}" y="{y + 20}">{value:,}</text></g>'
        )
    words = ", ".join(f"{name} {value:,}" for name, value in ordered)
    return _svg(_WIDTH, len(ordered) * _ROW, title, words, body)


def columns(title: str, labels: Sequence[str], series: Mapping[str, Sequence[int]]) -> str:
    """Stacked columns over time: one for each label, one part for each series, in the order given."""
    if not labels:
        return ""
    totals = [sum(values) for values in zip(*series.values(), strict=True)]
    step = nice_step(max(1, *totals))
    top = max(step, step * math.ceil(max(totals) / step))
    left, upper, lower = 56, 12, 230
    pitch = (_WIDE - left - 8) / len(labels)
    width = max(1.0, min(44.0, pitch * 0.72))
    body = []
    for tick in range(0, top + 1, step):
        y = lower - (lower - upper) * tick / top
        body.append(
            f'<line class="grid" x1="{left}" x2="{_WIDE - 4}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,}</text>'
        )
    every = max(1, math.ceil(len(labels) / 10))
    for number, label in enumerate(labels):
        middle = left + pitch * (number + 0.5)
        y = float(lower)
        parts = []
        for colour, (name, values) in enumerate(series.items(), 1):
            height = (lower - upper) * values[number] / top
            y -= height
            if values[number]:
                parts.append(
                    f'<rect class="c{colour}" x="{middle - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" '
                    f'height="{height:.1f}"><title>{escape(label)}, {escape(name)}: {values[number]:,}</title></rect>'
                )
        if number % every == 0 and middle + 40 < _WIDE:
            parts.append(
                f'<text class="tick" x="{middle:.1f}" y="{lower + 18}" text-anchor="middle">{escape(label)}</text>'
            )
        body.append(f"<g>{''.join(parts)}</g>")
    peak = max(range(len(labels)), key=totals.__getitem__)
    words = f"{sum(totals):,} in all, the most on {labels[peak]} with {totals[peak]:,}"
    return _svg(_WIDE, lower + 28, title, words, body)
