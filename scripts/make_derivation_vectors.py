#!/usr/bin/env python3
"""Write docs/spec/vectors/derivation.json: every step of the derivation for five quorums, from seeds fixed by name.

With ``--check``, write nothing and fail when the file is not what this script makes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from keyquorum_core import derivation
from keyquorum_core.quorum import Custodian, Quorum

PATH = Path(__file__).resolve().parents[1] / "docs" / "spec" / "vectors" / "derivation.json"

FIVE = ["ch-1:CH", "ch-2:CH", "de-1:DE", "fr-1:FR", "se-1:SE"]
CASES: list[tuple[str, list[str], dict[str, object], str, int, str]] = [
    ("2-of-3", ["ch-1:CH", "de-1:DE", "fr-1:FR"], {"at_least": 2}, "demo", 1, "job"),
    ("3-of-5", FIVE, {"at_least": 3}, "physics-vqe", 7, "job"),
    (
        "3-of-5 from 2 jurisdictions, one of them CH",
        FIVE,
        {"at_least": 3, "jurisdictions": 2, "include": {"jurisdiction": "CH"}},
        "finance-2031",
        2**32,
        "job",
    ),
    (
        "nested any_of",
        ["a:CH", "b:CH", "c:DE", "d:DE", "e:FR", "f:SE"],
        {
            "any_of": [
                {"at_least": 4},
                {"all_of": [{"at_least": 2, "of": ["a", "b", "c"]}, {"any_of": [{"include": {"custodian": "f"}}]}]},
                {"at_least": 3, "jurisdictions": 3, "include": [{"jurisdiction": "FR"}, {"custodian": "a"}]},
            ]
        },
        "key.with_marks-9",
        2**53 - 1,
        "drill",
    ),
    ("5-of-9", [f"node-{i}:{('CH', 'DE', 'FR')[i % 3]}" for i in range(1, 10)], {"at_least": 5}, "demo", 2, "job"),
]


def vector(
    name: str, custodians: list[str], rule: dict[str, object], key_id: str, epoch: int, purpose: str
) -> dict[str, object]:
    quorum = Quorum(rule, [Custodian(*entry.split(":")) for entry in custodians])
    seeds = {i: _fixed(name, f"seed {i}") for i in range(quorum.seed_count)}
    subject = _fixed(name, "subject")
    context = derivation.context(key_id, epoch, purpose, subject)
    contributions = derivation.contributions(seeds, context)
    root = derivation.root(contributions, context)
    return {
        "name": name,
        "custodians": [{"id": c.id, "jurisdiction": c.jurisdiction} for c in quorum.committee],
        "quorum": rule,
        "maximal_unqualified_sets": [list(members) for members in quorum.maximal_unqualified_sets],
        "seeds": [seed.hex() for seed in seeds.values()],
        "key_id": key_id,
        "epoch": epoch,
        "purpose": purpose,
        "subject": subject.hex(),
        "context": context.hex(),
        "contributions": [contributions[i].hex() for i in seeds],
        "root": root.hex(),
        "key_check": derivation.key_check(root, context).hex(),
        "purpose_keys": {
            purpose: derivation.purpose_key(root, context, purpose).hex() for purpose in derivation.PURPOSES
        },
    }


def render() -> str:
    """The file's text: one vector after another, lists of hex one item a line."""
    return json.dumps({"vectors": [vector(*case) for case in CASES]}, indent=1, ensure_ascii=False) + "\n"


def _fixed(name: str, what: str) -> bytes:
    return hashlib.sha256(f"keyquorum test vector: {name}: {what}".encode()).digest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    if not parser.parse_args().check:
        PATH.write_text(render(), encoding="utf-8")
        return 0
    if PATH.read_text(encoding="utf-8") != render():
        print(f"{PATH.name} is not current: run scripts/{Path(__file__).name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
