"""A log that is killed at every durable write in turn: ``python -m tests.support.dying_sequencer FOLDER``.

It is the real code; nothing in the product knows of this. Every commit of a database, and every rename that puts an
object or a key in its place, is a write point. For n = 1, 2, … a forked process makes a log, appends, seals and
witnesses, and sends SIGKILL to itself just before, or just after, its n-th write point; the last one of each kind comes
to its end. What it handed out it has written down first, in ``handed-out``, a line a
batch: the first leaf's number, which is its index too, how many leaves, the checkpoint.
"""

from __future__ import annotations

import base64
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.engine.default import DefaultDialect

from keyquorum_coordinator.ledger.setup import create_ledger, open_log
from keyquorum_coordinator.log_key import load_log_key
from keyquorum_core.ledger.cosignatures import Cosigner
from tests.support.ledger_log import NOW, add, make_config

BATCHES = (1, 100, 160, 251, 2)  # two tiles get full, one of them in the middle of a batch
LEAVES = sum(BATCHES)


class Death:
    """Counts write points, and strikes at one of them."""

    def __init__(self, number: int, when: str) -> None:
        self.left = number
        self.when = when

    def wrap(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            self.left -= 1
            if self.left == 0 and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = write(*arguments)
            if self.left == 0 and self.when == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return step


def live(folder: Path, death: Death) -> None:
    config = make_config(folder)
    DefaultDialect.do_commit = death.wrap(DefaultDialect.do_commit)  # type: ignore[method-assign]
    Path.replace = death.wrap(Path.replace)  # type: ignore[method-assign]
    create_ledger(config, load_log_key(config.path(config.log_key)), now=NOW)
    log = open_log(config)
    witness = Cosigner.generate("demo/witness")
    number = 0
    with (folder / "handed-out").open("ab", buffering=0) as out:
        for count in BATCHES:
            entries = add(log, *range(number, number + count))
            assert [entry.index for entry in entries] == list(range(number, number + count))
            note = base64.b64encode(entries[0].checkpoint.encode()).decode()
            out.write(f"{number} {count} {note}\n".encode())
            number += count
            log.add_cosignatures(log.latest, witness.cosign(log.latest.checkpoint, NOW))
            while log.seal():
                pass


def main(folder: Path) -> None:
    for when in ("before", "after"):
        for number in range(1, 1000):
            place = folder / f"{when}-{number}"
            child = os.fork()
            if child == 0:
                live(place, Death(number, when))
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            if status == 0:
                break
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                sys.exit(f"{place.name} ended in an unforeseen way: {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
