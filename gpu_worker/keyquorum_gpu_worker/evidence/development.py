"""The development platform: a make-believe SEV-SNP chip on disk, for machines without a TEE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from keyquorum_core.attestation.development import DevelopmentChip
from keyquorum_core.attestation.evidence import EvidenceItem
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.strictjson import Fields
from keyquorum_gpu_worker.evidence.source import Binding, unavailable

__all__ = ["DevelopmentPlatform"]

_MEASUREMENT_BYTES = 48


class DevelopmentPlatform:
    """``vek.pem``, ``ask.pem``, ``ark.pem``, ``vek-key.pem`` and ``measurement`` (96 hex digits) in a folder. It proves
    nothing; custodians accept it only where their reference values name its root."""

    type: ClassVar[str] = "sev-snp"
    development: ClassVar[bool] = True

    def __init__(self, chip: DevelopmentChip, measurement: bytes) -> None:
        self._chip = chip
        self._measurement = measurement

    @classmethod
    def from_section(cls, section: Fields, base: Path) -> Callable[[], DevelopmentPlatform]:
        """``[development]`` of worker.toml."""
        folder = base / section.text("dir", max_length=4096)
        section.done()
        return lambda: cls.load(folder)

    @classmethod
    def load(cls, directory: Path) -> DevelopmentPlatform:
        """Raises :class:`UnavailableError` naming the file that is missing, :class:`MalformedError` for a bad one."""
        files = {}
        for name in ("vek.pem", "ask.pem", "ark.pem", "vek-key.pem", "measurement"):
            try:
                files[name] = (directory / name).read_bytes()
            except OSError as error:
                raise unavailable(
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

    def collect(self, binding: Binding) -> EvidenceItem:
        report = self._chip.sign_report(binding.report_data, self._measurement)
        return EvidenceItem(self.type, report, self._chip.endorsements)
