"""Manifests, openings and result statements: valid or not made at all, and bound to owner, job and time."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from keyquorum_core import manifest as m
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.provenance import Provenance, open_provenance
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity, PublicIdentity, sign
from tests.support import signed_vectors

NOW = 1_800_000_000
OWNER = Identity.from_seeds(b"\x01" * 32, b"\x02" * 32)
WORKER = Identity.from_seeds(b"\x03" * 32, b"\x04" * 32)
HPKE = RecipientKey.from_seed_bytes(b"\x00\x0fMLKEM768_X25519" + b"\x05" * 32)
MANIFEST = m.Manifest(
    subjects=(m.Subject("main.py", "11" * 32), m.Subject("data/h2.json", "22" * 32)),
    key_id="chem-2027",
    epoch=3,
    classification="internal",
    export_control="",
    regions=("eu-central-1", "CH"),
    evidence_types=("sev-snp", "nvidia-gpu"),
    resources=m.Resources(cpus=2, memory_mib=2048, gpus=1, wall_seconds=600, output_mib=64),
    owner="alice",
    owner_identity=OWNER.public,
    owner_hpke=HPKE.public,
    entrypoint=("python", "main.py"),
    not_before=NOW,
    not_after=NOW + 3600,
    issued_at=NOW - 5,
    nonce="0f" * 16,
    purposes=("research", "chemistry"),
    provenance=(Provenance("data/h2.json", "44" * 32, "55" * 32, ("zip3", "age"), 250_000),),
)
PAYLOAD = m.payload(MANIFEST)
OPENING = m.Opening(m.job_id(PAYLOAD), "0f" * 16, "ab" * 32, 4096, True)
RESULT = m.ResultStatement(
    job_id=m.job_id(PAYLOAD),
    worker=WORKER.public.fingerprint,
    exit_code=0,
    outcome="completed",
    reason="",
    artifacts={"result": m.ArtifactDigest("cd" * 32, 1234), "log": m.ArtifactDigest("ef" * 32, 0)},
    started_at=NOW,
    finished_at=NOW + 9,
)


def replay(vector: signed_vectors.Vector) -> object:
    match vector["operation"]:
        case "parse":
            assert m.payload(m.parse(vector["payload"])) == vector["payload"]
            return m.job_id(vector["payload"]), m.subject(vector["payload"]).hex()
        case "open":
            manifest, payload = m.open_manifest(vector["envelope"], PublicIdentity.from_bytes(vector["owner"]))
            assert m.parse(payload) == manifest
            if "now" in vector:
                m.check_window(manifest, vector["now"])
            return None
        case "open_opening":
            signer = PublicIdentity.from_bytes(vector["signer"])
            return m.open_opening(vector["envelope"], signer, vector["job_id"]).payload()
        case "open_result":
            signer = PublicIdentity.from_bytes(vector["signer"])
            return m.open_result(vector["envelope"], signer, vector["job_id"]).payload()
        case "open_provenance":
            signer = PublicIdentity.from_bytes(vector["signer"])
            return open_provenance(vector["envelope"], signer).payload()
    raise AssertionError(vector["operation"])


@pytest.mark.parametrize("vector", signed_vectors.load("manifest")["vectors"], ids=lambda v: v["name"])
def test_vector(vector: signed_vectors.Vector) -> None:
    if vector["expect"] != "ok":
        with pytest.raises(KeyquorumError) as caught:
            replay(vector)
        assert caught.value.reason == vector["expect"]
        return
    got = replay(vector)
    if vector["operation"] == "parse" and "job_id" in vector:
        assert got == (vector["job_id"], vector["subject"])
    elif vector["operation"] in ("open_opening", "open_result", "open_provenance"):
        assert got == vector["payload"]


def test_layout_of_the_manifest_is_pinned() -> None:
    tree = json.loads(PAYLOAD)
    assert rfc8785.dumps(tree) == PAYLOAD
    assert list(tree) == ["_type", "predicate", "predicateType", "subject"]
    assert tree["_type"] == "https://in-toto.io/Statement/v1"
    assert tree["predicateType"] == "urn:keyquorum:job-manifest:v1"
    assert tree["subject"] == [
        {"digest": {"sha256": "22" * 32}, "name": "data/h2.json"},
        {"digest": {"sha256": "11" * 32}, "name": "main.py"},
    ]
    assert hashlib.sha256(PAYLOAD).hexdigest() == "84db0fef8aaf5675767147db18c594be803b5c976485e8dbfa8a1914b8a923bc"
    assert m.job_id(PAYLOAD) == "qtnq734kv5lhk5tri7nrrrmux2"
    assert m.subject(PAYLOAD) == hashlib.sha256(PAYLOAD).digest()


@given(st.text(st.characters(codec="utf-8", min_codepoint=32), min_size=1, max_size=20))
@settings(max_examples=150, deadline=None)
def test_the_payload_is_rfc_8785_whatever_the_arguments_hold(argument: str) -> None:
    payload = m.payload(dataclasses.replace(MANIFEST, entrypoint=(argument,)))
    assert payload == rfc8785.dumps(json.loads(payload))
    assert m.parse(payload).entrypoint == (argument,)


def test_an_envelope_opened_before_is_still_refused_for_another_owner() -> None:
    envelope = m.sign_manifest(MANIFEST, OWNER)
    assert m.open_manifest(envelope, OWNER.public) == m.open_manifest(envelope, OWNER.public)
    with pytest.raises(RefusedError) as caught:
        m.open_manifest(envelope, WORKER.public)
    assert caught.value.reason is Reason.SIGNATURE


def test_layout_of_the_opening_is_pinned() -> None:
    assert OPENING.payload() == (
        b'{"bundle_sha256":"' + b"ab" * 32 + b'","bundle_size":4096,"confirmed":true,"job_id":"'
        + OPENING.job_id.encode() + b'","key_check":"' + b"0f" * 16 + b'"}'
    )  # fmt: skip
    assert OPENING.key_check_bytes == b"\x0f" * 16


def test_layout_of_the_result_statement_is_pinned() -> None:
    assert RESULT.payload() == (
        b'{"artifacts":{"log":{"sha256":"' + b"ef" * 32 + b'","size":0},"result":{"sha256":"' + b"cd" * 32
        + b'","size":1234}},"exit_code":0,"finished_at":1800000009,"job_id":"' + RESULT.job_id.encode()
        + b'","outcome":"completed","reason":"","started_at":1800000000,"worker":"' + RESULT.worker.encode() + b'"}'
    )  # fmt: skip


def test_sets_are_put_in_order_and_parse_gives_the_same_manifest() -> None:
    assert MANIFEST.regions == ("CH", "eu-central-1")
    assert MANIFEST.evidence_types == ("nvidia-gpu", "sev-snp")
    assert [s.name for s in MANIFEST.subjects] == ["data/h2.json", "main.py"]
    assert m.parse(PAYLOAD) == MANIFEST


def test_a_signed_manifest_opens_with_its_exact_bytes() -> None:
    envelope = m.sign_manifest(MANIFEST, OWNER)
    assert m.open_manifest(envelope, OWNER.public) == (MANIFEST, PAYLOAD)


def test_only_the_owner_a_manifest_names_may_sign_it() -> None:
    with pytest.raises(RefusedError) as caught:
        m.sign_manifest(MANIFEST, WORKER)
    assert caught.value.reason is Reason.UNKNOWN_OWNER
    with pytest.raises(RefusedError) as caught:
        m.open_manifest(sign(WORKER, m.MANIFEST_TYPE, PAYLOAD), WORKER.public)
    assert caught.value.reason is Reason.UNKNOWN_OWNER
    with pytest.raises(RefusedError) as caught:
        m.open_manifest(sign(WORKER, m.MANIFEST_TYPE, PAYLOAD), OWNER.public)
    assert caught.value.reason is Reason.SIGNATURE


@pytest.mark.parametrize(
    "change",
    [
        {"subjects": ()},
        {"subjects": (m.Subject("a", "11" * 32), m.Subject("a", "22" * 32))},
        {"subjects": (m.Subject("a", "11" * 32), m.Subject("a/b/c", "22" * 32))},
        {"key_id": ""},
        {"key_id": "Key"},
        {"epoch": -1},
        {"epoch": 2**53},
        {"classification": ""},
        {"classification": "x" * 33},
        {"export_control": "\n"},
        {"regions": ()},
        {"regions": ("C",)},
        {"regions": ("Ch",)},
        {"regions": ("CH", "CH")},
        {"regions": ("x" * 33,)},
        {"evidence_types": ()},
        {"evidence_types": ("sgx",)},
        {"evidence_types": ("tdx", "tdx")},
        {"owner": "al ice"},
        {"owner_hpke": b""},
        {"owner_hpke": HPKE.public[:-1]},
        {"owner_hpke": bytes(400_000)},
        {"entrypoint": ()},
        {"entrypoint": ("",)},
        {"entrypoint": ("x" * 4097,)},
        {"entrypoint": ("\0",)},
        {"entrypoint": ("\udc80",)},
        {"entrypoint": ("x",) * 65},
        {"not_after": NOW},
        {"not_after": NOW + m.MAX_LIFETIME + 1},
        {"issued_at": NOW + 3600},
        {"not_before": -1},
    ],
    ids=lambda c: ascii(c)[:60],
)
def test_a_manifest_that_breaks_a_rule_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        dataclasses.replace(MANIFEST, **change)


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a/", "a//b", ".", "..", "a/..", "./a", "a\\b", "a\nb", "a\0b", "\ud800", "x" * 256, "a/" * 600 + "a"],
    ids=lambda n: ascii(n)[:30],
)
def test_an_unsafe_subject_name_is_refused(name: str) -> None:
    with pytest.raises(MalformedError):
        m.Subject(name, "11" * 32)


@pytest.mark.parametrize("name", ["a", "a b.txt", "données/élan.csv", ".hidden", "a..b", "..a", "-rf"])
def test_an_ordinary_subject_name_is_fine(name: str) -> None:
    assert m.Subject(name, "11" * 32).name == name


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(m.Resources)])
@pytest.mark.parametrize("value", [-1, 2**40])
def test_resources_are_bounded(field: str, value: int) -> None:
    with pytest.raises(MalformedError):
        dataclasses.replace(MANIFEST.resources, **{field: value})


def test_a_manifest_too_large_to_travel_is_refused() -> None:
    subjects = tuple(m.Subject(f"{i:04}" + "x" * 200, "11" * 32) for i in range(m.MAX_SUBJECTS))
    with pytest.raises(MalformedError) as caught:
        m.payload(dataclasses.replace(MANIFEST, provenance=(), subjects=subjects))
    assert caught.value.reason is Reason.TOO_LARGE
    with pytest.raises(MalformedError):
        dataclasses.replace(MANIFEST, provenance=(), subjects=(*subjects, m.Subject("one-more", "11" * 32)))


def test_the_most_subjects_fit() -> None:
    subjects = tuple(m.Subject(f"data/file-{i:04}.bin", "11" * 32) for i in range(m.MAX_SUBJECTS))
    large = dataclasses.replace(MANIFEST, provenance=(), subjects=subjects)
    assert m.open_manifest(m.sign_manifest(large, OWNER), OWNER.public)[0] == large


@pytest.mark.parametrize(
    ("now", "reason"),
    [(NOW - 1, Reason.NOT_YET_VALID), (NOW, None), (NOW + 3599, None), (NOW + 3600, Reason.EXPIRED)],
)
def test_the_time_window_is_half_open(now: int, reason: Reason | None) -> None:
    if reason is None:
        m.check_window(MANIFEST, now)
        return
    with pytest.raises(RefusedError) as caught:
        m.check_window(MANIFEST, now)
    assert caught.value.reason is reason


def test_an_opening_is_for_one_job_by_its_owner() -> None:
    envelope = m.sign_opening(OPENING, OWNER)
    assert m.open_opening(envelope, OWNER.public, OPENING.job_id) == OPENING
    with pytest.raises(RefusedError) as caught:
        m.open_opening(envelope, OWNER.public, "a" * 26)
    assert caught.value.reason is Reason.WRONG_JOB
    with pytest.raises(RefusedError) as caught:
        m.open_opening(envelope, WORKER.public, OPENING.job_id)
    assert caught.value.reason is Reason.SIGNATURE


def test_a_result_is_for_one_job_by_the_key_it_names() -> None:
    envelope = m.sign_result(RESULT, WORKER)
    assert m.open_result(envelope, WORKER.public, RESULT.job_id) == RESULT
    with pytest.raises(RefusedError) as caught:
        m.open_result(envelope, WORKER.public, "a" * 26)
    assert caught.value.reason is Reason.WRONG_JOB
    with pytest.raises(MalformedError):
        m.sign_result(RESULT, OWNER)
    with pytest.raises(RefusedError) as caught:
        m.open_result(sign(OWNER, m.RESULT_TYPE, RESULT.payload()), OWNER.public, RESULT.job_id)
    assert caught.value.reason is Reason.DIGEST


@pytest.mark.parametrize(
    "change",
    [{"exit_code": 256}, {"exit_code": -256}, {"outcome": "fine"}, {"reason": "x" * 1025}, {"reason": "\x1b[2J"},
     {"artifacts": {"core": m.ArtifactDigest("ab" * 32, 1)}}, {"finished_at": NOW - 1}, {"worker": ""}],
    ids=str,
)  # fmt: skip
def test_a_result_statement_that_breaks_a_rule_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        dataclasses.replace(RESULT, **change)


@pytest.mark.parametrize(
    "change", [{"key_check": "0f"}, {"bundle_size": 0}, {"bundle_sha256": ""}, {"job_id": "A" * 26}], ids=str
)
def test_an_opening_that_breaks_a_rule_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        dataclasses.replace(OPENING, **change)


def test_every_bit_of_an_opening_counts() -> None:
    """A flipped bit is refused, or is other content written canonically: never this opening written otherwise."""
    data = OPENING.payload()
    for bit in range(8 * len(data)):
        twin = bytearray(data)
        twin[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(MalformedError):
            parsed = m.Opening.parse(bytes(twin))
            assert parsed.payload() == bytes(twin) != data


PARSERS = (m.parse, m.Opening.parse, m.ResultStatement.parse)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_random_bytes_raise_only_our_errors(data: bytes) -> None:
    for parse in PARSERS:
        with pytest.raises(KeyquorumError):
            parse(data)


@given(st.sampled_from((PAYLOAD, OPENING.payload(), RESULT.payload())), st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_payloads_raise_only_our_errors(good: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(good)))
    twin = good[:at] + data.draw(st.binary(max_size=4)) + good[at + data.draw(st.integers(0, 4)) :]
    for parse in PARSERS:
        with contextlib.suppress(KeyquorumError):
            parse(twin)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3), max_leaves=4)  # noqa: E501  # fmt: skip


@given(st.sampled_from(("predicate", "resources", "")), st.data())
@settings(max_examples=200, deadline=None)
def test_manifest_shaped_json_raises_only_our_errors(where: str, data: st.DataObject) -> None:
    tree = json.loads(PAYLOAD)
    part = {"": tree, "predicate": tree["predicate"], "resources": tree["predicate"]["resources"]}[where]
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON)
    changed = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
    with contextlib.suppress(KeyquorumError):
        assert m.payload(m.parse(changed)) == changed
