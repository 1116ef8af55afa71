"""A worker's GPUs: what is accepted, and one refusal for each check, revocation among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.attestation.nvidia_appraisal import AppraisedGpus, appraise
from keyquorum_core.attestation.nvidia_certificates import Certificate, verify_device
from keyquorum_core.attestation.nvidia_evidence import GpuEvidence, NvidiaSettings, ShownGpu
from keyquorum_core.attestation.nvidia_ocsp import looks_like_ocsp, verify_revocation
from keyquorum_core.attestation.nvidia_reference import NvidiaReferenceValues
from keyquorum_core.attestation.nvidia_report import Field
from keyquorum_core.attestation.nvidia_verdict import judge_nvidia_gpu
from keyquorum_core.attestation.roots import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from tests.support import nvidia
from tests.support.nvidia import CREATED_AT, GOLDEN, NONCE, SETTINGS, gpu, ocsp_response, rim_maker

NOW = CREATED_AT + 2000
FAMILY = NvidiaReferenceValues.parse


def rims() -> list[bytes]:
    return [rim_maker().driver, rim_maker().vbios]


def accept(
    *evidence: bytes,
    endorsements: Sequence[bytes] | None = None,
    nonce: bytes = NONCE,
    now: int = NOW,
    **reference: Any,
) -> AppraisedGpus:
    return appraise(
        evidence or [nvidia.evidence(0)],
        rims() if endorsements is None else endorsements,
        FAMILY(nvidia.reference_json(**reference)),
        expected_nonce=nonce,
        now=now,
    )


def shown(report: bytes, number: int = 0, settings: NvidiaSettings = SETTINGS) -> bytes:
    return GpuEvidence(settings, (ShownGpu(report, gpu(number).chain.ders),)).to_bytes()


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


# Acceptance


def test_a_gpu_is_accepted_with_both_rims() -> None:
    appraised = accept()
    assert appraised.hardware_ids == ("416a5fafcbd9fa5ca3",)
    assert appraised.development
    assert appraised.matches[0].complete
    assert (appraised.not_before, appraised.not_after) == (CREATED_AT, CREATED_AT + 3650 * 86400)


def test_several_gpus_are_all_appraised() -> None:
    assert len(accept(nvidia.evidence(0, 1, 2)).hardware_ids) == 3


def test_a_gpu_among_several_that_does_not_match_is_refused() -> None:
    bad = gpu(2).report(measurements=GOLDEN | {3: bytes(48)})
    made = GpuEvidence(SETTINGS, (ShownGpu(gpu(1).report(), gpu(1).chain.ders), ShownGpu(bad, gpu(2).chain.ders)))
    refused(Reason.MEASUREMENT, lambda: accept(made.to_bytes()))


def test_a_gpu_shown_twice_is_refused_in_one_item_and_in_two() -> None:
    refused(Reason.PROVENANCE, lambda: accept(nvidia.evidence(0, 1, 0)))
    refused(Reason.PROVENANCE, lambda: accept(nvidia.evidence(0, 1), nvidia.evidence(1)))


def test_gpus_of_several_items_are_all_appraised() -> None:
    assert len(accept(nvidia.evidence(0), nvidia.evidence(1, 2)).hardware_ids) == 3
    bad = nvidia.evidence(1, settings=replace(SETTINGS, developer_tools=True))
    refused(Reason.DEBUG_ENABLED, lambda: accept(nvidia.evidence(0), bad))


def test_older_versions_are_accepted_until_their_grace_period_ends() -> None:
    def run(until: int) -> int:
        grace = [{"driver_version": nvidia.DRIVER, "until": until}, {"vbios_version": nvidia.VBIOS, "until": until + 5}]
        newer: dict[str, Any] = {"driver_versions": ["590.1.1"], "vbios_versions": ["96.00.FF.00.01"]}
        return accept(grace=grace, **newer).not_after

    assert run(NOW + 60) == NOW + 60
    assert "grace period" in refused(Reason.TCB, lambda: run(NOW - 1)).message


def test_a_report_for_another_challenge_is_refused() -> None:
    refused(Reason.BINDING, lambda: accept(nonce=bytes(range(32))))
    refused(Reason.BINDING, lambda: accept(nvidia.evidence(0, nonce=bytes(32))))
    refused(Reason.MALFORMED, lambda: accept(nonce=b""))


# The driver's word


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"developer_tools": True}, Reason.DEBUG_ENABLED),
        ({"cc_feature": False}, Reason.MEASUREMENT),
        ({"environment": "simulation"}, Reason.MEASUREMENT),
        ({"environment": "unavailable"}, Reason.MEASUREMENT),
        ({"multi_gpu": "protected-pcie"}, Reason.UNSUPPORTED),
    ],
)
def test_settings_other_than_for_production_are_refused(changes: dict[str, Any], reason: Reason) -> None:
    refused(reason, lambda: accept(nvidia.evidence(0, settings=replace(SETTINGS, **changes))))


def test_links_that_are_encrypted_are_accepted() -> None:
    accept(nvidia.evidence(0, settings=replace(SETTINGS, multi_gpu="nvlink-encryption")))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b" ",
        lambda data: data.replace(b'"v":1', b'"v":2'),
        lambda data: data.replace(b'"cc_feature":true,', b""),
        lambda data: data.replace(b'"cc_feature":true', b'"cc_feature":1'),
        lambda data: data.replace(b'"developer_tools":false,', b""),
        lambda data: data.replace(b'"production"', b'""'),
        lambda data: data.replace(b'"none"', b'"other"'),
        lambda data: data.replace(b'"v":1', b'"v":1,"w":1'),
        lambda data: data.replace(b'"report":"', b'"report":"AAAA","x":"'),
        lambda data: data.replace(b'"chain":["', b'"chain":["AAAA","'),
    ],
)
def test_evidence_of_another_form_is_refused(change: Callable[[bytes], bytes]) -> None:
    data = nvidia.evidence(0)
    assert change(data) != data
    with pytest.raises(MalformedError):
        accept(change(data))


def test_no_gpu_and_too_many_are_refused() -> None:
    one = ShownGpu(b"x", (b"x",) * 5)
    for gpus in ((), (one,) * 17):
        with pytest.raises(MalformedError):
            GpuEvidence.parse(GpuEvidence(SETTINGS, gpus).to_bytes())


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=100), st.integers(0, 300), st.integers(0, 30))
def test_no_bytes_make_the_reader_raise_anything_else(noise: bytes, at: int, cut: int) -> None:
    data = GpuEvidence(SETTINGS, (ShownGpu(b"report", (b"x",) * 5),)).to_bytes()
    for each in (noise, data[:at] + noise + data[at + cut :]):
        try:
            GpuEvidence.parse(each)
        except KeyquorumError:
            continue


# RIMs and allowlists


def test_each_rim_must_be_there() -> None:
    for missing in ((0, 1), (0,), (1,)):
        chosen = [each for position, each in enumerate(rims()) if position not in missing]
        refused(Reason.MEASUREMENT, lambda chosen=chosen: accept(endorsements=chosen))  # type: ignore[misc]


def test_a_rim_that_belongs_to_no_gpu_is_refused() -> None:
    for other in (rim_maker().rim("96.00.D9.00.03", [1]), rim_maker().rim(nvidia.VBIOS, [1], product="GB100")):
        refused(Reason.MEASUREMENT, lambda other=other: accept(endorsements=[*rims(), other]))  # type: ignore[misc]
    refused(Reason.MEASUREMENT, lambda: accept(endorsements=[*rims(), rims()[0]]))


def test_a_rim_that_is_not_genuine_is_refused() -> None:
    driver, vbios = rims()
    changed = vbios.replace(GOLDEN[3].hex().encode(), GOLDEN[4].hex().encode())
    refused(Reason.SIGNATURE, lambda: accept(endorsements=[driver, changed]))


def test_an_endorsement_of_another_kind_is_refused() -> None:
    refused(Reason.MALFORMED, lambda: accept(endorsements=[*rims(), gpu(0).chain.ders[0]]))


@pytest.mark.parametrize(
    "changes",
    [{"chips": ["GB100"]}, {"driver_versions": ["580.95.06"]}, {"vbios_versions": ["96.00.D9.00.03"]}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_in_an_allowlist_is_refused(changes: dict[str, Any]) -> None:
    refused(Reason.TCB, lambda: accept(**changes))


def test_a_report_without_its_firmware_is_refused_for_a_release() -> None:
    refused(Reason.MEASUREMENT, lambda: accept(shown(gpu().report({Field.FWID: None}))))


def test_a_report_of_another_mode_is_refused() -> None:
    refused(Reason.UNSUPPORTED, lambda: accept(shown(gpu().report({Field.PROTECTED_PCIE_STATUS: b"\xaa"}))))


def test_a_development_root_of_one_kind_is_not_accepted_where_none_is_named() -> None:
    device, manifests = gpu(0).chain.root, rim_maker().chain.root
    nvidias: dict[str, Any] = {"roots": [*NVIDIA_DEVICE_ROOTS], "rim_roots": [*NVIDIA_RIM_ROOTS]}
    for root in (device, manifests):
        refused(
            Reason.ROOT_NOT_PINNED,
            lambda root=root: accept(**(nvidias | {"development_roots": [root]})),  # type: ignore[misc]
        )


# Reference values


@pytest.mark.parametrize("name", nvidia.reference_json())
def test_each_reference_value_is_required(name: str) -> None:
    values = nvidia.reference_json()
    del values[name]
    refused(Reason.MALFORMED, lambda: FAMILY(values))


@pytest.mark.parametrize(
    "changes",
    [
        {"chips": []},
        {"driver_versions": []},
        {"vbios_versions": []},
        {"development_roots": []},
        {"chips": [""]},
        {"chips": ["GH100", "GH100"]},
        {"chips": ["*"]},
        {"driver_versions": ["580"]},
        {"vbios_versions": ["96.00.d9.00.02"]},
        {"roots": ["00" * 32]},
        {"roots": [*NVIDIA_RIM_ROOTS]},
        {"rim_roots": [*NVIDIA_DEVICE_ROOTS]},
        {"development_roots": [*NVIDIA_DEVICE_ROOTS]},
        {"development_roots": [*NVIDIA_RIM_ROOTS]},
        {"development_roots": ["zz"]},
        {"revocation": ""},
        {"revocation": "never"},
        {"max_revocation_age": 0},
        {"max_revocation_age": 30 * 86400},
        {"grace": [{"driver_version": nvidia.DRIVER, "until": 1}]},
        {"grace": [{"driver_version": "590.1.1"}]},
        {"grace": [{"vbios_version": "590.1.1", "until": 1}]},
        {"grace": [{"driver_version": "590.1.1", "until": 1}] * 2},
        {"unknown": 1},
    ],
    ids=repr,
)
def test_reference_values_that_say_less_do_not_load(changes: dict[str, object]) -> None:
    refused(Reason.MALFORMED, lambda: FAMILY(nvidia.reference_json(**changes)))


def test_reference_values_with_nvidias_roots_load() -> None:
    values = FAMILY(
        nvidia.reference_json(roots=[*NVIDIA_DEVICE_ROOTS], rim_roots=[*NVIDIA_RIM_ROOTS], development_roots=[])
    )
    assert not values.trusts_development


# Revocation


def chain() -> tuple[Certificate, ...]:
    return verify_device(gpu(0).chain.ders, {gpu(0).chain.root}).chain


def good(position: int = 1, **changes: Any) -> bytes:
    links = gpu(0).chain.links
    return ocsp_response(links[position], links[position + 1], **changes)


def check(*responses: bytes, now: int = NOW, max_age: int = 86400) -> None:
    verify_revocation(responses, [chain()], now=now, max_age=max_age)


def all_responses() -> list[bytes]:
    return [*nvidia.ocsp_responses(gpu(0).chain, 1), *nvidia.ocsp_responses(rim_maker().chain)]


def test_responses_are_verified_and_bound_how_long_an_appraisal_holds() -> None:
    appraised = accept(endorsements=[*rims(), *all_responses()], revocation="required")
    assert (appraised.not_before, appraised.not_after) == (CREATED_AT + 1000, CREATED_AT + 1000 + 86400)


def test_a_response_that_is_required_must_be_there() -> None:
    responses = all_responses()
    for missing in range(len(responses)):
        chosen = [*rims(), *responses[:missing], *responses[missing + 1 :]]
        refused(
            Reason.PROVENANCE,
            lambda chosen=chosen: accept(endorsements=chosen, revocation="required"),  # type: ignore[misc]
        )


@pytest.mark.parametrize("algorithm", [hashes.SHA1(), hashes.SHA256(), hashes.SHA384()], ids=lambda each: each.name)  # noqa: S303
def test_a_certificate_may_be_named_by_each_of_three_hashes(algorithm: hashes.HashAlgorithm) -> None:
    check(good(algorithm=algorithm))


def test_a_certificate_named_by_another_hash_is_refused() -> None:
    refused(Reason.MALFORMED, lambda: check(good(algorithm=hashes.SHA512())))


def test_a_revoked_certificate_is_refused_also_where_no_response_is_required() -> None:
    revoked = good(status=ocsp.OCSPCertStatus.REVOKED)
    error = refused(Reason.REVOKED, lambda: accept(endorsements=[*rims(), revoked]))
    assert "certificate_hold" in error.actual


def test_a_certificate_that_the_responder_does_not_know_is_refused() -> None:
    refused(Reason.PROVENANCE, lambda: check(good(status=ocsp.OCSPCertStatus.UNKNOWN)))


def test_a_response_about_a_foreign_certificate_is_refused() -> None:
    links = gpu(1).chain.links
    refused(Reason.PROVENANCE, lambda: check(ocsp_response(links[1], links[2])))


def test_two_responses_about_one_certificate_are_refused() -> None:
    refused(Reason.PROVENANCE, lambda: check(good(), good()))


def test_a_response_outside_its_time_is_refused() -> None:
    refused(Reason.NOT_YET_VALID, lambda: check(good(this_update=NOW + 1)))
    refused(Reason.STALE, lambda: check(good(next_update=NOW - 1)))
    refused(Reason.STALE, lambda: check(good(this_update=NOW - 4000, next_update=None)))
    refused(Reason.STALE, lambda: check(good(), max_age=900))
    check(good(next_update=None), now=CREATED_AT + 1000 + 3600)


def test_a_responder_that_the_issuer_certified_may_sign() -> None:
    delegate = nvidia.responder(gpu(0).chain.links[2])
    check(good(responder=delegate, certificates=[delegate]))
    check(good(responder=delegate, certificates=[gpu(0).chain.links[0], delegate]))


@pytest.mark.parametrize(
    "changes",
    [
        {"extensions": ()},
        {"ca": True},
        {"end": NOW - 1},
        {"start": NOW + 1},
        {"issuer_name": "Test GH100 Provisioner ICA 2"},
        {"signed_by": nvidia.gpu(1).chain.links[0].key},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_responder_that_may_not_sign_is_refused(changes: dict[str, object]) -> None:
    delegate = nvidia.responder(gpu(0).chain.links[2], **changes)
    refused(Reason.SIGNATURE, lambda: check(good(responder=delegate, certificates=[delegate])))


def test_a_responder_of_another_issuer_is_refused() -> None:
    delegate = nvidia.responder(gpu(0).chain.links[3])
    refused(Reason.SIGNATURE, lambda: check(good(responder=delegate, certificates=[delegate])))
    refused(Reason.SIGNATURE, lambda: check(good(responder=gpu(0).chain.links[1])))
    refused(Reason.SIGNATURE, lambda: check(good(signature_hash=hashes.SHA256())))


def test_a_response_that_is_none_is_refused() -> None:
    unsuccessful = ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.TRY_LATER)
    encoded = unsuccessful.public_bytes(Encoding.DER)
    assert looks_like_ocsp(encoded)
    for data in (encoded, b"", b"junk", good()[:-1], good() + b"\0", bytes(20 << 10)):
        refused(Reason.MALFORMED, lambda data=data: check(data))  # type: ignore[misc]


def test_bit_flips_in_a_response_are_refused() -> None:
    data = good()
    check(data)
    for bit in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyquorumError):
            check(bytes(flipped))


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=100), st.integers(0, 400), st.integers(0, 30))
def test_no_bytes_make_the_ocsp_reader_raise_anything_else(noise: bytes, at: int, cut: int) -> None:
    for data in (noise, good()[:at] + noise + good()[at + cut :]):
        try:
            check(data)
        except KeyquorumError:
            continue


# One file judged by itself


def judged(*endorsements: bytes, report: bytes | None = None, **changes: Any) -> tuple[bool, bool, str]:
    verdict = judge_nvidia_gpu(
        gpu().report() if report is None else report, [gpu(0).chain.pem, *endorsements], now=NOW, **changes
    )
    assert bool(verdict.claims) is verdict.verified
    return verdict.ok, verdict.verified, verdict.reason


def reference(**changes: object) -> NvidiaReferenceValues:
    return FAMILY(nvidia.reference_json(**changes))


def test_a_report_is_judged_by_reference_values() -> None:
    assert judged(*rims(), reference=reference()) == (True, True, "")
    assert judged(*rims(), reference=reference(), expected_nonce=NONCE) == (True, True, "")
    verdict = judge_nvidia_gpu(gpu().report(), [*rims(), *gpu(0).chain.ders], now=NOW, reference=reference())
    assert verdict.claims["debug"] == "disabled"


def test_a_report_that_falls_short_is_judged_genuine_and_not_acceptable() -> None:
    report = gpu().report(measurements=GOLDEN | {3: bytes(48)})
    assert judged(*rims(), report=report, reference=reference()) == (False, True, "MEASUREMENT")
    assert judged(rims()[0], reference=reference()) == (False, True, "MEASUREMENT")
    assert judged(*rims(), reference=reference(chips=["GB100"])) == (False, True, "TCB")
    assert judged(*rims(), reference=reference(revocation="required")) == (False, True, "PROVENANCE")
    assert judged(*rims(), reference=reference(), expected_nonce=bytes(range(32))) == (False, True, "BINDING")
    assert judged(*rims(), reference=reference(), expected_nonce=b"") == (False, True, "MALFORMED")
    assert judged(*rims(), report=gpu().report(nonce=bytes(32)), reference=reference()) == (False, True, "BINDING")
    pcie = gpu().report({Field.PROTECTED_PCIE_STATUS: b"\xaa"})
    assert judged(*rims(), report=pcie, reference=reference()) == (False, True, "UNSUPPORTED")


def test_what_is_not_genuine_is_judged_so() -> None:
    assert judged(*rims()) == (False, False, "ROOT_NOT_PINNED")
    assert judged(*rims(), report=b"", reference=reference()) == (False, False, "MALFORMED")
    assert judged(*rims(), report=gpu(1).report(), reference=reference()) == (False, False, "SIGNATURE")
    changed = rims()[0].replace(b"580.95.05", b"580.95.06")
    assert judged(changed, reference=reference()) == (False, False, "SIGNATURE")
    revoked = good(status=ocsp.OCSPCertStatus.REVOKED)
    assert judged(*rims(), revoked, reference=reference()) == (False, False, "REVOKED")
