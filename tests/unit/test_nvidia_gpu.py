"""NVIDIA verification: a real report, and every way in which one can fail to be genuine or to match its manifests."""

from __future__ import annotations

import base64
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ObjectIdentifier
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.attestation import nvidia_gpu
from keyquorum_core.attestation.nvidia_certificates import read_certificates
from keyquorum_core.attestation.nvidia_report import SIGNATURE_BYTES, Field, parse_report, read_report
from keyquorum_core.attestation.nvidia_rim import Rim, verify_rim
from keyquorum_core.attestation.nvidia_verdict import judge_nvidia_gpu
from keyquorum_core.attestation.roots import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from tests.support import nvidia
from tests.support.nvidia import CREATED_AT, DRIVER, GOLDEN, NONCE, VBIOS, Chain, Gpu, device_chain, gpu, links
from tests.support.vectors import vector

NOW = CREATED_AT + 2000
JANUARY_2025 = int(datetime(2025, 1, 15, tzinfo=UTC).timestamp())
REAL_NONCE = "27a328247bf7935c993341cf587be6f05986ccce4fe7ba2c54100bd616a58f66"


def real() -> tuple[bytes, bytes]:
    return read_report(vector("nvidia/hopper_535.86.09_report.txt")), vector("nvidia/hopper_535.86.09_chain.txt")


def real_rim() -> bytes:
    return vector("nvidia/vbios_1010_0200_882_96005E0001.swidtag")


def verify(
    report: bytes | None = None, chain: Chain | None = None, *, now: int = NOW, roots: set[str] | None = None
) -> nvidia_gpu.VerifiedGpu:
    chain = chain or gpu().chain
    report = gpu().report() if report is None else report
    return nvidia_gpu.verify(report, chain.ders, pinned_roots=roots or {chain.root}, now=now)


def with_chain(chain: Chain) -> nvidia_gpu.VerifiedGpu:
    return verify(Gpu(chain).report(), chain)


def rims() -> list[Rim]:
    maker = nvidia.rim_maker()
    return [verify_rim(each, pinned_roots={maker.chain.root}, now=NOW) for each in (maker.driver, maker.vbios)]


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


# Real evidence


def test_a_real_report_verifies_with_its_chain_and_nonce() -> None:
    report, chain = real()
    verified = nvidia_gpu.verify(report, [chain], pinned_roots=NVIDIA_DEVICE_ROOTS, now=JANUARY_2025)
    nvidia_gpu.check_nonce(verified, bytes.fromhex(REAL_NONCE))
    assert verified.device.chip == "GH100"
    assert verified.device.serial == "416a5fafcbd9fa5ca3"
    assert verified.device.device_info == "NVIDIA:GH100:48B02D7A7CD27FC3"
    assert not verified.device.development
    assert verified.report.driver_version == "535.86.09"
    assert verified.report.vbios_rim_id == "NV_GPU_VBIOS_1010_0200_882_96005E0001"
    assert (verified.report.fwid, verified.report.protected_pcie, verified.report.feature_flag) == (b"", None, None)
    assert list(verified.report.blocks) == list(range(1, 65))


def test_twelve_of_twelve_golden_values_of_the_real_rim_are_met() -> None:
    report, chain = real()
    verified = nvidia_gpu.verify(report, [chain], pinned_roots=NVIDIA_DEVICE_ROOTS, now=JANUARY_2025)
    rim = verify_rim(real_rim(), pinned_roots=NVIDIA_RIM_ROOTS, now=JANUARY_2025)
    match = nvidia_gpu.check_golden(verified, [rim])
    assert sorted(match.compared) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12] == sorted(rim.golden)
    assert match.vbios is rim
    assert not match.complete


def test_a_real_report_with_a_broken_signature_is_refused() -> None:
    broken, chain = read_report(vector("nvidia/hopper_invalid_signature_report.txt")), real()[1]
    refused(
        Reason.SIGNATURE,
        lambda: nvidia_gpu.verify(broken, [chain], pinned_roots=NVIDIA_DEVICE_ROOTS, now=JANUARY_2025),
    )


