"""The schema: migrations make what the models say, newer ones are refused, a failed write changes nothing."""

from __future__ import annotations

import asyncio
import sqlite3
from importlib.metadata import files
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from keyquorum_coordinator import migrations
from keyquorum_coordinator.database import Base, Database, EventRow, JobRow, make_engine
from keyquorum_coordinator.jobs import JobStore
from keyquorum_core.errors import MalformedError, Reason, StateError, UnavailableError
from tests.support.coordinator import new_job

JOB = new_job()


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return make_engine(f"sqlite:///{tmp_path / 'c.db'}")


def test_migrations_make_exactly_what_the_models_say(engine: Engine) -> None:
    migrations.upgrade(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_the_revisions_it_knows_are_those_of_its_scripts() -> None:
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert tuple(script.revision for script in scripts.walk_revisions())[::-1] == migrations.REVISIONS


def test_ceremonies_from_before_they_were_numbered_keep_the_order_of_their_times(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", "keyquorum_coordinator:migrations")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0009")
        for ceremony_id, created_at in (("aa", 30), ("cc", 10), ("bb", 20)):
            connection.execute(
                text(
                    "INSERT INTO ceremonies (ceremony_id, plan, key_id, epoch, step, created_at, updated_at) "
                    "VALUES (:ceremony_id, '', 'key-1', 1, 'done', :created_at, 0)"
                ),
                {"ceremony_id": ceremony_id, "created_at": created_at},
            )
    migrations.upgrade(engine)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT ceremony_id, number FROM ceremonies ORDER BY number")).all()
    assert [tuple(row) for row in rows] == [("cc", 1), ("bb", 2), ("aa", 3)]
    engine.dispose()


def test_upgrading_again_changes_nothing(engine: Engine) -> None:
    assert migrations.upgrade(engine) == migrations.upgrade(engine) == migrations.current_revision(engine)
    engine.dispose()


def test_a_newer_unknown_revision_is_refused(engine: Engine) -> None:
    migrations.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StateError) as caught:
        migrations.upgrade(engine)
    assert "9999" in caught.value.actual
    assert migrations.current_revision(engine) == "9999"
    engine.dispose()


def test_a_file_that_is_no_database_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "c.db").write_bytes(b"this is not a database at all" * 100)
    engine = make_engine(f"sqlite:///{tmp_path / 'c.db'}")
    with pytest.raises(UnavailableError) as caught:
        migrations.upgrade(engine)
    assert caught.value.reason is Reason.STORAGE
    engine.dispose()


def test_an_unusable_url_is_told_apart() -> None:
    with pytest.raises(MalformedError):
        make_engine("nosuchdatabase://x")


def test_migrations_are_part_of_the_distribution() -> None:
    package = Path(migrations.__file__).parent
    assert (package / "versions" / "0001_initial.py").exists()
    assert (package / "env.py").exists()
    assert files("keyquorum-coordinator") is not None


def test_commits_are_durable_and_writes_lock_at_once(engine: Engine) -> None:
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    engine.dispose()


async def test_a_transaction_that_raises_leaves_no_trace(engine: Engine) -> None:
    migrations.upgrade(engine)
    database = Database(engine)
    jobs = JobStore(database)
    await jobs.submit(JOB)

    def halfway(session: Session) -> None:
        session.get_one(JobRow, JOB.job_id).state = "opened"
        session.flush()
        raise StateError(Reason.STATE, "stop here")

    with pytest.raises(StateError):
        await database.write(halfway)
    assert (await jobs.get(JOB.job_id)).state == "submitted"
    database.close()


async def test_an_event_that_cannot_be_written_undoes_its_state_change(engine: Engine) -> None:
    migrations.upgrade(engine)
    database = Database(engine)
    jobs = JobStore(database)
    await jobs.submit(JOB)

    def occupy(session: Session) -> None:
        session.add(EventRow(job_id=JOB.job_id, sequence=2, time=0, state="opened", detail=""))

    await database.write(occupy)
    with pytest.raises(UnavailableError) as caught:
        await jobs.opened(JOB.job_id)
    assert caught.value.reason is Reason.STORAGE
    assert (await jobs.get(JOB.job_id)).state == "submitted"
    database.close()


async def test_a_full_disk_is_a_storage_error_and_the_job_stays_as_it_was(engine: Engine) -> None:
    migrations.upgrade(engine)
    database = Database(engine)
    jobs = JobStore(database)
    await jobs.submit(JOB)

    def no_more_pages(session: Session) -> None:
        session.execute(text("PRAGMA max_page_count = 1"))

    await database.write(no_more_pages)
    with pytest.raises(UnavailableError) as caught:
        await jobs.commit(JOB.job_id, bytes(1 << 20))
    assert caught.value.reason is Reason.STORAGE
    assert (await jobs.get(JOB.job_id)).opening == b""
    database.close()


async def test_reads_go_on_while_a_write_is_under_way(engine: Engine) -> None:
    migrations.upgrade(engine)
    database = Database(engine)
    jobs = JobStore(database)
    await jobs.submit(JOB)
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(session: Session) -> None:
        session.get_one(JobRow, JOB.job_id).owner = "bob"
        session.flush()
        loop.call_soon_threadsafe(started.set)
        import time

        time.sleep(0.3)

    writing = asyncio.create_task(database.write(slow))
    await started.wait()
    assert (await asyncio.wait_for(jobs.get(JOB.job_id), 0.2)).owner == "alice"
    await writing
    assert (await jobs.get(JOB.job_id)).owner == "bob"
    database.close()


async def test_a_lock_held_elsewhere_is_a_storage_error(engine: Engine, tmp_path: Path) -> None:
    migrations.upgrade(engine)
    database = Database(engine)

    def impatient(session: Session) -> None:
        session.execute(text("PRAGMA busy_timeout = 50"))

    await database.write(impatient)
    other = sqlite3.connect(tmp_path / "c.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(UnavailableError):
        await JobStore(database).submit(JOB)
    other.execute("ROLLBACK")
    other.close()
    await JobStore(database).submit(JOB)
    database.close()
