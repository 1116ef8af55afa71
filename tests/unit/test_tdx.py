"""TDX verification: real quotes, quotes of a test vendor, and every way in which one can fail to be genuine."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.attestation import tdx
from keyquorum_core.attestation.roots import INTEL_ROOTS
from keyquorum_core.attestation.tdx_collateral import parse_collateral, parse_pck_chain
from keyquorum_core.attestation.tdx_quote import TD_ATTRIBUTES, parse_quote
from keyquorum_core.attestation.tdx_verdict import judge_tdx
from keyquorum_core.errors import KeyquorumError, Reason
from tests.support.intel_vendor import (
    DAY,
    NOW,
    PPID,
    SEPT_VE_DISABLE,
    IntelVendor,
    certificate,
    good_collateral,
    intel_vendor,
    new_key,
    pem,
    qe_level,
    tcb_level,
)
from tests.support.vectors import vector

JULY_2025 = int(datetime(2025, 7, 1, tzinfo=UTC).timestamp())
MARCH_2026 = int(datetime(2026, 3, 1, tzinfo=UTC).timestamp())


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


def verify(
    quote: bytes | None = None, collateral: bytes | None = None, *, vendor: IntelVendor | None = None, now: int = NOW
) -> tdx.VerifiedQuote:
    vendor = vendor or intel_vendor()
    return tdx.verify(
        vendor.quote() if quote is None else quote,
        good_collateral() if collateral is None else collateral,
        pinned_roots={vendor.fingerprint},
        now=now,
    )


def with_collateral(**options: Any) -> Callable[[], object]:
    return lambda: verify(collateral=intel_vendor().collateral(**options))


def real(name: str = "tdx_quote") -> tuple[bytes, bytes]:
    return vector(f"tdx/{name}"), vector(f"tdx/{name}_collateral.json")


# Real evidence


def test_a_real_quote_verifies_up_to_date() -> None:
    quote, collateral = real()
    verified = tdx.verify(quote, collateral, pinned_roots=INTEL_ROOTS, now=JULY_2025)
    assert (verified.tcb_status, verified.qe_status, verified.advisory_ids) == ("UpToDate", "UpToDate", ())
    assert (verified.quote.version, verified.development, verified.tcb_evaluation_data_number) == (4, False, 17)
    assert verified.ppid.hex() == "811dca2a26b952e85bb6448b097ba4fd"
    assert len(quote) - len(verified.quote.raw) == 70  # the TDQE's filler
    verdict = judge_tdx(quote, collateral, now=JULY_2025, expected_report_data=verified.quote.report_data)
    assert (verdict.ok, verdict.verified, verdict.reason) == (True, True, "")
    assert verdict.as_dict()["claims"]["measurement"] == verified.quote.mrtd.hex()  # type: ignore[index]


def test_a_real_quote_without_a_matching_tcb_level_is_genuine_and_refused() -> None:
    quote, collateral = real("tdx_quote_outdated")
    assert parse_quote(quote).version == 5
    error = refused(Reason.TCB, lambda: tdx.verify(quote, collateral, pinned_roots=INTEL_ROOTS, now=MARCH_2026))
    assert "No matching TCB level" in error.actual
    verdict = judge_tdx(quote, collateral, now=MARCH_2026)
    assert (verdict.ok, verdict.verified, verdict.reason) == (False, True, "TCB")


@pytest.mark.parametrize(("day", "reason"), [("2025-06-18", Reason.NOT_YET_VALID), ("2025-07-20", Reason.EXPIRED)])
def test_a_real_quote_is_refused_outside_the_window_of_its_collateral(day: str, reason: Reason) -> None:
    quote, collateral = real()
    now = int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())
    refused(reason, lambda: tdx.verify(quote, collateral, pinned_roots=INTEL_ROOTS, now=now))
    assert judge_tdx(quote, collateral, now=now).verified is False


def test_a_real_quote_with_the_collateral_of_another_platform_is_refused() -> None:
    quote, _ = real()
    _, other = real("tdx_quote_outdated")
    refused(Reason.CHAIN, lambda: tdx.verify(quote, other, pinned_roots=INTEL_ROOTS, now=MARCH_2026))


def test_a_real_quote_is_refused_where_intel_is_not_pinned() -> None:
    quote, collateral = real()
    pinned = {intel_vendor().fingerprint}
    refused(Reason.ROOT_NOT_PINNED, lambda: tdx.verify(quote, collateral, pinned_roots=pinned, now=JULY_2025))


def test_every_bit_flip_in_a_real_quote_is_refused() -> None:
    """2 400 flips anywhere in the quote: header, body, both signatures, keys, QE report, lengths, PCK chain, filler."""
    quote, collateral = real()
    choose = random.Random("tdx")  # noqa: S311 - a fixed sample
    body = choose.sample(range(8 * 632), 1000)
    rest = choose.sample(range(8 * 632, 8 * len(quote)), 1400)
    for bit in body + rest:
        flipped = bytearray(quote)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyquorumError):
            tdx.verify(bytes(flipped), collateral, pinned_roots=INTEL_ROOTS, now=JULY_2025)


def test_every_bit_flip_in_real_collateral_is_refused() -> None:
    quote, collateral = real()
    for bit in random.Random("collateral").sample(range(8 * len(collateral)), 500):  # noqa: S311
        flipped = bytearray(collateral)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyquorumError):
            tdx.verify(quote, bytes(flipped), pinned_roots=INTEL_ROOTS, now=JULY_2025)


# Quotes of the test vendor


@pytest.mark.parametrize(("version", "body_type"), [(4, 2), (5, 2), (5, 3), (5, 4)])
def test_each_version_and_body_verifies(version: int, body_type: int) -> None:
    verified = verify(intel_vendor().quote(version=version, body_type=body_type))
    assert (verified.quote.version, verified.quote.body_type) == (version, body_type)
    assert verified.current_tcb_status == ("UpToDate" if body_type > 2 else "")
    assert verified.quote.mrtd == b"\xa1" * 48
    assert verified.quote.rtmrs[2] == b"\xb2" * 48
    assert verified.quote.report_data == bytes(range(64))
    assert (verified.ppid, verified.root, verified.development) == (PPID, intel_vendor().fingerprint, True)
    assert (verified.not_before, verified.not_after) == (NOW - DAY, NOW + 29 * DAY)
    assert verified.collateral_issued_at == NOW - DAY


def test_collateral_may_repeat_the_pck_chain_and_no_other() -> None:
    members = intel_vendor().members()
    chain = intel_vendor().pck_chain().decode()
    for repeated in (chain, chain + "\0"):
        verify(collateral=json.dumps(members | {"pck_certificate_chain": repeated}).encode())
    other = json.dumps(members | {"pck_certificate_chain": members["tcb_info_issuer_chain"]}).encode()
    refused(Reason.CHAIN, lambda: verify(collateral=other))


# Form


def quote_with(offset: int, data: bytes, **options: Any) -> bytes:
    quote = intel_vendor().quote(**options)
    return quote[:offset] + data + quote[offset + len(data) :]


SIGNATURE_AT = 48 + 584 + 4
QE_AT = SIGNATURE_AT + 134
MALFORMED_QUOTES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "another vendor's report": lambda: bytes(1184),
    "too large": lambda: bytes(1 << 17),
    "version 3": lambda: quote_with(0, b"\x03\x00"),
    "version 6": lambda: quote_with(0, b"\x06\x00"),
    "P-384 key": lambda: quote_with(2, b"\x03\x00"),
    "unknown TEE": lambda: quote_with(4, b"\x82\x00\x00\x00"),
    "another QE vendor": lambda: quote_with(12, bytes(16)),
    "SGX body in version 5": lambda: quote_with(48, struct.pack("<HI", 1, 584), version=5),
    "body of another size": lambda: quote_with(48, struct.pack("<HI", 2, 648), version=5),
    "signature data too long": lambda: quote_with(632, struct.pack("<I", 1 << 30)),
    "QE data of another type": lambda: quote_with(SIGNATURE_AT + 128, b"\x05\x00"),
    "QE data too short": lambda: quote_with(SIGNATURE_AT + 130, b"\x00\x00\x00\x00"),
    "authentication data of another size": lambda: quote_with(QE_AT + 448, b"\x1f\x00"),
    "PCK by identifier": lambda: quote_with(QE_AT + 450 + 32, b"\x03\x00"),
    "PCK chain too short": lambda: quote_with(QE_AT + 452 + 32, b"\x00\x00\x00\x00"),
    "padded": lambda: intel_vendor().quote() + b"\0",
    "padded to 8000": lambda: intel_vendor().quote().ljust(8000, b"\0"),
    "concatenated": lambda: intel_vendor().quote() * 2,
    "filler that is not zero": lambda: intel_vendor().quote() + bytes(69) + b"\x01",
    "filler one byte too long": lambda: intel_vendor().quote() + bytes(71),
    "certificates that are none": lambda: intel_vendor().quote(chain=b"-----BEGIN"),
    "two certificates": lambda: intel_vendor().quote(chain=pem(intel_vendor().pck, intel_vendor().root).encode()),
    "text between certificates": lambda: intel_vendor().quote(chain=b"\n" + intel_vendor().pck_chain()),
}


@pytest.mark.parametrize("what", MALFORMED_QUOTES)
def test_a_quote_of_another_form_is_malformed(what: str) -> None:
    refused(Reason.MALFORMED, lambda: verify(MALFORMED_QUOTES[what]()))


def test_a_quote_cut_anywhere_is_malformed() -> None:
    quote = intel_vendor().quote(version=5, body_type=3)
    for size in {*range(0, len(quote), 97), 47, 48, 53, 54, 702, 703, 706, len(quote) - 1}:
        refused(Reason.MALFORMED, lambda size=size: parse_quote(quote[:size]))  # type: ignore[misc]


@pytest.mark.parametrize(("version", "filler"), [(4, 70), (5, 64)])
def test_the_filler_of_the_tdqe_is_dropped(version: int, filler: int) -> None:
    quote = intel_vendor().quote(version=version)
    assert verify(quote + bytes(filler)).quote.raw == quote


def test_an_sgx_quote_is_evidence_of_another_type() -> None:
    refused(Reason.EVIDENCE_TYPE, lambda: verify(quote_with(4, bytes(4))))


@pytest.mark.parametrize("member", ["tcb_info", "pck_crl", "qe_identity_signature", "pck_crl_issuer_chain"])
def test_collateral_without_a_member_is_malformed(member: str) -> None:
    members = intel_vendor().members()
    del members[member]
    refused(Reason.MALFORMED, lambda: verify(collateral=json.dumps(members).encode()))


@pytest.mark.parametrize(
    "change",
    [
        {"extra": "1"},
        {"pck_crl": "00"},
        {"pck_crl": "0"},
        {"root_ca_crl": "00ff"},
        {"root_ca_crl": "AB"},
        {"tcb_info": "{}"},
        {"tcb_info": '{"issueDate":"yesterday"}'},
        {"tcb_info": '{"issueDate":"2026-02-30T00:00:00Z"}'},
        {"qe_identity": "[]"},
        {"tcb_info_signature": "00"},
        {"tcb_info_issuer_chain": "none"},
        {"pck_certificate_chain": 1},
    ],
)
def test_collateral_of_another_form_is_malformed(change: dict[str, object]) -> None:
    collateral = json.dumps(intel_vendor().members() | change).encode()
    refused(Reason.MALFORMED, lambda: verify(collateral=collateral))


# Roots and chains


def test_a_chain_to_a_root_of_the_same_name_with_another_key_is_refused() -> None:
    vendor = IntelVendor()
    quote, collateral = vendor.quote(), vendor.collateral()
    pinned = {intel_vendor().fingerprint}
    refused(Reason.ROOT_NOT_PINNED, lambda: tdx.verify(quote, collateral, pinned_roots=pinned, now=NOW))
    refused(Reason.ROOT_NOT_PINNED, lambda: tdx.verify(quote, collateral, pinned_roots=set(), now=NOW))


def test_collateral_of_another_root_is_refused() -> None:
    other = IntelVendor()
    refused(Reason.CHAIN, lambda: verify(collateral=other.collateral()))
    # The library does not look at this chain; the CRL's own signature is what it checks.
    members = intel_vendor().members() | {"pck_crl_issuer_chain": pem(other.ca, other.root)}
    refused(Reason.CHAIN, lambda: verify(collateral=json.dumps(members).encode()))


def test_a_certificate_of_the_roots_key_that_the_root_did_not_sign_is_refused() -> None:
    vendor = intel_vendor()
    forged = certificate("Test SGX Root CA", vendor.root_key, "Test SGX Root CA", new_key(), ca=True, serial=99)
    chain = pem(vendor.pck, vendor.ca, forged).encode()
    refused(Reason.CHAIN, lambda: verify(vendor.quote(chain=chain), vendor.collateral(revoked_root=(1,))))


def test_a_pck_ca_of_the_same_name_with_another_key_is_refused() -> None:
    vendor = intel_vendor()
    other = certificate("Test PCK CA", new_key(), "Test SGX Root CA", vendor.root_key, ca=True, serial=2)
    refused(Reason.CHAIN, lambda: verify(vendor.quote(chain=pem(vendor.pck, other, vendor.root).encode())))
    forged = certificate("Test PCK CA", vendor.ca_key, "Test SGX Root CA", new_key(), ca=True, serial=2)
    refused(Reason.CHAIN, lambda: verify(vendor.quote(chain=pem(vendor.pck, forged, vendor.root).encode())))


@pytest.mark.parametrize("member", ["pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain"])
def test_an_issuer_chain_that_the_root_did_not_sign_is_refused(member: str) -> None:
    vendor = intel_vendor()
    forged = certificate("Test TCB Signing", vendor.tcb_key, "Test SGX Root CA", new_key(), ca=False, serial=4)
    members = vendor.members() | {member: pem(forged, vendor.root)}
    refused(Reason.CHAIN, lambda: verify(collateral=json.dumps(members).encode()))


def with_unused_bit(der: bytes) -> bytes:
    """The same certificate or CRL, whose signature says that its last bit, which is zero, is not part of it."""
    size = len(der) - der.rindex(b"\x03", 0, der.rindex(b"\0\x30")) - 3
    assert der[-size - 1] == 0
    assert der[-1] & 1 == 0
    return der[: -size - 1] + b"\x01" + der[-size:]


def test_a_signature_that_leaves_bits_unused_is_refused_though_the_library_takes_it() -> None:
    """Nobody signs that number: whoever carries the collateral could change it, and its digest."""
    vendor = IntelVendor()
    while vendor.tcb.signature[-1] & 1:
        vendor.tcb = certificate(
            "Test TCB Signing", vendor.tcb_key, "Test SGX Root CA", vendor.root_key, ca=False, serial=4
        )
    members = vendor.members()
    while any(bytes.fromhex(members[name])[-1] & 1 for name in ("pck_crl", "root_ca_crl")):
        members = vendor.members()

    def judged(**changes: str) -> Callable[[], object]:
        return lambda: verify(vendor.quote(), json.dumps(members | changes).encode(), vendor=vendor)

    judged()()
    issuer = x509.load_der_x509_certificate(with_unused_bit(vendor.tcb.public_bytes(Encoding.DER)))
    for name, value in (
        ("pck_crl", with_unused_bit(bytes.fromhex(members["pck_crl"])).hex()),
        ("root_ca_crl", with_unused_bit(bytes.fromhex(members["root_ca_crl"])).hex()),
        ("tcb_info_issuer_chain", pem(issuer, vendor.root)),
    ):
        assert name in refused(Reason.MALFORMED, judged(**{name: value})).message


def test_crls_of_another_key_are_refused() -> None:
    other = IntelVendor().members()
    for member in ("root_ca_crl", "pck_crl"):
        members = intel_vendor().members() | {member: other[member]}
        refused(Reason.CHAIN, lambda members=members: verify(collateral=json.dumps(members).encode()))  # type: ignore[misc]


def test_a_revoked_pck_certificate_is_refused() -> None:
    refused(Reason.REVOKED, with_collateral(revoked_pck=(3,)))


@pytest.mark.parametrize("serial", [1, 2, 4])
def test_a_revoked_authority_is_refused(serial: int) -> None:
    refused(Reason.REVOKED, with_collateral(revoked_root=(serial,)))


# Time


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"issued": NOW - 40 * DAY, "next_update": NOW - 1}, Reason.EXPIRED),
        ({"crl_next_update": NOW - 1}, Reason.EXPIRED),
        ({"issued": NOW + 1}, Reason.NOT_YET_VALID),
        ({"tcb_info": {"nextUpdate": "2026-02-28T23:59:59Z"}}, Reason.EXPIRED),
        ({"qe_identity": {"nextUpdate": "2026-02-28T23:59:59Z"}}, Reason.EXPIRED),
        ({"tcb_info": {"issueDate": "2026-03-01T00:00:01Z"}}, Reason.NOT_YET_VALID),
        ({"qe_identity": {"issueDate": "2026-03-01T00:00:01Z"}}, Reason.NOT_YET_VALID),
    ],
)
def test_collateral_outside_its_window_is_refused(options: dict[str, Any], reason: Reason) -> None:
    refused(reason, with_collateral(**options))


def test_a_crl_from_the_future_is_refused_though_the_library_takes_it() -> None:
    later = intel_vendor().members(issued=NOW + DAY)
    members = intel_vendor().members() | {"pck_crl": later["pck_crl"]}
    refused(Reason.NOT_YET_VALID, lambda: verify(collateral=json.dumps(members).encode()))


@pytest.mark.parametrize("member", ["tcb_info", "qe_identity", "pck_crl"])
def test_collateral_is_as_old_as_its_oldest_part(member: str) -> None:
    older = intel_vendor().members(issued=NOW - 9 * DAY)
    names = [each for each in older if each.startswith(member) and not each.endswith("chain")]
    members = intel_vendor().members() | {each: older[each] for each in names}
    assert verify(collateral=json.dumps(members).encode()).collateral_issued_at == NOW - 9 * DAY


@pytest.mark.parametrize("which", ["pck_not_after", "root_not_after"])
def test_an_expired_certificate_is_refused(which: str) -> None:
    vendor = IntelVendor(**{which: NOW - 1})  # type: ignore[arg-type]
    refused(Reason.EXPIRED, lambda: verify(vendor.quote(), vendor.collateral(), vendor=vendor))


# Signatures


def test_each_signature_counts() -> None:
    vendor = intel_vendor()
    refused(Reason.SIGNATURE, lambda: verify(vendor.quote(key=new_key())))
    for at in (SIGNATURE_AT + 3, SIGNATURE_AT + 70, QE_AT + 330, QE_AT + 390, QE_AT + 460):
        quote = bytearray(vendor.quote())
        quote[at] ^= 1
        refused(Reason.SIGNATURE, lambda quote=quote: verify(bytes(quote)))  # type: ignore[misc]
    for member in ("tcb_info_signature", "qe_identity_signature"):
        members = vendor.members()
        members[member] = members[member][::-1]
        refused(Reason.SIGNATURE, lambda members=members: verify(collateral=json.dumps(members).encode()))  # type: ignore[misc]


def test_what_is_refused_as_genuine_but_for_its_tcb_is_genuine() -> None:
    """``verified`` in the details rests on the order of the library's checks: a bad signature is found first."""
    vendor = intel_vendor()
    collateral = vendor.collateral(levels=[tcb_level(tdx=200)])
    error = refused(Reason.TCB, lambda: verify(collateral=collateral))
    assert error.details == {"verified": "true"}
    for attributes in (SEPT_VE_DISABLE, SEPT_VE_DISABLE | 1, 0):
        forged = vendor.quote(key=new_key(), attributes=attributes)
        error = refused(Reason.SIGNATURE, lambda forged=forged: verify(forged, collateral))  # type: ignore[misc]
        assert error.details == {}


