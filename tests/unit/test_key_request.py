"""Key requests: valid or not made at all, bound to owner, purpose and name; and what the gate makes of them."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyquorum_core import manifest as m
from keyquorum_core.derivation import Combiner, context
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError
from keyquorum_core.key_request import (
    KEY_REQUEST_TYPE,
    Asked,
    KeyRequest,
    key_subject,
    open_asked,
    open_key_request,
    peek_asked,
    sign_key_request,
)
from keyquorum_core.policy.facts import JobFacts
from keyquorum_core.release import Leaf, open_share
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity, PublicIdentity, sign
from keyquorum_core.transcript import H
from keyquorum_custodian.gate import ReleaseRequest
from tests.support import signed_vectors
from tests.support.custodian import Committee, build_committee

START = 1_800_000_000
NAMES = st.from_regex(r"[a-c]{1,3}(-[a-c]{1,2})?", fullmatch=True)
VECTORS = signed_vectors.load("key-request")["vectors"]
PINNED = "a348b1669b170e14f609c8d961596bf109d42f76afe9756bdd7a9e11514f55a4"
OWNER = Identity.from_seeds(b"\x01" * 32, b"\x02" * 32)
HPKE = RecipientKey.from_seed_bytes(b"\x00\x0fMLKEM768_X25519" + b"\x05" * 32)
REQUEST = KeyRequest(
    key_id="chem-2027",
    epoch=3,
    purpose="tokenize",
    name="patients",
    classification="personal",
    export_control="",
    owner="alice",
    owner_identity=OWNER.public,
    owner_hpke=HPKE.public,
    not_before=START,
    not_after=START + 600,
    issued_at=START,
    nonce="0f" * 16,
)


def replay(vector: signed_vectors.Vector) -> None:
    if vector["operation"] == "parse":
        request = KeyRequest.parse(vector["payload"])
        assert request.payload() == vector["payload"]
        if "job_id" in vector:
            assert m.job_id(vector["payload"]) == vector["job_id"]
        assert request.context().hex() == vector["context"]
        return
    request = open_key_request(vector["envelope"], PublicIdentity.from_bytes(vector["owner"]))
    if "now" in vector:
        m.check_window(request, vector["now"])


@pytest.mark.parametrize("vector", VECTORS, ids=lambda each: each["name"])
def test_vectors(vector: signed_vectors.Vector) -> None:
    if vector["expect"] == "ok":
        replay(vector)
        return
    with pytest.raises(KeyquorumError) as caught:
        replay(vector)
    assert caught.value.reason == vector["expect"]


def test_layout_is_pinned() -> None:
    assert hashlib.sha256(REQUEST.payload()).hexdigest() == PINNED
    subject = H("keyquorum/v1/key-subject", b"alice", b"patients")
    assert REQUEST.context() == context("chem-2027", 3, "tokenize", subject)
    binding = Asked(REQUEST, REQUEST.payload()).binding()
    assert binding.context() == REQUEST.context()
    assert binding.subject == hashlib.sha256(REQUEST.payload()).digest()


@given(NAMES, NAMES, st.tuples(NAMES, NAMES))
def test_no_two_keys_share_a_subject(owner: str, name: str, other: tuple[str, str]) -> None:
    same = (owner, name) == other
    assert (key_subject(owner, name) == key_subject(*other)) is same


def test_a_job_can_not_pass_for_a_key_request() -> None:
    committee_words = ("tokenize", "data")
    for word in committee_words:
        with pytest.raises(MalformedError) as caught:
            m.Manifest(
                subjects=(m.Subject("main.py", "11" * 32),),
                key_id="k",
                epoch=1,
                classification="personal",
                export_control="",
                regions=("CH",),
                evidence_types=("sev-snp",),
                resources=m.Resources(1, 256, 0, 60, 16),
                owner="alice",
                owner_identity=OWNER.public,
                owner_hpke=HPKE.public,
                entrypoint=("python",),
                not_before=START,
                not_after=START + 60,
                issued_at=START,
                nonce="0f" * 16,
                purposes=("research", word),
            )
        assert caught.value.actual == word
    assert JobFacts.of(REQUEST).purposes == ("tokenize",)
    assert JobFacts.of(REQUEST).evidence_types == ()


def test_both_kinds_are_told_apart_by_their_signed_type() -> None:
    envelope = sign_key_request(REQUEST, OWNER)
    assert peek_asked(envelope) == open_asked(envelope, OWNER.public) == Asked(REQUEST, REQUEST.payload())
    with pytest.raises(MalformedError):
        open_asked(sign(OWNER, m.MANIFEST_TYPE, REQUEST.payload()), OWNER.public)
    with pytest.raises(RefusedError) as caught:
        sign_key_request(REQUEST, Identity.generate())
    assert caught.value.reason is Reason.UNKNOWN_OWNER


# -- at the gate -------------------------------------------------------------------------------------------------------


class Clock:
    now: float = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def committee(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Committee]:
    committee = build_committee(tmp_path_factory.mktemp("keys"), clock=Clock())
    committee.open_all()
    committee.generate()
    yield committee
    committee.close()


def request_of(committee: Committee, **changes: Any) -> KeyRequest:
    members: dict[str, Any] = {
        "key_id": "key-1",
        "epoch": 1,
        "owner_identity": committee.owner.identity.public,
        "owner_hpke": committee.owner.recipient.public,
        "nonce": secrets.token_hex(16),
    }
    return dataclasses.replace(REQUEST, **{**members, **changes})


def ask(committee: Committee, envelope: bytes, evidence: bytes = b"", **leaf: Any) -> ReleaseRequest:
    binding = peek_asked(envelope).binding()
    document = peek_asked(envelope).document
    members: dict[str, Any] = {
        "job_id": binding.job_id,
        "manifest_sha256": binding.subject.hex(),
        "recipient_sha256": hashlib.sha256(document.owner_hpke).hexdigest(),
        "evidence_sha256": hashlib.sha256(evidence).hexdigest(),
        "key_id": binding.key_id,
        "epoch": binding.epoch,
        "time": START,
        "recipient": "worker" if evidence else "owner",
        "development": bool(evidence),
    }
    return committee.logged(ReleaseRequest(envelope, evidence, Leaf(**{**members, **leaf}).to_bytes()))


def derive(committee: Committee, request: KeyRequest) -> bytes:
    envelope = sign_key_request(request, committee.owner.identity)
    asked = ask(committee, envelope)
    combiner = Combiner(committee.quorum, request.context())
    for name, node in committee.nodes.items():
        answer = node.gate.release(asked)
        shares = open_share(answer, committee.owner.recipient, Leaf.parse(asked.leaf).hash(), committee.quorum)
        combiner.add(name, shares.contributions)
    return combiner.conclude(require_confirmed=True).key.root


def test_the_owner_gets_the_same_key_every_time_and_another_for_another_use(committee: Committee) -> None:
    first = derive(committee, request_of(committee))
    assert derive(committee, request_of(committee, classification="internal", not_after=START + 900)) == first
    others = {derive(committee, request_of(committee, **change)) for change in ({"purpose": "data"}, {"name": "other"})}
    assert len(others | {first}) == 3


def test_a_retired_epoch_serves_its_owners_data_until_it_is_gone_and_no_new_job(committee: Committee) -> None:
    request = request_of(committee, purpose="data")
    first = derive(committee, request)
    held = [node.epochs.active("key-1", 1) for node in committee.nodes.values()]
    for each in held:
        each.retired_at = START - 90 * 86400
    try:
        assert derive(committee, request_of(committee, purpose="data")) == first
        manifest = m.sign_manifest(committee.manifest("key-1", issued_at=START), committee.owner.identity)
        refused(committee, committee.owner_request(manifest), "key", Reason.KEY_STATE)
    finally:
        for each in held:
            each.retired_at = None


def refused(committee: Committee, request: ReleaseRequest, check: str, reason: Reason) -> None:
    node = committee.nodes["ch-1"]
    before = node.keystore.release_count()
    with pytest.raises(KeyquorumError) as caught:
        node.gate.release(request)
    assert (caught.value.details["check"], caught.value.reason) == (check, reason)
    assert node.keystore.release_count() == before


def test_a_worker_that_asks_on_a_key_request_gets_nothing(committee: Committee) -> None:
    envelope = sign_key_request(request_of(committee), committee.owner.identity)
    evidence = committee.evidence(RecipientKey.generate(), Identity.generate())
    refused(committee, ask(committee, envelope, evidence), "recipient", Reason.RECIPIENT)


def test_an_owner_that_asks_in_anothers_name_gets_nothing(committee: Committee) -> None:
    mallory = Identity.generate()
    envelope = sign_key_request(request_of(committee, owner_identity=mallory.public), mallory)
    refused(committee, ask(committee, envelope), "manifest", Reason.SIGNATURE)
    unknown = sign_key_request(request_of(committee, owner="bob"), committee.owner.identity)
    refused(committee, ask(committee, unknown), "manifest", Reason.UNKNOWN_OWNER)


def test_a_coordinator_that_changes_what_was_asked_gets_nothing(committee: Committee) -> None:
    request = request_of(committee)
    envelope = sign_key_request(request, committee.owner.identity)
    swapped = sign(Identity.generate(), KEY_REQUEST_TYPE, dataclasses.replace(request, purpose="data").payload())
    refused(committee, ask(committee, swapped), "manifest", Reason.SIGNATURE)
    refused(committee, ask(committee, envelope, manifest_sha256="00" * 32), "leaf", Reason.WRONG_JOB)
    refused(committee, ask(committee, envelope, epoch=2), "leaf", Reason.LEAF)
    elsewhere = hashlib.sha256(RecipientKey.generate().public).hexdigest()
    refused(committee, ask(committee, envelope, recipient_sha256=elsewhere), "recipient", Reason.RECIPIENT)


def test_a_request_out_of_its_time_gets_nothing(committee: Committee) -> None:
    times = {"not_before": START - 900, "issued_at": START - 900, "not_after": START}
    envelope = sign_key_request(request_of(committee, **times), committee.owner.identity)
    refused(committee, ask(committee, envelope), "window", Reason.EXPIRED)
