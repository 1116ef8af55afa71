"""Key files of owners and operators, and rosters made with them from the command line."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import pytest

from keyquorum.cli import run
from keyquorum.keyfiles import create_keys, read_public_keys, unlock, write_new
from keyquorum_core.errors import MalformedError, Reason, RefusedError, StateError, UnavailableError
from keyquorum_core.ledger.cosignatures import Cosigner
from keyquorum_core.ledger.log_keys import LogSigner
from keyquorum_core.roster import EnrolmentCard, RosterCustodian, make_card
from keyquorum_core.sealing import RecipientKey
from keyquorum_core.signing import Identity
from keyquorum_protos.wire.tls import self_signed


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "new"
    create_keys(folder, "alice", "owner", "pass")
    create_keys(folder, "oscar", "operator", "pass", suite="MLKEM1024_P384")
    return folder


def test_private_files_are_private_and_public_ones_say_the_same(keys: Path) -> None:
    loaded = unlock(keys / "alice.key.json", "owner", "alice", "pass")
    public = read_public_keys(keys / "alice.pub.json")
    assert (public.name, public.role) == ("alice", "owner")
    assert public.identity == loaded.identity.public
    assert public.hpke == loaded.recipient.public
    assert stat.S_IMODE((keys / "alice.key.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    assert unlock(keys / "oscar.key.json", "operator", None, lambda path: "pass").recipient.suite == "MLKEM1024_P384"


def test_keys_are_never_replaced(keys: Path) -> None:
    before = (keys / "alice.key.json").read_bytes()
    with pytest.raises(StateError) as caught:
        create_keys(keys, "alice", "owner", "pass")
    assert caught.value.reason is Reason.EXISTS
    with pytest.raises(StateError):
        write_new(keys / "alice.key.json", b"", private=True)
    assert (keys / "alice.key.json").read_bytes() == before
    assert not list(keys.glob(".*"))


def test_a_wrong_passphrase_role_or_name_is_refused(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYQUORUM_PASSPHRASE", raising=False)
    for role, name, passphrase, reason in (
        ("owner", "alice", "wrong", Reason.PASSPHRASE),
        ("owner", "alice", None, Reason.PASSPHRASE),
        ("owner", "bob", "pass", Reason.ROLE),
        ("operator", None, "pass", Reason.ROLE),
    ):
        with pytest.raises(RefusedError) as caught:
            unlock(keys / "alice.key.json", role, name, passphrase)
        assert caught.value.reason is reason
        assert "wrong" not in str(caught.value)
    monkeypatch.setenv("KEYQUORUM_PASSPHRASE", "pass")
    assert unlock(keys / "alice.key.json", "owner", "alice", None).name == "alice"


def test_a_lost_or_damaged_file_is_said_so(keys: Path, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="missing"):
        unlock(tmp_path / "alice.key.json", "owner", "alice", "pass")
    damaged = tmp_path / "damaged.json"
    damaged.write_bytes((keys / "alice.key.json").read_bytes()[:-20])
    with pytest.raises(MalformedError):
        unlock(damaged, "owner", "alice", "pass")
    damaged.write_bytes(b"{}")
    with pytest.raises(MalformedError):
        read_public_keys(damaged)


@pytest.mark.parametrize(
    ("name", "role", "passphrase"), [("A", "owner", "x"), ("a", "worker", "x"), ("a", "owner", "")]
)
def test_bad_names_roles_and_empty_passphrases_make_no_files(
    tmp_path: Path, name: str, role: str, passphrase: str
) -> None:
    with pytest.raises((MalformedError, RefusedError)):
        create_keys(tmp_path / "new", name, role, passphrase)
    assert not (tmp_path / "new").exists()


def test_identity_create_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KEYQUORUM_PASSPHRASE", raising=False)
    line = ["identity", "create", "bob", "--role", "owner", "--out", str(tmp_path), "--json"]
    assert run(line) == 1
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "PASSPHRASE"
    monkeypatch.setenv("KEYQUORUM_PASSPHRASE", "pass")
    assert run(line) == 0
    made = json.loads(capsys.readouterr().out)
    assert read_public_keys(Path(made["public_file"])).identity.fingerprint == made["fingerprint"]
    assert run(line) == 1
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "EXISTS"


def test_a_roster_is_assembled_shown_and_verified(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYQUORUM_PASSPHRASE", "pass")
    now = int(time.time())
    cards = []
    for number, (name, where) in enumerate((("ch-1", "CH"), ("de-1", "DE"), ("is-1", "IS"))):
        identity = Identity.generate()
        certificate = self_signed("demo", "custodian", name, now=now).certificate.decode()
        entry = RosterCustodian(
            name,
            where,
            f"host-{number}:1",
            identity.public,
            RecipientKey.generate().public,
            certificate,
            Cosigner.generate(f"demo/{name}").witness_key,
        )
        cards.append(tmp_path / f"{name}.card.json")
        cards[-1].write_bytes(make_card(EnrolmentCard("demo", entry, now), identity))
    (tmp_path / "main.pem").write_bytes(self_signed("demo", "coordinator", "main", now=now).certificate)
    (tmp_path / "rule.yaml").write_text("at_least: 2\njurisdictions: 2\n")
    (tmp_path / "log.vkey").write_text(LogSigner.generate("demo/ledger").keys.encode() + "\n")
    roster, operators = tmp_path / "roster.json", tmp_path / "operators.json"
    line = ["roster", "create", "--cluster", "demo", "--quorum", str(tmp_path / "rule.yaml"), "--out", str(roster)]
    line += [part for card in cards for part in ("--card", str(card))]
    line += ["--operator-key", str(keys / "oscar.key.json"), "--coordinator-cert", str(tmp_path / "main.pem")]
    line += ["--log-key", str(tmp_path / "log.vkey"), "--log-url", "https://log.example"]
    assert run([*line, "--operators-out", str(operators), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [each["id"] for each in made["custodians"]] == ["ch-1", "de-1", "is-1"]
    assert (made["log"], made["log_url"]) == ("demo/ledger", "https://log.example")
    assert made["signed_by"] == made["operators"] == ["oscar"]
    assert run(["roster", "show", str(roster), "--operators", str(operators), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["sha256"], shown["verified"]) == (made["sha256"], True)
    assert run(["roster", "show", str(roster)]) == 0
    captured = capsys.readouterr()
    assert "NOT VERIFIED" in captured.out
    assert run([*line, "--json"]) == 1, "a roster is never replaced"
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "EXISTS"
    roster.write_bytes(roster.read_bytes().replace(b'"sig":"', b'"sig":"AA', 1))
    assert run(["roster", "show", str(roster), "--operators", str(operators)]) == 1


def test_a_card_of_another_cluster_makes_no_roster(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYQUORUM_PASSPHRASE", "pass")
    identity = Identity.generate()
    now = int(time.time())
    tls = self_signed("prod", "custodian", "ch-1", now=now).certificate.decode()
    hpke, cosigner = RecipientKey.generate().public, Cosigner.generate("prod/ch-1")
    entry = RosterCustodian("ch-1", "CH", "host:1", identity.public, hpke, tls, cosigner.witness_key)
    (tmp_path / "card.json").write_bytes(make_card(EnrolmentCard("prod", entry, now), identity))
    (tmp_path / "rule.yaml").write_text("quorum: {at_least: 2}\n")
    (tmp_path / "main.pem").write_bytes(self_signed("demo", "coordinator", "main", now=now).certificate)
    line = ["roster", "create", "--cluster=demo", f"--quorum={tmp_path}/rule.yaml", f"--card={tmp_path}/card.json"]
    line += [f"--operator-key={keys}/oscar.key.json", f"--coordinator-cert={tmp_path}/main.pem"]
    assert run([*line, f"--out={tmp_path}/roster.json", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "ROSTER"
    assert not (tmp_path / "roster.json").exists()
