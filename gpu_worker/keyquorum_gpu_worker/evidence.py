"""Where evidence comes from: Linux's configfs-tsm on a real SEV-SNP guest, or the development platform.

Both give the same shape, a SEV-SNP report with its endorsements, bound to 64 bytes of report data (DESIGN §7).
"""

from __future__ import annotations

import errno
import os
import secrets
import uuid
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Protocol

from keyquorum_core.attestation.development import DevelopmentChip
from keyquorum_core.attestation.evidence import EvidenceItem
from keyquorum_core.errors import MalformedError, Reason, UnavailableError

__all__ = ["DevelopmentPlatform", "EvidenceSource", "TsmReports", "certificate_table"]

_SEV_SNP = "sev-snp"
_REPORT_DATA_BYTES = 64
_REPORT_BYTES = 1184
_MEASUREMENT_BYTES = 48
_MAX_TABLE = 256 << 10
_MAX_CERTIFICATE = 64 << 10
_MAX_ENDORSEMENTS = 16


class EvidenceSource(Protocol):
    """Makes evidence on demand."""

    kind: ClassVar[str]
    """For people and logs: ``sev-snp`` or ``development``."""

    def collect(self, report_data: bytes) -> EvidenceItem:
        """Evidence over 64 bytes of report data. Blocking. Raises :class:`UnavailableError` (``EVIDENCE_TYPE``)."""
        ...


def _unavailable(message: str, *, expected: str, actual: object, next_step: str) -> UnavailableError:
    return UnavailableError(Reason.EVIDENCE_TYPE, message, expected=expected, actual=actual, next_step=next_step)


class DevelopmentPlatform:
    """A make-believe chip on disk: ``vek.pem``, ``ask.pem``, ``ark.pem``, ``vek-key.pem`` and ``measurement`` (96
    hex digits). It proves nothing; custodians accept it only where their reference values name its root."""

    kind: ClassVar[str] = "development"

    def __init__(self, chip: DevelopmentChip, measurement: bytes) -> None:
        self._chip = chip
        self._measurement = measurement

    @classmethod
    def load(cls, directory: Path) -> DevelopmentPlatform:
        """Raises :class:`UnavailableError` naming the file that is missing, :class:`MalformedError` for a bad one."""
        files = {}
        for name in ("vek.pem", "ask.pem", "ark.pem", "vek-key.pem", "measurement"):
            try:
                files[name] = (directory / name).read_bytes()
            except OSError as error:
                raise _unavailable(
                    "the development platform cannot be used",
                    expected=f"a readable file {directory / name}",
                    actual=error.strerror,
                    next_step="Make it with the local cluster, or configure [sev-snp] on a machine that has it.",
                ) from None
        try:
            measurement = bytes.fromhex(files.pop("measurement").decode("ascii").strip())
        except ValueError:
            measurement = b""
        if len(measurement) != _MEASUREMENT_BYTES:
            raise MalformedError(
                Reason.MALFORMED,
                "the development platform's measurement is malformed",
                expected=f"{2 * _MEASUREMENT_BYTES} hex digits in {directory / 'measurement'}",
            )
        return cls(DevelopmentChip.from_files(files), measurement)

    def collect(self, report_data: bytes) -> EvidenceItem:
        report = self._chip.sign_report(report_data, self._measurement)
        return EvidenceItem(_SEV_SNP, report, self._chip.endorsements)


