"""A PostgreSQL server of the tests' own: a private cluster in a folder, on loopback, gone when they are done."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from keyquorum_protos.wire.ports import choose_port

__all__ = ["Postgres", "postgres"]

_READY_SECONDS = 30.0


def _programs() -> Path:
    """The folder with initdb and postgres; skips the test, saying why, where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    if on_path is None:
        pytest.skip("no PostgreSQL server here: install postgresql (Debian) and run again")
    return Path(on_path).parent


def _unprivileged() -> dict[str, object]:
    """PostgreSQL refuses to run as root: somebody else then, as arguments of subprocess."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")


class Postgres:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._databases = 0

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="keyquorum", dbname=database, autocommit=True, connect_timeout=5
        )

    def database(self) -> str:
        """A new, empty database: its SQLAlchemy URL."""
        self._databases += 1
        name = f"ledger{self._databases}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")  # a name of our own
        return f"postgresql+psycopg://keyquorum@127.0.0.1:{self.port}/{name}"

    def terminate_lock_holders(self) -> int:
        """End the sessions that hold an advisory lock, as a broken connection would; how many there were."""
        with self.connect() as connection:
            rows = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
            ).fetchall()
        return len(rows)


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    programs, somebody = _programs(), _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="kq-pg-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        if somebody:
            os.chown(folder, int(str(somebody["user"])), int(str(somebody["group"])))
        data = folder / "data"
        options: dict[str, object] = {"cwd": folder, "stdin": subprocess.DEVNULL, **somebody}
        made = subprocess.run(
            [programs / "initdb", "-D", data, "-U", "keyquorum", "-A", "trust", "--no-sync", "-E", "UTF8"],
            capture_output=True, check=False, timeout=120, **options,
        )  # type: ignore[call-overload]  # fmt: skip
        assert made.returncode == 0, made.stderr
        port = choose_port()
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", "", "-c", "fsync=off"],
                stdout=log, stderr=log, **options,
            )  # type: ignore[call-overload]  # fmt: skip
        try:
            running = Postgres(port)
            _wait(running, server, folder / "log")
            yield running
        finally:
            server.send_signal(signal.SIGINT)  # end sessions, then end
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(running: Postgres, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _READY_SECONDS
    while True:
        assert server.poll() is None, log.read_text(errors="replace")
        try:
            running.connect().close()
        except psycopg.OperationalError:
            assert time.monotonic() < until, log.read_text(errors="replace")
            time.sleep(0.05)
        else:
            return
