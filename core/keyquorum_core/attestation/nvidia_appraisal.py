"""NVIDIA GPUs: appraisal of the evidence of a worker (docs/spec/evidence-nvidia.md).

Do we accept a worker's GPUs? :func:`appraise` makes these checks, in this order, and refuses at the first that fails:

1. the evidence of each item is one canonical JSON value with one to sixteen GPUs       ``MALFORMED``
2. what the worker read from its driver: production, confidential computing on, developer tools off, no
   protected PCIe                                ``MEASUREMENT``, ``DEBUG_ENABLED``, ``UNSUPPORTED``
3. each report is genuine (:mod:`~keyquorum_core.attestation.nvidia_gpu`)                that module's reasons
4. no GPU is shown twice, in one item or in two                                          ``PROVENANCE``
5. each report answers this challenge                                                    ``BINDING``
6. each RIM is genuine (:mod:`~keyquorum_core.attestation.nvidia_rim`), and used         that module's reasons
7. OCSP responses that are there are verified, and all are there where they are required
   (:mod:`~keyquorum_core.attestation.nvidia_ocsp`)                                      that module's reasons
8. the roots are ones that the reference values name, and development roots only where they name them as such
                                                                                         ``ROOT_NOT_PINNED``
9. no report says that its GPU is in another mode than confidential computing            ``UNSUPPORTED``
10. each report states its firmware (FWID), and it is the signing key's                  ``MEASUREMENT``
11. chip, driver and VBIOS versions are in the allowlists, and grace periods have not ended  ``TCB``
12. both RIMs, driver and VBIOS, are there for each GPU, and all golden values are met   ``MEASUREMENT``

Check 2 is the worker's word. It is worth what the CPU evidence makes it worth: that measures the software which read
the settings, and its report data binds the digest of this evidence. GPU evidence is not to be accepted without it.
Check 12 is the GPU's: NVIDIA's verifier, too, calls debugging disabled when all golden values are met.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from keyquorum_core.attestation.findings import Finding, attempt, finding, require
from keyquorum_core.attestation.nvidia_certificates import Certificate
from keyquorum_core.attestation.nvidia_evidence import PRODUCTION, GpuEvidence, NvidiaSettings
from keyquorum_core.attestation.nvidia_gpu import (
    GoldenMatch,
    VerifiedGpu,
    check_distinct,
    check_mode,
    check_nonce,
    compare_golden,
    verify,
)
from keyquorum_core.attestation.nvidia_ocsp import Revocation, looks_like_ocsp, require_responses, verify_revocation
from keyquorum_core.attestation.nvidia_reference import NvidiaReferenceValues, Versions
from keyquorum_core.attestation.nvidia_rim import Rim, looks_like_rim, verify_rim
from keyquorum_core.attestation.roots import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS
from keyquorum_core.errors import MalformedError, Reason

__all__ = ["AppraisedGpus", "appraise", "check_settings", "evaluate"]


@dataclass(frozen=True, slots=True)
class AppraisedGpus:
    """What follows from GPUs, if every finding about them is met."""

    gpus: tuple[VerifiedGpu, ...]
    matches: tuple[GoldenMatch, ...]
    hardware_ids: tuple[str, ...]
    """The device certificates' serial numbers in hex: the keys into the inventory."""
    development: bool
    not_before: int
    not_after: int
    """Unix seconds: the window common to all certificates, to OCSP responses, and to grace periods that were needed."""


