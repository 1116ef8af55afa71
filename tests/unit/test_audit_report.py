"""``keyquorum audit report``: what it counts is what the log says, and each leaf in it is proven."""

from __future__ import annotations

import base64
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from keyquorum.audit import charts
from keyquorum.audit.facts import Facts
from keyquorum.audit.summary import NOT_LOGGED, summarise
from keyquorum.cli import run
from keyquorum.cli.auditor import moment
from keyquorum_core.ledger.leaves import JobDenied, JobSubmitted, parse_leaf
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_core.release import Leaf
from tests.support.audit_leaves import DAY, a_month
from tests.support.auditing import Desk, desk

END = int(time.time())
MONTH = a_month(END)
HOSTILE = b'{"type":"</pre><script>alert(1)</script>","x":"\x1b[2J"}'


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return desk(tmp_path_factory.mktemp("audited"), [*MONTH, HOSTILE])


@pytest.fixture(scope="module")
def made(audited: Desk) -> Path:
    out = audited.folder / "report"
    assert run(["audit", "report", *audited.offline, "--out", str(out)]) == 0
    return out


def written(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return parsed


def test_numbers_are_those_of_the_leaves(made: Path) -> None:
    leaves = [parse_leaf(leaf) for leaf in MONTH]
    releases = [leaf for leaf in leaves if isinstance(leaf, Leaf)]
    denied = [leaf for leaf in leaves if isinstance(leaf, JobDenied)]
    classes = {leaf.job_id: leaf.classification for leaf in leaves if isinstance(leaf, JobSubmitted)}
    summary = written(made)["summary"]
    found = summary["releases"]
    assert found["to_workers"] == sum(leaf.recipient == "worker" for leaf in releases)
    assert found["to_owners"] == sum(leaf.recipient == "owner" for leaf in releases)
    assert found["on_development_hardware"] == sum(leaf.development for leaf in releases) > 0
    assert found["of_jobs_not_in_the_log"] == 0
    for key, count in found["per_key"].items():
        assert count == sum(leaf.key_id == key for leaf in releases)
    for name, count in found["per_classification"].items():
        assert count == sum(classes[leaf.job_id] == name for leaf in releases)
    assert found["per_region"] == {
        {"restricted": "CH", "confidential": "CH, DE", "research": "eu"}[name]: count
        for name, count in found["per_classification"].items()
    }
    assert sum(row["to_owners"] + row["to_workers"] for row in found["groups"]) == len(releases)
    over_time = found["over_time"]
    assert sum(row["to workers"] + row["to owners"] for row in over_time) == len(releases)
    assert 28 <= len(over_time) <= 31
    assert sum(summary["refusals"]["by_reason"].values()) == len(denied)
    assert sum(row["count"] for row in summary["refusals"]["by_seat"]) == len(denied)
    used = {leaf.evidence_sha256 for leaf in releases if leaf.recipient == "worker"}
    assert {row["sha256"] for row in summary["evidence"]["in_use"]} == used
    assert summary["evidence"]["documents"] == len(used)
    assert summary["policies"][0]["submissions"] == len(classes)
    assert (summary["alarms"], summary["leaves"]["unreadable"]) == ({"log-stalled": 1}, 1)
    assert {row["kind"]: (row["done"], row["given_up"]) for row in summary["ceremonies"]} == {
        "generate": (3, 0), "rotate": (1, 1)
    }  # fmt: skip
    assert {row["drill"]: row["passed"] for row in summary["drills"]} == {
        "coordinator-killed": 0, "custodian-down": 1, "jurisdiction-lost": 1
    }  # fmt: skip


def test_every_row_is_a_leaf_with_a_proof_that_verifies_alone(made: Path, audited: Desk) -> None:
    report = written(made)
    checkpoint = report["verified"]["checkpoint"].encode()
    listed = {"alarm", "job.denied", "release.intent", "ceremony", "drill", "revocation", "roster"}
    expected = [n for n, leaf in enumerate(MONTH) if json.loads(leaf)["type"] in listed] + [len(MONTH)]
    assert [row["index"] for row in report["rows"]] == expected
    for row in report["rows"]:
        leaf = row["leaf"].encode()
        assert leaf == audited.log.leaves[row["index"]]
        proof = TlogProof(row["index"], tuple(base64.b64decode(each) for each in row["proof"]), checkpoint)
        audited.world.trust.check(proof.verify(leaf_hash(leaf), audited.world.trust.log), now=int(time.time()))


class Outline(HTMLParser):
    """Tags balance, and what a page could fetch or run is listed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetches: list[tuple[str, str, str]] = []
        self.tags: dict[str, int] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)
        values = dict(attributes)
        for name in ("src", "href", "srcset", "action", "xlink:href", "style", "onclick", "onload"):
            if name in values:
                self.fetches.append((tag, name, values[name] or ""))
        if tag == "svg":
            assert values["role"] == "img"
            assert values["aria-label"]
        if tag == "th":
            assert values["scope"] == "col"

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(made: Path) -> None:
    page = (made / "report.html").read_text()
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert {(tag, name) for tag, name, _ in outline.fetches} == {("a", "href")}
    targets = [value for _, _, value in outline.fetches]
    assert all(value.startswith("#") and f'id="{value[1:]}"' in page for value in targets)
    assert outline.tags["svg"] == 5
    assert not {"script", "link", "img", "iframe", "object"} & set(outline.tags)
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_what_the_log_says_is_text_to_the_page(made: Path) -> None:
    page = (made / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "1 leaf of the log of no known form" in page


def test_the_page_shows_proofs_that_can_be_saved(made: Path, audited: Desk) -> None:
    page = (made / "report.html").read_text()
    heads = re.findall(r"<pre>(c2sp\.org/tlog-proof@v1\nindex (\d+)(?:\n[A-Za-z0-9+/=]{44})*)</pre>", page)
    checkpoint = re.findall(r"<pre>([^<]*\n\n— [^<]*)</pre>", page)[-1]
    assert len(heads) == sum(row["index"] >= 0 for row in written(made)["rows"])
    for head, index in heads:
        proof = TlogProof.parse(f"{head}\n\n{checkpoint}".encode())
        proof.verify(leaf_hash(audited.log.leaves[int(index)]), audited.world.trust.log)


def test_only_the_period_counts(audited: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["audit", "report", *audited.offline, "--out", str(tmp_path), "--json"]
    assert run([*line, "--from", str(END - 20 * DAY), "--to", str(END - 10 * DAY)]) == 0
    shown = json.loads(capsys.readouterr().out)
    inside = [leaf for leaf in MONTH if END - 20 * DAY <= json.loads(leaf)["time"] < END - 10 * DAY]
    assert sum(shown["summary"]["leaves"].values()) == len(inside) + 1  # and the one without a time
    report = written(tmp_path)
    assert report["leaves_before"] + report["leaves_after"] == len(MONTH) - len(inside)
    assert shown["rows"] == len(report["rows"])
    assert sum(report["summary"]["releases"]["per_classification"].values()) > 0
    assert NOT_LOGGED not in report["summary"]["releases"]["per_classification"]
    assert run([*line, "--from", "2020-01-01", "--to", "2020-02-01"]) == 0
    assert "None in this period" in (tmp_path / "report.html").read_text()


def test_a_release_of_a_job_that_the_log_does_not_show_is_named(tmp_path: Path) -> None:
    leaf = Leaf("a" * 26, "0" * 64, "0" * 64, Leaf.NO_EVIDENCE, "demo", 1, END - 60, "owner").to_bytes()
    at = desk(tmp_path, [leaf])
    assert run(["audit", "report", *at.offline, "--out", str(tmp_path / "out")]) == 0
    found = written(tmp_path / "out")["summary"]["releases"]
    assert (found["of_jobs_not_in_the_log"], found["per_region"]) == (1, {NOT_LOGGED: 1})
    assert "1 release of jobs whose submission the log does not show" in (tmp_path / "out/report.html").read_text()


def test_a_log_that_does_not_verify_gives_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = desk(tmp_path, MONTH[:300])
    bundle = tmp_path / "log/tile/entries/000"
    data = bytearray(bundle.read_bytes())
    data[1000] ^= 1
    bundle.write_bytes(bytes(data))
    assert run(["audit", "report", *at.offline, "--out", str(tmp_path / "out"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "LEDGER_PROOF"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_log_that_makes_up_its_time_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = desk(tmp_path)
    signed = at.world.cosign(at.world.signer.sign(0, at.log.root(), 1 << 62), END, ["ch-1", "de-1", "fr-1"])
    (tmp_path / "log/checkpoint").write_bytes(signed.encode())
    assert run(["audit", "report", *at.offline, "--out", str(tmp_path / "out")]) == 0
    assert "4611686018427387904 s after 1970" in (tmp_path / "out/report.html").read_text()
    assert run(["ledger", "checkpoint", *at.offline]) == 0
    assert "4611686018427387904" in capsys.readouterr().out


def test_an_empty_log_has_an_empty_report(tmp_path: Path) -> None:
    at = desk(tmp_path)
    assert run(["audit", "report", *at.offline, "--out", str(tmp_path / "out")]) == 0
    assert written(tmp_path / "out")["rows"] == []


def test_wrong_periods_are_wrong_usage(audited: Desk, tmp_path: Path) -> None:
    line = ["audit", "report", *audited.offline, "--out", str(tmp_path / "out")]
    assert run([*line, "--from", "yesterday"]) == 2
    assert run([*line, "--from", "2026-02-01", "--to", "2026-01-01"]) == 2
    (tmp_path / "file").write_text("")
    assert run([*line[:-1], str(tmp_path / "file" / "out")]) == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("1800000000", 1_800_000_000),
        ("2027-01-15", 1_799_971_200),
        ("2027-01-15T08:00:00", 1_800_000_000),
        ("2027-01-15T09:00:00+01:00", 1_800_000_000),
        ("90m", 1_800_000_000 - 5400),
        ("2d", 1_800_000_000 - 2 * DAY),
    ],
)
def test_moments(text: str, seconds: int) -> None:
    assert moment(text, 1_800_000_000, "--from") == seconds


@pytest.mark.parametrize("span", [0, 3600, 40 * DAY, 200 * DAY, 900 * DAY])
def test_releases_are_counted_by_hour_day_week_or_month(tmp_path: Path, span: int) -> None:
    facts = Facts(tmp_path, 0, 1 << 40)
    times = [1_790_000_000 + span * number // 9 for number in range(10)]
    owner = ("a" * 26, "0" * 64, "0" * 64, Leaf.NO_EVIDENCE, "demo", 1)
    facts.add(0, tuple(Leaf(*owner, when, "owner").to_bytes() for when in times))
    found = summarise(facts)
    facts.close()
    assert sum(found.over_time["to owners"]) == 10
    assert len(set(found.labels)) == len(found.labels) <= 62


def test_steps_are_round_and_reach_the_top() -> None:
    for most in range(1, 3000):
        step = charts.nice_step(most)
        assert step * 4 >= most
        assert re.fullmatch("[125]0*", str(step))


def test_charts_escape_and_add_up_what_is_too_much() -> None:
    assert charts.bars("none", {}) == ""
    assert charts.columns("none", (), {"a": ()}) == ""
    many = charts.bars("many", {f"<{number}>": number for number in range(1, 31)})
    assert "&lt;30&gt;" in many
    assert "19 others" in many
    assert "<30>" not in many
    assert many.count("<rect") == 12
    assert 'height="0.0"' not in charts.columns("a", ("x", "y"), {"one": (0, 3), "two": (1, 0)})
