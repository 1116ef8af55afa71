"""SEV-SNP verification: real reports of all three shapes, and every way in which one can fail to be genuine."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.attestation import sev_snp, snp_certificates
from keyquorum_core.attestation.development import DevelopmentChip, DevelopmentVendor
from keyquorum_core.attestation.roots import AMD_ROOTS
from keyquorum_core.attestation.snp_certificates import SigningKey
from keyquorum_core.attestation.snp_products import Product
from keyquorum_core.attestation.snp_report import SIGNED_BYTES, parse_report, read_report
from keyquorum_core.attestation.verdict import judge_sev_snp
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from tests.support.vectors import vector
from tests.support.vendor import CREATED_AT, MEASUREMENT, development_chip, development_vendor

NOW = CREATED_AT + 1000
JUNE_2024 = int(datetime(2024, 6, 1, tzinfo=UTC).timestamp())
JUNE_2025 = int(datetime(2025, 6, 1, tzinfo=UTC).timestamp())
DATA = bytes(range(64))

MILAN, DEBUG, VLEK = "milan", "debug", "vlek"
REAL = {
    MILAN: ("report_milan.hex", "vcek_milan.der", "ask_ark_milan.pem", JUNE_2024),
    DEBUG: ("debug_milan.bin", "debug_milan_vcek.der", "ask_ark_milan.pem", JUNE_2024),
    VLEK: ("vlek_milan.bin", "vlek_milan.der", "ask_ark_milan_vlek.pem", JUNE_2025),
}


def real(name: str) -> tuple[bytes, list[bytes], int]:
    report, vek, chain, now = REAL[name]
    return (
        read_report(vector(f"sev_snp/{report}")),
        [vector(f"sev_snp/{vek}"), vector(f"sev_snp/{chain}")],
        now,
    )


def verify(
    report: bytes, chip: DevelopmentChip | None = None, *, now: int = NOW, roots: set[str] | None = None
) -> sev_snp.VerifiedReport:
    roots = {development_vendor().root} if roots is None else roots
    return sev_snp.verify(report, (chip or development_chip()).endorsements, pinned_roots=roots, now=now)


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


# Real evidence


@pytest.mark.parametrize("name", [MILAN, DEBUG])
def test_a_real_milan_report_verifies_with_its_vcek(name: str) -> None:
    report, endorsements, now = real(name)
    verified = sev_snp.verify(report, endorsements, pinned_roots=AMD_ROOTS, now=now)
    assert verified.product is Product.MILAN
    assert verified.endorsement.signing_key is SigningKey.VCEK
    assert verified.endorsement.hardware_id == verified.report.chip_id
    assert not verified.endorsement.development
    assert verified.report.version == 2
    assert verified.report.debug_allowed is (name == DEBUG)


def test_a_real_vlek_report_verifies_with_its_chip_id_masked() -> None:
    report, endorsements, now = real(VLEK)
    verified = sev_snp.verify(report, endorsements, pinned_roots=AMD_ROOTS, now=now)
    assert verified.endorsement.signing_key is SigningKey.VLEK
    assert verified.endorsement.csp_id == "CN=cc-us-east-2.amazonaws.com"
    assert verified.report.chip_id_masked
    assert verified.report.vmpl == 1
    assert verified.report.cpuid == (0x19, 1, 1)
    assert verified.tcbs()["reported"] == {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 217}


@pytest.mark.parametrize("name", REAL)
def test_every_bit_flip_in_real_evidence_is_refused(name: str) -> None:
    report, endorsements, now = real(name)
    choose = random.Random(name)  # noqa: S311 - a fixed sample
    signed = choose.sample(range(8 * SIGNED_BYTES), 240)
    unsigned = choose.sample(range(8 * SIGNED_BYTES, 8 * len(report)), 60)
    sev_snp.verify(report, endorsements, pinned_roots=AMD_ROOTS, now=now)
    for bit in signed + unsigned:
        flipped = bytearray(report)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyquorumError):
            sev_snp.verify(bytes(flipped), endorsements, pinned_roots=AMD_ROOTS, now=now)


def test_real_evidence_with_the_chain_of_another_product_is_refused() -> None:
    report, (vcek, _), now = real(MILAN)
    for chain in ("ask_ark_genoa.pem", "ask_ark_turin_vcek.pem", "ask_ark_milan_vlek.pem"):
        refused(
            Reason.CHAIN,
            lambda chain=chain: sev_snp.verify(  # type: ignore[misc]
                report, [vcek, vector(f"sev_snp/{chain}")], pinned_roots=AMD_ROOTS, now=now
            ),
        )


def test_real_evidence_is_refused_where_its_root_is_not_pinned() -> None:
    report, endorsements, now = real(MILAN)
    genoa = {root for root, product in AMD_ROOTS.items() if product == "Genoa"}
    refused(Reason.ROOT_NOT_PINNED, lambda: sev_snp.verify(report, endorsements, pinned_roots=genoa, now=now))


def test_a_real_vlek_is_refused_outside_its_year() -> None:
    report, endorsements, now = real(VLEK)
    year = 366 * 86400
    for reason, at in ((Reason.NOT_YET_VALID, now - year), (Reason.EXPIRED, now + year)):
        refused(reason, lambda at=at: sev_snp.verify(report, endorsements, pinned_roots=AMD_ROOTS, now=at))  # type: ignore[misc]


def test_a_real_report_with_the_vcek_of_another_chip_is_refused() -> None:
    report, (_, chain), now = real(MILAN)
    other = vector("sev_snp/debug_milan_vcek.der")
    refused(Reason.SIGNATURE, lambda: sev_snp.verify(report, [other, chain], pinned_roots=AMD_ROOTS, now=now))


@pytest.mark.parametrize(("name", "ok", "reason"), [(MILAN, True, ""), (DEBUG, False, "DEBUG_ENABLED")])
def test_real_evidence_is_judged_as_a_file(name: str, ok: bool, reason: str) -> None:
    report, endorsements, now = real(name)
    verdict = judge_sev_snp(report.hex().encode(), endorsements, now=now)
    assert (verdict.ok, verdict.verified, verdict.reason) == (ok, True, reason)
    assert verdict.claims["measurement"] == parse_report(report).measurement.hex()


# The form of a report


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_each_known_version_verifies(version: int) -> None:
    report = verify(development_chip().sign_report(DATA, MEASUREMENT, version=version)).report
    assert report.version == version
    assert (report.cpuid is None) is (version == 2)
    assert (report.report_data, report.measurement) == (DATA, MEASUREMENT)


@pytest.mark.parametrize("version", [0, 1, 6, 2**32 - 1])
def test_an_unknown_version_is_malformed(version: int) -> None:
    report = development_chip().sign_report(DATA, MEASUREMENT, version=version)
    refused(Reason.MALFORMED, lambda: verify(report))


def test_a_truncated_padded_or_doubled_report_is_malformed() -> None:
    report = development_chip().sign_report(DATA, MEASUREMENT)
    for wrong in (b"", report[:-1], report + b"\0", report + report):
        refused(Reason.MALFORMED, lambda wrong=wrong: verify(wrong))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("version", "offset"),
    [(3, 0x04C), (2, 0x188), (3, 0x18B), (3, 0x19F), (3, 0x1EB), (3, 0x1EF), (4, 0x1F8), (4, 0x207), (5, 0x208)],
)
def test_a_reserved_byte_that_is_not_zero_is_malformed(version: int, offset: int) -> None:
    report = development_chip().sign_report(DATA, MEASUREMENT, version=version, patch={offset: b"\x01"})
    refused(Reason.MALFORMED, lambda: verify(report))


def test_bytes_after_the_signature_are_malformed() -> None:
    report = bytearray(development_chip().sign_report(DATA, MEASUREMENT))
    report[0x330] = 1
    refused(Reason.MALFORMED, lambda: verify(bytes(report)))


def test_mitigation_vectors_are_read_from_version_5() -> None:
    patch = {0x1F8: (5).to_bytes(8, "little"), 0x200: (6).to_bytes(8, "little")}
    report = verify(development_chip().sign_report(DATA, MEASUREMENT, version=5, patch=patch)).report
    assert (report.launch_mitigations, report.current_mitigations) == (5, 6)


@pytest.mark.parametrize(
    "patch",
    [
        {0x034: b"\x02"},  # signature algorithm
        {0x008: bytes(8)},  # policy without the bit that must be one
        {0x008: (0x30000 | 1 << 26).to_bytes(8, "little")},
        {0x041: b"\x01"},  # platform info bit 8
        {0x048: b"\x20"},  # key flags bit 5
        {0x048: b"\x08"},  # signing key 2
    ],
)
def test_a_field_with_reserved_bits_is_malformed(patch: dict[int, bytes]) -> None:
    report = development_chip().sign_report(DATA, MEASUREMENT, patch=patch)
    refused(Reason.MALFORMED, lambda: verify(report))


def test_a_report_is_read_raw_or_as_hex() -> None:
    report = development_chip().sign_report(DATA, MEASUREMENT)
    assert read_report(report) == read_report(report.hex().encode() + b"\n") == report
    for wrong in (b"", b"zz" * 100, b"0" * 100_000):
        refused(Reason.MALFORMED, lambda wrong=wrong: parse_report(read_report(wrong)))  # type: ignore[misc]


# The signature


def test_every_bit_flip_in_development_evidence_is_refused() -> None:
    report = development_chip().sign_report(DATA, MEASUREMENT)
    verify(report)
    for bit in random.Random(1).sample(range(8 * len(report)), 300):  # noqa: S311 - a fixed sample
        flipped = bytearray(report)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyquorumError):
            verify(bytes(flipped))


def test_a_changed_measurement_breaks_the_signature() -> None:
    report = bytearray(development_chip().sign_report(DATA, MEASUREMENT))
    report[0x090] ^= 1
    refused(Reason.SIGNATURE, lambda: verify(bytes(report)))


@pytest.mark.parametrize("r_and_s", [bytes(144), b"\xff" * 144, bytes(72) + b"\x01" + bytes(71)])
def test_signature_numbers_out_of_range_are_refused(r_and_s: bytes) -> None:
    report = bytearray(development_chip().sign_report(DATA, MEASUREMENT))
    report[0x2A0:0x330] = r_and_s
    refused(Reason.SIGNATURE, lambda: verify(bytes(report)))


def test_a_report_signed_by_another_key_is_refused() -> None:
    report = bytearray(development_chip().sign_report(DATA, MEASUREMENT))
    key = ec.generate_private_key(ec.SECP384R1())
    r, s = decode_dss_signature(key.sign(bytes(report[:0x2A0]), ec.ECDSA(hashes.SHA384())))
    report[0x2A0:0x330] = r.to_bytes(72, "little") + s.to_bytes(72, "little")
    refused(Reason.SIGNATURE, lambda: verify(bytes(report)))


@pytest.mark.parametrize("flags", [7 << 2, 1 << 1])
def test_a_report_that_names_no_signing_key_is_refused(flags: int) -> None:
    refused(Reason.SIGNATURE, lambda: verify(development_chip().sign_report(DATA, MEASUREMENT, flags=flags)))


def test_a_report_that_names_the_other_kind_of_key_is_refused() -> None:
    refused(Reason.CHAIN, lambda: verify(development_chip().sign_report(DATA, MEASUREMENT, flags=1 << 2)))
    provider = provider_chip()
    refused(Reason.CHAIN, lambda: verify(provider.sign_report(DATA, MEASUREMENT, flags=0), provider))


# The chain


@cache
def provider_chip() -> DevelopmentChip:
    return development_vendor().provider_chip("CN=example-cloud", now=CREATED_AT)


@cache
def impostor() -> DevelopmentVendor:
    """The same names as the development vendor, the same certificates' shape, other keys behind them."""
    vendor = development_vendor()
    return DevelopmentVendor.create(now=CREATED_AT, ark_key=vendor.ask_key, ask_key=vendor.ark_key)


