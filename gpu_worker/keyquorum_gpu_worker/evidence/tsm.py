"""Linux's configfs-tsm (6.7; Documentation/ABI/testing/configfs-tsm-report): reports without knowing the vendor.

One folder is made below ``root`` for each report: write ``privlevel`` where asked to and ``inblob``, read
``provider``, ``outblob`` and ``auxblob``, and look at ``generation``, which counts the writes, to see that nobody else
wrote meanwhile.
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from keyquorum_gpu_worker.evidence.source import unavailable

__all__ = ["TsmReport", "TsmReports"]

_MAX_BLOB = 256 << 10


@dataclass(frozen=True, slots=True)
class TsmReport:
    """``outblob``, what the hardware signed, and ``auxblob``, what the host added to it (empty where there is none)."""

    signed: bytes
    auxiliary: bytes


class TsmReports:
    """Reports from ``root`` by the one ``provider`` that is expected: ``sev_guest``, ``tdx_guest``."""

    DEFAULT_ROOT: ClassVar[Path] = Path("/sys/kernel/config/tsm/report")

    def __init__(self, provider: str, root: Path = DEFAULT_ROOT) -> None:
        self.root = root
        self._provider = provider

    @property
    def exists(self) -> bool:
        return self.root.is_dir()

    def read(self, report_data: bytes, privilege: int | None = None) -> TsmReport:
        """A report over 64 bytes. Raises :class:`UnavailableError` (``EVIDENCE_TYPE``)."""
        if not self.exists:
            raise unavailable(
                "this machine offers no attestation reports",
                expected=f"the folder {self.root} (configfs-tsm)",
                actual="no such folder",
                next_step=f"Run the worker in a guest with Linux 6.7 or later, the module of {self._provider} loaded "
                "and configfs mounted.",
            )
        entry = self.root / f"keyquorum-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            entry.mkdir()
        except OSError as error:
            raise unavailable(
                "the kernel gives this process no attestation report",
                expected=f"the right to make folders in {self.root}",
                actual=error.strerror,
                next_step="Run the worker as a user that may, usually root.",
            ) from None
        try:
            return self._read(entry, report_data, privilege)
        finally:
            with suppress(OSError):
                entry.rmdir()

    def _read(self, entry: Path, report_data: bytes, privilege: int | None) -> TsmReport:
        try:
            provider = (entry / "provider").read_text().strip()
            if provider != self._provider:
                raise unavailable(
                    "this machine attests by other means",
                    expected=f"provider {self._provider}",
                    actual=f"provider {provider[:40]}",
                    next_step="Configure the section of worker.toml that fits this machine.",
                )
            before = int((entry / "generation").read_text())
            writes = 1
            if privilege is not None:
                (entry / "privlevel").write_bytes(str(privilege).encode())
                writes += 1
            (entry / "inblob").write_bytes(report_data)
            signed = self._blob(entry / "outblob")
            auxiliary = self._auxiliary(entry)
            after = int((entry / "generation").read_text())
        except (OSError, ValueError) as error:
            raise unavailable(
                "the attestation report could not be read",
                expected=f"inblob, outblob, provider and generation in {self.root}",
                actual=getattr(error, "strerror", None) or error,
                next_step=f"See the kernel's log for messages of {self._provider}.",
            ) from None
        if after != before + writes:
            raise unavailable(
                "somebody else wrote to the report's folder meanwhile",
                expected=f"generation {before + writes}",
                actual=after,
                next_step="Try again.",
            )
        return TsmReport(signed, auxiliary)

    @staticmethod
    def _blob(path: Path) -> bytes:
        with path.open("rb") as file:
            data = file.read(_MAX_BLOB + 1)
        if len(data) > _MAX_BLOB:
            raise ValueError(f"{path.name} has more than {_MAX_BLOB} bytes")
        return data

    def _auxiliary(self, entry: Path) -> bytes:
        try:
            return self._blob(entry / "auxblob")
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENXIO):  # no such attribute: the host added nothing
                return b""
            raise
