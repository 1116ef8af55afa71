"""One file of evidence judged by itself, without a document around it: what a person or a pipeline asks for.

The same checks as a custodian's, less those that need a challenge. ``verified`` says genuine, ``ok`` says also
acceptable, and ``reason`` is the code of the first check that refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from keyquorum_core.attestation import sev_snp
from keyquorum_core.attestation.appraisal import (
    SEV_SNP,
    check_binding,
    check_not_debug,
    check_reference,
    find_machine,
)
from keyquorum_core.attestation.reference import ReferenceValues
from keyquorum_core.attestation.roots import AMD_ROOTS
from keyquorum_core.errors import KeyquorumError

__all__ = ["Verdict", "judge_sev_snp"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer, as ``--json`` prints it."""

    type: str
    ok: bool
    verified: bool
    reason: str
    """Empty where ``ok``."""
    detail: str
    claims: Mapping[str, object] = field(default_factory=dict)
    """What the evidence says; empty unless it is genuine."""

    def as_dict(self) -> dict[str, object]:
        return {
            "type": self.type,
            "ok": self.ok,
            "verified": self.verified,
            "reason": self.reason,
            "detail": self.detail,
            "claims": dict(self.claims),
        }


def judge_sev_snp(
    evidence: bytes,
    endorsements: Sequence[bytes],
    *,
    now: int,
    reference: ReferenceValues | None = None,
    expected_report_data: bytes | None = None,
) -> Verdict:
    """Judge a SEV-SNP report, raw or as hex text, with its endorsements (DER or PEM) at ``now``; never raises.

    Without ``reference`` the roots are AMD's, and only debugging is judged; with it, all that it says: minimum TCB,
    VMPL, measurement, inventory. ``expected_report_data`` (64 bytes), where given, must be met.
    """
    claims: dict[str, object] = {}
    try:
        verified = sev_snp.verify(
            sev_snp.read_report(evidence),
            endorsements,
            pinned_roots=AMD_ROOTS if reference is None else reference.pinned_roots,
            now=now,
        )
        claims = verified.claims()
        check_not_debug(verified)
        if reference is not None:
            check_reference(verified, reference)
            machine = find_machine(verified, reference)
            claims |= {"region": machine.region, "provider": machine.provider}
        if expected_report_data is not None:
            check_binding(verified, expected_report_data)
    except KeyquorumError as error:
        return Verdict(SEV_SNP, False, bool(claims), str(error.reason), str(error), claims)
    return Verdict(SEV_SNP, True, True, "", "", claims)
