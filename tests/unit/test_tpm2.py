"""TPM quotes: a real one, one by every kind of key, and every way in which one can fail to be genuine or acceptable."""

from __future__ import annotations

import base64
import contextlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core.attestation.findings import require
from keyquorum_core.attestation.tpm2 import Tpm2Evidence, VerifiedQuote, qualifying_data, verify, verify_parsed
from keyquorum_core.attestation.tpm2_appraisal import (
    begin,
    check_binding,
    check_enrolled,
    evaluate,
)
from keyquorum_core.attestation.tpm2_reference import Tpm2ReferenceValues
from keyquorum_core.attestation.tpm2_state import QuoteState, proceed
from keyquorum_core.attestation.tpm2_verdict import judge_tpm2
from keyquorum_core.errors import KeyquorumError, Reason
from tests.support.soft_tpm import AK_ATTRIBUTES, PCRS, QuoteFields, evidence, secure_boot_log, soft_key
from tests.support.vectors import vector


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


def check(made: Tpm2Evidence) -> VerifiedQuote:
    return verify(made.to_bytes())


NOW = 1_800_000_000


def check_reference(verified: VerifiedQuote, values: Tpm2ReferenceValues) -> None:
    require(evaluate(verified, values, now=NOW)[0])


def enrolled() -> set[str]:
    return {soft_key(kind).fingerprint for kind in ("rsa", "p256", "p384")}


# Real evidence


def real() -> Tpm2Evidence:
    """The real quote; its file names the members differently."""
    document = json.loads(vector("tpm/tpm_evidence.json"))
    quote = document["tpm_quote"]
    return Tpm2Evidence(
        ak_public=document["ak_public"],
        quote=base64.b64decode(quote["message"]),
        signature=base64.b64decode(quote["signature"]),
        bank="sha256",
        pcrs={index: bytes.fromhex(value) for index, value in enumerate(quote["pcrs"])},
    )


def test_a_real_quote_verifies_against_its_own_pcrs() -> None:
    verified = check(real())
    assert verified.ak.kind == "RSA-2048"
    assert (verified.signature_hash.name, verified.bank.name) == ("sha256", "sha256")
    assert sorted(verified.pcrs) == list(range(24))
    assert len(verified.quote.extra_data) == 64
    assert (verified.quote.reset_count, verified.quote.restart_count, verified.quote.safe) == (2, 0, True)


def test_a_real_quote_is_refused_for_its_provenance_unless_its_ak_is_enrolled() -> None:
    raw = real().to_bytes()
    verdict = judge_tpm2(raw, now=NOW, enrolled_aks=())
    assert (verdict.ok, verdict.verified, verdict.reason) == (False, True, "PROVENANCE")
    assert judge_tpm2(raw, now=NOW, enrolled_aks=enrolled()).reason == "PROVENANCE"
    fingerprint = str(verdict.claims["ak"])
    verdict = judge_tpm2(raw, now=NOW, enrolled_aks={fingerprint})
    assert (verdict.ok, verdict.verified, verdict.reason) == (True, True, "")


def test_a_real_quote_is_held_to_what_it_should_be_bound_to() -> None:
    made = real()
    aks = {check(made).ak.fingerprint}
    bound_to = check(made).quote.extra_data
    assert judge_tpm2(made.to_bytes(), now=NOW, enrolled_aks=aks, expected_report_data=bound_to).ok
    for other in (bytes(64), bound_to[:32], bound_to + b"\0", b""):
        verdict = judge_tpm2(made.to_bytes(), now=NOW, enrolled_aks=aks, expected_report_data=other)
        assert (verdict.ok, verdict.verified, verdict.reason) == (False, True, "BINDING")


def every_flip(made: Tpm2Evidence) -> int:
    """Flip every bit of quote and signature; each must be refused. Returns how many."""
    count = 0
    for name in ("quote", "signature"):
        raw: bytes = getattr(made, name)
        for bit in range(8 * len(raw)):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            changed: dict[str, Any] = {name: bytes(flipped)}
            with pytest.raises(KeyquorumError):
                verify_parsed(replace(made, **changed))
            count += 1
    return count


