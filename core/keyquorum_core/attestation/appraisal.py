"""Appraisal: does this custodian accept the evidence? (DESIGN §6 step 3, §7; docs/spec/evidence.md)

:func:`appraise` makes these checks, in this order, and refuses at the first that fails:

1. the document is canonical and within bounds                                     ``MALFORMED``, ``TOO_LARGE``
2. every item is of a known type, and every required type is there                 ``EVIDENCE_TYPE``
3. this custodian's own nonce is in the list, and is one of its current ones       ``STALE``
4. the evidence is genuine (:mod:`~keyquorum_core.attestation.sev_snp`)            that module's reasons
5. debugging is not allowed by the guest policy                                    ``DEBUG_ENABLED``
6. a migration agent is not allowed: the guest could leave the chip it names       ``PROVENANCE``
7. the VMPL is an allowed one                                                      ``VMPL``
8. reported, committed and launch TCB are at least the minimum, by component       ``TCB``
9. the measurement is in the allowlist                                             ``MEASUREMENT``
10. report data equals the binding of keys and challenge                           ``BINDING``
11. the chip is in the inventory, which is where region and provider come from     ``PROVENANCE``

Check 3 asks whether the evidence is new *to this custodian*; it passes once. From then on the custodian keeps the
appraisal until the evidence is ``max_evidence_age`` old or a certificate expires, and does not ask again.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from keyquorum_core.attestation import sev_snp
from keyquorum_core.attestation.binding import report_data
from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.attestation.reference import Machine, ReferenceValues
from keyquorum_core.attestation.snp_certificates import names_vendor_root
from keyquorum_core.errors import Reason, RefusedError
from keyquorum_core.release import WINDOW_SECONDS

__all__ = [
    "SEV_SNP",
    "SUPPORTED_TYPES",
    "Appraisal",
    "appraise",
    "check_binding",
    "check_not_debug",
    "check_reference",
    "claims_development",
    "find_machine",
]

SEV_SNP = "sev-snp"
SUPPORTED_TYPES = frozenset({SEV_SNP})


@dataclass(frozen=True, slots=True)
class Appraisal:
    """Evidence that was accepted, and what follows from it. Holds for ``not_before <= now <= not_after``."""

    hpke_key: bytes
    signing_key: bytes
    types: tuple[str, ...]
    hardware_ids: Mapping[str, str]
    """Evidence type to the identity of the hardware that signed it; for ``sev-snp`` the 64-byte chip id in hex."""
    region: str
    """From the inventory, by the attested hardware identity; never from the worker."""
    provider: str
    product: str
    measurement: str
    """Hex."""
    tcb: Mapping[str, int]
    """The reported TCB by component."""
    development: bool
    """No hardware made this evidence: its root is a development root that the reference values name."""
    evidence_sha256: str
    """Digest of the document, hex."""
    reference_version: int
    reference_digest: str
    not_before: int
    not_after: int
    """Unix seconds: the first of a certificate's expiry and the evidence reaching ``max_evidence_age``."""

    def holds_at(self, now: int) -> bool:
        """Whether the appraisal may be used at ``now`` without appraising again."""
        return self.not_before <= now <= self.not_after

    def require_types(self, required: Collection[str]) -> None:
        """Raises :class:`RefusedError` ``EVIDENCE_TYPE`` where a required type was not appraised."""
        _require_types(self.types, required)

    def require_region(self, allowed: Collection[str]) -> None:
        """Raises :class:`RefusedError` ``REGION`` where the chip stands outside the allowed regions."""
        if self.region not in allowed:
            raise RefusedError(
                Reason.REGION,
                "the worker's hardware is not in an allowed region",
                expected=", ".join(sorted(allowed)) or "no region is allowed",
                actual=self.region,
            )


def appraise(
    document: bytes,
    reference: ReferenceValues,
    *,
    required_types: Collection[str],
    now: int,
    own_id: str,
    current_nonces: Mapping[int, bytes],
) -> Appraisal:
    """Appraise an evidence document as custodian ``own_id`` at ``now`` (unix seconds).

    ``current_nonces`` maps the windows that are current to this custodian's nonces (32 bytes) for them.
    Raises :class:`MalformedError` and :class:`RefusedError` with the reasons in the module's list.
    """
    parsed = EvidenceDocument.parse(document)
    types = tuple(item.type for item in parsed.items)
    unknown = set(types) - SUPPORTED_TYPES
    if unknown:
        raise RefusedError(
            Reason.EVIDENCE_TYPE,
            "the document holds evidence of an unknown type",
            expected=", ".join(sorted(SUPPORTED_TYPES)),
            actual=", ".join(sorted(unknown)),
        )
    _require_types(types, required_types)
    fresh_until = _check_fresh(parsed, now, own_id, current_nonces) + reference.max_evidence_age
    if now > fresh_until:
        raise _stale("the evidence is older than is accepted", f"at most {reference.max_evidence_age} s", "older")
    item = parsed.items[0]  # check 2 leaves exactly one type, and the document holds each type once
    verified = sev_snp.verify(item.evidence, item.endorsements, pinned_roots=reference.pinned_roots, now=now)
    check_reference(verified, reference)
    check_binding(verified, report_data(parsed.hpke_key, parsed.signing_key, parsed.challenge()))
    machine = find_machine(verified, reference)
    return Appraisal(
        hpke_key=parsed.hpke_key,
        signing_key=parsed.signing_key,
        types=types,
        hardware_ids=MappingProxyType({SEV_SNP: verified.report.chip_id.hex()}),
        region=machine.region,
        provider=machine.provider,
        product=str(verified.product),
        measurement=verified.report.measurement.hex(),
        tcb=MappingProxyType(verified.tcbs()["reported"]),
        development=verified.endorsement.development,
        evidence_sha256=hashlib.sha256(document).hexdigest(),
        reference_version=reference.version,
        reference_digest=reference.digest,
        not_before=verified.not_before,
        not_after=min(verified.not_after, fresh_until),
    )


