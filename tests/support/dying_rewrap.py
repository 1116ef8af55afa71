"""Rewraps that are killed: ``python -m tests.support.dying_rewrap FOLDER``.

In ``FOLDER/N-before`` and ``FOLDER/N-after`` a process of its own rewraps a data file and sends itself SIGKILL before
or after its n-th call that changes a file, for every n there is. In ``FOLDER/done-…`` nobody dies. The calls are the
real ones, looked up where the product looks them up.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from keyquorum import data_keys
from tests.support.data_files import data_key

__all__ = ["ORIGINAL", "SEALED"]

ORIGINAL = "original"
SEALED = "sealed"


class Fate:
    def __init__(self, number: int, when: str) -> None:
        self.left = number
        self.when = when

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0 and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **named)
            if self.left == 0 and self.when == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return step


def rewrap(sealed: Path, fate: Fate) -> None:
    def file(*arguments: Any) -> FileIO:
        class DyingFile(FileIO):
            def write(self, data: Any, /) -> int:
                return int(fate.around(super().write)(data))

        return DyingFile(*arguments)

    with data_key(1) as old, data_key(2) as new:
        setattr(data_keys, "FileIO", file)  # noqa: B010 - the type stays what it is
        setattr(tempfile, "mkstemp", fate.around(tempfile.mkstemp))  # noqa: B010
        for name in ("copy_file_range", "fsync", "replace", "unlink"):
            setattr(os, name, fate.around(getattr(os, name)))
        old.rewrap(sealed, new)


def main(folder: Path) -> None:
    original = (folder / ORIGINAL).read_bytes()
    for when in ("before", "after"):
        number = 0
        while True:
            number += 1
            place = folder / f"{number:02}-{when}"
            place.mkdir()
            (place / SEALED).write_bytes(original)
            child = os.fork()
            if child == 0:
                rewrap(place / SEALED, Fate(number, when))
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                place.rename(folder / f"done-{when}")
                break
            assert os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    main(Path(sys.argv[1]))
