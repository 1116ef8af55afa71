"""Scenario tables: questions with the answers that a set of policies must give (docs/policy.md).

::

    defaults: {owner: alice, custodian: {id: ch-1, jurisdiction: CH}, quorum: {custodians: 3, jurisdictions: 2}}
    lists: {sanctions: {entries: [{kind: region, name: ru-central, classes: []}]}}
    scenarios:
      - name: research runs anywhere
        action: release
        worker: {region: eu, provider: acme, evidence: [sev-snp]}
        job: {classification: research, regions: [eu]}
        expect: permit
        by: [research.release]

Members of ``worker``, ``job``, ``custodian`` and ``key`` are the schema's attributes; one that the schema does not have
is refused. A scenario's are laid over the defaults', member by member.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from keyquorum_core.errors import MalformedError, Reason
from keyquorum_core.policy.engine import Decision, PolicyEngine
from keyquorum_core.policy.facts import (
    Entity,
    JobFacts,
    QuorumFacts,
    Request,
    Seat,
    WorkerFacts,
    cluster_entity,
    custodian_entity,
    key_entity,
)
from keyquorum_core.policy.lists import ControlledList
from keyquorum_core.policy.requests import Situation
from keyquorum_core.policy.schema import ACTIONS
from keyquorum_core.strictjson import Fields

__all__ = ["Outcome", "Scenario", "read_scenarios", "run"]

MAX_SCENARIOS: Final = 4096
_NOW: Final = 1_800_000_000


@dataclass(frozen=True, slots=True)
class Scenario:
    """``by`` is ``None`` where it does not matter which policies decide."""

    name: str
    request: Request
    expect: str
    by: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Outcome:
    scenario: Scenario
    decision: Decision

    @property
    def passed(self) -> bool:
        by = self.scenario.by
        return self.decision.outcome == self.scenario.expect and (by is None or by == self.decision.policies)

    def as_dict(self) -> dict[str, object]:
        return {
            "name": self.scenario.name,
            "passed": self.passed,
            "expected": {
                "outcome": self.scenario.expect,
                "by": None if self.scenario.by is None else list(self.scenario.by),
            },
            "got": {
                "outcome": self.decision.outcome,
                "by": list(self.decision.policies),
                "failed": list(self.decision.failed),
            },
        }


def run(engine: PolicyEngine, scenarios: tuple[Scenario, ...]) -> tuple[Outcome, ...]:
    return tuple(Outcome(each, engine.decide(each.request)) for each in scenarios)


@dataclass(frozen=True, slots=True)
class _Defaults:
    members: Mapping[str, Any] = field(default_factory=dict)
    lists: Mapping[str, ControlledList] = field(default_factory=dict)


def read_scenarios(document: object) -> tuple[Scenario, ...]:
    """From a parsed YAML or JSON document. Raises :class:`MalformedError` naming scenario and member."""
    top = Fields(document, "scenario table")
    members = top.raw("defaults") if "defaults" in top else {}
    if not isinstance(members, Mapping):
        raise _bad("scenario table: bad member 'defaults'", "object", type(members).__name__)
    lists = _lists(top.object("lists")) if "lists" in top else {}
    items = top.list("scenarios", max_items=MAX_SCENARIOS, min_items=1)
    top.done()
    scenarios = tuple(_scenario(item, _Defaults(members, lists), i) for i, item in enumerate(items))
    names = [each.name for each in scenarios]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _bad("scenario table: a name is used twice", "every name once", twice[0])
    return scenarios


def _lists(given: Fields) -> dict[str, ControlledList]:
    out = {}
    for name in ("export", "sanctions"):
        if name in given:
            entry = given.object(name)
            version = entry.integer("version", 1) if "version" in entry else 1
            out[name] = ControlledList.read({"entries": entry.raw("entries")}, version)
            entry.done()
    given.done()
    return out


def _scenario(item: object, defaults: _Defaults, number: int) -> Scenario:
    what = f"scenario {number + 1}"
    if not isinstance(item, Mapping):
        raise _bad(f"{what} is not an object", "object", type(item).__name__)
    name = item.get("name")
    if isinstance(name, str):
        what = f"scenario {name[:60]!r}"
    top = Fields(_laid_over(defaults.members, item), what)
    title = top.text("name", max_length=200)
    expect = top.text("expect", max_length=8)
    if expect not in ("permit", "deny"):
        raise _bad(f"{what}: bad member 'expect'", "permit or deny", ascii(expect))
    by = tuple(sorted(top.texts("by", max_items=256))) if "by" in top else None
    return Scenario(title, read_request(top, defaults.lists, what), expect, by)


def _laid_over(defaults: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    out = {**defaults, **item}
    for name in ("worker", "job", "custodian", "key"):
        below, above = defaults.get(name), item.get(name)
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            out[name] = {**below, **above}
    return out


def read_request(top: Fields, lists: Mapping[str, ControlledList], what: str) -> Request:
    """A request from a scenario's members, all of them. Raises :class:`MalformedError`."""
    action = top.text("action", max_length=16) if "action" in top else "release"
    if action not in ACTIONS:
        raise _bad(f"{what}: bad member 'action'", ", ".join(ACTIONS), ascii(action))
    owner = top.text("owner", max_length=64) if "owner" in top else ""
    worker = _worker(top.object("worker")) if "worker" in top else None
    custodian = _custodian(top.object("custodian")) if "custodian" in top else ("custodian", "XX")
    quorum = _quorum(top.object("quorum")) if "quorum" in top else QuorumFacts(2, 1)
    seat = top.text("seat", max_length=16) if "seat" in top else ("coordinator" if action == "submit" else "custodian")
    if seat not in ("coordinator", "custodian"):
        raise _bad(f"{what}: bad member 'seat'", "coordinator or custodian", ascii(seat))
    now = top.integer("now") if "now" in top else _NOW
    logged = top.boolean("logged") if "logged" in top else False
    operators = top.texts("operators", max_items=64) if "operators" in top else ()
    scheduled = top.boolean("scheduled") if "scheduled" in top else False
    recipient = top.text("to", max_length=16) if "to" in top else ("worker" if worker is not None else "owner")
    job = _job(top.object("job"), owner, what) if "job" in top else None
    key = _key(top.object("key")) if "key" in top else None
    cluster = top.text("cluster", max_length=64) if "cluster" in top else "demo"
    top.done()
    situation = Situation(
        seat=Seat("custodian", *custodian) if seat == "custodian" else Seat("coordinator"),
        quorum=quorum,
        now=now,
        lists=lists,
    )
    if action == "submit":
        return situation.submit(_given(job, "job", what))
    if action == "release":
        to_worker = recipient == "worker"
        return situation.release(
            _given(job, "job", what), _given(worker, "worker", what) if to_worker else None, logged=logged
        )
    if action == "enrol":
        enrolled = worker.entity if worker is not None else custodian_entity(*custodian)
        return situation.enrol(enrolled, cluster_entity(cluster), operators)
    return situation.ceremony(
        action, custodian_entity(*custodian), _given(key, "key", what), operators, scheduled=scheduled
    )