def appraise(
    evidence: Sequence[bytes],
    endorsements: Sequence[bytes],
    reference: NvidiaReferenceValues,
    *,
    expected_nonce: bytes,
    now: int,
) -> AppraisedGpus:
    """Appraise the evidence of all of a worker's items with their RIMs (XML) and OCSP responses (DER) at ``now`` (unix
    seconds).

    ``expected_nonce`` is that of :func:`~keyquorum_core.attestation.binding.gpu_nonce`.
    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    shown = [GpuEvidence.parse(each) for each in evidence]
    for each in shown:
        require(check_settings(each.settings))
    gpus = tuple(
        verify(gpu.report, gpu.chain, pinned_roots=reference.pinned_roots, now=now)
        for each in shown
        for gpu in each.gpus
    )
    check_distinct(gpus)
    for gpu in gpus:
        check_nonce(gpu, expected_nonce)
    rims = tuple(
        verify_rim(each, pinned_roots=reference.pinned_rim_roots, now=now)
        for each in endorsements
        if looks_like_rim(each)
    )
    responses = tuple(each for each in endorsements if not looks_like_rim(each))
    if not all(looks_like_ocsp(each) for each in responses):
        raise MalformedError(
            Reason.MALFORMED, "an endorsement of another kind", expected="RIMs and OCSP responses", actual="another"
        )
    findings, appraised = evaluate(gpus, rims, responses, reference, now=now)
    require(findings)
    return appraised


def evaluate(
    gpus: Sequence[VerifiedGpu],
    rims: Sequence[Rim],
    responses: Sequence[bytes],
    reference: NvidiaReferenceValues,
    *,
    now: int,
) -> tuple[list[Finding], AppraisedGpus]:
    """Checks 7 to 12 on genuine reports and RIMs; ``responses`` are OCSP responses, which are verified here."""
    chains = [*(each.device.chain for each in gpus), *(each.chain for each in rims)]
    ends = [each.not_after for chain in chains for each in chain]
    starts = [each.not_before for chain in chains for each in chain]
    findings: list[Finding] = []
    known: list[Revocation] = []

    def check_revocation() -> str:
        revocation = verify_revocation(responses, chains, now=now, max_age=reference.max_revocation_age)
        if reference.require_revocation:
            require_responses(revocation, _revocable(gpus, rims))
        known.append(revocation)
        return f"{len(revocation.good)} certificates are good"

    wanted = "a good response for every certificate" if reference.require_revocation else "good responses, or none"
    findings.append(attempt("revocation", wanted, check_revocation))
    for revocation in known:
        starts.append(revocation.not_before)
        ends.append(revocation.not_after)
    findings += _roots(gpus, rims, reference)
    matches: list[GoldenMatch] = []
    for number, gpu in enumerate(gpus):
        about, match = _gpu(f"gpu {number}", gpu, rims, reference, now, ends)
        findings += about
        matches.append(match)
    used = {rim.sha256 for match in matches for rim in (match.driver, match.vbios) if rim is not None}
    unused = [each.version for each in rims if each.sha256 not in used]
    twice = len({each.sha256 for each in rims}) != len(rims)
    findings.append(
        finding(
            not unused and not twice,
            "rims",
            Reason.MEASUREMENT,
            "a RIM is given twice, or belongs to none of the GPUs",
            expected="the RIMs of these GPUs, each once",
            actual=", ".join(unused) or ("a repetition" if twice else f"{len(rims)} of them"),
        )
    )
    return findings, AppraisedGpus(
        gpus=tuple(gpus),
        matches=tuple(matches),
        hardware_ids=tuple(each.device.serial for each in gpus),
        development=any(each.device.development for each in gpus) or any(each.development for each in rims),
        not_before=max(starts),
        not_after=min(ends),
    )


def check_settings(settings: NvidiaSettings) -> Iterator[Finding]:
    """Check 2."""
    yield finding(
        not settings.developer_tools,
        "settings.developer_tools",
        Reason.DEBUG_ENABLED,
        "developer tools are on: the host may profile and debug what the GPU does",
        expected="off",
        actual="on" if settings.developer_tools else "off",
    )
    yield finding(
        settings.cc_feature and settings.environment == PRODUCTION,
        "settings.cc_feature",
        Reason.MEASUREMENT,
        "the GPUs do not do confidential computing in production",
        expected=f"confidential computing on, {PRODUCTION}",
        actual=f"{'on' if settings.cc_feature else 'off'}, {settings.environment}",
    )
    yield finding(
        settings.multi_gpu != "protected-pcie",
        "settings.multi_gpu",
        Reason.UNSUPPORTED,
        "the GPUs are in protected PCIe mode, which relies on switches that are not attested here",
        expected="none or nvlink-encryption",
        actual=settings.multi_gpu,
    )


def _roots(gpus: Sequence[VerifiedGpu], rims: Sequence[Rim], reference: NvidiaReferenceValues) -> Iterator[Finding]:
    """Check 8."""
    for field, root, ours, theirs in (
        *(
            (f"gpu {number}.root", each.device.root, reference.roots, NVIDIA_DEVICE_ROOTS)
            for number, each in enumerate(gpus)
        ),
        *((f"rim {each.version}.root", each.root, reference.rim_roots, NVIDIA_RIM_ROOTS) for each in rims),
    ):
        allowed = ours if root in theirs else reference.development_roots
        yield finding(
            root in allowed,
            field,
            Reason.ROOT_NOT_PINNED,
            "the reference values do not name this root",
            expected=", ".join(sorted(allowed)) or "no root of this kind",
            actual=root,
        )


def _gpu(
    name: str, gpu: VerifiedGpu, rims: Sequence[Rim], reference: NvidiaReferenceValues, now: int, ends: list[int]
) -> tuple[list[Finding], GoldenMatch]:
    """Checks 9 to 12 for one GPU; the ends of grace periods that were needed go to ``ends``."""
    report = gpu.report

    def mode() -> str:
        check_mode(gpu)
        return str(gpu.claims()["mode"])

    findings = [
        attempt(f"{name}.mode", "confidential computing", mode),
        finding(
            bool(report.fwid),
            f"{name}.fwid",
            Reason.MEASUREMENT,
            "the report does not state the firmware that made it (FWID)",
            expected=gpu.device.fwid.hex(),
            actual=report.fwid.hex() or "none",
            next_step="install a later driver",
        ),
        finding(
            gpu.device.chip in reference.chips,
            f"{name}.chip",
            Reason.TCB,
            "the chip is not in the allowlist",
            expected=", ".join(sorted(reference.chips))[:400],
            actual=gpu.device.chip,
        ),
        _version(f"{name}.driver_version", "driver", report.driver_version, reference.driver_versions, now, ends),
        _version(f"{name}.vbios_version", "VBIOS", report.vbios_version, reference.vbios_versions, now, ends),
    ]
    versions = (report.driver_version, report.vbios_version)
    own = [each for each in rims if each.product == gpu.device.chip and each.version in versions]
    about, match = compare_golden(gpu, own)
    findings += [Finding(f"{name}.{each.field}", each.expected, each.actual, each.refusal) for each in about]
    findings.append(
        finding(
            match.complete,
            f"{name}.rims",
            Reason.MEASUREMENT,
            "a RIM is missing",
            expected=f"RIMs for driver {report.driver_version} and VBIOS {report.vbios_version}",
            actual=", ".join(each.version for each in own) or "none",
            next_step=f"fetch {report.vbios_rim_id} and the driver's from NVIDIA's RIM service",
        )
    )
    return findings, match


def _version(field: str, what: str, actual: str, allowed: Versions, now: int, ends: list[int]) -> Finding:
    end = allowed.get(actual)
    ok = actual in allowed and (end is None or now <= end)
    if ok and end is not None:
        ends.append(end)
    over = f"; its grace period ended at {end}" if end is not None and not ok else ""
    return finding(
        ok,
        field,
        Reason.TCB,
        f"the {what} version is not in the allowlist{over}",
        expected=", ".join(
            sorted(f"{version}" + ("" if until is None else f" until {until}") for version, until in allowed.items())
        )[:400],
        actual=actual,
    )


def _revocable(gpus: Sequence[VerifiedGpu], rims: Sequence[Rim]) -> list[Certificate]:
    """All certificates that NVIDIA answers for: not the firmware's, which the GPU itself issued, and not the roots."""
    return [
        *(certificate for gpu in gpus for certificate in gpu.device.chain[1:-1]),
        *(certificate for rim in rims for certificate in rim.chain[:-1]),
    ]
