"""Who would have a custodian release what its own policy denies: by an older bundle, another's, or a mere claim.

Each attack is a class: it hands a running custodian something, as a file or through its operator's listener. The same
request must be denied before and after, by the policy in force, and nothing recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from keyquorum_core.bulletin import Bulletin, sign_bulletin
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.signing import Identity
from keyquorum_custodian.gate import ReleaseRequest
from keyquorum_custodian.node import Node, open_node
from tests.support import policies
from tests.support.custodian import PASSPHRASE, Committee, build_committee

STRICT = '@id("strict") forbid(principal, action == Action::"release", resource);\n'
VERSION = 5


@dataclass
class Target:
    committee: Committee
    node: Node

    @property
    def file(self) -> Path:
        return self.node.config.path(self.node.config.bulletins) / "policy.json"

    def bundle(self, **changes: object) -> bytes:
        """A lenient one, signed by whom the custodian trusts, unless ``changes`` say otherwise."""
        members: dict[str, object] = {
            "signers": [self.committee.operator.identity],
            "custodians": ["ch-1"],
            "version": VERSION + 1,
            **changes,
        }
        return policies.bundle(**members)  # type: ignore[arg-type]

    def request(self) -> ReleaseRequest:
        return self.committee.owner_request()

    def denies(self, request: ReleaseRequest | None = None) -> None:
        before = self.node.keystore.release_count()
        with pytest.raises(KeyquorumError) as caught:
            self.node.gate.release(request or self.request())
        assert caught.value.details["check"] == "policy"
        assert caught.value.details["policies"] == "strict"
        assert caught.value.details["policy_version"] == str(VERSION)
        assert self.node.keystore.release_count() == before


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    committee = build_committee(tmp_path_factory.mktemp("hostile-policies"))
    committee.open_all()
    committee.generate()
    found = Target(committee, committee.nodes["ch-1"])
    found.node.bulletins.accept(found.bundle(version=VERSION, text=policies.ALLOW_ALL + STRICT))
    yield found
    committee.close()


class RollsBack:
    """An older bundle, genuinely signed at its time."""

    reason = Reason.ROLLBACK

    def forge(self, target: Target) -> bytes:
        return target.bundle(version=VERSION - 1)


class SameVersionOtherContent(RollsBack):
    """Two bundles of one version: which one is in force must not depend on which came last."""

    def forge(self, target: Target) -> bytes:
        return target.bundle(version=VERSION)


class AnothersBundle:
    """A newer bundle that the same signers made for a more lenient custodian."""

    reason = Reason.POLICY

    def forge(self, target: Target) -> bytes:
        return target.bundle(custodians=["is-1", "no-1"])


class TheCoordinatorsBundle(AnothersBundle):
    """The coordinator's own seat, which only decides what it takes in."""

    def forge(self, target: Target) -> bytes:
        return target.bundle(custodians=[])


class AnotherClusters:
    reason = Reason.BULLETIN

    def forge(self, target: Target) -> bytes:
        return target.bundle(cluster="other")


class SignedByNobodyItTrusts:
    reason = Reason.SIGNATURE

    def forge(self, target: Target) -> bytes:
        return target.bundle(signers=[Identity.generate()])


class AltersWhatWasSigned(SignedByNobodyItTrusts):
    def forge(self, target: Target) -> bytes:
        good = json.loads(target.bundle())
        other = json.loads(target.bundle(text=policies.ALLOW_ALL + "// more\n"))
        return json.dumps({**good, "payload": other["payload"]}).encode()


class AnotherKindOfDocument:
    """A list, under the name of the policy's file."""

    reason = Reason.BULLETIN

    def forge(self, target: Target) -> bytes:
        now = int(target.committee.clock())
        bulletin = Bulletin("demo", "export-list", VERSION + 1, now - 5, now + 500, {"entries": []})
        return sign_bulletin(bulletin, [target.committee.operator.identity])


class OverflowsTheParser:
    """Signed, and deep enough to overflow the stack of Cedar's parser."""

    reason = Reason.TOO_LARGE

    def forge(self, target: Target) -> bytes:
        deep = "(" * 20_000 + "true" + ")" * 20_000
        text = f'@id("deep") permit(principal, action, resource) when {{ {deep} }};'
        body = {"custodians": ["ch-1"], "policies": {"deep.cedar": text}, "seat": "custodian"}
        now = int(target.committee.clock())
        return sign_bulletin(
            Bulletin("demo", "policy", VERSION + 1, now - 5, now + 500, body), [target.committee.operator.identity]
        )


ATTACKS = [
    RollsBack(),
    SameVersionOtherContent(),
    AnothersBundle(),
    TheCoordinatorsBundle(),
    AnotherClusters(),
    SignedByNobodyItTrusts(),
    AltersWhatWasSigned(),
    AnotherKindOfDocument(),
    OverflowsTheParser(),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_a_hostile_bundle_changes_nothing(target: Target, attack: RollsBack) -> None:
    target.denies()
    forged = attack.forge(target)
    target.file.write_bytes(forged)
    target.denies()
    assert any(str(attack.reason) in warning for warning in target.node.warnings())
    if not isinstance(attack, AnotherKindOfDocument):  # a list it would take, as a list
        with pytest.raises(KeyquorumError) as caught:
            target.node.bulletins.accept(forged)
        assert caught.value.reason is attack.reason
    target.denies()


def test_an_older_bundle_does_not_come_back_with_a_restart(target: Target) -> None:
    target.file.write_bytes(target.bundle(version=1))
    target.node.close()
    del target.committee.nodes["ch-1"]
    target.node = target.committee.nodes["ch-1"] = open_node(
        target.committee.directory("ch-1"), PASSPHRASE, clock=target.committee.clock
    )
    target.denies()


def test_a_coordinator_that_claims_a_permit_is_not_heard(target: Target) -> None:
    """There is no place in a request for anybody's verdict; one that is written into the leaf makes it no leaf."""
    request = target.request()
    target.denies(request)
    leaf = {**json.loads(request.leaf), "policy": "permit", "decision_sha256": "ab" * 32}
    claimed = json.dumps(leaf, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(KeyquorumError) as caught:
        target.node.gate.release(ReleaseRequest(request.manifest, b"", claimed))
    assert caught.value.details["check"] == "leaf"
    target.denies()
