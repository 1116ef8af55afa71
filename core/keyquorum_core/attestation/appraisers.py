"""One appraiser for each type of evidence: verification, then every check of its reference values, for one document.

They translate between the document and the types' own modules, which are imported when such evidence first comes: a
custodian that sees one vendor's evidence loads one vendor's code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol, TypeVar

from keyquorum_core.attestation.evidence import NVIDIA_GPU, EvidenceDocument, EvidenceItem
from keyquorum_core.attestation.findings import finding, require
from keyquorum_core.attestation.inventory import HardwareId, Inventory
from keyquorum_core.attestation.reference import ReferenceValues
from keyquorum_core.attestation.tpm2_state import QuoteState
from keyquorum_core.errors import MalformedError, Reason, RefusedError

__all__ = ["APPRAISERS", "AppraisedItem", "Case", "NoTpmRecords", "TpmRecords"]

T = TypeVar("T")


class TpmRecords(Protocol):
    """What a custodian remembers of TPMs."""

    def last(self, ak: str) -> QuoteState | None:
        """Where the last accepted quote by this attestation key left its TPM; ``None``: never seen."""
        ...


class NoTpmRecords:
    """Nothing is remembered: each quote is judged as the first."""

    def last(self, ak: str) -> QuoteState | None:
        return None


@dataclass(frozen=True, slots=True)
class AppraisedItem:
    """Evidence of one type that was accepted; for GPUs, of all of them."""

    type: str
    hardware: tuple[HardwareId, ...]
    product: str
    """What signed: ``Milan``, ``TDX``, ``GH100``, ``RSA-2048`` …"""
    image: str
    """The reference values' name for what was measured; the versions of driver and VBIOS for GPUs; empty for TPMs."""
    measurement: str
    """The launch measurement, MRTD or PCR0, hex; empty for TPMs and GPUs, which have many."""
    tcb: Mapping[str, int]
    """Levels by component, as far as the type has any: what the chip reports, Intel's evaluation data number."""
    development: bool
    """No hardware made this evidence: its root is a development root that the reference values name."""
    not_before: int
    not_after: int
    """Unix seconds: the window common to certificates, collateral, and grace periods that were needed."""


@dataclass(frozen=True, slots=True)
class Case:
    """One document and what it is judged by."""

    document: EvidenceDocument
    reference: ReferenceValues
    inventory: Inventory
    tpm: TpmRecords
    now: int
    tpm_states: list[QuoteState]
    """Filled by the appraiser of TPM quotes: where they leave the TPM, once the document is accepted."""


def _section(section: T | None, kind: str, case: Case) -> T:
    if section is None:
        raise RefusedError(
            Reason.EVIDENCE_TYPE,
            f"the reference values do not accept evidence of type {kind}",
            expected=", ".join(case.reference.types),
            actual=kind,
        )
    return section


def _no_endorsements(item: EvidenceItem) -> None:
    if item.endorsements:
        raise MalformedError(
            Reason.MALFORMED, f"endorsements of {item.type}", expected="none", actual=f"{len(item.endorsements)} parts"
        )


def _sev_snp(case: Case, items: Sequence[EvidenceItem]) -> AppraisedItem:
    from keyquorum_core.attestation import sev_snp
    from keyquorum_core.attestation.snp_appraisal import check_binding, evaluate

    reference = _section(case.reference.sev_snp, "sev-snp", case)
    (item,) = items
    verified = sev_snp.verify(item.evidence, item.endorsements, pinned_roots=reference.pinned_roots, now=case.now)
    findings, appraised = evaluate(verified, reference, case.now)
    require([*findings, check_binding(verified, case.document.report_data())])
    return AppraisedItem(
        type=item.type,
        hardware=(HardwareId("sev-snp", verified.report.chip_id.hex()),),
        product=str(verified.product),
        image=appraised.image,
        measurement=verified.report.measurement.hex(),
        tcb=MappingProxyType(verified.tcbs()["reported"]),
        development=verified.endorsement.development,
        not_before=verified.not_before,
        not_after=appraised.not_after,
    )


