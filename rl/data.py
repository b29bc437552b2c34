"""Table rows -> what the trainers read. Every text is checked before anything is trained or written."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from deliberation.prompts import one_line, statement_prompt
from deliberation.types import Deliberation, InputError, check_text

MEMBER_COLUMNS = ("weights", "clusters")
"""Optional columns of the deliberations PPO trains on: one entry a member."""


def checked_row(row: dict[str, Any], index: int, source: str) -> Deliberation:
    """The row's question and opinions as a checked ``Deliberation``.

    Raises:
        InputError: naming ``source``, the row and the field.
    """
    opinions = row.get("opinions")
    if not isinstance(opinions, list | tuple):
        raise InputError(f"{source} row {index}: opinions", opinions, "must be a list of strings")
    try:
        return Deliberation(id=str(index), question=row.get("question", ""), opinions=tuple(opinions))
    except InputError as error:
        raise InputError(f"{source} row {index}: {error.field}", error.value, error.mend) from error


def sft_pairs(
    rows: Sequence[dict[str, Any]], *, shuffle_opinions: bool, seed: int, source: str = "statements"
) -> list[dict]:
    """Prompt/completion pairs of rows with question, opinions, statement.

    Args:
        seed: of the opinions' orders; row i's order depends on (seed, i) alone.
        source: what errors call the rows.

    Raises:
        InputError: on no rows, an empty group or an empty or over-long text, naming the row.
    """
    if not rows:
        raise InputError(source, "0 rows", "give at least one row")
    made = []
    for i, row in enumerate(rows):
        deliberation = checked_row(row, i, source)
        check_text(f"{source} row {i}: statement", row.get("statement"))
        opinions = list(deliberation.opinions)
        if shuffle_opinions:
            random.Random(f"{seed}/{i}").shuffle(opinions)
        prompt = statement_prompt(deliberation.question, opinions)
        made.append({"prompt": prompt, "completion": f" {one_line(row['statement'])}"})
    return made


def ppo_prompts(rows: Sequence[dict[str, Any]], source: str = "deliberations") -> list[dict]:
    """Rows with question, opinions (and optional weights, clusters) as ``PPOTrainer`` reads them: with a ``prompt``.

    Raises:
        InputError: on no rows, an empty group, an empty or over-long text, bad weights or clusters, naming the row.
    """
    if not rows:
        raise InputError(source, "0 rows", "give at least one row")
    made = []
    for i, row in enumerate(rows):
        deliberation = checked_row(row, i, source)
        opinions = list(deliberation.opinions)
        prompt = statement_prompt(deliberation.question, opinions)
        columns = {name: row[name] for name in MEMBER_COLUMNS if row.get(name) is not None}
        if "weights" in columns:
            _check_weights(f"{source} row {i}: weights", row["weights"], len(opinions))
        if "clusters" in columns:
            _check_clusters(f"{source} row {i}: clusters", row["clusters"], len(opinions))
        made.append({"prompt": prompt, "question": deliberation.question, "opinions": opinions, **columns})
    for name in MEMBER_COLUMNS:
        if len({name in row for row in made}) > 1:
            raise InputError(f"{source}: {name}", None, f"give {name} in every row or in none")
    return made


def _check_clusters(field: str, clusters: Any, members: int) -> None:
    labels = clusters if isinstance(clusters, list | tuple) else ()
    if len(labels) != members or not all(isinstance(label, str | int) for label in labels):
        raise InputError(field, clusters, f"must be a list of one label (text or integer) a member ({members})")


def _check_weights(field: str, weights: Any, members: int) -> None:
    """Refuse what ``reward.welfare`` could not weigh members by, before anything is trained.

    Raises:
        InputError: naming ``field``.
    """
    if not isinstance(weights, list | tuple) or len(weights) != members:
        raise InputError(field, weights, f"must be a list of one number a member ({members})")
    numbers = all(isinstance(w, int | float) and not isinstance(w, bool) for w in weights)
    if not numbers or not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise InputError(field, weights, "must be finite numbers, 0 or more and not all 0")
