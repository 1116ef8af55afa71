"""The command on a terminal and off one: bars, what others wrote, passphrase files, and the process it runs in."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from pathlib import Path

import pytest

from keyquorum.cli import output, run
from keyquorum.cli.bars import bars
from keyquorum.keyfiles import create_keys
from keyquorum.progress import Progress, Stage
from tests.support.client_world import PASSPHRASE, job_folder, the_world
from tests.support.fake_coordinator import FakeCoordinator, serving

HOSTILE_LOG = b"fine\r\n\tindented\n\x1b[2J\x1b]0;owned\x07 \xff\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_for(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error is a terminal that keeps what was written."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    return out


async def command(coordinator: FakeCoordinator, tmp_path: Path, *lines: list[str]) -> list[int]:
    async with serving(coordinator) as address:
        profile = coordinator.world.write_profile(tmp_path / "profile", address)
        secret = tmp_path / "passphrase"
        secret.write_text(PASSPHRASE + "\nwhat it is for\n")
        common = ["--profile", str(profile), "--passphrase-file", str(secret)]
        return [await asyncio.to_thread(run, [*line, *common]) for line in lines]


async def test_a_terminal_shows_upload_wait_and_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    coordinator = FakeCoordinator(the_world())
    line = ["job", "submit", str(job_folder(tmp_path / "job")), "--key", "demo", "--out", str(tmp_path / "out")]
    assert await command(coordinator, tmp_path, line) == [0]
    for text in ("opening the key", "encrypting", "uploading", "waiting", "downloading", "decrypting"):
        assert text in terminal.getvalue()
    assert "DEVELOPMENT HARDWARE" in terminal.getvalue()


def test_a_bar_shows_amounts_and_nothing_that_drives_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    with bars() as report:
        report(Progress(Stage.UPLOAD, 1_500_000, 3_000_000))
        report(Progress(Stage.DOWNLOAD, 2_000_000, 8_000_000))
        report(Progress(Stage.WAIT, 1, 0, "claimed \x1b]0;owned\x07\nw-1 [red]"))
    shown = terminal.getvalue()
    assert "1.5 MB/3.0 MB" in shown
    assert "2.0 MB/8.0 MB" in shown
    assert "claimed \N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER} w-1 [red]" in shown
    assert "\x1b]" not in shown
    assert "\x07" not in shown


def test_off_a_terminal_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with bars() as report:
        report(Progress(Stage.UPLOAD, 1, 2))
    assert out.getvalue() == ""


async def test_a_log_is_plain_on_a_terminal_and_exact_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    coordinator = FakeCoordinator(the_world(), run=lambda files: (0, {}, HOSTILE_LOG))
    line = ["job", "submit", str(job_folder(tmp_path / "job")), "--key", "demo"]
    assert await command(coordinator, tmp_path, line) == [0]
    (job,) = coordinator.jobs
    capfdbinary.readouterr()
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file))
    assert await command(coordinator, tmp_path, ["job", "logs", job]) == [0]
    assert file.getvalue() == HOSTILE_LOG
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert await command(coordinator, tmp_path, ["job", "logs", job]) == [0]
    mark = "\N{REPLACEMENT CHARACTER}"
    assert terminal.getvalue() == f"fine\n\tindented\n{mark}[2J{mark}]0;owned{mark} {mark}\n"


async def test_results_of_development_hardware_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coordinator = FakeCoordinator(the_world())
    line = ["job", "submit", str(job_folder(tmp_path / "job")), "--key", "demo", "--wait", "--json"]
    assert await command(coordinator, tmp_path, line) == [0]
    captured = capsys.readouterr()
    assert '"development": true' in captured.out
    assert "DEVELOPMENT HARDWARE" in captured.err


@pytest.mark.parametrize("text", ["pass\n", "pass\r\n", "pass\nanother line\n", "pass"])
def test_a_passphrase_file_counts_by_its_first_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "secret").write_bytes(text.encode())
    assert output.new_passphrase(tmp_path / "secret", "keys") == "pass"


def test_the_command_hardens_its_own_process_before_it_reads_a_passphrase(tmp_path: Path) -> None:
    create_keys(tmp_path, "oscar", "operator", "pass")
    (tmp_path / "secret").write_text("pass\n")
    code = (
        "import ctypes, resource, sys\n"
        "import keyquorum.cli\n"
        "import keyquorum.keyfiles\n"
        "from pathlib import Path\n"
        "dumpable = lambda: ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)\n"
        "def unlock(path, role, name, ask):\n"
        "    secret = ask(path)\n"
        "    print(dumpable(), resource.getrlimit(resource.RLIMIT_CORE)[1], secret)\n"
        "    raise SystemExit(5)\n"
        "keyquorum.keyfiles.unlock = unlock\n"
        "assert keyquorum.cli.run(['version']) == 0 and dumpable() == 1\n"
        "getattr(keyquorum.cli, sys.argv.pop(1))()\n"
    )
    line = ["roster", "create", "--cluster=c", "--card=x", "--quorum=x", "--coordinator-cert=x", "--out=x"]
    line += [f"--operator-key={tmp_path}/oscar.key.json", f"--passphrase-file={tmp_path}/secret"]
    for entry, expected in (("main", "0 0 pass"), ("run", "1 ")):
        done = subprocess.run(
            [sys.executable, "-c", code, entry, *line], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout.splitlines()[-1].startswith(expected), done.stderr