# Quoting enclave, platform, module


@pytest.mark.parametrize(
    ("qe", "reason"),
    [
        ({"mrsigner": bytes(32)}, Reason.PROVENANCE),
        ({"product": 1}, Reason.PROVENANCE),
        ({"attributes": 0x17}, Reason.PROVENANCE),
        ({"attributes": 0x35}, Reason.PROVENANCE),
        ({"svn": 3}, Reason.TCB),
    ],
)
def test_a_quoting_enclave_other_than_intels_is_refused(qe: dict[str, Any], reason: Reason) -> None:
    assert refused(reason, lambda: verify(intel_vendor().quote(qe=qe))).details == {}


@pytest.mark.parametrize(
    "options",
    [
        {"tcb_info": {"fmspc": "00806F050000"}},
        {"tcb_info": {"id": "SGX"}},
        {"tcb_info": {"version": 2}},
        {"qe_identity": {"id": "QE"}},
    ],
)
def test_collateral_for_another_platform_or_tee_is_refused(options: dict[str, Any]) -> None:
    refused(Reason.CHAIN, with_collateral(**options))


def test_a_revoked_tcb_is_refused_whatever_policy_says() -> None:
    error = refused(Reason.REVOKED, with_collateral(levels=[tcb_level("Revoked")]))
    assert error.details == {"verified": "true"}


