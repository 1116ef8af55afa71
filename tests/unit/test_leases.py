"""Leases and quarantine at a custodian: renewals continue what was appraised, a failed one shuts a worker out (G5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core import manifest
from keyquorum_core.attestation.evidence import EvidenceDocument
from keyquorum_core.errors import KeyquorumError, Reason, StateError, UnavailableError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.presentation import sign_presentation
from keyquorum_core.release import Leaf, LeaseTerms, open_share
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_custodian.gate import ReleaseRequest
from keyquorum_custodian.node import Node
from keyquorum_custodian.quarantine import Quarantine, worker_subject
from tests.support.custodian import Committee, build_committee
from tests.support.vendor import CREATED_AT, development_chip, development_vendor, inventory_json

START = 1_800_000_000
LEASE, REATTEST = 300, 120
CHIPS = (development_chip(), development_vendor().chip(now=CREATED_AT))
"""Of two machines that the inventory knows."""
MACHINES = {
    "machines": [
        inventory_json(CHIPS[0])["machines"][0],
        {**inventory_json(CHIPS[1])["machines"][0], "name": "zrh-2"},
    ]
}


class Clock:
    now: float = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def committee(tmp_path: Path, clock: Clock) -> Iterator[Committee]:
    built = build_committee(tmp_path, clock=clock, inventory=MACHINES)
    built.open_all()
    built.generate(policy=KeyPolicy(lease_seconds=LEASE, reattest_seconds=REATTEST))
    yield built
    built.close()


class Holder:
    """A worker with its keys, and the manifest of the job that it does."""

    def __init__(self, committee: Committee) -> None:
        self.committee = committee
        self.recipient, self.identity = RecipientKey.generate(), Identity.generate()
        self.envelope = manifest.sign_manifest(committee.manifest(), committee.owner.identity)

    def request(self, **evidence: Any) -> ReleaseRequest:
        evidence.setdefault("chip", CHIPS[0])
        document = self.committee.evidence(self.recipient, self.identity, **evidence)
        return self.committee.worker_request(document, self.envelope, self.identity)

    def refused(
        self, node: Node, reason: Reason, request: ReleaseRequest | None = None, **evidence: Any
    ) -> KeyquorumError:
        with pytest.raises(KeyquorumError) as caught:
            node.gate.release(request or self.request(**evidence))
        assert (caught.value.reason, caught.value.details["check"]) == (reason, "recipient")
        return caught.value


@pytest.fixture
def holder(committee: Committee) -> Holder:
    return Holder(committee)


@pytest.fixture
def node(committee: Committee) -> Node:
    return committee.nodes["ch-1"]


def test_g5_a_share_carries_the_lease_of_the_key_s_policy(committee: Committee, holder: Holder, node: Node) -> None:
    request = holder.request()
    leaf = Leaf.parse(request.leaf)
    share = open_share(node.gate.release(request), holder.recipient, leaf.hash(), committee.quorum)
    assert share.lease == LeaseTerms(LEASE, REATTEST)
    (lease,) = node.leases.all(START)
    assert (lease.job_id, lease.recipient_sha256, lease.until) == (leaf.job_id, leaf.recipient_sha256, START + LEASE)
    assert node.leases.all(START + LEASE) == ()


def test_a_renewal_on_new_evidence_for_the_same_keys_makes_the_lease_longer(
    holder: Holder, node: Node, clock: Clock
) -> None:
    for _ in range(4):
        node.gate.release(holder.request())
        clock.now += 100
    (lease,) = node.leases.all(int(clock.now))
    assert (lease.granted_at, lease.renewals, lease.until) == (START, 3, START + 300 + LEASE)
    assert node.quarantine.entries() == ()


def test_leases_survive_a_restart_and_what_must_be_continued_with_them(
    committee: Committee, holder: Holder, node: Node
) -> None:
    node.gate.release(holder.request())
    committee.nodes.pop("ch-1").close()
    node = committee.open("ch-1")
    holder.refused(node, Reason.PROVENANCE, chip=CHIPS[1])


def test_replayed_evidence_renews_nothing(committee: Committee, holder: Holder, node: Node, clock: Clock) -> None:
    first = holder.request()
    node.gate.release(first)
    clock.now += 60
    node.gate.release(committee.worker_request(first.evidence, holder.envelope))  # an answer may have got lost
    (lease,) = node.leases.all(int(clock.now))
    assert lease.until <= START + 60 + LEASE
    clock.now += REATTEST + 30
    again = committee.worker_request(first.evidence, holder.envelope)
    assert "new evidence" in holder.refused(node, Reason.STALE, again).message
    assert node.quarantine.entries() == ()  # it proves nothing against the worker: anybody could have kept it


def test_evidence_older_than_what_the_lease_was_renewed_on_renews_nothing(
    committee: Committee, holder: Holder, node: Node, clock: Clock
) -> None:
    """The coordinator keeps evidence back, and shows it after the evidence that came later."""
    node.gate.release(holder.request())
    clock.now += 30
    kept = holder.request()
    node.gate.release(kept)
    clock.now += 60
    node.gate.release(holder.request())
    again = committee.worker_request(kept.evidence, holder.envelope)
    holder.refused(node, Reason.STALE, again)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        (Reason.DEBUG_ENABLED, {"policy": 0x30000 | 1 << 19}),
        (Reason.MEASUREMENT, {"measurement": b"\x66" * 48}),
        (Reason.PROVENANCE, {"chip": CHIPS[1]}),
    ],
)
def test_a_failed_renewal_quarantines_the_worker_at_every_custodian(
    committee: Committee, holder: Holder, clock: Clock, reason: Reason, change: dict[str, Any]
) -> None:
    first, other = holder.request(), Holder(committee)
    for node in committee.nodes.values():
        node.gate.release(first)
        node.gate.release(other.request())
    clock.now += 100
    bad, good = holder.request(**change), holder.request()
    for node in committee.nodes.values():
        error = holder.refused(node, reason, bad)
        assert error.details["quarantine"] == "1"
        (entry,) = node.quarantine.entries()
        assert entry.reason == reason
        assert worker_subject(Leaf.parse(first.leaf).recipient_sha256) in entry.subjects
        assert f"sev-snp:{CHIPS[0].chip_id.hex()}" in entry.subjects
        assert node.quarantine.evidence(entry.number) == bad.evidence
        assert any("QUARANTINED" in warning for warning in node.warnings())
        # Good evidence does not help any more, not of this worker, nor of another on the same hardware.
        holder.refused(node, Reason.QUARANTINED, good)
        other.refused(node, Reason.LEASE)
        Holder(committee).refused(node, Reason.QUARANTINED)
        assert node.leases.count(int(clock.now)) == 0


@pytest.mark.parametrize("at", [0x90, 0x2A0])
def test_evidence_that_no_hardware_signed_blames_nobody(holder: Holder, node: Node, clock: Clock, at: int) -> None:
    """Somebody in between changes the measurement, or the signature, to have the worker shut out."""
    node.gate.release(holder.request())
    clock.now += 100
    document = EvidenceDocument.parse(holder.request().evidence)
    (item,) = document.items
    spoilt = item.evidence[:at] + bytes([item.evidence[at] ^ 1]) + item.evidence[at + 1 :]
    forged = dataclasses.replace(document, items=(dataclasses.replace(item, evidence=spoilt),)).to_bytes()
    holder.refused(node, Reason.SIGNATURE, holder.committee.worker_request(forged, holder.envelope))
    assert node.quarantine.entries() == ()
    node.gate.release(holder.request())


@pytest.mark.parametrize("signer", ["nobody", "the other machine", "the worker, for other evidence", "for another job"])
def test_g5_genuine_evidence_in_a_worker_s_name_that_it_did_not_hand_in_blames_nobody(
    holder: Holder, node: Node, clock: Clock, signer: str
) -> None:
    """The coordinator has hardware of its own bind its evidence to the worker's keys, which are public."""
    node.gate.release(holder.request())
    clock.now += 100
    framed = holder.request(policy=0x30000 | 1 << 19, chip=CHIPS[1])
    leaf = Leaf.parse(framed.leaf)
    presentation = {
        "nobody": b"",
        "the other machine": sign_presentation(Identity.generate(), leaf.job_id, leaf.evidence_sha256),
        "the worker, for other evidence": sign_presentation(holder.identity, leaf.job_id, "0" * 64),
        "for another job": sign_presentation(holder.identity, "a" * 26, leaf.evidence_sha256),
    }[signer]
    error = holder.refused(node, Reason.DEBUG_ENABLED, dataclasses.replace(framed, presentation=presentation))
    assert error.details["presentation"] in (Reason.MALFORMED, Reason.SIGNATURE, Reason.WRONG_JOB)
    assert "quarantine" not in error.details
    assert node.quarantine.entries() == ()
    node.gate.release(holder.request())
    # The same evidence, handed in by the worker itself, is what shuts it out.
    assert holder.refused(node, Reason.DEBUG_ENABLED, framed).details["quarantine"] == "1"


