"""``keyquorum identity``: key files of owners and operators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keyquorum.cli import output

__all__ = ["app"]

app = typer.Typer(name="identity", help="Key files of owners and operators.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Key files of owners and operators."""


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The principal's name: a-z, 0-9 and hyphens.")],
    role: Annotated[str, typer.Option(help="owner or operator.")] = "owner",
    out: Annotated[Path, typer.Option(help="Folder for NAME.key.json and NAME.pub.json.")] = Path(),
    suite: Annotated[str, typer.Option(help="Sealing suite; that of the keys it is to be used with.")] = (
        "MLKEM768_X25519"
    ),
    passphrase_file: output.PassphraseFileOption = None,
    as_json: output.JsonOption = False,
) -> None:
    """Make signing and sealing keys, the private ones wrapped under a passphrase. Never replaces a file."""
    from keyquorum.keyfiles import create_keys

    keys = create_keys(out, name, role, output.new_passphrase(passphrase_file, f"{name}.key.json"), suite=suite)
    made = {
        "name": keys.name,
        "role": keys.role,
        "fingerprint": keys.identity.fingerprint,
        "key_file": str(out / f"{name}.key.json"),
        "public_file": str(out / f"{name}.pub.json"),
    }
    if as_json:
        output.emit(made)
        return
    output.table("", ("", ""), list(made.items()))
    output.note("Keep a backup of the key file and its passphrase: without both, results sealed to it stay closed.")
