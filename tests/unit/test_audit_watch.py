"""``keyquorum audit watch``: it follows the log, alarms on what must not be, and survives restarts and bad networks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keyquorum.audit.events import Event
from keyquorum.audit.watch import Monitor, Watching
from keyquorum.audit.watch_state import WatchState
from keyquorum.cli import run
from keyquorum.ledger.source import DirectorySource
from keyquorum_core.errors import KeyquorumError, MalformedError, Reason, RefusedError, UnavailableError
from keyquorum_core.ledger.leaves import Alarm
from keyquorum_core.release import Leaf
from tests.support.auditing import Desk, desk
from tests.support.ledger_world import TestLog, World, log_signer, serve

DIGEST = "0" * 64


def release(key: str, number: int = 0, recipient: str = "worker") -> bytes:
    evidence = Leaf.NO_EVIDENCE if recipient == "owner" else f"{number + 1:064x}"
    return Leaf("a" * 26, DIGEST, DIGEST, evidence, key, 1, int(time.time()), recipient).to_bytes()


def alarm() -> bytes:
    return Alarm(alarm="fork", seat="custodian/ch-1", evidence_sha256=DIGEST, time=int(time.time())).to_bytes()


EARLIER = [release("demo", 1), release("other", 2), alarm(), *(b"leaf %d" % n for n in range(300))]


@pytest.fixture
def watched(tmp_path: Path) -> Desk:
    return desk(tmp_path, EARLIER)


Lines = list[dict[str, Any]]


class Watcher:
    """The command with one state file, run once each time."""

    def __init__(self, at: Desk, capsys: pytest.CaptureFixture[str]) -> None:
        self._at, self._capsys = at, capsys
        self.state = at.folder / "state.json"

    def __call__(self, *more: str, options: list[str] | None = None) -> tuple[int, Lines]:
        self._capsys.readouterr()
        line = ["audit", "watch", "--state", str(self.state), "--once", "--json", *(options or self._at.offline), *more]
        status = run(line)
        return status, [json.loads(each) for each in self._capsys.readouterr().out.splitlines() if each.startswith("{")]


@pytest.fixture
def watch(watched: Desk, capsys: pytest.CaptureFixture[str]) -> Watcher:
    return Watcher(watched, capsys)


def kinds(lines: Lines) -> list[str]:
    return [line["event"] for line in lines]


def test_the_first_round_verifies_everything_and_alarms_about_nothing_past(watched: Desk, watch: Watcher) -> None:
    status, lines = watch("--key", "demo")
    assert (status, kinds(lines)) == (0, ["verified"])
    assert (lines[0]["added"], lines[0]["earlier_releases"], lines[0]["earlier_alarms"]) == (303, {"demo": 1}, 1)
    assert watch("--key", "demo")[1][0]["added"] == 0


def test_releases_of_watched_keys_and_logged_alarms_are_said(watched: Desk, watch: Watcher) -> None:
    watch()
    watched.publish([release("demo", 7), release("other", 8), alarm(), release("demo", 9, "owner")])
    status, lines = watch("--key", "demo")
    assert (status, kinds(lines)) == (1, ["verified", "release", "logged-alarm", "release"])
    assert [line.get("index") for line in lines] == [None, 303, 305, 306]
    assert [line["recipient"] for line in lines if line["event"] == "release"] == ["worker", "owner"]
    assert lines[2]["seat"] == "custodian/ch-1"
    status, lines = watch("--key", "demo")
    assert (status, kinds(lines), lines[0]["added"]) == (0, ["verified"], 0)


def test_a_fork_is_proven_kept_and_stays_an_alarm(watched: Desk, watch: Watcher) -> None:
    watch()
    before = watched.log.files["checkpoint"]
    fork = TestLog(watched.world, [b"another", *EARLIER[1:], b"more"], int(time.time()))
    fork.write(watched.folder / "log")
    for _ in range(2):
        status, lines = watch()
        assert (status, kinds(lines)) == (1, ["fork"])
        assert lines[0]["error"]["reason"] == "LEDGER_FORK"
    evidence = Path(lines[0]["evidence"])
    assert (evidence / "before.checkpoint").read_bytes() == before
    assert (evidence / "served.checkpoint").read_bytes() == fork.files["checkpoint"]
    assert json.loads((evidence / "error.json").read_text())["reason"] == "LEDGER_FORK"
    assert len(list(evidence.parent.iterdir())) == 1
    watched.publish([b"the log that was verified before"])
    assert watch()[0] == 0


@pytest.mark.parametrize("by", [("ch-1", "de-1", "fr-1"), ()], ids=["cosigned", "cosigned by nobody"])
def test_another_root_of_the_same_size_is_a_fork_whoever_cosigned_it(
    watched: Desk, watch: Watcher, by: tuple[str, ...]
) -> None:
    watch()
    fork = TestLog(watched.world, [*EARLIER[:-1], b"another"], int(time.time()))
    fork.publish(now=int(time.time()), by=by)
    fork.write(watched.folder / "log")
    assert kinds(watch()[1]) == ["fork"]


async def test_a_rollback_is_an_alarm(watched: Desk, tmp_path: Path) -> None:
    state = WatchState(tmp_path / "state", tmp_path / "evidence")
    assert await said(watched, state) == ["verified"]
    TestLog(watched.world, EARLIER[:-1], int(time.time())).write(watched.folder / "log")
    events: list[Event] = []
    await monitor(watched, state).round(events.append)
    assert [str(event.kind) for event in events] == ["rollback"]
    assert names(Path(str(events[0].details["evidence"])), "before", "served", "error") == [
        "before.checkpoint", "error.json", "served.checkpoint"
    ]  # fmt: skip


async def test_a_coordinator_that_lags_behind_another_is_waited_for(watched: Desk, tmp_path: Path) -> None:
    state = WatchState(tmp_path / "state", tmp_path / "evidence")
    before = watched.log.files["checkpoint"]
    watched.publish([b"more"])
    assert await said(watched, state) == ["verified"]
    shown = [before, watched.log.files["checkpoint"]]

    class Lagging(DirectorySource):
        async def read(self, path: str, max_bytes: int) -> bytes:
            return shown.pop(0) if path == "checkpoint" else await super().read(path, max_bytes)

    events: list[Event] = []
    source = Lagging(watched.folder / "log")
    await Monitor(source, lambda: watched.world.trust, state, Watching(patience=5.0)).round(events.append)
    assert ([str(event.kind) for event in events], shown) == (["verified"], [])


def test_a_log_that_stands_still_is_an_alarm(watched: Desk, watch: Watcher) -> None:
    watched.publish(age=4000)
    assert kinds(watch()[1]) == ["verified", "stalled"]
    assert kinds(watch("--max-age", "5000")[1]) == ["verified"]
    assert kinds(watch("--max-age", "0")[1]) == ["verified"]
    (watched.folder / "log/checkpoint").unlink()
    status, lines = watch()
    assert (status, kinds(lines)) == (1, ["unreachable", "stalled"])


async def said(at: Desk, state: WatchState) -> list[str]:
    """What one round of a monitor with no patience says."""
    events: list[Event] = []
    await monitor(at, state).round(events.append)
    return [str(event.kind) for event in events]


async def test_a_missing_quorum_is_an_alarm(watched: Desk, tmp_path: Path) -> None:
    state = WatchState(tmp_path / "state", tmp_path / "evidence")
    assert await said(watched, state) == ["verified"]
    watched.publish([b"more"], by=["ch-1", "de-1"])
    assert await said(watched, state) == ["no-quorum"]
    watched.publish()
    assert await said(watched, state) == ["verified"]


def test_what_is_served_wrong_is_refused_and_not_remembered(watched: Desk, watch: Watcher) -> None:
    watch()
    watched.publish([release("demo", 3)])
    bundle = watched.folder / "log" / next(p for p in watched.log.files if p.endswith("entries/001.p/48"))
    good = bundle.read_bytes()
    bundle.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    status, lines = watch("--key", "demo")
    assert (status, kinds(lines)) == (1, ["refused"])
    bundle.write_bytes(good)
    assert kinds(watch("--key", "demo")[1]) == ["verified", "release"]


def test_a_log_out_of_reach_is_not_an_alarm(watched: Desk, watch: Watcher) -> None:
    assert watch(options=[*watched.options, "--log", str(watched.folder / "nowhere")])[0] == 3
    watch()
    status, lines = watch(options=[*watched.options, "--log", str(watched.folder / "nowhere")])
    assert (status, kinds(lines)) == (3, ["unreachable"])
    assert watch()[0] == 0


def test_another_logs_checkpoint_is_refused(watched: Desk, watch: Watcher) -> None:
    watch()
    stranger = World(log_signer(watched.world.signer.origin, "stranger"), watched.world.witnesses)
    TestLog(stranger, EARLIER, int(time.time())).write(watched.folder / "log")
    status, lines = watch()
    assert (status, kinds(lines), lines[0]["error"]["reason"]) == (1, ["refused"], "SIGNATURE_MISSING")


@pytest.mark.parametrize("damage", ["", "{", "{}", '{"version":2,"checkpoint":"x","quorum_time":1}', "x" * 300_000])
def test_a_damaged_state_file_is_never_started_over(watched: Desk, watch: Watcher, damage: str) -> None:
    watch.state.write_text(damage)
    assert watch()[0] == 1
    assert watch.state.read_text() == damage


def test_a_state_of_another_log_is_refused(watched: Desk, watch: Watcher, tmp_path: Path) -> None:
    stranger = World(log_signer(watched.world.signer.origin, "stranger"))
    state = {"version": 1, "checkpoint": stranger.cosigned(1, bytes(32)).decode(), "quorum_time": 1}
    watch.state.write_text(json.dumps(state))
    assert watch()[0] == 1
    with pytest.raises(RefusedError, match="start with a new state file"):
        WatchState(watch.state, tmp_path).load(watched.world.trust)


def test_two_monitors_do_not_share_a_state_file(watched: Desk, watch: Watcher, tmp_path: Path) -> None:
    with WatchState(watch.state, tmp_path).held():
        assert watch()[0] == 1
    assert watch()[0] == 0


def test_wrong_usage(watched: Desk, watch: Watcher) -> None:
    assert watch("--key", "No Such Key")[0] == 1
    assert watch("--max-age", "-1")[0] == 2


async def failing_round(at: Desk, state: WatchState) -> None:
    events: list[Event] = []
    with pytest.raises(UnavailableError):
        await monitor(at, state).round(events.append)
    assert [str(event.kind) for event in events] == ["verified", "release"]


def monitor(at: Desk, state: WatchState) -> Monitor:
    watching = Watching(frozenset({"demo"}), patience=0.0)
    return Monitor(DirectorySource(at.folder / "log"), lambda: at.world.trust, state, watching)


async def test_what_could_not_be_remembered_is_said_again(
    watched: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = WatchState(tmp_path / "state", tmp_path / "evidence")
    await monitor(watched, state).round(lambda event: None)
    watched.publish([release("demo", 3)])
    full: Callable[..., None] = _full
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", full)
        await failing_round(watched, state)
    assert names(tmp_path) == ["state"]
    assert await said(watched, state) == ["verified", "release"]


def names(folder: Path, *beginnings: str) -> list[str]:
    """Files that begin so, by default those of the state; half-written ones included."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith((".", *(beginnings or ["state"]))))


