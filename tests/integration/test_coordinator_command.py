"""The ``keyquorum-coordinator`` command: exit statuses, JSON, and what it says when it refuses."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keyquorum_coordinator import __version__
from keyquorum_coordinator.cli import app
from keyquorum_coordinator.config import CONFIG_NAME, CoordinatorConfig, load_config
from keyquorum_coordinator.ledger.setup import open_log
from keyquorum_coordinator.log_key import load_log_key
from keyquorum_core.errors import MalformedError, Reason, UnavailableError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogKeys, LogSigner
from tests.support.coordinator import Process, make_folder
from tests.support.fake_custodian import FakeCommittee
from tests.support.ledger_log import add

INIT = ["init", "--cluster", "demo", "--listen", "127.0.0.1:0", "--json"]


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def make(folder: Path) -> dict[str, str]:
    code, out, _ = run(*INIT, "--dir", str(folder))
    assert code == 0
    made: dict[str, str] = json.loads(out)
    return made


def test_init_chooses_a_port_that_stays_and_protects_keys(tmp_path: Path) -> None:
    made = make(tmp_path / "c")
    config = load_config(tmp_path / "c")
    assert config.listen == made["address"]
    assert not config.listen.endswith(":0")
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700
    for name in (config.tls_key, config.clients_ca_key, config.log_key):
        assert config.path(name).stat().st_mode & 0o777 == 0o600


def test_init_makes_the_ledger_keys_and_shows_the_public_ones(tmp_path: Path) -> None:
    make(tmp_path / "c")
    path = load_config(tmp_path / "c").path("log-key.json")
    signer = load_log_key(path)
    assert signer.origin == "demo/ledger"
    assert LogKeys.parse((tmp_path / "c" / "log.vkey").read_text().strip()) == signer.keys
    assert not any(seed.hex() in repr(signer) for seed in signer.seeds())
    path.write_bytes(path.read_bytes().replace(b'"ed25519"', b'"ed25518"'))
    with pytest.raises(MalformedError):
        load_log_key(path)
    path.unlink()
    with pytest.raises(UnavailableError) as caught:
        load_log_key(path)
    assert caught.value.reason is Reason.NOT_FOUND


def test_init_again_is_refused_with_exit_status_1(tmp_path: Path) -> None:
    make(tmp_path / "c")
    before = (tmp_path / "c" / "tls-key.pem").read_bytes()
    code, out, _ = run(*INIT, "--dir", str(tmp_path / "c"))
    assert (code, json.loads(out)["error"]["reason"]) == (1, "EXISTS")
    assert (tmp_path / "c" / "tls-key.pem").read_bytes() == before
    code, _, err = run(*INIT[:-1], "--dir", str(tmp_path / "c"))
    assert code == 1
    assert err.startswith("refused: EXISTS: ")


def test_names_that_cannot_stand_in_certificates_are_refused(tmp_path: Path) -> None:
    code, out, _ = run("init", "--dir", str(tmp_path / "c"), "--cluster", "De mo", "--listen", "127.0.0.1:0", "--json")
    assert (code, json.loads(out)["error"]["reason"]) == (1, "MALFORMED")
    assert not (tmp_path / "c").exists()


def test_issue_cert_issues_once_and_only_for_callers_roles(tmp_path: Path) -> None:
    make(tmp_path / "c")
    base = ["issue-cert", "--dir", str(tmp_path / "c"), "--out", str(tmp_path / "out"), "--json"]
    code, out, _ = run(*base, "--role", "owner", "--name", "alice")
    assert (code, json.loads(out)["uri"]) == (0, "spiffe://demo/owner/alice")
    code, out, _ = run(*base, "--role", "owner", "--name", "alice")
    assert (code, json.loads(out)["error"]["reason"]) == (1, "EXISTS")
    code, out, _ = run(*base, "--role", "custodian", "--name", "ch-1")
    assert (code, json.loads(out)["error"]["reason"]) == (1, "ROLE")
    code, out, _ = run(*base, "--role", "owner", "--name", "../alice")
    assert code == 1


def test_the_version_is_that_of_the_distribution() -> None:
    assert __version__ == version("keyquorum-coordinator")


def test_usage_errors_are_exit_status_2() -> None:
    assert run("init")[0] == 2
    assert run("serve", "--dir", "x", "--log-level", "loud")[0] == 2


@pytest.mark.parametrize(
    "change", ["worker_timout = 3\n", "worker_timeout = 0\n", 'store = ""\n', "name = 3\n", "this is not TOML"]
)
def test_a_misspelt_or_senseless_configuration_is_refused(tmp_path: Path, change: str) -> None:
    make(tmp_path / "c")
    path = tmp_path / "c" / CONFIG_NAME
    path.write_text(path.read_text().replace("worker_timeout = 30\n", "").replace('store = "artifacts"\n', "") + change)
    with pytest.raises(MalformedError):
        load_config(tmp_path / "c")


def test_serving_without_a_roster_says_what_is_missing(tmp_path: Path) -> None:
    make(tmp_path / "c")
    done = subprocess.run(
        [sys.executable, "-m", "keyquorum_coordinator", "serve", "--dir", str(tmp_path / "c")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("refused: NOT_FOUND: operators file is missing")
    assert "Traceback" not in done.stderr


@pytest.fixture
async def committee() -> AsyncIterator[FakeCommittee]:
    committee = await FakeCommittee.start()
    yield committee
    await committee.stop()


async def test_serve_announces_itself_logs_json_and_status_reaches_it(tmp_path: Path, committee: FakeCommittee) -> None:
    config = make_folder(tmp_path / "c", committee)
    process = Process(config)
    ready = await process.start()
    assert (ready["ready"], ready["address"], ready["name"]) == (True, config.listen, "main")
    code, out, _ = await asyncio.to_thread(run, "status", "--dir", str(config.directory), "--json")
    assert code == 0
    assert {each["custodian"] for each in json.loads(out)["custodians"]} == set(committee.custodians)
    assert await process.terminate() == 0
    log = [json.loads(line) for line in (config.directory / "stderr.log").read_text().splitlines()]
    assert [line["event"] for line in log] == ["serving", "stopping", "stopped"]
    code, out, _ = await asyncio.to_thread(run, "status", "--dir", str(config.directory), "--json")
    assert (code, json.loads(out)["error"]["reason"]) == (1, "UNAVAILABLE")


# -- the ledger --------------------------------------------------------------------------------------------------------


def a_log(folder: Path, leaves: int) -> tuple[CoordinatorConfig, LogSigner]:
    """A coordinator's folder whose log has so many leaves."""
    make(folder)
    config = load_config(folder)
    log = open_log(config)
    if leaves:
        add(log, *range(leaves))
    while log.seal():
        pass
    log.close()
    return config, load_log_key(config.path(config.log_key))