def with_endorsements(*endorsements: bytes) -> Callable[[], sev_snp.VerifiedReport]:
    report = development_chip().sign_report(DATA, MEASUREMENT)
    return lambda: sev_snp.verify(report, endorsements, pinned_roots={development_vendor().root}, now=NOW)


@pytest.mark.parametrize("product", list(Product))
def test_each_product_verifies_with_its_own_layout(product: Product) -> None:
    chip = development_chip(product)
    verified = verify(chip.sign_report(DATA, MEASUREMENT), chip)
    assert verified.product is product
    assert verified.endorsement.development
    assert len(verified.endorsement.hardware_id) == (8 if product is Product.TURIN else 64)
    assert ("fmc" in verified.tcbs()["reported"]) is (product is Product.TURIN)


def test_a_vlek_verifies_with_a_masked_chip_id() -> None:
    verified = verify(provider_chip().sign_report(DATA, MEASUREMENT), provider_chip())
    assert verified.endorsement.signing_key is SigningKey.VLEK
    assert verified.report.chip_id_masked


def test_endorsements_may_come_in_any_order_and_as_pem() -> None:
    vek, ask, ark = development_chip().endorsements
    pem = b"".join(x509.load_der_x509_certificate(each).public_bytes(Encoding.PEM) for each in (ask, ark))
    assert with_endorsements(ark, vek, ask)().endorsement == with_endorsements(vek, pem)().endorsement