def check_reference(verified: sev_snp.VerifiedReport, reference: ReferenceValues) -> None:
    """Checks 5 to 9 on a genuine report. Raises :class:`RefusedError`."""
    report = verified.report
    check_not_debug(verified)
    if report.migration_agent_allowed:
        raise RefusedError(
            Reason.PROVENANCE,
            "the guest policy allows a migration agent, so the guest may leave the chip that it names",
            expected="policy bit 18 zero",
            actual=f"{report.policy:#x}",
        )
    if report.vmpl not in reference.vmpl:
        raise RefusedError(
            Reason.VMPL,
            "the report was asked for at a privilege level that is not allowed",
            expected=f"one of {sorted(reference.vmpl)}",
            actual=report.vmpl,
        )
    minimum = reference.minimum_tcb.get(verified.product)
    if minimum is None:
        raise RefusedError(
            Reason.TCB, "no minimum TCB is set for this product", expected="a minimum", actual=verified.product
        )
    tcbs = verified.tcbs()
    for which in ("reported", "committed", "launch"):
        for component, level in minimum.items():
            if tcbs[which][component] < level:
                raise RefusedError(
                    Reason.TCB,
                    f"the {which} TCB is below the minimum in {component}",
                    expected=f"at least {level}",
                    actual=tcbs[which][component],
                )
    if report.measurement not in reference.measurements:
        raise RefusedError(
            Reason.MEASUREMENT,
            "the launch measurement is not in the allowlist",
            expected=f"one of {len(reference.measurements)} measurements",
            actual=report.measurement.hex(),
        )


def check_not_debug(verified: sev_snp.VerifiedReport) -> None:
    """Check 5. Raises :class:`RefusedError` ``DEBUG_ENABLED``."""
    if verified.report.debug_allowed:
        raise RefusedError(
            Reason.DEBUG_ENABLED,
            "the guest policy lets the host read the guest's memory for debugging",
            expected="policy bit 19 zero",
            actual=f"{verified.report.policy:#x}",
        )


def claims_development(document: EvidenceDocument) -> bool:
    """What a leaf about this document has to say: whether some item's endorsements name no vendor's root. Verifies
    nothing; every custodian compares the leaf with its own appraisal. Raises :class:`MalformedError`."""
    return not all(names_vendor_root(item.endorsements) for item in document.items if item.type == SEV_SNP)


def check_binding(verified: sev_snp.VerifiedReport, expected: bytes) -> None:
    """Check 10, against 64 bytes. Raises :class:`RefusedError` ``BINDING``."""
    if not hmac.compare_digest(verified.report.report_data, expected):
        raise RefusedError(
            Reason.BINDING,
            "the report is not bound to these keys and this challenge",
            expected=f"report data {expected.hex()}",
            actual=verified.report.report_data.hex(),
        )


def find_machine(verified: sev_snp.VerifiedReport, reference: ReferenceValues) -> Machine:
    """Check 11: the chip's entry in the inventory. Raises :class:`RefusedError` ``PROVENANCE``."""
    chip_id = verified.report.chip_id
    machine = None if verified.report.chip_id_masked else reference.inventory.get(chip_id)
    if machine is None:
        raise RefusedError(
            Reason.PROVENANCE,
            "the chip is not in the inventory",
            expected="a chip id that the inventory lists",
            actual="a masked chip id" if verified.report.chip_id_masked else chip_id.hex(),
            next_step="add the chip with its region to the inventory, once you know where it stands",
        )
    return machine


def _require_types(types: Collection[str], required: Collection[str]) -> None:
    missing = set(required) - set(types)
    if missing or not required:
        raise RefusedError(
            Reason.EVIDENCE_TYPE,
            "a required type of evidence is missing" if missing else "no type of evidence is required",
            expected=", ".join(sorted(required)) or "at least one required type",
            actual=", ".join(sorted(types)),
        )


def _check_fresh(document: EvidenceDocument, now: int, own_id: str, current_nonces: Mapping[int, bytes]) -> int:
    """Check 3. Returns the moment from which the evidence's age counts: the start of the nonce's window."""
    own = document.nonce_of(own_id)
    if own is None:
        raise _stale(
            f"the challenge holds no nonce of custodian {own_id}",
            f"a nonce of {own_id}",
            f"nonces of {', '.join(each.custodian for each in document.nonces)}"[:200],
        )
    windows = ", ".join(str(window) for window in sorted(current_nonces)) or "no window is current"
    current = current_nonces.get(own.window)
    if current is None:
        raise _stale(f"the nonce of custodian {own_id} is not current", f"window {windows}", f"window {own.window}")
    if not hmac.compare_digest(current, own.nonce):
        raise _stale(f"custodian {own_id} did not publish this nonce", f"its nonce of window {own.window}", "another")
    return min(now, own.window * WINDOW_SECONDS)


def _stale(message: str, expected: str, actual: str) -> RefusedError:
    return RefusedError(
        Reason.STALE, message, expected=expected, actual=actual, next_step="attest again with current nonces"
    )
