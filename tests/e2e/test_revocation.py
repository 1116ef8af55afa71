"""Operators revoke, and the whole cluster goes by it: what runs stops, the ledger shows it, and lifting undoes it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from keyquorum.cli import run
from keyquorum_core.bulletin import peek_bulletin
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_local.layout import Layout
from tests.support.cluster import Running, eventually


def operator(running: Running, capfd: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    layout = running.layout
    options = ["--profile", str(layout.profile), "--passphrase-file", str(layout.owner_passphrase), "--json"]
    capfd.readouterr()
    assert run([*arguments, *options]) == status
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def hardware_of(layout: Layout) -> str:
    """The only machine there is, as the inventory names it."""
    custodian = layout.custodian(layout.custodians[0][0])
    envelope = (custodian / "bulletins" / "inventory.json").read_bytes()
    body: dict[str, Any] = dict(peek_bulletin(envelope).body)
    (machine,) = body["machines"]
    return f"sev-snp:{machine['hardware']['sev-snp'][0]}"


def test_a_machine_revoked_in_the_middle_of_a_job_stops_and_serves_again_once_lifted(
    running: Running, job: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (job / "input.json").write_text('{"text": "until it is revoked", "seconds": 8}')
    hardware = hardware_of(running.layout)
    with running.connect() as client:
        submitted = client.submit(job, key=running.key, regions=[running.region])
        eventually(lambda: client.job(submitted.id).state == "running", "the job runs")
        made = operator(running, capfd, "revoke", "hardware", hardware, "--reason", "stolen from the rack")
        try:
            assert made["jobs"] == [submitted.id]
            assert {each["version"] for each in made["custodians"]} == {made["version"]}
            # The worker stops and wipes; its job waits, and the machine gets none.
            eventually(lambda: client.job(submitted.id).state == "ready", "the job waits for another worker")
            eventually(lambda: _said(running, "job lost"), "the worker stopped the job")
            assert operator(running, capfd, "revoke", "list")["revoked"][0]["subject"] == hardware
            eventually(lambda: _in_ledger(running, hardware) == 1, "the ledger shows it")
            again = operator(running, capfd, "revoke", "hardware", hardware, "--reason", "twice", status=1)
            assert again["error"]["reason"] == "EXISTS"
        finally:
            operator(running, capfd, "revoke", "hardware", hardware, "--reason", "it was found", "--lift")
        result = client.result(submitted.id)
        assert json.loads(result.files["result.json"]) == {"echo": "until it is revoked"}


def test_a_revoked_job_is_over_for_everybody(running: Running, job: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (job / "input.json").write_text('{"text": "nobody reads this", "seconds": 30}')
    with running.connect() as client:
        submitted = client.submit(job, key=running.key, regions=[running.region])
        eventually(lambda: client.job(submitted.id).state == "running", "the job runs")
        made = operator(running, capfd, "job", "revoke", submitted.id, "--reason", "the owner asked for it")
        assert made["jobs"] == [submitted.id]
        assert client.job(submitted.id).state == "cancelled"
        with pytest.raises(KeyquorumError) as caught:
            client.result(submitted.id)
        assert caught.value.reason in (Reason.REVOKED, Reason.STATE, Reason.JOB_FAILED)
        # What others run is untouched.
        (job / "input.json").write_text('{"text": "another one"}')
        other = client.submit(job, key=running.key, regions=[running.region])
        assert json.loads(client.result(other.id).files["result.json"]) == {"echo": "another one"}


def _in_ledger(running: Running, subject: str) -> int:
    """Leaves in the log's own database about the subject."""
    digest = hashlib.sha256(subject.encode()).hexdigest()
    with contextlib.closing(sqlite3.connect(running.layout.coordinator / "ledger.db")) as database:
        rows = database.execute("SELECT leaf FROM ledger_leaves").fetchall()
    return sum(digest in bytes(data).decode() for (data,) in rows)


def _said(running: Running, text: str) -> bool:
    return text in running.cluster.worker.log.read_text()
