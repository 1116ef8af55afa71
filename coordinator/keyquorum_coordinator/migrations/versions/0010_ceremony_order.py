"""The order that ceremonies began in.

Revision 0010.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("ceremonies", sa.Column("number", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_index(op.f("ix_ceremonies_number"), "ceremonies", ["number"])
    ceremonies = sa.table("ceremonies", *(sa.column(name) for name in ("ceremony_id", "created_at", "number")))
    connection = op.get_bind()
    by_age = sa.select(ceremonies.c.ceremony_id).order_by(ceremonies.c.created_at, ceremonies.c.ceremony_id)
    for number, ceremony_id in enumerate(connection.scalars(by_age).all(), 1):
        connection.execute(ceremonies.update().where(ceremonies.c.ceremony_id == ceremony_id).values(number=number))