def test_a_module_that_intel_did_not_sign_is_refused() -> None:
    refused(Reason.PROVENANCE, lambda: verify(intel_vendor().quote(mrsignerseam=b"\x01" * 48)))


def test_the_current_tcb_is_matched_too() -> None:
    old = intel_vendor().quote(version=5, body_type=3, current_tcb_svn=bytes(16))
    refused(Reason.TCB, lambda: verify(old))


def test_statuses_and_advisories_of_platform_and_qe_are_reported() -> None:
    levels = [tcb_level(tdx=9), tcb_level("OutOfDate", advisories=("INTEL-SA-00002",))]
    qe_levels = [qe_level(svn=9), qe_level("ConfigurationNeeded", advisories=("INTEL-SA-00001",))]
    verified = verify(collateral=intel_vendor().collateral(levels=levels, qe_levels=qe_levels))
    assert (verified.tcb_status, verified.qe_status) == ("OutOfDate", "ConfigurationNeeded")
    assert verified.advisory_ids == ("INTEL-SA-00001", "INTEL-SA-00002")


def test_a_launch_tcb_that_was_updated_since_says_so() -> None:
    levels = [tcb_level(tdx=9), tcb_level("OutOfDate")]
    quote = intel_vendor().quote(version=5, body_type=3, current_tcb_svn=bytes([9] + 15 * [0]))
    verified = verify(quote, intel_vendor().collateral(levels=levels))
    assert (verified.tcb_status, verified.current_tcb_status) == ("TDRelaunchAdvised", "UpToDate")


