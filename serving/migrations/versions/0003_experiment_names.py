"""An owner has one experiment of a name, also where two are created at once."""

from alembic import op
from sqlalchemy import text

from deliberation.types import InputError

revision, down_revision = "0003", "0002"

INDEX = "uq_experiments_owner_name"

TWICE = """
SELECT owner, name, id FROM experiments AS one
WHERE EXISTS (SELECT 1 FROM experiments AS other
              WHERE other.owner = one.owner AND other.name = one.name AND other.id <> one.id)
ORDER BY owner, name, id
"""


def upgrade() -> None:
    """Add the index, which SQLite can do in place, where a constraint would need all tables anew.

    Raises:
        InputError: field ``database``, if an owner has two of a name; which of them keeps it is not ours to say.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for owner, name, experiment in op.get_bind().execute(text(TWICE)):
        found.setdefault((owner, name), []).append(experiment)
    if found:
        told = "; ".join(f"{name!r} of {owner}: {', '.join(ids)}" for (owner, name), ids in found.items())
        mend = f"has experiments of one owner and name ({told}); change all names but one with SQL, and try again"
        raise InputError("database", op.get_bind().engine.url.render_as_string(hide_password=True), mend)
    op.create_index(INDEX, "experiments", ["owner", "name"], unique=True)


def downgrade() -> None:
    """Drop the index."""
    op.drop_index(INDEX, "experiments")
