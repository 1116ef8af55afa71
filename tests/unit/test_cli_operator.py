"""``keyquorum operator``: documents made, signed one after another, shown; nothing unreadable is signed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keyquorum.bulletins import KINDS, kind_named
from keyquorum.cli import run
from keyquorum.rosters import operators_file
from keyquorum_core.errors import KeyquorumError, Reason
from tests.support.custodian import PASSPHRASE, save_keys
from tests.support.vendor import inventory_json, reference_json


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two operators' keys, ``operators.json`` that asks for both, and a body of each kind."""
    monkeypatch.setenv("KEYQUORUM_PASSPHRASE", PASSPHRASE)
    people = {name: save_keys(tmp_path, name, "operator").identity.public for name in ("olga", "per")}
    save_keys(tmp_path, "alice", "owner")
    (tmp_path / "operators.json").write_bytes(operators_file(people, 2))
    (tmp_path / "reference-values.yaml").write_text(json.dumps(reference_json()))
    (tmp_path / "inventory.yaml").write_text(json.dumps(inventory_json()))
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = run(["operator", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def sign(folder: Path, kind: str, by: str = "olga", out: str = "one.json") -> list[str]:
    key, target = str(folder / f"{by}.key.json"), str(folder / out)
    return ["sign", kind, str(folder / f"{kind}.yaml"), "--cluster", "demo", "--version", "4", "--operator-key", key,
            "--out", target]  # fmt: skip


@pytest.mark.parametrize("kind", ["reference-values", "inventory"])
def test_two_operators_sign_one_after_the_other(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    one, both = str(folder / "one.json"), str(folder / "both.json")
    trust = ["--operators", str(folder / "operators.json"), "--cluster", "demo"]
    status, made = call(capsys, *sign(folder, kind))
    assert (status, made["kind"], made["version"], made["signed_by"]) == (0, kind, 4, ["olga"])
    status, shown = call(capsys, "show", one)
    assert (status, shown["verified"], shown["sha256"]) == (0, False, made["sha256"])
    status, error = call(capsys, "show", one, *trust)
    assert (status, error["error"]["reason"]) == (1, "SIGNATURE_MISSING")
    assert call(capsys, "cosign", one, "--operator-key", str(folder / "per.key.json"), "--out", both)[0] == 0
    status, shown = call(capsys, "show", both, *trust)
    assert (status, shown["signed_by"], shown["verified"]) == (0, ["olga", "per"], True)
    assert shown["body"] == json.loads((folder / f"{kind}.yaml").read_text())
    assert run(["operator", "show", both, *trust]) == 0
    assert "olga, per" in capsys.readouterr().out
    status, error = call(capsys, "show", both, *trust[:3], "prod")
    assert (status, error["error"]["reason"]) == (1, "BULLETIN")
    assert run(["operator", "show", both, *trust[:2]]) == 2


def test_nothing_that_custodians_would_refuse_is_signed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = reference_json()
    del body["sev-snp"]["vmpl"]
    for text in (json.dumps(body), "[]", "{", "max_evidence_age: 1.5"):
        (folder / "reference-values.yaml").write_text(text)
        status, error = call(capsys, *sign(folder, "reference-values"))
        assert (status, error["error"]["reason"]) == (1, "MALFORMED")
    assert not (folder / "one.json").exists()


def test_unknown_kinds_owners_keys_and_existing_files_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "rumours.yaml").write_text("{}")
    assert call(capsys, *sign(folder, "rumours"))[1]["error"]["reason"] == "BULLETIN"
    assert call(capsys, *sign(folder, "inventory", by="alice"))[1]["error"]["reason"] == "ROLE"
    assert call(capsys, *sign(folder, "inventory"))[0] == 0
    assert call(capsys, *sign(folder, "inventory"))[1]["error"]["reason"] == "EXISTS"


def test_every_kind_can_be_loaded_by_its_name() -> None:
    for name in KINDS:
        assert kind_named(name).name == name
    with pytest.raises(KeyquorumError) as caught:
        kind_named("rumours")
    assert caught.value.reason is Reason.BULLETIN
