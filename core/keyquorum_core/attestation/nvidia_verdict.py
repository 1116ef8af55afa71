"""One NVIDIA report judged by itself, as :mod:`~keyquorum_core.attestation.verdict` does for SEV-SNP."""

from __future__ import annotations

from collections.abc import Sequence

from keyquorum_core.attestation.nvidia_appraisal import NVIDIA_GPU, NvidiaReferenceValues, check_reference
from keyquorum_core.attestation.nvidia_gpu import check_golden, check_has_nonce, check_mode, check_nonce, verify
from keyquorum_core.attestation.nvidia_ocsp import looks_like_ocsp, verify_revocation
from keyquorum_core.attestation.nvidia_report import read_report
from keyquorum_core.attestation.nvidia_rim import looks_like_rim, verify_rim
from keyquorum_core.attestation.roots import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS
from keyquorum_core.attestation.verdict import Verdict
from keyquorum_core.errors import KeyquorumError

__all__ = ["judge_nvidia_gpu"]


def judge_nvidia_gpu(
    evidence: bytes,
    endorsements: Sequence[bytes],
    *,
    now: int,
    reference: NvidiaReferenceValues | None = None,
    expected_nonce: bytes | None = None,
) -> Verdict:
    """Judge a report, raw, hex or base64, at ``now``; never raises. ``endorsements`` are its chain, RIMs and OCSP
    responses; only the certificates' order matters, the firmware's first.

    Without ``reference`` the roots are NVIDIA's; a mode that the report states is judged, and RIMs and OCSP responses
    where they are given: one that does not verify, or is for another board, refuses. With it, all that it says: both
    RIMs, versions, revocation. ``expected_nonce`` (32 bytes), where given, must be the report's; an empty one never is.

    No field of a report says whether developer tools are on. The claim ``debug`` is ``disabled`` where both RIMs are
    met, which is how NVIDIA's verifier concludes it, and ``not shown`` otherwise; :func:`appraise
    <keyquorum_core.attestation.nvidia_appraisal.appraise>`, for a release, requires that and the driver's word.
    """
    claims: dict[str, object] = {}
    genuine = False
    device_roots = NVIDIA_DEVICE_ROOTS.keys() if reference is None else reference.pinned_roots
    rim_roots = NVIDIA_RIM_ROOTS.keys() if reference is None else reference.pinned_rim_roots
    try:
        manifests = [each for each in endorsements if looks_like_rim(each)]
        responses = [each for each in endorsements if looks_like_ocsp(each)]
        chain = [each for each in endorsements if not looks_like_rim(each) and not looks_like_ocsp(each)]
        verified = verify(read_report(evidence), chain, pinned_roots=device_roots, now=now)
        rims = [verify_rim(each, pinned_roots=rim_roots, now=now) for each in manifests]
        revocation = verify_revocation(responses, [verified.device.chain, *(each.chain for each in rims)], now=now)
        genuine = True
        claims = verified.claims() | {
            "rims": [{"version": each.version, "sha256": each.sha256} for each in rims],
            "ocsp_responses": len(revocation.good),
            "golden_values_met": 0,
            "debug": "not shown",
        }
        check_mode(verified)
        check_has_nonce(verified)
        if expected_nonce is not None:
            check_nonce(verified, expected_nonce)
        if reference is not None:
            match = check_reference([verified], rims, responses, reference, now=now).matches[0]
        elif rims:
            match = check_golden(verified, rims)
        else:
            return Verdict(NVIDIA_GPU, True, True, "", "", claims)
        claims["golden_values_met"] = len(match.compared)
        claims["debug"] = "disabled" if match.complete else "not shown"
    except KeyquorumError as error:
        return Verdict(NVIDIA_GPU, False, genuine, str(error.reason), str(error), claims)
    return Verdict(NVIDIA_GPU, True, True, "", "", claims)
