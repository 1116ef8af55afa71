"""One Nitro document judged by itself, as :mod:`~keyquorum_core.attestation.verdict` does for SEV-SNP."""

from __future__ import annotations

from keyquorum_core.attestation.inventory import HardwareId, Inventory
from keyquorum_core.attestation.nitro import verify
from keyquorum_core.attestation.nitro_appraisal import (
    NITRO,
    check_can_bind,
    check_debug,
    check_report_data,
    evaluate,
)
from keyquorum_core.attestation.nitro_reference import NitroReferenceValues
from keyquorum_core.attestation.roots import AWS_NITRO_ROOTS
from keyquorum_core.attestation.verdict import Verdict, judged, located, unverified
from keyquorum_core.errors import KeyquorumError

__all__ = ["judge_nitro"]


def judge_nitro(
    evidence: bytes,
    *,
    now: int,
    reference: NitroReferenceValues | None = None,
    inventory: Inventory | None = None,
    expected_report_data: bytes | None = None,
) -> Verdict:
    """Judge a COSE_Sign1 structure at ``now``; never raises.

    Without ``reference`` the root is AWS's, and debug mode and the ability to bind a key are judged; with it, all that
    it says. Inventory and ``expected_report_data`` (64 bytes), where given, must be met.
    """
    try:
        verified = verify(
            evidence, pinned_roots=AWS_NITRO_ROOTS if reference is None else reference.pinned_roots, now=now
        )
    except KeyquorumError as error:
        return unverified(NITRO, error)
    claims = verified.claims()
    findings = [check_debug(verified), *check_can_bind(verified)]
    if reference is not None:
        findings, appraised = evaluate(verified, reference, now=now)
        claims["image"] = appraised.image
    findings += located(inventory, [HardwareId("nitro", verified.document.instance_id)], claims)
    if expected_report_data is not None:
        findings.append(check_report_data(verified, expected_report_data))
    return judged(NITRO, claims, findings)
