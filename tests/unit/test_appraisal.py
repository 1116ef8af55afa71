"""Appraisal: which genuine evidence is accepted, with one test for each reason to refuse, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from keyquorum_core.attestation import sev_snp
from keyquorum_core.attestation.appraisal import Appraisal, appraise
from keyquorum_core.attestation.development import DEVELOPMENT_TCB
from keyquorum_core.attestation.evidence import EvidenceDocument, EvidenceItem
from keyquorum_core.attestation.inventory import HardwareId, Inventory
from keyquorum_core.attestation.reference import ReferenceValues
from keyquorum_core.attestation.roots import AMD_ROOTS
from keyquorum_core.attestation.snp_products import Product
from keyquorum_core.attestation.snp_report import POLICY_DEBUG, POLICY_MIGRATION_AGENT, parse_report, read_report
from keyquorum_core.attestation.verdict import judge_sev_snp
from keyquorum_core.errors import KeyquorumError, Reason
from tests.support.vectors import vector
from tests.support.vendor import (
    CREATED_AT,
    MEASUREMENT,
    development_chip,
    development_vendor,
    evidence_document,
    inventory,
    inventory_json,
    read_inventory,
    read_reference,
    reference_json,
    reference_values,
)

WINDOW = CREATED_AT // 30 + 100
NOW = WINDOW * 30 + 10
NONCE = b"\x11" * 32
NONCES = {"ch-1": (WINDOW, NONCE), "de-1": (WINDOW, b"\x22" * 32)}
CURRENT = {WINDOW - 1: b"\x10" * 32, WINDOW: NONCE}


def run(
    document: bytes,
    reference: ReferenceValues | None = None,
    *,
    required: tuple[str, ...] = ("sev-snp",),
    machines: Inventory | None = None,
    now: int = NOW,
    own_id: str = "ch-1",
    current: dict[int, bytes] | None = None,
) -> Appraisal:
    return appraise(
        document,
        reference or reference_values(),
        machines or inventory(),
        required_types=required,
        now=now,
        own_id=own_id,
        current_nonces=CURRENT if current is None else current,
    )


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


def test_an_appraisal_says_what_was_accepted() -> None:
    document = evidence_document(NONCES)
    result = run(document)
    chip = development_chip()
    assert result.hpke_key == b"an encoded HPKE key"
    assert result.signing_key == b"\x05" * 1984
    assert result.types == ("sev-snp",)
    assert result.hardware == (HardwareId("sev-snp", chip.chip_id.hex()),)
    assert (result.region, result.provider) == ("CH", "example-cloud")
    assert (result.machine.name, result.machine.model, result.machine.owner) == ("zrh-1", "gpu.8", "example")
    (item,) = result.items
    assert (item.product, item.image, item.measurement) == ("Milan", "worker", MEASUREMENT.hex())
    assert result.development is True
    assert result.evidence_sha256 == EvidenceDocument.parse(document).digest().hex()
    assert (result.reference_version, result.reference_digest) == (1, reference_values().digest)
    assert (result.inventory_version, result.inventory_digest) == (1, inventory().digest)
    assert (result.not_before, result.not_after) == (CREATED_AT, WINDOW * 30 + 600)


def test_an_appraisal_ends_with_the_first_certificate_that_expires() -> None:
    chip = development_vendor().chip(now=CREATED_AT, lifetime=NOW + 60 - CREATED_AT)
    document = evidence_document(NONCES, chip=chip)
    assert run(document, reference_values(chip), machines=inventory(chip)).not_after == NOW + 60


@pytest.mark.parametrize("product", list(Product))
def test_evidence_of_each_product_is_accepted(product: Product) -> None:
    chip = development_chip(product)
    result = run(evidence_document(NONCES, chip=chip), reference_values(chip), machines=inventory(chip))
    assert result.items[0].product == product


# Reasons to refuse: the guest


def test_debug_is_refused() -> None:
    document = evidence_document(NONCES, policy=0x30000 | POLICY_DEBUG)
    refused(Reason.DEBUG_ENABLED, lambda: run(document))


def test_a_migration_agent_is_refused() -> None:
    document = evidence_document(NONCES, policy=0x30000 | POLICY_MIGRATION_AGENT)
    refused(Reason.PROVENANCE, lambda: run(document))


@pytest.mark.parametrize("vmpl", [1, 2, 3, 4, 2**32 - 1])
def test_another_vmpl_is_refused(vmpl: int) -> None:
    refused(Reason.VMPL, lambda: run(evidence_document(NONCES, vmpl=vmpl)))


def test_a_vmpl_is_accepted_where_it_is_listed() -> None:
    values = reference_json()
    values["sev-snp"]["vmpl"] = [0, 1]
    assert run(evidence_document(NONCES, vmpl=1), read_reference(values)).types == ("sev-snp",)


@pytest.mark.parametrize("which", ["reported", "committed", "launch"])
@pytest.mark.parametrize("product", [Product.MILAN, Product.TURIN])
def test_a_tcb_below_the_minimum_is_refused_for_each_component(which: str, product: Product) -> None:
    for component in product.layout:
        low = {**DEVELOPMENT_TCB, component: DEVELOPMENT_TCB[component] - 1}
        if which == "reported":
            chip = development_vendor(product).chip(now=CREATED_AT, tcb=low)
            document = evidence_document(NONCES, chip=chip)
        else:
            chip = development_chip(product)
            fields: dict[str, Any] = {f"{which}_tcb": low}
            document = evidence_document(NONCES, chip=chip, **fields)
        error = refused(Reason.TCB, lambda d=document, c=chip: run(d, reference_values(c)))  # type: ignore[misc]
        assert which in error.message
        assert component in error.message


def test_a_higher_component_does_not_make_up_for_a_lower_one() -> None:
    low = {**DEVELOPMENT_TCB, "bootloader": 200, "snp": 7}
    chip = development_vendor().chip(now=CREATED_AT, tcb=low)
    refused(Reason.TCB, lambda: run(evidence_document(NONCES, chip=chip), reference_values(chip)))


def test_a_product_without_a_minimum_is_refused() -> None:
    chip = development_chip(Product.GENOA)
    values = reference_json(chip)
    values["sev-snp"]["minimum_tcb"] = reference_json()["sev-snp"]["minimum_tcb"]
    refused(Reason.TCB, lambda: run(evidence_document(NONCES, chip=chip), read_reference(values)))


def test_a_measurement_that_is_not_listed_is_refused() -> None:
    refused(Reason.MEASUREMENT, lambda: run(evidence_document(NONCES, measurement=bytes(48))))


# Reasons to refuse: the binding


def test_evidence_bound_to_another_hpke_key_is_refused() -> None:
    document = replace(EvidenceDocument.parse(evidence_document(NONCES)), hpke_key=b"another key")
    refused(Reason.BINDING, lambda: run(document.to_bytes()))


def test_evidence_bound_to_another_signing_key_is_refused() -> None:
    document = replace(EvidenceDocument.parse(evidence_document(NONCES)), signing_key=b"\x06" * 1984)
    refused(Reason.BINDING, lambda: run(document.to_bytes()))


def test_evidence_for_another_challenge_is_refused() -> None:
    old = EvidenceDocument.parse(evidence_document({**NONCES, "de-1": (WINDOW, b"\x33" * 32)}))
    replayed = replace(old, nonces=EvidenceDocument.parse(evidence_document(NONCES)).nonces)
    refused(Reason.BINDING, lambda: run(replayed.to_bytes()))


def test_a_challenge_without_one_of_its_nonces_is_another_challenge() -> None:
    document = EvidenceDocument.parse(evidence_document(NONCES))
    refused(Reason.BINDING, lambda: run(replace(document, nonces=document.nonces[:1]).to_bytes()))


# Reasons to refuse: freshness


def test_a_custodian_that_is_not_in_the_list_refuses() -> None:
    error = refused(Reason.STALE, lambda: run(evidence_document(NONCES), own_id="fr-1"))
    assert "holds no nonce of custodian fr-1" in error.message


def test_an_old_nonce_is_refused() -> None:
    document = evidence_document({"ch-1": (WINDOW - 2, b"\x09" * 32)})
    error = refused(Reason.STALE, lambda: run(document))
    assert "not current" in error.message


def test_a_nonce_that_the_custodian_did_not_publish_is_refused() -> None:
    refused(Reason.STALE, lambda: run(evidence_document({"ch-1": (WINDOW, b"\x99" * 32)})))


def test_the_nonce_of_another_window_does_not_pass_for_the_current_one() -> None:
    refused(Reason.STALE, lambda: run(evidence_document({"ch-1": (WINDOW - 1, NONCE)})))


def test_no_current_nonce_refuses_everything() -> None:
    refused(Reason.STALE, lambda: run(evidence_document(NONCES), current={}))


def test_evidence_older_than_is_accepted_is_refused() -> None:
    values = reference_json() | {"max_evidence_age": 5}
    refused(Reason.STALE, lambda: run(evidence_document(NONCES), read_reference(values)))


# Reasons to refuse: types


def document_with(*items: EvidenceItem) -> bytes:
    return replace(EvidenceDocument.parse(evidence_document(NONCES)), items=items).to_bytes()


def test_an_unknown_type_is_refused_even_beside_a_known_one() -> None:
    snp = EvidenceDocument.parse(evidence_document(NONCES)).items[0]
    other = EvidenceItem("quantum-seal", b"evidence", ())
    refused(Reason.EVIDENCE_TYPE, lambda: run(document_with(snp, other)))
    refused(Reason.EVIDENCE_TYPE, lambda: run(document_with(other)))


def test_a_required_type_that_is_missing_is_refused() -> None:
    refused(Reason.EVIDENCE_TYPE, lambda: run(evidence_document(NONCES), required=("sev-snp", "nvidia-gpu")))


def test_requiring_no_type_at_all_is_refused() -> None:
    refused(Reason.EVIDENCE_TYPE, lambda: run(evidence_document(NONCES), required=()))


# Reasons to refuse: provenance and root


def test_a_chip_that_the_inventory_does_not_list_is_refused() -> None:
    other = development_vendor().chip(now=CREATED_AT)
    refused(Reason.PROVENANCE, lambda: run(evidence_document(NONCES, chip=other)))


def test_a_masked_chip_id_cannot_be_looked_up() -> None:
    masked = development_vendor().provider_chip("CN=example-cloud", now=CREATED_AT)
    refused(Reason.PROVENANCE, lambda: run(evidence_document(NONCES, chip=masked)))


def test_a_vlek_with_a_chip_id_that_is_listed_is_accepted() -> None:
    provider = development_vendor().provider_chip("CN=example-cloud", now=CREATED_AT)
    document = evidence_document(NONCES, chip=provider, chip_id=development_chip().chip_id)
    assert run(document).region == "CH"


def test_a_development_root_is_refused_unless_it_is_named() -> None:
    values = reference_json()
    values["sev-snp"] |= {"roots": [root for root, line in AMD_ROOTS.items() if line == "Milan"]}
    values["sev-snp"]["development_roots"] = []
    reference = read_reference(values)
    assert not reference.trusts_development
    refused(Reason.ROOT_NOT_PINNED, lambda: run(evidence_document(NONCES), reference))
    assert reference_values().trusts_development


def test_what_verification_refuses_is_refused() -> None:
    document = EvidenceDocument.parse(evidence_document(NONCES))
    item = document.items[0]
    broken = item.evidence[:0x2A0] + bytes(144) + item.evidence[0x330:]
    refused(Reason.SIGNATURE, lambda: run(document_with(replace(item, evidence=broken))))
    refused(Reason.MALFORMED, lambda: run(document_with(replace(item, evidence=item.evidence[:-1]))))
    refused(Reason.CHAIN, lambda: run(document_with(replace(item, endorsements=()))))
    refused(Reason.EXPIRED, lambda: run_at(CREATED_AT + 8 * 365 * 86400))
    refused(Reason.NOT_YET_VALID, lambda: run_at(CREATED_AT - 3000))


def run_at(now: int) -> Appraisal:
    window = now // 30
    return run(evidence_document({"ch-1": (window, NONCE)}), now=now, current={window: NONCE})


def test_a_region_that_is_not_allowed_is_refused() -> None:
    result = run(evidence_document(NONCES))
    result.require_region(["DE", "CH"])
    refused(Reason.REGION, lambda: result.require_region(["DE"]))
    refused(Reason.REGION, lambda: result.require_region([]))


# Real evidence


def milan_reference() -> dict[str, Any]:
    report = parse_report(read_report(vector("sev_snp/report_milan.hex")))
    values = reference_json()
    values["sev-snp"] |= {
        "roots": [root for root, line in AMD_ROOTS.items() if line == "Milan"],
        "development_roots": [],
        "minimum_tcb": {"Milan": {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115}},
    }
    values["sev-snp"]["images"][0]["measurement"] = report.measurement.hex()
    return values


def real_inventory(chip_id: str) -> Inventory:
    machines = inventory_json()
    machines["machines"][0]["hardware"] = {"sev-snp": [chip_id]}
    return read_inventory(machines)


def judge(
    report: str, vek: str, chain: str, at: datetime, values: dict[str, Any], machines: Inventory | None = None
) -> tuple[bool, bool, str]:
    verdict = judge_sev_snp(
        vector(f"sev_snp/{report}"),
        [vector(f"sev_snp/{vek}"), vector(f"sev_snp/{chain}")],
        now=int(at.timestamp()),
        reference=read_reference(values).sev_snp,
        inventory=machines,
    )
    return verdict.ok, verdict.verified, verdict.reason


def test_the_real_milan_report_is_accepted_where_its_values_are_listed() -> None:
    at = datetime(2024, 6, 1, tzinfo=UTC)
    files = ("report_milan.hex", "vcek_milan.der", "ask_ark_milan.pem", at)
    assert judge(*files, milan_reference()) == (True, True, "")
    values = milan_reference()
    values["sev-snp"]["minimum_tcb"]["Milan"]["microcode"] = 116
    assert judge(*files, values) == (False, True, "TCB")
    values = milan_reference()
    values["sev-snp"]["images"][0]["measurement"] = MEASUREMENT.hex()
    assert judge(*files, values) == (False, True, "MEASUREMENT")
    chip_id = parse_report(read_report(vector("sev_snp/report_milan.hex"))).chip_id.hex()
    assert judge(*files, milan_reference(), real_inventory(chip_id)) == (True, True, "")
    assert judge(*files, milan_reference(), real_inventory("01" * 64)) == (False, True, "PROVENANCE")


def test_the_real_debug_report_is_refused_for_debug() -> None:
    at = datetime(2024, 6, 1, tzinfo=UTC)
    files = ("debug_milan.bin", "debug_milan_vcek.der", "ask_ark_milan.pem", at)
    assert judge(*files, milan_reference()) == (False, True, "DEBUG_ENABLED")


def test_the_real_vlek_report_is_refused_for_its_vmpl_and_then_for_its_masked_chip() -> None:
    at = datetime(2025, 6, 1, tzinfo=UTC)
    files = ("vlek_milan.bin", "vlek_milan.der", "ask_ark_milan_vlek.pem", at)
    values = milan_reference()
    report = parse_report(vector("sev_snp/vlek_milan.bin"))
    values["sev-snp"]["images"][0]["measurement"] = report.measurement.hex()
    values["sev-snp"]["platform_info"]["allowed"] += ["TSME_EN", "ECC_EN", "ALIAS_CHECK_COMPLETE"]
    assert judge(*files, values) == (False, True, "VMPL")
    values["sev-snp"]["vmpl"] = [1]
    assert judge(*files, values) == (False, True, "PROVENANCE")


def test_a_file_is_judged_against_expected_report_data() -> None:
    report = development_chip().sign_report(bytes(64), MEASUREMENT)
    for expected, reason in ((bytes(64), ""), (b"\x01" * 64, "BINDING")):
        verdict = judge_sev_snp(
            report,
            development_chip().endorsements,
            now=NOW,
            reference=reference_values().sev_snp,
            inventory=inventory(),
            expected_report_data=expected,
        )
        assert verdict.reason == reason
        assert verdict.claims["region"] == "CH"


def test_a_kept_appraisal_holds_until_the_evidence_is_too_old() -> None:
    kept = appraise(
        evidence_document(NONCES),
        reference_values(),
        inventory(),
        required_types=("sev-snp",),
        now=NOW,
        own_id="ch-1",
        current_nonces={WINDOW: NONCE},
    )
    assert kept.holds_at(NOW)
    assert kept.holds_at(kept.not_after)
    assert not kept.holds_at(kept.not_after + 1)
    assert not kept.holds_at(CREATED_AT - 1)
    refused(Reason.EVIDENCE_TYPE, lambda: kept.require_types(("tdx",)))
    refused(Reason.EVIDENCE_TYPE, lambda: kept.require_types(()))


def test_verification_is_asked_with_the_named_roots_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    real = sev_snp.verify

    def record(*args: Any, **options: Any) -> sev_snp.VerifiedReport:
        seen.append(options["pinned_roots"])
        return real(*args, **options)

    monkeypatch.setattr(sev_snp, "verify", record)
    run(evidence_document(NONCES))
    assert seen == [{development_vendor().root}]
