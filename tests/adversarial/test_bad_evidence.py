"""Evidence that somebody made worse: one test for each way, one reason code for each, whatever the type.

The evidence is of our own making, so that a fresh clone tests all of it; it is genuine and acceptable until the test
changes the one thing that it is about.
"""

from __future__ import annotations

import itertools
from functools import cache

import pytest

from keyquorum_core.attestation.development import DevelopmentVendor
from keyquorum_core.attestation.nvidia_appraisal import appraise
from keyquorum_core.attestation.nvidia_reference import NvidiaReferenceValues
from keyquorum_core.attestation.tdx_verdict import judge_tdx
from keyquorum_core.attestation.tpm2_verdict import judge_tpm2
from keyquorum_core.attestation.verdict import Verdict, judge_sev_snp
from keyquorum_core.errors import KeyquorumError, Reason
from tests.support import intel_vendor, nitro_vendor, nvidia, soft_tpm, vendor
from tests.support.genuine import OWN

SIGNED = {"sev-snp": "report", "tdx": "quote", "tpm2": "quote", "nvidia-gpu": "report", "nitro": "document"}
"""The part that the hardware signed, by type."""
every_type = pytest.mark.parametrize("kind", SIGNED)


def refused(verdict: Verdict, reason: Reason) -> None:
    assert (verdict.ok, verdict.reason) == (False, reason), verdict.detail
    assert verdict.detail.startswith(reason)


def with_signed(kind: str, data: bytes) -> Verdict:
    return OWN[kind]().with_part(SIGNED[kind], data)


def signed(kind: str) -> bytes:
    return OWN[kind]().parts[SIGNED[kind]]


@every_type
def test_the_evidence_is_acceptable_before_it_is_made_worse(kind: str) -> None:
    genuine = OWN[kind]()
    verdict = genuine.judge(genuine.parts)
    assert (verdict.ok, verdict.verified, verdict.reason) == (True, True, "")


# Form


