"""The release gate: every check refuses by itself when all others would pass (guarantees G2 and G8).

The requests here are what a malicious coordinator, owner or worker can send: each is right in everything but one point.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core import manifest
from keyquorum_core.derivation import Combiner, context
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, UnavailableError
from keyquorum_core.release import NO_LEASE, Leaf, LeaseTerms, open_share, open_window, verify_answer
from keyquorum_core.sealing import RecipientKey, Suite
from keyquorum_core.signing import Identity, sign, sign_many
from keyquorum_custodian.gate import CHECKS, LEAF_SKEW, ReleaseRequest
from keyquorum_custodian.node import Node
from keyquorum_custodian.witness import NOWHERE
from tests.support.custodian import Committee, build_committee
from tests.support.gate import START, Clock, gates, refused, signed


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Committee, Clock]]:
    with gates(tmp_path_factory.mktemp("gate")) as made:
        yield made


@pytest.fixture
def committee(built: tuple[Committee, Clock]) -> Committee:
    """The clock moves on between tests: no test sees another's windows or cached verdicts by accident."""
    built[1].now += 600
    return built[0]


@pytest.fixture
def clock(built: tuple[Committee, Clock]) -> Clock:
    return built[1]


@pytest.fixture
def node(committee: Committee) -> Node:
    return committee.nodes["ch-1"]


@pytest.fixture(scope="module")
def worker() -> tuple[RecipientKey, Identity]:
    return RecipientKey.generate(), Identity.generate()


# -- what passes -------------------------------------------------------------------------------------------------------


def test_the_owner_gets_shares_that_combine_to_the_job_key(committee: Committee) -> None:
    request = committee.owner_request()
    leaf = Leaf.parse(request.leaf)
    _, payload = manifest.open_manifest(request.manifest, committee.owner.identity.public)
    subject = manifest.subject(payload)
    combiner = Combiner(committee.quorum, context("key-1", 1, "job", subject))
    for name, node in committee.nodes.items():
        answer = node.gate.release(request)
        identity = committee.roster.custodian(name).identity
        window = open_window(
            node.windows.current().statement, identity, custodian=name, cluster="demo", now=int(committee.clock())
        )
        verify_answer(answer, window, subject, leaf.hash(), key_id="key-1", epoch=1)
        combiner.add(name, open_share(answer, committee.owner.recipient, leaf.hash(), committee.quorum).contributions)
    combination = combiner.result(require_confirmed=True)
    assert combination is not None
    assert combination.confirmed
    assert combination.blamed == ()


def test_an_attested_worker_gets_the_same_contributions_as_the_owner(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]
) -> None:
    envelope = signed(committee)
    mine = committee.owner_request(envelope)
    theirs = committee.worker_request(committee.evidence(*worker), envelope)
    shares = [
        open_share(node.gate.release(request), key, Leaf.parse(request.leaf).hash(), committee.quorum)
        for request, key in ((mine, committee.owner.recipient), (theirs, worker[0]))
    ]
    assert shares[0].contributions == shares[1].contributions
    assert (shares[0].lease, shares[1].lease) == (NO_LEASE, LeaseTerms(3600, 1800))


def test_a_repeated_request_is_answered_again_and_counted_once(committee: Committee, node: Node) -> None:
    request = committee.owner_request()
    node.gate.release(request)
    count = node.keystore.release_count()
    node.gate.release(request)
    assert node.keystore.release_count() == count


def test_a_release_on_development_evidence_is_recorded_as_such(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]
) -> None:
    request = committee.worker_request(committee.evidence(*worker))
    node.gate.release(request)
    leaf_hash = Leaf.parse(request.leaf).hash()
    rows = node.keystore._rows("SELECT development, leaf FROM releases WHERE leaf_hash = ?", leaf_hash)
    assert rows == [(1, request.leaf)]
    assert any("DEVELOPMENT" in warning for warning in node.warnings())


def test_the_list_of_checks_is_the_one_of_the_design() -> None:
    assert [name for name, _ in CHECKS] == [
        "standing",
        "roster",
        "manifest",
        "leaf",
        "revocation",
        "window",
        "key",
        "ledger",
        "recipient",
        "policy",
        "quota",
    ]


