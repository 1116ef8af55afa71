"""SEV-SNP appraisal: image, platform, grace periods, revocation lists; each with a report that only it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.attestation import sev_snp
from keyquorum_core.attestation.findings import require
from keyquorum_core.attestation.snp_appraisal import AppraisedReport, check_binding, evaluate
from keyquorum_core.attestation.snp_reference import SnpReferenceValues
from keyquorum_core.attestation.snp_revocation import looks_like_crl
from keyquorum_core.attestation.verdict import judge_sev_snp
from keyquorum_core.errors import KeyquorumError, Reason
from tests.support.vendor import CREATED_AT, MEASUREMENT, development_chip, development_vendor, reference_json

NOW = CREATED_AT + 86400
DATA = bytes(range(64))
ZEROS = {"host_data": ["00" * 32], "id_key_digests": ["00" * 48], "author_key_digests": ["00" * 48]}


def section(**changes: Any) -> dict[str, Any]:
    return {**reference_json()["sev-snp"], **changes}


def image(**changes: Any) -> dict[str, Any]:
    return {"name": "worker", "measurement": MEASUREMENT.hex(), "minimum_guest_svn": 0, **ZEROS, **changes}


def verified(crls: tuple[bytes, ...] = (), now: int = NOW, **report: Any) -> sev_snp.VerifiedReport:
    chip = development_chip()
    return sev_snp.verify(
        chip.sign_report(DATA, MEASUREMENT, **report),
        (*chip.endorsements, *crls),
        pinned_roots={development_vendor().root},
        now=now,
    )


def accept(
    crls: tuple[bytes, ...] = (), *, now: int = NOW, values: Mapping[str, Any] = {}, **report: Any
) -> AppraisedReport:
    findings, appraised = evaluate(verified(crls, now, **report), SnpReferenceValues.parse(section(**values)), now)
    require(findings)
    return appraised


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


def test_a_report_of_a_listed_image_is_accepted() -> None:
    assert accept().image == "worker"
    assert check_binding(verified(), DATA).ok
    refused(Reason.BINDING, lambda: require([check_binding(verified(), bytes(64))]))


@pytest.mark.parametrize(
    ("report", "values"),
    [
        ({"host_data": b"\x01" * 32}, {}),
        ({"patch": {0x0E0: b"\x01" * 48}}, {}),
        ({"patch": {0x110: b"\x01" * 48}}, {}),
        ({}, {"images": [image(host_data=["01" * 32])]}),
        ({}, {"images": [image(id_key_digests=["01" * 48])]}),
        ({}, {"images": [image(author_key_digests=["01" * 48])]}),
        ({"guest_svn": 4}, {"images": [image(minimum_guest_svn=5)]}),
        ({}, {"images": [image(measurement="01" * 48)]}),
    ],
    ids=str,
)
def test_each_value_of_an_image_counts(report: dict[str, Any], values: dict[str, Any]) -> None:
    refused(Reason.MEASUREMENT, lambda: accept(values=values, **report))


def test_values_that_are_listed_are_accepted_and_those_of_two_images_are_not_mixed() -> None:
    signed: dict[str, Any] = {
        "host_data": b"\x01" * 32,
        "patch": {0x0E0: b"\x02" * 48, 0x110: b"\x03" * 48},
        "guest_svn": 5,
    }
    listed = image(
        host_data=["01" * 32], id_key_digests=["02" * 48], author_key_digests=["03" * 48], minimum_guest_svn=5
    )
    assert accept(values={"images": [image(name="older"), listed]}, **signed).image == "worker"
    mixed = {"images": [image(name="one", host_data=["01" * 32]), image(name="two", id_key_digests=["02" * 48])]}
    refused(Reason.MEASUREMENT, lambda: accept(values=mixed, host_data=b"\x01" * 32, patch={0x0E0: b"\x02" * 48}))


@pytest.mark.parametrize(
    ("info", "platform", "ok"),
    [
        (0, {"required": [], "allowed": []}, True),
        (1, {"required": [], "allowed": []}, False),
        (1, {"required": [], "allowed": ["SMT_EN"]}, True),
        (1, {"required": ["ECC_EN"], "allowed": ["SMT_EN"]}, False),
        (5, {"required": ["ECC_EN"], "allowed": ["SMT_EN"]}, True),
        (4, {"required": ["ECC_EN"], "allowed": []}, True),
        (0x40, {"required": [], "allowed": ["SMT_EN", "TIO_EN"]}, False),
    ],
)
def test_the_platform_has_what_is_required_and_nothing_that_is_not_allowed(
    info: int, platform: dict[str, Any], ok: bool
) -> None:
    def run() -> object:
        return accept(platform_info=info, values={"platform_info": platform})

    if ok:
        run()
    else:
        refused(Reason.PLATFORM, run)


def test_an_older_image_is_accepted_until_its_grace_period_ends() -> None:
    newer = image(name="newer", measurement="01" * 48)
    assert accept(values={"images": [image(until=NOW + 60), newer]}).not_after == NOW + 60
    assert accept(values={"images": [image(until=NOW), newer]}).not_after == NOW
    error = refused(Reason.MEASUREMENT, lambda: accept(values={"images": [image(until=NOW - 1), newer]}))
    assert "grace period" in error.message


def test_an_older_tcb_is_accepted_until_its_grace_period_ends_and_one_below_it_never() -> None:
    levels = reference_json()["sev-snp"]["minimum_tcb"]["Milan"]
    above = {"Milan": {**levels, "snp": levels["snp"] + 1}}

    def values(until: int, **lower: int) -> dict[str, Any]:
        return {
            "minimum_tcb": above,
            "tcb_grace": [{"product": "Milan", "minimum": {**levels, **lower}, "until": until}],
        }

    refused(Reason.TCB, lambda: accept(values={"minimum_tcb": above}))
    assert accept(values=values(NOW + 60)).not_after == NOW + 60
    assert "grace period ended" in refused(Reason.TCB, lambda: accept(values=values(NOW - 1))).message
    refused(Reason.TCB, lambda: accept(values=values(NOW + 60), committed_tcb=bytes(8)))
    # Not needed, it caps nothing.
    unneeded = {"tcb_grace": [{"product": "Milan", "minimum": levels, "until": NOW + 60}]}
    assert accept(values=unneeded).not_after > NOW + 60


# Revocation lists


def crl(
    issuer: str = "ARK-Milan",
    key: rsa.RSAPrivateKey | None = None,
    serials: tuple[int, ...] = (),
    *,
    issued: int = NOW - 3600,
    until: int = NOW + 3600,
    pss: bool = True,
    extensions: tuple[tuple[x509.ExtensionType, bool], ...] = (),
) -> bytes:
    def moment(seconds: int) -> datetime:
        return datetime.fromtimestamp(seconds, UTC)

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"keyquorum DEVELOPMENT {issuer}")])
    builder = x509.CertificateRevocationListBuilder().issuer_name(name).last_update(moment(issued))
    builder = builder.next_update(moment(until))
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment(issued)).build()
        builder = builder.add_revoked_certificate(entry)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    padded = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48) if pss else None
    signer = key or development_vendor().ark_key
    return builder.sign(signer, hashes.SHA384(), rsa_padding=padded).public_bytes(Encoding.DER)


def serial_of(position: int) -> int:
    return x509.load_der_x509_certificate(development_chip().endorsements[position]).serial_number


REQUIRED = {"revocation": "required", "max_revocation_age": 86400}


def test_a_list_that_names_nobody_is_accepted_and_caps_the_appraisal() -> None:
    for made in (crl(), crl(extensions=((x509.CRLNumber(7), False),)), crl(serials=(12345,))):
        assert accept((made,), values=REQUIRED).not_after == NOW + 3600
    late = crl(until=NOW + 10 * 86400)
    assert accept((late,), values=REQUIRED).not_after == NOW - 3600 + 86400
    both = (crl(), crl("SEV-Milan", development_vendor().ask_key))
    assert verified(both).revocation.issuers == ("ARK", "ASK")
    pem = x509.load_der_x509_crl(crl()).public_bytes(Encoding.PEM)
    assert verified((pem,)).revocation.issuers == ("ARK",)


def test_a_list_that_is_required_must_be_there_and_by_the_root() -> None:
    refused(Reason.PROVENANCE, lambda: accept(values=REQUIRED))
    refused(Reason.PROVENANCE, lambda: accept((crl("SEV-Milan", development_vendor().ask_key),), values=REQUIRED))
    accept(values={"revocation": "when-given"})


def test_a_revoked_certificate_is_refused_also_where_no_list_is_required() -> None:
    refused(Reason.REVOKED, lambda: accept((crl(serials=(serial_of(1),)),)))
    refused(Reason.REVOKED, lambda: accept((crl(serials=(serial_of(2),)),)))
    ask = development_vendor().ask_key
    refused(Reason.REVOKED, lambda: accept((crl("SEV-Milan", ask, (serial_of(0),)),)))
    accept((crl("SEV-Milan", ask, (serial_of(1),)),))  # a number of another issuer's


def test_a_list_outside_its_time_or_older_than_accepted_is_refused() -> None:
    refused(Reason.EXPIRED, lambda: accept((crl(until=NOW - 1),)))
    refused(Reason.NOT_YET_VALID, lambda: accept((crl(issued=NOW + 1, until=NOW + 2),)))
    refused(Reason.STALE, lambda: accept((crl(issued=NOW - 3601),), values={"max_revocation_age": 3600}))


def test_a_list_that_is_not_this_chains_is_refused() -> None:
    refused(Reason.CHAIN, lambda: accept((crl("ARK-Genoa"),)))
    refused(Reason.CHAIN, lambda: accept((crl(), crl())))
    refused(Reason.SIGNATURE, lambda: accept((crl(key=development_vendor().ask_key),)))
    refused(Reason.SIGNATURE, lambda: accept((crl(pss=False),)))
    refused(Reason.MALFORMED, lambda: accept((crl(), crl(), crl())))
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\x05\x00")
    refused(Reason.MALFORMED, lambda: accept((crl(extensions=((unknown, False),)),)))
    refused(Reason.MALFORMED, lambda: accept((crl(extensions=((x509.CRLNumber(7), True),)),)))


def test_every_bit_flip_in_a_list_is_refused() -> None:
    made = crl(serials=(5,))
    assert looks_like_crl(made)
    verified((made,))
    for bit in range(0, 8 * len(made), 11):
        flipped = bytearray(made)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyquorumError):
            verified((bytes(flipped),))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 700), st.integers(0, 20))
def test_no_bytes_make_the_reader_of_lists_raise_anything_else(noise: bytes, at: int, cut: int) -> None:
    made = crl()
    for data in (noise, b"-----BEGIN X509 CRL-----\n" + noise, made[:at] + noise + made[at + cut :]):
        try:
            verified((data,))
        except KeyquorumError:
            continue


def test_a_verdict_says_which_lists_were_there() -> None:
    chip = development_chip()
    report = chip.sign_report(DATA, MEASUREMENT)
    reference = SnpReferenceValues.parse(section(**REQUIRED))
    verdict = judge_sev_snp(report, [*chip.endorsements, crl()], now=NOW, reference=reference)
    assert (verdict.ok, verdict.claims["revocation_lists"], verdict.claims["image"]) == (True, ["ARK"], "worker")
    verdict = judge_sev_snp(report, [*chip.endorsements, crl(serials=(serial_of(1),))], now=NOW, reference=reference)
    assert (verdict.ok, verdict.verified, verdict.reason) == (False, False, "REVOKED")
    assert isinstance(chip.key, ec.EllipticCurvePrivateKey)
