"""Where the ledger has the leaf of a release.

Revision 0004, after 0003.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Releases from before there was a ledger are in none: past the end of every tree.
    nowhere = sa.text(str(2**63 - 1))
    op.add_column("releases", sa.Column("leaf_index", sa.BigInteger(), nullable=False, server_default=nowhere))
