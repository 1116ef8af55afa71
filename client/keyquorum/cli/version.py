"""``keyquorum version``."""

from __future__ import annotations

import typer

from keyquorum.cli import output

__all__ = ["version"]


def version(as_json: output.JsonOption = False) -> None:
    """Print the version."""
    from keyquorum import __version__

    if as_json:
        output.emit({"version": __version__})
    else:
        typer.echo(f"keyquorum {__version__}")
