"""SEV-SNP reports, through configfs-tsm or the ioctls of ``/dev/sev-guest`` (include/uapi/linux/sev-guest.h).

The host may hand its guest a table of certificates along with the report; where it does not, they come from files.
"""

from __future__ import annotations

import ctypes
import struct
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from keyquorum_core.attestation.evidence import EvidenceItem
from keyquorum_core.attestation.snp_report import REPORT_BYTES
from keyquorum_core.errors import MalformedError, Reason, UnavailableError
from keyquorum_core.strictjson import Fields
from keyquorum_gpu_worker.evidence.device import Device, Ioctl, iowr, kernel_ioctl
from keyquorum_gpu_worker.evidence.source import Binding, read_folder, unavailable
from keyquorum_gpu_worker.evidence.tsm import TsmReport, TsmReports

__all__ = ["SevSnp", "SnpDevice", "certificate_table"]

_MAX_CERTIFICATE = 64 << 10
_MAX_ENDORSEMENTS = 16
_SUFFIXES = frozenset({".der", ".pem", ".crt", ".cer"})
_DEVICE = Path("/dev/sev-guest")
_NEEDS = "Run the worker in a SEV-SNP guest with the sev-guest module loaded, as a user that may open the device."


class SnpDevice:
    """``SNP_GET_EXT_REPORT`` and ``SNP_GET_REPORT``.

    The argument of both is ``struct snp_guest_request_ioctl``: message version (u8, padded to 8), the addresses of
    request and response (u64 each), and the error, firmware's in the low half and the host's in the high one.
    """

    GET_REPORT: ClassVar[int] = iowr(ord("S"), 0, 32)
    GET_EXT_REPORT: ClassVar[int] = iowr(ord("S"), 2, 32)
    TABLE_BYTES: ClassVar[int] = 0x4000
    """``SEV_FW_BLOB_MAX_SIZE``: the largest table for which the kernel has room."""

    _ARGUMENT = struct.Struct("<B7xQQQ")
    _REQUEST = struct.Struct("<64sI28x")
    _EXTENDED = struct.Struct("<64sI28xQI4x")
    _RESPONSE_BYTES = 4000
    _RESPONSE = struct.Struct("<II24x")  # status, size of the report; the report follows
    _MESSAGE_VERSION = 1
    _TABLE_TOO_SMALL = 1  # SNP_GUEST_VMM_ERR_INVALID_LEN

    def __init__(self, path: Path = _DEVICE, ioctl: Ioctl = kernel_ioctl) -> None:
        self._device = Device(path, _NEEDS, ioctl)

    @property
    def path(self) -> Path:
        return self._device.path

    @property
    def exists(self) -> bool:
        return self._device.exists

    def read(self, report_data: bytes, privilege: int | None = None) -> TsmReport:
        """A report over 64 bytes with the host's table of certificates, or without where that is larger than the
        kernel can take. Raises :class:`UnavailableError`."""
        vmpl = privilege or 0
        table = ctypes.create_string_buffer(self.TABLE_BYTES)
        extended = self._EXTENDED.pack(report_data, vmpl, ctypes.addressof(table), self.TABLE_BYTES)
        report, host_error = self._ask(self.GET_EXT_REPORT, extended)
        if report is not None:
            return TsmReport(report, table.raw if any(table.raw) else b"")
        if host_error != self._TABLE_TOO_SMALL:
            raise self._refused(host_error)
        report, host_error = self._ask(self.GET_REPORT, self._REQUEST.pack(report_data, vmpl))
        if report is None:
            raise self._refused(host_error)
        return TsmReport(report, b"")

    def _ask(self, number: int, request: bytes) -> tuple[bytes | None, int]:
        """The report; or ``None`` and the host's error. Raises :class:`UnavailableError`."""
        asked = ctypes.create_string_buffer(request, len(request))
        answer = ctypes.create_string_buffer(self._RESPONSE_BYTES)
        argument = bytearray(
            self._ARGUMENT.pack(self._MESSAGE_VERSION, ctypes.addressof(asked), ctypes.addressof(answer), 0)
        )
        with self._device.opened() as exchange:
            try:
                exchange(number, argument)
            except OSError as error:
                host_error = self._ARGUMENT.unpack(argument)[3] >> 32
                if host_error:
                    return None, host_error
                raise self._device.failed("gave no report", error) from None
        status, size = self._RESPONSE.unpack_from(answer.raw)
        if status or size != REPORT_BYTES:
            raise unavailable(
                "the firmware's answer holds no SEV-SNP report",
                expected=f"status 0 and {REPORT_BYTES} bytes",
                actual=f"status {status:#x} and {size} bytes",
                next_step="Status 0x16 is for parameters that are not allowed: is `vmpl` in worker.toml this guest's?",
            )
        start = self._RESPONSE.size
        return answer.raw[start : start + REPORT_BYTES], 0

    def _refused(self, host_error: int) -> UnavailableError:
        return unavailable(
            "the host refused the guest's request for a report",
            expected="no error of the host",
            actual=f"error {host_error:#x}",
            next_step="Error 2 says that the host was busy: try again.",
        )


