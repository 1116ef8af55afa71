"""Every command in the documents exists, with the options that stand there, and can say what it does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from click.testing import CliRunner

from keyquorum.cli import build
from keyquorum_coordinator.cli import app as coordinator
from keyquorum_custodian.cli import app as custodian
from keyquorum_gpu_worker.cli import app as worker

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/runbooks"
GUIDES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NAMES = ("attestation-failure", "coordinator-compromise", "custodian-loss", "key-suspicion", "sanctions-change")
PROGRAMS: dict[str, Any] = {
    "keyquorum": build(),
    "keyquorum-custodian": custodian,
    "keyquorum-coordinator": coordinator,
    "keyquorum-worker": worker,
}
_PROGRAM = r"keyquorum(?:-custodian|-coordinator|-worker)?"
_SPAN = re.compile(rf"`({_PROGRAM} [^`]+)`")
_LINE = re.compile(rf"^ *(?:[A-Z_]+=\S+ )?((?:\S+/bin/)?{_PROGRAM} .+)$", re.MULTILINE)


def in_blocks(text: str) -> list[str]:
    blocks = "".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return _LINE.findall(blocks)


def commands(text: str) -> list[str]:
    spans = _SPAN.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [*in_blocks(text), *(" ".join(each.split()) for each in spans)]


def every_command(name: str, here: Any) -> Iterator[tuple[str, Any]]:
    yield name, here
    for each, below in getattr(here, "commands", {}).items():
        yield from every_command(f"{name} {each}", below)


def check(line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    here: Any = typer.main.get_command(PROGRAMS[program.rpartition("/")[2]])
    while words and hasattr(here, "commands"):
        if here.invoke_without_command and words[0].startswith("-"):
            break  # a group that does something by itself
        name = words.pop(0)
        assert name in here.commands, f"{line}: no command {name!r}"
        here = here.commands[name]
    alone = getattr(here, "invoke_without_command", False)
    assert alone or not hasattr(here, "commands"), f"{line}: a group, not a command"
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


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_every_command_in_a_guide_exists(guide: Path) -> None:
    for line in in_blocks(guide.read_text()):
        check(line)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_can_say_what_it_does(program: str) -> None:
    for name, command in every_command(program, typer.main.get_command(PROGRAMS[program])):
        said = CliRunner().invoke(command, ["--help"], prog_name=name)
        assert said.exit_code == 0, f"{name} --help: {said.exception!r}"
        assert "Usage:" in said.output


@pytest.mark.parametrize("line", ["keyquorum revoke moon X", "keyquorum revoke job J --sorry", "keyquorum revoke"])
def test_what_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        check(line)
