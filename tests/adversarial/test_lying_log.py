"""Malicious read sides of the ledger, one class for each lie; whoever runs one also holds the log's signing keys.

Whatever an auditor asks for, no lie is believed and each is named: guarantee G3 as seen from outside.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from keyquorum.cli import run
from keyquorum_core.ledger.leaves import NOTHING
from keyquorum_core.release import Leaf
from tests.support.auditing import Desk, desk
from tests.support.ledger_world import TestLog, World, log_signer, serve

JOB = "a" * 26


def release(number: int) -> bytes:
    job = JOB if number % 200 == 7 else "b" * 26
    return Leaf(job, f"{number:064x}", f"{number:064x}", NOTHING, "demo", 1, 1_790_000_000 + number, "owner").to_bytes()


LEAVES = [release(number) for number in range(700)]


class LyingLog(ABC):
    """Serves the log of ``desk`` after it was verified once, changed by :meth:`lie`. ``reasons``: what may be said."""

    reasons: tuple[str, ...] = ("LEDGER_PROOF",)

    def __init__(self, at: Desk) -> None:
        self.at = at
        self.files = at.log.files

    @abstractmethod
    def lie(self) -> None:
        """Change what is served."""

    def republish(self, leaves: Iterable[bytes], by: tuple[str, ...] = ("ch-1", "de-1", "fr-1")) -> None:
        """Another log under the same keys."""
        other = TestLog(self.at.world)
        other.publish(leaves, int(time.time()), by)
        self.files.clear()
        self.files.update(other.files)


class HidesARelease(LyingLog):
    """Leaves out one leaf, and serves the rest as a log of its own, under the cosigned checkpoint."""

    reasons = ("LEDGER_PROOF", "NOT_FOUND", "MALFORMED")

    def lie(self) -> None:
        checkpoint = self.files["checkpoint"]
        self.republish([*LEAVES[:207], *LEAVES[208:], b"filler"])
        self.files["checkpoint"] = checkpoint


class ChangesALeafAndItsTile(LyingLog):
    """Makes a release to an owner look like another, consistently in bundle and tile."""

    def lie(self) -> None:
        forged = TestLog(self.at.world, [*LEAVES[:7], release(9999), *LEAVES[8:]])
        for path in ("tile/entries/000", "tile/0/000"):
            self.files[path] = forged.files[path]


class ChangesOneBitOfALeaf(LyingLog):
    def lie(self) -> None:
        bundle = bytearray(self.files["tile/entries/000"])
        bundle[2500] ^= 4
        self.files["tile/entries/000"] = bytes(bundle)


class SwapsTiles(LyingLog):
    """Serves two bundles and their tiles in each other's place."""

    def lie(self) -> None:
        for kind in ("tile/entries", "tile/0"):
            one, other = f"{kind}/000", f"{kind}/001"
            self.files[one], self.files[other] = self.files[other], self.files[one]


class RepeatsATile(LyingLog):
    """Serves a bundle and its tile twice: a release stands in the log a second time."""

    def lie(self) -> None:
        for kind in ("tile/entries", "tile/0"):
            self.files[f"{kind}/001"] = self.files[f"{kind}/000"]


class TruncatesATile(LyingLog):
    reasons = ("MALFORMED",)

    def lie(self) -> None:
        self.files["tile/0/001"] = self.files["tile/0/001"][:-32]


class TruncatesABundle(LyingLog):
    reasons = ("MALFORMED",)

    def lie(self) -> None:
        self.files["tile/entries/002.p/188"] = self.files["tile/entries/002.p/188"][:-1]


class ServesAnotherWidth(LyingLog):
    """A partial tile with one leaf less than its name says."""

    reasons = ("MALFORMED",)

    def lie(self) -> None:
        shorter = TestLog(self.at.world, LEAVES[:699]).files
        self.files["tile/0/002.p/188"] = shorter["tile/0/002.p/187"]
        self.files["tile/entries/002.p/188"] = shorter["tile/entries/002.p/187"]


class LiesOnAnUpperLevel(LyingLog):
    """Leaves and level 0 are right; the level above, of which proofs are made, is not."""

    def lie(self) -> None:
        above = bytearray(self.files["tile/1/000.p/2"])
        above[0] ^= 1
        self.files["tile/1/000.p/2"] = bytes(above)


class SignsWithoutACustodian(LyingLog):
    """A longer log that only one custodian has cosigned."""

    reasons = ("NO_QUORUM",)

    def lie(self) -> None:
        self.republish([*LEAVES, release(9999)], by=("ch-1",))


class CountsACustodianTwice(LyingLog):
    """Two custodians' lines, one pair a second time under another name."""

    reasons = ("NO_QUORUM",)

    def lie(self) -> None:
        lines = self.at.log.checkpoint(int(time.time()), by=["ch-1", "de-1"])
        text, _, rest = lines.partition(b"\n\n")
        again = b"".join(line + b"\n" for line in rest.splitlines() if b"/ch-1 " in line).replace(b"/ch-1 ", b"/fr-1 ")
        self.files["checkpoint"] = text + b"\n\n" + rest + again


