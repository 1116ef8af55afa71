"""``keyquorum-custodian ledger alarms | clear``: at a custodian that runs, and in the folder of one that doesn't."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from keyquorum_core.errors import KeyquorumError
from tests.support.custodian import PASSPHRASE, Committee, CustodianProcess, build_committee, start_custodian_process

ME = "ch-1"


@pytest.fixture
def alarmed(tmp_path: Path) -> Iterator[Committee]:
    """A committee one custodian of which holds proof of a fork."""
    committee = build_committee(tmp_path, metrics=True)
    committee.generate()
    committee.owner_request()
    witness = committee.nodes[ME].witness
    with pytest.raises(KeyquorumError):
        witness.update(committee.ledger.fork(0).update(1))
    committee.close()
    yield committee
    committee.close()


@pytest.fixture
def process(alarmed: Committee) -> Iterator[CustodianProcess]:
    started = start_custodian_process(alarmed.directory(ME))
    yield started
    started.stop()


def command(committee: Committee, *arguments: str, passphrase: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "KEYQUORUM_PASSPHRASE"}
    if passphrase:
        environment["KEYQUORUM_PASSPHRASE"] = passphrase
    return subprocess.run(
        [sys.executable, "-m", "keyquorum_custodian", *arguments, "--dir", str(committee.directory(ME))],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_a_running_custodian_shows_an_alarm_everywhere_until_it_is_cleared(
    alarmed: Committee, process: CustodianProcess
) -> None:
    shown = command(alarmed, "ledger", "alarms")
    assert shown.returncode == 1, "an open alarm is a failure for scripts"
    assert "alarm 1: fork" in shown.stdout
    assert "OPEN" in shown.stdout
    found = json.loads(command(alarmed, "ledger", "alarms", "--json").stdout)["alarms"]
    assert [(each["number"], each["kind"], each["cleared_at"]) for each in found] == [(1, "fork", 0)]
    roots = {each["known"].split("\n")[2] for each in found} | {each["shown"].split("\n")[2] for each in found}
    assert len(roots) == 2, "both signed checkpoints are there, whole"
    status = json.loads(command(alarmed, "status", "--json").stdout)
    assert status["ledger_alarms"] == 1
    assert any("LEDGER ALARM 1" in warning for warning in status["warnings"])
    assert "LEDGER ALARM" in command(alarmed, "status").stdout
    assert "LEDGER ALARM" in process.log.read_text()
    assert "keyquorum_custodian_ledger_alarms 1.0" in metrics(process)

    for arguments in (("1", "--why", " "), ("2", "--why", "no such alarm"), ("-- -1", "--why", "x")):
        assert command(alarmed, "ledger", "clear", *arguments).returncode in (1, 2)
    cleared = command(alarmed, "ledger", "clear", "1", "--why", "the log was rebuilt; operators agreed", "--json")
    assert cleared.returncode == 0
    assert json.loads(cleared.stdout)["alarms"][0]["why"] == "the log was rebuilt; operators agreed"
    assert command(alarmed, "ledger", "clear", "1", "--why", "again").returncode == 1
    after = command(alarmed, "ledger", "alarms")
    assert after.returncode == 0
    assert "cleared" in after.stdout
    assert json.loads(command(alarmed, "status", "--json").stdout)["ledger_alarms"] == 0
    assert "keyquorum_custodian_ledger_alarms 0.0" in metrics(process)


def metrics(process: CustodianProcess) -> str:
    with urllib.request.urlopen(f"http://{process.metrics_address}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_the_folder_of_a_custodian_that_does_not_run(alarmed: Committee) -> None:
    online = command(alarmed, "ledger", "alarms", "--json")
    assert (online.returncode, json.loads(online.stdout)["error"]["reason"]) == (1, "UNAVAILABLE")
    wrong = command(alarmed, "ledger", "alarms", "--offline", "--json", passphrase="wrong")
    assert json.loads(wrong.stdout)["error"]["reason"] == "PASSPHRASE"
    found = command(alarmed, "ledger", "alarms", "--offline", "--json", passphrase=PASSPHRASE)
    assert found.returncode == 1
    assert json.loads(found.stdout)["alarms"][0]["kind"] == "fork"
    cleared = command(alarmed, "ledger", "clear", "1", "--why", "seen", "--offline", passphrase=PASSPHRASE)
    assert cleared.returncode == 0, cleared.stderr
    assert "cleared" in cleared.stdout
    (alarm,) = alarmed.open(ME, shown=False).witness.alarms()
    assert alarm.why == "seen"
    assert alarmed.nodes[ME].witness.open_alarms == ()
