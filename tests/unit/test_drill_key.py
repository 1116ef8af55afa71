"""The coordinator's drill identity: made once, read strictly, never over another."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keyquorum_coordinator.cli import app
from keyquorum_coordinator.config import CoordinatorConfig
from keyquorum_coordinator.drill_key import DRILL_KEY, DRILL_PUBLIC, create_drill_key, load_drill_key
from keyquorum_coordinator.init import initialise
from keyquorum_core.errors import KeyquorumError, Reason


def test_it_is_made_once_and_read_back(tmp_path: Path) -> None:
    assert load_drill_key(tmp_path) is None
    made = create_drill_key(tmp_path)
    read = load_drill_key(tmp_path)
    assert read is not None
    assert (read.identity.public, read.recipient.public) == (made.identity.public, made.recipient.public)
    public = json.loads((tmp_path / DRILL_PUBLIC).read_bytes())
    assert (public["name"], public["role"]) == ("drill", "owner")
    assert base64.b64decode(public["identity"]) == made.identity.public.to_bytes()
    with pytest.raises(KeyquorumError) as caught:
        create_drill_key(tmp_path)
    assert caught.value.reason is Reason.EXISTS
    (tmp_path / DRILL_PUBLIC).unlink()  # as a kill between the two files leaves it
    assert create_drill_key(tmp_path).identity.public == made.identity.public


def test_a_file_that_others_may_read_or_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    create_drill_key(tmp_path)
    path = tmp_path / DRILL_KEY
    path.chmod(0o644)
    with pytest.raises(KeyquorumError) as caught:
        load_drill_key(tmp_path)
    assert caught.value.reason is Reason.ROLE
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(KeyquorumError) as caught:
        load_drill_key(tmp_path)
    assert caught.value.reason is Reason.MALFORMED


def test_a_coordinator_set_up_without_one_gets_it_by_command(tmp_path: Path) -> None:
    folder = tmp_path / "coordinator"
    initialise(CoordinatorConfig(folder, "main", "demo", "127.0.0.1:0", ""), now=1_800_000_000)
    (folder / DRILL_KEY).unlink()
    (folder / DRILL_PUBLIC).unlink()
    done = CliRunner().invoke(app, ["drill-key", "--dir", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    keys = load_drill_key(folder)
    assert keys is not None
    assert json.loads(done.output) == {
        "public": str(folder / DRILL_PUBLIC),
        "fingerprint": keys.identity.public.fingerprint,
    }
    again = CliRunner().invoke(app, ["drill-key", "--dir", str(folder), "--json"])
    assert (again.exit_code, json.loads(again.output)["error"]["reason"]) == (1, "EXISTS")
