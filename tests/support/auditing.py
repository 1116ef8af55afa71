"""An auditor's surroundings: a real signed roster, its operators, and a log that the roster's keys signed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support.client_world import the_world
from tests.support.ledger_world import TestLog, World


@dataclass
class Desk:
    """Files of an auditor, and the arguments that name them."""

    folder: Path
    world: World
    log: TestLog

    @property
    def options(self) -> list[str]:
        files = self.folder / "trust"
        return ["--roster", str(files / "roster.json"), "--operators", str(files / "operators.json")]

    def publish(self, leaves: Iterable[bytes] = (), age: int = 0, by: Iterable[str] = ("ch-1", "de-1", "fr-1")) -> None:
        """Show more leaves, cosigned ``age`` seconds ago, to whoever reads the folder or the server."""
        self.log.publish(leaves, int(time.time()) - age, tuple(by))
        self.log.write(self.folder / "log")

    @property
    def offline(self) -> list[str]:
        """The same and the log as a folder."""
        return [*self.options, "--log", str(self.folder / "log")]


def desk(folder: Path, leaves: Iterable[bytes] = ()) -> Desk:
    world = the_world()
    world.write_profile(folder / "trust", "127.0.0.1:1")
    logged = World(world.log, {name: each.cosigner for name, each in world.custodians.items()}, world.quorum)
    out = Desk(folder, logged, TestLog(logged))
    out.publish(leaves)
    return out
