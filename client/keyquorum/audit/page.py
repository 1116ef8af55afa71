"""The report as one HTML page that needs nothing else: no script, no font, no image, nothing fetched.

Light and dark by the reader's setting, printable, and readable by screen readers. All that the log says is text to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from keyquorum.audit import charts
from keyquorum.audit.facts import Row
from keyquorum.audit.summary import Summary
from keyquorum.moments import utc
from keyquorum_core.ledger.log_trust import QuorumCheckpoint
from keyquorum_core.roster import Roster

__all__ = ["STYLE", "Listing", "Proven", "Scope", "render", "table", "time_of"]

STYLE = Path(__file__).with_name("report.css")

Proven = Mapping[int, Sequence[str]]
"""By leaf index: the inclusion proof, base64 hashes, the leaf's sibling first."""


class Scope:
    """What the report is about, and how it was made. Times are unix seconds."""

    def __init__(
        self,
        roster: Roster,
        latest: QuorumCheckpoint,
        where: str,
        period: tuple[int, int],
        made: int,
        outside: tuple[int, int],
    ) -> None:
        self.roster, self.latest, self.where = roster, latest, where
        self.begin, self.end = period
        self.before, self.after = outside
        self.made = made


class Listing:
    """One table of leaves: the latest of ``total``."""

    def __init__(self, title: str, kind: str, rows: Sequence[Row], total: int) -> None:
        self.title, self.kind, self.rows, self.total = title, kind, rows, total


def time_of(seconds: int) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return f'<time datetime="{moment.isoformat()}">{moment.strftime("%Y-%m-%d %H:%M:%S")}</time>'


def _digest(value: str) -> str:
    return f'<code title="{escape(value)}">{escape(value[:12])}…</code>' if value else "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = (), caption: str = "") -> str:
    """Cells are HTML already. ``numbers`` are columns set right."""
    kinds = [' class="n"' if column in numbers else "" for column in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(title: str, chart: str, note: str = "", wide: bool = False) -> str:
    body = chart or '<p class="none">None in this period.</p>'
    extra = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="card{" wide" if wide else ""}"><figcaption>{escape(title)}</figcaption>{body}{extra}</figure>'
    )


def _tile(value: int, name: str, kind: str = "") -> str:
    return f'<div class="tile {kind}"><dt>{escape(name)}</dt><dd>{value:,}</dd></div>'


def _tiles(found: Summary) -> str:
    ceremonies = sum(int(row[1]) for row in found.ceremonies)
    failed = sum(int(row[2]) for row in found.drills)
    passed = sum(int(row[1]) for row in found.drills)
    refusals, alarms = sum(found.refusals.values()), sum(found.alarms.values())
    tiles = (
        _tile(found.to_workers, "releases to workers"),
        _tile(found.to_owners, "releases to owners"),
        _tile(found.totals.get("job.submitted", 0), "jobs submitted"),
        _tile(refusals, "refusals"),
        _tile(ceremonies, "ceremonies completed"),
        _tile(passed, f"drills passed, {failed:,} failed", "bad" if failed else ""),
        _tile(found.development, "on development hardware", "warn" if found.development else ""),
        _tile(alarms, "alarms", "bad" if alarms else ""),
    )
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _many(count: int, one: str, more: str = "") -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def _notices(found: Summary, scope: Scope) -> str:
    out = []
    if alarms := sum(found.alarms.values()):
        out.append(("bad", f"{_many(alarms, 'alarm')} in the log in this period: see “Alarms”."))
    if unread := found.totals.get("unreadable", 0):
        out.append(
            (
                "bad",
                f"{_many(unread, 'leaf', 'leaves')} of the log of no known form. No custodian releases on such a leaf.",
            )
        )
    if found.development:
        out.append((
            "warn",
            f"{_many(found.development, 'release')} to development hardware, whose evidence proves nothing: whoever "
            "ran it can have read the data.",
        ))  # fmt: skip
    if found.unlogged_jobs:
        out.append((
            "warn", f"{_many(found.unlogged_jobs, 'release')} of jobs whose submission the log does not show."
        ))  # fmt: skip
    if scope.after:
        out.append(
            ("warn", f"{_many(scope.after, 'leaf', 'leaves')} with a time after the end of the period: not counted.")
        )
    if not out:
        return '<p class="notice good">No alarm, no release on development hardware, no unreadable leaf.</p>'
    return "".join(f'<p class="notice {kind}">{escape(text)}</p>' for kind, text in out)


