#!/usr/bin/env python3
"""Write docs/spec/vectors/drill-report.json: payloads of drill reports, put together as JSON alone.

With ``--check``, write nothing and fail when the file is not what this script makes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from vector_files import keep

PATH = Path(__file__).resolve().parents[1] / "docs" / "spec" / "vectors" / "drill-report.json"

GOOD = {"actual": "the same key", "expected": "the same key", "passed": True, "what": "the key derives as before"}
BAD = {**GOOD, "actual": "another key", "passed": False}
PART = {
    "at_ms": 0,
    "cause": "",
    "checks": [GOOD],
    "custodians": ["is-1"],
    "detect_ms": 3100,
    "duration_ms": 4400,
    "kind": "custodian-loss",
    "outcome": "passed",
    "reason": "",
    "recover_ms": 1150,
}
MOMENT = {"at_ms": 12, "custodian": "is-1", "kind": "custodian-loss", "step": "inject", "text": "silent"}
REPORT: dict[str, Any] = {
    "cluster": "demo",
    "coordinator": "main",
    "drill_id": "0d" * 16,
    "duration_ms": 4400,
    "key_id": "canary",
    "kind": "custodian-loss",
    "outcome": "passed",
    "parts": [PART],
    "roster_sha256": "5e" * 32,
    "started_at": 1_800_000_000,
    "timeline": [MOMENT],
    "v": 1,
}
KINDS = (
    "rotation", "custodian-loss", "slow-custodian", "lying-custodian", "repair", "restore", "revocation",
    "forged-evidence", "split-view", "coordinator-loss",
)  # fmt: skip


def canonical(members: dict[str, Any]) -> str:
    return json.dumps(members, sort_keys=True, separators=(",", ":"))


def report(part: dict[str, Any] | None = None, **changes: object) -> dict[str, Any]:
    """The report with changes, and with changes of its one part."""
    made = copy.deepcopy(REPORT)
    made["parts"][0] |= part or {}
    return made | changes


def full(changed: str = "revocation", **of_part: object) -> dict[str, Any]:
    """A full drill, with changes of one part."""
    parts: list[dict[str, Any]] = []
    for kind in KINDS:
        part = copy.deepcopy(PART) | {"kind": kind}
        if kind == changed:
            part |= of_part
        parts.append(part)
    return report(kind="full", parts=parts, timeline=[{**MOMENT, "kind": kind} for kind in KINDS])


def cases() -> list[tuple[str, str, str]]:
    left_out: dict[str, Any] = {"outcome": "skipped", "checks": [], "cause": "nobody signed the operators' documents"}
    skipped = full(**left_out)
    failed = {"outcome": "failed", "checks": [GOOD, BAD]}
    bare = report()
    del bare["parts"][0]["detect_ms"], bare["parts"][0]["recover_ms"]
    return [
        ("passed", "ok", canonical(report())),
        ("without measurements", "ok", canonical(bare)),
        ("failed", "ok", canonical(report(failed, outcome="failed"))),
        ("failed for a cause", "ok",
         canonical(report({"outcome": "failed", "reason": "TIMEOUT", "cause": "no answer"}, outcome="failed"))),
        ("full, one part skipped", "ok", canonical(skipped)),
        ("interrupted before its part ended", "ok", canonical(report(outcome="interrupted", parts=[]))),
        ("a part says it passed, a check says it did not", "MALFORMED", canonical(report({"checks": [GOOD, BAD]}))),
        ("a part that passed without checks", "MALFORMED", canonical(report({"checks": []}))),
        ("a part that passed for a cause", "MALFORMED", canonical(report({"cause": "no answer"}))),
        ("a part that failed with all checks passed", "MALFORMED",
         canonical(report({"outcome": "failed"}, outcome="failed"))),
        ("a report that passed, a part that failed", "MALFORMED", canonical(report(failed))),
        ("a report that failed, all parts passed", "MALFORMED", canonical(report(outcome="failed"))),
        ("all parts skipped", "MALFORMED",
         canonical(report({"outcome": "skipped", "checks": [], "cause": "nobody signed"}))),
        ("full, another part skipped", "MALFORMED", canonical(full("repair", **left_out))),
        ("passed, and nothing happened", "MALFORMED", canonical(report(timeline=[]))),
        ("full, nothing happened in a part that passed", "MALFORMED",
         canonical({**full(), "timeline": full()["timeline"][:-1]})),
        ("a part of another kind", "MALFORMED", canonical(report({"kind": "repair"}))),
        ("full without a part", "MALFORMED", canonical({**full(), "parts": full()["parts"][:-1]})),
        ("full out of order", "MALFORMED", canonical({**full(), "parts": full()["parts"][::-1]})),
        ("no such kind", "MALFORMED", canonical(report(kind="earthquake"))),
        ("a timeline out of order", "MALFORMED",
         canonical(report(timeline=[MOMENT, {**MOMENT, "at_ms": 11}]))),
        ("a control character", "MALFORMED", canonical(report(timeline=[{**MOMENT, "text": "\x1b[2J"}]))),
        ("an unknown member", "MALFORMED", canonical(report(more=1))),
        ("another version", "MALFORMED", canonical(report(v=2))),
        ("not canonical", "MALFORMED", canonical(report()).replace(",", ", ", 1)),
    ]  # fmt: skip


def render() -> str:
    vectors = []
    for name, expect, payload in cases():
        vector = {"name": name, "expect": expect, "payload": payload}
        if expect == "ok":
            vector["sha256"] = hashlib.sha256(payload.encode()).hexdigest()
        vectors.append(vector)
    return json.dumps({"about": "Drill reports; docs/spec/drill-report.md", "vectors": vectors}, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(keep(PATH, render))