def test_every_bit_flip_in_a_real_quote_and_signature_is_refused() -> None:
    assert every_flip(real()) > 2000


def test_every_bit_flip_in_the_other_parts_of_real_evidence_is_refused() -> None:
    made = real()
    spki = base64.b64decode(made.ak_public)
    choose = random.Random(1)  # noqa: S311 - a fixed sample
    for bit in choose.sample(range(8 * len(spki)), 200):
        flipped = bytearray(spki)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeyquorumError):
            check(replace(made, ak_public=base64.b64encode(flipped).decode()))
    for index, bit in ((index, choose.randrange(256)) for index in range(24) for _ in range(8)):
        flipped = bytearray(made.pcrs[index])
        flipped[bit // 8] ^= 1 << bit % 8
        changed = replace(made, pcrs={**made.pcrs, index: bytes(flipped)})
        refused(Reason.MEASUREMENT, lambda changed=changed: check(changed))  # type: ignore[misc]


# Genuine


@pytest.mark.parametrize(
    ("kind", "scheme", "hash_name", "form"),
    [
        *(("rsa", scheme, name, "tss") for scheme in ("rsassa", "rsapss") for name in ("sha256", "sha384", "sha512")),
        *(("rsa", scheme, "sha256", "plain") for scheme in ("rsassa", "rsapss")),
        ("rsa3072", "rsassa", "sha384", "tss"),
        *((kind, "ecdsa", "sha256", form) for kind in ("p256", "p384") for form in ("tss", "plain", "fixed")),
        ("p384", "ecdsa", "sha384", "tss"),
        ("p384", "ecdsa", "sha384", "plain"),
    ],
)
def test_a_quote_by_every_kind_of_ak_verifies(kind: str, scheme: str, hash_name: str, form: str) -> None:
    key = soft_key(kind)
    verified = check(evidence(key, scheme=scheme, hash_name=hash_name, form=form))
    assert verified.ak.fingerprint == key.fingerprint
    assert verified.signature_hash.name == hash_name
    refused(
        Reason.SIGNATURE,
        lambda: check(
            evidence(key, scheme=scheme, hash_name=hash_name, form=form, quote=QuoteFields(clock=7).to_bytes())
        ),
    )


@pytest.mark.parametrize(("bank", "size"), [("sha384", 48), ("sha512", 64)])
def test_a_stronger_bank_verifies(bank: str, size: int) -> None:
    fields = QuoteFields(selections=((bank, (0, 1)),), pcrs={0: b"\1" * size, 1: b"\2" * size})
    assert check(evidence(fields=fields)).bank.name == bank


def test_the_public_area_of_the_ak_may_come_along() -> None:
    assert check(evidence(ak_area=soft_key().area())).ak.fingerprint == soft_key().fingerprint


def test_evidence_reads_back_as_it_was_written() -> None:
    log, pcrs = secure_boot_log()
    made = evidence(
        fields=QuoteFields(pcrs=pcrs, selections=(("sha256", tuple(pcrs)),)), event_log=log, ak_area=soft_key().area()
    )
    assert Tpm2Evidence.parse(made.to_bytes()) == made
    verified = verify(made.to_bytes())
    assert (verified.secure_boot, len(verified.events or ())) == (True, 9)


def test_every_bit_flip_in_quote_and_signature_is_refused() -> None:
    assert every_flip(evidence()) > 2000


def test_every_bit_flip_in_an_ecdsa_quote_and_signature_is_refused() -> None:
    assert every_flip(evidence(soft_key("p256"))) > 1000


def test_a_flip_anywhere_is_refused_or_has_no_effect() -> None:
    log, pcrs = secure_boot_log()
    made = evidence(
        fields=QuoteFields(pcrs=pcrs, selections=(("sha256", tuple(pcrs)),)), event_log=log, ak_area=soft_key().area()
    )
    raw = made.to_bytes()
    truth = judge_tpm2(raw, now=NOW, enrolled_aks=enrolled())
    assert truth.ok
    for bit in random.Random(2).sample(range(8 * len(raw)), 2000):  # noqa: S311 - a fixed sample
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        verdict = judge_tpm2(bytes(flipped), now=NOW, enrolled_aks=enrolled())
        assert not verdict.ok or verdict == truth


# Not genuine


def members(**changes: object) -> bytes:
    document: dict[str, object] = json.loads(evidence().to_bytes())
    for name, value in changes.items():
        document[name] = value
        if value is None:
            del document[name]
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"ak_public": None},
        {"quote": None},
        {"signature": None},
        {"pcrs": None},
        {"more": 1},
        {"quote": ""},
        {"quote": "////=="},
        {"ak_public": "not a key"},
        {"ak_public": 7},
        {"ak_public": ["key"]},
        {"pcrs": [1]},
        {"pcrs": {"sha256": {"00": "00" * 32}}},
        {"pcrs": {"sha256": {"32": "00" * 32}}},
        {"pcrs": {"sha256": {"-1": "00" * 32}}},
        {"pcrs": {"sha256": {"0": "00" * 31}}},
        {"pcrs": {"sha256": {"0": "AB" * 32}}},
        {"event_log": ""},
        {"event_log": base64.b64encode(b"no log").decode()},
        {"ak_tpm_public": base64.b64encode(b"no area").decode()},
    ],
)
def test_evidence_out_of_form_is_malformed(changes: dict[str, object]) -> None:
    refused(Reason.MALFORMED, lambda: verify(members(**changes)))


