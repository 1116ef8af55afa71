"""What every command shares: the profile, passphrases, JSON for scripts, tables for people, errors for both."""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keyquorum.moments import utc
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, printable

if TYPE_CHECKING:
    from keyquorum.keyfiles import PassphraseSource
    from keyquorum.sync import Client

__all__ = [
    "Command",
    "JsonOption",
    "PassphraseFileOption",
    "ProfileOption",
    "client_of",
    "emit",
    "line",
    "needs_profile",
    "new_passphrase",
    "note",
    "passphrase_source",
    "show_error",
    "table",
    "take_process",
    "when",
]

Command = Callable[..., None]
PASSPHRASE = "KEYQUORUM_PASSPHRASE"  # noqa: S105 - the name of a variable

ProfileOption = Annotated[
    Path | None,
    typer.Option("--profile", envvar="KEYQUORUM_PROFILE", help="The client profile (TOML).", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
PassphraseFileOption = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file", help=f"A file whose first line is the passphrase, instead of {PASSPHRASE} or a prompt."
    ),
]


def emit(value: object) -> None:
    """One JSON value on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def line(text: str) -> None:
    """A line on standard output."""
    typer.echo(printable(text))


def note(text: str) -> None:
    """A line for people, on standard error."""
    typer.echo(printable(text), err=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for name in columns:
        out.add_column(name, overflow="fold")
    for row in rows:
        out.add_row(*(Text(printable(str(cell))) for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(out)


def when(seconds: int) -> str:
    """Unix seconds as UTC."""
    return f"{utc(seconds)} UTC" if seconds else "-"


def show_error(error: KeyquorumError, *, as_json: bool) -> None:
    """The error: one JSON object on standard output, or its parts on standard error."""
    if as_json:
        emit({"error": error.as_dict()})
        return
    typer.echo(error.for_people(), err=True)


_own_process = False


def take_process() -> None:
    """This process is the command's own, not that of a program that runs command lines in itself."""
    global _own_process
    _own_process = True


def _harden() -> None:
    """Before a passphrase is read or a private key unlocked: no core dump, no reading of this process's memory.

    On Linux only: the owner's machine is the owner's own, and other systems close processes to each other themselves.
    """
    if _own_process and sys.platform == "linux":
        from keyquorum_protos.wire.process import harden

        harden()


def passphrase_source(file: Path | None) -> PassphraseSource:
    """Where passphrases come from: the file if given, else the environment, else a prompt on a terminal."""
    _harden()

    def ask(key_file: Path) -> str:
        return _given_passphrase(file) or _prompt(f"Passphrase for {key_file.name}: ")

    return ask


def new_passphrase(file: Path | None, what: str) -> str:
    """A passphrase to wrap new keys with; typed twice when it is typed."""
    _harden()
    given = _given_passphrase(file)
    if given:
        return given
    first = _prompt(f"New passphrase for {what}: ")
    if _prompt("Once more: ") != first:
        raise RefusedError(Reason.PASSPHRASE, "the two passphrases differ", next_step="Try again")
    return first


def _given_passphrase(file: Path | None) -> str:
    if file is not None:
        from keyquorum_protos.wire.files import read_bytes

        lines = read_bytes(file, "passphrase file", max_bytes=4096).decode("utf-8", "replace").splitlines()
        return lines[0] if lines else ""
    return os.environ.get(PASSPHRASE, "")


def _prompt(text: str) -> str:
    typed = getpass.getpass(text) if sys.stdin is not None and sys.stdin.isatty() else ""
    if not typed:
        raise RefusedError(
            Reason.PASSPHRASE,
            "a passphrase is needed",
            expected=f"{PASSPHRASE}, --passphrase-file, or a terminal to ask on",
            actual="nothing",
        )
    return typed


def needs_profile(profile: Path | None) -> Path:
    """The profile's path; wrong usage (exit 2) where none is named."""
    if profile is None:
        raise typer.BadParameter("no profile: give --profile FILE or set KEYQUORUM_PROFILE")
    return profile


@contextmanager
def client_of(profile: Path | None, passphrase_file: Path | None) -> Iterator[Client]:
    """A connected client; wrong usage (exit 2) where no profile is named."""
    path = needs_profile(profile)
    from keyquorum.sync import connect

    with connect(path, passphrase=passphrase_source(passphrase_file)) as client:
        yield client
