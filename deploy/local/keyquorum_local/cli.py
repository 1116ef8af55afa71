"""``keyquorum demo`` and ``keyquorum up``: the local cluster's part of the ``keyquorum`` command."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keyquorum_core.errors import Reason, UnavailableError, printable

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands; called through the entry point group ``keyquorum.commands``."""
    app.command("demo")(demo)
    app.command("up")(up)


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
    job: Annotated[Path | None, typer.Option(help="Folder of the job to run instead of the hydrogen molecule.")] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Keep the cluster's files here instead of a temporary folder.")
    ] = None,
) -> None:
    """Run a whole cluster on this machine: five custodians, one key, one real encrypted job; then stop."""
    from keyquorum_local.demo import run

    console = Console(stderr=True, highlight=False)
    began = time.monotonic()

    def step(text: str) -> None:
        if not as_json:
            console.print(f"[dim]{time.monotonic() - began:5.1f} s[/]  {_plain(text)}")

    if not as_json:
        console.print(
            "[bold]keyquorum demo[/]: development hardware vouches for the worker here, and proves nothing.\n"
        )
    found = run(job, step=step, root=directory)
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("job", found.job_id)
    table.add_row("custodians that released its key", ", ".join(found.custodians_answered))
    table.add_row("quorum rule", json.dumps(found.quorum))
    table.add_row("worker's evidence", ", ".join(found.worker_evidence) + " (development)")
    for name, value in found.result.items():
        if isinstance(value, int | float | str | bool):
            shown = f"{value:.10g}" if isinstance(value, float) else str(value)
            table.add_row(_plain(name.replace("_", " ")), _plain(shown))
    table.add_row("took", f"{found.timings_ms['total'] / 1000:.1f} s")
    out = Console(highlight=False)
    out.print()
    out.print(table)


def _plain(text: str) -> str:
    """Text from elsewhere, without terminal escapes and without what rich would read as markup."""
    return escape(printable(text))


def up(
    directory: Annotated[Path, typer.Option("--dir", help="Where the cluster lives; made when missing.")] = Path(
        "keyquorum-cluster"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object once the cluster serves.")] = False,
) -> None:
    """The same cluster, kept running until Ctrl-C. Prints the client profile. Run again, it goes on where it was."""
    from keyquorum_local.cluster import Cluster
    from keyquorum_local.layout import create, open_layout

    console = Console(stderr=True, highlight=False)

    def step(text: str) -> None:
        if not as_json:
            console.print(_plain(text))

    known = (directory / "cluster.json").is_file()
    layout = open_layout(directory) if known else create(directory, step=step)
    stop = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, end)
    with Cluster(layout, step=step) as cluster:
        facts = {
            "profile": str(layout.profile),
            "passphrase_file": str(layout.owner_passphrase),
            "logs": str(layout.logs),
            "processes": {process.name: process.pid for process in cluster.processes},
        }
        if as_json:
            typer.echo(json.dumps({"ready": True, **facts}))
        else:
            console.print("\n[bold]The cluster serves.[/] In another terminal:\n")
            typer.echo(f"export KEYQUORUM_PROFILE={layout.profile}")
            typer.echo(f'export KEYQUORUM_PASSPHRASE="$(cat {layout.owner_passphrase})"')
            console.print("\nkeyquorum key create demo\nkeyquorum job submit DIR --key demo --region eu --wait")
            console.print("keyquorum key create canary --canary --retain 0s\nkeyquorum drill run full\n")
            console.print("Ctrl-C stops it; its files stay.")
        while not stop.wait(1.0):
            dead = [process for process in cluster.processes if not process.alive]
            if dead:
                raise UnavailableError(
                    Reason.UNAVAILABLE,
                    f"{', '.join(process.name for process in dead)} stopped by itself",
                    next_step=f"See {layout.logs}; then run this again",
                )
