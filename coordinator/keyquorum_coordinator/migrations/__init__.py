"""Alembic migrations, run when the coordinator starts: :func:`upgrade`.

Each version knows the schemas before it and no later one: a database with a revision it does not know is refused,
because running an old coordinator on a newer schema could lose what the newer one stored. Alembic is imported only when
there is something to migrate: a coordinator that restarts starts sooner, and stays smaller.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import DBAPIError

from keyquorum_core.errors import Reason, StateError, UnavailableError

__all__ = ["HEAD", "REVISIONS", "current_revision", "upgrade"]

REVISIONS: Final = ("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009", "0010")
"""All revisions this version knows, oldest first; a test holds them to the scripts."""
HEAD: Final = REVISIONS[-1]


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def current_revision(engine: Engine) -> str | None:
    """The revision in the database; None when it is empty."""
    with engine.connect() as connection:
        return _revision(connection)


def upgrade(engine: Engine) -> str:
    """Bring the schema up to date, in one transaction; returns the revision.

    Raises :class:`StateError` (``STATE``) for a revision this version does not know, :class:`UnavailableError`
    (``STORAGE``) when the database cannot be read or changed.
    """
    try:
        with engine.execution_options(keyquorum_write=True).begin() as connection:
            revision = _revision(connection)
            if revision is not None and revision not in REVISIONS:
                raise StateError(
                    Reason.STATE,
                    "the database was written by a newer coordinator",
                    expected=f"revision {HEAD} or one before it",
                    actual=f"revision {revision[:64]}",
                    next_step="Run the coordinator version that wrote it, or a later one",
                )
            if revision != HEAD:
                _migrate(connection)
    except DBAPIError as error:
        raise UnavailableError(
            Reason.STORAGE, "the coordinator's database could not be opened", actual=str(error.orig)[:200]
        ) from None
    return HEAD


def _migrate(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "keyquorum_coordinator:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
