"""The tables of 0.1.0, as ``metadata.create_all`` made them there: constraints have the database's own names."""

from alembic import op
from sqlalchemy import Column, Float, ForeignKey, Integer, MetaData, String, Table, Text, UniqueConstraint

revision, down_revision = "0001", None

metadata = MetaData()

Table(
    "api_keys",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("scopes", String(200), nullable=False),
    Column("rate_per_minute", Integer, nullable=False),
    Column("created", Float, nullable=False),
    Column("revoked", Float),
)

Table(
    "consensus_requests",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(40), nullable=False),
    Column("idempotency_key", String(255)),
    Column("fingerprint", String(64), nullable=False),
    Column("body", Text, nullable=False),
    Column("state", String(12), nullable=False),
    Column("answer", Text),
    Column("runner", String(40), nullable=False),
    Column("lease", Float, nullable=False),
    Column("created", Float, nullable=False, index=True),
    UniqueConstraint("owner", "idempotency_key"),
)

Table(
    "consensus_events",
    metadata,
    Column("request", String(40), ForeignKey("consensus_requests.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("type", String(20), nullable=False),
    Column("data", Text, nullable=False),
)


def upgrade() -> None:
    """Make the tables."""
    metadata.create_all(op.get_bind(), checkfirst=False)


def downgrade() -> None:
    """Drop them."""
    metadata.drop_all(op.get_bind(), checkfirst=False)
