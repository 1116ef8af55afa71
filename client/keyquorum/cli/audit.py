"""``keyquorum audit``: follow the ledger, and sum it up."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keyquorum.cli import auditor, output
from keyquorum.cli.bars import bars
from keyquorum_core.errors import KeyquorumError

if TYPE_CHECKING:
    from keyquorum.audit.events import Event
    from keyquorum.audit.watch import Monitor
    from keyquorum.ledger.source import LogSource
    from keyquorum_core.ledger.log_trust import LogTrust

__all__ = ["app"]

app = typer.Typer(name="audit", help="Audits of the ledger, verified from scratch.", no_args_is_help=True)

_ALARM, _UNCHECKED = 1, 3


@app.callback()
def group() -> None:
    """Audits of the ledger, verified from scratch."""


@app.command()
def report(
    begin: Annotated[
        str, typer.Option("--from", metavar="TIME", help="First moment: ISO 8601, unix seconds, or 30d, 12h ago.")
    ] = "0",
    end: Annotated[
        str | None, typer.Option("--to", metavar="TIME", help="First moment after the period. Default: now.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json, made if missing.")] = Path(
        "audit-report"
    ),
    log: auditor.LogOption = None,
    roster: auditor.RosterOption = None,
    operators: auditor.OperatorsOption = None,
    roster_sha256: auditor.RosterPinOption = None,
    ca: auditor.CaOption = None,
    wait: auditor.WaitOption = auditor.WAIT,
    profile: output.ProfileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Verify the whole log and sum up a period: releases, refusals, evidence, ceremonies, drills and alarms.

    Writes one HTML page that needs nothing else and one JSON file, with the inclusion proof of each leaf in them.
    """
    from keyquorum.audit.report import make_report

    now = int(time.time())
    first, last = auditor.moment(begin, now, "--from"), now + 1 if end is None else auditor.moment(end, now, "--to")
    if first >= last:
        raise typer.BadParameter("--from is not before --to")
    who = auditor.auditor_of(profile, roster, operators, roster_sha256)
    with bars() as show:
        made = auditor.read_log(
            who, log, ca, lambda source: make_report(source, who, out, first, last, progress=show, patience=wait)
        )
    found = made.summary
    if as_json:
        files = {"html": str(made.html), "json": str(made.json), "rows": made.rows}
        facts = auditor.checkpoint_facts(made.verified.latest)
        output.emit({**facts, "from": first, "to": last, "summary": found.as_dict(), **files})
        return
    output.table(
        "",
        ("", ""),
        [
            *auditor.checkpoint_rows(made.verified.latest),
            ("releases", f"{found.to_workers} to workers, {found.to_owners} to owners"),
            ("on development hardware", found.development),
            ("refusals", sum(found.refusals.values())),
            ("alarms", sum(found.alarms.values())),
            ("written", f"{made.html}, {made.json}"),
        ],
    )


@app.command()
def watch(
    state: Annotated[Path, typer.Option(help="Where the last verified checkpoint is kept; made in the first round.")],
    key: Annotated[
        list[str] | None, typer.Option("--key", metavar="KEY", help="Alarm on releases of this key; repeat for more.")
    ] = None,
    max_age: Annotated[
        int,
        typer.Option(
            "--max-age", metavar="SECONDS", min=0, help="Alarm when no quorum cosigned for so long; 0: never."
        ),
    ] = 3600,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.1, help="Time between two looks at the log.")
    ] = 30.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and stop, for cron.")] = False,
    evidence: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints that contradict each other. Default: STATE.evidence.", show_default=False
        ),
    ] = None,
    log: auditor.LogOption = None,
    roster: auditor.RosterOption = None,
    operators: auditor.OperatorsOption = None,
    roster_sha256: auditor.RosterPinOption = None,
    ca: auditor.CaOption = None,
    wait: auditor.WaitOption = auditor.WAIT,
    profile: output.ProfileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each event.")] = False,
) -> None:
    """Follow the log; alarm on forks, rollbacks, releases of given keys, missing quorums, and a log that stands still.

    Exit status: 0 no alarm, 1 an alarm, 2 wrong usage, 3 no alarm but the log could not be checked.
    """
    from keyquorum.audit.watch import Monitor, Watching
    from keyquorum.audit.watch_state import WatchState
    from keyquorum_core.names import KEY_ID, check

    def trusted() -> LogTrust:
        return auditor.auditor_of(profile, roster, operators, roster_sha256).trust

    kept = WatchState(state, evidence or state.with_name(state.name + ".evidence"))
    voice = _Voice(as_json, filtered=not once)
    watching = Watching(frozenset(key or ()), max_age, wait)

    async def follow(source: LogSource) -> None:
        await _follow(Monitor(source, trusted, kept, watching), voice, None if once else interval)

    try:
        for name in key or ():
            check(KEY_ID, name, "key id")
        who = auditor.auditor_of(profile, roster, operators, roster_sha256)
        with kept.held():
            auditor.read_log(who, log, ca, follow)
    except KeyquorumError as error:
        if not as_json:
            raise
        _write({"error": error.as_dict()})
        raise typer.Exit(_ALARM) from None
    raise typer.Exit(voice.status)


def _write(value: object) -> None:
    """One JSON value on one line, at once."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


class _Voice:
    """Says events on standard output; what stands still, and was said in the last round, only once if ``filtered``."""

    def __init__(self, as_json: bool, *, filtered: bool) -> None:
        self._as_json, self._filtered = as_json, filtered
        self._before: set[tuple[str, str]] = set()
        self._now: set[tuple[str, str]] = set()
        self._alarm = self._unchecked = False

    @property
    def status(self) -> int:
        return _ALARM if self._alarm else _UNCHECKED if self._unchecked else 0

    def begin_round(self) -> None:
        self._before, self._now = self._now, set()
        self._unchecked = False

    def say(self, event: Event) -> None:
        self._alarm |= event.alarm
        self._unchecked |= event.kind == "unreachable"
        name = (str(event.kind), event.message)
        if event.standing or event.kind == "verified":
            self._now.add(name)
            if self._filtered and name in self._before:
                return
        if self._as_json:
            _write(event.as_dict())
            return
        mark = f"ALARM {event.kind}: " if event.alarm else f"{event.kind}: " if event.kind != "verified" else ""
        output.line(f"{output.when(event.time)}  {mark}{event.message}")
        if "evidence" in event.details:
            output.line(f"    both checkpoints are kept in {event.details['evidence']}")


async def _follow(monitor: Monitor, voice: _Voice, interval: float | None) -> None:
    """Rounds until a signal to stop comes, or one where there is no interval."""
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    first = True
    while not stop.is_set():
        voice.begin_round()
        looking = asyncio.create_task(_look(monitor, voice, first))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((looking, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not looking.done():
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            return
        stopping.cancel()
        looking.result()
        if interval is None:
            return
        first = False
        try:
            await asyncio.wait_for(stop.wait(), interval)
        except TimeoutError:
            continue


async def _look(monitor: Monitor, voice: _Voice, first: bool) -> None:
    from keyquorum.audit.events import Event, Kind

    try:
        if not first:
            await monitor.round(voice.say)
            return
        with bars() as report:  # all of the log may have to be read; later only what was added
            await monitor.round(voice.say, report)
    except KeyquorumError as error:
        if first:  # a monitor that can't start says so by not starting
            raise
        message = f"{error.reason}: {error.message}"
        voice.say(Event(Kind.REFUSED, int(time.time()), message, {"error": error.as_dict()}, standing=True))