def test_a_chain_to_an_unpinned_root_is_refused() -> None:
    chip = impostor().chip(now=CREATED_AT)
    refused(Reason.ROOT_NOT_PINNED, lambda: verify(chip.sign_report(DATA, MEASUREMENT), chip))
    refused(Reason.ROOT_NOT_PINNED, lambda: verify(development_chip().sign_report(DATA, MEASUREMENT), roots=set()))


def test_development_evidence_is_refused_where_only_amd_is_pinned() -> None:
    report = development_chip().sign_report(DATA, MEASUREMENT)
    refused(Reason.ROOT_NOT_PINNED, lambda: verify(report, roots=set(AMD_ROOTS)))


def test_an_intermediate_with_the_right_name_and_another_key_is_refused() -> None:
    chip = impostor().chip(now=CREATED_AT)
    refused(Reason.CHAIN, with_endorsements(chip.endorsements[0], impostor().ask, development_vendor().ark))


def test_a_leaf_with_the_right_name_signed_by_another_key_is_refused() -> None:
    chip = impostor().chip(now=CREATED_AT)
    refused(Reason.CHAIN, with_endorsements(chip.endorsements[0], *development_chip().endorsements[1:]))


def test_the_chain_of_another_product_is_refused() -> None:
    vek, ask, ark = development_chip().endorsements
    genoa = development_vendor(Product.GENOA)
    for endorsements in ((vek, genoa.ask, genoa.ark), (vek, genoa.ask, ark), (vek, ask, genoa.ark)):
        refused(Reason.CHAIN, with_endorsements(*endorsements))