def _tdx(case: Case, items: Sequence[EvidenceItem]) -> AppraisedItem:
    from keyquorum_core.attestation import tdx
    from keyquorum_core.attestation.tdx_appraisal import appraise

    reference = _section(case.reference.tdx, "tdx", case)
    (item,) = items
    if not 1 <= len(item.endorsements) <= 2:
        raise MalformedError(
            Reason.MALFORMED,
            "endorsements of tdx",
            expected="collateral, then perhaps the event log",
            actual=f"{len(item.endorsements)} parts",
        )
    verified = tdx.verify(item.evidence, item.endorsements[0], pinned_roots=reference.pinned_roots, now=case.now)
    appraised = appraise(
        verified,
        reference,
        expected_report_data=case.document.report_data(),
        now=case.now,
        event_log=item.endorsements[1] if len(item.endorsements) == 2 else None,
    )
    return AppraisedItem(
        type=item.type,
        hardware=(HardwareId("tdx", appraised.hardware_id),),
        product="TDX",
        image=appraised.image,
        measurement=verified.quote.mrtd.hex(),
        tcb=MappingProxyType({"evaluation_data_number": verified.tcb_evaluation_data_number}),
        development=verified.development,
        not_before=verified.not_before,
        not_after=appraised.not_after,
    )


def _tpm2(case: Case, items: Sequence[EvidenceItem]) -> AppraisedItem:
    from keyquorum_core.attestation.tpm2 import qualifying_data, verify
    from keyquorum_core.attestation.tpm2_appraisal import begin, check_binding, check_enrolled, evaluate

    reference = _section(case.reference.tpm2, "tpm2", case)
    (item,) = items
    _no_endorsements(item)
    verified = verify(item.evidence)
    ak = verified.ak.fingerprint
    hardware = HardwareId("tpm2", ak)
    require([check_enrolled(verified, [ak] if hardware in case.inventory.machines else [])])
    findings, appraised = evaluate(verified, reference, now=case.now)
    require([*findings, check_binding(verified, qualifying_data(case.document.report_data()))])
    case.tpm_states.append(begin(case.tpm.last(ak), verified))
    return AppraisedItem(
        type=item.type,
        hardware=(hardware,),
        product=verified.ak.kind,
        image="",
        measurement="",
        tcb=MappingProxyType({}),
        development=False,
        not_before=0,
        not_after=_FOREVER if appraised.not_after is None else appraised.not_after,
    )


def _nitro(case: Case, items: Sequence[EvidenceItem]) -> AppraisedItem:
    from keyquorum_core.attestation import nitro
    from keyquorum_core.attestation.nitro_appraisal import appraise

    reference = _section(case.reference.nitro, "nitro", case)
    (item,) = items
    _no_endorsements(item)
    verified = nitro.verify(item.evidence, pinned_roots=reference.pinned_roots, now=case.now)
    appraised = appraise(
        verified,
        reference,
        expected_report_data=case.document.report_data(),
        challenge=case.document.challenge(),
        now=case.now,
    )
    return AppraisedItem(
        type=item.type,
        hardware=(HardwareId("nitro", appraised.hardware_id),),
        product="Nitro Enclaves",
        image=appraised.image,
        measurement=verified.document.pcrs[0].hex(),
        tcb=MappingProxyType({}),
        development=verified.development,
        not_before=verified.not_before,
        not_after=appraised.not_after,
    )


def _nvidia_gpu(case: Case, items: Sequence[EvidenceItem]) -> AppraisedItem:
    from keyquorum_core.attestation.nvidia_appraisal import appraise

    reference = _section(case.reference.nvidia_gpu, NVIDIA_GPU, case)
    require(
        [
            finding(
                any(item.type != NVIDIA_GPU for item in case.document.items),
                "types",
                Reason.EVIDENCE_TYPE,
                "GPU evidence stands alone: it says nothing about who uses the GPU",
                expected="evidence of the machine beside it",
                actual=NVIDIA_GPU,
            )
        ]
    )
    appraised = appraise(
        [item.evidence for item in items],
        [each for item in items for each in item.endorsements],
        reference,
        expected_nonce=case.document.gpu_nonce(),
        now=case.now,
    )
    running = {(each.report.driver_version, each.report.vbios_version) for each in appraised.gpus}
    return AppraisedItem(
        type=NVIDIA_GPU,
        hardware=tuple(HardwareId(NVIDIA_GPU, each) for each in appraised.hardware_ids),
        product=", ".join(sorted({each.device.chip for each in appraised.gpus})),
        image=", ".join(f"driver {driver}, VBIOS {vbios}" for driver, vbios in sorted(running)),
        measurement="",
        tcb=MappingProxyType({}),
        development=appraised.development,
        not_before=appraised.not_before,
        not_after=appraised.not_after,
    )


_FOREVER = 253402300799  # 9999-12-31T23:59:59Z

APPRAISERS: Final[Mapping[str, Callable[[Case, Sequence[EvidenceItem]], AppraisedItem]]] = MappingProxyType(
    {"sev-snp": _sev_snp, "tdx": _tdx, "tpm2": _tpm2, NVIDIA_GPU: _nvidia_gpu, "nitro": _nitro}
)
"""By type; each gets all items of its type. Raises :class:`MalformedError` and :class:`RefusedError` with the reasons
of the type's modules."""
