"""The evidence document and the binding: exact bytes, and everything that is not one of them refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from keyquorum_core.attestation.binding import gpu_digest, gpu_nonce, report_data
from keyquorum_core.attestation.evidence import MAX_DOCUMENT_BYTES, EvidenceDocument, EvidenceItem, WindowNonce
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason
from keyquorum_core.transcript import H, transcript

DOCUMENT = EvidenceDocument(
    nonces=(WindowNonce("ch-1", 7, b"\x01" * 32), WindowNonce("de-1", 8, b"\x02" * 32)),
    hpke_key=b"hpke",
    signing_key=b"\x03" * 1984,
    items=(EvidenceItem("sev-snp", b"report", (b"vcek", b"ask")),),
)


GPUS = (EvidenceItem("nvidia-gpu", b"first", ()), EvidenceItem("nvidia-gpu", b"second", ()))
VECTORS = json.loads((Path(__file__).parents[2] / "docs" / "spec" / "vectors" / "evidence.json").read_text())


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda v: v["name"])
def test_vector(vector: dict[str, Any]) -> None:
    data = vector["document"].encode()
    if vector["expect"] != "ok":
        with pytest.raises(KeyquorumError) as caught:
            EvidenceDocument.parse(data)
        assert caught.value.reason == vector["expect"]
        return
    document = EvidenceDocument.parse(data)
    assert [item.type for item in document.items] == vector["types"]
    assert document.digest().hex() == vector["digest"]
    assert document.challenge().hex() == vector["challenge"]
    assert document.gpu_nonce().hex() == vector["gpu_nonce"]
    assert document.report_data().hex() == vector["report_data"]


def test_gpus_are_bound_by_all_other_evidence_and_each_gpu_by_challenge_and_key() -> None:
    document = replace(DOCUMENT, items=(*GPUS, *DOCUMENT.items))
    assert document.gpu_nonce() == H("keyquorum/v1/gpu-nonce", document.challenge(), b"hpke")
    assert gpu_nonce(b"c", b"h") == H("keyquorum/v1/gpu-nonce", b"c", b"h")
    gpus = H("keyquorum/v1/gpu-evidence", b"first", b"second")
    assert document.report_data() == report_data(b"hpke", b"\x03" * 1984, document.challenge(), gpus)
    assert gpu_digest([]) == b""
    assert DOCUMENT.report_data() == report_data(b"hpke", b"\x03" * 1984, DOCUMENT.challenge())
    for items in ((GPUS[1], GPUS[0], *DOCUMENT.items), (GPUS[0], *DOCUMENT.items)):
        assert replace(document, items=items).report_data() != document.report_data()
    # Endorsements may be fetched anew without new evidence.
    again = (replace(GPUS[0], endorsements=(b"rim",)), GPUS[1], *DOCUMENT.items)
    assert replace(document, items=again).report_data() == document.report_data()


def changed(**members: Any) -> bytes:
    return rfc8785.dumps({**json.loads(DOCUMENT.to_bytes()), **members})


def test_the_bytes_of_a_document_are_pinned() -> None:
    signing = "AwMD" * 661 + "Aw=="
    assert (
        DOCUMENT.to_bytes()
        == (
            '{"hpke_key":"aHBrZQ==","items":[{"endorsements":["dmNlaw==","YXNr"],"evidence":"cmVwb3J0","type":"sev-snp"}],'
            f'"nonces":[{{"custodian":"ch-1","nonce":"{"01" * 32}","window":7}},'
            f'{{"custodian":"de-1","nonce":"{"02" * 32}","window":8}}],"signing_key":"{signing}","v":1}}'
        ).encode()
    )


def test_a_document_reads_back_as_it_was_written() -> None:
    assert EvidenceDocument.parse(DOCUMENT.to_bytes()) == DOCUMENT
    assert DOCUMENT.digest() == hashlib.sha256(DOCUMENT.to_bytes()).digest()


def test_the_challenge_is_the_hash_over_the_sorted_list() -> None:
    assert DOCUMENT.challenge() == H("keyquorum/v1/challenge", b"ch-1", b"\x01" * 32, b"de-1", b"\x02" * 32)


def test_a_nonce_is_found_by_custodian() -> None:
    assert DOCUMENT.nonce_of("de-1") == DOCUMENT.nonces[1]
    assert DOCUMENT.nonce_of("fr-1") is None


def test_report_data_is_sha512_of_the_transcript() -> None:
    assert report_data(b"h", b"s", b"c") == (
        hashlib.sha512(transcript("keyquorum/v1/evidence", b"h", b"s", b"c", b"")).digest()
    )
    # Pinned, so that the format cannot change by accident.
    assert report_data(b"h", b"s", b"c").hex().startswith("01afe8ba26630ccec0aa05bf6ba402ec")


@pytest.mark.parametrize(
    ("hpke", "signing", "challenge", "gpu"),
    [(b"H", b"s", b"c", b""), (b"h", b"S", b"c", b""), (b"h", b"s", b"C", b""), (b"h", b"s", b"c", b"g")],
)
def test_report_data_depends_on_every_part(hpke: bytes, signing: bytes, challenge: bytes, gpu: bytes) -> None:
    assert report_data(hpke, signing, challenge, gpu) != report_data(b"h", b"s", b"c")


ENTRY = {"custodian": "ch-1", "window": 7, "nonce": "01" * 32}
ITEM = {"type": "sev-snp", "evidence": "cmVwb3J0", "endorsements": []}


@pytest.mark.parametrize(
    "members",
    [
        {"extra": 1},
        {"v": 2},
        {"v": True},
        {"nonces": []},
        {"nonces": [ENTRY, ENTRY]},
        {"nonces": [{**ENTRY, "custodian": "de-1"}, ENTRY]},
        {"nonces": [{**ENTRY, "custodian": "CH_1"}]},
        {"nonces": [{**ENTRY, "window": -1}]},
        {"nonces": [{**ENTRY, "nonce": "01" * 31}]},
        {"nonces": [{**ENTRY, "extra": 1}]},
        {"nonces": [{**ENTRY, "custodian": f"c{i:03}"} for i in range(129)]},
        {"hpke_key": ""},
        {"hpke_key": "aHBrZQ"},
        {"signing_key": "AAAA"},
        {"items": []},
        {"items": [ITEM, ITEM]},
        {"items": [ITEM, {**ITEM, "type": "nvidia-gpu"}]},
        {"items": [{**ITEM, "type": "Sev Snp"}]},
        {"items": [{**ITEM, "evidence": ""}]},
        {"items": [{**ITEM, "extra": 1}]},
        {"items": [{**ITEM, "endorsements": [7]}]},
        {"items": [{**ITEM, "endorsements": ["AAAA"] * 65}]},
        {"items": "sev-snp"},
    ],
    ids=lambda members: json.dumps(members)[:40],
)
def test_what_is_no_document_is_malformed(members: dict[str, object]) -> None:
    with pytest.raises(MalformedError) as caught:
        EvidenceDocument.parse(changed(**members))
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("missing", ["v", "nonces", "hpke_key", "signing_key", "items"])
def test_every_member_is_required(missing: str) -> None:
    members = json.loads(DOCUMENT.to_bytes())
    del members[missing]
    with pytest.raises(MalformedError, match=missing):
        EvidenceDocument.parse(rfc8785.dumps(members))


def test_another_encoding_of_the_same_document_is_refused() -> None:
    with pytest.raises(MalformedError, match="canonical"):
        EvidenceDocument.parse(DOCUMENT.to_bytes() + b"\n")
    with pytest.raises(MalformedError, match="canonical"):
        EvidenceDocument.parse(json.dumps(json.loads(DOCUMENT.to_bytes()), sort_keys=True).encode())


def test_an_oversize_document_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(MalformedError) as caught:
        EvidenceDocument.parse(b"[" * (MAX_DOCUMENT_BYTES + 1))
    assert caught.value.reason is Reason.TOO_LARGE


@given(st.binary(max_size=300))
@example(b"[" * 100_000)
@example(b"{}")
def test_bytes_that_are_no_document_raise_only_the_typed_error(data: bytes) -> None:
    with pytest.raises(MalformedError):
        EvidenceDocument.parse(data)


@given(st.data())
def test_mutated_documents_raise_only_the_typed_error(data: st.DataObject) -> None:
    raw = bytearray(DOCUMENT.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        raw[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        parsed = EvidenceDocument.parse(bytes(raw))
    except KeyquorumError:
        return
    assert parsed.to_bytes() == bytes(raw)
