"""A user's requests are found by their ids."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_INDEX = "ix_ledger_user_request_id"


def upgrade() -> None:
    op.create_index(_INDEX, "ledger", ["user", "request_id"])


def downgrade() -> None:
    op.drop_index(_INDEX, "ledger")
