"""Policies for tests: engines and requests made of little, and a signed bundle that lets everything through."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from keyquorum_core.bulletin import Bulletin, sign_bulletin
from keyquorum_core.policy.bundle import POLICY_KIND, PolicyBundle
from keyquorum_core.policy.engine import PolicyEngine
from keyquorum_core.policy.facts import JobFacts, QuorumFacts, Request, Seat, WorkerFacts
from keyquorum_core.policy.lists import ControlledList
from keyquorum_core.policy.policies import load_policies
from keyquorum_core.policy.requests import Situation
from keyquorum_core.signing import Identity

__all__ = ["ALLOW_ALL", "CUSTODIAN", "NOW", "bundle", "engine", "job", "release", "situation", "submit", "worker"]

NOW = 1_800_000_000
CUSTODIAN = Seat("custodian", "ch-1", "CH")
ALLOW_ALL = '@id("test.everything")\npermit (principal, action, resource);\n'


def engine(text: str, version: int = 1) -> PolicyEngine:
    return PolicyEngine(load_policies({"test.cedar": text}), bundle_digest="ab" * 32, bundle_version=version)


def job(**changes: object) -> JobFacts:
    members: dict[str, object] = {
        "job_id": "j" * 26,
        "owner": "alice",
        "classification": "research",
        "regions": ("eu",),
        "evidence_types": ("sev-snp",),
        "lifetime_seconds": 86400,
        "cpus": 1,
    }
    return JobFacts(**{**members, **changes})  # type: ignore[arg-type]


def worker(**changes: object) -> WorkerFacts:
    members: dict[str, object] = {
        "hardware": "sev-snp:01",
        "region": "eu",
        "provider": "acme",
        "evidence": ("sev-snp",),
        "tcb": {"sev-snp.microcode": 213},
    }
    return WorkerFacts(**{**members, **changes})  # type: ignore[arg-type]


def situation(
    seat: Seat = CUSTODIAN, now: int = NOW, lists: Mapping[str, ControlledList] | None = None, quorum: int = 3
) -> Situation:
    return Situation(seat, QuorumFacts(quorum, 2), now, lists or {})


def release(now: int = NOW, logged: bool = True, to: WorkerFacts | None = None, **changes: object) -> Request:
    """A release to a worker."""
    return situation(now=now).release(job(**changes), to or worker(), logged=logged)


def submit(now: int = NOW, **changes: object) -> Request:
    return situation(Seat("coordinator"), now).submit(job(**changes))


def bundle(
    signers: Iterable[Identity],
    *,
    custodians: Iterable[str] = (),
    cluster: str = "demo",
    text: str = ALLOW_ALL,
    version: int = 1,
    issued_at: int | None = None,
    seconds: int = 365 * 86400,
) -> bytes:
    """A signed bundle for these custodians, or for the coordinator where there are none."""
    ids = tuple(custodians)
    body = PolicyBundle.make("custodian" if ids else "coordinator", ids, {"test.cedar": text}).body()
    start = int(time.time()) - 60 if issued_at is None else issued_at
    return sign_bulletin(Bulletin(cluster, POLICY_KIND, version, start, start + seconds, body), signers)
