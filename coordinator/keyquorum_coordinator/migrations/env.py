"""Alembic's entry point: migrations run on the connection, and in the transaction, that :func:`upgrade` made."""

from __future__ import annotations

from alembic import context

from keyquorum_coordinator.database import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
context.run_migrations()