def _verified(scope: Scope) -> str:
    latest = scope.latest
    cosigned = ", ".join(f"{name} ({utc(when)})" for name, when in sorted(latest.times.items()))
    rows = (
        ("Log", f"<code>{escape(latest.checkpoint.origin)}</code>, read from <code>{escape(scope.where)}</code>"),
        ("Leaves", f"{latest.checkpoint.size:,}, all of them hashed again, all tiles compared"),
        ("Root", f"<code>{latest.checkpoint.root.hex()}</code>"),
        ("Signed by the log", f"{utc(latest.signed.signed_at)}, with Ed25519 and ML-DSA-44"),
        ("Cosigned by", f"{escape(cosigned)}: a quorum, with both keys of each"),
        (
            "Roster",
            f"{escape(scope.roster.cluster)}, version {scope.roster.version}, <code>{scope.roster.digest}</code>",
        ),
    )
    body = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows)
    return (
        f'<section id="verified"><h2>What was verified</h2><dl class="facts">{body}</dl>'
        f'<p class="note">{escape(_KNOWN)}</p></section>'
    )


_KNOWN = (
    "The log holds digests, numbers and fixed words. Classification and regions are those that the job's manifest "
    "names, as logged when the job was submitted: regions are where it was allowed to run, not where it ran. Of "
    "evidence, policies, certificates and drill reports the log holds digests: compare them with the documents. Times "
    "are those in the leaves; custodians release only on a leaf of about the present time. A release in the log was "
    "announced before it happened; a refusal with the same leaf hash says that a custodian did not take part."
)


def _charts(found: Summary) -> str:
    legend = '<p class="legend"><span class="k c1"></span>to workers <span class="k c2"></span>to owners</p>'
    timeline = charts.columns("Releases over time", found.labels, found.over_time) if found.labels else ""
    figures = (
        _figure("Releases over time", legend + timeline if timeline else "", wide=True),
        _figure("Releases per key", charts.bars("Releases per key", found.per_key)),
        _figure("Refusals by reason", charts.bars("Refusals by reason", found.refusals, "c4")),
        _figure(
            "Releases per classification", charts.bars("Releases per classification", found.per_classification, "c3")
        ),
        _figure("Releases per allowed region", charts.bars("Releases per allowed region", found.per_region, "c2")),
    )
    return f'<section id="overview"><h2>Overview</h2><div class="grid2">{"".join(figures)}</div></section>'


def _numbers(found: Summary) -> str:
    parts = []
    groups = [
        [
            f"<code>{escape(str(key))}</code>",
            escape(str(kind)),
            escape(str(regions)),
            f"{to_o:,}",
            f"{to_w:,}",
            f"{dev:,}",
        ]
        for key, kind, regions, to_o, to_w, dev in found.groups
    ]
    head = ("Key", "Classification", "Allowed regions", "To owners", "To workers", "Development")
    parts.append(_part("Releases per key, classification and region", table(head, groups, numbers=(3, 4, 5)), groups))
    seats = [[f"<code>{escape(str(a))}</code>", escape(str(b)), f"{c:,}"] for a, b, c in found.refusal_seats]
    parts.append(
        _part("Refusals by reason and seat", table(("Reason", "Seat", "Refusals"), seats, numbers=(2,)), seats)
    )
    evidence = [
        [_digest(str(d)), f"{n:,}", time_of(int(a)), time_of(int(b)), "development" if dev else "vendor's hardware"]
        for d, n, a, b, dev in found.evidence
    ]
    more = found.evidence_documents - len(evidence)
    listed = table(("Evidence (SHA-256)", "Releases", "First used", "Last used", "Hardware"), evidence, numbers=(1,))
    parts.append(
        _part(
            "Evidence in use", listed + (f'<p class="note">{more:,} more documents.</p>' if more > 0 else ""), evidence
        )
    )
    policies = [[str(v), _digest(str(d)), f"{s:,}", f"{r:,}"] for v, d, s, r in found.policies]
    columns = ("Policy version", "Digest", "Submissions", "Refusals")
    parts.append(_part("Policies in use", table(columns, policies, numbers=(0, 2, 3)), policies))
    ends = [[escape(name), f"{count:,}"] for name, count in found.outcomes.items()]
    parts.append(_part("How jobs ended", table(("Outcome", "Jobs"), ends, numbers=(1,)), ends))
    drills = [[escape(str(n)), f"{p:,}", f"{f:,}", f"{ms:,} ms"] for n, p, f, ms in found.drills]
    parts.append(_part("Drills", table(("Drill", "Passed", "Failed", "Slowest"), drills, numbers=(1, 2, 3)), drills))
    return f'<section id="numbers"><h2>Numbers</h2>{"".join(parts)}</section>'


def _part(title: str, table: str, rows: Sequence[object]) -> str:
    return f"<h3>{escape(title)}</h3>" + (table if rows else '<p class="none">None in this period.</p>')


