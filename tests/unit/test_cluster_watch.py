"""``keyquorum cluster status --watch`` on a terminal: the real command behind a pseudo-terminal, and what is on it.

It is redrawn in place, on the alternate screen: nothing of what was there before is left over, nothing scrolls away,
and what was on the terminal is there again afterwards.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import signal
import struct
import sys
import termios
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from tests.support.client_world import the_world
from tests.support.fake_coordinator import FakeCoordinator, serving
from tests.unit.test_cluster_status import gone, plan

ROWS, COLUMNS = 40, 100
_CONTROL = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])")


class Terminal:
    """As much of one as the command uses; anything else on it fails the test. ``screen``: rows of what is shown;
    ``other``: the one that is not shown now."""

    def __init__(self) -> None:
        self.screen, self.other = self.blank(), self.blank()
        self.row = self.column = 0
        self.place = (0, 0)
        """The cursor's, on the other one."""
        self.alternate = self.hidden = False
        self._pending = b""

    @staticmethod
    def blank() -> list[list[str]]:
        return [[" "] * COLUMNS for _ in range(ROWS)]

    @property
    def text(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.screen)

    def feed(self, data: bytes) -> None:
        text = (self._pending + data).decode("utf-8", "ignore")
        cut = text.rfind("\x1b")
        whole = cut < 0 or _CONTROL.match(text, cut)
        self._pending, text = (b"", text) if whole else (text[cut:].encode(), text[:cut])
        at = 0
        while at < len(text):
            found = _CONTROL.match(text, at)
            if found:
                self._control(found[1], found[2], found[3])
                at = found.end()
                continue
            self._put(text[at])
            at += 1

    def _control(self, private: str, number: str, letter: str) -> None:
        match (private, number, letter):
            case ("", _, "m"):
                pass
            case ("", "", "H"):
                self.row = self.column = 0
            case ("?", "25", "l" | "h"):
                self.hidden = letter == "l"
            case ("?", "1049", "l" | "h"):
                assert self.alternate != (letter == "h")
                self.alternate = letter == "h"
                self.screen, self.other = self.other, self.screen
                self.place, (self.row, self.column) = (self.row, self.column), self.place
            case _:
                raise AssertionError(f"not foreseen: ESC[{private}{number}{letter}")

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            assert self.row < ROWS - 1 or not self.alternate, "it scrolled"
            if self.row == ROWS - 1:
                self.screen = [*self.screen[1:], [" "] * COLUMNS]
            self.row = min(self.row + 1, ROWS - 1)
        else:
            assert character.isprintable()
            assert self.column < COLUMNS, "it wrapped"
            self.screen[self.row][self.column] = character
            self.column += 1


class Watched:
    """The command while it runs."""

    def __init__(self, process: asyncio.subprocess.Process, terminal: Terminal) -> None:
        self.process = process
        self.terminal = terminal

    async def until(self, wanted: Callable[[str], bool]) -> str:
        deadline = time.monotonic() + 20
        while not wanted(self.terminal.text):
            assert time.monotonic() < deadline, self.terminal.text
            await asyncio.sleep(0.02)
        return self.terminal.text


@asynccontextmanager
async def watched(profile: Path) -> AsyncIterator[Watched]:
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    terminal = Terminal()
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("keyquorum")),
        *("cluster", "status", "--watch", "--every", "0.5", "--profile", str(profile)),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", "GRPC_VERBOSITY": "NONE"},
    )
    os.close(slave)
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            data = os.read(master, 1 << 16)
        except OSError:  # the other end is closed
            loop.remove_reader(master)
            return
        terminal.feed(data)

    loop.add_reader(master, read)
    try:
        yield Watched(process, terminal)
    finally:
        loop.remove_reader(master)
        os.close(master)
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_what_is_watched_is_redrawn_in_place_and_the_terminal_is_as_it_was_afterwards(tmp_path: Path) -> None:
    world = the_world().honest()
    coordinator = FakeCoordinator(world)
    coordinator.certificates = {"demo": world.certify(plan(world))}
    profile = tmp_path / "profile"
    async with AsyncExitStack() as scene:
        async with serving(coordinator) as address:
            profile = world.write_profile(profile, address)
            seen = await scene.enter_async_context(watched(profile))
            text = await seen.until(lambda text: "any 2; any 1 jurisdiction" in text)
            assert (seen.terminal.alternate, seen.terminal.hidden) == (True, True)
            coordinator.down = gone("ch-1", "de-1", "fr-1")
            text = await seen.until(lambda text: "NO QUORUM" in text)
            assert "every key has a quorum" not in text
            assert text.count("custodian  ") == 1  # drawn over what was there, not below it
            coordinator.down = {}
            text = await seen.until(lambda text: "every key has a quorum" in text)
            assert "NO QUORUM" not in text
        text = await seen.until(lambda text: "nothing can be seen" in text)
        assert "every key has a quorum" in text  # what was seen last, below the news
        seen.process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(seen.process.wait(), 20) == 0
        text = await seen.until(lambda text: "the coordinator's word" in " ".join(text.split()))
        assert (seen.terminal.alternate, seen.terminal.hidden) == (False, False)
        assert "Traceback" not in text