# Attributes of the TD

ATTRIBUTES = [
    ({"attributes": SEPT_VE_DISABLE | TD_ATTRIBUTES["DEBUG"]}, Reason.DEBUG_ENABLED),
    ({"attributes": SEPT_VE_DISABLE | TD_ATTRIBUTES["PERF_PROFILING"]}, Reason.DEBUG_ENABLED),
    ({"attributes": SEPT_VE_DISABLE | 1 << 7}, Reason.DEBUG_ENABLED),
    ({"attributes": SEPT_VE_DISABLE | 1 << 40}, Reason.UNSUPPORTED),
    ({"attributes": 0}, Reason.MEASUREMENT),
    ({"attributes": SEPT_VE_DISABLE | TD_ATTRIBUTES["MIGRATABLE"]}, Reason.PROVENANCE),
    ({"attributes": SEPT_VE_DISABLE | TD_ATTRIBUTES["SERVTD_EXT"]}, Reason.PROVENANCE),
    ({"version": 5, "body_type": 3, "mrservicetd": b"\x01" * 48}, Reason.PROVENANCE),
]


@pytest.mark.parametrize(("options", "reason"), ATTRIBUTES)
def test_attributes_are_judged_by_the_library_and_by_us(options: dict[str, Any], reason: Reason) -> None:
    quote = intel_vendor().quote(**options)
    assert refused(reason, lambda: verify(quote)).details == {"verified": "true"}
    refused(reason, lambda: tdx.check_attributes(parse_quote(quote)))


