"""TDX quotes, through configfs-tsm or the ioctl of ``/dev/tdx_guest`` (include/uapi/linux/tdx-guest.h).

The kernel's ioctl gives a TDREPORT, whose MAC only the CPU that made it can check. A quote, which others can check, is
made of it by Intel's quoting enclave, which runs on the host: configfs-tsm asks the hypervisor to have it made, and
where that is not there, a quote generation service can be asked over vsock (:mod:`.quoting`).

Everything is offline, so Intel's collateral comes from a file that somebody keeps fresh: its parts are signed and good
for thirty days.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Protocol

from keyquorum_core.attestation.evidence import EvidenceItem
from keyquorum_core.attestation.tdx_collateral import MAX_COLLATERAL_BYTES
from keyquorum_core.attestation.tdx_events import MAX_EVENT_LOG_BYTES
from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.strictjson import Fields
from keyquorum_gpu_worker.evidence.device import Device, Ioctl, iowr, kernel_ioctl
from keyquorum_gpu_worker.evidence.quoting import QuotingService
from keyquorum_gpu_worker.evidence.source import Binding, read_bounded, unavailable
from keyquorum_gpu_worker.evidence.tsm import TsmReports

__all__ = ["QuoteMaker", "Tdx", "TdxDevice", "cut_quote"]

_DEVICE = Path("/dev/tdx_guest")
_NEEDS = "Run the worker in a TDX guest with the tdx-guest module loaded, as a user that may open the device."
_HEADER_BYTES = 48
_BODY_BYTES = 584  # TD 1.0, the only one of a version 4 quote


class QuoteMaker(Protocol):
    """Makes a quote of a TDREPORT."""

    def quote(self, td_report: bytes) -> bytes: ...


class TdxDevice:
    """``TDX_CMD_GET_REPORT0``: 64 bytes of report data in, followed by 1024 bytes of TDREPORT out."""

    GET_REPORT0: ClassVar[int] = iowr(ord("T"), 1, 64 + 1024)
    REPORT_BYTES: ClassVar[int] = 1024

    _REPORT_DATA_AT = 128  # REPORTMACSTRUCT: type 4, reserved 12, CPUSVN 16, two hashes of 48, REPORTDATA 64
    _TEE_TYPE = 0x81

    def __init__(self, path: Path = _DEVICE, ioctl: Ioctl = kernel_ioctl) -> None:
        self._device = Device(path, _NEEDS, ioctl)

    @property
    def path(self) -> Path:
        return self._device.path

    @property
    def exists(self) -> bool:
        return self._device.exists

    def read(self, report_data: bytes) -> bytes:
        """A TDREPORT over 64 bytes. Raises :class:`UnavailableError`."""
        argument = bytearray(report_data + bytes(self.REPORT_BYTES))
        with self._device.opened() as exchange:
            try:
                exchange(self.GET_REPORT0, argument)
            except OSError as error:
                raise self._device.failed("gave no TDREPORT", error) from None
        report = bytes(argument[len(report_data) :])
        bound = report[self._REPORT_DATA_AT : self._REPORT_DATA_AT + len(report_data)]
        if report[0] != self._TEE_TYPE or bound != report_data:
            raise unavailable(
                "the kernel's TDREPORT is not the one asked for",
                expected=f"type {self._TEE_TYPE:#x} with our report data",
                actual=f"type {report[0]:#x} with {'ours' if bound == report_data else 'other data'}",
                next_step="Compare the kernel's and the hypervisor's versions.",
            )
        return report


class Tdx:
    """The TDX evidence of this guest: configfs-tsm where the kernel has it, else the device and a quoting service."""

    type: ClassVar[str] = "tdx"
    development: ClassVar[bool] = False
    EVENT_LOG: ClassVar[Path] = Path("/sys/firmware/acpi/tables/data/CCEL")

    def __init__(
        self,
        tsm: TsmReports,
        device: TdxDevice,
        collateral: Path,
        *,
        quoting: QuoteMaker | None = None,
        event_log: Path | None = None,
    ) -> None:
        self._tsm = tsm
        self._device = device
        self._collateral = collateral
        self._quoting = quoting
        self._event_log = event_log

    @classmethod
    def from_section(cls, section: Fields, base: Path) -> Callable[[], Tdx]:
        """``[tdx]`` of worker.toml."""
        root = base / section.text("report_dir") if "report_dir" in section else TsmReports.DEFAULT_ROOT
        device = base / section.text("device") if "device" in section else _DEVICE
        collateral = base / section.text("collateral", max_length=4096)
        quoting = QuotingService(section.integer("quoting_port", 1, 0xFFFFFFFE)) if "quoting_port" in section else None
        event_log = base / section.text("event_log", max_length=4096) if "event_log" in section else None
        section.done()
        return lambda: cls(
            TsmReports("tdx_guest", root), TdxDevice(device), collateral, quoting=quoting, event_log=event_log
        )

    def collect(self, binding: Binding) -> EvidenceItem:
        collateral = read_bounded(
            self._collateral,
            "the TDX collateral",
            MAX_COLLATERAL_BYTES,
            "Fetch it from Intel's PCS or a PCCS for this platform, and keep it fresh: it is good for 30 days.",
        )
        quote = cut_quote(self._quote(binding.report_data))
        log = () if self._event_log is None else (self._read_log(self._event_log),)
        return EvidenceItem(self.type, quote, (collateral, *log))

    @staticmethod
    def _read_log(path: Path) -> bytes:
        return read_bounded(
            path,
            "the TDX event log",
            MAX_EVENT_LOG_BYTES,
            f"Linux has it in {Tdx.EVENT_LOG}, for root; without a log, leave `event_log` out of worker.toml.",
        )

    def _quote(self, report_data: bytes) -> bytes:
        if self._tsm.exists:
            return self._tsm.read(report_data).signed
        if not self._device.exists:
            raise unavailable(
                "this machine offers no TDX quotes",
                expected=f"the folder {self._tsm.root} (configfs-tsm), or the device {self._device.path}",
                actual="neither",
                next_step="Run the worker in a TDX guest with the tdx-guest module loaded and, for configfs-tsm, "
                "Linux 6.7 or later with configfs mounted.",
            )
        if self._quoting is None:
            raise unavailable(
                "the device gives a TDREPORT, which only this machine's CPU can check, and nothing makes a quote of it",
                expected=f"the folder {self._tsm.root} (configfs-tsm), or `quoting_port` in worker.toml",
                actual=f"only the device {self._device.path}",
                next_step="Use Linux 6.7 or later, or name the vsock port of the host's quote generation service.",
            )
        return self._quoting.quote(self._device.read(report_data))


def cut_quote(data: bytes) -> bytes:
    """The quote at the start of a buffer that zeros fill up.

    Its length follows from its version, the size of its body (version 5) and that of its signature data. Raises
    :class:`MalformedError` where the buffer is shorter, or holds anything else after the quote.
    """
    version = int.from_bytes(data[:2], "little")
    at = _HEADER_BYTES + _BODY_BYTES
    if version == 5:  # a descriptor: type (u16) and size (u32) of the body
        at = _HEADER_BYTES + 6 + int.from_bytes(data[_HEADER_BYTES + 2 : _HEADER_BYTES + 6], "little")
    end = at + 4 + int.from_bytes(data[at : at + 4], "little")
    if version not in (4, 5) or len(data) < at + 4 or end > len(data) or any(data[end:]):
        raise MalformedError(
            Reason.MALFORMED,
            "what the quoting service gave is no TDX quote",
            expected="a quote of version 4 or 5, and nothing but zeros after it",
            actual=f"version {version} and {len(data)} bytes",
        )
    return data[:end]
