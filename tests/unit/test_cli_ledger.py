"""``keyquorum ledger``: for people, for scripts, and refusing."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from keyquorum.cli import run
from keyquorum_core.ledger.merkle import leaf_hash
from keyquorum_core.ledger.tlog_proof import TlogProof
from tests.support.auditing import Desk, desk
from tests.support.ledger_world import serve
from tests.unit.test_cli_terminal import terminal_for

JOB = "a" * 26
LEAVES = [b'{"job_id":"%s","type":"release.intent","n":%d}' % (b"ab"[n % 3 > 0 : 2][:1] * 26, n) for n in range(300)]


@pytest.fixture
def auditor(tmp_path: Path) -> Desk:
    return desk(tmp_path, LEAVES)


def out_of(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    parsed: dict[str, object] = json.loads(capsys.readouterr().out)
    return parsed


def error_of(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    error = out_of(capsys)["error"]
    assert isinstance(error, dict)
    return error


def test_checkpoint(auditor: Desk, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["ledger", "checkpoint", *auditor.offline, "--json", "--out", str(tmp_path / "kept")]) == 0
    facts = out_of(capsys)
    assert (facts["size"], facts["root"]) == (300, auditor.log.root().hex())
    assert facts["cosigned"] == dict.fromkeys(("ch-1", "de-1", "fr-1"), facts["quorum_time"])
    assert (tmp_path / "kept").read_bytes() == auditor.log.files["checkpoint"]
    assert run(["ledger", "checkpoint", *auditor.offline]) == 0
    assert "ch-1, de-1, fr-1" in capsys.readouterr().out


def test_an_old_checkpoint_is_refused_when_a_recent_one_is_asked_for(
    auditor: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    auditor.publish(age=1000)
    assert run(["ledger", "checkpoint", *auditor.offline]) == 0
    capsys.readouterr()
    assert run(["ledger", "checkpoint", *auditor.offline, "--max-age", "900", "--json"]) == 1
    assert error_of(capsys)["reason"] == "STALE"


def test_verify_all_then_what_was_added(auditor: Desk, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    assert run(["ledger", "verify", *auditor.offline, "--json", "--save", str(saved)]) == 0
    facts = out_of(capsys)
    assert (facts["verified"], facts["first_leaf"], facts["leaves_read"]) == (True, 0, 300)
    auditor.publish([b"one", b"two"])
    with serve(auditor.log.files) as server:
        line = ["ledger", "verify", *auditor.options, "--log", server.url, "--since", str(saved)]
        assert run([*line, "--json", "--save", str(saved)]) == 0
        assert (out_of(capsys) | {})["leaves_read"] == 2
        assert run(line) == 0
    assert "0 leaves, after the 302" in capsys.readouterr().out.replace("\n", " ")


def test_a_fork_since_the_saved_checkpoint_is_named(
    auditor: Desk, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    assert run(["ledger", "checkpoint", *auditor.offline, "--out", str(saved)]) == 0
    fork = desk(tmp_path / "fork", [b"another", *LEAVES[1:], b"more"])
    assert run(["ledger", "verify", *fork.offline]) == 0
    capsys.readouterr()
    assert run(["ledger", "verify", *fork.offline, "--since", str(saved), "--json"]) == 1
    error = error_of(capsys)
    assert error["reason"] == "LEDGER_FORK"
    assert auditor.log.root().hex() in error["expected"]
    assert error["next_step"]
    auditor.publish()
    longer = tmp_path / "longer"
    longer.write_bytes(fork.log.files["checkpoint"])
    assert run(["ledger", "verify", *auditor.offline, "--since", str(longer), "--json"]) == 1
    assert error_of(capsys)["reason"] == "LEDGER_ROLLBACK"


def test_what_was_tampered_with_is_named(auditor: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    path = auditor.folder / "log/tile/entries/000"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(bytes(data))
    assert run(["ledger", "verify", *auditor.offline]) == 1
    shown = capsys.readouterr().err
    for text in ("LEDGER_PROOF", "expected", "got", "next step", "tile/0/000"):
        assert text in shown


def test_verification_shows_a_bar(auditor: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    assert run(["ledger", "verify", *auditor.offline]) == 0
    assert "verifying the ledger" in terminal.getvalue()
    assert "300/300" in terminal.getvalue()


def test_prove_writes_a_proof_of_each_leaf(auditor: Desk, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["ledger", "prove", JOB, *auditor.offline, "--out", str(tmp_path / "proofs"), "--json"]) == 0
    proofs = out_of(capsys)["proofs"]
    assert isinstance(proofs, list)
    assert [each["index"] for each in proofs] == list(range(0, 300, 3))
    for each in proofs:
        assert each["type"] == "release.intent"
        proof = TlogProof.parse(Path(each["file"]).read_bytes())
        proof.verify(leaf_hash(LEAVES[each["index"]]), auditor.world.trust.log)
    assert run(["ledger", "prove", JOB, *auditor.offline, "--out", str(tmp_path / "proofs")]) == 0
    capsys.readouterr()
    assert run(["ledger", "prove", "c" * 26, *auditor.offline, "--json"]) == 1
    assert error_of(capsys)["reason"] == "NOT_FOUND"
    assert run(["ledger", "prove", "../x", *auditor.offline, "--json"]) == 1
    assert error_of(capsys)["reason"] == "MALFORMED"


def test_a_proof_verifies_alone_and_a_changed_one_does_not(
    auditor: Desk, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["ledger", "prove", JOB, *auditor.offline, "--out", str(tmp_path)]) == 0
    first, second = (tmp_path / f"{JOB}-{index}.tlog-proof" for index in (0, 3))
    capsys.readouterr()
    line = ["ledger", "verify", *auditor.options]
    assert run([*line, "--proof", str(first), "--proof", str(second), "--json"]) == 0
    proofs = out_of(capsys)["proofs"]
    assert isinstance(proofs, list)
    assert [(each["index"], each["leaf"].encode()) for each in proofs] == [(0, LEAVES[0]), (3, LEAVES[3])]
    assert run([*line, "--proof", str(first)]) == 0
    assert "leaf 0 of 300, cosigned by ch-1, de-1, fr-1" in capsys.readouterr().out
    first.write_bytes(first.read_bytes().replace(b"index 0\n", b"index 1\n"))
    assert run([*line, "--proof", str(second), "--proof", str(first), "--json"]) == 1
    shown = capsys.readouterr().out
    assert json.loads(shown)["error"]["details"]["file"] == str(first)
    assert json.loads(shown)["error"]["reason"] == "LEDGER_PROOF"
    lines = second.read_bytes().split(b"\n")
    second.write_bytes(b"\n".join([lines[0], *lines[2:]]))
    assert run([*line, "--proof", str(second), "--json"]) == 1
    assert error_of(capsys)["reason"] == "LEAF"
    assert run([*line, "--proof", str(second), "--since", str(first)]) == 2


def test_an_old_log_is_judged_as_of_its_time(auditor: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["ledger", "verify", *auditor.offline, "--json", "--at"]
    assert run([*line, str(int(time.time()) + 60)]) == 0
    capsys.readouterr()
    for away, reason in ((90_000, "EXPIRED"), (-90_000, "NOT_YET_VALID")):
        assert run([*line, str(int(time.time()) + away)]) == 1
        assert error_of(capsys)["reason"] == reason
    assert run(["ledger", "verify", *auditor.offline, "--at", "then"]) == 2


def test_an_exported_log_verifies_offline(auditor: Desk, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with serve(auditor.log.files) as server:
        line = ["ledger", "export", str(tmp_path / "copy"), *auditor.options, "--log", server.url]
        assert run([*line, "--json"]) == 0
        assert out_of(capsys)["files_fetched"] == 5
        assert run(line) == 0
    capsys.readouterr()
    assert run(["ledger", "verify", *auditor.options, "--log", str(tmp_path / "copy"), "--json"]) == 0
    assert out_of(capsys)["size"] == 300


def test_whom_to_believe_is_asked_for(
    auditor: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KEYQUORUM_PROFILE", raising=False)
    log = ["--log", str(auditor.folder / "log")]
    assert run(["ledger", "checkpoint", *log]) == 2
    assert run(["ledger", "checkpoint", *log, "--roster", "x"]) == 2
    assert run(["ledger", "checkpoint", *log, "--roster-sha256", "00"]) == 2
    assert run(["ledger", "checkpoint", *auditor.options, "--json"]) == 1
    capsys.readouterr()
    profile = ["--profile", str(auditor.folder / "trust/profile.toml")]
    assert run(["ledger", "checkpoint", *log, *profile, "--json"]) == 0
    assert out_of(capsys)["size"] == 300
    assert run(["ledger", "checkpoint", *auditor.offline, "--roster-sha256", "00" * 32, "--json"]) == 1
    assert error_of(capsys)["reason"] == "ROSTER"
    assert run(["ledger", "checkpoint", *auditor.options, "--log", "http://127.0.0.1:1/?a=b", "--json"]) == 1


def test_a_log_of_other_keys_is_not_the_rosters(
    auditor: Desk, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests.support.ledger_world import TestLog, World, log_signer

    stranger = TestLog(World(log_signer(auditor.world.signer.origin, "stranger")), LEAVES)
    folder = stranger.write(tmp_path / "stranger")
    assert run(["ledger", "verify", *auditor.options, "--log", str(folder), "--json"]) == 1
    assert error_of(capsys)["reason"] == "SIGNATURE_MISSING"
