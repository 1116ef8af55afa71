"""Revocations: what a document may say, what may follow it, and that a custodian goes by it alone (G2, G5)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyquorum_core import manifest
from keyquorum_core.bulletin import sign_bulletin
from keyquorum_core.errors import KeyquorumError, Reason, RefusedError, UnavailableError
from keyquorum_core.release import Leaf
from keyquorum_core.revocations import REVOCATIONS, Revocations
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_custodian.gate import ReleaseRequest
from keyquorum_custodian.node import Node
from tests.support.custodian import Committee, build_committee
from tests.support.vendor import MEASUREMENT, bulletin, development_chip

START = 1_800_000_000
SPEC = Path(__file__).parents[2] / "docs/spec/vectors/revocations.json"
VECTORS: list[dict[str, Any]] = json.loads(SPEC.read_text())["vectors"]
HARDWARE = f"sev-snp:{development_chip().chip_id.hex()}"


def entry(target: str, subject: str, reason: str = "stolen") -> dict[str, object]:
    return {"target": target, "subject": subject, "reason": reason, "at": START}


def body(*revoked: dict[str, object], lifted: tuple[dict[str, object], ...] = ()) -> dict[str, object]:
    return {"revoked": list(revoked), "lifted": list(lifted)}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_vector(vector: dict[str, Any]) -> None:
    def act() -> Revocations:
        document = Revocations.read(bulletin("revocations", vector["body"], 2))
        if "previous" in vector:
            REVOCATIONS.follows(Revocations.read(bulletin("revocations", vector["previous"], 1)), document)
        return document

    if vector["expect"] == "ok":
        document = act()
        listed = {(each["target"], each["subject"]) for each in vector["body"]["revoked"]}
        assert set(document.revoked) == listed
    else:
        with pytest.raises(KeyquorumError) as caught:
            act()
        assert caught.value.reason == vector["expect"]


@given(st.sets(st.text("abcdefghij234567", min_size=26, max_size=26), max_size=8), st.data())
def test_nothing_revoked_is_ever_lost_along_a_chain_of_versions(jobs: set[str], data: st.DataObject) -> None:
    previous = Revocations.read(bulletin("revocations", body(*(entry("job", each) for each in sorted(jobs))), 1))
    kept = data.draw(st.sets(st.sampled_from(sorted(jobs)))) if jobs else set()
    lifted = data.draw(st.sets(st.sampled_from(sorted(jobs - kept)))) if jobs - kept else set()
    following = Revocations.read(
        bulletin(
            "revocations",
            body(*(entry("job", each) for each in kept), lifted=tuple(entry("job", each) for each in lifted)),
            2,
        )
    )
    if kept | lifted == jobs:
        REVOCATIONS.follows(previous, following)
    else:
        with pytest.raises(RefusedError) as caught:
            REVOCATIONS.follows(previous, following)
        assert caught.value.reason is Reason.ROLLBACK


class Clock:
    now: float = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def committee(tmp_path: Path, clock: Clock) -> Iterator[Committee]:
    built = build_committee(tmp_path, clock=clock)
    built.open_all()
    built.generate()
    yield built
    built.close()


@pytest.fixture
def node(committee: Committee) -> Node:
    return committee.nodes["ch-1"]


class Worker:
    """With its keys and a job, asking ``ch-1`` for it."""

    def __init__(self, committee: Committee) -> None:
        self.committee = committee
        self.recipient, self.identity = RecipientKey.generate(), Identity.generate()
        self.envelope = manifest.sign_manifest(committee.manifest(), committee.owner.identity)

    def request(self) -> ReleaseRequest:
        return self.committee.worker_request(self.committee.evidence(self.recipient, self.identity), self.envelope)


@pytest.fixture
def worker(committee: Committee) -> Worker:
    return Worker(committee)


def put(committee: Committee, version: int, document: dict[str, object], *, lifetime: int = 10**9) -> None:
    """As the operator drops it into the folder of ``ch-1``: no coordinator has a hand in it."""
    made = dataclasses.replace(bulletin("revocations", document, version), expires_at=START + lifetime)
    target = committee.directory("ch-1") / "bulletins" / "revocations.json"
    partial = target.with_suffix(".partial")
    partial.write_bytes(sign_bulletin(made, [committee.operator.identity]))
    partial.replace(target)


def refused(node: Node, request: ReleaseRequest, check: str) -> KeyquorumError:
    with pytest.raises(KeyquorumError) as caught:
        node.gate.release(request)
    assert caught.value.details["check"] == check
    return caught.value


def subject_of(target: str, committee: Committee, node: Node, leaf: Leaf) -> str:
    return {
        "job": leaf.job_id,
        "owner": committee.owner.identity.public.fingerprint,
        "worker": leaf.recipient_sha256,
        "hardware": HARDWARE,
        "measurement": f"sev-snp:{MEASUREMENT.hex()}",
        "policy": node.bulletins.digest("policy"),
        "roster": committee.roster.digest,
    }[target]


@pytest.mark.parametrize(
    ("target", "check"),
    [
        ("job", "revocation"),
        ("owner", "revocation"),
        ("roster", "revocation"),
        ("worker", "recipient"),
        ("hardware", "recipient"),
        ("measurement", "recipient"),
        ("policy", "policy"),
    ],
)
def test_what_the_operators_revoked_gets_nothing_from_the_next_request_on_until_it_is_lifted(
    committee: Committee, node: Node, worker: Worker, target: str, check: str
) -> None:
    request = worker.request()
    node.gate.release(request)
    subject = subject_of(target, committee, node, Leaf.parse(request.leaf))
    put(committee, 1, body(entry(target, subject, "seen elsewhere")))
    error = refused(node, worker.request(), check)
    if error.reason is not Reason.LEASE:  # the lease that it had was ended first
        assert (error.reason, error.details["revocations_version"]) == (Reason.REVOKED, "1")
        assert subject in error.actual
        assert "seen elsewhere" in error.message
    else:
        assert error.actual == Reason.REVOKED
    other = Worker(committee)  # whoever did not ask before is told the same, with no lease in between
    if target not in ("job", "worker"):
        assert refused(node, other.request(), check).reason is Reason.REVOKED
    put(committee, 2, body(lifted=(entry(target, subject, "a mistake"),)))
    node.gate.release(other.request())


def test_leases_of_what_was_revoked_end_without_a_request(committee: Committee, node: Node, worker: Worker) -> None:
    node.gate.release(worker.request())
    assert node.leases.count(START) == 1
    put(committee, 1, body(entry("hardware", HARDWARE)))
    node.withdrawn.current()
    (lease,) = node.leases.all(START)
    assert lease.revoked == Reason.REVOKED


def test_an_owner_gets_nothing_either(committee: Committee, node: Node) -> None:
    put(committee, 1, body(entry("owner", committee.owner.identity.public.fingerprint)))
    assert refused(node, committee.owner_request(), "revocation").reason is Reason.REVOKED


def test_what_a_later_version_leaves_out_stays_revoked(committee: Committee, node: Node, worker: Worker) -> None:
    put(committee, 1, body(entry("hardware", HARDWARE)))
    refused(node, worker.request(), "recipient")
    put(committee, 2, body())
    assert refused(node, worker.request(), "recipient").reason is Reason.REVOKED
    assert any("ROLLBACK" in warning for warning in node.warnings())


def test_a_removed_file_and_a_restart_leave_it_revoked(committee: Committee, node: Node, worker: Worker) -> None:
    put(committee, 1, body(entry("hardware", HARDWARE)))
    refused(node, worker.request(), "recipient")
    (committee.directory("ch-1") / "bulletins" / "revocations.json").unlink()
    committee.close()
    again = committee.open("ch-1")
    assert refused(again, worker.request(), "recipient").reason is Reason.REVOKED


def test_an_expired_document_stops_every_release(
    committee: Committee, node: Node, clock: Clock, worker: Worker
) -> None:
    put(committee, 1, body(entry("job", "a" * 26)), lifetime=60)
    node.gate.release(worker.request())
    clock.now += 60
    assert refused(node, worker.request(), "revocation").reason is Reason.EXPIRED
    assert any("revocations expired" in warning for warning in node.warnings())


def test_effects_cut_short_by_a_full_disk_are_made_up_for_before_anything_is_released(
    committee: Committee, node: Node, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.gate.release(worker.request())
    put(committee, 1, body(entry("hardware", HARDWARE)))
    node.bulletins.refresh()  # accepted, and on the disk; now its effects fail

    def full(*arguments: object, **named: object) -> None:
        raise UnavailableError(Reason.STORAGE, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(node.leases, "revoke", full)
        assert refused(node, committee.owner_request(), "revocation").reason is Reason.STORAGE
    committee.close()  # and the process with them
    again = committee.open("ch-1")
    again.withdrawn.current()
    (lease,) = again.leases.all(START)
    assert lease.revoked == Reason.REVOKED


def test_who_is_no_operator_revokes_nothing(tmp_path: Path, clock: Clock) -> None:
    built = build_committee(tmp_path, clock=clock)
    made = bulletin("revocations", body(entry("hardware", HARDWARE)))
    stranger = Identity.generate()
    (built.directory("ch-1") / "bulletins" / "revocations.json").write_bytes(sign_bulletin(made, [stranger]))
    built.open_all()
    built.generate()
    node = built.nodes["ch-1"]
    node.gate.release(built.owner_request())
    assert any("revocations at hand is refused" in warning for warning in node.warnings())
    built.close()
