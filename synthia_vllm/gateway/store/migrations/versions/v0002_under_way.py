"""What a writer of the ledger had under way when it last wrote."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_COLUMNS = ("open_requests", "open_tokens", "open_tokens_most")


def upgrade() -> None:
    for name in _COLUMNS:
        op.add_column("writers", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))


def downgrade() -> None:
    for name in _COLUMNS:
        op.drop_column("writers", name)