def test_an_intermediate_for_the_other_kind_of_key_is_refused() -> None:
    vek, _, ark = development_chip().endorsements
    refused(Reason.CHAIN, with_endorsements(vek, development_vendor().asvk, ark))


def test_missing_doubled_and_surplus_certificates_are_refused() -> None:
    vek, ask, ark = development_chip().endorsements
    for endorsements in ((), (vek,), (vek, ask), (vek, ark, ark), (vek, ask, ask), (vek, ask, ark, ark)):
        refused(Reason.CHAIN, with_endorsements(*endorsements))


def test_a_leaf_in_the_place_of_the_intermediate_is_refused() -> None:
    vek, _, ark = development_chip().endorsements
    other = development_vendor().chip(now=CREATED_AT).endorsements[0]
    refused(Reason.CHAIN, with_endorsements(vek, other, ark))


def test_what_is_no_certificate_is_malformed() -> None:
    vek, ask, ark = development_chip().endorsements
    for wrong in (b"", b"\x30\x03abc", vek + b"\0", vek[:-1], b"-----BEGIN CERTIFICATE-----\n!\n", bytes(70_000)):
        refused(Reason.MALFORMED, with_endorsements(wrong, ask, ark))


def test_every_bit_flip_in_the_endorsements_is_refused() -> None:
    report = development_chip().sign_report(DATA, MEASUREMENT)
    choose = random.Random(2)  # noqa: S311 - a fixed sample
    verify(report)
    for index in range(3):
        for _ in range(80):
            endorsements = [bytearray(each) for each in development_chip().endorsements]
            bit = choose.randrange(8 * len(endorsements[index]))
            endorsements[index][bit // 8] ^= 1 << bit % 8
            with pytest.raises(KeyquorumError):
                sev_snp.verify(
                    report,
                    [bytes(each) for each in endorsements],
                    pinned_roots={development_vendor().root},
                    now=NOW,
                )


def test_the_unsigned_copy_of_the_signature_algorithm_must_repeat_the_signed_one() -> None:
    vek, ask, ark = development_chip().endorsements
    signed = x509.load_der_x509_certificate(vek).tbs_certificate_bytes
    outer = vek.index(signed) + len(signed)
    sha384 = bytes.fromhex("0609608648016503040202")
    changed = bytearray(vek)
    changed[vek.index(sha384, outer) + len(sha384) - 1] = 3  # SHA-512, in the part that nobody signed
    refused(Reason.CHAIN, with_endorsements(bytes(changed), ask, ark))


def test_a_kept_chain_is_verified_once_and_its_dates_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    verified = verify(development_chip().sign_report(DATA, MEASUREMENT))
    with monkeypatch.context() as patch:
        patch.setattr(snp_certificates, "_parse", lambda _: pytest.fail("parsed again"))
        report = development_chip().sign_report(DATA, MEASUREMENT)
        verify(report)
        refused(Reason.EXPIRED, lambda: verify(report, now=verified.not_after + 1))


def test_dates_are_inclusive() -> None:
    report = development_chip().sign_report(DATA, MEASUREMENT)
    verified = verify(report)
    assert verify(report, now=verified.not_before) == verify(report, now=verified.not_after)
    refused(Reason.NOT_YET_VALID, lambda: verify(report, now=verified.not_before - 1))
    error = refused(Reason.EXPIRED, lambda: verify(report, now=verified.not_after + 1))
    assert "VCEK" in error.message


# What the certificate says of the chip


def test_a_reported_tcb_other_than_the_certificates_is_refused() -> None:
    for component in development_chip().product.layout:
        tcb = {**development_chip().product.components(development_chip().tcb), component: 2}
        report = development_chip().sign_report(DATA, MEASUREMENT, reported_tcb=tcb)
        refused(Reason.TCB, lambda report=report: verify(report))  # type: ignore[misc]


def test_a_reserved_byte_of_the_reported_tcb_is_compared_too() -> None:
    tcb = bytearray(development_chip().tcb)
    tcb[3] = 1
    report = development_chip().sign_report(DATA, MEASUREMENT, reported_tcb=bytes(tcb))
    refused(Reason.TCB, lambda: verify(report))


def test_a_chip_id_other_than_the_certificates_is_refused() -> None:
    refused(Reason.CHIP_ID, lambda: verify(development_chip().sign_report(DATA, MEASUREMENT, chip_id=b"\x07" * 64)))


def test_a_zero_chip_id_with_a_vcek_is_refused() -> None:
    refused(Reason.CHIP_ID, lambda: verify(development_chip().sign_report(DATA, MEASUREMENT, chip_id=bytes(64))))
    # also where the certificate claims a chip of zeros
    chip = development_vendor().chip(now=CREATED_AT, hardware_id=bytes(64))
    refused(Reason.CHIP_ID, lambda: verify(chip.sign_report(DATA, MEASUREMENT), chip))


def test_bytes_after_turins_eight_byte_chip_id_are_refused() -> None:
    chip = development_chip(Product.TURIN)
    report = chip.sign_report(DATA, MEASUREMENT, chip_id=chip.chip_id[:8] + b"\x01" + bytes(55))
    refused(Reason.CHIP_ID, lambda: verify(report, chip))


def test_a_cpu_of_another_product_is_refused() -> None:
    report = development_chip().sign_report(DATA, MEASUREMENT, cpuid=(0x19, 0x11, 0))
    refused(Reason.CHAIN, lambda: verify(report))
    report = development_chip().sign_report(DATA, MEASUREMENT, cpuid=(0x17, 0x01, 0))
    refused(Reason.CHAIN, lambda: verify(report))


# Judged as a file


def test_a_file_that_is_not_genuine_is_judged_so() -> None:
    verdict = judge_sev_snp(b"junk", development_chip().endorsements, now=NOW)
    assert (verdict.ok, verdict.verified, verdict.reason, verdict.claims) == (False, False, "MALFORMED", {})
    report = development_chip().sign_report(DATA, MEASUREMENT)
    verdict = judge_sev_snp(report, development_chip().endorsements, now=NOW)
    assert (verdict.ok, verdict.verified, verdict.reason) == (False, False, "ROOT_NOT_PINNED")
    assert verdict.as_dict()["detail"]


# Fuzzing


@settings(max_examples=150)
@given(st.data())
def test_mutated_reports_raise_only_the_typed_errors(data: st.DataObject) -> None:
    report = bytearray(development_chip().sign_report(DATA, MEASUREMENT))
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(report) - 1))
        report[start] = data.draw(st.integers(0, 255))
    original = development_chip()
    with_end = bytes(report) + data.draw(st.sampled_from([b"", b"", b"", b"x"]))
    with contextlib.suppress(MalformedError, RefusedError):
        verify(with_end, original)


@settings(max_examples=150)
@given(st.binary(max_size=1300))
def test_bytes_that_are_no_report_raise_only_the_typed_error(data: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_report(data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_certificates_raise_only_the_typed_errors(data: st.DataObject) -> None:
    endorsements = [bytearray(each) for each in development_chip().endorsements]
    for _ in range(data.draw(st.integers(1, 4))):
        each = endorsements[data.draw(st.integers(0, 2))]
        start = data.draw(st.integers(0, len(each)))
        each[start : start + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    with contextlib.suppress(MalformedError, RefusedError):
        with_endorsements(*(bytes(each) for each in endorsements))()
