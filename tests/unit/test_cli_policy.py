"""``keyquorum policy``: shipped sets pass their scenarios, and each command is fit for a gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keyquorum.cli import run
from keyquorum.policies import SETS, compile_set, load_controls, load_source, set_scenarios
from keyquorum_core.bulletin import open_bulletin
from keyquorum_core.policy.analyze import classifications_of, dead_policies, unreleasable
from keyquorum_core.policy.bundle import PolicyBundle
from keyquorum_core.policy.lists import ControlledList
from keyquorum_core.policy.scenarios import Scenario
from keyquorum_core.quorum import Custodian, Quorum
from tests.support.custodian import PASSPHRASE, save_keys

RELEASE = 'principal is Worker, action == Action::"release", resource'
OPEN = '@id("open") permit (principal is Owner, action == Action::"release", resource);\n'
QUORUM = """
custodians:
  - {id: ch-1, jurisdiction: CH}
  - {id: de-1, jurisdiction: DE}
quorum: {at_least: 2}
"""


@pytest.mark.parametrize(
    ("name", "scenario"),
    [(name, each) for name in SETS for each in set_scenarios(name)],
    ids=lambda value: value.name if isinstance(value, Scenario) else value,
)
def test_shipped_set(name: str, scenario: Scenario) -> None:
    engine = load_source(name).engine()
    decision = engine.decide(scenario.request)
    assert (decision.outcome, decision.policies, decision.failed) == (scenario.expect, scenario.by, ())
    assert engine.decide_afresh(scenario.request) == (decision.permitted, decision.policies, decision.failed)


@pytest.mark.parametrize("name", SETS)
def test_every_control_of_a_shipped_set_is_what_decides_some_scenario(name: str) -> None:
    """No control stands in a table for legal that no test has seen deny (or permit)."""
    decided = {policy for each in set_scenarios(name) for policy in each.by or ()}
    controls = {policy.rpartition(".")[2] for policy in decided}
    for policy in load_source(name).policies.ids:
        _, _, control = policy.partition(".")
        assert policy in decided or control.rpartition(".")[2] in controls, policy


@pytest.mark.parametrize("name", SETS)
def test_no_policy_of_a_shipped_set_is_dead_and_some_quorum_releases_every_classification(name: str) -> None:
    policies = load_source(name).policies
    assert dead_policies(policies) == []
    ids = ("ch-1", "ch-2", "de-1", "is-1", "jp-1")
    quorum = Quorum({"at_least": 3, "jurisdictions": 2}, [Custodian(each, each[:2].upper()) for each in ids])
    found = classifications_of([policies])
    assert found == tuple(row.classification for row in load_controls(name).rows)
    assert unreleasable(dict.fromkeys(ids, policies), quorum, found) == []


def test_check_says_what_policies_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.cedar").write_text(OPEN)
    assert run(["policy", "check", str(tmp_path), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["policies"] == [{"policy": "open", "effect": "permit", "actions": ["release"], "file": "a.cedar"}]
    assert run(["policy", "check", str(tmp_path)]) == 0
    assert "1 policies fit the schema" in capsys.readouterr().out


def test_check_refuses_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.cedar"
    bad.write_text(f'@id("a") permit ({RELEASE}) when {{ principal.regoin == "eu" }};')
    assert run(["policy", "check", str(bad), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["reason"], error["details"]["policy"]) == ("POLICY", "a")
    assert run(["policy", "check", str(tmp_path / "nowhere")]) == 1
    assert run(["policy", "check", str(tmp_path / "no.yaml")]) == 1
    (tmp_path / "empty").mkdir()
    assert run(["policy", "check", str(tmp_path / "empty")]) == 1


def test_test_is_a_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies, table = tmp_path / "a.cedar", tmp_path / "t.yaml"
    policies.write_text(OPEN)
    scenario = "{name: one, to: owner, owner: alice, job: {classification: x}, expect: EXPECT}"
    table.write_text(f"scenarios: [{scenario.replace('EXPECT', 'permit')}]")
    assert run(["policy", "test", str(policies), "--scenarios", str(table)]) == 0
    assert "1 of 1 scenarios" in capsys.readouterr().out
    table.write_text(f"scenarios: [{scenario.replace('EXPECT', 'deny')}]")
    assert run(["policy", "test", str(policies), "--scenarios", str(table)]) == 1
    out = capsys.readouterr().out
    assert "expected deny" in out
    assert "got      permit by open" in out
    assert run(["policy", "test", str(policies), "--scenarios", str(table), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    assert run(["policy", "test", str(policies)]) == 2
    assert run(["policy", "test", "residency-eu"]) == 0


def test_explain_shows_the_condition_that_failed_with_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["policy", "explain", "residency-eu", "--scenario", "Switzerland is not in the EEA"]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert "deny, by personal.region" in out
    assert "[principal.region = CH]" in out
    assert "--all shows them" in out
    assert run([*arguments, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    (matched,) = [each for each in found["policies"] if each["matched"] and each["effect"] == "forbid"]
    assert matched["conditions"][-1]["values"] == {"principal.region": "CH"}
    assert run(["policy", "explain", "residency-eu", "--scenario", "nothing of the kind"]) == 1


def test_analyze_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swiss, german, quorum = tmp_path / "ch.cedar", tmp_path / "de.cedar", tmp_path / "q.yaml"
    quorum.write_text(QUORUM)
    for file, region in ((swiss, "CH"), (german, "DE")):
        condition = f'resource.classification == "personal" && principal.region == "{region}"'
        file.write_text(OPEN + f'@id("personal") permit ({RELEASE}) when {{ {condition} }};')
    both = [f"ch-1={swiss}", f"de-1={german}"]
    assert run(["policy", "analyze", *both, "--quorum", str(quorum), "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    assert (found["kind"], found["about"], found["proven"]) == ("never-released", "personal", True)
    assert run(["policy", "analyze", f"ch-1={swiss}", f"de-1={swiss}", "--quorum", str(quorum)]) == 0
    assert run(["policy", "analyze", str(swiss), "--quorum", str(quorum)]) == 1
    assert run(["policy", "analyze", f"xx-1={swiss}", "--quorum", str(quorum)]) == 1
    swiss.write_text(f'@id("dead") permit ({RELEASE}) when {{ resource.cpus > 3 && resource.cpus < 2 }};')
    capsys.readouterr()
    assert run(["policy", "analyze", str(swiss)]) == 1
    assert "never-matches dead" in capsys.readouterr().out


def test_controls_are_listed_shown_and_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["policy", "controls", "list", "--json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == list(SETS)
    assert run(["policy", "controls", "list"]) == 0
    assert run(["policy", "controls", "show", "export-controlled"]) == 0
    assert "| controlled-technology | CH, DE" in capsys.readouterr().out
    out = tmp_path / "out"
    assert run(["policy", "controls", "compile", "residency-eu", "--out", str(out)]) == 0
    texts = {path.name: path.read_text() for path in out.glob("*.cedar")}
    assert texts == compile_set("residency-eu")
    assert (out / "CONTROLS.md").read_text().startswith("## Data that stays")
    assert run(["policy", "controls", "compile", "residency-eu", "--out", str(out)]) == 1
    assert run(["policy", "controls", "show", "nowhere"]) == 1


def test_a_bundle_is_signed_for_one_seat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    olga = save_keys(tmp_path, "olga", "operator")
    monkeypatch.setenv("KEYQUORUM_PASSPHRASE", PASSPHRASE)
    common = ["--cluster", "demo", "--version", "4", "--operator-key", str(tmp_path / "olga.key.json")]
    out = tmp_path / "policy.json"
    arguments = ["policy", "sign", "residency-eu", *common, "--custodian", "ch-1", "--custodian", "is-1"]
    assert run([*arguments, "--out", str(out), "--json"]) == 0
    signers = {"olga": olga.identity.public}
    bulletin = open_bulletin(out.read_bytes(), "policy", signers, 1, _now(), cluster="demo")
    assert json.loads(capsys.readouterr().out)["digest"] == bulletin.digest
    bundle = PolicyBundle.read(bulletin.body)
    assert (bundle.seat, bundle.custodians, bulletin.version) == ("custodian", ("ch-1", "is-1"), 4)
    assert bundle.files == compile_set("residency-eu")
    assert load_source(str(out)).custodians == ("ch-1", "is-1")
    assert run([*arguments, "--out", str(out)]) == 1

    names = tmp_path / "names.yaml"
    names.write_text("entries: [{kind: owner, name: mallory, classes: []}]")
    listed = tmp_path / "sanctions-list.json"
    assert run(["policy", "sign-list", "sanctions", str(names), *common, "--out", str(listed)]) == 0
    found = open_bulletin(listed.read_bytes(), "sanctions-list", signers, 1, _now(), cluster="demo")
    assert ControlledList.read(found.body, 4).lists("owner", "mallory", "")
    assert run(["policy", "check", str(listed)]) == 1
    assert run(["policy", "sign-list", "friends", str(names), *common, "--out", str(tmp_path / "f.json")]) == 1


def _now() -> int:
    import time

    return int(time.time())