# -- roster ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "size", "check"),
    [("manifest", 1 << 20, "manifest"), ("evidence", 4 << 20, "leaf"), ("leaf", 2048, "leaf")],
)
def test_what_is_too_large_is_refused_before_anything_is_computed_over_it(
    committee: Committee, node: Node, member: str, size: int, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_large: dict[str, Any] = {member: bytes(size + 1)}
    request = dataclasses.replace(committee.owner_request(), **too_large)
    hashed: list[int] = []

    class Sha256:
        @staticmethod
        def sha256(data: bytes) -> Any:
            hashed.append(len(data))
            return hashlib.sha256(data)

    monkeypatch.setattr("keyquorum_custodian.gate.hashlib", Sha256)
    refused(node, request, check, Reason.TOO_LARGE)
    assert size + 1 not in hashed


def test_an_expired_roster_ends_all_releases(committee: Committee, node: Node, clock: Clock) -> None:
    request = committee.owner_request()
    now, clock.now = clock.now, committee.roster.expires_at
    try:
        refused(node, request, "roster", Reason.EXPIRED)
    finally:
        clock.now = now


# -- manifest ----------------------------------------------------------------------------------------------------------


def _without_signatures(envelope: bytes, keep: int) -> bytes:
    document = json.loads(envelope)
    document["signatures"] = document["signatures"][:keep]
    return json.dumps(document).encode()


@pytest.mark.parametrize("keep", [0, 1])
def test_a_manifest_with_a_missing_signature_is_refused(committee: Committee, node: Node, keep: int) -> None:
    request = committee.owner_request()
    broken = dataclasses.replace(request, manifest=_without_signatures(request.manifest, keep))
    refused(node, broken, "manifest", Reason.SIGNATURE_MISSING)


def test_a_manifest_with_an_extra_signature_is_refused(committee: Committee, node: Node) -> None:
    request = committee.owner_request()
    payload = base64.b64decode(json.loads(request.manifest)["payload"])
    both = sign_many((committee.owner.identity, Identity.generate()), manifest.MANIFEST_TYPE, payload)
    refused(node, dataclasses.replace(request, manifest=both), "manifest", Reason.SIGNATURE_EXTRA)


def test_a_manifest_signed_by_somebody_else_is_refused(committee: Committee, node: Node) -> None:
    request = committee.owner_request()
    payload = base64.b64decode(json.loads(request.manifest)["payload"])
    forged = sign(Identity.generate(), manifest.MANIFEST_TYPE, payload)
    error = refused(node, dataclasses.replace(request, manifest=forged), "manifest", Reason.SIGNATURE)
    assert committee.owner.identity.public.fingerprint[:16] in error.expected


@pytest.mark.parametrize("half", [0, 1])
def test_a_manifest_with_one_wrong_signature_is_refused(committee: Committee, node: Node, half: int) -> None:
    """A hybrid signature is both: breaking one algorithm is not enough (G4)."""
    request = committee.owner_request()
    payload = base64.b64decode(json.loads(request.manifest)["payload"])
    mixed, forged = json.loads(request.manifest), json.loads(sign(Identity.generate(), manifest.MANIFEST_TYPE, payload))
    mixed["signatures"][half] = forged["signatures"][half]
    broken = dataclasses.replace(request, manifest=json.dumps(mixed).encode())
    error = refused(node, broken, "manifest", Reason.SIGNATURE)
    assert error.details["algorithm"] == ("Ed25519", "ML-DSA-65")[half]


def test_a_manifest_with_a_changed_byte_is_refused(committee: Committee, node: Node) -> None:
    request = committee.owner_request()
    document = json.loads(request.manifest)
    payload = base64.b64decode(document["payload"]).replace(b'"gpus":0', b'"gpus":9')
    document["payload"] = base64.b64encode(payload).decode()
    refused(node, dataclasses.replace(request, manifest=json.dumps(document).encode()), "manifest", Reason.SIGNATURE)


def test_the_manifest_of_an_unknown_owner_is_refused(committee: Committee, node: Node) -> None:
    mallory = Identity.generate()
    forged = manifest.sign_manifest(committee.manifest(owner="mallory", owner_identity=mallory.public), mallory)
    request = dataclasses.replace(committee.owner_request(), manifest=forged)
    error = refused(node, request, "manifest", Reason.UNKNOWN_OWNER)
    assert error.actual == "mallory"


def test_a_known_owner_s_name_does_not_help_an_unknown_identity(committee: Committee, node: Node) -> None:
    mallory = Identity.generate()
    forged = manifest.sign_manifest(committee.manifest(owner_identity=mallory.public), mallory)
    refused(node, dataclasses.replace(committee.owner_request(), manifest=forged), "manifest", Reason.SIGNATURE)


def test_an_owner_removed_is_refused_from_then_on(committee: Committee, node: Node) -> None:
    request = committee.owner_request()
    node.gate.release(request)
    file = node.config.path("owners") / "alice.json"
    away = file.with_suffix(".away")
    file.rename(away)
    try:
        refused(node, request, "manifest", Reason.UNKNOWN_OWNER)
    finally:
        away.rename(file)
    node.gate.release(request)


@pytest.mark.parametrize("envelope", [b"", b"{}", b"[]", b"\xff", b"{" * 100_000, b'{"payload": 1}'])
def test_a_manifest_that_is_none_is_malformed(committee: Committee, node: Node, envelope: bytes) -> None:
    request = dataclasses.replace(committee.owner_request(), manifest=envelope)
    assert isinstance(refused(node, request, "manifest", Reason.MALFORMED), MalformedError)


# -- leaf --------------------------------------------------------------------------------------------------------------


def test_the_leaf_of_another_job_is_refused(committee: Committee, node: Node) -> None:
    other = committee.owner_request(signed(committee, entrypoint=("python", "other.py")))
    mine = committee.owner_request()
    error = refused(node, dataclasses.replace(mine, leaf=other.leaf), "leaf", Reason.WRONG_JOB)
    assert error.expected == Leaf.parse(mine.leaf).job_id
    assert error.actual == Leaf.parse(other.leaf).job_id


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"job_id": "a" * 26}, Reason.WRONG_JOB),
        ({"manifest_sha256": "0" * 64}, Reason.WRONG_JOB),
        ({"key_id": "key-2"}, Reason.LEAF),
        ({"epoch": 2}, Reason.LEAF),
        ({"recipient": "worker", "evidence_sha256": "0" * 64}, Reason.LEAF),
    ],
)
def test_a_leaf_that_names_something_else_is_refused(
    committee: Committee, node: Node, change: dict[str, Any], reason: Reason
) -> None:
    refused(node, committee.owner_request(**change), "leaf", reason)


