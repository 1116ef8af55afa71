"""Several coordinators, one log: the sequencer on a real PostgreSQL, with its lock kept, lost and died with."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from keyquorum_coordinator import migrations
from keyquorum_coordinator.config import CONFIG_NAME, CoordinatorConfig, load_config
from keyquorum_coordinator.database import Base, Database, make_engine
from keyquorum_coordinator.jobs import JobStore
from keyquorum_coordinator.ledger.log import Entry, Log
from keyquorum_coordinator.ledger.setup import create_ledger, open_log
from keyquorum_coordinator.log_key import load_log_key
from keyquorum_core.errors import KeyquorumError, Reason, StateError, UnavailableError
from keyquorum_core.ledger.leaves import parse_leaf
from keyquorum_core.ledger.log_keys import SignedCheckpoint
from keyquorum_protos.v1 import coordinator_pb2 as pb
from tests.support.coordinator import Owner, Running, make_folder, new_job
from tests.support.fake_custodian import FakeCommittee
from tests.support.ledger_log import NOW, HandedOut, add, all_leaves, leaf, make_log, request
from tests.support.postgres import Postgres, postgres

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture
def shared(server: Postgres, tmp_path: Path) -> Iterator[tuple[CoordinatorConfig, Log, Log]]:
    """Two coordinators' logs on one database and one object store."""
    url = server.database()
    config, first = make_log(tmp_path, ledger_database=url, ledger_checkpoint=url)
    second = open_log(config)
    yield config, first, second
    first.close()
    second.close()