class TsmReports:
    """SEV-SNP reports through configfs-tsm (Linux 6.7, Documentation/ABI/testing/configfs-tsm-report).

    One folder is made below ``root`` for each report: write ``inblob``, read ``provider``, ``outblob`` and
    ``auxblob``, the certificate table that the host gave the guest, and look at ``generation`` to see that nobody
    else wrote meanwhile. Where the host gives no certificates, they come from the files in ``endorsements``.
    """

    kind: ClassVar[str] = _SEV_SNP
    DEFAULT_ROOT: ClassVar[Path] = Path("/sys/kernel/config/tsm/report")

    def __init__(self, root: Path = DEFAULT_ROOT, endorsements: Path | None = None) -> None:
        self._root = root
        self._endorsements = endorsements

    def collect(self, report_data: bytes) -> EvidenceItem:
        if len(report_data) != _REPORT_DATA_BYTES:
            raise MalformedError(
                Reason.MALFORMED, "report data of the wrong size", expected=_REPORT_DATA_BYTES, actual=len(report_data)
            )
        if not self._root.is_dir():
            raise _unavailable(
                "this machine offers no attestation reports",
                expected=f"the folder {self._root} (configfs-tsm)",
                actual="no such folder",
                next_step="Run the worker in a SEV-SNP guest with Linux 6.7 or later, the sev-guest module loaded and "
                "configfs mounted; or configure [development] for a machine without a TEE.",
            )
        entry = self._root / f"keyquorum-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            entry.mkdir()
        except OSError as error:
            raise _unavailable(
                "the kernel gives this process no attestation report",
                expected=f"the right to make folders in {self._root}",
                actual=error.strerror,
                next_step="Run the worker as a user that may, usually root.",
            ) from None
        try:
            report, table = self._read(entry, report_data)
        finally:
            with suppress(OSError):
                entry.rmdir()
        return EvidenceItem(_SEV_SNP, report, self._endorsing(table))

    def _read(self, entry: Path, report_data: bytes) -> tuple[bytes, bytes]:
        try:
            provider = (entry / "provider").read_text().strip()
            if provider != "sev_guest":
                raise _unavailable(
                    "this machine attests by other means than SEV-SNP",
                    expected="provider sev_guest",
                    actual=f"provider {provider[:40]}",
                    next_step="Other evidence types are not supported here yet.",
                )
            before = int((entry / "generation").read_text())
            (entry / "inblob").write_bytes(report_data)
            report = (entry / "outblob").read_bytes()
            table = self._auxiliary(entry)
            after = int((entry / "generation").read_text())
        except (OSError, ValueError) as error:
            raise _unavailable(
                "the attestation report could not be read",
                expected=f"inblob, outblob, provider and generation in {self._root}",
                actual=getattr(error, "strerror", None) or error,
                next_step="See the kernel's log for messages of sev-guest.",
            ) from None
        if after != before + 1:
            raise _unavailable(
                "somebody else wrote to the report's folder meanwhile",
                expected=f"generation {before + 1}",
                actual=after,
                next_step="Try again.",
            )
        if len(report) != _REPORT_BYTES:
            raise _unavailable(
                "the kernel's report is no SEV-SNP report",
                expected=f"{_REPORT_BYTES} bytes",
                actual=f"{len(report)} bytes",
                next_step="Compare the kernel's and the guest's versions.",
            )
        return report, table

    @staticmethod
    def _auxiliary(entry: Path) -> bytes:
        try:
            with (entry / "auxblob").open("rb") as file:
                return file.read(_MAX_TABLE)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENXIO):  # no such attribute: the host gave no certificates
                return b""
            raise

    def _endorsing(self, table: bytes) -> tuple[bytes, ...]:
        found = certificate_table(table) if table else ()
        if not found and self._endorsements is not None:
            found = self._from_files(self._endorsements)
        if not found:
            raise _unavailable(
                "the report has no endorsements",
                expected="certificates from the host (auxblob), or files in `endorsements` of worker.toml",
                actual="none",
                next_step="Ask the provider for the chip's VCEK or VLEK chain, or fetch it from AMD's key server.",
            )
        return found

    @staticmethod
    def _from_files(directory: Path) -> tuple[bytes, ...]:
        try:
            paths = sorted(path for path in directory.iterdir() if path.suffix in (".der", ".pem", ".crt", ".cer"))
            return tuple(path.read_bytes()[:_MAX_CERTIFICATE] for path in paths[:_MAX_ENDORSEMENTS])
        except OSError as error:
            raise _unavailable(
                "the configured endorsements cannot be read",
                expected=f"a folder {directory}",
                actual=error.strerror,
                next_step="Correct `endorsements` in worker.toml.",
            ) from None


_TABLE_ENTRY = 24
_CERTIFICATES = tuple(
    uuid.UUID(text)
    for text in (
        "63da758d-e664-4564-adc5-f4b93be8accd",  # VCEK
        "a8074bc2-a25a-483e-aae6-39c045a0b8a1",  # VLEK
        "4ab7b379-bbac-4fe4-a02f-05aef327c782",  # ASK or ASVK
        "c0b406a4-a803-4952-9743-3fb6014cd0ae",  # ARK
    )
)


def certificate_table(table: bytes) -> tuple[bytes, ...]:
    """Certificates in the table that a host hands to its guest (SEV-ES GHCB specification 2.03, §4.1.8.1).

    Entries of GUID (16 bytes), offset and length (u32 little-endian each), ended by a zero GUID, then the
    certificates. GUIDs are met in either byte order, since hosts write both. Raises :class:`MalformedError` for
    entries that point outside the table.
    """
    known = {order for each in _CERTIFICATES for order in (each.bytes, each.bytes_le)}
    out: list[bytes] = []
    for at in range(0, len(table) - _TABLE_ENTRY + 1, _TABLE_ENTRY):
        guid = table[at : at + 16]
        if not any(guid):
            break
        offset = int.from_bytes(table[at + 16 : at + 20], "little")
        length = int.from_bytes(table[at + 20 : at + 24], "little")
        if offset + length > len(table) or length > _MAX_CERTIFICATE:
            raise MalformedError(
                Reason.MALFORMED,
                "the host's certificate table points outside itself",
                expected=f"at most {len(table)} bytes",
                actual=f"{length} bytes at {offset}",
            )
        if guid in known and length and len(out) < _MAX_ENDORSEMENTS:
            out.append(table[offset : offset + length])
    return tuple(out)
