"""One TPM quote judged by itself, as :mod:`~keyquorum_core.attestation.verdict` does for SEV-SNP."""

from __future__ import annotations

from collections.abc import Collection

from keyquorum_core.attestation.findings import attempt
from keyquorum_core.attestation.inventory import HardwareId, Inventory
from keyquorum_core.attestation.tpm2 import qualifying_data, verify
from keyquorum_core.attestation.tpm2_appraisal import (
    TPM2,
    begin,
    check_binding,
    check_enrolled,
    evaluate,
)
from keyquorum_core.attestation.tpm2_reference import Tpm2ReferenceValues
from keyquorum_core.attestation.tpm2_state import QuoteState
from keyquorum_core.attestation.verdict import Verdict, judged, located, unverified
from keyquorum_core.errors import KeyquorumError

__all__ = ["judge_tpm2"]


def judge_tpm2(
    evidence: bytes,
    *,
    now: int,
    enrolled_aks: Collection[str],
    reference: Tpm2ReferenceValues | None = None,
    inventory: Inventory | None = None,
    expected_report_data: bytes | None = None,
    previous: QuoteState | None = None,
) -> Verdict:
    """Judge evidence in JSON; never raises. Nothing in it depends on the time of day, but grace periods do.

    ``enrolled_aks`` are fingerprints (SHA-256 of SubjectPublicKeyInfo, hex); a key that an inventory lists is enrolled,
    too. With none, no quote is acceptable. Reference values, ``expected_report_data`` and the state of the AK's last
    quote, where given, must be met. ``extraData`` must be the whole of ``expected_report_data``; or its first half,
    where that has 64 bytes (DESIGN §7).
    """
    try:
        verified = verify(evidence)
    except KeyquorumError as error:
        return unverified(TPM2, error)
    claims = verified.claims()
    hardware = HardwareId("tpm2", verified.ak.fingerprint)
    listed = inventory is not None and hardware in inventory.machines
    findings = [check_enrolled(verified, [hardware.id] if listed else enrolled_aks)]
    if listed:
        findings += located(inventory, [hardware], claims)
    if reference is not None:
        findings += evaluate(verified, reference, now=now)[0]
    if expected_report_data is not None:
        half = qualifying_data(expected_report_data)
        fits = len(expected_report_data) == 64 and len(verified.quote.extra_data) == len(half)
        findings.append(check_binding(verified, half if fits else expected_report_data))
    if previous is not None:

        def goes_on() -> str:
            state = begin(previous, verified)
            return f"clock {state.clock} ms, reset {state.reset_count}, restart {state.restart_count}"

        findings.append(attempt("counters", "counters and a clock that go on", goes_on))
    return judged(TPM2, claims, findings)