def _what(row: Row) -> str:
    """The members that a leaf of this type turns on."""
    key = f"key <code>{escape(row.key_id)}</code> epoch {row.epoch}" if row.key_id else ""
    job = f"job <code>{escape(row.job_id)}</code>" if row.job_id else ""
    match row.type:
        case "release.intent":
            hardware = ' <strong class="flag">development</strong>' if row.development else ""
            evidence = f", evidence {_digest(row.digest)}" if row.word == "worker" else ""
            parts = [key, job, f"to its {escape(row.word)}{evidence}{hardware}"]
        case "job.denied":
            parts = [f"<code>{escape(row.word)}</code> by {escape(row.seat)}", job, key]
        case "ceremony":
            end = f"certificate {_digest(row.digest)}" if row.passed else f"given up: <code>{escape(row.seat)}</code>"
            parts = [f"{escape(row.word)} of {key}", end]
        case "drill":
            parts = [escape(row.word), "passed" if row.passed else '<strong class="flag">failed</strong>',
                     f"in {row.version:,} ms", f"report {_digest(row.digest)}"]  # fmt: skip
        case "alarm":
            parts = [
                f'<strong class="flag">{escape(row.word)}</strong> by {escape(row.seat)}',
                f"evidence {_digest(row.digest)}",
            ]
        case "roster":
            parts = [f"version {row.version}, {escape(row.word)}", _digest(row.digest)]
        case "revocation":
            parts = [f"{escape(row.word)} {_digest(row.digest)}", f"document version {row.version}"]
        case _:
            parts = [f"{len(row.data):,} bytes of no known form"]
    return ", ".join(part for part in parts if part)


def _proof(row: Row, proven: Proven) -> str:
    lines = "\n".join(("c2sp.org/tlog-proof@v1", f"index {row.index}", *proven[row.index]))
    leaf = escape(row.data.decode("utf-8", "replace"))
    return (
        f'<details><summary aria-label="Inclusion proof of leaf {row.index}">proof</summary>'
        f"<pre>{leaf}</pre><pre>{lines}</pre></details>"
    )


def _listing(listing: Listing, proven: Proven) -> str:
    rows = [
        [f"{row.index:,}", time_of(row.time) if row.time else "–", _what(row), _proof(row, proven)]
        for row in listing.rows
    ]
    left = listing.total - len(rows)
    note = (
        f'<p class="note">The latest {len(rows):,} of {listing.total:,}; all are in the JSON report.</p>'
        if left
        else ""
    )
    listed = table(("Leaf", "Time (UTC)", "What", "Inclusion"), rows, numbers=(0,))
    body = listed + note if rows else '<p class="none">None in this period.</p>'
    name = escape(listing.kind.replace(".", "-"))
    return f'<section id="{name}"><h2>{escape(listing.title)} <small>{listing.total:,}</small></h2>{body}</section>'


def render(scope: Scope, found: Summary, listings: Sequence[Listing], proven: Proven) -> str:
    """The whole page."""
    period = f"{utc(scope.begin)[:16] if scope.begin else 'the first leaf'} to {utc(scope.end)[:16]} UTC"
    title = f"Cluster {scope.roster.cluster}"
    jumps = [("overview", "Overview"), ("numbers", "Numbers")]
    jumps += [(each.kind.replace(".", "-"), each.title) for each in listings]
    links = "".join(
        f'<a href="#{escape(name)}">{escape(text)}</a>' for name, text in [*jumps, ("verified", "Verification")]
    )
    note = escape(scope.latest.signed.encode().decode())
    how = (
        "To check one leaf by itself: take the second box of its proof, add an empty line and this checkpoint, and "
        "save it as a .tlog-proof file (C2SP tlog-proof). Its first box is the leaf, byte for byte."
    )
    return "".join((
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f'<meta name="referrer" content="no-referrer"><title>{escape(title)}: {escape(period)}</title>',
        f"<style>{STYLE.read_text('utf-8')}</style></head><body>",
        '<a class="skip" href="#overview">Skip to the overview</a>',
        f'<header><p class="brand">keyquorum audit report</p><h1>{escape(title)}</h1>',
        f'<p class="period">{escape(period)}</p>',
        f'<p class="seal"><span aria-hidden="true">✓</span> Log verified from its first leaf: '
        f"{scope.latest.checkpoint.size:,} leaves, cosigned by {len(scope.latest.times)} custodians at "
        f"{utc(scope.latest.quorum_time)} UTC</p></header>",
        f'<nav aria-label="Sections">{links}</nav><main>',
        _notices(found, scope),
        _tiles(found),
        _charts(found),
        _numbers(found),
        *(_listing(each, proven) for each in listings),
        _verified(scope),
        f'<section id="checkpoint"><h2>Checkpoint</h2><p class="note">{escape(how)}</p><pre>{note}</pre></section>',
        f"</main><footer>Made {utc(scope.made)} UTC by keyquorum audit report. Times are UTC.</footer>",
        "</body></html>\n",
    ))  # fmt: skip