def _given(value: Any, name: str, what: str) -> Any:
    if value is None:
        raise _bad(f"{what}: member {name!r} is missing", name, "nothing")
    return value


def _worker(given: Fields) -> WorkerFacts:
    tcb = given.object("tcb") if "tcb" in given else None
    worker = WorkerFacts(
        hardware=given.text("hardware") if "hardware" in given else "hardware-1",
        region=given.text("region", max_length=64),
        provider=given.text("provider", max_length=128),
        evidence=given.texts("evidence", max_items=16),
        machine=given.text("machine", max_length=64, allow_empty=True) if "machine" in given else "",
        model=given.text("model", max_length=128, allow_empty=True) if "model" in given else "",
        products=given.texts("products", max_items=16) if "products" in given else (),
        gpu_models=given.texts("gpu_models", max_items=16) if "gpu_models" in given else (),
        tcb={} if tcb is None else {name: tcb.integer(name) for name in tcb.names()},
        development=given.boolean("development") if "development" in given else False,
    )
    given.done()
    return worker


def _custodian(given: Fields) -> tuple[str, str]:
    out = given.text("id", max_length=32), given.text("jurisdiction", max_length=2)
    given.done()
    return out


def _quorum(given: Fields) -> QuorumFacts:
    out = QuorumFacts(given.integer("custodians"), given.integer("jurisdictions"))
    given.done()
    return out


def _key(given: Fields) -> Entity:
    out = key_entity(
        given.text("name", max_length=64),
        given.integer("epoch") if "epoch" in given else 1,
        given.integer("age_seconds") if "age_seconds" in given else 0,
    )
    given.done()
    return out


def _job(given: Fields, owner: str, what: str) -> JobFacts:
    members: dict[str, Any] = {}
    for each in fields(JobFacts):
        if each.name not in given:
            continue
        if each.type == "int":
            members[each.name] = given.integer(each.name)
        elif each.type == "str":
            members[each.name] = given.text(each.name, max_length=256, allow_empty=True)
        else:
            members[each.name] = given.texts(each.name, max_items=4096, max_length=1024)
    given.done()
    members.setdefault("job_id", "job-1")
    members.setdefault("owner", owner)
    members.setdefault("classification", "")
    try:
        return JobFacts(**members)
    except MalformedError as error:
        error.details["scenario"] = what
        raise


def _bad(message: str, expected: str, actual: object) -> MalformedError:
    return MalformedError(Reason.MALFORMED, message, expected=expected, actual=actual)