@pytest.mark.parametrize("allowed", ["PKS", "KL", "LASS", "PERFMON"])
def test_attributes_that_take_nothing_away_are_allowed(allowed: str) -> None:
    verify(intel_vendor().quote(attributes=SEPT_VE_DISABLE | TD_ATTRIBUTES[allowed]))


# What the library may do


class PanicException(BaseException):
    """Named as PyO3 names it, and as little an :class:`Exception`."""


def test_a_panic_in_the_library_is_a_refusal_and_an_interrupt_is_not() -> None:
    def panic() -> None:
        raise PanicException("index out of bounds")

    def interrupt() -> None:
        raise KeyboardInterrupt

    refused(Reason.MALFORMED, lambda: tdx._native(panic))
    with pytest.raises(KeyboardInterrupt):
        tdx._native(interrupt)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("something new", Reason.CHAIN), ("Debug mode is enabled", Reason.UNSUPPORTED), ("CertRevoked", Reason.REVOKED)],
)
def test_whatever_the_library_says_is_a_refusal_with_a_reason(text: str, reason: Reason) -> None:
    error = tdx._refusal(f"Verification failed: {text}", parse_quote(intel_vendor().quote()))
    assert error.reason is reason


def claims_with(change: Callable[[dict[str, Any]], object]) -> Callable[[], object]:
    """Check 5 on claims that the library could have made, were it wrong."""
    quote = parse_quote(intel_vendor().quote())
    chain = parse_pck_chain(quote.pck_chain)
    collateral = parse_collateral(good_collateral())
    claims: dict[str, Any] = json.loads(json.dumps(tdx._verify_natively(quote, collateral, chain, NOW)))
    change(claims)
    return lambda: tdx._verified(quote, collateral, chain, claims)


