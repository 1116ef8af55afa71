"""Write docs/spec/vectors/leaves.json: a leaf of every type, and leaves that are refused.

    python scripts/make_leaf_vectors.py [--check]

Everything is fixed, so running twice changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from keyquorum_core.ledger import leaves as v
from keyquorum_core.release import Leaf

TARGET = Path(__file__).resolve().parent.parent / "docs" / "spec" / "vectors" / "leaves.json"
NOW = 1_800_000_000
JOB = "abcdefghijklmnopqrstuvwxyz"
ABOUT = (
    "Formats: docs/spec/leaves.md. `data` is the leaf as text. `expect` is `ok`, with the RFC 6962 leaf hash in `hash`,"
    " or the reason code."
)


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


NO_POLICY: dict[str, Any] = {"policy_sha256": v.NOTHING, "policy_version": 0, "decision_sha256": v.NOTHING}
POLICY: dict[str, Any] = {"policy_sha256": digest("policy"), "policy_version": 7, "decision_sha256": digest("decision")}
JOB_MEMBERS: dict[str, Any] = {
    "job_id": JOB,
    "manifest_sha256": digest("manifest"),
    "owner_sha256": digest("owner"),
    "key_id": "demo",
    "epoch": 1,
}


def leaves() -> dict[str, v.LedgerLeaf | Leaf]:
    submitted = {
        **JOB_MEMBERS,
        "classification": "research",
        "export_control": "",
        "regions": ("CH", "eu"),
        "time": NOW,
    }
    denied = {**JOB_MEMBERS, "time": NOW + 1}
    intent = Leaf(JOB, digest("manifest"), digest("key"), digest("evidence"), "demo", 1, NOW + 2, "worker")
    telemetry: dict[str, Any] = {
        "job_id": JOB,
        "worker_sha256": digest("worker"),
        "evidence_sha256": digest("evidence"),
        "records": 12,
        "development": False,
        "time": NOW + 3,
    }
    ended: dict[str, Any] = {"job_id": JOB, "development": True, "time": NOW + 5}
    ceremony: dict[str, Any] = {
        "ceremony_id": "00112233445566778899aabbccddeeff",
        "kind": "generate",
        "key_id": "demo",
        "epoch": 1,
        "plan_sha256": digest("plan"),
        "roster_sha256": digest("roster"),
        "time": NOW - 5,
    }
    nothing: dict[str, Any] = dict.fromkeys(
        ("statement_sha256", "evidence_sha256", "result_sha256", "log_sha256"), v.NOTHING
    )
    return {
        "job.submitted": v.JobSubmitted(**submitted, **POLICY),
        "job.submitted, no policy consulted": v.JobSubmitted(**submitted, **NO_POLICY),
        "job.submitted, export class": v.JobSubmitted(**{**submitted, "export_control": "5A002"}, **POLICY),
        "job.denied by the coordinator": v.JobDenied(
            **denied, intent_sha256=v.NOTHING, seat="coordinator", reason="UNKNOWN_KEY", **NO_POLICY
        ),
        "job.denied by a custodian": v.JobDenied(
            **denied, intent_sha256=intent.hash().hex(), seat=v.custodian_seat("ch-1"), reason="REGION", **POLICY
        ),
        "release.intent": intent,
        "telemetry, first batch": v.Telemetry(
            **telemetry,
            sequence=0,
            previous_sha256=v.NOTHING,
            statement_sha256=digest("batch 0"),
            content_sha256=digest("content 0"),
            last=False,
        ),
        "telemetry, last batch": v.Telemetry(
            **telemetry,
            sequence=1,
            previous_sha256=digest("batch 0"),
            statement_sha256=digest("batch 1"),
            content_sha256=digest("content 1"),
            last=True,
        ),
        "result, completed": v.Result(
            **ended,
            outcome="completed",
            reason="",
            statement_sha256=digest("statement"),
            evidence_sha256=digest("evidence"),
            result_sha256=digest("result"),
            log_sha256=digest("log"),
        ),
        "result, cancelled": v.Result(**ended, outcome="cancelled", reason="CANCELLED", **nothing),
        "ceremony": v.Ceremony(**ceremony, certificate_sha256=digest("certificate"), reason=""),
        "ceremony, given up": v.Ceremony(**ceremony, certificate_sha256=v.NOTHING, reason="CEREMONY"),
        "roster": v.RosterInUse(
            roster_sha256=digest("roster"), roster_version=3, custodians=5, expires_at=NOW + 86400, time=NOW - 9
        ),
        "revocation": v.Revocation(
            target="hardware",
            subject_sha256=digest("chip"),
            document_sha256=digest("document"),
            document_version=2,
            time=NOW,
        ),
        "drill": v.Drill(
            drill="custodian-lost", passed=True, report_sha256=digest("report"), duration_ms=812, time=NOW
        ),
        "alarm": v.Alarm(alarm="fork", seat=v.custodian_seat("de-1"), evidence_sha256=digest("two"), time=NOW),
    }


def refused(good: dict[str, bytes]) -> list[tuple[str, bytes, str]]:
    submitted, denied, custodian = (
        good[name] for name in ("job.submitted", "job.denied by the coordinator", "job.denied by a custodian")
    )
    first, last, done = (
        good[name] for name in ("telemetry, first batch", "telemetry, last batch", "result, completed")
    )
    quit_, made, given_up = (good[name] for name in ("result, cancelled", "ceremony", "ceremony, given up"))
    nothing, batch = v.NOTHING.encode(), digest("batch 0").encode()
    kind = b'"type":"job.submitted",'
    reordered = submitted.replace(kind, b"")[:-1] + b"," + kind[:-1] + b"}"
    alone = good["job.submitted, no policy consulted"].replace(b'"policy_version":0', b'"policy_version":1')
    out: list[tuple[str, bytes, str]] = [
        ("nothing", b"", "MALFORMED"),
        ("not JSON", submitted[:-1], "MALFORMED"),
        ("a list", b"[]", "MALFORMED"),
        ("no type", b"{}", "MALFORMED"),
        ("an unknown type", submitted.replace(b"job.submitted", b"job.accepted"), "UNSUPPORTED"),
        ("an unknown version", submitted.replace(b'"version":1', b'"version":2'), "UNSUPPORTED"),
        ("no version", submitted.replace(b',"version":1', b""), "MALFORMED"),
        ("version 0", submitted.replace(b'"version":1', b'"version":0'), "MALFORMED"),
        ("a space", submitted.replace(b":", b": ", 1), "LEAF"),
        ("a space after it", submitted + b" ", "LEAF"),
        ("members in another order", reordered, "LEAF"),
        ("a member twice", submitted[:-1] + b',"version":1}', "MALFORMED"),
        ("a further member", submitted[:-1] + b',"zone":"a"}', "MALFORMED"),
        ("a missing member", submitted.replace(b'"export_control":"",', b""), "MALFORMED"),
        ("an owner's name in place of a digest", submitted.replace(digest("owner").encode(), b"alice"), "LEAF"),
        ("a digest in capitals", submitted.replace(digest("owner").encode(), digest("owner").upper().encode()), "LEAF"),
        ("a digest cut short", submitted.replace(digest("owner").encode(), digest("owner")[:-1].encode()), "LEAF"),
        ("an epoch in words", submitted.replace(b'"epoch":1', b'"epoch":"1"'), "LEAF"),
        ("a negative epoch", submitted.replace(b'"epoch":1', b'"epoch":-1'), "LEAF"),
        ("time 0", submitted.replace(b"1800000000", b"0"), "LEAF"),
        ("a time past 2⁵³", submitted.replace(b"1800000000", b"9007199254740992"), "MALFORMED"),
        ("a fraction of a second", submitted.replace(b"1800000000", b"1800000000.5"), "MALFORMED"),
        ("a bad job id", submitted.replace(JOB.encode(), b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "LEAF"),
        ("regions out of order", submitted.replace(b'["CH","eu"]', b'["eu","CH"]'), "LEAF"),
        ("a region twice", submitted.replace(b'["CH","eu"]', b'["CH","CH"]'), "LEAF"),
        ("regions that are a string", submitted.replace(b'["CH","eu"]', b'"CH"'), "LEAF"),
        ("a region that is a number", submitted.replace(b'["CH","eu"]', b"[1]"), "LEAF"),
        ("a policy version without a policy", alone, "LEAF"),
        ("a policy without a decision", submitted.replace(digest("decision").encode(), nothing), "LEAF"),
        ("a denial by nobody", denied.replace(b'"coordinator"', b'""'), "LEAF"),
        ("a denial by a monitor", custodian.replace(b'"custodian/ch-1"', b'"monitor"'), "LEAF"),
        ("the coordinator denies a release", custodian.replace(b'"custodian/ch-1"', b'"coordinator"'), "LEAF"),
        ("a custodian denies a submission", denied.replace(b'"coordinator"', b'"custodian/ch-1"'), "LEAF"),
        ("a denial without a reason", denied.replace(b'"UNKNOWN_KEY"', b'""'), "LEAF"),
        ("a reason in words", denied.replace(b'"UNKNOWN_KEY"', b'"Alice may not"'), "LEAF"),
        ("a first batch with one before it", first.replace(nothing, batch), "LEAF"),
        ("a later batch with none before it", last.replace(batch, nothing), "LEAF"),
        ("last that is 1", last.replace(b'"last":true', b'"last":1'), "LEAF"),
        ("completed with a reason", done.replace(b'"reason":""', b'"reason":"JOB_FAILED"'), "LEAF"),
        ("completed without a statement", done.replace(digest("statement").encode(), nothing), "LEAF"),
        ("cancelled without a reason", quit_.replace(b'"CANCELLED"', b'""'), "LEAF"),
        ("an unknown outcome", quit_.replace(b'"cancelled"', b'"vanished"'), "LEAF"),
        ("a ceremony with certificate and reason", made.replace(b'"reason":""', b'"reason":"CEREMONY"'), "LEAF"),
        ("a ceremony with neither", given_up.replace(b'"CEREMONY"', b'""'), "LEAF"),
        ("an unknown kind of ceremony", made.replace(b'"generate"', b'"regenerate"'), "LEAF"),
        ("a roster of one custodian", good["roster"].replace(b'"custodians":5', b'"custodians":1'), "LEAF"),
        ("a drill with a sentence for a name", good["drill"].replace(b"custodian-lost", b"Custodian lost!"), "LEAF"),
        ("too large", submitted.replace(b'"CH"', b'"' + b"c" * 8192 + b'"'), "TOO_LARGE"),
    ]  # fmt: skip
    return out


def document() -> dict[str, object]:
    good = {name: leaf.to_bytes() for name, leaf in leaves().items()}
    vectors: list[dict[str, object]] = [
        {
            "name": name,
            "operation": "leaf",
            "expect": "ok",
            "data": data.decode(),
            "hash": v.parse_leaf(data).hash().hex(),
        }
        for name, data in good.items()
    ]
    for name, data, reason in refused(good):
        vectors.append({"name": name, "operation": "leaf", "expect": reason, "data": data.decode()})
    return {"about": ABOUT, "vectors": vectors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the file is current")
    text = json.dumps(document(), indent=1, ensure_ascii=False) + "\n"
    if parser.parse_args().check:
        if TARGET.read_text("utf-8") != text:
            sys.exit(f"{TARGET.name} is not current")
        return
    TARGET.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
