"""What ``keyquorum-custodian serve`` becomes once its command line is read: a fresh interpreter that serves.

The libraries that read a command line (typer brings pydantic) would stay in memory for as long as the custodian runs,
a tenth of all it needs. So the command replaces its own process: same process id, same signals, same standard streams.
The passphrase comes through a pipe, so that it stands in neither the arguments nor the environment of what serves.

Sealing does the same once more. What an interpreter once held, it can't be relied on to overwrite; a process that
executes a program leaves all of its memory behind, to the kernel, which clears it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_protos.wire.refusals import show_refusal

__all__ = ["become"]

_AGAIN = "again"  # sealed by its operator, and known to whoever started it
_MAX_PASSPHRASE = 4096  # bytes; what a pipe holds without a reader on every kernel


def become(directory: Path, secret: str | None, log_level: str) -> NoReturn:
    """Replace this process by one that serves ``directory``, whose keystore opens to ``secret``, a passphrase or PIN;
    None: sealed. Raises :class:`RefusedError` (``PASSPHRASE``)."""
    data = (secret or "").encode("utf-8", "surrogateescape")
    if len(data) > _MAX_PASSPHRASE:
        raise RefusedError(Reason.PASSPHRASE, "the passphrase is too long", expected=f"at most {_MAX_PASSPHRASE} bytes")
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    os.set_inheritable(reader, True)
    _execute(directory, log_level, reader, "sealed" if secret is None else "open")


def _execute(directory: Path, log_level: str, descriptor: int, state: str) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    # -P: as a console script, not looking for modules in the folder that it is started from.
    arguments = ["-P", "-m", "keyquorum_custodian.serving", str(directory), log_level, str(descriptor), state]
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - this very interpreter


def _serve(directory: Path, log_level: str, descriptor: int, state: str) -> None:
    from keyquorum_custodian import logs
    from keyquorum_custodian.node import open_node
    from keyquorum_custodian.sealed_node import open_sealed
    from keyquorum_custodian.server import serve
    from keyquorum_protos.wire.process import harden

    harden()  # what the process was before does not count: executing a program undoes it
    logs.configure(log_level)
    node = open_node(directory, _read_secret(descriptor)) if state == "open" else open_sealed(directory)
    if asyncio.run(serve(node, _announce if state != _AGAIN else lambda line: None)):
        _execute(directory.absolute(), log_level, -1, _AGAIN)


def _announce(line: str) -> None:
    print(line, flush=True)


def _read_secret(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb") as pipe:
        return pipe.read().decode("utf-8", "surrogateescape")


def _main(arguments: Sequence[str]) -> int:
    directory, log_level, descriptor, state = arguments
    try:
        _serve(Path(directory), log_level, int(descriptor), state)
    except KeyquorumError as error:
        show_refusal(error, as_json=False)
        return 1
    except OSError as error:
        refusal = UnavailableError(Reason.STORAGE, "a file could not be used", actual=error.strerror)
        show_refusal(refusal, as_json=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
