"""NVIDIA GPU verification: is this attestation report genuine, and does it match the vendor's manifests? (DESIGN §7)

Checks of :func:`verify`, in order; each one refuses, none can be turned off:

1. one SPDM 1.1 exchange, strictly parsed, nothing after it      ``MALFORMED``, ``TOO_LARGE``, ``UNSUPPORTED``
2. five certificates, from the firmware's key to a pinned root
   (:mod:`~keyquorum_core.attestation.nvidia_certificates`)
                          ``MALFORMED``, ``CHAIN``, ``ROOT_NOT_PINNED``, ``PROVENANCE``, ``DEBUG_ENABLED``
3. all five are valid at ``now``                                           ``NOT_YET_VALID``, ``EXPIRED``
4. the signature over request and response, r and s 48 bytes each, big-endian                 ``SIGNATURE``
5. the firmware certificate holds a FWID (in 2), and the report's, where it states one, is the same
                                                                                            ``MEASUREMENT``
6. the report's architecture is that of the chip in the certificates                              ``CHAIN``

Checks of :func:`check_golden` on a genuine report and genuine RIMs:

7. at least one RIM                                                                         ``MEASUREMENT``
8. each RIM is for this chip, and for the driver or the VBIOS that the report names, one at most for each: a RIM for
   another board or another driver is refused                                               ``MEASUREMENT``
9. no index is active in the driver's RIM and the VBIOS's                                    ``MEASUREMENT``
10. each active golden value: the report has the block (index i is block i + 1), it is a SHA-384 digest, and equals one
    of the alternatives                                                                     ``MEASUREMENT``

A VBIOS version is given out for one board, and a RIM holds nothing else that names the board; NVIDIA's service names
RIMs by project, SKUs and version (:attr:`~keyquorum_core.attestation.nvidia_report.Report.vbios_rim_id`), and that name
is not signed. Measurement 35 is left out where the report says that the engine whose firmware it is (NVDEC0) is
disabled, as NVIDIA's verifier does: then it is nothing that runs.

Checks of the mode, and whose word they rest on:

11. :func:`check_mode`: the report does not say protected PCIe, a mode for eight GPUs that leaves the links between them
    in the clear and trusts switches that nobody attested here; nor a mode that is not known  ``UNSUPPORTED``
12. :func:`check_nonce`: the report's nonce is the expected one, 32 bytes and not zero            ``BINDING``
13. :func:`check_distinct`: no GPU is shown twice                                              ``PROVENANCE``

No field of a report says that developer tools are off. NVIDIA's verifier concludes it from *all* golden values, driver
and VBIOS, being met (its claims ``dbgstat`` and ``secboot``), and asks the driver. Both are required for a release:
:mod:`~keyquorum_core.attestation.nvidia_appraisal`.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from keyquorum_core.attestation.findings import Finding, finding, require
from keyquorum_core.attestation.nvidia_certificates import Device, check_validity, read_certificates, verify_device
from keyquorum_core.attestation.nvidia_report import NONCE_BYTES, Report, parse_report, read_report
from keyquorum_core.attestation.nvidia_rim import Golden, Rim
from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = [
    "GoldenMatch",
    "Report",
    "VerifiedGpu",
    "check_distinct",
    "check_golden",
    "check_has_nonce",
    "check_mode",
    "check_nonce",
    "compare_golden",
    "parse_report",
    "read_report",
    "verify",
]

NVDEC0_INDEX = 35

_ARCHITECTURES = {0x180: "GH1", 0x1A0: "GB1", 0x1B0: "GB2"}  # what the names of the chips begin with
_MODES = {None: "not in the report", 0: "single GPU", 1: "several GPUs", 2: "protected PCIe"}
_PROTECTED_PCIE = 2


@dataclass(frozen=True, slots=True)
class VerifiedGpu:
    """A genuine report with what its chain says of the GPU."""

    report: Report
    device: Device

    @property
    def not_before(self) -> int:
        return max(each.not_before for each in self.device.chain)

    @property
    def not_after(self) -> int:
        """Unix seconds: the last moment at which all certificates are valid."""
        return min(each.not_after for each in self.device.chain)

    def claims(self) -> dict[str, object]:
        """What the report and its chain say, for people and ``--json``."""
        report, device = self.report, self.device
        return {
            "chip": device.chip,
            "hardware_id": device.serial,
            "device_info": device.device_info,
            "root": device.root,
            "development": device.development,
            "nonce": report.nonce.hex(),
            "driver_version": report.driver_version,
            "vbios_version": report.vbios_version,
            "vbios_rim_id": report.vbios_rim_id,
            "architecture": f"{report.architecture:#x}",
            "project": report.project,
            "project_sku": report.project_sku,
            "chip_sku": report.chip_sku,
            "board_id": f"{report.board_id:#x}",
            "fwid": device.fwid.hex(),
            "fwid_in_report": bool(report.fwid),
            "mode": _MODES.get(report.feature_flag, f"unknown, {report.feature_flag}"),
            "protected_pcie": report.protected_pcie,
            "measurements": {str(index): block.value.hex() for index, block in report.blocks.items()},
        }


@dataclass(frozen=True, slots=True)
class GoldenMatch:
    """What was compared and found equal."""

    driver: Rim | None
    vbios: Rim | None
    compared: Mapping[int, str]
    """Index in the RIM to the measurement's name."""

    @property
    def complete(self) -> bool:
        """Both manifests were there, which is when NVIDIA's verifier calls debugging disabled."""
        return self.driver is not None and self.vbios is not None