@every_type
def test_truncated(kind: str) -> None:
    for length in (0, 1, len(signed(kind)) // 2, len(signed(kind)) - 1):
        refused(with_signed(kind, signed(kind)[:length]), Reason.MALFORMED)


@every_type
def test_padded(kind: str) -> None:
    for padding in (b"\0", b"\xff", b"\n" + bytes(63)):
        refused(with_signed(kind, signed(kind) + padding), Reason.MALFORMED)


@every_type
def test_concatenated(kind: str) -> None:
    # Two of NVIDIA's reports are larger than any report may be, which is found out first.
    expected = Reason.TOO_LARGE if kind == "nvidia-gpu" else Reason.MALFORMED
    refused(with_signed(kind, signed(kind) * 2), expected)


@pytest.mark.parametrize(("kind", "other"), list(itertools.permutations(SIGNED, 2)))
def test_evidence_of_another_type(kind: str, other: str) -> None:
    refused(with_signed(kind, signed(other)), Reason.MALFORMED)


def test_a_quote_of_another_tee() -> None:
    quote = bytearray(signed("tdx"))
    quote[0:8] = b"\x03\0\x02\0\0\0\0\0"  # version 3, ECDSA, SGX
    refused(with_signed("tdx", bytes(quote)), Reason.EVIDENCE_TYPE)


def test_an_attestation_of_another_kind() -> None:
    certify = bytearray(signed("tpm2"))
    certify[4:6] = b"\x80\x17"
    refused(with_signed("tpm2", bytes(certify)), Reason.EVIDENCE_TYPE)


# Chains and roots


def test_another_vendors_chain() -> None:
    snp, gpu = OWN["sev-snp"](), OWN["nvidia-gpu"]()
    certificates = [gpu.parts[f"certificate {index}"] for index in range(5)]
    three = {"vek": certificates[0], "intermediate": certificates[1], "root": certificates[4]}
    refused(snp.judge({**snp.parts, **three}), Reason.ROOT_NOT_PINNED)
    amd = {"certificate 0": snp.parts["vek"], "certificate 1": snp.parts["intermediate"]}
    left = {name: data for name, data in gpu.parts.items() if not name.startswith("certificate")}
    refused(gpu.judge({**left, **amd, "certificate 2": snp.parts["root"]}), Reason.CHAIN)
    other = intel_vendor.IntelVendor()
    refused(OWN["tdx"]().with_part("collateral", other.collateral()), Reason.CHAIN)


def test_a_valid_chain_to_a_root_that_is_not_pinned() -> None:
    """Whole and consistent, and nobody named its root: as it is for anyone without our reference values."""
    chip = vendor.development_chip()
    now = vendor.CREATED_AT + 1000
    refused(judge_sev_snp(signed("sev-snp"), chip.endorsements, now=now), Reason.ROOT_NOT_PINNED)
    tdx = OWN["tdx"]()
    refused(judge_tdx(tdx.parts["quote"], tdx.parts["collateral"], now=intel_vendor.NOW), Reason.ROOT_NOT_PINNED)
    other = intel_vendor.IntelVendor()
    foreign = {"quote": other.quote(), "collateral": other.collateral()}
    refused(tdx.judge(foreign), Reason.ROOT_NOT_PINNED)
    refused(OWN["nitro"]().judge({"document": nitro_vendor.NitroVendor().document()}), Reason.ROOT_NOT_PINNED)
    chain = nvidia.device_chain()
    gpu = {f"certificate {index}": der for index, der in enumerate(chain.ders)}
    whole = OWN["nvidia-gpu"]()
    refused(whole.judge({**whole.parts, **gpu, "report": nvidia.Gpu(chain).report()}), Reason.ROOT_NOT_PINNED)


@cache
def namesake() -> DevelopmentVendor:
    """Has our vendor's names on every certificate, and its two keys the other way round."""
    real = vendor.development_vendor()
    return DevelopmentVendor.create(now=vendor.CREATED_AT, ark_key=real.ask_key, ask_key=real.ark_key)


@pytest.mark.parametrize("part", ["vek", "intermediate"])
def test_a_certificate_with_a_matching_name_and_another_key(part: str) -> None:
    snp = OWN["sev-snp"]()
    chip = namesake().chip(now=vendor.CREATED_AT)
    replacement = chip.endorsements[("vek", "intermediate").index(part)]
    report = chip.sign_report(bytes(range(64)), vendor.MEASUREMENT) if part == "vek" else snp.parts["report"]
    refused(snp.judge({**snp.parts, part: replacement, "report": report}), Reason.CHAIN)


def test_a_gpus_certificate_with_a_matching_name_and_another_key() -> None:
    """The chain of another maker with NVIDIA's names, hung below the pinned root."""
    gpu = OWN["nvidia-gpu"]()
    forged = nvidia.device_chain()
    chain = {f"certificate {index}": der for index, der in enumerate(forged.ders[:4])}
    refused(gpu.judge({**gpu.parts, **chain, "report": nvidia.Gpu(forged).report()}), Reason.CHAIN)


# Time


def at(kind: str, now: int) -> Verdict:
    genuine = OWN[kind]()
    return genuine.judge_then(genuine.parts, now)


WINDOWS = {
    "sev-snp": (vendor.CREATED_AT, 8 * 365 * 86400),
    "tdx": (intel_vendor.NOW - 86400, 31 * 86400),
    "nvidia-gpu": (nvidia.CREATED_AT, 11 * 365 * 86400),
    "nitro": (nitro_vendor.NOW - 3600, 4 * 3600),
}
"""By type: when its certificates begin, and how many seconds later one of them is over."""


@pytest.mark.parametrize("kind", WINDOWS)
def test_expired_endorsements(kind: str) -> None:
    start, length = WINDOWS[kind]
    refused(at(kind, start + length), Reason.EXPIRED)


@pytest.mark.parametrize("kind", WINDOWS)
def test_endorsements_that_are_not_valid_yet(kind: str) -> None:
    refused(at(kind, WINDOWS[kind][0] - 7200), Reason.NOT_YET_VALID)


def test_collateral_older_than_is_accepted() -> None:
    """Valid for thirty days, and accepted for ten."""
    refused(at("tdx", intel_vendor.NOW + 10 * 86400), Reason.STALE)


# What it says


def test_a_zero_chip_id_with_a_vcek() -> None:
    snp = OWN["sev-snp"]()
    masked = vendor.development_chip().sign_report(bytes(64), vendor.MEASUREMENT, chip_id=bytes(64))
    refused(snp.with_part("report", masked), Reason.CHIP_ID)


def tpm(fields: soft_tpm.QuoteFields) -> Verdict:
    evidence = soft_tpm.evidence(fields=fields)
    return judge_tpm2(evidence.to_bytes(), now=0, enrolled_aks={soft_tpm.soft_key().fingerprint})


def test_an_empty_pcr_selection() -> None:
    refused(tpm(soft_tpm.QuoteFields(selections=(("sha256", ()),), pcrs={})), Reason.MEASUREMENT)


def test_a_sha1_bank() -> None:
    pcrs = dict.fromkeys((0, 4, 7), b"\x10" * 20)
    refused(tpm(soft_tpm.QuoteFields(selections=(("sha1", (0, 4, 7)),), pcrs=pcrs)), Reason.MEASUREMENT)


def test_an_empty_nonce() -> None:
    refused(tpm(soft_tpm.QuoteFields(extra_data=b"")), Reason.BINDING)
    gpu = OWN["nvidia-gpu"]()
    refused(gpu.with_part("report", nvidia.gpu().report(nonce=bytes(32))), Reason.BINDING)
    nitro = nitro_vendor.nitro_vendor()
    for nonce in (None, b""):
        refused(OWN["nitro"]().judge({"document": nitro.document(nonce=nonce)}), Reason.BINDING)


def test_duplicated_gpus() -> None:
    endorsements = [nvidia.rim_maker().driver, nvidia.rim_maker().vbios]
    reference = NvidiaReferenceValues.parse(nvidia.reference_json())
    now = nvidia.CREATED_AT + 2000
    with pytest.raises(KeyquorumError) as caught:
        appraise([nvidia.evidence(0, 1, 0)], endorsements, reference, expected_nonce=nvidia.NONCE, now=now)
    assert caught.value.reason is Reason.PROVENANCE


@pytest.mark.parametrize("lines", [[], None])
def test_an_empty_rim(lines: list[str] | None) -> None:
    """No golden value at all, and sixty-four that are not active."""
    maker = nvidia.rim_maker()
    empty = maker.sign(maker.xml(nvidia.VBIOS, lines=lines))
    refused(OWN["nvidia-gpu"]().with_part("VBIOS RIM", empty), Reason.MEASUREMENT)


@pytest.mark.parametrize(("version", "product"), [("96.00.D9.00.03", "GH100"), (nvidia.VBIOS, "GB100")])
def test_a_rim_for_another_board(version: str, product: str) -> None:
    other = nvidia.rim_maker().rim(version, nvidia.VBIOS_INDICES, product=product)
    refused(OWN["nvidia-gpu"]().with_part("VBIOS RIM", other), Reason.MEASUREMENT)
