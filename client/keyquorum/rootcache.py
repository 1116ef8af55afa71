"""What an owner keeps of its jobs in ``<state_dir>/jobs``: each one's key, ``<job id>.sealed``, sealed to the owner's
own HPKE key. Nothing else is written there: the signed manifest comes back from the coordinator, checked by its id.

The key is kept so that a result can be opened when the manifest's window is over or custodians are gone. What is read
back is believed only if it meets the key check of the opening that the owner signed: sealing proves nothing about who
sealed.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import tempfile
from pathlib import Path

from keyquorum_core.answers import JobBinding
from keyquorum_core.derivation import DerivedKey, key_check
from keyquorum_core.errors import KeyquorumError, Reason, UnavailableError
from keyquorum_core.sealing import RecipientKey, seal
from keyquorum_core.transcript import H

__all__ = ["RootCache"]

_MAX_FILE = 1 << 20


class RootCache:
    """A folder of the owner's (0700; files 0600)."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "jobs"

    def _path(self, job: JobBinding) -> Path:
        return self._folder / f"{job.job_id}.sealed"

    @staticmethod
    def _info(job: JobBinding, public: bytes) -> bytes:
        return H("keyquorum/v1/owner-cache", job.job_id.encode(), job.context(), public)

    def _unwritable(self, error: OSError) -> UnavailableError:
        return UnavailableError(
            Reason.STORAGE,
            "what belongs to the job can't be kept for later",
            expected=f"a writable folder {self._folder}",
            actual=error.strerror,
        )

    def store(self, job: JobBinding, key: DerivedKey, owner: RecipientKey) -> None:
        """Replace what is kept for the job. Raises :class:`UnavailableError` (``STORAGE``)."""
        sealed = seal(owner.public, key.root, self._info(job, owner.public))
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=".sealed-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(sealed)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self._path(job))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            raise self._unwritable(error) from None

    def load(self, job: JobBinding, owner: RecipientKey, expected_check: bytes) -> DerivedKey | None:
        """The key, or ``None`` where none is kept or what is kept is not it: then the custodians are asked again."""
        try:
            with self._path(job).open("rb") as file:
                root = owner.open(file.read(_MAX_FILE), self._info(job, owner.public))
            check = key_check(root, job.context())
        except (OSError, KeyquorumError):
            return None
        return DerivedKey(job.context(), root, check) if hmac.compare_digest(check, expected_check) else None
