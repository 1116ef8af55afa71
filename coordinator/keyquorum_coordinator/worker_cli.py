"""``keyquorum-coordinator worker``: which workers get no jobs, and the operator's word about them; also while it
serves: what stands in the database counts at the next claim and report."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from sqlalchemy.orm import Session

from keyquorum_coordinator.command import Directory, Json
from keyquorum_core.errors import Reason, StateError, printable
from keyquorum_protos.wire.refusals import refusals

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Workers in quarantine: they get no jobs.")
T = TypeVar("T")


@app.command("list")
def show(directory: Directory, as_json: Json = False) -> None:
    """Who is and was in quarantine, why, and by whose word. Exit status 1 while an entry is in force."""
    from keyquorum_coordinator.quarantine import entries

    with refusals(as_json):
        found = _in_database(directory, entries, write=False)
        if as_json:
            typer.echo(json.dumps({"entries": [_as_dict(each) for each in found]}))
        elif not found:
            typer.echo("no worker is or was in quarantine")
        for each in () if as_json else found:
            state = f"lifted {_when(each.lifted_at)}: {each.why}" if each.lifted_at else "IN FORCE"
            typer.echo(printable(f"entry {each.number}: worker {each.worker}, since {_when(each.raised_at)}, {state}"))
            said = f"by {', '.join(each.custodians)}" if each.custodians else "by hand"
            said = f"follows from the revocation of {each.revoked}" if each.revoked else said
            typer.echo(printable(f"  {each.reason}: {each.message} ({said})"))
    if any(not each.lifted_at for each in found):
        raise typer.Exit(1)


@app.command()
def quarantine(
    worker: Annotated[str, typer.Argument(help="The name in the worker's certificate.")],
    why: Annotated[str, typer.Option(help="Kept with the entry, and told to the owners of its jobs.")],
    directory: Directory,
    as_json: Json = False,
) -> None:
    """Give a worker no more jobs, and those it holds to others; the ledger gets an alarm. Custodians are not told."""
    from keyquorum_coordinator.quarantine import put_by_hand

    with refusals(as_json):
        _in_database(directory, lambda session: put_by_hand(session, worker, why, int(time.time())), write=True)
        typer.echo(json.dumps({"worker": worker}) if as_json else f"Worker {printable(worker)} gets no more jobs")


@app.command()
def lift(
    number: Annotated[int, typer.Argument(help="The entry's number.")],
    why: Annotated[str, typer.Option(help="What you found out; it is kept with the entry.")],
    directory: Directory,
    as_json: Json = False,
) -> None:
    """Let a worker claim jobs again. Custodians that quarantined it keep to that until their operators lift it too."""
    from keyquorum_coordinator.quarantine import lift as lift_entry

    with refusals(as_json):
        _in_database(directory, lambda session: lift_entry(session, number, why, int(time.time())), write=True)
        typer.echo(json.dumps({"lifted": number}) if as_json else f"Entry {number} is lifted")


def _in_database(directory: Path, work: Callable[[Session], T], *, write: bool) -> T:
    from keyquorum_coordinator import migrations
    from keyquorum_coordinator.config import load_config
    from keyquorum_coordinator.database import Database, database_file, make_engine

    engine = make_engine(load_config(directory).database_url)
    file = database_file(engine)
    if (file is not None and not file.is_file()) or migrations.current_revision(engine) != migrations.HEAD:
        raise StateError(
            Reason.STATE,
            "the coordinator's database is not there, or of another version",
            expected=f"revision {migrations.HEAD}",
            next_step="Start the coordinator once: it brings its database up to date.",
        )
    database = Database(engine)
    try:
        return database.run_write(work) if write else database.run_read(work)
    finally:
        database.close()


def _as_dict(each: object) -> dict[str, object]:
    return {name: getattr(each, name) for name in each.__slots__}  # type: ignore[attr-defined]


def _when(unix: int) -> str:
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).isoformat()
