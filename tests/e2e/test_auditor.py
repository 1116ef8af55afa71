"""An auditor of a real cluster, with its roster's files and its read side only: no key, no certificate, no login.

Guarantee G3 from outside: what was released is in the log, for anybody to verify.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.ledger.tlog_proof import TlogProof
from keyquorum_core.release import Leaf
from keyquorum_core.roster import open_roster, parse_operators
from tests.support.cluster import KEY, Running


class AtTheDesk:
    """The command in a process of its own, which knows two files."""

    def __init__(self, running: Running, folder: Path) -> None:
        source = running.layout.profile.parent
        self.roster, self.operators = folder / "roster.json", folder / "operators.json"
        self.roster.write_bytes((source / "roster.json").read_bytes())
        self.operators.write_bytes((source / "operators.json").read_bytes())

    def lines(self, *line: str) -> tuple[int, list[dict[str, Any]]]:
        """Exit status and events, one a line."""
        status, text = self._run(*line)
        return status, [json.loads(each) for each in text.splitlines()]

    def __call__(self, *line: str) -> tuple[int, dict[str, Any]]:
        """Exit status and the one object printed."""
        status, text = self._run(*line)
        found: dict[str, Any] = json.loads(text)
        return status, found

    def _run(self, *line: str) -> tuple[int, str]:
        trust = ["--roster", str(self.roster), "--operators", str(self.operators)]
        done = subprocess.run(
            [sys.executable, "-c", "from keyquorum.cli import main; main()", *line, *trust, "--json"],
            capture_output=True,
            text=True,
            timeout=60,
            env={"PATH": "/usr/bin:/bin"},
        )
        assert done.stderr == ""
        return done.returncode, done.stdout


def test_every_release_of_a_job_is_in_the_log_that_anybody_can_verify(
    running: Running, job: Path, tmp_path: Path
) -> None:
    auditor = AtTheDesk(running, tmp_path)
    saved, state = str(tmp_path / "saved"), str(tmp_path / "state")
    status, before = auditor("ledger", "verify", "--save", saved)
    assert (status, before["verified"]) == (0, True)
    assert auditor("audit", "watch", "--once", "--state", state, "--key", KEY)[0] == 0

    with running.connect() as client:
        submitted = client.submit(job, key=KEY, regions=[running.region])
        client.result(submitted.id).close()
    deadline = time.monotonic() + 30
    while True:  # custodians cosign after the release
        status, proofs = auditor("ledger", "prove", submitted.id, "--out", str(tmp_path / "proofs"))
        kinds = [each["type"] for each in proofs.get("proofs", ())]
        if kinds.count("release.intent") >= 2 or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert status == 0, proofs

    trusted, threshold = parse_operators(auditor.operators.read_bytes())
    roster = open_roster(auditor.roster.read_bytes(), trusted, threshold, int(time.time()))
    assert roster.log_key is not None
    released = []
    for each in proofs["proofs"]:
        proof = TlogProof.parse(Path(each["file"]).read_bytes())
        assert proof.extra is not None
        proof.verify(leaf_hash(proof.extra), roster.log_key)
        if each["type"] == "release.intent":
            released.append(Leaf.parse(proof.extra))
    assert {(leaf.recipient, leaf.key_id, leaf.job_id) for leaf in released} == {
        ("owner", KEY, submitted.id), ("worker", KEY, submitted.id)
    }  # fmt: skip
    assert all(leaf.development for leaf in released if leaf.recipient == "worker")

    status, after = auditor("ledger", "verify", "--since", saved)
    assert (status, after["first_leaf"]) == (0, before["size"])
    assert after["leaves_read"] >= 2
    status, events = auditor.lines("audit", "watch", "--once", "--state", state, "--key", KEY)
    assert status == 1
    assert {each["recipient"] for each in events if each.get("job_id") == submitted.id} == {"owner", "worker"}


def test_a_report_and_a_copy_of_a_real_log(running: Running, tmp_path: Path) -> None:
    auditor = AtTheDesk(running, tmp_path)
    status, report = auditor("audit", "report", "--out", str(tmp_path / "report"))
    assert status == 0
    assert "unreadable" not in report["summary"]["leaves"]
    assert report["summary"]["leaves"]["ceremony"] >= 1
    assert "Log verified from its first leaf" in (tmp_path / "report/report.html").read_text()
    status, _ = auditor("ledger", "export", str(tmp_path / "copy"))
    assert status == 0
    status, verified = auditor("ledger", "verify", "--log", str(tmp_path / "copy"))
    assert (status, verified["size"]) == (0, report["size"])
