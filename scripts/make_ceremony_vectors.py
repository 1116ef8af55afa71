#!/usr/bin/env python3
"""Write docs/spec/vectors/ceremony.json: values, documents and rules of ceremonies, most of them refused.

With ``--check``, write nothing and fail when the file is not what this script makes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import rfc8785

from keyquorum_core import ceremony
from keyquorum_core.ceremony import Commitments, EpochCertificate, PartsHeader
from keyquorum_core.ceremony_plan import CeremonyPlan, OrderedBy
from keyquorum_core.ceremony_states import MOVES, POSITIONS, Kind
from keyquorum_core.destruction import Consent, DestructionReceipt
from keyquorum_core.key_policy import KeyPolicy
from keyquorum_core.parts import parts_info
from keyquorum_core.quorum import Custodian, Quorum
from keyquorum_core.rebuilding import Gift, RebuildReceipt, RebuildRequest, gift_info

PATH = Path(__file__).resolve().parents[1] / "docs" / "spec" / "vectors" / "ceremony.json"
ID = "000102030405060708090a0b0c0d0e0f"
COMMITTEE = [Custodian("ch-1", "CH"), Custodian("de-1", "DE"), Custodian("fr-1", "FR"), Custodian("is-1", "IS")]
QUORUM = Quorum({"at_least": 3}, COMMITTEE)
PLAN = CeremonyPlan(ID, "demo", 1, "MLKEM768_X25519", "demo.local", "ab" * 32, QUORUM, 1_700_000_000)
ROTATION = replace(PLAN, kind=Kind.ROTATE, epoch=2, certificate="ef" * 32)
REPAIR = replace(PLAN, kind=Kind.REPAIR, certificate="ef" * 32, target="fr-1", ordered_by=OrderedBy.POLICY)
DESTRUCTION = replace(PLAN, kind=Kind.DESTROY, certificate="ef" * 32)
Vector = dict[str, Any]


def fixed(name: str) -> bytes:
    return hashlib.sha256(f"keyquorum vectors: {name}".encode()).digest()


def values() -> list[Vector]:
    parts = {name: fixed(f"part of {name}") for name in ("de-1", "ch-1", "fr-1")}
    shown = {name: part.hex() for name, part in sorted(parts.items())}
    before, recipient = fixed("seed before"), fixed("recipient")
    seed = ceremony.seed(ID, 3, parts)
    rotated = ceremony.seed(ID, 3, parts, before)
    some = {name: parts[name] for name in ("ch-1", "fr-1")}
    common = {"ceremony_id": ID, "index": 3}
    return [
        {"value": "seed", **common, "parts": shown, "before": "", "result": seed.hex()},
        {"value": "seed", **common, "parts": shown, "before": before.hex(), "result": rotated.hex()},
        {
            "value": "seed",
            **common,
            "parts": {name: part.hex() for name, part in some.items()},
            "before": before.hex(),
            "result": ceremony.seed(ID, 3, some, before).hex(),
        },
        {"value": "commitment", **common, "seed": seed.hex(), "result": ceremony.commitment(ID, 3, seed).hex()},
        {
            "value": "parts_info",
            "ceremony_id": ID,
            "from": "ch-1",
            "to": "de-1",
            "recipient": recipient.hex(),
            "result": parts_info(ID, "ch-1", "de-1", recipient).hex(),
        },
        {
            "value": "gift_info",
            "ceremony_id": ID,
            "from": "ch-1",
            "to": "de-1",
            "recipient": recipient.hex(),
            "result": gift_info(ID, "ch-1", "de-1", recipient).hex(),
        },
    ]


def documents() -> list[Vector]:
    digest = PLAN.digest
    header = PartsHeader(digest, "ch-1", {"de-1": "01" * 32, "fr-1": "02" * 32, "is-1": "03" * 32})
    headers = {"ch-1": header.digest, "de-1": "04" * 32, "fr-1": "05" * 32}
    stated = Commitments(digest, "ch-1", {index: fixed(f"c{index}") for index in QUORUM.indices_of("ch-1")}, headers)
    commitments = tuple(fixed(f"c{index}") for index in range(QUORUM.seed_count))
    good: dict[str, tuple[str, Any]] = {
        "a first plan": ("plan", PLAN),
        "a rotation": ("plan", ROTATION),
        "a rotation by policy": ("plan", replace(ROTATION, ordered_by=OrderedBy.POLICY)),
        "a new version of a key": ("plan", replace(PLAN, epoch=2, certificate="ef" * 32)),
        "a repair by policy": ("plan", REPAIR),
        "a replacement": ("plan", replace(REPAIR, kind=Kind.REPLACE, ordered_by=OrderedBy.OPERATORS)),
        "a destruction": ("plan", DESTRUCTION),
        "a canary's policy": ("plan", replace(PLAN, policy=KeyPolicy(5, 1, 60, 0, 0, True))),
        "a parts header": ("header", header),
        "commitments": ("commitments", stated),
        "a certificate": ("certificate", EpochCertificate(PLAN, commitments)),
        "a certificate without is-1": ("certificate", EpochCertificate(ROTATION, commitments, ("is-1",))),
        "a rebuild request": ("rebuild-request", RebuildRequest(REPAIR.digest, "fr-1")),
        "a gift": ("gift", Gift(REPAIR.digest, "ch-1", "fr-1", "06" * 32)),
        "a rebuild receipt": ("rebuild-receipt", RebuildReceipt(REPAIR.digest, "fr-1", "ef" * 32, 3, {"de-1": 2})),
        "a consent": ("consent", Consent(DESTRUCTION.digest, "ch-1")),
        "a destruction receipt": (
            "destruction-receipt",
            DestructionReceipt(DESTRUCTION.digest, "ch-1", 3, 1_700_000_100),
        ),
    }
    made = [(name, what, document.to_payload()) for name, (what, document) in good.items()]
    vectors = [{"name": n, "document": w, "payload": p.decode(), "expect": "ok"} for n, w, p in made]
    payloads = {name: (what, json.loads(payload)) for name, what, payload in made}

    def bad(name: str, of: str, expect: str = "MALFORMED", **changes: Any) -> None:
        what, tree = payloads[of]
        tree = {key: value for key, value in {**tree, **changes}.items() if value is not ...}
        text = rfc8785.dumps(tree).decode()
        vectors.append({"name": name, "document": what, "payload": text, "expect": expect})

    plan = payloads["a first plan"][1]
    bad("a first plan that names a certificate", "a first plan", "CEREMONY", certificate="ef" * 32)
    bad("a rotation that names none", "a rotation", "CEREMONY", certificate="")
    bad("a rotation to a first epoch", "a rotation", "CEREMONY", epoch=1)
    bad("a repair of nobody", "a repair by policy", target="")
    bad("a repair of a stranger", "a repair by policy", "UNKNOWN_CUSTODIAN", target="xx-1")
    bad("a destruction of a custodian", "a destruction", "CEREMONY", target="ch-1")
    bad("a replacement by policy", "a replacement", "CEREMONY", ordered_by="policy")
    bad("a first plan by policy", "a first plan", "CEREMONY", ordered_by="policy")
    bad("ordered by the coordinator", "a rotation", ordered_by="coordinator")
    bad("a kind of its own", "a first plan", kind="refresh")
    bad("no policy", "a first plan", policy=...)
    bad("half a policy", "a first plan", policy={"lease_seconds": 60})
    bad("a lease without end", "a first plan", policy={**plan["policy"], "lease_seconds": 604801})
    bad("evidence older than the lease", "a first plan", policy={**plan["policy"], "reattest_seconds": 3601})
    bad("a rotation every second", "a first plan", policy={**plan["policy"], "rotate_after_seconds": 1})
    bad("a policy with more", "a first plan", policy={**plan["policy"], "auto": True})
    bad("a plan with more", "a first plan", note="")
    bad("an upper-case certificate", "a rotation", certificate="EF" * 32)
    bad("commitments without headers", "commitments", headers=...)
    bad("a header's digest cut short", "commitments", headers={"ch-1": "00"})
    bad("a certificate without its absent", "a certificate", absent=...)
    bad("an absent stranger", "a certificate without is-1", "CEREMONY", absent=["xx-1"])
    bad("an absent custodian twice", "a certificate without is-1", "CEREMONY", absent=["is-1", "is-1"])
    bad("absent custodians out of order", "a certificate without is-1", "CEREMONY", absent=["is-1", "fr-1"])
    bad("a certificate of another plan", "a certificate", "CEREMONY", plan_digest="0" * 64)
    bad("a receipt with nothing wrong", "a rebuild receipt", wrong={"de-1": 0})
    bad("a gift to nobody", "a gift", to="")
    bad("seeds less than none", "a destruction receipt", erased=-1)
    first = rfc8785.dumps(plan)
    vectors.append(
        {"name": "a plan with a space", "document": "plan", "payload": f" {first.decode()}", "expect": "MALFORMED"}
    )
    return vectors


def participation() -> list[Vector]:
    """Who may make an epoch: quorum, kind, policy, those present, and whether they may."""
    home = {"at_least": 3, "include": {"custodian": "ch-1"}}
    two, three, all_four = ["ch-1", "de-1"], ["ch-1", "de-1", "fr-1"], ["ch-1", "de-1", "fr-1", "is-1"]
    cases: list[tuple[str, dict[str, object], str, int, list[str], str]] = [
        ("everyone generates", {"at_least": 3}, "generate", 1, all_four, "ok"),
        ("nobody is absent from generate", {"at_least": 3}, "generate", 1, three, "CEREMONY"),
        ("everyone rotates", {"at_least": 3}, "rotate", 0, all_four, "ok"),
        ("one may be absent", {"at_least": 3}, "rotate", 1, three, "ok"),
        ("if the policy says so", {"at_least": 3}, "rotate", 0, three, "CEREMONY"),
        ("no quorum is left", {"at_least": 3}, "rotate", 2, two, "CEREMONY"),
        ("two quorums apart", {"at_least": 2}, "rotate", 2, two, "CEREMONY"),
        ("one of two quorums apart", {"at_least": 2}, "rotate", 1, three, "ok"),
        ("the veto holder is absent", home, "rotate", 1, ["de-1", "fr-1", "is-1"], "CEREMONY"),
        ("another than the veto holder is", home, "rotate", 1, three, "ok"),
        ("a stranger is present", {"at_least": 3}, "rotate", 1, [*all_four, "xx-1"], "CEREMONY"),
    ]
    members = ("name", "quorum", "kind", "absent_at_most", "present", "expect")
    return [dict(zip(members, case, strict=True)) for case in cases]


def moves() -> Vector:
    return {
        "custodians": {
            str(kind): {str(state): sorted(map(str, to)) for state, to in sorted(table.items())}
            for kind, table in sorted(MOVES.items())
        },
        "coordinators": {
            str(kind): {str(step): sorted(map(str, to)) for step, to in sorted(table.items())}
            for kind, table in sorted(POSITIONS.items())
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    document = {
        "about": "Ceremonies (docs/spec/ceremony.md): payloads are text, values hex; expect is ok or a reason code",
        "committee": [{"id": each.id, "jurisdiction": each.jurisdiction} for each in COMMITTEE],
        "values": values(),
        "documents": documents(),
        "participation": participation(),
        "moves": moves(),
    }
    text = json.dumps(document, indent=1) + "\n"
    if check:
        return int(PATH.read_text() != text)
    PATH.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
