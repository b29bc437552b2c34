"""Readers of deliberations, ratings and votes: JSONL, Parquet or a hub data set, with errors that name the column."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from deliberation.types import Choice, Deliberation, InputError, Rank, Rating, Response, SoftVote, Vote, is_hub_name

Row = dict[str, Any]
Item = TypeVar("Item")
Made = TypeVar("Made")


def read_table(source: str | Path, columns: Sequence[str], split: str = "train") -> list[Row]:
    """All rows of a table, checked to hold ``columns``; other columns are kept.

    Args:
        source: path of a ``.jsonl`` or ``.parquet`` file, or a hub data set id (``owner/name``).
        columns: names every row must have.
        split: which split of a hub data set.

    Raises:
        InputError: no such file, another kind of file, a file that cannot be read, a line that is no JSON object, a
            missing column, no rows.
    """
    path = Path(source)
    if path.is_file():
        rows = _read_file(path)
    elif path.is_dir() or "/" not in str(source) or not is_hub_name(str(source)):
        raise InputError("data", str(source), "no such file; give a .jsonl or .parquet file or a hub id owner/name")
    else:
        rows = _read_hub(str(source), split)
    if not rows:
        raise InputError("data", str(source), "holds no rows; give a table with at least one")
    _check_columns(source, rows, columns)
    return rows


def _check_columns(source: str | Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    for number, row in enumerate(rows, 1):
        for column in columns:
            if row.get(column) is None:
                found = ", ".join(sorted(row))
                raise InputError(
                    "data", f"{Path(source).name}, row {number}", f"add the column {column!r} (found: {found})"
                )


def _read_file(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:  # torn pages are an OSError
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError("data", path.name, f"cannot be read as Parquet: {reason}") from error
    if path.suffix != ".jsonl":
        raise InputError("data", path.name, "is neither .jsonl nor .parquet; convert it to one of them")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("data", path.name, f"is not UTF-8 (byte {error.start}); save it so") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut strings at U+2028 and the like
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError("data", f"{path.name}, line {number}", f"is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise InputError("data", f"{path.name}, line {number}", "is not a JSON object; write one object a line")
        rows.append(row)
    return rows


def _read_hub(name: str, split: str) -> list[Row]:
    from datasets import load_dataset

    return [dict(row) for row in load_dataset(name, split=split)]


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> Path:
    """Write rows as JSON lines, to a temporary name first so that no half-written file is left behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return temporary.replace(path)


def read_deliberations(source: str | Path) -> list[Deliberation]:
    """Deliberations of a table with ``question`` and ``opinions`` (and, if there, ``id`` and ``topic``).

    Raises:
        InputError: naming file, row and field.
    """
    rows = read_table(source, ("question", "opinions"))
    for number, row in enumerate(rows, 1):
        if not isinstance(row["opinions"], list | tuple):
            raise InputError("data", f"{source}, row {number}", "its opinions must be a list of strings")
    return [
        _made(
            Deliberation,
            source,
            k,
            id=str(k if r.get("id") is None else r["id"]),
            question=r["question"],
            opinions=tuple(r["opinions"]),
            topic=str(r.get("topic") or ""),
        )
        for k, r in enumerate(rows)
    ]


def _made(kind: type[Made], source: str | Path, index: int, **fields: Any) -> Made:
    """``kind(**fields)`` of the row ``index``.

    Raises:
        InputError: naming file, row (from 1) and field.
    """
    where = f"{Path(source).name}, row {index + 1}"
    if not isinstance(fields.get("member", 0), int | str):
        raise InputError(f"{where}: member", fields["member"], "must be an integer")
    try:
        return kind(**fields)
    except InputError as error:
        raise InputError(f"{where}: {error.field}", error.value, error.mend) from error


RATING_COLUMNS = ("deliberation_id", "member", "question", "opinion", "statement", "agreement", "quality")


def read_ratings(source: str | Path) -> list[Rating]:
    """Ratings of a table with the columns of ``Rating`` (``topic`` may be left out).

    Raises:
        InputError: naming file, row and field.
    """
    return _responses(Rating, source, read_table(source, RATING_COLUMNS), RATING_COLUMNS)


def _responses(kind: type[Made], source: str | Path, rows: Sequence[Row], columns: Sequence[str]) -> list[Made]:
    return [
        _made(kind, source, k, **{c: r[c] for c in columns}, topic=str(r.get("topic") or ""))
        for k, r in enumerate(rows)
    ]


MEMBER_COLUMNS = ("deliberation_id", "member", "question", "opinion")
RESPONSES: dict[type, tuple[str, ...]] = {
    Rating: ("statement", "agreement", "quality"),
    Vote: ("statement", "vote"),
    SoftVote: ("statement", "p_agree"),
    Rank: ("statement", "rank"),
    Choice: ("chosen", "rejected"),
}
"""The columns that tell one kind of response from another."""


def read_responses(source: str | Path) -> list[Response]:
    """Ratings, votes, soft votes, ranks or choices of a table, whichever its columns are (``topic`` may be left out).

    Raises:
        InputError: if the columns of no kind are all there, or a row is bad, naming file, row and field.
    """
    rows = read_table(source, MEMBER_COLUMNS)
    kind = next((kind for kind, columns in RESPONSES.items() if set(columns) <= set(rows[0])), None)
    if kind is None:
        kinds = "; ".join(", ".join(columns) for columns in RESPONSES.values())
        raise InputError(
            "data", f"{source}: {', '.join(rows[0])}", f"has no response; give the columns of one: {kinds}"
        )
    columns = (*MEMBER_COLUMNS, *RESPONSES[kind])
    _check_columns(source, rows, columns)
    return _responses(kind, source, rows, columns)


def split_by_topic(items: Sequence[Item], shares: Sequence[float], seed: int) -> list[list[Item]]:
    """Split items with a ``topic`` into parts of about the given shares of topics; no topic is cut.

    Args:
        items: anything with a ``topic`` attribute.
        shares: positive, one a part; normalised.
        seed: which topics go where; the same seed gives the same split in every process.

    Raises:
        InputError: if there are fewer topics than parts, or a share is not positive.
    """
    topics = sorted({item.topic for item in items})  # type: ignore[attr-defined]
    if any(s <= 0 for s in shares) or not shares:
        raise InputError("shares", list(shares), "give positive numbers")
    if len(topics) < len(shares):
        raise InputError("topics", f"{len(topics)} topics", f"give at least {len(shares)}, one a part")
    Random(f"split {seed}").shuffle(topics)
    total, edge, parts, start = sum(shares), 0.0, [], 0
    for k, share in enumerate(shares):
        edge += share / total * len(topics)
        left = len(shares) - k - 1
        end = len(topics) if left == 0 else max(start + 1, min(round(edge), len(topics) - left))
        chosen = set(topics[start:end])
        parts.append([item for item in items if item.topic in chosen])  # type: ignore[attr-defined]
        start = end
    return parts
