"""``keyquorum``: the command tree, quorum explain, jobs and keys from the command line, errors and exit status."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import pytest
import typer

import keyquorum.cli
from keyquorum.cli import run
from keyquorum.cli.job import moment
from keyquorum.documents import load_document
from keyquorum_core.errors import MalformedError, Reason, RefusedError
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.client_world import PASSPHRASE, World, job_folder, the_world
from tests.support.fake_coordinator import FakeCoordinator, Files, JobRecord, serving, unreachable

RULE = """
custodians:
  - {id: ch-1, jurisdiction: CH}
  - {id: de-1, jurisdiction: DE}
  - {id: de-2, jurisdiction: DE}
  - {id: fr-1, jurisdiction: FR}
  - {id: is-1, jurisdiction: IS}
quorum:
  at_least: 3
  jurisdictions: 2
  include: {custodian: ch-1}
"""


@pytest.fixture
def rule(tmp_path: Path) -> Path:
    path = tmp_path / "quorum.yaml"
    path.write_text(RULE)
    return path


def test_quorum_explain_gives_numbers_for_scripts(rule: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quorum", "explain", str(rule), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["resilience"]["fewest_custodians_to_collude"] == 3
    assert out["resilience"]["fewest_jurisdictions_to_collude"] == 2
    assert out["resilience"]["veto_holders"] == ["ch-1"]
    assert out["resilience"]["most_that_may_fail"] == 0
    assert out["rule"] == {"at_least": 3, "jurisdictions": 2, "include": {"custodian": "ch-1"}}


def test_quorum_explain_gives_words_for_people(rule: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quorum", "explain", str(rule)]) == 0
    out = capsys.readouterr().out
    assert "fewest custodians that could collude" in out
    assert "ch-1" in out


def test_quorum_explain_reads_json_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {"custodians": [{"id": f"c{i}", "jurisdiction": "CH"} for i in range(3)], "quorum": {"at_least": 2}}

    class Standard:
        buffer = io.BytesIO(json.dumps(document).encode())

    monkeypatch.setattr("sys.stdin", Standard)
    assert run(["quorum", "explain", "-", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resilience"]["most_that_may_fail"] == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (RULE.replace("at_least: 3\n  jurisdictions: 2\n", "at_least: 1\n"), "QUORUM_RULE"),
        (RULE.replace("at_least: 3", "at_least: 9"), "QUORUM_RULE"),
        (RULE.replace("at_least", "atleast"), "QUORUM_RULE"),
        ("[not yaml", "MALFORMED"),
        ("a: &x 1\nb: *x", "MALFORMED"),
        ("a: 1\na: 2", "MALFORMED"),
        ("!!python/object/apply:os.system ['true']", "MALFORMED"),
        ("- 1", "MALFORMED"),
        ("\x00", "MALFORMED"),
        ("", "MALFORMED"),
    ],
)
def test_a_bad_rule_exits_1_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, reason: str
) -> None:
    path = tmp_path / "rule.yaml"
    path.write_text(text)
    assert run(["quorum", "explain", str(path), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["reason"] == reason
    assert run(["quorum", "explain", str(path)]) == 1
    assert "refused: " in capsys.readouterr().err


def test_yaml_that_expands_or_nests_without_end_is_refused() -> None:
    laughs = "a: &a [x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(9))
    for data in (laughs.encode(), b"[" * 100_000, b"x" * (2 << 20), "a: ä".encode("latin-1")):
        with pytest.raises(MalformedError):
            load_document(data, "rule")


def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYQUORUM_PROFILE", raising=False)
    assert run(["quorum", "explain"]) == 2
    assert run(["nothing-of-the-sort"]) == 2
    assert run(["job", "list"]) == 2
    assert "profile" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert run(["version", "--json"]) == 0
    assert run(["version"]) == 0
    out = capsys.readouterr().out
    for name in ("job", "key", "quorum", "identity", "roster", "demo", "up"):
        assert name in out
    assert keyquorum.__version__ in out


def test_commands_of_other_distributions_are_added_and_missing_ones_say_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Point:
        name = "local"

        def __init__(self, register: object) -> None:
            self.load = lambda: register

    def register(app: typer.Typer) -> None:
        @app.command("demo")
        def demo() -> None:
            typer.echo("demonstrated")

    def broken(app: typer.Typer) -> None:
        raise ImportError("no module named something")

    monkeypatch.setattr(keyquorum.cli, "entry_points", lambda group: [Point(register)])
    assert run(["demo"]) == 0
    assert "demonstrated" in capsys.readouterr().out
    for points in ([], [Point(broken)]):
        monkeypatch.setattr(keyquorum.cli, "entry_points", lambda group, points=points: points)
        assert run(["demo", "--json"]) == 1
        error = json.loads(capsys.readouterr().out)["error"]
        assert "pip install keyquorum-local" in error["next_step"]


def test_moments_are_times_or_spans() -> None:
    assert moment(None, 5) is None
    assert moment("2h", 100.9) == 7300
    assert moment("1970-01-01T00:01:00Z", 5) == 60
    assert moment("1970-01-02", 5) == 86400
    with pytest.raises(typer.BadParameter):
        moment("tomorrow", 5)


# -- against a coordinator ------------------------------------------------------------------------------------------


@pytest.fixture
def world() -> World:
    return the_world().honest()


async def command(coordinator: FakeCoordinator, tmp_path: Path, *lines: list[str]) -> list[int]:
    """Run command lines one after the other, as a process would, against a coordinator in this one."""
    async with serving(coordinator) as address:
        profile = coordinator.world.write_profile(tmp_path / "profile", address)
        secret = tmp_path / "passphrase"
        secret.write_text(PASSPHRASE + "\n")
        common = ["--profile", str(profile), "--passphrase-file", str(secret)]
        return [await asyncio.to_thread(run, [*line, *common]) for line in lines]


async def test_a_job_from_submission_to_files(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coordinator = FakeCoordinator(world)
    folder = job_folder(tmp_path / "job")
    submit = ["job", "submit", str(folder), "--key", "demo", "--region", "eu", "--not-after", "2h", "--json"]
    assert await command(coordinator, tmp_path, [*submit, "--wait", "--out", str(tmp_path / "out")]) == [0]
    out = json.loads(capsys.readouterr().out)
    assert out["state"] == "completed"
    assert out["custodians_answered"][0] == "ch-1"
    assert out["result"]["exit_code"] == 0
    assert out["result"]["custodians"] == list(world.quorum.ids)
    assert (tmp_path / "out" / "result.json").read_bytes() == b'{"files": 2}'
    job = out["job_id"]
    codes = await command(
        coordinator,
        tmp_path,
        ["job", "status", job],
        ["job", "status", job, "--follow"],
        ["job", "list"],
        ["job", "logs", job],
        ["job", "result", job],
        ["job", "cancel", job, "--json"],
    )
    assert codes == [0] * 6
    printed = capsys.readouterr().out
    for text in (job, "completed", "ran\n", "result.json", "cancelled"):
        assert text in printed


async def test_a_submission_that_is_not_confirmed_warns(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator = FakeCoordinator(world)
    coordinator.down = {name: unreachable(name) for name in ("ch-1", "de-1")}
    folder = job_folder(tmp_path / "job")
    assert await command(coordinator, tmp_path, ["job", "submit", str(folder), "--key", "demo"]) == [0]
    captured = capsys.readouterr()
    assert captured.out.strip() in coordinator.jobs
    assert "NOT CONFIRMED" in captured.err
    assert "de-1 did not contribute" in captured.err


async def test_what_the_coordinator_says_cannot_drive_the_terminal(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Paints(FakeCoordinator):
        def history(self, job: JobRecord) -> list[pb.JobEvent]:
            return [pb.JobEvent(sequence=1, state="cancelled", detail="\x1b[2J\x1b]0;owned\x07")]

        def job_message(self, job: JobRecord) -> pb.Job:
            message = super().job_message(job)
            message.worker = "\x1b[31mw"
            return message

    coordinator = Paints(world)
    folder = job_folder(tmp_path / "job")
    assert await command(coordinator, tmp_path, ["job", "submit", str(folder), "--key", "demo"]) == [0]
    (job,) = coordinator.jobs
    lines = (["job", "status", job], ["job", "status", job, "-f"], ["job", "list"], ["job", "list", "--json"])
    assert await command(coordinator, tmp_path, *lines) == [0] * 4
    captured = capsys.readouterr()
    assert "owned" in captured.out
    assert "\x1b" not in captured.out + captured.err


async def test_a_failed_job_exits_1_and_its_log_is_there(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(files: Files) -> tuple[int, Files, bytes]:
        return 3, {}, b"it broke\n"

    coordinator = FakeCoordinator(world, run=crash)
    folder = job_folder(tmp_path / "job")
    assert await command(coordinator, tmp_path, ["job", "submit", str(folder), "--key", "demo", "--wait"]) == [1]
    captured = capsys.readouterr()
    assert "it broke" in captured.err
    assert "JOB_FAILED" in captured.err
    (job,) = coordinator.jobs
    assert await command(coordinator, tmp_path, ["job", "logs", job], ["job", "result", job, "--json"]) == [0, 1]
    out = capsys.readouterr().out
    assert out.startswith("it broke\n")
    assert json.loads(out.removeprefix("it broke\n"))["error"]["reason"] == "JOB_FAILED"


async def test_keys_from_the_command_line(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coordinator = FakeCoordinator(world)
    codes = await command(
        coordinator,
        tmp_path,
        ["key", "create", "fresh", "--json"],
        ["key", "create", "fresh"],
        ["key", "list", "--json"],
        ["key", "list"],
        ["key", "show", "fresh"],
    )
    assert codes == [0, 1, 0, 0, 0]
    captured = capsys.readouterr()
    made, _ = json.JSONDecoder().raw_decode(captured.out)
    assert made["custodians"] == list(world.quorum.ids)
    assert "refused: EXISTS" in captured.err


async def test_refusals_of_all_custodians_reach_the_user_with_names(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator = FakeCoordinator(world)
    coordinator.down = {name: RefusedError(Reason.QUOTA, "too many this hour") for name in world.custodians}
    folder = job_folder(tmp_path / "job")
    assert await command(coordinator, tmp_path, ["job", "submit", str(folder), "--key", "demo", "--json"]) == [1]
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["reason"] == "QUOTA"
    assert set(error["details"]) == {*world.custodians, "job"}