async def test_the_schema_and_a_job_on_postgresql(server: Postgres) -> None:
    engine = make_engine(server.database())
    migrations.upgrade(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    database = Database(engine)
    jobs = JobStore(database)
    assert (await jobs.submit(new_job())).state == "submitted"
    assert (await jobs.cancel("a" * 26, "done")).state == "cancelled"
    database.close()


def test_coordinators_take_turns_and_write_one_log(shared: tuple[CoordinatorConfig, Log, Log]) -> None:
    _, first, second = shared
    handed_out = HandedOut()
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work(log: Log, numbers: range) -> None:
        try:
            for start in range(0, len(numbers), 5):
                some = numbers[start : start + 5]
                for number, entry in zip(some, add(log, *some), strict=True):
                    with lock:
                        handed_out.take(number, entry, log.keys)
                while log.seal():
                    pass
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(first, range(400))),
        threading.Thread(target=work, args=(second, range(175, 525))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for log in (first, second):
        assert log.follow().checkpoint.size == 525
        handed_out.check(log)
        assert log.unsealed == 525 - 512


def test_a_lost_lock_cannot_fork_the_log(server: Postgres, shared: tuple[CoordinatorConfig, Log, Log]) -> None:
    """The first coordinator loses its session between writing leaves and storing the checkpoint over them; the second
    goes on meanwhile; then the first one wakes."""
    _, first, second = shared
    handed_out = HandedOut()
    handed_out.take(0, add(first, 0)[0], first.keys)
    swap = first._checkpoints.swap
    refused: list[SignedCheckpoint] = []

    def late(old: bytes, new: SignedCheckpoint) -> bool:
        assert server.terminate_lock_holders() == 1
        for number, entry in zip((10, 11, 1), add(second, 10, 11, 1), strict=True):
            handed_out.take(number, entry, second.keys)
        done = swap(old, new)
        if not done:
            refused.append(new)
        first._checkpoints.swap = swap  # type: ignore[method-assign]
        return done

    first._checkpoints.swap = late  # type: ignore[method-assign]
    for number, entry in zip((1, 2), add(first, 1, 2), strict=True):
        handed_out.take(number, entry, first.keys)
    assert len(refused) == 1, "signed, and given to nobody"
    assert all_leaves(first) == [leaf(0), leaf(1), leaf(2), leaf(10), leaf(11)]
    for log in (first, second):
        log.follow()
        handed_out.check(log)


def test_both_without_a_lock_still_write_one_log(
    server: Postgres, shared: tuple[CoordinatorConfig, Log, Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decides is the primary key and the compare-and-swap, not the lock."""
    _, first, second = shared
    for log in (first, second):
        monkeypatch.setattr(log._leaves, "exclusive", contextlib.nullcontext)
    handed_out = HandedOut()
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work(log: Log, numbers: range) -> None:
        try:
            for number in numbers:
                for _ in range(100):  # out of turn too often is an error that says: ask again
                    try:
                        (entry,) = log.add([request(number)])
                    except UnavailableError:
                        continue
                    assert isinstance(entry, Entry)
                    with lock:
                        handed_out.take(number, entry, log.keys)
                    break
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(first, range(60))),
        threading.Thread(target=work, args=(second, range(30, 60))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(handed_out.places) == list(range(60))
    for log in (first, second):
        log.follow()
        handed_out.check(log)
        assert log.latest.checkpoint.size == 60


def test_a_coordinator_killed_with_the_lock_holds_up_nobody(shared: tuple[CoordinatorConfig, Log, Log]) -> None:
    config, first, _ = shared
    add(first, 0)
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from keyquorum_coordinator.config import CoordinatorConfig\n"
        "from keyquorum_coordinator.ledger.setup import open_log\n"
        "config = CoordinatorConfig(Path(sys.argv[1]), 'main', 'demo', '127.0.0.1:7000', '',"
        " ledger_database=sys.argv[2], ledger_checkpoint=sys.argv[2])\n"
        "log = open_log(config)\n"
        "def hang(old, new):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
        "log._checkpoints.swap = hang\n"
        'log.add([(b\'request 1\', b\'{"number":1,"type":"test"}\')])\n'
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(config.directory), config.ledger_database], stdout=subprocess.PIPE, cwd=ROOT
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"locked\n"
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        assert [entry.index for entry in add(first, 2, 1)] == [2, 1], "after the leaf that the dead one wrote"
    assert all_leaves(first) == [leaf(0), leaf(1), leaf(2)]


def test_a_coordinator_that_hangs_with_the_lock_holds_up_nobody_for_long(
    server: Postgres, shared: tuple[CoordinatorConfig, Log, Log]
) -> None:
    config, first, _ = shared
    with server.connect(config.ledger_database.rpartition("/")[2]) as somebody:
        somebody.execute("SELECT pg_advisory_lock(%s)", (first._leaves._lock_key,))
        assert [entry.index for entry in add(first, 0, 1)] == [0, 1]
        held = somebody.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted").fetchone()
        assert held == (1,), "it has not let go"
    assert all_leaves(first) == [leaf(0), leaf(1)]


def test_a_log_is_made_once_for_all(shared: tuple[CoordinatorConfig, Log, Log]) -> None:
    config, first, _ = shared
    add(first, 0)
    with pytest.raises(StateError) as caught:
        create_ledger(config, load_log_key(config.path(config.log_key)), now=NOW)
    assert caught.value.reason is Reason.EXISTS


def test_a_database_without_a_log_is_a_refusal(server: Postgres, shared: tuple[CoordinatorConfig, Log, Log]) -> None:
    config, _, _ = shared
    url = server.database()
    empty = CoordinatorConfig(
        config.directory, "main", "demo", "127.0.0.1:7000", "", ledger_database=url, ledger_checkpoint=url
    )
    with pytest.raises(KeyquorumError) as caught:
        open_log(empty)
    assert caught.value.reason is Reason.NOT_FOUND
    away = CoordinatorConfig(
        config.directory, "main", "demo", "127.0.0.1:7000", "",
        ledger_database="postgresql+psycopg://keyquorum@127.0.0.1:1/none", ledger_checkpoint=url,
    )  # fmt: skip
    with pytest.raises(KeyquorumError) as caught:
        create_ledger(away, load_log_key(config.path(config.log_key)), now=NOW)
    assert caught.value.reason is Reason.STORAGE


async def test_two_coordinators_serve_one_log(server: Postgres, tmp_path: Path) -> None:
    """Whole coordinators, in folders of their own: a job taken by one is in the log that the other shows."""
    committee = await FakeCommittee.start()
    url = server.database()
    running: list[Running] = []
    for name in ("a", "b"):
        config = make_folder(tmp_path / name, committee)
        path = config.directory / CONFIG_NAME
        text = path.read_text()
        for old, new in (
            ('database = "coordinator.db"', f'database = "{url}"'),
            ('ledger_database = "ledger.db"', f'ledger_database = "{url}"'),
            ('ledger_checkpoint = "ledger-checkpoint.db"', f'ledger_checkpoint = "{url}"'),
            ('ledger_tiles = "ledger"', f'ledger_tiles = "{tmp_path / "tiles"}"'),
        ):
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        config = load_config(config.directory)
        if name == "a":
            create_ledger(config, committee.log, now=NOW)
        running.append(await Running.again(config, committee))
    first, second = running
    owner = Owner()
    for each in running:
        _, manifest = owner.manifest()
        await each.caller("owner", "alice").jobs.Submit(pb.SubmitRequest(manifest=manifest))
    sizes = [(await each.server.sequencer.reach(3)).checkpoint.size for each in running]
    assert sizes == [3, 3], "the roster once, and both jobs"
    leaves = all_leaves(first.server.sequencer._ledger)
    assert leaves == all_leaves(second.server.sequencer._ledger)
    assert [parse_leaf(each).to_bytes() for each in leaves] == leaves
    for each in running:
        await each.stop()
    await committee.stop()
