"""A restored custodian killed at every write by which it comes back into service: it refuses, or it serves rightly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest

from keyquorum_core.bulletin import sign_bulletin
from keyquorum_core.errors import KeyquorumError, Reason, StateError, UnavailableError
from keyquorum_core.manifest import sign_manifest
from keyquorum_core.revocations import REVOCATIONS
from keyquorum_custodian.node import Node
from keyquorum_protos.v1 import restoration_pb2 as pb
from keyquorum_protos.v1.restoration_pb2_grpc import RestorationStub
from tests.support.ceremonies import Destroy, Make
from tests.support.custodian import Committee, build_committee
from tests.support.mortal import MortalCustodian
from tests.support.restoring import approve, back_up, wreck_and_restore
from tests.support.vendor import bulletin

ME = "ch-1"


@pytest.fixture
def committee(tmp_path: Path) -> Iterator[Committee]:
    """Of which one custodian was restored and approved. Since its backup one epoch was retired, one destroyed, and the
    operators revoked something."""
    built = build_committee(tmp_path)
    built.open_all()
    built.generate("key-1")
    built.generate("key-2")
    backup = back_up(built, ME)
    Make.rotate(built, "key-1").activate()
    Destroy(built, "key-2", 1).approve().erase()
    newer = sign_bulletin(
        bulletin(REVOCATIONS.name, {"lifted": [], "revoked": []}, cluster=built.cluster), [built.operator.identity]
    )
    wreck_and_restore(built, ME, backup)
    for name in built.ids:
        node = built.open(name)
        if name != ME:
            node.withdrawn.accept(newer)
    approve(built.nodes[ME])
    built.nodes.pop(ME).close()
    yield built
    built.close()


async def vouch(committee: Committee, custodian: MortalCustodian) -> pb.VouchResponse:
    """As a coordinator does it."""

    async def through(channel: grpc.aio.Channel) -> pb.VouchResponse:
        stub = RestorationStub(channel)
        asked = await stub.Challenge(pb.ChallengeRequest(), timeout=10, wait_for_ready=True)
        held = {each.kind: each.version for each in asked.documents}
        said = [node.restoration.testify(ME, asked.nonce, held) for node in committee.nodes.values()]
        request = pb.VouchRequest(
            nonce=asked.nonce,
            testimonies=[testimony for testimony, _ in said],
            documents={document: None for _, documents in said for document in documents},
        )
        return await stub.Vouch(request, timeout=10)

    return await custodian.call(through)


def look(committee: Committee, *, proved: bool, document: bool) -> None:
    """What is on the disk, and that nothing is released against it."""
    node = committee.open(ME)
    assert node.standing.restored is not proved
    assert (node.keystore.bulletin(REVOCATIONS.name) is not None) is document
    assert released(committee, node, "key-2") is (Reason.KEY_STATE if proved else Reason.RESTORED)
    assert released(committee, node, "key-1") is (None if proved else Reason.RESTORED)
    states = {(row.key_id, row.state, row.retired_at is not None) for row in node.keystore.epochs()}
    assert states == {("key-1", "retired" if proved else "active", proved), ("key-2", "active", False)}
    assert set(node.standing.withheld) == ({("key-2", 1)} if proved else set())
    if proved:
        with pytest.raises(StateError, match="nothing to prove"):
            node.restoration.challenge()
    committee.nodes.pop(ME).close()


def released(committee: Committee, node: Node, key_id: str) -> Reason | None:
    envelope = sign_manifest(committee.manifest(key_id=key_id), committee.owner.identity)
    request = committee.owner_request(envelope, key_id=key_id)
    try:
        node.gate.release(request)
    except KeyquorumError as error:
        return error.reason
    return None


async def test_a_death_before_or_after_any_of_these_writes(committee: Committee) -> None:
    """The first write accepts a document, and the second leaves the restored state behind, all of it or nothing."""
    custodian = MortalCustodian(committee, ME)
    for number, when, proved, document in (
        (1, "before", False, False),
        (1, "after", False, True),
        (1, "before", False, True),  # the document is there: this is the other write
        (1, "after", True, True),
    ):
        await custodian.start(number, when, "prove")
        with pytest.raises(UnavailableError):
            await vouch(committee, custodian)
        custodian.wait_for_death()
        look(committee, proved=proved, document=document)