@pytest.mark.parametrize("skew", [LEAF_SKEW + 1, -LEAF_SKEW - 1, 10**9])
def test_a_leaf_of_another_time_is_refused(committee: Committee, node: Node, skew: int) -> None:
    refused(node, committee.owner_request(time=int(committee.clock()) + skew), "leaf", Reason.STALE)


@pytest.mark.parametrize("skew", [LEAF_SKEW, -LEAF_SKEW])
def test_a_leaf_within_the_skew_passes(committee: Committee, node: Node, skew: int) -> None:
    node.gate.release(committee.owner_request(time=int(committee.clock()) + skew))


def test_a_leaf_in_other_bytes_is_refused(committee: Committee, node: Node) -> None:
    request = committee.owner_request()
    refused(node, dataclasses.replace(request, leaf=request.leaf.replace(b",", b", ")), "leaf", Reason.LEAF)
    refused(node, dataclasses.replace(request, leaf=request.leaf[:-1]), "leaf", Reason.MALFORMED)


# -- time window and key -----------------------------------------------------------------------------------------------


def test_a_manifest_whose_window_has_not_begun_is_refused(committee: Committee, node: Node) -> None:
    now = int(committee.clock())
    envelope = signed(committee, not_before=now + 1, not_after=now + 100)
    error = refused(node, committee.owner_request(envelope), "window", Reason.NOT_YET_VALID)
    assert error.actual == str(now)


def test_a_manifest_whose_window_is_past_is_refused(committee: Committee, node: Node) -> None:
    now = int(committee.clock())
    envelope = signed(committee, not_before=now - 100, not_after=now, issued_at=now - 100)
    refused(node, committee.owner_request(envelope), "window", Reason.EXPIRED)


