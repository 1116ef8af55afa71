"""The numbers of a report, from the facts: each a query, none of them held for the whole log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from keyquorum.audit.facts import UNREADABLE, Facts
from keyquorum_core.ledger.leaves import NOTHING, Alarm, Ceremony, Drill, JobDenied, JobSubmitted, Result, Telemetry
from keyquorum_core.release import LEAF_TYPE

__all__ = ["NOT_LOGGED", "Summary", "summarise"]

NOT_LOGGED: Final = "not in the log"
"""Classification and regions of a job that the log does not show to have been submitted."""

Table = list[tuple[str | int, ...]]

_RELEASES: Final = f"""
SELECT {{column}} AS name, count(*) FROM leaf LEFT JOIN job USING (job_id) WHERE type = '{LEAF_TYPE}'
GROUP BY name ORDER BY count(*) DESC, name
"""  # noqa: S608 - constants
_CLASSIFICATION: Final = f"coalesce(job.classification, '{NOT_LOGGED}')"
_REGIONS: Final = f"coalesce(nullif(job.regions, ''), iif(job.job_id IS NULL, '{NOT_LOGGED}', 'any'))"
_GROUPS: Final = f"""
SELECT key_id, {_CLASSIFICATION} AS classification, {_REGIONS} AS regions, sum(word = 'owner'), sum(word = 'worker'),
    sum(development)
FROM leaf LEFT JOIN job USING (job_id) WHERE type = '{LEAF_TYPE}'
GROUP BY key_id, classification, regions ORDER BY count(*) DESC, key_id, classification, regions LIMIT 200
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Summary:
    """Numbers of a period. Tables are rows in the order that a reader wants, at most 200 each."""

    totals: Mapping[str, int]
    to_owners: int
    to_workers: int
    development: int
    unlogged_jobs: int
    per_key: Mapping[str, int]
    per_classification: Mapping[str, int]
    per_region: Mapping[str, int]
    groups: Table
    """key, classification, regions that the manifest allows, to owners, to workers, on development hardware."""
    labels: tuple[str, ...]
    over_time: Mapping[str, tuple[int, ...]]
    refusals: Mapping[str, int]
    refusal_seats: Table
    """reason, seat, how many."""
    evidence: Table
    """digest, releases, first and last time, whether of development hardware."""
    evidence_documents: int
    policies: Table
    """version, digest, submissions, refusals."""
    outcomes: Mapping[str, int]
    ceremonies: Table
    """kind, done, given up."""
    drills: Table
    """drill, passed, failed, slowest in milliseconds."""
    alarms: Mapping[str, int]
    telemetry_records: int

    def as_dict(self) -> dict[str, object]:
        """For the JSON report: tables as objects."""

        def named(table: Table, *names: str) -> list[dict[str, object]]:
            return [dict(zip(names, row, strict=True)) for row in table]

        return {
            "leaves": dict(self.totals),
            "releases": {
                "to_owners": self.to_owners,
                "to_workers": self.to_workers,
                "on_development_hardware": self.development,
                "of_jobs_not_in_the_log": self.unlogged_jobs,
                "per_key": dict(self.per_key),
                "per_classification": dict(self.per_classification),
                "per_region": dict(self.per_region),
                "groups": named(
                    self.groups, "key_id", "classification", "regions", "to_owners", "to_workers", "development"
                ),
                "over_time": [
                    {"from": label, **{name: values[number] for name, values in self.over_time.items()}}
                    for number, label in enumerate(self.labels)
                ],
            },
            "refusals": {
                "by_reason": dict(self.refusals),
                "by_seat": named(self.refusal_seats, "reason", "seat", "count"),
            },
            "evidence": {
                "documents": self.evidence_documents,
                "in_use": named(self.evidence, "sha256", "releases", "first", "last", "development"),
            },
            "policies": named(self.policies, "version", "sha256", "submissions", "refusals"),
            "outcomes": dict(self.outcomes),
            "ceremonies": named(self.ceremonies, "kind", "done", "given_up"),
            "drills": named(self.drills, "drill", "passed", "failed", "slowest_ms"),
            "alarms": dict(self.alarms),
            "telemetry_records": self.telemetry_records,
        }


def _counts(table: Table) -> dict[str, int]:
    return {str(name): int(count) for name, count in table}


