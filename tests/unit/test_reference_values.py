"""Reference values and inventory: what loads, and how every missing, empty or doubtful member does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyquorum_core.attestation.inventory import HARDWARE, HardwareId, Inventory
from keyquorum_core.attestation.reference import ReferenceValues
from keyquorum_core.attestation.roots import AMD_ROOTS
from keyquorum_core.attestation.snp_products import Product
from keyquorum_core.attestation.snp_reference import PLATFORM_INFO
from keyquorum_core.bulletin import Bulletin
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from tests.support.composite import ALL, hardware, inventory_body, reference_body
from tests.support.vendor import (
    MEASUREMENT,
    bulletin,
    development_chip,
    development_vendor,
    inventory,
    inventory_json,
    read_inventory,
    read_reference,
    reference_json,
    reference_values,
)


def malformed(call: Callable[[], object]) -> MalformedError:
    with pytest.raises(MalformedError) as caught:
        call()
    assert caught.value.reason is Reason.MALFORMED
    return caught.value


# Reference values


def test_reference_values_are_read() -> None:
    reference = reference_values()
    assert (reference.version, reference.max_evidence_age, reference.types) == (1, 600, ("sev-snp",))
    assert reference.digest == bulletin("reference-values", reference_json()).digest
    snp = reference.sev_snp
    assert snp is not None
    assert snp.pinned_roots == {development_vendor().root}
    assert [each.measurement for each in snp.images] == [MEASUREMENT]
    assert snp.minimum_tcb[Product.MILAN]["microcode"] == 115
    assert snp.vmpl == {0}
    assert reference.trusts_development
    assert sorted(read_reference(reference_body()).types) == sorted(ALL)


@pytest.mark.parametrize("kind", ALL)
def test_a_type_without_a_section_is_not_accepted_and_an_empty_one_does_not_load(kind: str) -> None:
    body = reference_body()
    empty: list[Any] = [None, {}, [], "", 0]
    for nothing in empty:
        malformed(lambda nothing=nothing: read_reference(body | {kind: nothing}))  # type: ignore[misc]
    del body[kind]
    assert kind not in read_reference(body).types


@pytest.mark.parametrize("kind", ALL)
def test_each_member_of_each_section_is_required(kind: str) -> None:
    for member in reference_body()[kind]:
        body = reference_body()
        section = dict(body[kind])
        del section[member]
        assert member in malformed(lambda b=body, s=section: read_reference(b | {kind: s})).message  # type: ignore[misc]


@pytest.mark.parametrize(
    "change",
    [{"max_evidence_age": 0}, {"max_evidence_age": 10**9}, {"max_evidence_age": None}, {"extra": 1}, {"version": 1}],
    ids=str,
)
def test_other_members_do_not_load(change: dict[str, Any]) -> None:
    malformed(lambda: read_reference(reference_json() | change))


def test_reference_values_for_nothing_do_not_load() -> None:
    malformed(lambda: read_reference({"max_evidence_age": 600}))


MILAN_ROOT, GENOA_ROOT, _ = AMD_ROOTS
LEVELS = {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115}
IMAGE = reference_json()["sev-snp"]["images"][0]


def image(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**IMAGE, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    "change",
    [
        {"images": []},
        {"images": [image(), image()]},
        {"images": [image(measurement="00" * 48)]},
        {"images": [image(measurement="ab" * 47)]},
        {"images": [image(measurement="AB" * 48)]},
        {"images": [image(name="")]},
        {"images": [image(host_data=[])]},
        {"images": [image(host_data=None)]},
        {"images": [image(host_data=["00" * 32] * 2)]},
        {"images": [image(id_key_digests=[])]},
        {"images": [image(author_key_digests=[])]},
        {"images": [image(minimum_guest_svn=-1)]},
        {"images": [image(minimum_guest_svn=None)]},
        {"images": [image(until=0)]},
        {"images": [image(extra=1)]},
        {"vmpl": []},
        {"vmpl": [4]},
        {"vmpl": [0, 0]},
        {"vmpl": [True]},
        {"minimum_tcb": {}},
        {"minimum_tcb": {"Naples": LEVELS}},
        {"minimum_tcb": {"Milan": {}}},
        {"minimum_tcb": {"Milan": {**LEVELS, "fmc": 1}}},
        {"minimum_tcb": {"Turin": LEVELS}},
        {"minimum_tcb": {"Milan": {**LEVELS, "snp": 256}}},
        {"tcb_grace": [{"product": "Milan", "minimum": LEVELS}]},
        {"tcb_grace": [{"product": "Milan", "minimum": {**LEVELS, "snp": 9}, "until": 1}]},
        {"tcb_grace": [{"product": "Genoa", "minimum": LEVELS, "until": 1}]},
        {"tcb_grace": [{"product": "Naples", "minimum": LEVELS, "until": 1}]},
        {"platform_info": {"required": []}},
        {"platform_info": {"required": [], "allowed": ["SMT"]}},
        {"platform_info": {"required": [], "allowed": ["SMT_EN", "SMT_EN"]}},
        {"revocation": ""},
        {"revocation": "never"},
        {"max_revocation_age": 0},
        {"roots": [], "development_roots": []},
        {"roots": ["ab" * 32]},
        {"roots": [MILAN_ROOT, MILAN_ROOT]},
        {"roots": [GENOA_ROOT]},  # without a minimum for Genoa
        {"development_roots": [MILAN_ROOT]},
        {"extra": 1},
    ],
    ids=str,
)
def test_values_for_sev_snp_that_say_too_little_or_too_much_do_not_load(change: dict[str, Any]) -> None:
    values = reference_json()
    values["sev-snp"] |= change
    malformed(lambda: read_reference(values))


def test_bits_of_platform_info_are_the_ones_of_the_specification() -> None:
    assert list(PLATFORM_INFO.values()) == [1, 2, 4, 8, 16, 32, 128]
    values = reference_json()
    values["sev-snp"]["platform_info"] = {"required": ["ECC_EN"], "allowed": ["SMT_EN"]}
    snp = read_reference(values).sev_snp
    assert snp is not None
    assert (snp.platform_required, snp.platform_allowed) == (4, 5)


# Inventory


def test_an_inventory_is_read() -> None:
    found = inventory().machine_of([HardwareId("sev-snp", development_chip().chip_id.hex())])
    assert (found.region, found.provider, found.model, found.owner) == ("CH", "example-cloud", "gpu.8", "example")
    assert len(read_inventory(inventory_body()).machines) == sum(len(ids) for ids in hardware().values())


@pytest.mark.parametrize("member", ["name", "region", "provider", "model", "owner", "hardware"])
def test_each_member_of_a_machine_is_required(member: str) -> None:
    body = inventory_json()
    empty: list[Any] = [None, "", 0, {}, []]
    for value in empty:
        body["machines"][0] |= {member: value}
        malformed(lambda: read_inventory(body))
    del body["machines"][0][member]
    assert member in malformed(lambda: read_inventory(body)).message


@pytest.mark.parametrize(
    "own",
    [
        {"sev-snp": []},
        {"sev-snp": ["00" * 64]},
        {"sev-snp": ["01" * 8]},
        {"sev-snp": ["AB" * 64]},
        {"sev-snp": ["01" * 64, "01" * 64]},
        {"tdx": ["01" * 15]},
        {"tpm2": ["01" * 31]},
        {"tpm2": ["00" * 32]},
        {"nvidia-gpu": ["0"]},
        {"nitro": ["i-xyz"]},
        {"nitro": ["0827e799ec9232d44"]},
        {"tpm2-ak": ["01" * 32]},
        {"other": ["01"]},
    ],
    ids=str,
)
def test_a_bad_identity_does_not_load(own: dict[str, Any]) -> None:
    body = inventory_json()
    body["machines"][0]["hardware"] = own
    malformed(lambda: read_inventory(body))


def test_an_identity_belongs_to_one_machine_and_a_name_to_one() -> None:
    (machine,) = inventory_json()["machines"]
    other = {"sev-snp": ["01" * 64]}
    malformed(lambda: read_inventory({"machines": [machine, {**machine, "name": "zrh-2"}]}))
    malformed(lambda: read_inventory({"machines": [machine, {**machine, "hardware": other}]}))
    read_inventory({"machines": [machine, {**machine, "name": "zrh-2", "hardware": other}]})
    malformed(lambda: read_inventory({"machines": []}))
    malformed(lambda: read_inventory({"machines": [machine], "more": 1}))


def test_nothing_at_all_is_of_no_machine() -> None:
    with pytest.raises(KeyquorumError) as caught:
        inventory().machine_of([])
    assert caught.value.reason is Reason.PROVENANCE


def test_every_kind_of_identity_has_its_own_grammar() -> None:
    for kind, ids in hardware().items():
        assert all(HARDWARE[kind].fullmatch(each) for each in ids)


@settings(max_examples=100)
@given(st.data())
@example(None)
@pytest.mark.parametrize("which", ["reference", "inventory"])
def test_mutated_documents_raise_only_the_typed_error(which: str, data: st.DataObject | None) -> None:
    body, read = (
        (reference_body(), ReferenceValues.read) if which == "reference" else (inventory_body(), Inventory.read)
    )
    made = bulletin("any", body)
    raw = bytearray(json.dumps(body).encode())
    if data is not None:
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(raw)))
            raw[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        changed = replace(made, body=json.loads(raw))
    except ValueError:  # no JSON any more
        return
    try:
        found: object = read(Bulletin.parse(changed.payload()))
    except KeyquorumError:
        return
    if isinstance(found, ReferenceValues):
        assert found.types
    elif isinstance(found, Inventory):
        assert found.machines
