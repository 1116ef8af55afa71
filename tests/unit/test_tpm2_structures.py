"""TPM 2.0 structures: each parses to its last byte, and nothing else is accepted as one."""

from __future__ import annotations

import base64
import contextlib
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keyquorum_core.attestation.tpm2_keys import check_ak, check_ek, key_of, read_key, read_spki
from keyquorum_core.attestation.tpm2_structures import (
    Attributes,
    PcrSelection,
    Public,
    Quote,
    Scheme,
    parse_public,
    parse_quote,
    parse_signature,
    sized,
)
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from tests.support.soft_tpm import AK_ATTRIBUTES, EK_ATTRIBUTES, QuoteFields, soft_key, tpm2b

AES128_CFB = (0x0006, 128, 0x0043)


def refused(reason: Reason, call: Callable[[], object]) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        call()
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


def test_a_quote_is_read_field_by_field() -> None:
    raw = QuoteFields().to_bytes()
    quote = parse_quote(raw)
    assert quote.extra_data == bytes(range(32))
    assert (quote.clock, quote.reset_count, quote.restart_count, quote.safe) == (1_000_000, 5, 2, True)
    assert quote.firmware_version == 0x2019102300163636
    assert quote.selections == (PcrSelection(0x000B, (0, 4, 7)),)
    assert len(quote.pcr_digest) == 32
    assert quote.signed == raw


