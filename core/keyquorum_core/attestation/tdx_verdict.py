"""One TDX quote judged by itself, as :mod:`~keyquorum_core.attestation.verdict` does for SEV-SNP."""

from __future__ import annotations

from keyquorum_core.attestation.findings import Finding, finding
from keyquorum_core.attestation.inventory import HardwareId, Inventory
from keyquorum_core.attestation.roots import INTEL_ROOTS
from keyquorum_core.attestation.tdx import VerifiedQuote, verify
from keyquorum_core.attestation.tdx_appraisal import (
    TDX,
    UP_TO_DATE,
    about_attributes,
    about_log,
    check_binding,
    evaluate,
)
from keyquorum_core.attestation.tdx_reference import TdxReferenceValues
from keyquorum_core.attestation.verdict import Verdict, judged, located, unverified
from keyquorum_core.errors import KeyquorumError, Reason

__all__ = ["judge_tdx"]


def judge_tdx(
    evidence: bytes,
    collateral: bytes,
    *,
    now: int,
    reference: TdxReferenceValues | None = None,
    inventory: Inventory | None = None,
    event_log: bytes | None = None,
    expected_report_data: bytes | None = None,
) -> Verdict:
    """Judge a raw quote with its collateral (JSON) at ``now``; never raises.

    Without ``reference`` the root is Intel's, the TCB must be ``UpToDate`` without advisories, and attributes are
    judged; with it, all that it says. Inventory, event log, and ``expected_report_data`` (64 bytes), where given, must
    be met.
    """
    try:
        verified = verify(
            evidence, collateral, pinned_roots=INTEL_ROOTS if reference is None else reference.pinned_roots, now=now
        )
    except KeyquorumError as error:
        return unverified(TDX, error)
    claims = verified.claims()
    if reference is None:
        findings = [about_attributes(verified), _up_to_date(verified)]
        if event_log is not None:
            findings.append(about_log(verified, event_log))
    else:
        findings, appraised = evaluate(verified, reference, now=now, event_log=event_log)
        claims |= {"image": appraised.image, "used_exceptions": list(appraised.used_exceptions)}
    findings += located(inventory, [HardwareId("tdx", verified.ppid.hex())], claims)
    if expected_report_data is not None:
        findings.append(check_binding(verified, expected_report_data))
    return judged(TDX, claims, findings)


def _up_to_date(verified: VerifiedQuote) -> Finding:
    statuses = {verified.tcb_status, verified.current_tcb_status or UP_TO_DATE, verified.qe_status}
    return finding(
        statuses == {UP_TO_DATE} and not verified.advisory_ids,
        "tcb",
        Reason.TCB,
        "the TCB is not up to date",
        expected=f"{UP_TO_DATE} and no advisory",
        actual=", ".join(sorted(statuses | {*verified.advisory_ids})),
    )
