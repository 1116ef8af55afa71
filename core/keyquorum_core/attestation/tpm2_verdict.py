"""One TPM quote judged by itself, as :mod:`~keyquorum_core.attestation.verdict` does for SEV-SNP."""

from __future__ import annotations

from collections.abc import Collection

from keyquorum_core.attestation.tpm2 import qualifying_data, verify
from keyquorum_core.attestation.tpm2_appraisal import (
    TPM2,
    QuoteState,
    Tpm2ReferenceValues,
    begin,
    check_binding,
    check_enrolled,
    check_reference,
)
from keyquorum_core.attestation.verdict import Verdict
from keyquorum_core.errors import KeyquorumError

__all__ = ["judge_tpm2"]


def judge_tpm2(
    evidence: bytes,
    *,
    enrolled_aks: Collection[str],
    reference: Tpm2ReferenceValues | None = None,
    expected_report_data: bytes | None = None,
    previous: QuoteState | None = None,
) -> Verdict:
    """Judge evidence in JSON; never raises. Nothing in it depends on the time of day.

    ``enrolled_aks`` are fingerprints (SHA-256 of SubjectPublicKeyInfo, hex); with none, no quote is acceptable.
    Reference values, ``expected_report_data`` and the state of the AK's last quote, where given, must be met.
    ``extraData`` must be the whole of ``expected_report_data``; or its first half, where that has 64 bytes (DESIGN §7).
    """
    claims: dict[str, object] = {}
    try:
        verified = verify(evidence)
        claims = verified.claims()
        check_enrolled(verified, enrolled_aks)
        if reference is not None:
            check_reference(verified, reference)
        if expected_report_data is not None:
            half = qualifying_data(expected_report_data)
            fits = len(expected_report_data) == 64 and len(verified.quote.extra_data) == len(half)
            check_binding(verified, half if fits else expected_report_data)
        if previous is not None:
            begin(previous, verified)
    except KeyquorumError as error:
        return Verdict(TPM2, False, bool(claims), str(error.reason), str(error), claims)
    return Verdict(TPM2, True, True, "", "", claims)
