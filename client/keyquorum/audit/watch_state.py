"""What a monitor remembers: the last checkpoint it verified, in one file, and evidence of what contradicts it.

The file is replaced as a whole, after what it stands for was verified and said: killed at any moment, a monitor that
starts again goes on from a checkpoint that it verified, and says what it may have said already rather than nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from keyquorum.atomic import make_folder, replace_file
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.ledger.log_keys import SignedCheckpoint
from keyquorum_core.ledger.log_trust import LogTrust
from keyquorum_core.ledger.notes import MAX_NOTE
from keyquorum_core.strictjson import Fields, loads
from keyquorum_protos.wire.files import read_bytes

__all__ = ["Remembered", "WatchState"]

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Remembered:
    """The last verified checkpoint, and when a quorum had cosigned it (unix seconds)."""

    signed: SignedCheckpoint
    quorum_time: int


class WatchState:
    """``file`` holds the state; ``evidence`` is a folder, made when it is needed."""

    def __init__(self, file: Path, evidence: Path) -> None:
        self._file, self._evidence = file, evidence

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only one monitor at a time uses a state file. Raises :class:`StateError`, :class:`UnavailableError`."""
        make_folder(self._file.parent)
        lock = self._file.with_name(self._file.name + ".lock")
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UnavailableError(Reason.STORAGE, f"{lock} can't be written", actual=error.strerror) from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateError(
                    Reason.STATE,
                    f"another monitor uses {self._file}",
                    next_step="Give each monitor a state file of its own.",
                ) from None
            yield
        finally:
            os.close(handle)

    def load(self, trust: LogTrust) -> Remembered | None:
        """What is remembered; nothing before the first time. Raises :class:`MalformedError` for a damaged file, and
        :class:`RefusedError` for a checkpoint that is not by the log of ``trust``: a monitor never starts anew by
        itself."""
        if not self._file.exists():
            return None
        what = f"state file {self._file}"
        members = Fields(
            loads(read_bytes(self._file, what, max_bytes=2 * MAX_NOTE), what, max_bytes=2 * MAX_NOTE), what
        )
        version = members.integer("version")
        if version != _VERSION:
            raise MalformedError(Reason.UNSUPPORTED, f"{what} has another version", expected=_VERSION, actual=version)
        note = members.text("checkpoint", max_length=MAX_NOTE)
        quorum_time = members.integer("quorum_time")
        members.done()
        try:
            return Remembered(trust.open(note.encode()), quorum_time)
        except KeyquorumError as error:
            raise RefusedError(
                error.reason,
                f"the checkpoint in {what} is not by the roster's log: {error.message}",
                expected=error.expected,
                actual=error.actual,
                next_step="If the log's keys were changed, verify the new log and start with a new state file.",
            ) from None

    def save(self, remembered: Remembered) -> None:
        """Durable when it returns. Raises :class:`UnavailableError` (``STORAGE``)."""
        state = {
            "version": _VERSION,
            "checkpoint": remembered.signed.encode().decode(),
            "quorum_time": remembered.quorum_time,
        }
        replace_file(self._file, json.dumps(state, indent=1).encode() + b"\n")

    def keep_evidence(self, kind: str, past: bytes, served: bytes, error: dict[str, object]) -> Path:
        """Two signed checkpoints that do not agree, and why, in a folder of their own; the same two only once.

        Raises :class:`UnavailableError` (``STORAGE``).
        """
        folder = self._evidence / f"{kind}-{hashlib.sha256(past + served).hexdigest()[:16]}"
        make_folder(folder)
        replace_file(folder / "before.checkpoint", past)
        replace_file(folder / "served.checkpoint", served)
        replace_file(folder / "error.json", json.dumps(error, indent=1).encode() + b"\n")
        return folder
