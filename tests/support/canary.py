"""A committee with a real key and a canary, an owner for each, and what a drill's coordinator would do to them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyquorum_core import derivation
from keyquorum_core import manifest as manifests
from keyquorum_core.derivation import Combiner
from keyquorum_core.errors import KeyquorumError
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.keywrap import LoadedKeys
from keyquorum_core.release import Leaf, open_share
from keyquorum_custodian.gate import ReleaseRequest
from keyquorum_custodian.trust import add_owner
from tests.support.custodian import Committee, build_committee, save_keys
from tests.support.gate import Clock

FIVE = (("ch-1", "CH"), ("ch-2", "CH"), ("is-1", "IS"), ("jp-1", "JP"), ("no-1", "NO"))
CANARY, REAL = "canary", "canary-not"
DRILL = "0d" * 16


@dataclass
class CanaryScene:
    """``drill`` is the owner for drills; its name is known with ``--canary`` everywhere."""

    committee: Committee
    clock: Any
    drill: LoadedKeys

    @classmethod
    def build(cls, folder: Path, *, real_time: bool = False) -> CanaryScene:
        clock: Callable[[], float] = time.time if real_time else Clock()
        committee = build_committee(folder, FIVE, {"at_least": 3}, clock=clock)
        drill = save_keys(folder, "drill", "owner")
        for name in committee.ids:
            public = (folder / "drill.pub.json").read_bytes()
            add_owner(committee.directory(name) / "owners", public, canary=True)
        committee.open_all()
        committee.generate(REAL)
        committee.generate(CANARY, policy=KeyPolicy(canary=True))
        return cls(committee, clock, drill)

    def request(self, key_id: str = CANARY, owner: LoadedKeys | None = None, epoch: int = 1) -> ReleaseRequest:
        """The owner asks for a new job's key; by default the one whom the key is for."""
        asks = owner or (self.drill if key_id == CANARY else self.committee.owner)
        signed = self.committee.manifest(
            key_id,
            epoch,
            owner=asks.name,
            owner_identity=asks.identity.public,
            owner_hpke=asks.recipient.public,
        )
        payload = manifests.payload(signed)
        leaf = Leaf(
            job_id=manifests.job_id(payload),
            manifest_sha256=manifests.subject(payload).hex(),
            recipient="owner",
            recipient_sha256=hashlib.sha256(asks.recipient.public).hexdigest(),
            evidence_sha256=Leaf.NO_EVIDENCE,
            key_id=key_id,
            epoch=epoch,
            time=int(self.clock()),
            development=False,
        )
        envelope = manifests.sign_manifest(signed, asks.identity)
        return self.committee.logged(ReleaseRequest(envelope, b"", leaf.to_bytes()))

    def release(
        self, request: ReleaseRequest, key_id: str = CANARY, epoch: int = 1
    ) -> tuple[derivation.Combination, dict[str, KeyquorumError]]:
        """What the owner combines from everybody's answers, and who refused."""
        asks = self.drill if key_id == CANARY else self.committee.owner
        leaf = Leaf.parse(request.leaf)
        payload = manifests.open_manifest(request.manifest, asks.identity.public)[1]
        combiner = Combiner(self.committee.quorum, derivation.context(key_id, epoch, "job", manifests.subject(payload)))
        refusals: dict[str, KeyquorumError] = {}
        for name, node in self.committee.nodes.items():
            try:
                answer = node.gate.release(request)
            except KeyquorumError as error:
                refusals[name] = error
            else:
                opened = open_share(answer, asks.recipient, leaf.hash(), self.committee.quorum)
                combiner.add(name, opened.contributions)
        return combiner.conclude(require_confirmed=False), refusals
