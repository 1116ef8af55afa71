"""Data that stays home, across a rotation, on real custodians and by the real command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keyquorum.cli import run
from keyquorum_core.data_file import PREAMBLE_BYTES
from tests.support.cluster import Running


@pytest.mark.timeout(180)
def test_a_file_is_encrypted_rewrapped_after_a_rotation_and_decrypted(
    running: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    access = ["--profile", str(running.layout.profile), "--passphrase-file", str(running.layout.owner_passphrase)]

    def data(*arguments: str) -> tuple[int, dict[str, Any]]:
        status = run(["data", *arguments, "--json"])
        return status, json.loads(capsys.readouterr().out)

    plain, sealed = tmp_path / "plain", tmp_path / "sealed"
    plain.write_bytes(b"a very private record\n" * 100_000)
    with running.connect() as client:
        client.key_create("store")
    about = ["--key", "store", "--classification", "research", "--name", "cohort"]
    status, made = data("encrypt", str(plain), str(sealed), *about, *access)
    assert (status, made["epoch"], made["size"]) == (0, 1, plain.stat().st_size)
    artifact = sealed.read_bytes()[PREAMBLE_BYTES:]
    with running.connect() as client:
        assert client.key_rotate("store").epoch == 2
    status, first = data("decrypt", str(sealed), str(tmp_path / "first"), *access)
    assert (status, first["epoch"]) == (0, 1)
    assert first["rewrap_before"] > 0
    status, moved = data("rewrap", str(sealed), *access)
    assert (status, moved["epoch"], moved["file_id"]) == (0, 2, made["file_id"])
    status, shown = data("show", str(sealed))
    assert (status, shown["epoch"], shown["verified"]) == (0, 2, False)
    assert sealed.read_bytes()[PREAMBLE_BYTES:] == artifact
    status, last = data("decrypt", str(sealed), str(tmp_path / "last"), *access)
    assert (status, last["epoch"], last["rewrap_before"]) == (0, 2, 0)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "last").read_bytes() == plain.read_bytes()
    status, error = data("decrypt", str(plain), str(tmp_path / "never"), *access)
    assert (status, error["error"]["reason"]) == (1, "MALFORMED")
    assert run(["data", "show", str(sealed)]) == 0
    assert "cohort" in capsys.readouterr().out
