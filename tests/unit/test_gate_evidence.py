"""The release gate on evidence: what a worker hands in, each time right in everything but one point."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.release import Leaf
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_custodian.gate import ReleaseRequest
from keyquorum_custodian.node import Node
from tests.support.custodian import Committee, build_committee
from tests.support.gate import Clock, evidence_refused, gates, refused, signed
from tests.support.vendor import (
    CREATED_AT,
    development_vendor,
    reference_json,
)


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


def test_stale_evidence_is_refused(
    committee: Committee, node: Node, clock: Clock, worker: tuple[RecipientKey, Identity]
) -> None:
    evidence = committee.evidence(*worker)
    clock.now += 60
    evidence_refused(committee, node, evidence, Reason.STALE)


def test_evidence_of_the_window_before_is_still_fresh(
    committee: Committee, node: Node, clock: Clock, worker: tuple[RecipientKey, Identity]
) -> None:
    evidence = committee.evidence(*worker)
    clock.now += 30
    node.gate.release(committee.worker_request(evidence))


def test_evidence_appraised_once_is_good_until_it_is_too_old(
    committee: Committee, node: Node, clock: Clock, worker: tuple[RecipientKey, Identity]
) -> None:
    evidence = committee.evidence(*worker)
    node.gate.release(committee.worker_request(evidence))
    clock.now += 500
    node.gate.release(committee.worker_request(evidence))
    clock.now += 500
    evidence_refused(committee, node, evidence, Reason.STALE)


def test_an_appraisal_survives_a_restart_and_nothing_else_does(
    committee: Committee, clock: Clock, worker: tuple[RecipientKey, Identity]
) -> None:
    appraised, fresh = committee.evidence(*worker), committee.evidence(worker[0], Identity.generate())
    node = committee.nodes["ch-1"]
    node.gate.release(committee.worker_request(appraised))
    node.gate.flush()
    committee.nodes.pop("ch-1").close()
    node = committee.open("ch-1")
    node.gate.release(committee.worker_request(appraised))
    evidence_refused(committee, node, fresh, Reason.STALE)  # its nonce was of the process that ended


def test_appraisals_that_cannot_be_saved_do_not_pile_up(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyquorum_custodian.appraisals._CAPACITY", 2)
    made = [committee.evidence(worker[0], Identity.generate()) for _ in range(4)]
    for evidence in made:
        node.gate.release(committee.worker_request(evidence))
    kept = node.gate._appraisals._unsaved
    assert list(kept) == [hashlib.sha256(evidence).digest() for evidence in made[-2:]]


def test_evidence_replayed_with_another_key_is_refused(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]
) -> None:
    document = json.loads(committee.evidence(*worker))
    document["hpke_key"] = base64.b64encode(RecipientKey.generate().public).decode()
    replayed = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    evidence_refused(committee, node, replayed, Reason.BINDING)


def test_debug_evidence_is_refused(committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]) -> None:
    evidence = committee.evidence(*worker, policy=0x30000 | 1 << 19)
    evidence_refused(committee, node, evidence, Reason.DEBUG_ENABLED)


def test_an_unlisted_measurement_is_refused(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]
) -> None:
    error = evidence_refused(committee, node, committee.evidence(*worker, measurement=b"\x42" * 48), Reason.MEASUREMENT)
    assert error.actual == "42" * 48


def test_evidence_for_another_challenge_is_refused(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]
) -> None:
    """The list of nonces is swapped for a current one after the hardware signed: the binding no longer fits."""
    old, current = (json.loads(committee.evidence(*worker, nodes=nodes)) for nodes in (["ch-1"], ["ch-1", "is-1"]))
    old["nonces"] = current["nonces"]
    swapped = json.dumps(old, sort_keys=True, separators=(",", ":")).encode()
    evidence_refused(committee, node, swapped, Reason.BINDING)


def test_evidence_without_this_custodian_s_nonce_is_refused(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]
) -> None:
    evidence_refused(committee, node, committee.evidence(*worker, nodes=["is-1", "no-1"]), Reason.STALE)


def test_truncated_evidence_is_refused(committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]) -> None:
    whole = committee.evidence(*worker)
    request = committee.worker_request(whole)
    for size in (1, len(whole) // 2, len(whole) - 1):
        cut = whole[:size]
        leaf = dataclasses.replace(Leaf.parse(request.leaf), evidence_sha256=hashlib.sha256(cut).hexdigest())
        broken = committee.logged(ReleaseRequest(request.manifest, cut, leaf.to_bytes()))
        assert isinstance(refused(node, broken, "recipient", Reason.MALFORMED), MalformedError)


def test_evidence_of_a_chip_outside_the_inventory_is_refused(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]
) -> None:
    stranger = development_vendor().chip(now=CREATED_AT)
    evidence_refused(committee, node, committee.evidence(*worker, chip=stranger), Reason.PROVENANCE)


def test_a_region_that_the_manifest_does_not_allow_is_refused(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]
) -> None:
    """The region comes from the inventory, by the chip that signed; and an appraisal already made does not help."""
    evidence = committee.evidence(*worker)
    node.gate.release(committee.worker_request(evidence))
    error = evidence_refused(committee, node, evidence, Reason.REGION, signed(committee, regions=("NO", "IS")))
    assert (error.expected, error.actual) == ("IS, NO", "CH")


def test_evidence_of_a_type_that_the_manifest_requires_must_be_there(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]
) -> None:
    evidence = committee.evidence(*worker)
    node.gate.release(committee.worker_request(evidence))
    envelope = signed(committee, evidence_types=("nvidia-gpu", "sev-snp"))
    evidence_refused(committee, node, evidence, Reason.EVIDENCE_TYPE, envelope)


def test_a_custodian_that_does_not_name_the_development_root_refuses_its_evidence(
    tmp_path: Path, worker: tuple[RecipientKey, Identity]
) -> None:
    reference = reference_json()
    reference["sev-snp"]["roots"] = ["9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9"]
    reference["sev-snp"]["development_roots"] = []
    committee = build_committee(tmp_path, reference=reference)
    committee.open_all()
    committee.generate()
    node = committee.nodes["ch-1"]
    assert not any("DEVELOPMENT" in warning for warning in node.warnings())
    evidence_refused(committee, node, committee.evidence(*worker), Reason.ROOT_NOT_PINNED)
    committee.close()


def test_an_owner_s_leaf_with_a_worker_s_evidence_is_refused(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]
) -> None:
    owner = committee.owner_request()
    request = dataclasses.replace(owner, evidence=committee.evidence(*worker))
    refused(node, request, "leaf", Reason.LEAF)


def test_a_leaf_that_is_wrong_about_development_hardware_is_refused(
    committee: Committee, node: Node, worker: tuple[RecipientKey, Identity]
) -> None:
    """DESIGN §7: every leaf of development hardware is marked, and no other."""
    unmarked = committee.worker_request(committee.evidence(*worker), development=False)
    refused(node, unmarked, "recipient", Reason.LEAF)
    refused(node, committee.owner_request(development=True), "recipient", Reason.LEAF)
