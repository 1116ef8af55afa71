"""One NVIDIA report judged by itself, as :mod:`~keyquorum_core.attestation.verdict` does for SEV-SNP."""

from __future__ import annotations

from collections.abc import Sequence

from keyquorum_core.attestation.evidence import NVIDIA_GPU
from keyquorum_core.attestation.findings import Finding, attempt
from keyquorum_core.attestation.inventory import HardwareId, Inventory
from keyquorum_core.attestation.nvidia_appraisal import evaluate
from keyquorum_core.attestation.nvidia_gpu import (
    VerifiedGpu,
    check_has_nonce,
    check_mode,
    check_nonce,
    compare_golden,
    verify,
)
from keyquorum_core.attestation.nvidia_ocsp import looks_like_ocsp, verify_revocation
from keyquorum_core.attestation.nvidia_reference import NvidiaReferenceValues
from keyquorum_core.attestation.nvidia_report import read_report
from keyquorum_core.attestation.nvidia_rim import looks_like_rim, verify_rim
from keyquorum_core.attestation.roots import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS
from keyquorum_core.attestation.verdict import Verdict, judged, located, unverified
from keyquorum_core.errors import KeyquorumError

__all__ = ["judge_nvidia_gpu"]


def judge_nvidia_gpu(
    evidence: bytes,
    endorsements: Sequence[bytes],
    *,
    now: int,
    reference: NvidiaReferenceValues | None = None,
    inventory: Inventory | None = None,
    expected_nonce: bytes | None = None,
) -> Verdict:
    """Judge a report, raw, hex or base64, at ``now``; never raises. ``endorsements`` are its chain, RIMs and OCSP
    responses; only the certificates' order matters, the firmware's first.

    Without ``reference`` the roots are NVIDIA's; a mode that the report states is judged, and RIMs and OCSP responses
    where they are given: one that does not verify, or is for another board, refuses. With it, all that it says: both
    RIMs, versions, revocation. Inventory and ``expected_nonce`` (32 bytes), where given, must be met; an empty nonce
    never is.

    No field of a report says whether developer tools are on. The claim ``debug`` is ``disabled`` where both RIMs are
    met, which is how NVIDIA's verifier concludes it, and ``not shown`` otherwise; :func:`appraise
    <keyquorum_core.attestation.nvidia_appraisal.appraise>`, for a release, requires that and the driver's word.
    """
    device_roots = NVIDIA_DEVICE_ROOTS.keys() if reference is None else reference.pinned_roots
    rim_roots = NVIDIA_RIM_ROOTS.keys() if reference is None else reference.pinned_rim_roots
    manifests = [each for each in endorsements if looks_like_rim(each)]
    responses = [each for each in endorsements if looks_like_ocsp(each)]
    chain = [each for each in endorsements if not looks_like_rim(each) and not looks_like_ocsp(each)]
    try:
        verified = verify(read_report(evidence), chain, pinned_roots=device_roots, now=now)
        rims = [verify_rim(each, pinned_roots=rim_roots, now=now) for each in manifests]
        revocation = verify_revocation(responses, [verified.device.chain, *(each.chain for each in rims)], now=now)
    except KeyquorumError as error:
        return unverified(NVIDIA_GPU, error)
    claims = verified.claims() | {
        "rims": [{"version": each.version, "sha256": each.sha256} for each in rims],
        "ocsp_responses": len(revocation.good),
        "golden_values_met": 0,
        "debug": "not shown",
    }
    findings = _mode_and_nonce(verified, expected_nonce)
    match = None
    if reference is not None:
        about, appraised = evaluate([verified], rims, responses, reference, now=now)
        findings += about
        match = appraised.matches[0]
    elif rims:
        about, match = compare_golden(verified, rims)
        findings += about
    findings += located(inventory, [HardwareId(NVIDIA_GPU, verified.device.serial)], claims)
    if match is not None and all(each.ok for each in findings):
        claims["golden_values_met"] = len(match.compared)
        claims["debug"] = "disabled" if match.complete else "not shown"
    return judged(NVIDIA_GPU, claims, findings)


def _mode_and_nonce(verified: VerifiedGpu, expected_nonce: bytes | None) -> list[Finding]:
    def mode() -> str:
        check_mode(verified)
        return str(verified.claims()["mode"])

    def nonce() -> str:
        if expected_nonce is None:
            check_has_nonce(verified)
        else:
            check_nonce(verified, expected_nonce)
        return verified.report.nonce.hex()

    wanted = "a nonce that is not zero" if expected_nonce is None else expected_nonce.hex()
    return [attempt("mode", "confidential computing", mode), attempt("nonce", wanted, nonce)]
