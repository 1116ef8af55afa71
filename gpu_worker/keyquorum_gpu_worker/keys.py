"""The worker's keys for one job: made in memory, bound by its evidence, gone with the job.

Nothing here is ever written, sent or logged, and :class:`~keyquorum_core.sealing.RecipientKey` and
:class:`~keyquorum_core.signing.Identity` refuse to be pickled or copied. What Python cannot promise: ``bytes`` and
OpenSSL's key objects are freed, not overwritten, when the last reference goes, and the interpreter may have copied
them before. In an enclave that memory is encrypted and dies with it; the process itself gives no core dump and lets
nobody without CAP_SYS_PTRACE read it. What can be wiped (the job's log, artifact buffers) is held in bytearrays and is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity

__all__ = ["JobKeys", "wipe"]


@dataclass(frozen=True, slots=True)
class JobKeys:
    """``recipient`` opens shares; ``identity`` signs the result statement."""

    recipient: RecipientKey = field(repr=False)
    identity: Identity = field(repr=False)

    @classmethod
    def generate(cls, suite: str) -> JobKeys:
        """New keys for one job; the HPKE suite is the one that the owner chose for its own key.

        Raises :class:`RefusedError` or :class:`UnavailableError` (``UNSUPPORTED``) for a suite not to be had here.
        """
        return cls(RecipientKey.generate(suite), Identity.generate())


def wipe(data: bytearray) -> None:
    """Overwrite and empty."""
    data[:] = bytes(len(data))
    data.clear()