def summarise(facts: Facts) -> Summary:
    """All numbers of the period."""
    labels, over_time = _over_time(facts)
    released = "FROM leaf LEFT JOIN job USING (job_id) WHERE type = ?"
    to_owners, to_workers, development, unlogged = facts.query(
        "SELECT coalesce(sum(word = 'owner'), 0), coalesce(sum(word = 'worker'), 0), coalesce(sum(development), 0), "
        f"coalesce(sum(job.job_id IS NULL), 0) {released}",
        LEAF_TYPE,
    )[0]
    by_word = "SELECT word, count(*) FROM leaf WHERE type = ? GROUP BY word ORDER BY count(*) DESC, word"
    evidence = "FROM leaf WHERE type = ? AND digest != ?"
    return Summary(
        totals=_counts(facts.query("SELECT type, count(*) FROM leaf GROUP BY type ORDER BY type")),
        to_owners=int(to_owners),
        to_workers=int(to_workers),
        development=int(development),
        unlogged_jobs=int(unlogged),
        per_key=_counts(facts.query(_RELEASES.format(column="key_id"))),
        per_classification=_counts(facts.query(_RELEASES.format(column=_CLASSIFICATION))),
        per_region=_counts(facts.query(_RELEASES.format(column=_REGIONS))),
        groups=facts.query(_GROUPS),
        labels=labels,
        over_time=over_time,
        refusals=_counts(facts.query(by_word, JobDenied.TYPE)),
        refusal_seats=facts.query(
            "SELECT word, seat, count(*) FROM leaf WHERE type = ? GROUP BY word, seat "
            "ORDER BY count(*) DESC, word, seat LIMIT 200",
            JobDenied.TYPE,
        ),
        evidence=facts.query(
            f"SELECT digest, count(*), min(time), max(time), max(development) {evidence} "
            f"GROUP BY digest ORDER BY max(time) DESC, digest LIMIT 200",
            LEAF_TYPE,
            NOTHING,
        ),
        evidence_documents=int(facts.query(f"SELECT count(DISTINCT digest) {evidence}", LEAF_TYPE, NOTHING)[0][0]),
        policies=facts.query(
            "SELECT version, digest, sum(type = ?), sum(type = ?) FROM leaf WHERE type IN (?, ?) AND digest != ? "
            "GROUP BY version, digest ORDER BY version DESC, digest LIMIT 200",
            JobSubmitted.TYPE,
            JobDenied.TYPE,
            JobSubmitted.TYPE,
            JobDenied.TYPE,
            NOTHING,
        ),
        outcomes=_counts(facts.query(by_word, Result.TYPE)),
        ceremonies=facts.query(
            "SELECT word, sum(passed), sum(1 - passed) FROM leaf WHERE type = ? GROUP BY word ORDER BY word",
            Ceremony.TYPE,
        ),
        drills=facts.query(
            "SELECT word, sum(passed), sum(1 - passed), max(version) FROM leaf WHERE type = ? GROUP BY word "
            "ORDER BY word LIMIT 200",
            Drill.TYPE,
        ),
        alarms=_counts(facts.query(by_word, Alarm.TYPE)),
        telemetry_records=int(
            facts.query("SELECT coalesce(sum(version), 0) FROM leaf WHERE type = ?", Telemetry.TYPE)[0][0]
        ),
    )


def _over_time(facts: Facts) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Releases by hour, day, week, or for long periods month; none left out between."""
    first, last = facts.query("SELECT min(time), max(time) FROM leaf WHERE type != ?", UNREADABLE)[0]
    if not last:
        return (), {}
    span = int(last) - int(first)
    width = 3600 if span <= 48 * 3600 else 86400 if span <= 62 * 86400 else 7 * 86400
    sums = "sum(word = 'owner'), sum(word = 'worker') FROM leaf WHERE type = ? GROUP BY 1"
    if span > 400 * 86400:
        labels = _months(int(first), int(last))
        found = facts.query(f"SELECT strftime('%Y-%m', time, 'unixepoch'), {sums}", LEAF_TYPE)
        places = {label: number for number, label in enumerate(labels)}
    else:
        form = "%d %b %H:00" if width == 3600 else "%Y-%m-%d"
        begin = int(first) - int(first) % width
        labels = [_utc(start).strftime(form) for start in range(begin, int(last) + 1, width)]
        found = facts.query(f"SELECT (time - ?) / ?, {sums}", begin, width, LEAF_TYPE)
        places = {str(number): number for number in range(len(labels))}
    owners, workers = [0] * len(labels), [0] * len(labels)
    for place, to_owners, to_workers in found:
        owners[places[str(place)]], workers[places[str(place)]] = int(to_owners), int(to_workers)
    return tuple(labels), {"to workers": tuple(workers), "to owners": tuple(owners)}


def _utc(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _months(first: int, last: int) -> list[str]:
    out, month = [], _utc(first).replace(day=1)
    while (label := month.strftime("%Y-%m")) <= _utc(last).strftime("%Y-%m"):
        out.append(label)
        month = (month + timedelta(days=32)).replace(day=1)
    return out