def test_bit_flips_in_a_real_report_are_refused() -> None:
    report, chain = real()
    choose = random.Random("nvidia")  # noqa: S311 - a fixed sample
    signed_bits = 8 * (len(report) - SIGNATURE_BYTES)
    signature_bits = range(signed_bits, 8 * len(report))
    for bit in choose.sample(range(signed_bits), 2200) + choose.sample(signature_bits, 100):
        flipped = bytearray(report)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyquorumError):
            nvidia_gpu.verify(bytes(flipped), [chain], pinned_roots=NVIDIA_DEVICE_ROOTS, now=JANUARY_2025)


def test_bit_flips_in_a_real_chain_are_refused() -> None:
    report, chain = real()
    ders = read_certificates([chain])
    choose = random.Random("chain")  # noqa: S311
    for position, der in enumerate(ders):
        for bit in choose.sample(range(8 * len(der)), 60):
            flipped = bytearray(der)
            flipped[bit // 8] ^= 1 << bit % 8
            changed = [*ders[:position], bytes(flipped), *ders[position + 1 :]]
            with pytest.raises(KeyquorumError):
                nvidia_gpu.verify(report, changed, pinned_roots=NVIDIA_DEVICE_ROOTS, now=JANUARY_2025)


def test_the_rim_root_does_not_pass_for_the_device_root() -> None:
    report, chain = real()
    refused(
        Reason.ROOT_NOT_PINNED,
        lambda: nvidia_gpu.verify(report, [chain], pinned_roots=NVIDIA_RIM_ROOTS, now=JANUARY_2025),
    )


@pytest.mark.parametrize("with_rim", [False, True])
def test_real_evidence_is_judged_as_a_file(with_rim: bool) -> None:
    report, chain = real()
    endorsements = [real_rim(), chain] if with_rim else [chain]
    verdict = judge_nvidia_gpu(report.hex().encode(), endorsements, now=JANUARY_2025)
    assert (verdict.ok, verdict.verified, verdict.reason) == (True, True, "")
    assert verdict.claims["nonce"] == REAL_NONCE
    assert verdict.claims["golden_values_met"] == (12 if with_rim else 0)
    assert verdict.claims["debug"] == "not shown"


def test_a_real_report_with_a_broken_signature_is_judged_so() -> None:
    verdict = judge_nvidia_gpu(
        vector("nvidia/hopper_invalid_signature_report.txt"), [real()[1], real_rim()], now=JANUARY_2025
    )
    assert (verdict.ok, verdict.verified, verdict.reason, verdict.claims) == (False, False, "SIGNATURE", {})


def test_the_real_rim_is_out_of_date_by_its_signer() -> None:
    report, chain = real()
    verdict = judge_nvidia_gpu(report, [chain, real_rim()], now=JANUARY_2025 + 365 * 86400)
    assert (verdict.ok, verdict.verified, verdict.reason) == (False, False, "EXPIRED")


# The report


def test_a_report_of_ours_verifies() -> None:
    verified = verify()
    assert verified.device.development
    assert verified.device.fwid == nvidia.FWID == verified.report.fwid
    assert (verified.report.driver_version, verified.report.vbios_version) == (DRIVER, VBIOS)
    assert (verified.report.protected_pcie, verified.report.feature_flag, verified.report.data_version) == (False, 0, 1)
    assert (verified.not_before, verified.not_after) == (CREATED_AT, CREATED_AT + 3650 * 86400)


@pytest.mark.parametrize(
    "encode", [bytes, lambda raw: raw.hex().upper().encode(), base64.encodebytes], ids=["raw", "hex", "base64"]
)
def test_a_report_is_read_raw_hex_or_base64(encode: Callable[[bytes], bytes]) -> None:
    report = gpu().report()
    assert read_report(encode(report)) == report


def blocks(*made: tuple[int, int, int, int, bytes]) -> bytes:
    """Index, specification, size, value type, value."""
    return b"".join(struct.pack("<BBHBH", *each[:4], len(each[4])) + each[4] for each in made)


BLOCK = (1, 1, 51, 1, bytes(48))
MALFORMED: dict[str, bytes | Callable[[], bytes]] = {
    "empty": b"",
    "truncated": lambda: gpu().report()[:-1],
    "only the request": lambda: gpu().report()[:37],
    "one byte after": lambda: gpu().report() + b"\0",
    "twice": lambda: gpu().report(measurements={1: bytes(48)}) * 2,
    "another SPDM version": lambda: gpu().report(request=b"\x12\xe0\x01\xff"),
    "another request": lambda: gpu().report(request=b"\x11\xe1\x01\xff"),
    "no signature wanted": lambda: gpu().report(request=b"\x11\xe0\0\xff"),
    "one block asked for": lambda: gpu().report(request=b"\x11\xe0\x01\x01"),
    "a slot that is none": lambda: gpu().report(slot=8),
    "another slot answers": lambda: gpu().report(response=b"\x11\x60\0\x01"),
    "another response": lambda: gpu().report(response=b"\x11\x61\0\0"),
    "a response of another version": lambda: gpu().report(response=b"\x12\x60\0\0"),
    "a first parameter": lambda: gpu().report(response=b"\x11\x60\x01\0"),
    "no blocks": lambda: gpu().report(measurements={}),
    "more blocks than there are": lambda: gpu().report(count=65),
    "fewer blocks than there are": lambda: gpu().report(count=63),
    "blocks out of order": lambda: gpu().report(record=blocks((2, *BLOCK[1:]), BLOCK), count=2),
    "a block twice": lambda: gpu().report(record=blocks(BLOCK, BLOCK), count=2),
    "block 0": lambda: gpu().report(record=blocks((0, *BLOCK[1:])), count=1),
    "a block of another form": lambda: gpu().report(record=blocks((1, 2, *BLOCK[2:])), count=1),
    "sizes that disagree": lambda: gpu().report(record=blocks((1, 1, 52, *BLOCK[3:])), count=1),
    "a field twice": lambda: gpu().sign(
        nvidia.exchange(opaque=nvidia.opaque_fields() + struct.pack("<HH", Field.PROJECT, 2) + b"1\0")
    ),
    "half a field": lambda: gpu().sign(nvidia.exchange(opaque=nvidia.opaque_fields() + b"\x11\0")),
    "no opaque data": lambda: gpu().sign(nvidia.exchange(opaque=b"")),
    "no driver version": lambda: gpu().report({Field.DRIVER_VERSION: None}),
    "no VBIOS version": lambda: gpu().report({Field.VBIOS_VERSION: None}),
    "no project": lambda: gpu().report({Field.PROJECT: None}),
    "no NVDEC0 status": lambda: gpu().report({Field.NVDEC0_STATUS: None}),
    "a driver version without its end": lambda: gpu().report({Field.DRIVER_VERSION: DRIVER.encode()}),
    "an empty driver version": lambda: gpu().report({Field.DRIVER_VERSION: b"\0"}),
    "a driver version of other letters": lambda: gpu().report({Field.DRIVER_VERSION: b"580 95\0"}),
    "a VBIOS version of another size": lambda: gpu().report({Field.VBIOS_VERSION: bytes(7)}),
    "a VBIOS version that goes on": lambda: gpu().report({Field.VBIOS_VERSION: bytes(range(8))}),
    "an NVDEC0 status that is none": lambda: gpu().report({Field.NVDEC0_STATUS: b"\0"}),
    "a PCIe status that is none": lambda: gpu().report({Field.PROTECTED_PCIE_STATUS: b"\xab"}),
    "a FWID of another size": lambda: gpu().report({Field.FWID: bytes(32)}),
    "no feature flag from version 1 on": lambda: gpu().report({Field.FEATURE_FLAG: None}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_report_is_refused(name: str) -> None:
    report = MALFORMED[name]
    data = report if isinstance(report, bytes) else report()
    with pytest.raises(MalformedError) as caught:
        verify(data)
    assert caught.value.reason is Reason.MALFORMED, str(caught.value)


@pytest.mark.parametrize("changes", [{26: b"x"}, {Field.DATA_VERSION: b"\x02\0"}], ids=["field", "version"])
def test_opaque_data_of_a_later_form_is_refused(changes: nvidia.Opaque) -> None:
    refused(Reason.UNSUPPORTED, lambda: verify(gpu().report(changes)))


def test_a_report_that_is_too_large_is_refused() -> None:
    refused(Reason.TOO_LARGE, lambda: parse_report(bytes(0x2001)))
    refused(Reason.MALFORMED, lambda: read_report(bytes(1 << 20)))


@pytest.mark.parametrize("data", [b"", b"neither", b"\xff" * 64, b"zz" * 64])
def test_what_is_no_report_in_any_coding_is_refused(data: bytes) -> None:
    refused(Reason.MALFORMED, lambda: parse_report(read_report(data)))


def test_a_changed_or_foreign_signature_is_refused() -> None:
    report = gpu().report()
    for changed in (report[:-SIGNATURE_BYTES] + bytes(96), gpu(1).report(), report[:-48] + report[-96:-48]):
        refused(Reason.SIGNATURE, lambda changed=changed: verify(changed))  # type: ignore[misc]


def test_bit_flips_in_a_report_of_ours_are_refused() -> None:
    report = gpu().report()
    for bit in random.Random("ours").sample(range(8 * len(report)), 300):  # noqa: S311
        flipped = bytearray(report)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyquorumError):
            verify(bytes(flipped))


def test_a_fwid_of_other_firmware_is_refused() -> None:
    refused(Reason.MEASUREMENT, lambda: verify(gpu().report({Field.FWID: bytes(range(48))})))


def test_a_report_of_an_early_driver_has_no_fwid() -> None:
    assert not verify(gpu().report({Field.FWID: None})).claims()["fwid_in_report"]


@pytest.mark.parametrize("architecture", [0x1A0, 0x170])
def test_an_architecture_that_is_not_the_chips_is_refused(architecture: int) -> None:
    refused(Reason.CHAIN, lambda: verify(gpu().report({Field.GPU_INFO: architecture.to_bytes(8, "little")})))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 4200), st.integers(0, 40))
