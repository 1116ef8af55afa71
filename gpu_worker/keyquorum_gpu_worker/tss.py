"""The TPM as ``tpm2-pytss`` shows it: a session, and what is said where there is none."""

from __future__ import annotations

import base64
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from keyquorum_core.attestation.tpm2_keys import check_ak
from keyquorum_core.attestation.tpm2_structures import parse_public
from keyquorum_gpu_worker.evidence.source import unavailable

__all__ = ["DEFAULT_TCTI", "Tss"]

DEFAULT_TCTI = "device:/dev/tpmrm0"
"""The kernel's resource manager, so that other users of the TPM do not get in the way."""


class Tss:
    """How to reach the TPM: ``tcti`` as tpm2-tools write it (``device:/dev/tpmrm0``, ``swtpm:path=…``).

    ``library`` is the module ``tpm2_pytss``, imported when it is needed.
    """

    def __init__(self, tcti: str = DEFAULT_TCTI, library: Any = None) -> None:
        self.tcti = tcti
        self._library = library

    @property
    def library(self) -> Any:
        """Raises :class:`UnavailableError` (``EVIDENCE_TYPE``) where it is not installed."""
        if self._library is None:
            os.environ.setdefault("TSS2_LOG", "all+NONE")  # it writes to standard error what it also raises
            try:
                self._library = importlib.import_module("tpm2_pytss")
            except (ImportError, NotImplementedError) as error:
                raise unavailable(
                    "the TPM cannot be asked",
                    expected="the Python package tpm2-pytss, and the tpm2-tss libraries that it stands on",
                    actual=str(error)[:120],
                    next_step="Install libtss2-dev, or what your system calls it, and then the extra: "
                    "pip install 'keyquorum-gpu-worker[tpm]'.",
                ) from None
        return self._library

    @contextmanager
    def session(self) -> Iterator[Any]:
        """An ``ESAPI``. Raises :class:`UnavailableError` (``EVIDENCE_TYPE``) for whatever the TPM says."""
        library = self.library
        try:
            with library.ESAPI(self.tcti) as tpm:
                yield tpm
        except library.TSS2_Exception as error:
            raise unavailable(
                "the TPM did not do what was asked of it",
                expected=f"a TPM 2.0 at {self.tcti}",
                actual=str(error)[:120],
                next_step="See that the device is there and this user may open it (group tss), and `tcti` in "
                "worker.toml.",
            ) from None

    def persistent(self, tpm: Any, handle: int, what: str) -> Any:
        """The object at a persistent handle. Raises :class:`UnavailableError` where there is none."""
        try:
            return tpm.tr_from_tpmpublic(handle)
        except self.library.TSS2_Exception as error:
            raise unavailable(
                f"the TPM does not hold {what}",
                expected=f"a key at the persistent handle {handle:#010x}",
                actual=str(error)[:120],
                next_step="Make and enrol it: keyquorum-worker tpm create-ak.",
            ) from None

    @staticmethod
    def spki(area: bytes) -> str:
        """Base64 of the SubjectPublicKeyInfo of an attestation key's ``TPM2B_PUBLIC``. Raises as
        :func:`~keyquorum_core.attestation.tpm2_keys.check_ak`: also where it is none."""
        return base64.b64encode(check_ak(parse_public(area)).spki).decode("ascii")
