"""A drill's report as one HTML page that needs nothing else: no script, no font, no image, nothing fetched.

In the audit report's style. Everything in a report is text to it.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Final

from keyquorum.audit.page import STYLE, table, time_of
from keyquorum_core.drill_report import ABOUT, FULL, DrillReport, Outcome, Part

__all__ = ["render"]

_KINDS: Final = {Outcome.PASSED: "good", Outcome.FAILED: "bad", Outcome.INTERRUPTED: "warn", Outcome.SKIPPED: "warn"}
_BAR: Final = {"inject": "c4", "detect": "c3", "recover": "c2"}
_EXTRA: Final = Path(__file__).with_name("drill_page.css")


def render(report: DrillReport) -> str:
    """The whole page."""
    title = f"Drill: {report.kind}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE.read_text()}{_EXTRA.read_text()}</style></head><body>"
        f'<header><p class="brand">keyquorum, cluster {escape(report.cluster)}</p><h1>{escape(title)}</h1>'
        f'<p class="period">{escape(_about(report.kind))}; on key {escape(report.key_id)},'
        f" {time_of(report.started_at)} UTC</p>{_verdict(report)}</header><main>"
        f"{_tiles(report)}{_overview(report)}{''.join(_part(report, part) for part in report.parts)}</main>"
        f"<footer><p>Signed by the drill identity of coordinator {escape(report.coordinator)}, under the roster"
        f" <code>{report.roster_sha256[:16]}…</code>. SHA-256 of the report, as the ledger's leaf names it:"
        f" <code>{report.digest}</code></p></footer></body></html>"
    )


def _about(kind: str) -> str:
    return "every kind of drill, in order" if kind == FULL else ABOUT[kind]


def _badge(outcome: Outcome) -> str:
    return f'<span class="badge {_KINDS[outcome]}">{escape(str(outcome))}</span>'


def _verdict(report: DrillReport) -> str:
    failed = [part.kind for part in report.parts if part.outcome is Outcome.FAILED]
    words = {
        Outcome.PASSED: "Passed: every check held.",
        Outcome.FAILED: f"Failed: {', '.join(failed)}.",
        Outcome.INTERRUPTED: "Interrupted: what it injected was undone.",
        Outcome.SKIPPED: "Skipped.",
    }
    return f'<p class="notice {_KINDS[report.outcome]}">{escape(words[report.outcome])}</p>'


def _tiles(report: DrillReport) -> str:
    checks = [check for part in report.parts for check in part.checks]
    detected = [part.detect_ms for part in report.parts if part.detect_ms is not None]
    recovered = [part.recover_ms for part in report.parts if part.recover_ms is not None]
    tiles = (
        (f"{sum(check.passed for check in checks)} / {len(checks)}", "checks held"),
        (_ms(max(detected, default=0)) if detected else "–", "slowest to notice"),
        (_ms(max(recovered, default=0)) if recovered else "–", "slowest to recover"),
        (_ms(report.duration_ms), "in all"),
    )
    cells = "".join(f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>' for value, name in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _overview(report: DrillReport) -> str:
    if len(report.parts) < 2:
        return ""
    rows = [
        (
            f'<a href="#{escape(part.kind)}">{escape(part.kind)}</a>',
            _badge(part.outcome),
            escape(", ".join(part.custodians) or "–"),
            "–" if part.detect_ms is None else _ms(part.detect_ms),
            "–" if part.recover_ms is None else _ms(part.recover_ms),
            _ms(part.duration_ms),
        )
        for part in report.parts
    ]
    head = ("Kind", "Outcome", "At whom", "Noticed after", "Recovered after", "Took")
    return f"<section><h2>Parts</h2>{table(head, rows, numbers=(3, 4, 5))}</section>"


def _part(report: DrillReport, part: Part) -> str:
    why = " ".join(filter(None, (part.reason, part.cause)))
    out = [
        f'<section id="{escape(part.kind)}"><h2>{escape(part.kind)} {_badge(part.outcome)}'
        f" <small>{escape(ABOUT[part.kind])}</small></h2>"
    ]
    if why:
        out.append(f'<p class="notice {_KINDS[part.outcome]}">{escape(why)}</p>')
    out.append(_bar(part))
    if part.checks:
        rows = [
            (
                _badge(Outcome.PASSED if check.passed else Outcome.FAILED),
                escape(check.what),
                escape(check.expected),
                escape(check.actual),
            )
            for check in part.checks
        ]
        out.append(table(("", "Check", "Expected", "Came"), rows))
    moments = [each for each in report.timeline if each.kind == part.kind]
    if moments:
        lines = "".join(
            f'<li class="{escape(each.step)}"><span class="at">{each.at_ms / 1000:.2f} s</span>'
            f'<span class="step">{escape(each.step)}</span><span class="text">'
            f"{'<b>' + escape(each.custodian) + '</b> ' if each.custodian else ''}{escape(each.text)}</span></li>"
            for each in moments
        )
        out.append(f'<h3>Timeline</h3><ol class="timeline">{lines}</ol>')
    return "".join([*out, "</section>"])


def _bar(part: Part) -> str:
    """Where noticing and recovering lie in what the part took, in proportion."""
    if part.detect_ms is None or not part.duration_ms:
        return ""
    detect = min(100.0, 100 * part.detect_ms / part.duration_ms)
    recover = min(100.0 - detect, 100 * (part.recover_ms or 0) / part.duration_ms)
    words = f"noticed after {_ms(part.detect_ms)}"
    if part.recover_ms is not None:
        words += f", recovered after {_ms(part.recover_ms)}, of {_ms(part.duration_ms)}"
    return (
        f'<div class="span" role="img" aria-label="{escape(words)}"><i class="{_BAR["inject"]}" style="left:0;'
        f'width:{detect:.1f}%"></i><i class="{_BAR["recover"]}" style="left:{detect:.1f}%;width:{recover:.1f}%"></i>'
        '</div><p class="legend"><i class="k c4"></i>until it was noticed <i class="k c2"></i>until all was well again'
        f" <span>({escape(words)})</span></p>"
    )


def _ms(milliseconds: int) -> str:
    return f"{milliseconds:,} ms" if milliseconds < 10_000 else f"{milliseconds / 1000:.1f} s"