def test_a_worker_without_a_lease_is_refused_and_not_quarantined(holder: Holder, node: Node) -> None:
    holder.refused(node, Reason.MEASUREMENT, measurement=b"\x66" * 48)
    assert node.quarantine.entries() == ()
    node.gate.release(holder.request())


def test_quarantine_survives_a_restart_and_ends_with_an_operator_s_reason(
    committee: Committee, holder: Holder, node: Node, clock: Clock
) -> None:
    node.gate.release(holder.request())
    clock.now += 100
    holder.refused(node, Reason.MEASUREMENT, measurement=b"\x66" * 48)
    committee.nodes.pop("ch-1").close()
    node = committee.open("ch-1")
    assert node.quarantine.in_force == 1
    holder.refused(node, Reason.QUARANTINED)
    for number, why, reason in ((1, " ", Reason.MALFORMED), (2, "looked at it", Reason.NOT_FOUND)):
        with pytest.raises(KeyquorumError) as caught:
            node.quarantine.lift(number, why, int(clock.now))
        assert caught.value.reason is reason
    node.quarantine.lift(1, "the image was rolled out late", int(clock.now))
    (entry,) = node.quarantine.entries()
    assert (entry.why, entry.lifted_at) == ("the image was rolled out late", int(clock.now))
    assert node.quarantine.evidence(1)
    holder.refused(node, Reason.LEASE)  # its old lease stays revoked
    node.gate.release(Holder(committee).request())