def test_no_bytes_make_the_parser_raise_anything_else(noise: bytes, at: int, cut: int) -> None:
    report = gpu().report()
    for data in (noise, report[:at] + noise + report[at + cut :]):
        try:
            parse_report(read_report(data))
        except KeyquorumError:
            continue


# The chain


def changed(position: int, **changes: Any) -> Chain:
    """The device chain with the link at ``position``, root first, made otherwise; 4 is the firmware's."""
    upper = links()
    if position == 4:
        return device_chain(firmware=replace(nvidia.firmware_link(), **changes))
    upper[position] = replace(upper[position], **changes)
    return device_chain(upper)


P256 = ec.SECP256R1()
BROKEN_CHAINS: dict[str, Callable[[], Chain]] = {
    "an authority that is none": lambda: changed(2, ca=False),
    "an authority without constraints": lambda: changed(3, ca=None),
    "an authority that may not sign certificates": lambda: changed(1, signs_certificates=False),
    "a path that is too long": lambda: changed(1, path_length=1),
    "a firmware certificate that is a CA": lambda: changed(4, ca=True),
    "a firmware key that may not sign data": lambda: changed(4, signs_data=False),
    "another issuer name": lambda: changed(2, issuer_name="Test GB100 Identity"),
    "a matching name and another key": lambda: changed(3, signed_by=ec.generate_private_key(ec.SECP384R1())),
    "a root that did not sign itself": lambda: changed(0, signed_by=ec.generate_private_key(ec.SECP384R1())),
    "an issuer without a key id": lambda: changed(1, key_ids=False),
    "a firmware certificate without its issuer's key id": lambda: changed(4, key_ids=False),
    "a key on another curve": lambda: changed(2, curve=P256),
    "another hash": lambda: changed(3, hash_algorithm=hashes.SHA256()),
    "an unknown critical extension": lambda: changed(
        1, extensions=((x509.UnrecognizedExtension(ObjectIdentifier("1.2.3"), b"\x05\0"), True),)
    ),
    "no device info": lambda: changed(4, extensions=()),
    "device info twice": lambda: changed(
        4,
        extensions=((x509.SubjectAlternativeName(list(nvidia.device_info("NVIDIA:GH100:00")) * 2), False),),
    ),
    "device info of another vendor": lambda: changed(4, extensions=((nvidia.device_info("ACME:GH100:00"), False),)),
    "device info without an identifier": lambda: changed(4, extensions=((nvidia.device_info("NVIDIA:GH100:"), False),)),
    "device info of another chip": lambda: changed(4, extensions=((nvidia.device_info("NVIDIA:GB100:00"), False),)),
    "a serial number that is not the subject's": lambda: changed(3, subject_serial="00"),
    "the device key of another GPU beside the FWID": lambda: device_chain(
        fwid=lambda _: [nvidia.composite_fwid(gpu(1).chain.links[1])]
    ),
}


