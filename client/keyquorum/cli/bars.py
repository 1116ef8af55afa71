"""Progress bars on standard error, when that is a terminal; nothing otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from keyquorum_core.errors import printable

if TYPE_CHECKING:
    from keyquorum.progress import Progress, ProgressCallback

__all__ = ["bars"]

_TITLES = {
    "open": "opening the key",
    "encrypt": "encrypting",
    "upload": "uploading",
    "wait": "waiting",
    "download": "downloading",
    "decrypt": "decrypting",
    "ceremony": "ceremony",
    "verify": "verifying the ledger",
    "prove": "proving",
    "prepare": "preparing rows",
    "rewrap": "copying",
}
_BYTES = ("encrypt", "upload", "download", "decrypt", "rewrap")


@contextmanager
def bars() -> Iterator[ProgressCallback]:
    """A callback that draws one bar for each stage, or part of one. It may be called from any thread."""
    from keyquorum.progress import silent

    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Display

    with Display(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as display:
        tasks: dict[str, TaskID] = {}

        def report(progress: Progress) -> None:
            stage = str(progress.stage)
            bar = f"{stage} {progress.part}".rstrip()
            if bar not in tasks:
                title = f"{_TITLES.get(stage, stage)} {progress.part}".rstrip()
                tasks[bar] = display.add_task(printable(title), total=None, amount="")
            shown = decimal if stage in _BYTES else str
            amount = f"{shown(progress.done)}/{shown(progress.total)}" if progress.total else shown(progress.done)
            display.update(
                tasks[bar],
                completed=progress.done,
                total=progress.total or None,
                amount=printable(progress.detail).replace("\n", " ") or amount,
            )

        yield report