def test_the_layout_of_a_quote_is_pinned() -> None:
    fields = QuoteFields(qualified_signer=b"", extra_data=b"\xaa", selections=(("sha256", (0, 23)),), pcrs={})
    assert fields.to_bytes().hex() == (
        "ff544347" "8018" "0000" "0001aa" "00000000000f4240" "00000005" "00000002" "01" "2019102300163636"
        "00000001" "000b" "03" "010080"
        "0020" "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )  # fmt: skip
    assert parse_quote(fields.to_bytes()).selections == (PcrSelection(0x000B, (0, 23)),)


@pytest.mark.parametrize(
    "fields",
    [
        QuoteFields(magic=0xFF544346),
        QuoteFields(type=0x8000),
        QuoteFields(safe=2),
        QuoteFields(extra_data=bytes(67)),
        QuoteFields(qualified_signer=bytes(67)),
        QuoteFields(selections=(("sha256", (0,)), ("sha256", (1,)))),
        QuoteFields(select_bytes=5),
        QuoteFields(select_bytes=0, selections=(("sha256", ()),)),
        QuoteFields(selections=[("sha256", ())] * 17),
    ],
)
def test_a_quote_out_of_form_is_malformed(fields: QuoteFields) -> None:
    with pytest.raises(MalformedError) as caught:
        parse_quote(fields.to_bytes())
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("kind", [0x8014, 0x8016, 0x8017, 0x8019, 0x801A, 0x801C])
def test_an_attestation_of_another_type_is_refused(kind: int) -> None:
    refused(Reason.EVIDENCE_TYPE, lambda: parse_quote(QuoteFields(type=kind).to_bytes()))


def test_truncated_padded_and_concatenated_structures_are_malformed() -> None:
    key = soft_key("p256")
    quote = QuoteFields().to_bytes()
    for parse, raw in (
        (parse_quote, quote),
        (parse_signature, key.sign(quote)),
        (parse_signature, soft_key().sign(quote)),
        (parse_public, key.area()),
        (parse_public, soft_key().area()),
    ):
        for wrong in (*(raw[:size] for size in range(len(raw))), raw + b"\0", raw + raw, raw + bytes(2000)):
            with pytest.raises(MalformedError) as caught:
                parse(wrong)
            assert caught.value.reason is Reason.MALFORMED


def test_a_signature_is_read_by_its_scheme() -> None:
    quote = QuoteFields().to_bytes()
    by_rsa = parse_signature(soft_key().sign(quote, "rsapss", "sha384"))
    assert (by_rsa.scheme, by_rsa.hash_id, len(by_rsa.parts)) == (Scheme.RSAPSS, 0x000C, 1)
    by_ecc = parse_signature(soft_key("p384").sign(quote))
    assert (by_ecc.scheme, [len(each) for each in by_ecc.parts]) == (Scheme.ECDSA, [48, 48])


@pytest.mark.parametrize("algorithm", [0x0005, 0x0010, 0x001A, 0x001C])
def test_a_signature_by_another_algorithm_is_malformed(algorithm: int) -> None:
    refused(Reason.MALFORMED, lambda: parse_signature(struct.pack(">HH", algorithm, 0x000B) + tpm2b(bytes(256))))


@pytest.mark.parametrize("kind", ["rsa", "p256", "p384"])
def test_a_public_area_gives_its_key_and_its_name(kind: str) -> None:
    key = soft_key(kind)
    public = parse_public(key.area())
    assert key_of(public).fingerprint == key.fingerprint
    assert check_ak(public).spki == key.spki
    assert public.name[:2] == b"\x00\x0b"
    assert len(public.name) == 34
    assert public.name == parse_public(key.area()).name != parse_public(key.area(AK_ATTRIBUTES | 0x400)).name


def public(attributes: int = AK_ATTRIBUTES, kind: str = "rsa") -> Public:
    return parse_public(soft_key(kind).area(attributes))


@pytest.mark.parametrize(
    "attribute",
    [
        Attributes.FIXED_TPM,
        Attributes.FIXED_PARENT,
        Attributes.SENSITIVE_DATA_ORIGIN,
        Attributes.RESTRICTED,
        Attributes.SIGN,
        Attributes.DECRYPT,
        Attributes.ENCRYPTED_DUPLICATION,
        Attributes.X509_SIGN,
    ],
)
def test_an_ak_that_may_do_more_or_is_not_bound_to_its_tpm_is_refused(attribute: Attributes) -> None:
    check_ak(public())
    refused(Reason.PROVENANCE, lambda: check_ak(public(AK_ATTRIBUTES ^ attribute)))


def test_an_ak_with_a_weak_name_or_scheme_is_refused() -> None:
    key = soft_key()
    for area in (
        key.area(name_hash="sha1"),
        key.area(scheme_hash="sha1"),
        key.area(scheme_hash="sm3"),
        key.area(scheme=None),
        key.area(scheme="ecdsa"),
        soft_key("p256").area(scheme="rsassa"),
    ):
        refused(Reason.PROVENANCE, lambda area=area: check_ak(parse_public(area)))  # type: ignore[misc]


def test_reserved_attributes_and_unknown_algorithms_are_malformed() -> None:
    area = soft_key().area()
    for wrong in (
        soft_key().area(AK_ATTRIBUTES | 1),
        soft_key().area(AK_ATTRIBUTES | 1 << 31),
        area[:2] + b"\x00\x08" + area[4:],  # keyed hash
        area[:4] + b"\x00\x12" + area[6:],  # a Name by SM3
    ):
        refused(Reason.MALFORMED, lambda wrong=wrong: parse_public(wrong))  # type: ignore[misc]


def test_an_ek_must_decrypt_for_its_tpm_alone() -> None:
    def ek(attributes: int = EK_ATTRIBUTES, symmetric: tuple[int, int, int] | None = AES128_CFB) -> Public:
        return parse_public(soft_key().area(attributes, scheme=None, symmetric=symmetric))

    assert check_ek(ek()).fingerprint == soft_key().fingerprint
    for attribute in (*(1 << bit for bit in (1, 4, 5, 11, 16, 17, 18)),):
        refused(Reason.PROVENANCE, lambda bit=attribute: check_ek(ek(EK_ATTRIBUTES ^ bit)))  # type: ignore[misc]
    for symmetric in (None, (0x0026, 128, 0x0043), (0x0006, 64, 0x0043), (0x0006, 128, 0x0042)):
        refused(Reason.PROVENANCE, lambda one=symmetric: check_ek(ek(symmetric=one)))  # type: ignore[misc]


def test_a_public_area_whose_key_is_none_is_refused() -> None:
    ecc, by_rsa = public(kind="p256"), public()
    for wrong, reason in (
        (replace(ecc, unique=(ecc.unique[0], bytes(32))), Reason.MALFORMED),  # no point of the curve
        (replace(ecc, unique=(bytes(33), ecc.unique[1])), Reason.MALFORMED),
        (replace(ecc, curve=0x0001), Reason.SIGNATURE),
        (replace(by_rsa, key_bits=3072), Reason.MALFORMED),
        (replace(by_rsa, exponent=3), Reason.SIGNATURE),
        (replace(by_rsa, exponent=2), Reason.MALFORMED),
        (replace(by_rsa, unique=(b"\x7f" * 256,)), Reason.MALFORMED),
    ):
        refused(reason, lambda wrong=wrong: key_of(wrong))  # type: ignore[misc]


def test_keys_are_read_from_pem_and_base64_alike_and_only_in_canonical_form() -> None:
    key = soft_key("p256")
    text = base64.b64encode(key.spki).decode()
    assert read_key(key.pem) == read_key(text) == read_spki(key.spki)
    for wrong in ("", text + "\n", text[:-4], key.pem + key.pem, key.pem.replace("PUBLIC", "PRIVATE"), "x" * 5000):
        refused(Reason.MALFORMED, lambda wrong=wrong: read_key(wrong))  # type: ignore[misc]
    refused(Reason.MALFORMED, lambda: read_spki(key.spki + b"\0"))


@pytest.mark.parametrize("kind", ["rsa1024"])
def test_a_weak_key_is_refused(kind: str) -> None:
    assert isinstance(refused(Reason.SIGNATURE, lambda: read_spki(soft_key(kind).spki)), RefusedError)


@given(st.binary(max_size=300), st.sampled_from([parse_quote, parse_signature, parse_public]))
@example(b"\xff\x54\x43\x47\x80\x18", parse_quote)
def test_any_bytes_give_a_structure_or_the_typed_error(data: bytes, parse: Callable[[bytes], object]) -> None:
    with contextlib.suppress(KeyquorumError):
        parse(data)


@given(st.data())
def test_any_change_to_a_structure_gives_another_or_the_typed_error(data: st.DataObject) -> None:
    quote = QuoteFields().to_bytes()
    parse, raw = data.draw(
        st.sampled_from(
            [(parse_quote, quote), (parse_public, soft_key("p256").area()), (parse_public, soft_key().area())]
        )
    )
    at = data.draw(st.integers(0, len(raw) - 1))
    changed = raw[:at] + data.draw(st.binary(min_size=1, max_size=4)) + raw[at + data.draw(st.integers(0, 4)) :]
    try:
        parsed = parse(changed)
        if isinstance(parsed, Public):
            assert sized(parsed.area) == changed
            key_of(parsed)
        elif isinstance(parsed, Quote):
            assert parsed.signed == changed
    except KeyquorumError:
        pass