def test_truncated_padded_and_concatenated_evidence_is_malformed() -> None:
    raw = evidence().to_bytes()
    for wrong in (b"", raw[:-1], raw + b"x", raw + raw, b"[]", b"\xff"):
        refused(Reason.MALFORMED, lambda wrong=wrong: verify(wrong))  # type: ignore[misc]
    refused(Reason.TOO_LARGE, lambda: verify(raw + b" " * (512 << 10)))


def test_what_the_tpm_did_not_make_is_malformed_though_it_is_signed() -> None:
    refused(Reason.MALFORMED, lambda: check(evidence(fields=QuoteFields(magic=0x01020304))))


def test_a_signed_attestation_of_another_type_is_refused() -> None:
    refused(Reason.EVIDENCE_TYPE, lambda: check(evidence(fields=QuoteFields(type=0x8017))))


def test_a_quote_by_another_key_is_refused() -> None:
    refused(Reason.SIGNATURE, lambda: check(evidence(ak_public=soft_key("rsa", 1).pem)))
    refused(Reason.SIGNATURE, lambda: check(evidence(soft_key("p256"), ak_public=soft_key("p256", 1).pem)))
    refused(Reason.SIGNATURE, lambda: check(evidence(ak_public=soft_key("p256").pem)))
    refused(Reason.SIGNATURE, lambda: check(evidence(soft_key("p256"), ak_public=soft_key().pem)))


def test_a_weak_ak_is_refused() -> None:
    refused(Reason.SIGNATURE, lambda: check(evidence(ak_public=soft_key("rsa1024").pem)))


def test_a_signature_over_sha1_is_refused() -> None:
    quote = QuoteFields().to_bytes()
    key = soft_key()
    by_sha1 = b"\x00\x14\x00\x04" + key.sign(quote)[4:]
    refused(Reason.SIGNATURE, lambda: check(evidence(signature=by_sha1)))


def test_a_scheme_that_the_signature_was_not_made_with_is_refused() -> None:
    signature = evidence().signature
    refused(Reason.SIGNATURE, lambda: check(evidence(signature=b"\x00\x16" + signature[2:])))
    refused(Reason.SIGNATURE, lambda: check(evidence(signature=b"\x00\x14\x00\x0c" + signature[4:])))


def test_another_public_area_or_one_that_may_sign_anything_is_refused() -> None:
    for area in (soft_key("rsa", 1).area(), soft_key("p256").area(), soft_key().area(AK_ATTRIBUTES & ~(1 << 16))):
        refused(Reason.PROVENANCE, lambda area=area: check(evidence(ak_area=area)))  # type: ignore[misc]


def test_an_empty_nonce_is_refused() -> None:
    refused(Reason.BINDING, lambda: check(evidence(fields=QuoteFields(extra_data=b""))))


