"""The options that every command of ``keyquorum-coordinator`` shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Directory", "Json"]

Directory = Annotated[Path, typer.Option("--dir", help="The coordinator's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