def test_a_verified_manifest_expires_all_the_same(committee: Committee, node: Node, clock: Clock) -> None:
    envelope = signed(committee)
    node.gate.release(committee.owner_request(envelope))
    clock.now += 3600
    refused(node, committee.owner_request(envelope), "window", Reason.EXPIRED)


def test_another_epoch_is_refused(committee: Committee, node: Node) -> None:
    error = refused(node, committee.owner_request(signed(committee, epoch=2)), "key", Reason.EPOCH)
    assert (error.expected, error.actual) == ("1", "2")


def test_an_unknown_key_is_refused(committee: Committee, node: Node) -> None:
    refused(node, committee.owner_request(signed(committee, key_id="key-9")), "key", Reason.UNKNOWN_KEY)


def test_a_key_whose_ceremony_is_under_way_is_refused(committee: Committee, node: Node) -> None:
    plan = committee.plan("unfinished")
    node.ceremonies.propose(committee.sign_plan(plan))
    request = committee.owner_request(signed(committee, key_id="unfinished"))
    assert refused(node, request, "key", Reason.KEY_STATE).actual == "proposed"
    node.ceremonies.cancel(plan.ceremony_id)


# -- recipient ---------------------------------------------------------------------------------------------------------


def test_a_leaf_for_another_recipient_key_is_refused(committee: Committee, node: Node) -> None:
    """A coordinator cannot have the share sealed to a key of its own: it is sealed to the one that was proven (G1)."""
    other = hashlib.sha256(RecipientKey.generate().public).hexdigest()
    refused(node, committee.owner_request(recipient_sha256=other), "recipient", Reason.RECIPIENT)


def test_a_recipient_key_of_another_suite_is_refused(committee: Committee, node: Node) -> None:
    envelope = signed(committee, owner_hpke=RecipientKey.generate(Suite.MLKEM1024_P384).public)
    refused(node, committee.owner_request(envelope), "recipient", Reason.RECIPIENT)


# -- ledger ------------------------------------------------------------------------------------------------------------


def test_under_a_roster_that_names_no_ledger_nothing_is_released(tmp_path: Path) -> None:
    """No ledger is not an easier gate: it is none that opens."""
    clock = Clock()
    committee = build_committee(tmp_path, clock=clock, with_log=False)
    committee.generate()
    node = committee.nodes["ch-1"]
    envelope = signed(committee)
    bare = ReleaseRequest(envelope, b"", committee.leaf(envelope, b"").to_bytes())
    inclusion = committee.ledger.append(bare.leaf)
    for request in (
        bare,
        dataclasses.replace(bare, inclusion=inclusion),
        dataclasses.replace(bare, inclusion=inclusion, update=committee.ledger.update(0)),
    ):
        refused(node, request, "ledger", Reason.LEDGER_ORIGIN)
    assert any("no ledger" in warning for warning in node.warnings())
    committee.close()


def test_a_checkpoint_is_taken_even_where_the_release_it_came_with_is_refused(committee: Committee, node: Node) -> None:
    """Requests behind it over the same stream rest on it."""
    envelope = signed(committee)
    good = ReleaseRequest(envelope, b"", committee.leaf(envelope, b"").to_bytes())
    inclusion = committee.ledger.append(good.leaf)
    update = committee.ledger.update(node.witness.size)
    bad = dataclasses.replace(good, manifest=_without_signatures(envelope, 1), inclusion=inclusion, update=update)
    refused(node, bad, "manifest", Reason.SIGNATURE_MISSING)
    assert node.witness.size == committee.ledger.size
    committee.ledger.bring(*(each.witness for each in committee.nodes.values()))
    node.gate.release(dataclasses.replace(good, inclusion=inclusion))


def test_a_worker_needs_its_leaf_in_the_ledger_as_well(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]
) -> None:
    request = committee.worker_request(committee.evidence(*worker))
    refused(node, dataclasses.replace(request, inclusion=NOWHERE), "ledger", Reason.LEDGER_PROOF)
    node.gate.release(request)