@pytest.mark.parametrize("name", BROKEN_CHAINS)
def test_a_chain_that_does_not_hold_is_refused(name: str) -> None:
    chain = BROKEN_CHAINS[name]()
    refused(Reason.CHAIN, lambda: with_chain(chain))


def test_a_chain_of_another_length_or_order_is_refused() -> None:
    ders = gpu().chain.ders
    report = gpu().report()
    for chain in ((), ders[:4], ders[1:], (*ders, ders[-1]), (ders[0], ders[2], ders[1], *ders[3:])):
        refused(
            Reason.CHAIN,
            lambda chain=chain: nvidia_gpu.verify(report, chain, pinned_roots={gpu().chain.root}, now=NOW),  # type: ignore[misc]
        )


def test_a_chain_to_a_root_that_is_not_pinned_is_refused() -> None:
    refused(Reason.ROOT_NOT_PINNED, lambda: verify(roots={*NVIDIA_DEVICE_ROOTS}))


def test_a_chain_outside_its_time_is_refused() -> None:
    for reason, at in ((Reason.NOT_YET_VALID, CREATED_AT - 1), (Reason.EXPIRED, CREATED_AT + 3651 * 86400)):
        refused(reason, lambda at=at: verify(now=at))  # type: ignore[misc]
    late = changed(2, start=NOW + 10)
    refused(Reason.NOT_YET_VALID, lambda: with_chain(late))