def verify(report: bytes, chain: Sequence[bytes], *, pinned_roots: Collection[str], now: int) -> VerifiedGpu:
    """Verify a raw report with its chain (DER or PEM, the firmware's certificate first) at ``now`` (unix seconds).

    ``pinned_roots`` are SHA-256 digests of SubjectPublicKeyInfo in lower-case hex.
    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    parsed = parse_report(report)
    device = verify_device(read_certificates(chain), pinned_roots)
    check_validity(device.chain, now)
    try:
        device.public_key.verify(encode_dss_signature(*parsed.signature), parsed.signed, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        raise RefusedError(
            Reason.SIGNATURE,
            f"the report's signature does not verify with the key of {device.device_info}",
            next_step="check that the chain is that of the GPU and of the firmware it runs now",
        ) from None
    if parsed.fwid and not hmac.compare_digest(parsed.fwid, device.fwid):
        raise RefusedError(
            Reason.MEASUREMENT,
            "the report comes from other firmware than its key belongs to",
            expected=f"FWID {device.fwid.hex()}",
            actual=parsed.fwid.hex(),
        )
    family = _ARCHITECTURES.get(parsed.architecture)
    if family is None or not device.chip.startswith(family):
        raise RefusedError(
            Reason.CHAIN,
            "the report comes from a chip of another architecture than the certificates",
            expected=f"the architecture of {device.chip}",
            actual=f"{parsed.architecture:#x}, {family or 'not known'}",
        )
    return VerifiedGpu(parsed, device)


def check_golden(verified: VerifiedGpu, rims: Sequence[Rim]) -> GoldenMatch:
    """Checks 7 to 10. Raises :class:`RefusedError` ``MEASUREMENT``."""
    findings, match = compare_golden(verified, rims)
    require(findings)
    return match


def compare_golden(verified: VerifiedGpu, rims: Sequence[Rim]) -> tuple[list[Finding], GoldenMatch]:
    """Checks 7 to 10, each golden value a finding of its own."""
    roles, findings = _roles(verified, rims)
    golden: dict[int, tuple[str, Golden]] = {}
    for role, rim in roles.items():
        for index, value in rim.golden.items():
            if index in golden:
                findings.append(_mismatch(index, f"{index} is claimed by both RIMs", "one of driver and VBIOS", "both"))
            golden[index] = (role, value)
    compared: dict[int, str] = {}
    for index, (role, value) in sorted(golden.items()):
        if index == NVDEC0_INDEX and not verified.report.nvdec0_enabled:
            continue
        block = verified.report.blocks.get(index + 1)
        if block is None or not block.is_digest:
            shown = "none" if block is None else f"type {block.value_type:#x}, {len(block.value)} bytes"
            message = f"{index} of the {role} is not in the report as a SHA-384 digest"
            findings.append(_mismatch(index, message, f"block {index + 1}", shown))
            continue
        met = any(hmac.compare_digest(block.value, each) for each in value.alternatives)
        findings.append(
            finding(
                met,
                f"measurement.{index}",
                Reason.MEASUREMENT,
                f"measurement {index} of the {role} ({value.name}) is not a golden one",
                expected=" or ".join(each.hex() for each in value.alternatives),
                actual=block.value.hex(),
            )
        )
        if met:
            compared[index] = value.name
    if not compared and all(each.ok for each in findings):
        findings.append(
            finding(
                False,
                "measurements",
                Reason.MEASUREMENT,
                "no measurement could be compared",
                expected="at least one",
                actual="none",
            )
        )
    return findings, GoldenMatch(roles.get("driver"), roles.get("VBIOS"), MappingProxyType(compared))


def check_mode(verified: VerifiedGpu) -> None:
    """Check 11. Raises :class:`RefusedError` ``UNSUPPORTED``."""
    report = verified.report
    if report.protected_pcie or report.feature_flag == _PROTECTED_PCIE:
        raise RefusedError(
            Reason.UNSUPPORTED,
            "the GPU is in protected PCIe mode, which relies on switches that are not attested here",
            expected="confidential computing",
            actual="protected PCIe",
        )
    if report.feature_flag not in _MODES:
        raise RefusedError(
            Reason.UNSUPPORTED, "the GPU is in a mode that is not known", expected="0 or 1", actual=report.feature_flag
        )


def check_has_nonce(verified: VerifiedGpu) -> None:
    """The part of check 12 that needs no expected value. Raises :class:`RefusedError` ``BINDING``."""
    if not any(verified.report.nonce):
        raise RefusedError(
            Reason.BINDING,
            "the report answers an empty nonce, and so any challenge",
            expected=f"a nonce of {NONCE_BYTES} bytes",
            actual="zeros",
        )


def check_nonce(verified: VerifiedGpu, expected: bytes) -> None:
    """Check 12. Raises :class:`RefusedError` ``BINDING``, and :class:`MalformedError` for no nonce to expect."""
    if len(expected) != NONCE_BYTES or not any(expected):
        raise MalformedError(
            Reason.MALFORMED,
            "no nonce to compare with",
            expected=f"{NONCE_BYTES} bytes, not zero",
            actual=f"{len(expected)} bytes",
        )
    check_has_nonce(verified)
    if not hmac.compare_digest(verified.report.nonce, expected):
        raise RefusedError(
            Reason.BINDING,
            "the report does not answer this challenge",
            expected=f"nonce {expected.hex()}",
            actual=verified.report.nonce.hex(),
        )


def check_distinct(gpus: Sequence[VerifiedGpu]) -> None:
    """Check 13: by the device's serial number, its key and its identifier, each of which is one GPU's only.

    Raises :class:`RefusedError` ``PROVENANCE``.
    """
    seen: dict[str, int] = {}
    for position, gpu in enumerate(gpus):
        for identity in (gpu.device.serial, gpu.device.device_key, gpu.device.device_info):
            if seen.setdefault(identity, position) != position:
                raise RefusedError(
                    Reason.PROVENANCE,
                    f"reports {seen[identity]} and {position} come from one GPU",
                    expected="each GPU once",
                    actual=gpu.device.device_info,
                )


def _roles(verified: VerifiedGpu, rims: Sequence[Rim]) -> tuple[dict[str, Rim], list[Finding]]:
    """Checks 7 and 8."""
    report, chip = verified.report, verified.device.chip
    versions = {report.driver_version: "driver", report.vbios_version: "VBIOS"}
    roles: dict[str, Rim] = {}
    findings = [
        finding(
            bool(rims),
            "golden_values",
            Reason.MEASUREMENT,
            "there is no RIM to compare with",
            expected="a RIM with golden values",
            actual=f"{len(rims)} RIMs",
        )
    ]
    for rim in rims:
        role = versions.get(rim.version) if rim.product == chip else None
        if role is None:
            message = "a RIM is for another board or another driver"
            expected, actual = f"{chip} with {' or '.join(versions)}", f"{rim.product} with {rim.version}"
        elif role in roles:
            message, expected, actual = f"there are two RIMs for the {role}", "one", rim.version
        else:
            roles[role] = rim
            continue
        findings.append(finding(False, "rim", Reason.MEASUREMENT, message, expected=expected, actual=actual))
    return roles, findings


def _mismatch(index: int, message: str, expected: str, actual: str) -> Finding:
    return finding(
        False,
        f"measurement.{index}",
        Reason.MEASUREMENT,
        f"measurement {message}",
        expected=expected,
        actual=actual,
    )