def test_an_empty_pcr_selection_is_refused() -> None:
    for selections in ((("sha256", ()),), ()):
        made = evidence(fields=QuoteFields(pcrs={}, selections=selections or (("sha256", ()),)))
        if not selections:
            fields = QuoteFields(pcrs={}, selections=())
            made = replace(made, quote=fields.to_bytes(), signature=soft_key().sign(fields.to_bytes()))
        refused(Reason.MEASUREMENT, lambda made=made: check(made))  # type: ignore[misc]


def test_sha1_banks_are_refused() -> None:
    fields = QuoteFields(selections=(("sha1", (0,)),), pcrs={0: bytes(20)})
    refused(Reason.MEASUREMENT, lambda: check(evidence(fields=fields)))
    error = refused(Reason.MEASUREMENT, lambda: check(evidence(fields=fields, bank="sha256", pcrs={0: bytes(32)})))
    assert error.actual == "sha1"
    both = QuoteFields(selections=(("sha1", (0,)), ("sha256", tuple(PCRS))))
    refused(Reason.MEASUREMENT, lambda: check(evidence(fields=both, bank="sha256")))
    unknown = QuoteFields(selections=(("sm3", (0, 4, 7)),))
    refused(Reason.MEASUREMENT, lambda: check(evidence(fields=unknown, bank="sha256")))


def test_pcr_values_of_several_banks_are_refused() -> None:
    banks = {"sha256": {"0": "00" * 32}, "sha384": {"0": "00" * 48}}
    refused(Reason.MEASUREMENT, lambda: verify(members(pcrs=banks)))
    refused(Reason.MEASUREMENT, lambda: verify(members(pcrs={})))


@pytest.mark.parametrize(
    "pcrs",
    [
        {},
        {0: PCRS[0]},
        {**PCRS, 1: bytes(32)},
        {**PCRS, 0: bytes(32)},
        {0: PCRS[4], 4: PCRS[0], 7: PCRS[7]},
    ],
)
def test_pcr_values_other_than_the_quoted_are_refused(pcrs: dict[int, bytes]) -> None:
    refused(Reason.MEASUREMENT, lambda: check(evidence(pcrs=pcrs)))


def test_a_digest_by_another_hash_than_the_signatures_is_refused() -> None:
    refused(Reason.MEASUREMENT, lambda: check(evidence(fields=QuoteFields(digest_hash="sha384"))))


# Acceptable?


def test_an_ak_that_is_not_enrolled_is_refused() -> None:
    verified = check(evidence())
    assert check_enrolled(verified, enrolled()).ok
    refused(Reason.PROVENANCE, lambda: require([check_enrolled(verified, {soft_key("rsa", 1).fingerprint})]))
    refused(Reason.PROVENANCE, lambda: require([check_enrolled(verified, ())]))


def test_a_quote_that_is_bound_to_something_else_is_refused() -> None:
    binding = bytes(range(64))
    verified = check(evidence(fields=QuoteFields(extra_data=qualifying_data(binding))))
    assert check_binding(verified, qualifying_data(binding)).ok
    for other in (b"", bytes(32), binding, binding[:31]):
        refused(Reason.BINDING, lambda other=other: require([check_binding(verified, other)]))  # type: ignore[misc]


def test_the_half_that_a_tpm_carries_of_a_whole_binding_is_enough_for_a_verdict() -> None:
    binding = bytes(range(64))
    raw = evidence(fields=QuoteFields(extra_data=qualifying_data(binding))).to_bytes()
    assert judge_tpm2(raw, now=NOW, enrolled_aks=enrolled(), expected_report_data=binding).ok
    assert judge_tpm2(raw, now=NOW, enrolled_aks=enrolled(), expected_report_data=binding[:32]).ok
    for other in (binding[32:] + binding[:32], binding[:31], binding[:33], binding + b"\0", b""):
        assert judge_tpm2(raw, now=NOW, enrolled_aks=enrolled(), expected_report_data=other).reason == "BINDING"


def reference(**changes: object) -> dict[str, object]:
    document: dict[str, object] = {
        "bank": "sha256",
        "pcrs": {str(index): ["99" * 32, value.hex()] for index, value in PCRS.items()},
        "firmware_versions": ["2019102300163636"],
        "event_log_required": False,
        "secure_boot_required": False,
        "grace": [],
    }
    return document | changes