def test_a_chain_is_read_as_pem_and_as_files() -> None:
    chain = gpu().chain
    assert read_certificates([chain.pem]) == chain.ders == read_certificates(chain.ders)
    refused(Reason.MALFORMED, lambda: read_certificates([b"-----BEGIN CERTIFICATE-----\nAA==\n"]))
    refused(Reason.TOO_LARGE, lambda: read_certificates([bytes(65537)]))


def test_what_is_no_certificate_is_refused() -> None:
    ders = gpu().chain.ders
    for position in range(5):
        for junk in (b"", b"junk", ders[position][:-1], ders[position] + b"\0"):
            chain = [*ders[:position], junk, *ders[position + 1 :]]
            with pytest.raises(KeyquorumError):
                nvidia_gpu.verify(gpu().report(), chain, pinned_roots={gpu().chain.root}, now=NOW)


Fwid = Callable[[nvidia.Authority], list[x509.UnrecognizedExtension]]


def raw_fwid(oid: str, value: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(ObjectIdentifier(oid), value)


BAD_FWIDS: dict[str, Fwid] = {
    "none": lambda device: [],
    "in both forms": lambda device: [nvidia.composite_fwid(device), nvidia.tcb_info_fwid()],
    "of another size": lambda device: [nvidia.composite_fwid(device, bytes(47))],
    "nothing": lambda device: [raw_fwid("2.23.133.5.4.1", b"\x30\0")],
    "no DER": lambda device: [raw_fwid("2.23.133.5.4.1", b"\x30\x80\0\0")],
    "cut short": lambda device: [raw_fwid("2.23.133.5.4.1.1", b"\x30\x05\xa6\x03\x30")],
    "an empty list": lambda device: [raw_fwid("2.23.133.5.4.1.1", b"\x30\x02\xa6\0")],
    "a long length where a short one would do": lambda device: [raw_fwid("2.23.133.5.4.1.1", b"\x30\x81\x02\xa6\0")],
}


@pytest.mark.parametrize("name", BAD_FWIDS)
def test_a_certificate_that_does_not_say_its_firmware_is_refused(name: str) -> None:
    chain = device_chain(fwid=BAD_FWIDS[name])
    refused(Reason.PROVENANCE, lambda: with_chain(chain))


def blackwell(flags: bytes = b"\0\x80\0\0\x01") -> Gpu:
    return Gpu(
        device_chain(links("GB100"), nvidia.firmware_link("GB100"), fwid=lambda _: [nvidia.tcb_info_fwid(flags=flags)])
    )


def test_a_blackwell_chain_verifies() -> None:
    shown = blackwell()
    verified = verify(shown.report({Field.GPU_INFO: b"\xa0\x01\0\0\0\0\0\0"}), shown.chain)
    assert (verified.device.chip, verified.device.fwid) == ("GB100", nvidia.FWID)


def test_firmware_in_debug_mode_is_refused() -> None:
    shown = blackwell(flags=b"\0\x90\0\0\x01")
    refused(Reason.DEBUG_ENABLED, lambda: with_chain(shown.chain))


# Golden values


def golden(report: bytes | None = None, chosen: Sequence[Rim] | None = None) -> nvidia_gpu.GoldenMatch:
    return nvidia_gpu.check_golden(verify(report), rims() if chosen is None else chosen)


def rim(version: str, active: Sequence[int], product: str = "GH100") -> Rim:
    maker = nvidia.rim_maker()
    return verify_rim(maker.rim(version, active, product=product), pinned_roots={maker.chain.root}, now=NOW)


def test_golden_values_of_both_rims_are_met() -> None:
    match = golden()
    assert match.complete
    assert sorted(match.compared) == sorted([*nvidia.DRIVER_INDICES, *nvidia.VBIOS_INDICES])


@pytest.mark.parametrize("index", [0, 5, 12, 21, 35, 41])
def test_a_measurement_that_is_not_golden_is_refused(index: int) -> None:
    report = gpu().report(measurements=GOLDEN | {index: bytes(range(1, 49))})
    error = refused(Reason.MEASUREMENT, lambda: golden(report))
    assert f"measurement {index} " in error.message


def test_a_measurement_that_no_rim_claims_may_be_anything() -> None:
    golden(gpu().report(measurements=GOLDEN | {50: bytes(48), 7: bytes(48)}))


def test_measurement_35_counts_only_where_the_engine_does() -> None:
    changed = GOLDEN | {35: bytes(48)}
    assert 35 not in golden(gpu().report({Field.NVDEC0_STATUS: b"\x55"}, measurements=changed)).compared
    refused(Reason.MEASUREMENT, lambda: golden(gpu().report(measurements=changed)))


def test_a_report_without_a_claimed_block_is_refused() -> None:
    shorter = {index: value for index, value in GOLDEN.items() if index != 30}
    refused(Reason.MEASUREMENT, lambda: golden(gpu().report(measurements=shorter)))


def test_a_measurement_that_is_no_digest_is_refused() -> None:
    for index, value in ((1, bytes(32)), (1, b"")):
        refused(Reason.MEASUREMENT, lambda v=value, i=index: golden(gpu().report(measurements=GOLDEN | {i: v})))  # type: ignore[misc]
    raw = blocks(*((index + 1, 1, 51, 0x81, value) for index, value in GOLDEN.items()))
    refused(Reason.MEASUREMENT, lambda: golden(gpu().report(record=raw)))


def test_no_rim_at_all_is_refused() -> None:
    refused(Reason.MEASUREMENT, lambda: golden(chosen=[]))


def test_a_rim_that_leaves_nothing_to_compare_is_refused() -> None:
    disabled = gpu().report({Field.NVDEC0_STATUS: b"\x55"})
    refused(Reason.MEASUREMENT, lambda: golden(disabled, [rim(DRIVER, [35])]))


@pytest.mark.parametrize(
    ("version", "product"),
    [("96.00.D9.00.03", "GH100"), ("580.95.06", "GH100"), (VBIOS, "GB100"), (DRIVER, "GB100")],
)
def test_a_rim_for_another_board_or_driver_is_refused(version: str, product: str) -> None:
    refused(Reason.MEASUREMENT, lambda: golden(chosen=[*rims()[:1], rim(version, [0], product)]))


def test_an_index_that_both_rims_claim_is_refused() -> None:
    refused(Reason.MEASUREMENT, lambda: golden(chosen=[rims()[0], rim(VBIOS, [0, 21])]))


def test_two_rims_for_one_role_are_refused() -> None:
    refused(Reason.MEASUREMENT, lambda: golden(chosen=[*rims(), rim(VBIOS, [50])]))


# Mode, nonce, several GPUs


@pytest.mark.parametrize(
    "changes",
    [{Field.PROTECTED_PCIE_STATUS: b"\xaa"}, {Field.FEATURE_FLAG: b"\x02\0"}, {Field.FEATURE_FLAG: b"\x03\0"}],
    ids=["status", "flag", "unknown"],
)
def test_a_mode_other_than_confidential_computing_is_refused(changes: nvidia.Opaque) -> None:
    refused(Reason.UNSUPPORTED, lambda: nvidia_gpu.check_mode(verify(gpu().report(changes))))


@pytest.mark.parametrize("flag", [b"\0\0", b"\x01\0"])
def test_confidential_computing_with_one_or_several_gpus_is_accepted(flag: bytes) -> None:
    nvidia_gpu.check_mode(verify(gpu().report({Field.FEATURE_FLAG: flag})))


def test_the_nonce_must_be_the_expected_one() -> None:
    nvidia_gpu.check_nonce(verify(), NONCE)
    refused(Reason.BINDING, lambda: nvidia_gpu.check_nonce(verify(), bytes(range(32))))


def test_an_empty_nonce_is_refused_on_either_side() -> None:
    empty = verify(gpu().report(nonce=bytes(32)))
    refused(Reason.BINDING, lambda: nvidia_gpu.check_nonce(empty, NONCE))
    refused(Reason.BINDING, lambda: nvidia_gpu.check_has_nonce(empty))
    for expected in (b"", bytes(32), NONCE[:31]):
        refused(Reason.MALFORMED, lambda e=expected: nvidia_gpu.check_nonce(empty, e))  # type: ignore[misc]


def test_a_gpu_shown_twice_is_refused() -> None:
    first, second = verify(), verify(gpu(1).report(), gpu(1).chain)
    nvidia_gpu.check_distinct([first, second])
    refused(Reason.PROVENANCE, lambda: nvidia_gpu.check_distinct([first, second, verify()]))


def test_a_gpu_that_lends_its_key_is_known_by_it() -> None:
    first = verify()
    lent = replace(first, device=replace(first.device, serial="41ff", device_info="NVIDIA:GH100:FF"))
    refused(Reason.PROVENANCE, lambda: nvidia_gpu.check_distinct([first, lent]))
