"""What was made from what: exports of ratings, and the models trained on them, in the table ``lineage``."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, Row, insert, select

from serving.store import reading
from serving.tables import lineage


@dataclass(frozen=True)
class Made:
    """A finished thing.

    Attributes:
        id: names it; the same inputs have the same id.
        kind: ``export``, ``preference`` or ``ppo``.
        made_from: ids of what went in: other rows, and experiments whose ratings did.
        print: of the files (SHA-256) or of the weights, as ``/v1/models`` gives it.
        place: its folder.
    """

    id: str
    kind: str
    made_from: tuple[str, ...]
    print: str
    place: str

    def line(self) -> str:
        """For a person to read."""
        return f"{self.id}  {self.kind:<10}  {self.print}  {self.place}  from {' '.join(self.made_from) or 'nothing'}"


def made_id(*facts: object) -> str:
    """An id that only these facts have."""
    return f"lin_{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


def record(engine: Engine, made: Made) -> None:
    """Keep a row; done again with the same id, it changes nothing."""
    with engine.begin() as connection:
        if connection.execute(select(lineage).where(lineage.c.id == made.id)).first() is None:
            values = {"id": made.id, "kind": made.kind, "print": made.print, "place": made.place}
            values["made_from"] = json.dumps(made.made_from)
            connection.execute(insert(lineage).values(values | {"created": time.time()}))


def recorded(engine: Engine, *, kind: str, place: str | None = None, print: str | None = None) -> list[Made]:
    """The rows of a kind, those at a place or of a print alone if asked for, the oldest first."""
    where = lineage.c.kind == kind
    if place is not None:
        where &= lineage.c.place == place
    if print is not None:
        where &= lineage.c.print == print
    with reading(engine) as connection:
        return [_made(row) for row in connection.execute(select(lineage).where(where).order_by(lineage.c.created))]


def ancestors(engine: Engine, ids: Sequence[str]) -> list[Made]:
    """The rows of these ids and of all that went into them, the oldest first."""
    with reading(engine) as connection:
        rows = {row.id: row for row in connection.execute(select(lineage))}
    found, open_ids = set(), [name for name in ids if name in rows]
    while open_ids:
        name = open_ids.pop()
        found.add(name)
        open_ids += [one for one in _made(rows[name]).made_from if one in rows and one not in found]
    return [_made(row) for row in sorted(rows.values(), key=lambda row: row.created) if row.id in found]


def _made(row: Row) -> Made:
    return Made(row.id, row.kind, tuple(json.loads(row.made_from)), row.print, row.place)