def test_a_quote_with_all_expected_values_is_accepted() -> None:
    check_reference(check(evidence()), Tpm2ReferenceValues.parse(reference()))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pcrs": {"0": [PCRS[0].hex()]}}, Reason.MEASUREMENT),
        ({"pcrs": {str(index): ["99" * 32] for index in (0, 1, 4, 7)}}, Reason.MEASUREMENT),
        ({"pcrs": {str(index): ["99" * 32] for index in PCRS}}, Reason.MEASUREMENT),
        ({"bank": "sha384", "pcrs": {str(index): ["99" * 48] for index in PCRS}}, Reason.MEASUREMENT),
        ({"firmware_versions": ["2019102300163637"]}, Reason.TCB),
        ({"event_log_required": True}, Reason.MEASUREMENT),
        ({"event_log_required": True, "secure_boot_required": True}, Reason.MEASUREMENT),
    ],
)
def test_a_quote_that_differs_from_the_reference_values_is_refused(changes: dict[str, object], reason: Reason) -> None:
    values = Tpm2ReferenceValues.parse(reference(**changes))
    refused(reason, lambda: check_reference(check(evidence()), values))
    verdict = judge_tpm2(evidence().to_bytes(), now=NOW, enrolled_aks=enrolled(), reference=values)
    assert (verdict.ok, verdict.verified, verdict.reason) == (False, True, str(reason))


def test_older_values_are_accepted_until_their_grace_period_ends() -> None:
    def run(until: int) -> int | None:
        values = Tpm2ReferenceValues.parse(
            reference(
                pcrs={str(index): ["99" * 32] for index in PCRS},
                firmware_versions=["0000000000000001"],
                grace=[
                    *({"pcr": index, "value": value.hex(), "until": until + index} for index, value in PCRS.items()),
                    {"firmware_version": "2019102300163636", "until": until + 9},
                ],
            )
        )
        findings, appraised = evaluate(check(evidence()), values, now=NOW)
        require(findings)
        return appraised.not_after

    assert run(NOW + 60) == NOW + 60 + min(PCRS)
    refused(Reason.MEASUREMENT, lambda: run(NOW - 1 - min(PCRS)))


@pytest.mark.parametrize("on", [True, False])
def test_secure_boot_is_required_by_what_was_measured(on: bool) -> None:
    log, pcrs = secure_boot_log(on)
    made = evidence(fields=QuoteFields(pcrs=pcrs, selections=(("sha256", tuple(pcrs)),)), event_log=log)
    values = Tpm2ReferenceValues.parse(
        reference(
            pcrs={str(index): [value.hex()] for index, value in pcrs.items()},
            event_log_required=True,
            secure_boot_required=True,
        )
    )
    if on:
        check_reference(check(made), values)
    else:
        refused(Reason.MEASUREMENT, lambda: check_reference(check(made), values))


@pytest.mark.parametrize(
    "changes",
    [
        {"bank": "sha1"},
        {"bank": ""},
        {"pcrs": {}},
        {"pcrs": {"0": []}},
        {"pcrs": {"24": ["99" * 32]}},
        {"pcrs": {"07": ["99" * 32]}},
        {"pcrs": {"0": ["00" * 32]}},
        {"pcrs": {"0": ["ff" * 32]}},
        {"pcrs": {"0": ["99" * 20]}},
        {"pcrs": {"0": ["99" * 32, "99" * 32]}},
        {"firmware_versions": []},
        {"firmware_versions": ["1"]},
        {"event_log_required": 1},
        {"secure_boot_required": True},
        {"secure_boot_required": True, "event_log_required": True, "pcrs": {"0": ["99" * 32]}},
        {"grace": [{"pcr": 0, "value": "98" * 32}]},
        {"grace": [{"pcr": 9, "value": "98" * 32, "until": 1}]},
        {"grace": [{"pcr": 0, "value": "99" * 32, "until": 1}]},
        {"grace": [{"pcr": 0, "value": "00" * 32, "until": 1}]},
        {"grace": [{"firmware_version": "2019102300163636", "until": 1}]},
        {"grace": [{"firmware_version": "1", "until": 1}]},
        {"more": 1},
    ],
)
def test_reference_values_that_say_less_do_not_load(changes: dict[str, object]) -> None:
    refused(Reason.MALFORMED, lambda: Tpm2ReferenceValues.parse(reference(**changes)))


