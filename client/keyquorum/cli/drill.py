"""``keyquorum drill``: rehearse a failure on a canary key, watch it live, and keep the signed report."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keyquorum.cli import output
from keyquorum.cli.bars import bars
from keyquorum.cli.durations import in_words
from keyquorum_core.errors import printable

if TYPE_CHECKING:
    from keyquorum.drills import DrillState, Finished
    from keyquorum_core.drill_report import DrillReport, Moment, Part

__all__ = ["app"]

app = typer.Typer(name="drill", help="Rehearsed failures on a canary key, measured and signed.", no_args_is_help=True)

_Key = Annotated[str, typer.Option(help="The canary key.")]
_OutFolder = Annotated[
    Path | None,
    typer.Option(help="Folder for the signed report (report.json) and its page (report.html).", show_default=False),
]
_Prove = Annotated[bool, typer.Option("--prove", help="Verify the ledger, and that it has this report's leaf.")]


@app.command("list")
def list_drills(
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """The kinds of drill, when each passed last, what is scheduled, and the latest runs."""
    with output.client_of(profile, passphrase_file) as client:
        state = client.drills()
    if as_json:
        output.emit(state.as_dict())
    else:
        _show_state(state, int(time.time()))


@app.command()
def run(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="As `keyquorum drill list` says; full for all, in order.")
    ],
    key: _Key = "canary",
    operator_key: Annotated[
        list[Path] | None,
        typer.Option(
            help="Key file of a further operator who signs, where a drill of revocation takes several.",
            show_default=False,
        ),
    ] = None,
    out: _OutFolder = None,
    prove: _Prove = False,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Run a drill, show what happens as it does, and end with its verified report. Exit status 1 if it failed.

    It goes on when this is interrupted: `keyquorum drill cancel` stops it. Only canary keys can be drilled
    (`keyquorum key create NAME --canary`); nothing else is touched.
    """
    with output.client_of(profile, passphrase_file) as client, _timeline(quiet=as_json) as moment:
        finished = client.drill_run(kind, key, operator_keys=operator_key or (), moment=moment)
    _finish(finished, out, prove, profile, as_json)


