"""Every command in the runbooks exists, with the options that stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from keyquorum.cli import build
from keyquorum_coordinator.cli import app as coordinator
from keyquorum_custodian.cli import app as custodian

FOLDER = Path(__file__).parents[2] / "docs/runbooks"
NAMES = ("attestation-failure", "coordinator-compromise", "custodian-loss", "key-suspicion", "sanctions-change")
_SPAN = re.compile(r"`(keyquorum(?:-custodian|-coordinator)? [^`]+)`")
_LINE = re.compile(r"^ *(keyquorum(?:-custodian|-coordinator)? .+)$", re.MULTILINE)


def commands(text: str) -> list[str]:
    blocks = "".join(re.findall(r"```\n(.*?)```", text, re.DOTALL))
    spans = _SPAN.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [*_LINE.findall(blocks), *(" ".join(each.split()) for each in spans)]


def check(line: str) -> None:
    program, *words = shlex.split(line)
    apps = {"keyquorum": build(), "keyquorum-custodian": custodian, "keyquorum-coordinator": coordinator}
    here: Any = typer.main.get_command(apps[program])
    while words and hasattr(here, "commands"):
        name = words.pop(0)
        assert name in here.commands, f"{line}: no command {name!r}"
        here = here.commands[name]
    assert not hasattr(here, "commands"), f"{line}: a group, not a command"
    known = {option for each in here.params for option in each.opts} | {"--help"}
    unknown = [word for word in words if word.startswith("--") and word not in known]
    assert not unknown, f"{line}: no option {unknown}"


def test_there_is_one_for_each_incident() -> None:
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.md"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_command_exists(name: str) -> None:
    found = commands((FOLDER / f"{name}.md").read_text())
    assert len(found) >= 5
    for line in found:
        check(line)


@pytest.mark.parametrize("line", ["keyquorum revoke moon X", "keyquorum revoke job J --sorry", "keyquorum revoke"])
def test_what_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        check(line)
