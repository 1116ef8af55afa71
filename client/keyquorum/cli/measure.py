"""``keyquorum attest measure``: what evidence of an image must say, computed from the image itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keyquorum.cli import output

__all__ = ["app"]

app = typer.Typer(
    name="measure",
    help="Compute measurements from images, rather than copy them from a running host.",
    no_args_is_help=True,
)
_MAX_FIRMWARE = 64 << 20
_MAX_FILE = 1 << 30

KernelOption = Annotated[Path | None, typer.Option(help="A kernel that the hypervisor boots directly.")]
InitrdOption = Annotated[Path | None, typer.Option(help="Its initrd.")]
CmdlineOption = Annotated[str, typer.Option(help="Its command line, exactly as the hypervisor gets it.")]


@app.callback()
def group() -> None:
    """Compute measurements from images, rather than copy them from a running host."""


@app.command()
def snp(
    ovmf: Annotated[Path, typer.Option(help="The firmware image that the guest starts with.")],
    vcpus: Annotated[int, typer.Option(help="Virtual CPUs of the guest.")],
    cpu: Annotated[
        str, typer.Option(help="QEMU's CPU model (EPYC-Milan, EPYC-Genoa-v1, …), or FAMILY.MODEL.STEPPING.")
    ] = "EPYC-Milan",
    kernel: KernelOption = None,
    initrd: InitrdOption = None,
    cmdline: CmdlineOption = "",
    guest_features: Annotated[int, typer.Option(help="SEV_FEATURES of the guest; 1 is SEV-SNP alone.")] = 1,
    hypervisor: Annotated[str, typer.Option(help="qemu, ec2 or gce.")] = "qemu",
    as_json: output.JsonOption = False,
) -> None:
    """The launch measurement of an SEV-SNP guest.

    Not covered: guests under an SVSM or from an IGVM file (so none of Hyper-V's), hypervisors other than the three,
    and anything that is loaded after the launch: that is the image's own to verify.
    """
    from keyquorum_core.attestation.snp_measure import DirectBoot, snp_measurement

    if kernel is None and (initrd is not None or cmdline):
        raise typer.BadParameter("--initrd and --cmdline go with --kernel")
    boot = None
    if kernel is not None:
        boot = DirectBoot(_read(kernel, "kernel"), b"" if initrd is None else _read(initrd, "initrd"), cmdline)
    measurement = snp_measurement(
        _read(ovmf, "firmware image", _MAX_FIRMWARE),
        cpus=vcpus,
        signature=_signature(cpu),
        guest_features=guest_features,
        hypervisor=hypervisor,
        boot=boot,
    )
    _show({"measurement": measurement.hex()}, as_json)


@app.command()
def tdx(
    tdvf: Annotated[Path, typer.Option(help="The firmware image (TDVF) that the TD starts with.")],
    kernel: KernelOption = None,
    initrd: InitrdOption = None,
    cmdline: CmdlineOption = "",
    event_log: Annotated[
        Path | None, typer.Option(help="An event log (CCEL) to take RTMR0–3 from: only of a machine that you trust.")
    ] = None,
    two_passes: Annotated[
        bool, typer.Option("--two-passes", help="The hypervisor adds all pages of a section, then measures them.")
    ] = False,
    as_json: output.JsonOption = False,
) -> None:
    """MRTD of a TD; with --kernel RTMR1 to RTMR3 of QEMU's direct boot under edk2; with --event-log all from it.

    Not covered: RTMR0, which depends on memory map, ACPI tables and variables of the machine's shape, and the RTMRs
    under a boot loader. Both need an event log.
    """
    from keyquorum_core.attestation.tdx_measure import direct_boot_rtmrs, tdx_mrtd, tdx_rtmrs

    if kernel is None and (initrd is not None or cmdline):
        raise typer.BadParameter("--initrd and --cmdline go with --kernel")
    if kernel is not None and event_log is not None:
        raise typer.BadParameter("the registers come from --kernel or from --event-log")
    out = {"mrtd": tdx_mrtd(_read(tdvf, "firmware image", _MAX_FIRMWARE), two_passes=two_passes).hex()}
    if kernel is not None:
        rtmr1, rtmr2 = direct_boot_rtmrs(
            _read(kernel, "kernel"), b"" if initrd is None else _read(initrd, "initrd"), cmdline
        )
        out |= {"rtmr1": rtmr1.hex(), "rtmr2": rtmr2.hex(), "rtmr3": bytes(48).hex()}
    if event_log is not None:
        registers, events = tdx_rtmrs(_read(event_log, "event log", _MAX_FIRMWARE))
        out |= {f"rtmr{number}": each.hex() for number, each in enumerate(registers)}
        if not as_json:
            output.table(
                "Events",
                ("register", "type", "digest", "of its own data"),
                [
                    (each.register, f"{each.type:#x}", each.digest.hex(), "yes" if each.data_is_measured else "no")
                    for each in events
                ],
            )
    _show(out, as_json)


def _signature(cpu: str) -> int:
    from keyquorum_core.attestation.snp_measure import CPU_MODELS, cpu_signature

    model, _, version = cpu.rpartition("-v")
    found = CPU_MODELS.get(model if model and version.isdigit() else cpu)
    if found is None:
        numbers = cpu.split(".")
        if len(numbers) != 3 or not all(each.isascii() and each.isdigit() for each in numbers):
            raise typer.BadParameter(
                f"{cpu!r} is neither FAMILY.MODEL.STEPPING nor one of {', '.join(CPU_MODELS)}", param_hint="--cpu"
            )
        found = (int(numbers[0]), int(numbers[1]), int(numbers[2]))
    return cpu_signature(*found)


def _read(path: Path, what: str, max_bytes: int = _MAX_FILE) -> bytes:
    from keyquorum_protos.wire.files import read_bytes

    return read_bytes(path, what, max_bytes=max_bytes)


def _show(values: dict[str, str], as_json: bool) -> None:
    if as_json:
        output.emit(values)
    for name, value in () if as_json else values.items():
        output.line(f"{name}: {value}")
