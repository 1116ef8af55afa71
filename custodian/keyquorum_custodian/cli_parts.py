"""What the parts of the command have in common: options, the passphrase."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from keyquorum_core.errors import Reason, RefusedError

__all__ = ["Directory", "Json", "PassphraseFile", "passphrase_from"]

Directory = Annotated[Path, typer.Option("--dir", help="The custodian's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(help="A file whose first line is the passphrase or PIN. Otherwise KEYQUORUM_PASSPHRASE, or a prompt."),
]


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
