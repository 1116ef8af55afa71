"""One TDX quote judged by itself, as :mod:`~keyquorum_core.attestation.verdict` does for SEV-SNP."""

from __future__ import annotations

from keyquorum_core.attestation.roots import INTEL_ROOTS
from keyquorum_core.attestation.tdx import check_attributes, verify
from keyquorum_core.attestation.tdx_appraisal import TDX, TdxReferenceValues, check_binding, check_reference
from keyquorum_core.attestation.tdx_events import check_event_log
from keyquorum_core.attestation.verdict import Verdict
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError

__all__ = ["judge_tdx"]


def judge_tdx(
    evidence: bytes,
    collateral: bytes,
    *,
    now: int,
    reference: TdxReferenceValues | None = None,
    event_log: bytes | None = None,
    expected_report_data: bytes | None = None,
) -> Verdict:
    """Judge a raw quote with its collateral (JSON) at ``now``; never raises.

    Without ``reference`` the root is Intel's, the TCB must be ``UpToDate`` without advisories, and attributes are
    judged; with it, all that it says. An event log, and ``expected_report_data`` (64 bytes), where given, must be met.
    """
    claims: dict[str, object] = {}
    try:
        verified = verify(
            evidence, collateral, pinned_roots=INTEL_ROOTS if reference is None else reference.pinned_roots, now=now
        )
        claims = verified.claims()
        if reference is None:
            check_attributes(verified.quote)
            statuses = {verified.tcb_status, verified.current_tcb_status or "UpToDate", verified.qe_status}
            if statuses != {"UpToDate"} or verified.advisory_ids:
                raise RefusedError(
                    Reason.TCB,
                    "the TCB is not up to date",
                    expected="UpToDate and no advisory",
                    actual=", ".join(sorted(statuses | {*verified.advisory_ids})),
                )
            if event_log is not None:
                check_event_log(verified.quote, event_log)
        else:
            appraised = check_reference(verified, reference, now=now, event_log=event_log)
            claims |= {"image": appraised.image, "used_exceptions": list(appraised.used_exceptions)}
        if expected_report_data is not None:
            check_binding(verified, expected_report_data)
    except KeyquorumError as error:
        genuine = bool(claims) or error.details.get("verified") == "true"
        return Verdict(TDX, False, genuine, str(error.reason), str(error), claims)
    return Verdict(TDX, True, True, "", "", claims)
