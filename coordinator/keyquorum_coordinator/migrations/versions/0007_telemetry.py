"""Workers' telemetry.

Revision 0007.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "telemetry",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("worker_sha256", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("peer", sa.String(length=256), nullable=False),
        sa.Column("statement", sa.LargeBinary(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("leaf", sa.LargeBinary(), nullable=False),
        sa.Column("last", sa.Boolean(), nullable=False),
        sa.Column("evidence", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name=op.f("fk_telemetry_job_id_jobs")),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_telemetry")),
        sa.UniqueConstraint(
            "job_id", "worker_sha256", "sequence", name=op.f("uq_telemetry_job_id_worker_sha256_sequence")
        ),
    )
    op.create_index(op.f("ix_telemetry_job_id"), "telemetry", ["job_id"])
