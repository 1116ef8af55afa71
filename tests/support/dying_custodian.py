"""A custodian that is killed at a chosen moment: ``python -m tests.support.dying_custodian COMMAND …``.

It is the real code with a keystore that sends SIGKILL to its own process just before, or just after, the n-th commit
counted from when it is armed. Nothing in the product knows of it.

- ``init DIR N WHEN``: make a custodian; armed from the start. Files that are written count like commits.
- ``restore DIR N WHEN``: restore a custodian from ``backup``, ``recipient`` and ``operators.json`` beside DIR; as init.
- ``hold DIR N WHEN``: serve a custodian; armed once its folder is open, counting the commits that move a ceremony.
- ``prove DIR N WHEN``: the same, counting those by which a restored one accepts a document or ceases to be one.
- ``serve DIR N WHEN``: serve a custodian; armed once its folder is open. WHEN ``record``: at the n-th release, between
  recording it and answering.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from pathlib import Path

from keyquorum_core.ceremony_states import State
from keyquorum_core.sealing import RecipientKey
from keyquorum_custodian import init, logs, restoring
from keyquorum_custodian.config import CustodianConfig
from keyquorum_custodian.keystore import Keystore, ReleaseRecord
from keyquorum_custodian.node import open_node
from keyquorum_custodian.seed_records import CeremonyRow
from keyquorum_custodian.server import serve
from keyquorum_custodian.trust import load_operators
from tests.support.custodian import PASSPHRASE

_left = -1
_when = ""
_COUNTED = {"hold": ("ceremony",), "prove": ("document", "mark")}
_counted: tuple[str, ...] = ()
_changed = ""


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _step(write: object, *arguments: object) -> None:
    """``write(*arguments)``, with death before or after it when its turn has come."""
    global _left
    _left -= _when != "record"
    if _left == 0 and _when == "before":
        _die()
    write(*arguments)  # type: ignore[operator]
    if _left == 0 and _when == "after":
        _die()


def _change(what: str) -> None:
    global _changed
    if what in _counted:
        _changed = what


class DyingKeystore(Keystore):
    """Dies at a commit."""

    __slots__ = ()

    def insert_ceremony(self, row: CeremonyRow, now: int) -> None:
        _change("ceremony")
        super().insert_ceremony(row, now)

    def move_ceremony(self, ceremony_id: str, state: State, now: int, cause: str = "") -> None:
        _change("ceremony")
        super().move_ceremony(ceremony_id, state, now, cause)

    def save_bulletin(self, kind: str, version: int, digest: str, envelope: bytes, now: int) -> None:
        _change("document")
        super().save_bulletin(kind, version, digest, envelope, now)

    def change(self, statement: str, *values: object) -> int:
        if "restored" in values[:1]:
            _change("mark")
        return super().change(statement, *values)

    def _commit(self) -> None:
        global _changed
        changed, _changed = _changed, ""
        if changed or not _counted:
            _step(super()._commit)
        else:
            super()._commit()

    def record_release(self, record: ReleaseRecord) -> bool:
        global _left
        new = super().record_release(record)
        _left -= _when == "record"
        if _left == 0 and _when == "record":
            _die()
        return new


def main(command: str, directory: str, number: str, when: str) -> None:
    global _left, _when, _counted
    if command == "init":
        _left, _when = int(number), when
        write = init.write_file
        init.write_file = lambda path, data: _step(write, path, data)
        config = CustodianConfig(Path(directory), "ch-1", "CH", "demo", "127.0.0.1:7001", "127.0.0.1:7002", "")
        init.initialise(config, PASSPHRASE, now=1_700_000_000, opslimit=1, memlimit=8 << 10, keystore=DyingKeystore)
    elif command == "restore":
        _left, _when = int(number), when
        write = init.write_file
        init.write_file = lambda path, data: _step(write, path, data)
        folder = Path(directory)
        operators = folder.parent / "operators.json"
        restoring.restore(
            io.BytesIO((folder.parent / "backup").read_bytes()),
            RecipientKey.from_seed_bytes((folder.parent / "recipient").read_bytes()),
            folder,
            PASSPHRASE,
            load_operators(operators),
            operators.read_bytes(),
            now=1_800_000_000,
            opslimit=1,
            memlimit=8 << 10,
            keystore=DyingKeystore,
        )
    else:
        logs.configure()
        node = open_node(Path(directory), PASSPHRASE, keystore=DyingKeystore)
        _left, _when, _counted = int(number), when, _COUNTED.get(command, ())
        asyncio.run(serve(node, lambda line: print(line, flush=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])