def test_the_quarantine_holds_in_memory_when_the_disk_is_full(
    holder: Holder, node: Node, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.gate.release(holder.request())
    clock.now += 100
    bad, good = holder.request(measurement=b"\x66" * 48), holder.request()

    def full(_: object) -> None:
        raise UnavailableError(Reason.STORAGE, "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(type(node.keystore), "_commit", full)
        holder.refused(node, Reason.STORAGE, bad)
    holder.refused(node, Reason.QUARANTINED, good)
    assert node.quarantine.entries() == ()


def test_revoking_a_job_s_leases_leaves_others(committee: Committee, holder: Holder, node: Node) -> None:
    other = Holder(committee)
    for each in (holder, other):
        node.gate.release(each.request())
    job = manifest.job_id(manifest.open_manifest(holder.envelope, committee.owner.identity.public)[1])
    (gone,) = node.leases.revoke(Reason.REVOKED, job_id=job)
    assert gone.job_id == job
    assert node.leases.revoke(Reason.REVOKED, job_id=job) == ()
    holder.refused(node, Reason.LEASE)
    node.gate.release(other.request())
    assert len(node.leases.revoke(Reason.REVOKED, key_id="key-1")) == 1


def test_evidence_that_is_not_kept_cannot_be_read(node: Node) -> None:
    quarantine = Quarantine(node.keystore)
    entry = quarantine.put(reason=Reason.REVOKED, message="by the operators", now=START, workers=["11" * 32])
    assert entry.evidence_sha256 == ""
    with pytest.raises(StateError) as caught:
        quarantine.evidence(entry.number)
    assert caught.value.reason is Reason.NOT_FOUND