def test_a_library_that_verified_something_else_is_not_believed() -> None:
    def body(claims: dict[str, Any]) -> dict[str, Any]:
        report: dict[str, Any] = claims["report"]["TD10"]
        return report

    claims_with(lambda claims: None)()
    refused(Reason.CHAIN, claims_with(lambda claims: claims["platform"].update(root_key_id=[0] * 48)))
    for name in ("mr_td", "mr_config_id", "rt_mr0", "rt_mr3"):
        refused(Reason.MALFORMED, claims_with(lambda claims, name=name: body(claims).update({name: "00" * 48})))  # type: ignore[misc]
    refused(Reason.MALFORMED, claims_with(lambda claims: body(claims).update(report_data="00" * 64)))
    refused(Reason.MALFORMED, claims_with(lambda claims: body(claims).update(td_attributes="00" * 8)))
    for change in (
        lambda claims: claims.pop("tcb"),
        lambda claims: claims["platform"].pop("pck"),
        lambda claims: claims.update(report={"SgxEnclave": {}}),
        lambda claims: claims.update(earliest_expiration_date="never"),
    ):
        refused(Reason.INTERNAL, claims_with(change))


@pytest.mark.parametrize("now", [-1, 1 << 64])
def test_a_moment_out_of_range_is_refused(now: int) -> None:
    refused(Reason.MALFORMED, lambda: verify(now=now))


# Anything at all


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=3000))
def test_any_bytes_raise_nothing_but_ours(data: bytes) -> None:
    for quote, collateral in ((data, good_collateral()), (intel_vendor().quote(), data)):
        with pytest.raises(KeyquorumError):
            verify(quote, collateral)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_any_change_to_a_quote_raises_nothing_but_ours(data: st.DataObject) -> None:
    original = intel_vendor().quote(version=5, body_type=4)
    quote = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(quote)))
        quote[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(min_size=1, max_size=8))
    if bytes(quote) != original:
        with pytest.raises(KeyquorumError):
            verify(bytes(quote))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(intel_vendor().members())), st.text(max_size=300))
def test_any_member_of_the_collateral_raises_nothing_but_ours(member: str, text: str) -> None:
    collateral = json.dumps(intel_vendor().members() | {member: text}).encode()
    with pytest.raises(KeyquorumError):
        verify(collateral=collateral)
