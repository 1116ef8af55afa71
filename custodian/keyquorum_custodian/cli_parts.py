"""What the parts of the command have in common: options, errors, the passphrase."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from keyquorum_core.errors import KeyquorumError, Reason, RefusedError

__all__ = ["Directory", "Json", "PassphraseFile", "passphrase_from", "refusals", "refuse"]

Directory = Annotated[Path, typer.Option("--dir", help="The custodian's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(help="A file whose first line is the passphrase or PIN. Otherwise KEYQUORUM_PASSPHRASE, or a prompt."),
]


@contextlib.contextmanager
def refusals(as_json: bool = False) -> Iterator[None]:
    """Typed errors as text on standard error, or as JSON on standard output; exit status 1."""
    try:
        yield
    except KeyquorumError as error:
        refuse(error, as_json)


def refuse(error: KeyquorumError, as_json: bool) -> NoReturn:
    """Say what was refused, and end with status 1."""
    if as_json:
        typer.echo(json.dumps({"error": error.as_dict()}))
    else:
        typer.echo(error.for_people(), err=True)
    raise typer.Exit(1)


def passphrase_from(path: Path | None, *, confirm: bool = False) -> str:
    """The passphrase, or a token's PIN. Raises ``PASSPHRASE`` where none is given and nobody can be asked."""
    if path is not None:
        from keyquorum_protos.wire.files import read_bytes

        lines = read_bytes(path, "the passphrase file", 4096).decode("utf-8", "replace").splitlines()
        return lines[0] if lines else ""
    # Taken out of the environment, so that nothing this process starts inherits it.
    found = os.environ.pop("KEYQUORUM_PASSPHRASE", None)
    if found is not None:
        return found
    if sys.stdin.isatty():
        return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True))
    raise RefusedError(
        Reason.PASSPHRASE,
        "no passphrase was given",
        next_step="Set KEYQUORUM_PASSPHRASE, or use --passphrase-file, or run at a terminal.",
    )
