"""Workers of several pieces of hardware: all present, all bound to one challenge and key, all of one machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from keyquorum_core.attestation.appraisal import Appraisal, appraise, check_continues
from keyquorum_core.attestation.evidence import EvidenceDocument, EvidenceItem
from keyquorum_core.attestation.naming import claims_development
from keyquorum_core.attestation.nvidia_evidence import GpuEvidence
from keyquorum_core.attestation.tpm2_state import QuoteState
from keyquorum_core.errors import KeyquorumError, Reason
from tests.support import nvidia, soft_tpm, vendor
from tests.support.composite import (
    ALL,
    NOW,
    NVIDIA,
    TYPES,
    hardware,
    inventory_body,
    reference_body,
    worker_document,
)
from tests.support.vendor import read_inventory, read_reference

WINDOW = NOW // 30
NONCE = b"\x11" * 32
NONCES = {"ch-1": (WINDOW, NONCE), "de-1": (WINDOW, b"\x22" * 32)}
AK = soft_tpm.soft_key().fingerprint


class Tpms:
    """What a custodian remembers, as given."""

    def __init__(self, last: QuoteState) -> None:
        self._last = last

    def last(self, ak: str) -> QuoteState | None:
        return self._last if ak == AK else None


def run(
    document: bytes,
    required: Sequence[str] = (),
    *,
    reference: dict[str, Any] | None = None,
    inventory: dict[str, Any] | None = None,
    tpm: Tpms | None = None,
) -> Appraisal:
    types = [item.type for item in EvidenceDocument.parse(document).items]
    return appraise(
        document,
        read_reference(reference or reference_body()),
        read_inventory(inventory or inventory_body()),
        required_types=required or types,
        now=NOW,
        own_id="ch-1",
        current_nonces={WINDOW: NONCE},
        tpm=tpm,
    )


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


def document(*types: str, **changes: Any) -> bytes:
    return worker_document(types or ALL, NONCES, **changes)


# Accepted


def test_all_five_types_in_one_document_are_accepted() -> None:
    result = run(document())
    assert result.types == ALL
    assert {str(each) for each in result.hardware} == {
        f"{kind}:{each}" for kind, ids in hardware().items() for each in ids
    }
    assert (result.region, result.provider, result.machine.name) == ("CH", "example-cloud", "zrh-1")
    assert result.development
    assert result.not_after == WINDOW * 30 + 600
    assert [item.image for item in result.items][1:3] == ["worker", "worker"]
    assert "driver 580" in result.items[0].image


@pytest.mark.parametrize("types", [*((each,) for each in TYPES), *((NVIDIA, each) for each in TYPES)])
def test_each_type_is_accepted_alone_and_with_gpus(types: tuple[str, ...]) -> None:
    result = run(document(*types))
    assert result.types == types
    assert result.development is (types != ("tpm2",))


def test_gpus_may_come_in_one_item_or_in_several() -> None:
    for gpus in (((0, 1),), ((0,), (1,)), ((0,),)):
        result = run(document(NVIDIA, "sev-snp", gpus=gpus))
        assert len(result.items[0].hardware) == sum(map(len, gpus))


# Every required type, and none that is not known


def test_every_required_type_must_be_there() -> None:
    for missing in TYPES:
        present = [each for each in ALL if each != missing]
        refused(Reason.EVIDENCE_TYPE, lambda present=present: run(document(*present), ALL))  # type: ignore[misc]
    assert run(document(), ["sev-snp"]).types == ALL, "more than required is judged, too"


def test_a_type_that_the_reference_values_do_not_accept_is_refused_even_beside_others() -> None:
    for section in ALL:
        reference = reference_body()
        del reference[section]
        error = refused(Reason.EVIDENCE_TYPE, lambda reference=reference: run(document(), reference=reference))  # type: ignore[misc]
        assert section in error.actual


def test_gpus_alone_are_refused() -> None:
    refused(Reason.EVIDENCE_TYPE, lambda: run(document(NVIDIA)))


# One challenge, one key, one set of GPUs


def swap(kind: str, other: bytes) -> bytes:
    """The document with the item of one type taken from ``other``, a document for something else."""
    foreign = {item.type: item for item in EvidenceDocument.parse(other).items}
    return document(change=lambda item: foreign[item.type] if item.type == kind else item)


@pytest.mark.parametrize("kind", TYPES)
def test_evidence_for_another_key_or_challenge_is_refused_in_each_type(kind: str) -> None:
    refused(Reason.BINDING, lambda: run(swap(kind, document(hpke_key=b"another key"))))
    refused(Reason.BINDING, lambda: run(swap(kind, document(signing_key=b"\x06" * 1984))))
    other = worker_document(ALL, {"ch-1": (WINDOW, b"\x33" * 32)})
    refused(Reason.BINDING, lambda: run(swap(kind, other)))


@pytest.mark.parametrize("kind", TYPES)
def test_gpus_other_than_those_the_evidence_is_bound_to_are_refused(kind: str) -> None:
    """The GPUs are genuine and answer this very challenge, and the CPU did not see them."""
    alone = EvidenceDocument.parse(document(kind)).report_data()
    refused(Reason.BINDING, lambda: run(document(NVIDIA, kind, bound=alone)))
    both = EvidenceDocument.parse(document(NVIDIA, kind))
    first, second, other = both.items
    swapped = (replace(second, endorsements=first.endorsements), replace(first, endorsements=()), other)
    for items in ((first, other), swapped):
        refused(Reason.BINDING, lambda items=items: run(replace(both, items=items).to_bytes()))  # type: ignore[misc]


def test_a_gpu_that_answers_another_challenge_is_refused() -> None:
    def stale(item: EvidenceItem) -> EvidenceItem:
        return replace(item, evidence=nvidia.evidence(0)) if item.type == NVIDIA else item

    made = document(NVIDIA, "sev-snp", gpus=((0,),), change=stale)
    refused(Reason.BINDING, lambda: run(made))


def test_a_gpu_shown_twice_is_refused() -> None:
    refused(Reason.PROVENANCE, lambda: run(document(NVIDIA, "sev-snp", gpus=((0,), (0,)))))
    refused(Reason.PROVENANCE, lambda: run(document(NVIDIA, "sev-snp", gpus=((0, 1), (1,)))))


def test_rims_of_all_items_are_one_set() -> None:
    def twice(item: EvidenceItem) -> EvidenceItem:
        return replace(item, endorsements=(nvidia.rim_maker().driver, nvidia.rim_maker().vbios))

    made = document(NVIDIA, "tpm2", change=lambda item: twice(item) if item.type == NVIDIA else item)
    refused(Reason.MEASUREMENT, lambda: run(made))


def test_an_item_that_is_not_genuine_spoils_the_document() -> None:
    for kind in ALL:

        def broken(item: EvidenceItem, kind: str = kind) -> EvidenceItem:
            return replace(item, evidence=item.evidence[:-1]) if item.type == kind else item

        with pytest.raises(KeyquorumError):
            run(document(change=broken))


def test_endorsements_of_a_type_that_has_none_are_refused() -> None:
    for kind in ("tpm2", "nitro"):
        refused(
            Reason.MALFORMED,
            lambda kind=kind: run(document(kind, change=lambda item: replace(item, endorsements=(b"x",)))),  # type: ignore[misc]
        )
    for parts in ((), (b"x",) * 3):
        refused(
            Reason.MALFORMED,
            lambda parts=parts: run(document("tdx", change=lambda item: replace(item, endorsements=parts))),  # type: ignore[misc]
        )


# One machine


@pytest.mark.parametrize("kind", ["sev-snp", "tdx", "tpm2", "nitro", NVIDIA])
def test_hardware_of_two_machines_is_refused_and_of_two_regions_too(kind: str) -> None:
    for region, reason in (("CH", Reason.PROVENANCE), ("US", Reason.REGION)):
        apart = {"name": "elsewhere", "region": region, "hardware": {kind: hardware()[kind][-1:]}}
        refused(reason, lambda apart=apart: run(document(), inventory=inventory_body(apart)))  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["sev-snp", "tdx", "tpm2", "nitro", NVIDIA])
def test_hardware_that_the_inventory_does_not_list_is_refused(kind: str) -> None:
    body = inventory_body()
    body["machines"][0]["hardware"].pop(kind)
    refused(Reason.PROVENANCE, lambda: run(document(), inventory=body))


# TPMs: counters that go on


def test_a_tpm_whose_clock_or_counters_went_back_is_refused() -> None:
    (state,) = run(document("tpm2")).tpm_states
    assert (state.ak, state.clock, state.reset_count) == (AK, 1_000_000, 5)
    refused(Reason.STALE, lambda: run(document("tpm2"), tpm=Tpms(state)))
    refused(Reason.STALE, lambda: run(document("tpm2", quote={"clock": 999_999}), tpm=Tpms(state)))
    refused(Reason.STALE, lambda: run(document("tpm2", quote={"reset_count": 4}), tpm=Tpms(state)))
    assert run(document("tpm2", quote={"clock": 1_000_001}), tpm=Tpms(state)).tpm_states[0].clock == 1_000_001


# A worker that attests anew


def test_a_worker_goes_on_with_the_same_keys_and_hardware_and_a_tpm_that_was_not_reset() -> None:
    before = run(document("sev-snp", "tpm2"))
    check_continues(before, run(document("sev-snp", "tpm2", quote={"clock": 2_000_000})))
    for made, reason in (
        (document("sev-snp", "tpm2", quote={"clock": 2_000_000}, hpke_key=b"another"), Reason.BINDING),
        (document("sev-snp", "tpm2", quote={"clock": 2_000_000}, signing_key=b"\x06" * 1984), Reason.BINDING),
        (document("sev-snp"), Reason.PROVENANCE),
        (document(NVIDIA, "sev-snp", "tpm2", quote={"clock": 2_000_000}), Reason.PROVENANCE),
        (document("sev-snp", "tpm2", quote={"clock": 2_000_000, "reset_count": 6}), Reason.STALE),
        (document("sev-snp", "tpm2", quote={"clock": 2_000_000, "restart_count": 3}), Reason.STALE),
        (document("sev-snp", "tpm2"), Reason.STALE),
    ):
        refused(reason, lambda made=made: check_continues(before, run(made)))  # type: ignore[misc]


# What a leaf about a document says


@pytest.mark.parametrize("types", [*((each,) for each in TYPES), (NVIDIA, "tpm2"), ALL])
def test_the_maker_of_a_leaf_says_of_development_what_custodians_find(types: tuple[str, ...]) -> None:
    made = document(*types)
    assert claims_development(EvidenceDocument.parse(made)) is run(made).development


def test_certificates_of_no_vendor_claim_development_in_each_type() -> None:
    made = EvidenceDocument.parse(document())
    for kind, item in itertools.product(TYPES, made.items):
        if item.type == kind and kind != "tpm2":
            assert claims_development(replace(made, items=(item,)))
    assert not claims_development(replace(made, items=tuple(each for each in made.items if each.type == "tpm2")))
    assert GpuEvidence.parse(made.items[0].evidence).gpus
    assert vendor.development_chip().endorsements == made.items[2].endorsements
