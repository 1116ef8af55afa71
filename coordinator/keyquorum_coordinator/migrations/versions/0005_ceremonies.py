"""Ceremonies of every kind, epochs that are retired and destroyed, stale custodians, rosters.

Revision 0005.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for column in (
        sa.Column("kind", sa.String(length=16), nullable=False, server_default="generate"),
        sa.Column("present", sa.Text(), nullable=False, server_default=""),
        sa.Column("waiting", sa.Text(), nullable=False, server_default=""),
    ):
        op.add_column("ceremonies", column)
    op.add_column("keys", sa.Column("retired_at", sa.BigInteger(), nullable=True))
    op.add_column("keys", sa.Column("ended_at", sa.BigInteger(), nullable=True))
    op.create_table(
        "ceremony_receipts",
        sa.Column("ceremony_id", sa.String(length=32), nullable=False),
        sa.Column("custodian", sa.String(length=32), nullable=False),
        sa.Column("receipt", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["ceremony_id"], ["ceremonies.ceremony_id"], name=op.f("fk_ceremony_receipts_ceremony_id_ceremonies")
        ),
        sa.PrimaryKeyConstraint("ceremony_id", "custodian", name=op.f("pk_ceremony_receipts")),
    )
    op.create_table(
        "stale_custodians",
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("epoch", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("custodian", sa.String(length=32), nullable=False),
        sa.Column("since", sa.BigInteger(), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key_id", "epoch", "custodian", name=op.f("pk_stale_custodians")),
    )
    op.create_table(
        "rosters",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_rosters")),
    )