def test_the_ledger_is_shown_and_verified(tmp_path: Path) -> None:
    config, signer = a_log(tmp_path / "c", 600)
    log = open_log(config)
    witness = Cosigner.generate("demo/ch-1")
    log.add_cosignatures(log.latest, witness.cosign(log.latest.checkpoint, 1_800_000_000))
    root = log.latest.checkpoint.root.hex()
    log.close()
    code, out, _ = run("ledger", "status", "--dir", str(tmp_path / "c"), "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["origin"], found["size"], found["root"]) == (signer.origin, 600, root)
    assert (found["witnessed_size"], found["witnessed_by"], found["waiting_for_tiles"]) == (600, ["demo/ch-1"], 88)
    code, out, _ = run("ledger", "status", "--dir", str(tmp_path / "c"))
    assert (code, "600 leaves" in out, "by demo/ch-1" in out) == (0, True, True)
    code, out, _ = run("ledger", "verify", "--dir", str(tmp_path / "c"), "--json")
    assert (code, json.loads(out)) == (0, {"verified": True, "size": 600, "root": root})


@pytest.mark.parametrize("name", ["tile/0/001", "tile/entries/000"])
def test_a_changed_tile_is_found(tmp_path: Path, name: str) -> None:
    a_log(tmp_path / "c", 600)
    path = tmp_path / "c" / "ledger" / name
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    code, out, _ = run("ledger", "verify", "--dir", str(tmp_path / "c"), "--json")
    assert (code, json.loads(out)["error"]["reason"]) == (1, "LEDGER_PROOF")


def test_a_log_is_made_once(tmp_path: Path) -> None:
    config, signer = a_log(tmp_path / "c", 0)
    code, out, _ = run("ledger", "init", "--dir", str(tmp_path / "c"), "--json")
    assert (code, json.loads(out)["error"]["reason"]) == (1, "EXISTS")
    for name in (config.ledger_database, config.ledger_checkpoint):
        config.path(name).unlink()
    code, out, _ = run("ledger", "init", "--dir", str(tmp_path / "c"), "--json")
    assert (code, json.loads(out)["log_key"]) == (0, signer.keys.encode())
    assert run("ledger", "status", "--dir", str(tmp_path / "c"))[0] == 0


def test_a_lost_checkpoint_is_put_back_from_a_copy(tmp_path: Path) -> None:
    config, signer = a_log(tmp_path / "c", 600)
    log = open_log(config)
    note = log.latest.encode()
    older = signer.sign(599, log.root(599), 1_800_000_000).encode()
    add(log, 600)  # the copy is one leaf behind
    log.close()
    copy = tmp_path / "checkpoint"
    restore = ("ledger", "restore", "--dir", str(tmp_path / "c"), "--checkpoint", str(copy), "--json")
    copy.write_bytes(note)
    assert json.loads(run(*restore)[1])["error"]["reason"] == "EXISTS"
    config.path(config.ledger_checkpoint).unlink()
    forged = signer.sign(600, bytes(32), 1_800_000_000).encode()
    foreign = LogSigner.generate(signer.origin).sign(600, bytes(32), 1_800_000_000).encode()
    ahead = signer.sign(602, bytes(32), 1_800_000_000).encode()
    for data, reason in (
        (forged, "LEDGER_FORK"),
        (foreign, "SIGNATURE_MISSING"),
        (ahead, "STATE"),
        (older, "STATE"),
        (b"x", "MALFORMED"),
    ):
        copy.write_bytes(data)
        code, out, _ = run(*restore)
        assert (code, json.loads(out)["error"]["reason"]) == (1, reason)
        code, out, _ = run("ledger", "status", "--dir", str(tmp_path / "c"), "--json")
        assert (code, json.loads(out)["error"]["reason"]) == (1, "NOT_FOUND")
    copy.write_bytes(note)
    assert run(*restore)[0] == 0
    log = open_log(config)
    assert log.latest.checkpoint.size == 601, "what came after it is signed for again"
    assert [entry.index for entry in add(log, 600)] == [600]
    log.close()
