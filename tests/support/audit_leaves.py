"""A month in the life of a cluster, as its leaves: every type, most often what is ordinary."""

from __future__ import annotations

import base64
import hashlib
import random
from typing import Any

from keyquorum_core.ledger.leaves import (
    NOTHING,
    Alarm,
    Ceremony,
    Drill,
    JobDenied,
    JobSubmitted,
    Result,
    Revocation,
    RosterInUse,
    Telemetry,
)
from keyquorum_core.release import Leaf

__all__ = ["a_month"]

KEYS = (("genome", "restricted", ("CH",)), ("payroll", "confidential", ("CH", "DE")), ("h2-vqe", "research", ("eu",)))
DAY = 86400


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def job_id(number: int) -> str:
    return base64.b32encode(hashlib.sha256(b"%d" % number).digest()).decode().lower()[:26]


def a_month(end: int, jobs: int = 120) -> list[bytes]:
    """Leaves in the log's order, the last one a day before ``end`` (unix seconds)."""
    dice = random.Random(7)  # noqa: S311 - the same month each time
    start = end - 31 * DAY
    policy = {"policy_sha256": digest("policy"), "policy_version": 3, "decision_sha256": digest("decision")}
    out = [
        RosterInUse(
            roster_sha256=digest("roster"), roster_version=4, custodians=5, expires_at=end + 300 * DAY, time=start
        ).to_bytes()
    ]
    for number, (key, _, _) in enumerate(KEYS):
        out.append(
            Ceremony(
                ceremony_id=digest("ceremony", key)[:32], kind="generate", key_id=key, epoch=1,
                plan_sha256=digest("plan", key), roster_sha256=digest("roster"),
                certificate_sha256=digest("certificate", key), reason="", time=start + 60 * number + 60,
            ).to_bytes()
        )  # fmt: skip
    for number in range(jobs):
        out += _job(dice, number, start + 3600 + number * (29 * DAY // jobs) + dice.randrange(1800), policy)
        if number == jobs // 2:
            out += _middle(start + 15 * DAY)
    return out


def _job(dice: random.Random, number: int, when: int, policy: dict[str, Any]) -> list[bytes]:
    key, classification, regions = dice.choices(KEYS, (2, 3, 6))[0]
    about: dict[str, Any] = {
        "job_id": job_id(number), "manifest_sha256": digest("manifest", number),
        "owner_sha256": digest("owner", number % 4), "key_id": key, "epoch": 1,
    }  # fmt: skip
    if dice.random() < 0.06:
        return [
            JobDenied(
                **about, **policy, intent_sha256=NOTHING, seat="coordinator", time=when,
                reason=dice.choice(("REGION", "QUOTA", "UNKNOWN_OWNER")),
            ).to_bytes()
        ]  # fmt: skip
    out = [
        JobSubmitted(
            **about, **policy, classification=classification, export_control="EAR99", regions=regions, time=when
        ).to_bytes()
    ]
    development = dice.random() < 0.03
    evidence = digest("evidence", number % 6, development)
    for recipient, seen in (("owner", Leaf.NO_EVIDENCE), ("worker", evidence)):
        intent = Leaf(
            job_id(number), digest("manifest", number), digest("recipient", number, recipient), seen, key, 1, when + 9,
            recipient, recipient == "worker" and development,
        )  # fmt: skip
        out.append(intent.to_bytes())
        if recipient == "worker" and dice.random() < 0.12:
            out.append(
                JobDenied(
                    **about, **policy, intent_sha256=intent.hash().hex(), time=when + 10,
                    seat=dice.choice(("custodian/is-1", "custodian/fr-1", "custodian/de-2")),
                    reason=dice.choice(("STALE", "REGION", "MEASUREMENT", "TCB", "STALE")),
                ).to_bytes()
            )  # fmt: skip
    out.append(
        Telemetry(
            job_id=job_id(number), worker_sha256=digest("worker", number), evidence_sha256=evidence, sequence=0,
            previous_sha256=NOTHING, statement_sha256=digest("telemetry", number), content_sha256=digest("c", number),
            records=dice.randrange(5, 60), last=True, development=development, time=when + 300,
        ).to_bytes()
    )  # fmt: skip
    failed = dice.random() < 0.05
    out.append(
        Result(
            job_id=job_id(number), outcome="failed" if failed else "completed", reason="JOB_FAILED" if failed else "",
            statement_sha256=digest("statement", number), evidence_sha256=evidence,
            result_sha256=digest("result", number), log_sha256=digest("log", number), development=development,
            time=when + 400,
        ).to_bytes()
    )  # fmt: skip
    return out


def _middle(when: int) -> list[bytes]:
    """What happens about once a month."""
    return [
        *(
            Drill(drill=name, passed=ms < 9999, report_sha256=digest(name), duration_ms=ms, time=when).to_bytes()
            for name, ms in (("custodian-down", 1840), ("jurisdiction-lost", 2210), ("coordinator-killed", 60_000))
        ),
        Alarm(alarm="log-stalled", seat="custodian/is-1", evidence_sha256=digest("alarm"), time=when + 200).to_bytes(),
        Ceremony(
            ceremony_id=digest("rotate")[:32], kind="rotate", key_id="genome", epoch=2, plan_sha256=digest("rp"),
            roster_sha256=digest("roster"), certificate_sha256=digest("rc"), reason="", time=when + 300,
        ).to_bytes(),
        Ceremony(
            ceremony_id=digest("rotate", 2)[:32], kind="rotate", key_id="payroll", epoch=2, plan_sha256=digest("rp", 2),
            roster_sha256=digest("roster"), certificate_sha256=NOTHING, reason="TIMEOUT", time=when + 400,
        ).to_bytes(),
        Revocation(
            target="hardware", subject_sha256=digest("chip"), document_sha256=digest("revocations"), document_version=2,
            time=when + 500,
        ).to_bytes(),
    ]  # fmt: skip
