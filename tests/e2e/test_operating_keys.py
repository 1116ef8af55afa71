"""Operators' commands on a real cluster: rotate, repair, replace, destroy, approve; rosters that follow one another."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core.errors import StateError
from keyquorum_core.keywrap import load_keys
from keyquorum_core.transcript import transcript
from tests.support.cluster import deciding, eventually, operator_of
from tests.support.operated import Operated, operated

ALL = ("ch-1", "ch-2", "de-1", "is-1", "jp-1")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    with operated(tmp_path_factory.mktemp("operated") / "local") as found:
        yield found


def leaves(running: Operated, kind: str, key: str) -> list[dict[str, Any]]:
    with contextlib.closing(sqlite3.connect(running.layout.coordinator / "ledger.db")) as database:
        rows = [json.loads(bytes(leaf)) for (leaf,) in database.execute("SELECT leaf FROM ledger_leaves")]
    return [each for each in rows if each["type"] == "ceremony" and (each["kind"], each["key_id"]) == (kind, key)]


def epochs(running: Operated, key: str) -> dict[int, str]:
    with running.connect() as client:
        return {each.epoch: each.state for each in client.key_epochs(key)}


def test_a_key_is_rotated_under_a_job_and_its_old_epoch_ends_when_the_job_has(running: Operated, job: Path) -> None:
    made = running.client("key", "create", "k1", "--retain", "never")
    assert (made["epoch"], made["custodians"]) == (1, list(ALL))
    (job / "input.json").write_text('{"text": "begun on epoch 1", "seconds": 14}')
    with running.connect() as client:
        submitted = client.submit(job, key="k1", regions=[running.region])
        eventually(lambda: client.job(submitted.id).state == "running", "the job runs")
        rotated = running.client("key", "rotate", "k1")
        assert rotated["epoch"] == 2
        shown = running.client("key", "show", "k1")
        assert [(each["epoch"], each["state"]) for each in shown["epochs"]] == [(2, "active"), (1, "retired")]
        assert [client.key("k1", epoch).epoch for epoch in (None, 1, 2)] == [2, 1, 2]
        listed = client.keys()
        assert [each.epoch for each in listed if each.key_id == "k1"] == [2]
        for key, epoch, reason, expected in (("k1", 3, "EPOCH", "2, 1"), ("none", 1, "UNKNOWN_KEY", "")):
            with pytest.raises(StateError) as caught:
                client.key(key, epoch)
            assert (caught.value.reason, caught.value.expected) == (reason, expected)
        status = running.client("cluster", "status")
        mine = [each for each in status["keys"] if each["key_id"] == "k1"]
        assert [(each["epoch"], each["survival"]["losses"]) for each in mine] == [(2, 2), (1, 2)]
        result = client.result(submitted.id)
        assert json.loads(result.files["result.json"]) == {"echo": "begun on epoch 1"}
        assert client.job(submitted.id).epoch == 1
    eventually(lambda: epochs(running, "k1") == {1: "destroyed", 2: "active"}, "epoch 1 is destroyed", 60)
    (ended,) = (each for each in running.client("key", "ceremonies", "k1")["ceremonies"] if each["kind"] == "destroy")
    assert (ended["step"], ended["epoch"], ended["error"]) == ("done", 1, None)
    eventually(lambda: bool(leaves(running, "destroy", "k1")), "the ledger shows the destruction")
    (rotation,) = leaves(running, "rotate", "k1")
    assert rotation["certificate_sha256"] == rotated["certificate_sha256"]


def test_destruction_waits_for_each_operator_over_a_restart_and_leaves_receipts(running: Operated) -> None:
    running.client("key", "create", "k2")
    refused = running.client("key", "destroy", "k2", "--epoch", "1", "--yes", status=1)["error"]
    assert refused["reason"] == "SIGNATURE_MISSING"  # the roster asks for two operators
    refused = running.client("key", "destroy", "k2", "--epoch", "1", status=1)["error"]
    assert (refused["reason"], refused["message"]) == ("APPROVAL", "nobody is at a terminal to confirm")
    per = str(running.operator_keys[1])
    ordered = running.later("key", "destroy", "k2", "--epoch", "1", "--yes", "--operator-key", per)
    running.wait_asked("ch-1")
    (request,) = running.pending("ch-1")
    assert request["kind"] == "destroy"
    assert any("k2" in line for line in request["difference"])
    (waiting,) = running.client("cluster", "status")["ceremonies"]
    assert (waiting["kind"], "ch-1" in waiting["waiting"]) == ("destroy", True)
    wrong = running.custodian("ch-1", "approve", "ab" * 16, "--yes", status=1)["error"]
    assert (wrong["reason"], wrong["expected"]) == ("NOT_FOUND", request["request_id"])
    nobody = running.custodian("ch-1", "approve", request["request_id"], status=1)["error"]
    assert (nobody["reason"], nobody["message"]) == ("APPROVAL", "nobody is at a terminal to confirm")
    running.restart(running.cluster.custodians["ch-1"])
    assert running.pending("ch-1") == [request]
    running.approve(*ALL)
    ended = ordered.result(60)
    assert (ended["receipts"], ended["key"]) == (list(ALL), None)
    assert not running.pending("ch-1")
    assert epochs(running, "k2") == {1: "destroyed"}
    eventually(lambda: bool(leaves(running, "destroy", "k2")), "the ledger shows it")
    # The leaf is the digest of exactly the receipts that each custodian signed.
    with contextlib.closing(sqlite3.connect(running.layout.coordinator / "coordinator.db")) as database:
        found = database.execute(
            "SELECT custodian, receipt FROM ceremony_receipts WHERE ceremony_id = ? ORDER BY custodian",
            (ended["ceremony_id"],),
        ).fetchall()
    payloads = [_payload(bytes(receipt)) for _, receipt in found]
    assert [json.loads(each)["custodian"] for each in payloads] == list(ALL)
    digest = hashlib.sha256(transcript("keyquorum/v1/receipts", *payloads)).hexdigest()
    (leaf,) = leaves(running, "destroy", "k2")
    assert leaf["certificate_sha256"] == digest


def _payload(envelope: bytes) -> bytes:
    import base64

    return base64.b64decode(json.loads(envelope)["payload"])


def test_one_operator_s_no_stops_it_and_is_told_with_its_name(running: Operated) -> None:
    running.client("key", "create", "k3")
    ordered = running.later("key", "rotate", "k3", "--renew", status=1)
    running.wait_asked("jp-1")
    (request,) = running.pending("jp-1")
    assert running.custodian("jp-1", "approve", request["request_id"], "--reject", "--yes")["decision"] == "rejected"
    error = ordered.result(60)["error"]
    assert error["reason"] == "APPROVAL"
    assert "jp-1" in error["message"]
    assert "rejected" in error["message"]
    assert epochs(running, "k3") == {1: "active"}
    running.custodian("ch-2", "seal")
    with running.connect() as client:
        eventually(lambda: {each.custodian: each.why for each in client.status().custodians}["ch-2"] == "sealed",
                   "ch-2 is seen to be sealed")  # fmt: skip
        sealed = client.status()
        assert sealed.healthy
        assert all(each.lacking == {"ch-2": "sealed"} for each in sealed.keys if each.active)
    running.custodian("ch-2", "unseal", "--passphrase-file", str(running.layout.passphrase("ch-2")))
    # One that waits is cancelled, with the reason told to whoever ordered it.
    ordered = running.later("key", "rotate", "k3", "--renew", status=1)
    running.wait_asked("ch-2")
    live = next(each for each in running.client("key", "ceremonies", "k3")["ceremonies"] if each["step"] == "propose")
    given_up = running.client("key", "cancel", live["ceremony_id"], "--why", "not today")
    assert given_up["step"] == "cancelled"
    assert "not today" in ordered.result(60)["error"]["message"]
    assert not running.pending("ch-2")
    assert running.client("key", "cancel", "ab" * 16, status=1)["error"]["reason"] == "NOT_FOUND"
    assert running.client("key", "rotate", "k3")["epoch"] == 2
    repaired = running.client("key", "repair", "k3", "--custodian", "ch-1", status=1)["error"]
    assert (repaired["reason"], "nothing to rebuild" in repaired["message"]) == ("EXISTS", True)


def test_a_custodian_s_own_policy_stops_what_operators_ordered_and_is_named(running: Operated) -> None:
    for key in ("k5", "k6"):
        running.client("key", "create", key)
    law = '@id("swiss.freeze") forbid (principal, action == Action::"rotate", resource) when { resource.name == "k5" };'
    with deciding(running, operator_of(running), law, "ch-1"):
        error = running.client("key", "rotate", "k5", status=1)["error"]
        assert error["reason"] == "POLICY"
        assert all(each in error["message"] for each in ("ch-1", "propose", "swiss.freeze"))
        assert epochs(running, "k5") == {1: "active"}
        assert running.client("key", "rotate", "k6")["epoch"] == 2  # what it says nothing of goes on
    assert running.client("key", "rotate", "k5")["epoch"] == 2


def test_a_lost_custodian_is_replaced_under_its_id_and_a_job_outlives_another_rule(
    running: Operated, job: Path, tmp_path: Path
) -> None:
    layout, cluster = running.layout, running.cluster
    ops = load_keys(running.operator_keys[0].read_bytes(), layout.owner_passphrase.read_text()).identity
    running.client("key", "create", "k4")
    per = str(running.operator_keys[1])

    # de-1 is lost, and set up anew on another disk: another identity under the same id.
    cluster.custodians["de-1"].kill()
    shutil.move(layout.custodian("de-1"), tmp_path / "lost")
    card = running.enrol("de-1", "DE", "ch-1", ops)
    signed = running.change_roster("--card", str(card))
    alone = next(layout.root.glob("made-*[0-9].json"))
    unsigned = running.client("roster", "follow", str(alone), status=1)["error"]
    assert unsigned["reason"] == "SIGNATURE_MISSING"
    running.install_roster(signed)
    cluster.custodians["de-1"] = cluster._custodian("de-1")
    running.restart(*cluster.processes)
    with running.connect() as client:
        assert not client.status().roster_pinned
    followed = running.client("roster", "follow", str(signed))
    assert (followed["version"], followed["signed_by"]) == (2, ["ops", "per"])
    eventually(lambda: _lacks(running, "k4", "de-1"), "de-1 is known to be stale")
    wrong = running.client("key", "repair", "k4", "--custodian", "de-1", status=1)["error"]
    assert "a plan to replace it" in wrong["expected"] or "replace" in wrong["message"] + str(wrong["details"])
    ordered = running.later("key", "repair", "k4", "--custodian", "de-1", "--replace", "--operator-key", per)
    running.approve(*ALL)
    assert ordered.result(60)["receipts"] == ["de-1"]
    assert not _lacks(running, "k4", "de-1")
    assert running.client("key", "rotate", "k4")["custodians"] == list(ALL)

    # A job begins under three of five; before a worker gets it, a sixth joins and the rule is four of six.
    cluster.worker.stop()
    (job / "input.json").write_text('{"text": "begun under three of five"}')
    with running.connect() as client:
        submitted = client.submit(job, key="k4", regions=[running.region])
        assert submitted.job.epoch == 2
    card = running.enrol("se-1", "SE", "ch-1", ops)
    rule = tmp_path / "rule.yaml"
    rule.write_text("at_least: 4\njurisdictions: 3\n")
    signed = running.change_roster("--card", str(card), "--quorum", str(rule))
    running.install_roster(signed, "se-1")
    # It never served under another roster: the chain before it is its operators' word.
    cluster.custodians["se-1"] = cluster._custodian("se-1")
    running.restart(*cluster.custodians.values(), cluster.coordinator)
    assert running.client("roster", "follow", str(signed))["version"] == 3
    refused = running.client("key", "rotate", "k4", status=1)["error"]
    assert (refused["reason"], "--renew" in refused["next_step"]) == ("QUORUM_RULE", True)
    ordered = running.later("key", "rotate", "k4", "--renew")
    running.approve(*ALL, "se-1")
    assert ordered.result(60)["custodians"] == [*ALL, "se-1"]
    status = {(each["key_id"], each["epoch"]): each for each in running.client("cluster", "status")["keys"]}
    assert status["k4", 3]["survival"]["losses"] == 2
    assert status["k4", 2]["survival"]["losses"] == 2
    # Three of the old committee and the newcomer are a quorum of the roster; of the job's epoch only three hold shares.
    for name in ("ch-2", "jp-1"):
        cluster.custodians[name].stop()
    cluster.start([cluster.worker])
    shutil.rmtree(
        layout.root / "state", ignore_errors=True
    )  # the owner's copy of the key: it asks the custodians again
    with running.connect() as client:
        result = client.result(submitted.id, timeout=90)
        assert json.loads(result.files["result.json"]) == {"echo": "begun under three of five"}
        assert set(result.custodians) <= {"ch-1", "de-1", "is-1"}
        last = {(each.key_id, each.epoch): each.survival for each in client.status().keys}
        assert [found and found.losses for found in (last["k4", 2], last["k4", 3])] == [0, 0]
    cluster.start([cluster.custodians["ch-2"], cluster.custodians["jp-1"]])


def _lacks(running: Operated, key: str, custodian: str) -> bool:
    with running.connect() as client:
        return any(each.key_id == key and custodian in each.lacking for each in client.status().keys)
