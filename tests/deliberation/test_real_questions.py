"""Other people's questions: the shared data folder, where it is there. Nothing of it is committed."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from deliberation.citizens import draw_group, rate_text
from deliberation.questions import load_questions, read_questions
from deliberation.recogniser import read
from deliberation.writer import write_statement

PATH = Path(__file__).parents[2].parent / "shared" / "data" / "questions.jsonl"
pytestmark = pytest.mark.skipif(not PATH.is_file(), reason="the folder shared/data is not beside this checkout")


def test_real_questions_are_read_and_are_not_ours():
    found = read_questions(PATH)
    assert len(found) > 2000
    ours = {q.text.lower() for split in ("train", "validation", "test") for q in load_questions(split)}
    assert len({q.text.lower() for q in found} & ours) < 3  # a chance meeting at most


def test_citizens_and_writer_work_on_real_questions():
    questions, rng = read_questions(PATH, splits=("val_topic",)), Random(0)
    for _ in range(40):
        group = draw_group(rng.choice(questions), rng, held_out=True)
        text = write_statement(group, rng, "balanced")
        assert all(read(text, group.question).ok), text
        balanced = sum(rate_text(c, group.question, text).agreement for c in group.citizens)
        assert balanced > sum(rate_text(c, group.question, text[::-1]).agreement for c in group.citizens)
