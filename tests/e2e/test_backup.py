"""A custodian of a real cluster is backed up while it serves, wrecked, restored, and brought back by a coordinator."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from keyquorum_custodian.admin import fetch_status
from keyquorum_local.layout import program
from tests.support.cluster import eventually
from tests.support.operated import Operated, operated

LOST = "de-1"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    with operated(tmp_path_factory.mktemp("backed-up") / "local") as found:
        yield found


def _restored(running: Operated) -> bool:
    found = asyncio.run(fetch_status(running.layout.custodian(LOST)))
    return any("RESTORED" in warning for warning in found["warnings"])


def test_a_wrecked_custodian_comes_back_from_its_backup_and_its_twin_does_not(
    running: Operated, job: Path, tmp_path: Path
) -> None:
    layout, cluster = running.layout, running.cluster
    passphrase = tmp_path / "vault.passphrase"
    passphrase.write_text("a vault's own\n")
    vault = ["--recipient-passphrase-file", str(passphrase)]
    backup, key, operators = tmp_path / "de-1.backup", tmp_path / "vault", tmp_path / "operators.json"
    shutil.copy(layout.custodian("ch-1") / "operators.json", operators)
    running.client("key", "create", "k1")
    with running.connect() as client:
        submitted = client.submit(job, key="k1", regions=[running.region])
        first = json.loads(client.result(submitted.id).files["result.json"])

    _run("backup", "keygen", str(key), *vault)
    made = running.custodian(LOST, "backup", "--to", f"{key}.pub", "--out", str(backup))
    assert [(each["key_id"], each["state"], each["seeds"]) for each in made["epochs"] if each["key_id"] == "k1"] == [
        ("k1", "active", 6)
    ]
    assert not _run("backup", "verify", str(backup))["signature_checked"]
    verified = _run("backup", "verify", str(backup), "--recipient-key", str(key), "--operators", str(operators), *vault)
    assert verified["seeds_checked"]
    assert verified["operators_checked"]

    cluster.custodians[LOST].kill()
    twin = tmp_path / "twin"
    shutil.move(layout.custodian(LOST), twin)
    unlocks = twin / layout.passphrase(LOST).name
    restored = running.custodian(
        LOST, "restore", str(backup), "--recipient-key", str(key), "--operators", str(operators), *vault,
        "--passphrase-file", str(unlocks),
    )  # fmt: skip
    shutil.copy(unlocks, layout.passphrase(LOST))
    signed = running.change_roster("--card", restored["card"])
    running.install_roster(signed)
    cluster.custodians[LOST] = cluster._custodian(LOST)
    running.restart(*cluster.processes)
    running.client("roster", "follow", str(signed))
    assert _restored(running)
    with running.connect() as client:  # the others serve meanwhile
        other = client.submit(job, key="k1", regions=[running.region])
        assert LOST not in client.result(other.id).custodians
    (request,) = running.pending(LOST)
    assert (request["kind"], request["request_id"]) == ("restore", restored["request"])
    running.approve(LOST)
    eventually(lambda: not _restored(running), "a coordinator brings it back by itself", 60)

    shutil.copy(signed, twin / "roster.json")
    done = subprocess.run(
        [*program("keyquorum-custodian"), "serve", "--dir", str(twin),
         "--passphrase-file", str(unlocks)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "identity on disk is not the one in the roster" in done.stderr

    # With it, and without two others: it is needed, and derives what it derived before.
    for name in ("ch-2", "jp-1"):
        cluster.custodians[name].stop()
    shutil.rmtree(layout.root / "state", ignore_errors=True)  # the owner asks the custodians again
    with running.connect() as client:
        result = client.result(submitted.id, timeout=90)
        assert json.loads(result.files["result.json"]) == first
    cluster.start([cluster.custodians["ch-2"], cluster.custodians["jp-1"]])


def _run(*arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [*program("keyquorum-custodian"), *arguments, "--json"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    found: dict[str, object] = json.loads(done.stdout)
    return found
