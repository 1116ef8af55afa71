"""G1, from the coordinator's chair: everything that honest custodians ever say, before TLS hides it.

Whoever owns the coordinator sees all of this in the clear. The whole ceremony and the releases to an owner and to a
worker are run, every byte that leaves a custodian is kept, and the secrets are looked for in it.
"""

from __future__ import annotations

import base64
from pathlib import Path

from keyquorum_core import derivation, manifest
from keyquorum_core.derivation import Combiner
from keyquorum_core.release import Leaf, open_share
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from tests.support.ceremonies import Make
from tests.support.custodian import build_committee

CUSTODIANS = [("ch-1", "CH"), ("de-1", "DE"), ("is-1", "IS")]


def test_g1_nothing_a_custodian_says_holds_a_seed_a_part_a_contribution_or_a_key(tmp_path: Path) -> None:
    """G1: every share is sealed by its custodian to the recipient's key."""
    committee = build_committee(tmp_path, CUSTODIANS, {"at_least": 2})
    said: list[bytes] = []
    try:
        make = Make(committee, committee.plan("key-1"))
        make.activate()
        nodes = committee.nodes
        for proposal in make.proposals.values():
            said += [proposal.header, *(part.sealed for part in proposal.parts)]
        said += [*make.commitments.values(), *make.signed.values()]

        envelope = manifest.sign_manifest(committee.manifest(), committee.owner.identity)
        worker, signer = RecipientKey.generate(), Identity.generate()
        requests = {
            "owner": (committee.owner_request(envelope), committee.owner.recipient),
            "worker": (committee.worker_request(committee.evidence(worker, signer), envelope), worker),
        }
        roots = set()
        secrets: dict[str, bytes] = {}
        _, payload = manifest.open_manifest(envelope, committee.owner.identity.public)
        context = derivation.context("key-1", 1, "job", manifest.subject(payload))
        quorum = committee.roster.quorum_of()
        for who, (request, recipient) in requests.items():
            combiner = Combiner(quorum, context)
            for name, node in nodes.items():
                answer = node.gate.release(request)
                said += [answer.sealed, answer.signature, node.windows.current().statement]
                opened = open_share(answer, recipient, Leaf.parse(request.leaf).hash(), quorum).contributions
                secrets |= {f"contribution {index}": value for index, value in opened.items()}
                combiner.add(name, opened)
            key = combiner.conclude().key
            roots.add(key.root)
            secrets[f"root at the {who}"] = key.root
            secrets |= {f"{name} key": key.purpose_key(name) for name in ("bundle", "result", "telemetry")}
        assert len(roots) == 1  # both recipients hold the same key: what was searched for is the real thing
        for name, node in nodes.items():
            for row in node.keystore.epochs():
                seeds = node.keystore.seeds(row)
                secrets |= {f"seed {index} of {name}": seed for index, seed in seeds.items()}
    finally:
        committee.close()

    assert len(secrets) > 3 + 3 + 3
    everything = b"\n".join(said)
    assert everything.count(b"\n") > 20
    for name, value in secrets.items():
        for spelled in (value, value.hex().encode(), base64.b64encode(value)[:42]):
            assert spelled not in everything, name
