"""TDX appraisal: which genuine quotes are accepted, and what reference values must say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from keyquorum_core.attestation import tdx
from keyquorum_core.attestation.roots import INTEL_ROOTS
from keyquorum_core.attestation.tdx_appraisal import AppraisedQuote, appraise
from keyquorum_core.attestation.tdx_reference import TdxReferenceValues
from keyquorum_core.attestation.tdx_verdict import judge_tdx
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from tests.support.intel_vendor import (
    DAY,
    NOW,
    PPID,
    SEPT_VE_DISABLE,
    IntelVendor,
    good_collateral,
    intel_vendor,
    qe_level,
    tcb_level,
)

DATA = bytes(range(64))
INTEL = next(iter(INTEL_ROOTS))


def hex_of(byte: int) -> str:
    return bytes([byte] * 48).hex()


def image(**changes: object) -> dict[str, object]:
    return {
        "name": "worker 1.0",
        "mrtd": hex_of(0xA1),
        "rtmr0": [hex_of(0xB0), hex_of(0xBF)],
        "rtmr1": [hex_of(0xB1)],
        "rtmr2": [hex_of(0xB2)],
        "rtmr3": [hex_of(0xB3)],
        "mrconfigid": [hex_of(0xC0)],
        **changes,
    }


def values(**changes: object) -> dict[str, object]:
    return {
        "roots": [],
        "development_roots": [intel_vendor().fingerprint],
        "images": [image()],
        "minimum_tcb_evaluation_data_number": 18,
        "max_collateral_age": 10 * DAY,
        "tcb_exceptions": [],
        **changes,
    }


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


def verified(collateral: dict[str, Any] | None = None, **quote: Any) -> tdx.VerifiedQuote:
    vendor = intel_vendor()
    document = vendor.collateral(**collateral) if collateral else good_collateral()
    return tdx.verify(vendor.quote(**quote), document, pinned_roots={vendor.fingerprint}, now=NOW)


def accept(
    quote: tdx.VerifiedQuote | None = None, *, now: int = NOW, data: bytes = DATA, **changes: object
) -> AppraisedQuote:
    reference = TdxReferenceValues.parse(values(**changes))
    return appraise(quote or verified(), reference, expected_report_data=data, now=now)


def test_a_quote_that_meets_everything_is_accepted() -> None:
    appraised = accept()
    assert (appraised.image, appraised.hardware_id) == ("worker 1.0", PPID.hex())
    assert appraised.used_exceptions == ()
    assert (verified().not_before, appraised.not_after) == (NOW - DAY, NOW - DAY + 10 * DAY)
    assert accept(max_collateral_age=400 * DAY).not_after == NOW + 29 * DAY


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [(SEPT_VE_DISABLE | 1, Reason.DEBUG_ENABLED), (0, Reason.MEASUREMENT), (1 << 40, Reason.UNSUPPORTED)],
)
def test_attributes_are_judged_without_the_library(attributes: int, reason: Reason) -> None:
    quote = verified()
    refused(reason, lambda: accept(replace(quote, quote=replace(quote.quote, attributes=attributes))))


def test_a_root_counts_as_what_the_reference_values_name_it() -> None:
    refused(Reason.ROOT_NOT_PINNED, lambda: accept(roots=[INTEL], development_roots=[]))
    refused(Reason.ROOT_NOT_PINNED, lambda: accept(development_roots=[IntelVendor().fingerprint]))
    genuine = replace(verified(), root=INTEL, development=False)
    refused(Reason.ROOT_NOT_PINNED, lambda: accept(genuine))
    assert accept(genuine, roots=[INTEL], development_roots=[]).image == "worker 1.0"


def test_collateral_older_than_accepted_is_stale() -> None:
    assert accept(max_collateral_age=DAY).not_after == NOW
    refused(Reason.STALE, lambda: accept(max_collateral_age=DAY - 1))
    refused(Reason.STALE, lambda: accept(now=NOW + 9 * DAY + 1))


def test_collateral_of_an_earlier_tcb_recovery_is_refused() -> None:
    refused(Reason.TCB, lambda: accept(minimum_tcb_evaluation_data_number=19))
    mixed = verified({"qe_identity": {"tcbEvaluationDataNumber": 17}})
    refused(Reason.TCB, lambda: accept(mixed))


@pytest.mark.parametrize(
    ("collateral", "quote", "names"),
    [
        ({"levels": [tcb_level("SWHardeningNeeded")]}, {}, ["SWHardeningNeeded"]),
        ({"levels": [tcb_level("OutOfDate")]}, {}, ["OutOfDate"]),
        ({"qe_levels": [qe_level("ConfigurationNeeded")]}, {}, ["ConfigurationNeeded"]),
        ({"levels": [tcb_level(advisories=("INTEL-SA-00615",))]}, {}, ["INTEL-SA-00615"]),
        (
            {"levels": [tcb_level("SWHardeningNeeded", advisories=("INTEL-SA-00615",))]},
            {},
            ["SWHardeningNeeded", "INTEL-SA-00615"],
        ),
        (  # launched up to date, and set back since: the library's own verdict would be UpToDate
            {"levels": [tcb_level(), tcb_level("OutOfDate", tdx=2)]},
            {"version": 5, "body_type": 3, "current_tcb_svn": bytes([2] + 15 * [0])},
            ["OutOfDate"],
        ),
    ],
)
def test_what_is_not_up_to_date_needs_an_exception_for_each_name(
    collateral: dict[str, Any], quote: dict[str, Any], names: list[str]
) -> None:
    def exceptions(until: int) -> list[dict[str, object]]:
        return [{"advisory" if "INTEL" in name else "status": name, "until": until} for name in names]

    evidence = verified(collateral, **quote)
    refused(Reason.TCB, lambda: accept(evidence))
    appraised = accept(evidence, tcb_exceptions=exceptions(NOW + 60))
    assert sorted(appraised.used_exceptions) == sorted(names)
    assert appraised.not_after == NOW + 60
    error = refused(Reason.TCB, lambda: accept(evidence, tcb_exceptions=exceptions(NOW - 1)))
    assert "ended" in error.message
    for index in range(len(names)):
        fewer = exceptions(NOW + 60)
        del fewer[index]
        refused(Reason.TCB, lambda fewer=fewer: accept(evidence, tcb_exceptions=fewer))  # type: ignore[misc]


def test_an_exception_that_is_not_needed_caps_nothing() -> None:
    assert accept(tcb_exceptions=[{"status": "OutOfDate", "until": 1}]).not_after == NOW + 9 * DAY


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"mrtd": b"\x01" * 48}, "MRTD"),
        ({"rtmrs": (b"\x01" * 48, b"\xb1" * 48, b"\xb2" * 48, b"\xb3" * 48)}, "RTMR0"),
        ({"rtmrs": (b"\xb0" * 48, b"\x01" * 48, b"\xb2" * 48, b"\xb3" * 48)}, "RTMR1"),
        ({"rtmrs": (b"\xb0" * 48, b"\xb1" * 48, bytes(48), b"\xb3" * 48)}, "RTMR2"),
        ({"rtmrs": (b"\xb0" * 48, b"\xb1" * 48, b"\xb2" * 48, b"\xb0" * 48)}, "RTMR3"),
        ({"mrconfigid": bytes(48)}, "MRCONFIGID"),
    ],
)
def test_each_measurement_counts(change: dict[str, Any], field: str) -> None:
    error = refused(Reason.MEASUREMENT, lambda: accept(verified(**change)))
    assert error.message.startswith(field)


def test_measurements_of_two_images_are_not_mixed() -> None:
    other = image(name="worker 2.0", mrtd=hex_of(0xA2), rtmr1=[hex_of(0xD1)])
    mixed = verified(mrtd=b"\xa2" * 48)
    refused(Reason.MEASUREMENT, lambda: accept(mixed, images=[image(), other]))
    same_td = image(name="worker 1.1", rtmr1=[hex_of(0xD1)])
    newer = verified(rtmrs=(b"\xbf" * 48, b"\xd1" * 48, b"\xb2" * 48, b"\xb3" * 48))
    assert accept(newer, images=[image(), same_td]).image == "worker 1.1"


@pytest.mark.parametrize("data", [bytes(64), DATA[:63], b"", DATA + b"\0"])
def test_a_quote_bound_to_anything_else_is_refused(data: bytes) -> None:
    refused(Reason.BINDING, lambda: accept(data=data))


@pytest.mark.parametrize("ppid", [bytes(16), b"", b"\x01" * 8])
def test_a_platform_that_does_not_name_itself_is_refused(ppid: bytes) -> None:
    refused(Reason.PROVENANCE, lambda: accept(replace(verified(), ppid=ppid)))


def test_an_older_image_is_accepted_until_its_grace_period_ends() -> None:
    appraised = accept(images=[image(until=NOW + 60), image(name="worker 2.0", mrtd=hex_of(0xA2))])
    assert (appraised.image, appraised.not_after) == ("worker 1.0", NOW + 60)
    error = refused(Reason.MEASUREMENT, lambda: accept(images=[image(until=NOW - 1)]))
    assert "grace period" in error.message


# Reference values


@pytest.mark.parametrize("member", values())
def test_reference_values_need_every_member(member: str) -> None:
    document = values()
    del document[member]
    with pytest.raises(MalformedError):
        TdxReferenceValues.parse(document)


@pytest.mark.parametrize("member", image())
def test_an_image_needs_every_member_and_none_empty(member: str) -> None:
    missing = image()
    del missing[member]
    empty = image(**{member: [] if isinstance(image()[member], list) else ""})
    for each in (missing, empty):
        with pytest.raises(MalformedError):
            TdxReferenceValues.parse(values(images=[each]))


@pytest.mark.parametrize(
    "change",
    [
        {"images": []},
        {"images": [image(), image()]},
        {"images": [image(mrtd="00" * 48)]},
        {"images": [image(rtmr0=[hex_of(1), hex_of(1)])]},
        {"images": [image(rtmr0=[hex_of(0xAB).upper()])]},
        {"images": [image(rtmr4=[hex_of(1)])]},
        {"images": [image(until=0)]},
        {"roots": [], "development_roots": []},
        {"roots": ["ab" * 32]},
        {"development_roots": [INTEL]},
        {"minimum_tcb_evaluation_data_number": 0},
        {"max_collateral_age": 0},
        {"tcb_exceptions": [{"status": "Revoked", "until": 1}]},
        {"tcb_exceptions": [{"status": "UpToDate", "until": 1}]},
        {"tcb_exceptions": [{"status": "OutOfDate"}]},
        {"tcb_exceptions": [{"status": "OutOfDate", "until": 0}]},
        {"tcb_exceptions": [{"advisory": "*", "until": 1}]},
        {"tcb_exceptions": [{"advisory": "OutOfDate", "until": 1}]},
        {"tcb_exceptions": [{"status": "OutOfDate", "advisory": "INTEL-SA-1", "until": 1}]},
        {"tcb_exceptions": [{"status": "OutOfDate", "until": 1}] * 2},
        {"unknown": 1},
    ],
)
def test_reference_values_that_say_less_or_other_do_not_load(change: dict[str, object]) -> None:
    with pytest.raises(MalformedError):
        TdxReferenceValues.parse(values(**change))


def test_reference_values_say_whether_they_trust_a_development_root() -> None:
    assert TdxReferenceValues.parse(values()).trusts_development
    reference = TdxReferenceValues.parse(values(roots=[INTEL], development_roots=[]))
    assert not reference.trusts_development
    assert reference.pinned_roots == {INTEL}


# The verdict


def test_a_verdict_names_the_image_and_the_exceptions() -> None:
    collateral = intel_vendor().collateral(levels=[tcb_level("OutOfDate")])
    exceptions = [{"status": "OutOfDate", "until": NOW}]
    reference = TdxReferenceValues.parse(values(tcb_exceptions=exceptions))
    verdict = judge_tdx(intel_vendor().quote(), collateral, now=NOW, reference=reference, expected_report_data=DATA)
    assert (verdict.ok, verdict.verified, verdict.reason) == (True, True, "")
    assert (verdict.claims["image"], verdict.claims["used_exceptions"]) == ("worker 1.0", ["OutOfDate"])
    assert verdict.claims["development"] is True


def test_a_verdict_tells_genuine_from_acceptable() -> None:
    reference = TdxReferenceValues.parse(values())

    def reason(quote: bytes, **options: Any) -> tuple[bool, bool, str]:
        verdict = judge_tdx(quote, good_collateral(), now=NOW, **({"reference": reference} | options))
        return verdict.ok, verdict.verified, verdict.reason

    vendor = intel_vendor()
    assert reason(vendor.quote(), reference=None) == (False, False, "ROOT_NOT_PINNED")
    assert reason(vendor.quote(), expected_report_data=bytes(64)) == (False, True, "BINDING")
    assert reason(vendor.quote(attributes=SEPT_VE_DISABLE | 1)) == (False, True, "DEBUG_ENABLED")
    assert reason(vendor.quote(mrtd=bytes(48))) == (False, True, "MEASUREMENT")
    assert reason(vendor.quote()[:-1]) == (False, False, "MALFORMED")
    assert reason(vendor.quote(), event_log=b"") == (False, True, "MALFORMED")