@pytest.mark.parametrize("name", sorted(reference()))
def test_no_reference_value_can_be_left_out(name: str) -> None:
    document = reference()
    del document[name]
    refused(Reason.MALFORMED, lambda: Tpm2ReferenceValues.parse(document))


# One quote after another


def later(**changes: Any) -> VerifiedQuote:
    return check(evidence(fields=replace(QuoteFields(), **changes)))


START = QuoteState(soft_key().fingerprint, 5, 2, 1_000_000, 0x2019102300163636)


def test_a_first_quote_begins_the_state_and_later_ones_move_it_on() -> None:
    state = begin(None, check(evidence()))
    assert state == START
    proceed(state, begin(None, later(clock=1_000_001)))
    assert begin(state, later(clock=1_000_001)).clock == 1_000_001
    assert begin(state, later(reset_count=6, restart_count=0, clock=1_000_001)).reset_count == 6
    assert begin(state, later(restart_count=3, clock=1_000_001)).restart_count == 3
    assert begin(state, later(reset_count=6, clock=5, safe=0)).clock == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"reset_count": 4, "clock": 2_000_000},
        {"restart_count": 1, "clock": 2_000_000},
        {"clock": 999_999},
        {"clock": 1_000_000},
        {"clock": 999_999, "safe": 0},
        {"reset_count": 6, "clock": 999_999},
    ],
)
def test_counters_and_clock_that_go_back_are_refused(changes: dict[str, int]) -> None:
    refused(Reason.STALE, lambda: begin(START, later(**changes)))
    refused(Reason.STALE, lambda: proceed(START, begin(None, later(**changes))))
    raw = evidence(fields=replace(QuoteFields(), **changes)).to_bytes()  # type: ignore[arg-type]
    assert judge_tpm2(raw, now=NOW, enrolled_aks=enrolled(), previous=START).reason == "STALE"


@pytest.mark.parametrize("changes", [{"reset_count": 6}, {"restart_count": 3}, {"firmware_version": 1}, {}])
def test_a_worker_whose_tpm_restarted_does_not_go_on(changes: dict[str, int]) -> None:
    quote = begin(None, later(clock=2_000_000, **changes))
    if changes:
        refused(Reason.STALE, lambda: proceed(START, quote))
    else:
        proceed(START, quote)


def test_a_quote_by_another_tpm_does_not_go_on() -> None:
    other = check(evidence(soft_key("rsa", 1), QuoteFields(clock=2_000_000)))
    refused(Reason.PROVENANCE, lambda: begin(START, other))
    refused(Reason.PROVENANCE, lambda: proceed(START, begin(None, other)))


# Anything at all


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_change_to_evidence_is_judged_and_never_raises_anything_else(data: st.DataObject) -> None:
    log, pcrs = secure_boot_log()
    raw = evidence(fields=QuoteFields(pcrs=pcrs, selections=(("sha256", tuple(pcrs)),)), event_log=log).to_bytes()
    at = data.draw(st.integers(0, len(raw)))
    changed = raw[:at] + data.draw(st.binary(max_size=40)) + raw[at + data.draw(st.integers(0, 40)) :]
    judge_tpm2(changed, now=NOW, enrolled_aks=enrolled())
    with contextlib.suppress(KeyquorumError):
        verify(changed)


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "quote": st.binary(max_size=200),
            "signature": st.binary(max_size=200),
            "event_log": st.binary(max_size=200),
            "ak_area": st.binary(max_size=200),
            "ak_public": st.text(st.characters(codec="utf-8"), max_size=50),
            "pcrs": st.dictionaries(st.integers(0, 31), st.binary(min_size=32, max_size=32)),
        },
    )
)
def test_any_parts_are_judged_and_never_raise_anything_else(changes: dict[str, Any]) -> None:
    raw = evidence(**changes).to_bytes()
    judge_tpm2(raw, now=NOW, enrolled_aks=enrolled())
    with contextlib.suppress(KeyquorumError):
        verify(raw)
