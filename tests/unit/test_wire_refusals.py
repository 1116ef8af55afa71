"""How commands say what was refused: as text for people, as JSON for scripts, and with status 1."""

from __future__ import annotations

import json

import pytest

from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_protos.wire.refusals import refusals


def test_what_others_wrote_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "gone\x1b[2J\x9b31m\u202egnp\x1b]0;owned\x07\rrefused: OK"
    with pytest.raises(SystemExit) as ended, refusals():
        raise UnavailableError(Reason.UNAVAILABLE, hostile, expected=hostile, actual=hostile, next_step=hostile)
    assert ended.value.code == 1
    out, shown = capsys.readouterr()
    assert not out
    assert len(shown.splitlines()) == 4
    assert all(c.isprintable() for c in shown.replace("\n", ""))


def test_scripts_get_one_json_object_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    error = UnavailableError(Reason.UNAVAILABLE, "nobody is there", expected="somebody", next_step="Wait.")
    with pytest.raises(SystemExit) as ended, refusals(as_json=True):
        raise error
    assert ended.value.code == 1
    out, shown = capsys.readouterr()
    assert json.loads(out) == {"error": error.as_dict()}
    assert not shown