class SevSnp:
    """The SEV-SNP evidence of this guest: configfs-tsm where the kernel has it, else the device."""

    type: ClassVar[str] = "sev-snp"
    development: ClassVar[bool] = False

    def __init__(
        self,
        tsm: TsmReports,
        device: SnpDevice,
        *,
        endorsements: Path | None = None,
        vmpl: int | None = None,
    ) -> None:
        self._tsm = tsm
        self._device = device
        self._endorsements = endorsements
        self._vmpl = vmpl

    @classmethod
    def from_section(cls, section: Fields, base: Path) -> Callable[[], SevSnp]:
        """``[sev-snp]`` of worker.toml."""
        root = base / section.text("report_dir") if "report_dir" in section else TsmReports.DEFAULT_ROOT
        device = base / section.text("device") if "device" in section else _DEVICE
        endorsements = base / section.text("endorsements", max_length=4096) if "endorsements" in section else None
        vmpl = section.integer("vmpl", 0, 3) if "vmpl" in section else None
        section.done()
        return lambda: cls(TsmReports("sev_guest", root), SnpDevice(device), endorsements=endorsements, vmpl=vmpl)

    def collect(self, binding: Binding) -> EvidenceItem:
        if not self._tsm.exists and not self._device.exists:
            raise unavailable(
                "this machine offers no SEV-SNP reports",
                expected=f"the folder {self._tsm.root} (configfs-tsm), or the device {self._device.path}",
                actual="neither",
                next_step="Run the worker in a SEV-SNP guest with the sev-guest module loaded and, for configfs-tsm, "
                "Linux 6.7 or later with configfs mounted; or configure [development] for a machine without a TEE.",
            )
        source = self._tsm if self._tsm.exists else self._device
        report = source.read(binding.report_data, self._vmpl)
        if len(report.signed) != REPORT_BYTES:
            raise unavailable(
                "the kernel's report is no SEV-SNP report",
                expected=f"{REPORT_BYTES} bytes",
                actual=f"{len(report.signed)} bytes",
                next_step="Compare the kernel's and the guest's versions.",
            )
        return EvidenceItem(self.type, report.signed, self._endorsing(report.auxiliary))

    def _endorsing(self, table: bytes) -> tuple[bytes, ...]:
        found = certificate_table(table) if table else ()
        if not found and self._endorsements is not None:
            next_step = "Correct `endorsements` in worker.toml."
            found = read_folder(self._endorsements, "the configured endorsements", _SUFFIXES, next_step)
        if not found:
            raise unavailable(
                "the report has no endorsements",
                expected="certificates from the host, or files in `endorsements` of worker.toml",
                actual="none",
                next_step="Ask the provider for the chip's VCEK or VLEK chain, or fetch it from AMD's key server.",
            )
        return found[:_MAX_ENDORSEMENTS]


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
