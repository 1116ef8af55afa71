"""A full drill on the local cluster, by the command, as an operator runs it: signed, proven in the ledger, readable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keyquorum.cli import run
from keyquorum_core.drill_report import KINDS
from keyquorum_core.errors import Reason
from tests.support.cluster import Running

CANARY = "drill-canary"


def operator(running: Running, capfd: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    layout = running.layout
    options = ["--profile", str(layout.profile), "--passphrase-file", str(layout.owner_passphrase), "--json"]
    capfd.readouterr()
    code = run([*arguments, *options])
    out = capfd.readouterr().out
    assert code == status, out
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_full_drill_passes_on_the_local_cluster_and_touches_no_other_key(
    running: Running, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refused = operator(running, capfd, "drill", "run", "rotation", "--key", running.key, status=1)
    assert refused["error"]["reason"] == Reason.CANARY
    with running.connect() as client:
        before = client.key(running.key)
    operator(running, capfd, "key", "create", CANARY, "--canary", "--retain", "0s")
    out = tmp_path / "drills"
    found = operator(running, capfd, "drill", "run", "full", "--key", CANARY, "--out", str(out), "--prove")
    report = found.get("report", found)
    assert report["outcome"] == "passed"
    assert {part["kind"]: part["outcome"] for part in report["parts"]} == dict.fromkeys(KINDS, "passed")
    assert report["duration_ms"] < 180_000
    assert any("full" in path.read_text() for path in out.glob("*.html"))
    listed = operator(running, capfd, "drill", "list")
    passed = {each["kind"] for each in listed["kinds"] if each["last_passed"]}
    assert passed == {*KINDS, "full"}
    with running.connect() as client:
        assert client.key(running.key) == before
