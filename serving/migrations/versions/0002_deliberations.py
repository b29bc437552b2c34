"""Deliberations, what members say of the candidates, experiments; and names for the constraints of 0.1.0."""

from alembic import op
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

revision, down_revision = "0002", "0001"

RENAMED = {
    "api_keys": {"api_keys_pkey": "pk_api_keys", "api_keys_digest_key": "uq_api_keys_digest"},
    "consensus_requests": {
        "consensus_requests_pkey": "pk_consensus_requests",
        "consensus_requests_owner_idempotency_key_key": "uq_consensus_requests_owner_idempotency_key",
    },
    "consensus_events": {
        "consensus_events_pkey": "pk_consensus_events",
        "consensus_events_request_fkey": "fk_consensus_events_request",
    },
}
"""Table -> PostgreSQL's own name of a constraint -> ours."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Number = BigInteger().with_variant(Integer, "sqlite")

Table(
    "experiments",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(40), nullable=False, index=True),
    Column("name", String(200), nullable=False),
    Column("spec", Text, nullable=False),
    Column("salt", String(64), nullable=False),
    Column("created", Float, nullable=False),
    Column("stopped", Float),
    Column("verdict", Text),
)

Table(
    "deliberations",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(40), nullable=False, index=True),
    Column("question", Text, nullable=False),
    Column("settings", Text, nullable=False),
    Column("state", String(12), nullable=False),
    Column("round", Integer, nullable=False),
    Column("invite", String(64), nullable=False, unique=True),
    Column("salt", String(64), nullable=False),
    Column("generation", String(40)),
    Column("problem", Text),
    Column("experiment", String(40), ForeignKey("experiments.id"), index=True),
    Column("created", Float, nullable=False),
    Column("closed", Float),
)

Table(
    "members",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("deliberation", String(40), ForeignKey("deliberations.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("alias", Text, nullable=False),
    Column("token", String(64), nullable=False, unique=True),
    Column("consent", Boolean, nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("deliberation", "number"),
)

Table(
    "opinions",
    metadata,
    Column("member", String(40), ForeignKey("members.id", ondelete="CASCADE"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("text", Text, nullable=False),
    Column("created", Float, nullable=False),
)

Table(
    "candidates",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("deliberation", String(40), ForeignKey("deliberations.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("round", Integer, nullable=False),
    Column("number", Integer, nullable=False),
    Column("statement", Text, nullable=False),
    Column("policy", String(200), nullable=False),
    Column("versions", Text, nullable=False),
    Column("welfare", Float, nullable=False),
    Column("predicted", Text, nullable=False),
    Column("winner", Boolean, nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("deliberation", "round", "number"),
)

Table(
    "ratings",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    Column("member", String(40), ForeignKey("members.id", ondelete="CASCADE"), nullable=False),
    Column("candidate", String(40), ForeignKey("candidates.id", ondelete="CASCADE"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("current", Boolean, nullable=False),
    Column("agreement", Integer, nullable=False),
    Column("quality", Integer, nullable=False),
    Column("idempotency_key", String(255)),
    Column("created", Float, nullable=False),
    UniqueConstraint("member", "candidate", "version"),
    UniqueConstraint("member", "idempotency_key"),
    CheckConstraint("agreement BETWEEN 1 AND 7", name="agreement"),
    CheckConstraint("quality BETWEEN 1 AND 7", name="quality"),
    Index("ix_ratings_candidate", "candidate"),
    sqlite_autoincrement=True,
)

Table(
    "comparisons",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    Column("member", String(40), ForeignKey("members.id", ondelete="CASCADE"), nullable=False),
    Column("better", String(40), ForeignKey("candidates.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("worse", String(40), ForeignKey("candidates.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("tie", Boolean, nullable=False),
    Column("current", Boolean, nullable=False),
    Column("created", Float, nullable=False),
    Index("ix_comparisons_member", "member"),
    sqlite_autoincrement=True,
)

Table(
    "critiques",
    metadata,
    Column("member", String(40), ForeignKey("members.id", ondelete="CASCADE"), primary_key=True),
    Column("candidate", String(40), ForeignKey("candidates.id", ondelete="CASCADE"), primary_key=True, index=True),
    Column("text", Text, nullable=False),
    Column("created", Float, nullable=False),
)

Table(
    "assignments",
    metadata,
    Column("experiment", String(40), ForeignKey("experiments.id"), primary_key=True),
    Column(
        "deliberation", String(40), ForeignKey("deliberations.id", ondelete="CASCADE"), primary_key=True, index=True
    ),
    Column("arm", String(100)),
    Column("propensity", Float, nullable=False),
    Column("created", Float, nullable=False),
)

Table(
    "exposures",
    metadata,
    Column("deliberation", String(40), ForeignKey("deliberations.id", ondelete="CASCADE"), primary_key=True),
    Column("arm", String(100), primary_key=True),
    Column("candidate", String(40), ForeignKey("candidates.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("experiment", String(40), ForeignKey("experiments.id"), nullable=False, index=True),
    Column("propensity", Float, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("shown", Float),
)

Table(
    "arm_failures",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    Column("experiment", String(40), ForeignKey("experiments.id"), nullable=False, index=True),
    Column("deliberation", String(40), ForeignKey("deliberations.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("arm", String(100), nullable=False),
    Column("type", String(200), nullable=False),
    Column("created", Float, nullable=False),
    sqlite_autoincrement=True,
)

Table(
    "lineage",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("kind", String(40), nullable=False),
    Column("made_from", Text, nullable=False),
    Column("print", String(100), nullable=False),
    Column("place", Text, nullable=False),
    Column("created", Float, nullable=False),
)


def upgrade() -> None:
    """Make the tables, and name what was there."""
    _name_constraints(back=False)
    metadata.create_all(op.get_bind(), checkfirst=False)


def downgrade() -> None:
    """Drop them with what is in them."""
    metadata.drop_all(op.get_bind(), checkfirst=False)
    _name_constraints(back=True)


def _name_constraints(back: bool) -> None:
    """Give the constraints of 0.1.0 our names, or take them away."""
    if op.get_bind().dialect.name == "sqlite":
        _copy(op.get_bind(), back)
        return
    for table, names in RENAMED.items():
        for theirs, ours in names.items():
            before, after = (ours, theirs) if back else (theirs, ours)
            op.execute(f"ALTER TABLE {table} RENAME CONSTRAINT {before} TO {after}")


def _copy(connection: Connection, back: bool) -> None:
    """SQLite: the same tables anew, with other names of constraints, which it cannot change in place.

    The old ones step aside under another name, children first to go: dropping a parent would empty its children.
    """
    found = MetaData(naming_convention=None if back else metadata.naming_convention)
    found.reflect(connection, only=list(RENAMED))
    if back:
        for table in found.tables.values():
            for constraint in table.constraints:
                constraint.name = None
    tables = found.sorted_tables
    for table in tables:
        for index in table.indexes:
            op.drop_index(str(index.name))
        op.rename_table(table.name, f"{table.name}_old")
    found.create_all(connection, checkfirst=False)
    for table in tables:
        op.execute(f"INSERT INTO {table.name} SELECT * FROM {table.name}_old")
    for table in reversed(tables):
        op.drop_table(f"{table.name}_old")