class DropsThePostQuantumLine(LyingLog):
    """The log's Ed25519 line alone, as a quantum computer could make it."""

    reasons = ("SIGNATURE_MISSING",)

    def lie(self) -> None:
        text, _, rest = self.files["checkpoint"].partition(b"\n\n")
        lines = rest.splitlines(keepends=True)
        self.files["checkpoint"] = text + b"\n\n" + lines[0] + b"".join(lines[2:])


class SignsAsAnotherLog(LyingLog):
    reasons = ("SIGNATURE_MISSING",)

    def lie(self) -> None:
        stranger = World(log_signer(self.at.world.signer.origin, "stranger"), self.at.world.witnesses)
        other = TestLog(stranger)
        other.publish(LEAVES, int(time.time()))
        self.files.update(other.files)


SEEN_BY_A_MONITOR = (SignsWithoutACustodian, CountsACustodianTwice, DropsThePostQuantumLine, SignsAsAnotherLog)
"""Lies about what a monitor has not read yet; of the leaves that it verified before, nothing can be changed for it."""
LIES = [
    HidesARelease,
    ChangesALeafAndItsTile,
    ChangesOneBitOfALeaf,
    SwapsTiles,
    RepeatsATile,
    TruncatesATile,
    TruncatesABundle,
    ServesAnotherWidth,
    LiesOnAnUpperLevel,
    SignsWithoutACustodian,
    CountsACustodianTwice,
    DropsThePostQuantumLine,
    SignsAsAnotherLog,
]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    at = desk(tmp_path_factory.mktemp("honest"))
    at.publish(LEAVES)
    return at


@pytest.fixture
def at(honest: Desk, tmp_path: Path) -> Desk:
    """The log, for a test to spoil."""
    return Desk(honest.folder, honest.world, TestLog(honest.world, LEAVES, int(time.time())))


def asked(at: Desk, files: dict[str, bytes], *line: str) -> tuple[int, list[dict[str, Any]]]:
    """A command's exit status and what it printed, against these files served over HTTP."""
    with serve(files) as server, redirect_stdout(StringIO()) as out:
        status = run([*line, *at.options, "--log", server.url, "--wait", "0", "--json"])
    text = out.getvalue().strip()
    return status, [json.loads(text)] if text.startswith("{\n") else [json.loads(each) for each in text.splitlines()]


@pytest.mark.parametrize("lie", LIES)
def test_no_lie_of_the_log_is_believed(at: Desk, tmp_path: Path, lie: type[LyingLog]) -> None:
    state, copy, report, proofs = (str(tmp_path / name) for name in ("state", "copy", "report", "proofs"))
    watch = ["audit", "watch", "--once", "--state", state]
    assert asked(at, at.log.files, *watch)[0] == 0
    liar = lie(at)
    liar.lie()
    for line in (
        ["ledger", "verify"],
        ["ledger", "prove", JOB, "--out", proofs],
        ["ledger", "export", copy],
        ["audit", "report", "--out", report],
    ):
        status, printed = asked(at, liar.files, *line)
        assert (status, printed[0]["error"]["reason"] in liar.reasons) == (1, True), printed
        assert printed[0]["error"]["message"]
    assert not Path(proofs).exists()
    assert not (Path(copy) / "checkpoint").exists()
    assert not (Path(report) / "report.html").exists()
    before = Path(state).read_bytes()
    status, printed = asked(at, liar.files, *watch)
    assert Path(state).read_bytes() == before or status == 0
    if issubclass(lie, SEEN_BY_A_MONITOR):
        assert (status, printed[0]["alarm"]) == (1, True)


def test_half_the_auditors_are_shown_another_log_and_find_out(at: Desk, tmp_path: Path) -> None:
    """The log forks, a quorum's cosignatures on both trees. Each half verifies; their checkpoints together don't."""
    one, other = (tmp_path / name for name in ("one", "other"))
    forked = TestLog(at.world, [*LEAVES[:300], release(9999), *LEAVES[301:], release(701)], int(time.time()))
    assert asked(at, at.log.files, "ledger", "verify", "--save", str(one))[0] == 0
    assert asked(at, forked.files, "ledger", "verify", "--save", str(other))[0] == 0
    status, printed = asked(at, forked.files, "ledger", "verify", "--since", str(one))
    assert (status, printed[0]["error"]["reason"]) == (1, "LEDGER_FORK")
    status, printed = asked(at, at.log.files, "ledger", "verify", "--since", str(other))
    assert (status, printed[0]["error"]["reason"]) == (1, "LEDGER_ROLLBACK")
    at.log.publish([release(800), release(801)], int(time.time()))
    status, printed = asked(at, at.log.files, "ledger", "verify", "--since", str(other))
    assert (status, printed[0]["error"]["reason"]) == (1, "LEDGER_FORK")
