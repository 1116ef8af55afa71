"""What every command of ``keyquorum-coordinator`` shares: its options, and how a refusal is shown."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from keyquorum_core.errors import KeyquorumError

__all__ = ["Directory", "Json", "refusals", "refuse"]

Directory = Annotated[Path, typer.Option("--dir", help="The coordinator's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]


@contextlib.contextmanager
def refusals(as_json: bool = False) -> Iterator[None]:
    """Typed errors as text on standard error, or as JSON on standard output; exit status 1."""
    try:
        yield
    except KeyquorumError as error:
        refuse(error, as_json)


def refuse(error: KeyquorumError, as_json: bool) -> NoReturn:
    if as_json:
        typer.echo(json.dumps({"error": error.as_dict()}))
    else:
        typer.echo(error.for_people(), err=True)
    raise typer.Exit(1)
