"""``keyquorum cluster status``: who serves, how much more each key survives, what somebody should look at."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from keyquorum.cli import output
from keyquorum_core.errors import KeyquorumError, UnavailableError

if TYPE_CHECKING:
    from keyquorum.cluster import ClusterStatus
    from keyquorum.sync import Client

__all__ = ["Look", "app"]

app = typer.Typer(name="cluster", help="The cluster as a whole.", no_args_is_help=True)


@app.callback()
def cluster() -> None:
    """The cluster as a whole."""


@app.command()
def status(
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on showing it until Ctrl-C; with --json, one line each time.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.5, max=3600, help="Seconds between two looks of --watch.")] = 2.0,
    max_skew: Annotated[float, typer.Option(min=1, max=3600, help="Warn of clocks that are more seconds off.")] = 5.0,
    profile: output.ProfileOption = None,
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Show each jurisdiction's and custodian's health, and how many more losses each key survives.

    Committees and quorum rules come from certificates that are verified here. Who can be reached, what custodians said
    of themselves, and what is under way is the coordinator's word. Exit status 1 when a key that jobs begin on has no
    quorum.
    """
    if watch and not as_json and not sys.stdout.isatty():
        raise typer.BadParameter("--watch draws on a terminal: use --watch --json elsewhere")
    with output.client_of(profile, passphrase_file) as client:
        found = client.status(max_skew=max_skew)
        try:
            if watch:
                look = Look(client, found, max_skew)
                (_lines if as_json else _draw)(look, every)
                found = look.found
        except KeyboardInterrupt:
            found = look.found
    if as_json and not watch:
        output.emit(found.as_dict())
    elif not as_json:
        _print(found)
    if not found.healthy:
        raise typer.Exit(1)


class Look:
    """What was seen last, and since when nothing more could be."""

    def __init__(self, client: Client, found: ClusterStatus, max_skew: float) -> None:
        self._client = client
        self._max_skew = max_skew
        self.found = found
        self.error: KeyquorumError | None = None
        self.since = 0.0

    def again(self) -> None:
        try:
            self.found = self._client.status(max_skew=self._max_skew, patient=False)
            self.error = None
        except UnavailableError as error:
            if self.error is None:
                self.since = time.time()
            self.error = error


def _lines(look: Look, every: float) -> None:
    while True:
        error = look.error
        value: object = look.found.as_dict() if error is None else {"error": error.as_dict()}
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()
        time.sleep(every)
        look.again()


def _draw(look: Look, every: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from keyquorum.cli.cluster_view import away, view

    console = Console()
    # The alternate screen is redrawn in place: nothing flickers, nothing scrolls, and what was on the terminal is there
    # again afterwards.
    with Live(view(look.found), console=console, screen=True, auto_refresh=False) as live:
        live.refresh()
        while True:
            time.sleep(every)
            look.again()
            shown = view(look.found) if look.error is None else away(look.found, look.error, int(look.since))
            live.update(shown, refresh=True)


def _print(found: ClusterStatus) -> None:
    from rich.console import Console

    from keyquorum.cli.cluster_view import view

    Console(width=None if sys.stdout.isatty() else 140).print(view(found))
