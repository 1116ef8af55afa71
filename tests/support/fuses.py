"""Deaths at chosen writes, in this process: fast enough to enumerate every one of them.

A :class:`MortalKeystore` is the real one, except that a :class:`Fuse` laid to its file can end it just before or just
after any of its writes. What a kill leaves is what was on the disk at that moment: the harness takes the file and its
log as they are, closes the dead one, puts them back and opens them again. Nothing in the product knows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from keyquorum_custodian.keystore import Keystore
from tests.support.custodian import Committee

__all__ = ["Death", "Fuse", "MortalKeystore", "burning", "restart", "survive"]

T = TypeVar("T")


class Death(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


@dataclass
class Fuse:
    """Death ``when`` ("before" or "after") the ``number``-th write from now; 0 only counts them."""

    number: int = 0
    when: str = "before"
    writes: int = 0

    def write(self, make: Callable[[], None]) -> None:
        self.writes += 1
        mine = self.writes == self.number
        if mine and self.when == "before":
            raise Death
        make()
        if mine:
            raise Death


burning: dict[Path, Fuse] = {}
"""Fuses by keystore."""


class MortalKeystore(Keystore):
    """Dies at a commit, or at the moment when the file is overwritten."""

    __slots__ = ()

    def _commit(self) -> None:
        fuse = burning.get(self.path)
        if fuse is None:
            super()._commit()
        else:
            fuse.write(super()._commit)

    def scrub(self) -> None:
        fuse = burning.get(self.path)
        if fuse is None:
            super().scrub()
        else:
            fuse.write(super().scrub)


def survive(committee: Committee, name: str, step: Callable[[], T]) -> T:
    """One step at a custodian; if it dies of it, it is started again from what is on its disk, and asked again."""
    try:
        return step()
    except Death:
        restart(committee, name)
        return step()


def restart(committee: Committee, name: str) -> None:
    """Started again as after a kill: on exactly the bytes that lay on the disk."""
    folder = committee.directory(name)
    left = {path: path.read_bytes() for path in folder.glob("keystore.db*") if not path.name.endswith("-shm")}
    committee.nodes.pop(name).close()
    for path in folder.glob("keystore.db*"):
        path.unlink()
    for path, data in left.items():
        path.write_bytes(data)
    burning.pop(folder / "keystore.db", None)
    committee.open(name)
