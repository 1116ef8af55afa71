"""A cluster's status for people, at 80 columns and wider."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from keyquorum.cluster import ClusterStatus
from keyquorum.health import CustodianHealth, KeyHealth
from keyquorum.moments import utc
from keyquorum_core.errors import KeyquorumError, printable

__all__ = ["away", "view"]

_WORD = (
    "Committees, rules and losses: from certificates verified here. Who serves, states, ceremonies, drills: the"
    " coordinator's word."
)


def view(status: ClusterStatus) -> RenderableType:
    """The whole of it."""
    return Group(*_parts(status))


def away(status: ClusterStatus, error: KeyquorumError, since: int) -> RenderableType:
    """What was seen last, under the news that nothing newer can be."""
    news = Text(f"since {utc(since)} UTC nothing can be seen: {printable(error.message)}", style="bold red")
    return Group(news, Text("trying again; what follows is what was seen last", style="red"), *_parts(status))


def _parts(status: ClusterStatus) -> Iterator[RenderableType]:
    state = Text("every key has a quorum", style="green") if status.healthy else Text("NO QUORUM", style="bold red")
    yield Text.assemble(f"{utc(status.now)} UTC · ", state, f" · coordinator {printable(status.version)}")
    roster, ledger = status.roster, status.ledger
    vouched = f"cosigned {_span(status.now - ledger.witnessed_at)} ago" if ledger.witnessed_at else "not cosigned"
    yield Text(
        f"roster {roster.version}, expires in {_span(roster.expires_at - status.now)} · ledger {ledger.size} leaves,"
        f" {vouched}",
        style="dim",
    )
    yield _table(
        ("jurisdiction", "serving", "if it is lost"), [_jurisdiction(status, name) for name in status.jurisdictions]
    )
    yield _table(("custodian", "", "state", "circuit", "p95", "skew", "epochs"), map(_custodian, status.custodians))
    yield _table(
        ("key", "epoch", "state", "age", "rotates", "serving", "losses it survives"),
        [_key(key, status.now) for key in status.keys],
    )
    if status.ceremonies:
        rows = [
            (
                Text(f"{each.kind} {printable(each.key_id)} epoch {each.epoch}"),
                Text(printable(each.step)),
                Text(_span(status.now - each.created_at)),
                Text(printable(", ".join(each.waiting)) or "-"),
            )
            for each in status.ceremonies
        ]
        yield _table(("ceremony under way", "step", "age", "waits for the operators of"), rows)
    if status.drills:
        passed = [f"{printable(each.kind)} {_ago(status.now, each.last_passed)}" for each in status.drills]
        yield Text.assemble(("drills passed last: ", "bold"), ", ".join(passed))
    for finding in status.findings:
        mark = Text("! ", style="bold red") if finding.critical else Text("· ", style="yellow")
        yield Text.assemble(mark, (printable(finding.about), "bold"), f": {printable(finding.text)}")
    yield Text(_WORD, style="dim")


def _table(
    columns: Sequence[str], rows: Iterator[Sequence[Text]] | Sequence[Sequence[Text]] | map[Sequence[Text]]
) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in columns:
        out.add_column(name, overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out


def _jurisdiction(status: ClusterStatus, name: str) -> Sequence[Text]:
    members = status.jurisdictions[name]
    serving = sum(each.serving for each in members)
    needing = [
        f"{key.key_id} epoch {key.epoch}"
        for key in status.keys
        if key.survival is not None and name in key.survival.indispensable_jurisdictions
    ]
    without = [key for key in status.keys if key.survival is None or not key.survival.quorum]
    lost = f"no quorum left for {', '.join(needing)}" if needing else "every key goes on"
    if without and not needing:
        lost = "every other key goes on"
    return (
        Text(name),
        Text(f"{serving} of {len(members)}", style="" if serving == len(members) else "yellow"),
        Text(printable(lost), style="yellow" if needing else ""),
    )


def _custodian(each: CustodianHealth) -> Sequence[Text]:
    return (
        Text(each.custodian),
        Text(each.jurisdiction),
        Text(printable(each.why) or "serving", style="green" if each.serving else "red"),
        Text(printable(each.circuit), style="" if each.circuit == "closed" else "yellow"),
        Text(f"{each.latency_p95_ms:.0f} ms" if each.latency_p95_ms else "-"),
        Text(f"{each.clock_skew_ms / 1000:+.1f} s" if each.described_at else "-"),
        Text(str(len(each.holds)) if each.described_at else "-"),
    )


def _key(key: KeyHealth, now: int) -> Sequence[Text]:
    survival, record = key.survival, key.record
    if survival is None or record is None:
        return (
            Text(printable(key.key_id)),
            Text(str(key.epoch)),
            Text(printable(key.state)),
            Text("its certificate does not verify", style="bold red"),
        )
    if not survival.quorum:
        losses = Text("NO QUORUM", style="bold red")
    else:
        style = "green" if survival.losses and survival.jurisdiction_losses else "yellow"
        losses = Text(f"{_any(survival.losses)}; {_any(survival.jurisdiction_losses)} jurisdiction", style=style)
        if survival.jurisdiction_losses != 1:
            losses.append("s")
    serving = f"{len(survival.serving)} of {len(record.quorum.ids)}"
    canary = " (canary)" if key.canary else ""
    return (
        Text(printable(key.key_id) + canary),
        Text(str(key.epoch)),
        Text(printable(key.state)),
        Text(_span(now - key.created_at)),
        Text(f"in {_span(key.rotates_at - now)}" if key.rotates_at > now else "due" if key.rotates_at else "-"),
        Text(serving, style="" if len(survival.serving) == len(record.quorum.ids) else "yellow"),
        losses,
    )


def _any(count: int) -> str:
    return f"any {count}" if count else "none"


def _ago(now: int, then: int) -> str:
    return f"{_span(now - then)} ago" if then else "never"


def _span(seconds: int) -> str:
    """``3 d``, ``5 h``, ``12 min``, ``40 s``."""
    seconds = max(0, seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
