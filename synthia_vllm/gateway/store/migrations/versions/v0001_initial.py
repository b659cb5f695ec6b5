"""Users, keys, their revision, the ledger and its writers."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("priority", sa.String(16), nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger),
        sa.Column("tokens_per_minute", sa.BigInteger),
        sa.Column("concurrent_requests", sa.BigInteger),
        sa.Column("tokens_per_month", sa.BigInteger),
        sa.Column("models", sa.JSON(none_as_null=True)),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("user", sa.String(64), sa.ForeignKey("users.name"), nullable=False),
        sa.Column("digest", sa.String(64), unique=True, nullable=False),
        sa.Column("admin", sa.Boolean, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float),
        sa.Column("revoked", sa.Float),
        sa.Column("rotated", sa.Float),
    )
    revision_table = op.create_table(
        "revision",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(revision_table, [{"id": 1, "number": 0}])
    op.create_table(
        "ledger",
        sa.Column("id", sa.String(160), primary_key=True),
        sa.Column("request_id", sa.String(160), nullable=False),
        sa.Column("user", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(16)),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("route", sa.String(64), nullable=False),
        sa.Column("arrived_at", sa.Float, nullable=False),
        sa.Column("duration", sa.Float, nullable=False),
        sa.Column("queue_wait", sa.Float, nullable=False),
        sa.Column("time_to_first_token", sa.Float),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("generated_tokens", sa.BigInteger, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
    )
    op.create_index("ix_ledger_user_arrived_at", "ledger", ["user", "arrived_at"])
    op.create_index("ix_ledger_arrived_at", "ledger", ["arrived_at"])
    op.create_table(
        "writers",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("started", sa.Float, nullable=False),
        sa.Column("last_flush", sa.Float, nullable=False),
        sa.Column("ended", sa.Float),
        sa.Column("gap", sa.Boolean, nullable=False),
    )


def downgrade() -> None:
    for table in ("writers", "ledger", "revision", "keys", "users"):
        op.drop_table(table)
