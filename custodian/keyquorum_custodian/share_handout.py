"""Handing new shares to their officers: one at a time on an empty screen, or each in a file of its own.

Nothing here keeps a share. Each officer proves that the words were written down before the next one sits down.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from keyquorum_core.errors import Reason, StateError, UnavailableError

__all__ = ["Screen", "show_shares", "write_shares"]

_ASKED: Final = 3
_TRIES: Final = 3
_COLUMNS: Final = 3


class Screen:
    """A terminal: ``show`` a line, ``ask`` for one without echoing it, ``wait`` for the Enter key, ``clear``."""

    def __init__(
        self,
        show: Callable[[str], None],
        ask: Callable[[str], str],
        wait: Callable[[str], None],
        clear: Callable[[], None],
    ) -> None:
        self.show, self.ask, self.wait, self.clear = show, ask, wait, clear


def show_shares(
    screen: Screen,
    shares: Sequence[str],
    threshold: int,
    custodian: str,
    choose: Callable[[int], int] = secrets.randbelow,
) -> None:
    """Show each share to one officer and have some of its words repeated. Raises ``STATE`` after several wrong ones;
    ``choose(n)`` draws from 0…n-1."""
    count = len(shares)
    try:
        for number, share in enumerate(shares, 1):
            words = share.split()
            screen.clear()
            screen.show(f"Share {number} of {count} for custodian {custodian}; any {threshold} of them open it.")
            screen.wait("Only its officer looks at this screen now. Press Enter to see the share.")
            for line in _columns(words):
                screen.show(line)
            screen.wait(f"Write down all {len(words)} words in order, then press Enter.")
            screen.clear()
            _check_written(screen, words, number, choose)
    finally:
        screen.clear()


def _check_written(screen: Screen, words: Sequence[str], number: int, choose: Callable[[int], int]) -> None:
    left = list(range(1, len(words) + 1))
    places = [left.pop(choose(len(left))) for _ in range(_ASKED)]
    for place in sorted(places):
        for _ in range(_TRIES):
            said = screen.ask(f"Share {number}: word {place}").strip().lower()
            if secrets.compare_digest(said.encode(), words[place - 1].encode()):
                break
            screen.show("That is not the word.")
        else:
            raise StateError(
                Reason.STATE,
                f"share {number} was not written down rightly; nothing was changed",
                expected=f"word {place} of it",
                actual=f"{_TRIES} other words",
                next_step="Destroy all shares written down so far and start over.",
            )


def _columns(words: Sequence[str]) -> list[str]:
    rows = -(-len(words) // _COLUMNS)
    width = max(map(len, words))
    return [
        "   ".join(f"{place + 1:2}  {words[place]:<{width}}" for place in range(row, len(words), rows)).rstrip()
        for row in range(rows)
    ]


def write_shares(folder: Path, shares: Sequence[str], threshold: int, custodian: str) -> list[Path]:
    """Each share in a new file of mode 0600, on the disk when this returns. Raises ``EXISTS`` or ``STORAGE``; then
    those it made are gone."""
    made: list[Path] = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number, share in enumerate(shares, 1):
            path = folder / f"{custodian}-share-{number}-of-{len(shares)}.txt"
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            made.append(path)
            with os.fdopen(descriptor, "wb") as file:
                file.write(
                    f"# custodian {custodian}: any {threshold} of {len(shares)} shares open it\n{share}\n".encode()
                )
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        for path in made:
            path.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise StateError(Reason.EXISTS, f"{error.filename} exists; a share is never overwritten") from None
        raise UnavailableError(
            Reason.STORAGE, f"the shares could not be written to {folder}", actual=error.strerror
        ) from None
    return made
