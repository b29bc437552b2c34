"""Training data from the service's database: consented ratings, and the groups they come from, part of them held out.

A deliberation is held out by its id alone: what was held out stays so however many come after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select

from deliberation.datasets import write_jsonl
from deliberation.types import InputError
from serving.sessions import written
from serving.store import reading
from serving.tables import deliberations, members

Row = dict[str, Any]

RATINGS, EVAL_RATINGS = "ratings.jsonl", "eval_ratings.jsonl"
DELIBERATIONS, EVAL_DELIBERATIONS = "deliberations.jsonl", "eval_deliberations.jsonl"
FILES = (RATINGS, EVAL_RATINGS, DELIBERATIONS, EVAL_DELIBERATIONS)


@dataclass(frozen=True)
class Data:
    """Rows of the four files, each list as its reader in training wants it.

    Attributes:
        ratings, eval_ratings: one member's rating of one statement each.
        deliberations, eval_deliberations: id, question and the opinions of the members who consented.
        experiments: ids of the (stopped) experiments that ratings come from.
    """

    ratings: list[Row]
    eval_ratings: list[Row]
    deliberations: list[Row]
    eval_deliberations: list[Row]
    experiments: tuple[str, ...]


def is_held_out(deliberation: str, share: float) -> bool:
    """Whether a deliberation is among the ``share`` (0 to 1) that nothing is fitted to."""
    return int.from_bytes(hashlib.sha256(deliberation.encode()).digest()[:8]) < share * 2**64


def gather(engine: Engine, ratings: Iterable[Row], share: float) -> Data:
    """Split ratings by deliberation, and look up the groups.

    Args:
        ratings: as ``export.export_rows`` gives them.
        share: of the deliberations, to be held out.
    """
    kept, held_out = [], []  # type: list[Row], list[Row]
    for row in ratings:
        (held_out if is_held_out(row["deliberation_id"], share) else kept).append(row)
    groups, others = ([group_row(engine, name) for name in names_of(part)] for part in (kept, held_out))
    return Data(kept, held_out, groups, others, _experiments(engine, names_of([*kept, *held_out])))


def names_of(ratings: Iterable[Row]) -> list[str]:
    """The ids of their deliberations, each once."""
    return list(dict.fromkeys(row["deliberation_id"] for row in ratings))


def group_row(engine: Engine, deliberation: str) -> Row:
    """Id, question and opinions of the members who consented, in the order of joining."""
    with reading(engine) as connection:
        row = connection.execute(select(deliberations).where(deliberations.c.id == deliberation)).one()
        yes = (members.c.deliberation == deliberation) & members.c.consent
        consented = set(connection.execute(select(members.c.id).where(yes)).scalars())
        opinions = [text for member, text in written(connection, deliberation) if member in consented]
    return {"id": deliberation, "question": row.question, "opinions": opinions}


def check_enough(data: Data, min_ratings: int, share: float) -> None:
    """Refuse what is too little to learn from, before anything is trained.

    Raises:
        InputError: naming what there is too little of.
    """
    if len(data.ratings) < min_ratings:
        mend = (
            f"is too few to fit to (held out: {len(data.eval_ratings)}); wait for {min_ratings}, or lower min_ratings"
        )
        raise InputError("ratings", len(data.ratings), mend)
    if not data.eval_ratings:
        count = len(data.deliberations)
        raise InputError("eval_share", share, f"holds out none of {count} deliberations; raise it, or wait for more")


def write(data: Data, folder: Path) -> None:
    """Write the four files."""
    rows = (data.ratings, data.eval_ratings, data.deliberations, data.eval_deliberations)
    for name, part in zip(FILES, rows, strict=True):
        write_jsonl(folder / name, part)


def print_of(folder: Path) -> str | None:
    """SHA-256 of the four files; None unless all are there."""
    if not all((folder / name).is_file() for name in FILES):
        return None
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    return f"sha256:{hashlib.sha256(json.dumps(files).encode()).hexdigest()}"


def _experiments(engine: Engine, names: Sequence[str]) -> tuple[str, ...]:
    query = select(deliberations.c.id, deliberations.c.experiment).where(deliberations.c.experiment.is_not(None))
    with reading(engine) as connection:
        found = dict(tuple(row) for row in connection.execute(query))
    return tuple(sorted({found[name] for name in names if name in found}))
