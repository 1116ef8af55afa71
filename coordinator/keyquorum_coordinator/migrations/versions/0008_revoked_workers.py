"""Workers in quarantine by a revocation.

Revision 0008.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("worker_quarantine", sa.Column("revoked", sa.String(length=320), nullable=False, server_default=""))
