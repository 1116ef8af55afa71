"""A custodian restored under another scheme than the one it was backed up from."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keyquorum_core import keywrap
from keyquorum_core.errors import KeyquorumError, Reason
from keyquorum_core.roster import open_card
from keyquorum_custodian import init
from keyquorum_custodian.backup_files import RECIPIENT_PURPOSE
from keyquorum_custodian.config import load_config
from keyquorum_custodian.keystore import Keystore
from keyquorum_custodian.restoring import restore
from keyquorum_custodian.sealing.record import Scheme
from keyquorum_custodian.sealing.schemes import TokenWrapping
from keyquorum_custodian.sealing.token import Token
from keyquorum_custodian.standing import Standing
from keyquorum_custodian.trust import load_operators
from tests.support.ceremonies import derived
from tests.support.custodian import PASSPHRASE, Committee, build_committee
from tests.support.restoring import KEY, all_say, approve, back_up, enrol
from tests.support.softhsm import MODULE, PIN, a_token, needs_softhsm

ME = "ch-1"


@pytest.fixture
def committee(tmp_path: Path) -> Iterator[Committee]:
    built = build_committee(tmp_path / "all")
    built.generate()
    yield built
    built.close()


def wrecked(committee: Committee, tmp_path: Path) -> tuple[bytes, dict[int, bytes]]:
    """Its backup, beside which lie the recipient's key and the passphrases; and its seeds."""
    backup = back_up(committee, ME)
    store = committee.open(ME).keystore
    seeds = store.seeds(store.epochs()[0])
    committee.close()
    committee.directory(ME).rename(tmp_path / "old")
    (tmp_path / "backup").write_bytes(backup)
    wrapped = keywrap.wrap(KEY.to_seed_bytes(), "vault", purpose=RECIPIENT_PURPOSE, opslimit=1, memlimit=8 << 10)
    (tmp_path / "vault").write_bytes(wrapped)
    return backup, seeds


def command(committee: Committee, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "keyquorum_custodian", "restore", str(tmp_path / "backup"), "--recipient-key",
         str(tmp_path / "vault"), "--operators", str(committee.folder / "operators.json"), "--dir",
         str(committee.directory(ME)), *arguments, "--json"],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("KEYQUORUM_")},
             "KEYQUORUM_RECIPIENT_PASSPHRASE": "vault"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (1 if "error" in found else 0), done.stderr
    return found


def test_to_officers_shares_which_are_handed_out_for_a_good_backup_only(committee: Committee, tmp_path: Path) -> None:
    backup, seeds = wrecked(committee, tmp_path)
    officers = tmp_path / "officers"
    asked = ("--sealing", "slip39", "--shares", "2/3", "--share-dir", str(officers))
    (tmp_path / "backup").write_bytes(backup[:-1])
    assert command(committee, tmp_path, *asked)["error"]["reason"] == "MALFORMED"
    assert not officers.exists()
    (tmp_path / "backup").write_bytes(backup)
    assert command(committee, tmp_path, *asked)["custodian"] == ME
    words = [path.read_text().splitlines()[1] for path in sorted(officers.iterdir())]
    store = Keystore.open(committee.directory(ME) / "keystore.db", words[1:])
    assert (store.scheme, store.seeds(store.epochs()[0]), Standing(store).restored) == (Scheme.SLIP39, seeds, True)
    store.close()


@needs_softhsm
def test_to_a_hardware_module_that_keeps_the_seeds(committee: Committee, tmp_path: Path) -> None:
    committee.open_all()
    before = derived(committee, 1)
    wrecked(committee, tmp_path)
    pin = tmp_path / "pin"
    pin.write_text(PIN + "\n")
    token = a_token()
    made = command(committee, tmp_path, "--sealing", "pkcs11-seeds", "--token", token.label, "--module", MODULE,
                   "--pin-file", str(pin))  # fmt: skip
    committee.secrets[ME] = PIN
    enrol(committee, open_card(Path(made["card"]).read_bytes(), cluster=committee.cluster).custodian)
    committee.open_all()
    node = committee.nodes[ME]
    with pytest.raises(KeyquorumError) as caught:
        node.keystore.seeds(node.keystore.epochs()[0])
    assert caught.value.reason is Reason.UNSUPPORTED
    approve(node)
    nonce, _ = node.restoration.challenge()
    node.restoration.vouch(nonce, all_say(committee, ME, nonce))
    node.gate.release(committee.owner_request())
    assert derived(committee, 1) == before


@needs_softhsm
@pytest.mark.parametrize("failing", ["the backup's end", "the last file"])
def test_a_restore_that_fails_leaves_nothing_in_the_module(
    committee: Committee, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    backup, _ = wrecked(committee, tmp_path)
    if failing == "the backup's end":
        backup = backup[:-1]
    else:
        write = init.write_file

        def full(path: Path, data: bytes) -> None:
            if path.name == "custodian.toml":
                raise OSError(28, "No space left on device")
            write(path, data)

        monkeypatch.setattr(init, "write_file", full)
    soft, operators = a_token(), committee.folder / "operators.json"
    with pytest.raises(KeyquorumError):
        restore(
            io.BytesIO(backup), KEY, committee.directory(ME),
            TokenWrapping(Token.open(MODULE, PIN, soft.label), Scheme.PKCS11_SEEDS),
            load_operators(operators), operators.read_bytes(), now=int(committee.clock()),
            changes={"pkcs11_module": MODULE},
        )  # fmt: skip
    assert not committee.directory(ME).exists()
    token = Token.open(MODULE, PIN, soft.label)
    assert list(token._session.get_objects({})) == []
    token.close()


def test_a_backup_does_not_choose_what_library_is_loaded(committee: Committee, tmp_path: Path) -> None:
    config = committee.directory(ME) / "custodian.toml"
    config.write_text(config.read_text().replace('pkcs11_module = ""', 'pkcs11_module = "/tmp/of-theirs.so"'))
    backup, _ = wrecked(committee, tmp_path)
    operators = committee.folder / "operators.json"
    made = restore(
        io.BytesIO(backup), KEY, committee.directory(ME), PASSPHRASE, load_operators(operators), operators.read_bytes(),
        now=int(committee.clock()), opslimit=1, memlimit=8 << 10,
    )  # fmt: skip
    assert made.config.pkcs11_module == load_config(committee.directory(ME)).pkcs11_module == ""
