"""One file of evidence judged by itself, without a document around it: what a person or a pipeline asks for.

The same checks as a custodian's, less those that need a challenge. ``verified`` says genuine, ``ok`` says also
acceptable, and ``reason`` is the code of the first check that refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from keyquorum_core.attestation import sev_snp
from keyquorum_core.attestation.findings import Finding, attempt
from keyquorum_core.attestation.inventory import HardwareId, Inventory
from keyquorum_core.attestation.roots import AMD_ROOTS
from keyquorum_core.attestation.snp_appraisal import SEV_SNP, check_binding, check_debug, evaluate
from keyquorum_core.attestation.snp_reference import SnpReferenceValues
from keyquorum_core.errors import KeyquorumError

__all__ = ["Verdict", "judge_sev_snp", "judged", "located", "unverified"]


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
    checks: tuple[Finding, ...] = ()
    """Every check with what it expected and what it found. Evidence that is not genuine has one, which says why:
    nothing else in it counts."""

    def as_dict(self) -> dict[str, object]:
        return {
            "type": self.type,
            "ok": self.ok,
            "verified": self.verified,
            "reason": self.reason,
            "detail": self.detail,
            "claims": dict(self.claims),
        }

    def explained(self) -> dict[str, object]:
        """The same with every check."""
        return self.as_dict() | {"checks": [each.as_dict() for each in self.checks]}


_GENUINE = Finding("genuine", "evidence that verifies", "it does")


def unverified(kind: str, error: KeyquorumError) -> Verdict:
    """The verdict on evidence that ``error`` found not to be genuine; or genuine and refused, where it says so."""
    genuine = error.details.get("verified") == "true"
    found = Finding("genuine", error.expected or "evidence that verifies", error.actual or error.message, error)
    checks: tuple[Finding, ...] = (found,)
    if genuine:
        checks = (_GENUINE, Finding(str(error.reason).lower(), found.expected, found.actual, error))
    return Verdict(kind, False, genuine, str(error.reason), str(error), {}, checks)


def judged(kind: str, claims: Mapping[str, object], findings: Sequence[Finding]) -> Verdict:
    """The verdict on genuine evidence."""
    checks = (_GENUINE, *findings)
    refusal = next((each.refusal for each in checks if each.refusal is not None), None)
    if refusal is None:
        return Verdict(kind, True, True, "", "", claims, checks)
    return Verdict(kind, False, True, str(refusal.reason), str(refusal), claims, checks)


def located(inventory: Inventory | None, hardware: Sequence[HardwareId], claims: dict[str, object]) -> list[Finding]:
    """Where an inventory is given: that the hardware is of one machine in it, whose facts go to ``claims``."""
    if inventory is None:
        return []

    def find() -> str:
        machine = inventory.machine_of(hardware)
        claims["region"], claims["provider"] = machine.region, machine.provider
        claims["machine"], claims["model"], claims["owner"] = machine.name, machine.model, machine.owner
        return machine.name

    return [attempt("inventory", "hardware of one machine that it lists", find)]


def judge_sev_snp(
    evidence: bytes,
    endorsements: Sequence[bytes],
    *,
    now: int,
    reference: SnpReferenceValues | None = None,
    inventory: Inventory | None = None,
    expected_report_data: bytes | None = None,
) -> Verdict:
    """Judge a SEV-SNP report, raw or as hex text, with its endorsements (DER or PEM) at ``now``; never raises.

    Without ``reference`` the roots are AMD's, and only debugging is judged; with it, all that it says: minimum TCB,
    VMPL, image, platform. The chip must be in ``inventory``, and ``expected_report_data`` (64 bytes) must be met, where
    those are given.
    """
    try:
        verified = sev_snp.verify(
            sev_snp.read_report(evidence),
            endorsements,
            pinned_roots=AMD_ROOTS if reference is None else reference.pinned_roots,
            now=now,
        )
    except KeyquorumError as error:
        return unverified(SEV_SNP, error)
    claims = verified.claims()
    findings = [check_debug(verified)]
    if reference is not None:
        findings, appraised = evaluate(verified, reference, now)
        claims["image"] = appraised.image
    findings += located(inventory, [HardwareId("sev-snp", verified.report.chip_id.hex())], claims)
    if expected_report_data is not None:
        findings.append(check_binding(verified, expected_report_data))
    return judged(SEV_SNP, claims, findings)