def _full(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_it_follows_says_each_thing_once_and_stops_on_a_signal(watched: Desk) -> None:
    with serve(watched.log.files) as server:
        line = ["audit", "watch", "--state", str(watched.folder / "s"), "--interval", "0.1", "--json", "--key", "demo"]
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from keyquorum.cli import main; main()",
                *line,
                *watched.options,
                "--log",
                server.url,
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            first = json.loads(process.stdout.readline())
            watched.log.publish([release("demo", 3)], int(time.time()))
            rest = [json.loads(process.stdout.readline()) for _ in range(2)]
            fork = TestLog(watched.world, [b"another", *EARLIER], int(time.time()))
            watched.log.files.update(fork.files)
            rest.append(json.loads(process.stdout.readline()))
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            remainder, _ = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
    assert kinds([first, *rest]) == ["verified", "verified", "release", "fork"]
    assert all(json.loads(each)["event"] == "verified" for each in remainder.splitlines())
    assert process.returncode == 1


def test_errors_of_the_state_are_typed(tmp_path: Path, watched: Desk) -> None:
    (tmp_path / "file").write_text("x")
    state = WatchState(tmp_path / "file/state", tmp_path)
    with pytest.raises(KeyquorumError) as caught, state.held():
        raise AssertionError
    assert caught.value.reason is Reason.STORAGE
    (tmp_path / "bad").write_text("[]")
    with pytest.raises(MalformedError):
        WatchState(tmp_path / "bad", tmp_path).load(watched.world.trust)