@app.command()
def show(
    drill: Annotated[str, typer.Argument(metavar="DRILL", help="The drill's id.")],
    timeline: Annotated[bool, typer.Option("--timeline", help="Everything that happened, too.")] = False,
    out: _OutFolder = None,
    prove: _Prove = False,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Show a drill's signed report: what was measured, what was expected and what came. Exit status 1 if it failed."""
    with output.client_of(profile, passphrase_file) as client:
        finished = client.drill_report(drill)
    if timeline and not as_json:
        for each in finished.report.timeline:
            output.line(printable(_said(each)))
    _finish(finished, out, prove, profile, as_json)


@app.command()
def cancel(
    drill: Annotated[str, typer.Argument(metavar="DRILL", help="The drill's id.")],
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Stop a drill that runs. What it injected is undone; its report says that it was interrupted."""
    with output.client_of(profile, passphrase_file) as client:
        running = client.drill_cancel(drill)
    if as_json:
        output.emit({"drill_id": drill, "running": running})
    else:
        output.line("It ends, and undoes what it injected." if running else "It does not run.")


def _finish(finished: Finished, out: Path | None, prove: bool, profile: Path | None, as_json: bool) -> None:
    report = finished.report
    written = _write(finished, out) if out is not None else []
    index = _prove(report, profile) if prove else None
    if as_json:
        found = {"report": report.as_json(), "report_sha256": report.digest, "written": [str(each) for each in written]}
        output.emit(found if index is None else {**found, "leaf_index": index})
    else:
        _show_report(report)
        if index is not None:
            output.line(f"leaf {index} of the ledger names this report")
        for each in written:
            output.line(f"written: {each}")
    if not report.passed:
        raise typer.Exit(1)


def _prove(report: DrillReport, profile: Path | None) -> int:
    from keyquorum.drills import find_in_ledger
    from keyquorum.ledger.trust import of_profile, open_source

    auditor = of_profile(output.needs_profile(profile))

    async def find(progress: Callable[..., None]) -> int:
        source = open_source(auditor, None)
        try:
            return await find_in_ledger(source, auditor.trust, report, progress=progress)
        finally:
            await source.close()

    with bars() as progress:
        return asyncio.run(find(progress))


def _write(finished: Finished, out: Path) -> list[Path]:
    from keyquorum.atomic import replace_file
    from keyquorum.drill_page import render

    out.mkdir(parents=True, exist_ok=True)
    signed, page = out / "report.json", out / "report.html"
    replace_file(signed, finished.envelope)
    replace_file(page, render(finished.report).encode())
    return [signed, page]


@contextmanager
def _timeline(*, quiet: bool) -> Iterator[Callable[[Moment], None]]:
    """Each moment as a line on standard error, as it comes; on a terminal with what is going on below it."""
    if quiet:
        yield lambda moment: None
        return
    if not sys.stderr.isatty():
        yield lambda moment: output.note(printable(_said(moment)))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    styles = {"inject": "red", "detect": "yellow", "recover": "green", "check": "dim", "start": "bold", "done": "bold"}
    with console.status("the drill begins") as status:

        def moment(each: Moment) -> None:
            console.print(Text(printable(_said(each)), style=styles.get(each.step, "")))
            status.update(Text(printable(f"{each.kind}: {each.step}")))

        yield moment


def _said(each: Moment) -> str:
    at = f"{each.at_ms / 1000:8.2f} s"
    return f"{at}  {each.kind:<16} {each.step:<8} {each.custodian + '  ' if each.custodian else ''}{each.text}"


def _show_state(state: DrillState, now: int) -> None:
    def age(moment: int) -> str:
        return f"{in_words(max(0, now - moment))} ago" if moment else "never"

    rows = [
        (each.kind, age(each.last_passed), in_words(each.every_seconds) if each.every_seconds else "-", each.about)
        for each in state.kinds
    ]
    output.table("Drills", ("kind", "passed last", "every", "what it rehearses"), rows)
    if state.running:
        output.line(f"running: {state.running}")
    if state.runs:
        output.table(
            "Latest runs",
            ("drill", "kind", "key", "began", "took", "outcome"),
            [
                (each.drill_id, each.kind, each.key_id, output.when(each.started_at), _ms(each.duration_ms), each.state)
                for each in state.runs[:20]
            ],
        )


def _show_report(report: DrillReport) -> None:
    output.table(
        "",
        ("", ""),
        [
            ("drill", f"{report.drill_id}, {report.kind}"),
            ("outcome", str(report.outcome).upper()),
            ("key", report.key_id),
            ("began", output.when(report.started_at)),
            ("took", _ms(report.duration_ms)),
            ("report", f"sha256:{report.digest}"),
        ],
    )
    output.table(
        "Parts",
        ("kind", "outcome", "at whom", "noticed after", "recovered after", "checks", "why"),
        [_part(each) for each in report.parts],
    )
    for part in report.parts:
        for check in part.checks:
            if not check.passed:
                output.line(
                    printable(f"FAILED {part.kind}: {check.what}: expected {check.expected}, got {check.actual}")
                )


def _part(part: Part) -> tuple[str, ...]:
    good = sum(check.passed for check in part.checks)
    return (
        part.kind,
        str(part.outcome),
        ", ".join(part.custodians) or "-",
        "-" if part.detect_ms is None else _ms(part.detect_ms),
        "-" if part.recover_ms is None else _ms(part.recover_ms),
        f"{good} of {len(part.checks)}",
        " ".join(filter(None, (part.reason, part.cause))) or "-",
    )


def _ms(milliseconds: int) -> str:
    return f"{milliseconds} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"