# -- quota -------------------------------------------------------------------------------------------------------------


def test_an_owner_over_its_quota_is_refused_until_the_hour_has_passed(tmp_path: Path) -> None:
    clock = Clock()
    committee = build_committee(tmp_path, clock=clock, quota=3)
    committee.open_all()
    committee.generate()
    node = committee.nodes["ch-1"]
    envelope = signed(committee)
    requests = [committee.owner_request(envelope, time=START + number) for number in range(4)]
    for request in requests[:3]:
        node.gate.release(request)
    error = refused(node, requests[3], "quota", Reason.QUOTA)
    assert "3600 s" in error.next_step
    node.gate.release(requests[0])  # answered before: asking again is free
    committee.nodes.pop("ch-1").close()
    node = committee.open("ch-1")
    refused(node, committee.logged(requests[3]), "quota", Reason.QUOTA)  # and a restart forgets nothing
    clock.now += 3600
    node.gate.release(committee.owner_request(signed(committee)))
    committee.close()


# -- guarantees --------------------------------------------------------------------------------------------------------


def _attacks(committee: Committee, worker: tuple[RecipientKey, Identity]) -> dict[str, Callable[[], ReleaseRequest]]:
    """One request per check that only that check can refuse."""
    now = int(committee.clock())
    return {
        "manifest": lambda: dataclasses.replace(
            committee.owner_request(), manifest=_without_signatures(signed(committee), 1)
        ),
        "leaf": lambda: committee.owner_request(job_id="a" * 26),
        "window": lambda: committee.owner_request(signed(committee, not_before=now + 9, not_after=now + 99)),
        "key": lambda: committee.owner_request(signed(committee, epoch=7)),
        "ledger": lambda: dataclasses.replace(committee.owner_request(), inclusion=NOWHERE),
        "recipient": lambda: committee.worker_request(committee.evidence(*worker, measurement=b"\1" * 48)),
    }


@pytest.mark.parametrize("check", ["manifest", "leaf", "window", "key", "ledger", "recipient"])
def test_g2_every_custodian_refuses_by_itself_whatever_the_others_answered(
    committee: Committee, worker: tuple[RecipientKey, Identity], check: str
) -> None:
    """G2: nobody's word stands in for evidence. Each custodian judges the bytes; none asks another or the caller."""
    request = _attacks(committee, worker)[check]()
    for name, node in committee.nodes.items():
        with pytest.raises(KeyquorumError) as caught:
            node.gate.release(request)
        assert caught.value.details == caught.value.details | {"check": check, "custodian": name}


@pytest.mark.parametrize("check", ["manifest", "leaf", "window", "key", "recipient"])
def test_g8_a_refusal_says_what_was_expected_and_changes_nothing(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity], check: str
) -> None:
    """G8: fails closed, says which check failed, what it expected and what came, and leaves the state as it was."""
    request = _attacks(committee, worker)[check]()
    before = list(node.keystore._db.iterdump())
    with pytest.raises(RefusedError) as caught:
        node.gate.release(request)
    assert caught.value.details["check"] == check
    assert caught.value.expected
    assert caught.value.actual
    assert list(node.keystore._db.iterdump()) == before
    node.gate.release(committee.owner_request())  # and a good request right after is served


def test_g8_a_release_that_cannot_be_recorded_is_not_answered(committee: Committee, node: Node) -> None:
    """A full disk: no share leaves that this custodian would not remember."""
    request = committee.owner_request()
    (pages,) = node.keystore._db.execute("PRAGMA page_count").fetchone()
    node.keystore._db.execute(f"PRAGMA max_page_count = {pages}")
    times = iter(range(-LEAF_SKEW, LEAF_SKEW))
    try:
        with pytest.raises(UnavailableError) as caught:
            _release_until_refused(committee, node, times)
        assert caught.value.reason is Reason.STORAGE
    finally:
        node.keystore._db.execute("PRAGMA max_page_count = 1000000")
    node.gate.release(request)


def _release_until_refused(committee: Committee, node: Node, times: Iterator[int]) -> None:
    envelope = signed(committee)
    for skew in times:
        node.gate.release(committee.owner_request(envelope, time=int(committee.clock()) + skew))
