"""The tables of the service. Times are seconds since 1970; ids are random and name rows in URLs.

A change here needs a step in ``serving/migrations/versions`` (a test holds the two together).
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
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

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts rows up by itself in INTEGER alone


def _id() -> Column:
    return Column("id", String(40), primary_key=True)


def _of(table: str, name: str, **options: object) -> Column:
    """A column with the id of a row of ``table``; gone when that row goes."""
    return Column(name, String(40), ForeignKey(f"{table}.id", ondelete="CASCADE"), **options)  # type: ignore[arg-type]


def _created() -> Column:
    return Column("created", Float, nullable=False)


api_keys = Table(
    "api_keys",
    metadata,
    _id(),
    Column("name", String(200), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),  # SHA-256 of the secret, which is kept nowhere
    Column("scopes", String(200), nullable=False),
    Column("rate_per_minute", Integer, nullable=False),
    _created(),
    Column("revoked", Float),
)

requests = Table(
    "consensus_requests",
    metadata,
    _id(),
    Column("owner", String(40), nullable=False),
    Column("idempotency_key", String(255)),
    Column("fingerprint", String(64), nullable=False),
    Column("body", Text, nullable=False),
    Column("state", String(12), nullable=False),
    Column("answer", Text),  # JSON: the response, or the problem
    Column("runner", String(40), nullable=False),
    Column("lease", Float, nullable=False),
    Column("created", Float, nullable=False, index=True),
    UniqueConstraint("owner", "idempotency_key"),
)

request_events = Table(
    "consensus_events",
    metadata,
    Column("request", String(40), ForeignKey("consensus_requests.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("type", String(20), nullable=False),
    Column("data", Text, nullable=False),
)

experiments = Table(
    "experiments",
    metadata,
    _id(),
    Column("owner", String(40), nullable=False, index=True),
    Column("name", String(200), nullable=False),
    Column("spec", Text, nullable=False),  # JSON of serving.experiments.Spec: never changed
    Column("salt", String(64), nullable=False),  # secret: without it nobody can tell who gets which arm
    _created(),
    Column("stopped", Float),
    Column("verdict", Text),  # JSON of the report it was stopped with
    Index("uq_experiments_owner_name", "owner", "name", unique=True),  # no constraint: SQLite cannot add one in place
)

deliberations = Table(
    "deliberations",
    metadata,
    _id(),
    Column("owner", String(40), nullable=False, index=True),
    Column("question", Text, nullable=False),
    Column("settings", Text, nullable=False),  # JSON: policy, n, welfare, seed, shown
    Column("state", String(12), nullable=False),
    Column("round", Integer, nullable=False),  # 1, and 2 after a critique round
    Column("invite", String(64), nullable=False, unique=True),  # SHA-256 of the invite token
    Column("salt", String(64), nullable=False),  # of the members' orders
    Column("generation", String(40)),  # names the writing of candidates that is going on, or was the last
    Column("problem", Text),  # JSON: why the last generation came to nothing
    Column("experiment", String(40), ForeignKey("experiments.id"), index=True),
    _created(),
    Column("closed", Float),  # the order in which an experiment counts them
)

members = Table(
    "members",
    metadata,
    _id(),
    _of("deliberations", "deliberation", nullable=False),
    Column("number", Integer, nullable=False),
    Column("alias", Text, nullable=False),
    Column("token", String(64), nullable=False, unique=True),  # SHA-256 of the member's token
    Column("consent", Boolean, nullable=False),  # to training with what they wrote and rated
    _created(),
    UniqueConstraint("deliberation", "number"),
)

opinions = Table(
    "opinions",
    metadata,
    _of("members", "member", primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("text", Text, nullable=False),
    _created(),
)

candidates = Table(
    "candidates",
    metadata,
    _id(),
    _of("deliberations", "deliberation", nullable=False, index=True),
    Column("round", Integer, nullable=False),
    Column("number", Integer, nullable=False),
    Column("statement", Text, nullable=False),
    Column("policy", String(200), nullable=False),
    Column("versions", Text, nullable=False),  # JSON: prints of the weights
    Column("welfare", Float, nullable=False),  # predicted
    Column("predicted", Text, nullable=False),  # JSON: member id -> predicted agreement
    Column("winner", Boolean, nullable=False),
    _created(),
    UniqueConstraint("deliberation", "round", "number"),
)

ratings = Table(
    "ratings",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    _of("members", "member", nullable=False),
    _of("candidates", "candidate", nullable=False),
    Column("version", Integer, nullable=False),  # from 1; a changed mind is a new row
    Column("current", Boolean, nullable=False),
    Column("agreement", Integer, nullable=False),
    Column("quality", Integer, nullable=False),
    Column("idempotency_key", String(255)),
    _created(),
    UniqueConstraint("member", "candidate", "version"),
    UniqueConstraint("member", "idempotency_key"),
    CheckConstraint("agreement BETWEEN 1 AND 7", name="agreement"),
    CheckConstraint("quality BETWEEN 1 AND 7", name="quality"),
    Index("ix_ratings_candidate", "candidate"),
    sqlite_autoincrement=True,  # no number twice, also after an erasure: exports go on from the last one they saw
)

comparisons = Table(
    "comparisons",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    _of("members", "member", nullable=False),
    _of("candidates", "better", nullable=False, index=True),  # an index: else erasing a candidate reads all rows
    _of("candidates", "worse", nullable=False, index=True),
    Column("tie", Boolean, nullable=False),
    Column("current", Boolean, nullable=False),
    _created(),
    Index("ix_comparisons_member", "member"),
    sqlite_autoincrement=True,
)

critiques = Table(
    "critiques",
    metadata,
    _of("members", "member", primary_key=True),
    _of("candidates", "candidate", primary_key=True, index=True),
    Column("text", Text, nullable=False),
    _created(),
)

assignments = Table(
    "assignments",
    metadata,
    Column("experiment", String(40), ForeignKey("experiments.id"), primary_key=True),
    _of("deliberations", "deliberation", primary_key=True, index=True),
    Column("arm", String(100)),  # None: paired, all arms
    Column("propensity", Float, nullable=False),  # chance of having been given this arm
    _created(),
)

exposures = Table(
    "exposures",
    metadata,
    _of("deliberations", "deliberation", primary_key=True),
    Column("arm", String(100), primary_key=True),
    _of("candidates", "candidate", nullable=False, index=True),
    Column("experiment", String(40), ForeignKey("experiments.id"), nullable=False, index=True),
    Column("propensity", Float, nullable=False),
    Column("seconds", Float, nullable=False),  # the arm took to write it
    Column("shown", Float),  # when a member first saw it
)

failures = Table(
    "arm_failures",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    Column("experiment", String(40), ForeignKey("experiments.id"), nullable=False, index=True),
    _of("deliberations", "deliberation", nullable=False, index=True),
    Column("arm", String(100), nullable=False),
    Column("type", String(200), nullable=False),  # of the problem
    _created(),
    sqlite_autoincrement=True,
)

lineage = Table(
    "lineage",
    metadata,
    _id(),
    Column("kind", String(40), nullable=False),  # export, preference, ppo
    Column("made_from", Text, nullable=False),  # JSON: ids of lineage, experiment
    Column("print", String(100), nullable=False),  # of the file or the weights
    Column("place", Text, nullable=False),
    _created(),
)
