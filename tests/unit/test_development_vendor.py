"""The development vendor: evidence of the real shape, unmistakably named, and never trusted by itself."""

from __future__ import annotations

import pytest
from cryptography import x509

from keyquorum_core.attestation import sev_snp
from keyquorum_core.attestation.development import DEVELOPMENT_TCB, DevelopmentChip, DevelopmentVendor
from keyquorum_core.attestation.roots import AMD_ROOTS
from keyquorum_core.attestation.snp_products import Product
from keyquorum_core.errors import KeyquorumError, MalformedError
from tests.support.vendor import CREATED_AT, MEASUREMENT, development_chip, development_vendor

DATA = b"\x42" * 64


def test_every_certificate_says_that_it_is_for_development() -> None:
    vendor = development_vendor()
    provider = vendor.provider_chip("CN=example-cloud", now=CREATED_AT)
    for der in (*development_chip().endorsements, *provider.endorsements):
        certificate = x509.load_der_x509_certificate(der)
        assert certificate.subject.rfc4514_string().startswith("CN=keyquorum DEVELOPMENT ")
        assert certificate.issuer.rfc4514_string().startswith("CN=keyquorum DEVELOPMENT ")


def test_the_development_root_is_none_of_amds() -> None:
    assert development_vendor().root not in AMD_ROOTS


def test_every_field_of_a_report_can_be_set() -> None:
    chip = development_chip()
    raw = chip.sign_report(
        DATA,
        MEASUREMENT,
        policy=0x30000 | 1 << 19,
        vmpl=3,
        version=5,
        guest_svn=9,
        host_data=b"\x07" * 32,
        platform_info=0x21,
        committed_tcb={**DEVELOPMENT_TCB, "snp": 9},
        launch_tcb=bytes([1, 2, 0, 0, 0, 0, 3, 4]),
        current_tcb={**DEVELOPMENT_TCB, "snp": 10},
        cpuid=(0x19, 0, 2),
        report_id=b"\x08" * 32,
        patch={0x010: b"family"},
    )
    verified = sev_snp.verify(raw, chip.endorsements, pinned_roots=[development_vendor().root], now=CREATED_AT)
    report = verified.report
    assert (report.report_data, report.measurement, report.host_data) == (DATA, MEASUREMENT, b"\x07" * 32)
    assert (report.vmpl, report.version, report.guest_svn, report.cpuid) == (3, 5, 9, (0x19, 0, 2))
    assert (report.debug_allowed, report.migration_agent_allowed) == (True, False)
    assert report.platform_info == 0x21
    assert report.family_id == b"family".ljust(16, b"\0")
    assert report.report_id == b"\x08" * 32
    assert verified.tcbs()["committed"]["snp"] == 9
    assert verified.tcbs()["current"]["snp"] == 10
    assert verified.tcbs()["launch"] == {"bootloader": 1, "tee": 2, "snp": 3, "microcode": 4}
    assert verified.claims()["development"] is True


def test_a_chip_reads_back_from_its_files() -> None:
    for product in (Product.MILAN, Product.TURIN):
        chip = development_chip(product)
        again = DevelopmentChip.from_files(chip.to_files())
        assert again.endorsements == chip.endorsements
        assert (again.product, again.chip_id, again.tcb) == (chip.product, chip.chip_id, chip.tcb)
        raw = again.sign_report(DATA, MEASUREMENT)
        sev_snp.verify(raw, chip.endorsements, pinned_roots=[development_vendor().root], now=CREATED_AT)


def test_a_chips_files_hold_no_key_of_the_vendor() -> None:
    private = [name for name, data in development_chip().to_files().items() if b"PRIVATE KEY" in data]
    assert private == ["vek-key.pem"]


def test_a_vendor_reads_back_from_its_files_and_makes_chips() -> None:
    vendor = development_vendor()
    again = DevelopmentVendor.from_files(vendor.to_files())
    assert (again.root, again.product) == (vendor.root, vendor.product)
    chip = again.chip(now=CREATED_AT, rng=lambda size: b"\x55" * size)
    assert chip.chip_id == b"\x55" * 64
    sev_snp.verify(chip.sign_report(DATA, MEASUREMENT), chip.endorsements, pinned_roots=[vendor.root], now=CREATED_AT)


@pytest.mark.parametrize("name", ["ark.pem", "ask.pem", "asvk.pem", "ark-key.pem", "ask-key.pem"])
def test_a_vendors_file_that_is_missing_or_junk_is_named(name: str) -> None:
    files = development_vendor().to_files()
    for wrong in ({**files, name: b"junk"}, {each: data for each, data in files.items() if each != name}):
        with pytest.raises(MalformedError, match=name):
            DevelopmentVendor.from_files(wrong)


def test_a_chips_key_that_is_not_its_certificates_is_refused() -> None:
    files = development_chip().to_files()
    for wrong in (
        {**files, "vek-key.pem": development_chip(Product.TURIN).to_files()["vek-key.pem"]},
        {**files, "vek-key.pem": development_vendor().to_files()["ask-key.pem"]},
        {**files, "vek.pem": b"junk"},
        {},
    ):
        with pytest.raises(KeyquorumError):
            DevelopmentChip.from_files(wrong)


def test_secrets_are_not_in_the_representation() -> None:
    assert "PrivateKey" not in repr(development_vendor()) + repr(development_chip())
