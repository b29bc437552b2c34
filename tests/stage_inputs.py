"""Files that the stages read: tiny random models, and a handful of deliberations with ratings."""

from __future__ import annotations

import json
from pathlib import Path

from reward.preference import Calibration, PreferenceModel

import tiny

QUESTIONS = [
    "Should school meals be free?",
    "Should the centre be closed to cars?",
    "Should voting be compulsory?",
    "Should night trains be subsidised?",
]
OPINIONS = ["Yes, it is fair to all.", "No, it costs too much.", "Only if it is paid for."]
STATEMENTS = ["We want it, if it is paid for.", "It should be tried for a year.", "No.", "Yes, and at once."]


def save_policy(folder: Path, arch: str = "llama") -> Path:
    """A tiny random policy with its tokenizer."""
    tokenizer = tiny.make_tokenizer()
    tiny.make_policy(tokenizer, arch).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_preference_model(folder: Path, arch: str = "llama") -> Path:
    """A tiny random preference model with a plausible calibration."""
    tokenizer = tiny.make_tokenizer()
    calibration = Calibration((-2.5, -1.5, -0.5, 0.5, 1.5, 2.5))
    PreferenceModel(tiny.make_judge(tokenizer, arch), tokenizer, calibration).save(folder)
    return folder


def _write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_deliberations(path: Path) -> Path:
    """Rows of question, opinions."""
    return _write(path, [{"id": f"d{i}", "question": q, "opinions": OPINIONS, "topic": f"t{i}"}
                         for i, q in enumerate(QUESTIONS)])  # fmt: skip


def write_statements(path: Path) -> Path:
    """Rows of question, opinions, statement."""
    return _write(path, [{"question": q, "opinions": OPINIONS, "statement": STATEMENTS[i % 4]}
                         for i, q in enumerate(QUESTIONS * 2)])  # fmt: skip


def write_ratings(path: Path) -> Path:
    """Each member of each deliberation rates every statement; ratings differ by two and more."""
    rows = [
        {"deliberation_id": f"d{i}", "member": m, "question": q, "opinion": opinion, "statement": statement,
         "agreement": 1 + (2 * s + 3 * m + i) % 7, "quality": 5, "topic": f"t{i}"}
        for i, q in enumerate(QUESTIONS)
        for m, opinion in enumerate(OPINIONS)
        for s, statement in enumerate(STATEMENTS)
    ]  # fmt: skip
    return _write(path, rows)


def write_log(path: Path) -> Path:
    """The log of a PPO run of one update."""
    return _write(path, [{"step": 1, "reward": 4.0, "objective/kl": 0.0}])
