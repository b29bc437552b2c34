"""A small synthetic world for the evaluation tests: statements whose gold ratings are known by construction.

A statement reads ``"<id> words words"``; the world keeps each member's rating of each text in a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deliberation.types import Deliberation
from evaluation.judging import Sampled


@dataclass
class Ratings:
    agreement: np.ndarray
    quality: np.ndarray
    agreement_without_voice: np.ndarray
    quality_without_voice: np.ndarray


class TableGold:
    """Looks every (deliberation, text) up in a table of member ratings."""

    def __init__(self, tables: list[dict[str, np.ndarray]], voice: float = 0.5):
        self.tables, self.voice = tables, voice

    def rate(self, index: int, statements) -> Ratings:
        agreement = np.stack([self.tables[index][s] for s in statements], axis=1)
        free = np.clip(agreement + self.voice * np.array([s.startswith("I ") for s in statements]), 1, 7)
        return Ratings(agreement, np.clip(agreement + 0.5, 1, 7), free, np.clip(free + 0.5, 1, 7))


def make_world(deliberations: int = 60, size: int = 16, seed: int = 0, lift: float = 0.5, noise: float = 0.4):
    """Deliberations in which PPO samples are ``lift`` better than SFT ones and the judge errs by ``noise``."""
    rng = np.random.default_rng(seed)
    sampled, tables = [], []
    for i in range(deliberations):
        members = int(rng.integers(4, 6))
        table: dict[str, np.ndarray] = {}

        def say(name: str, level: float, members: int = members, table: dict = table) -> str:
            text = f"{name} " + "we should plan it with care and look at the costs first. " * int(rng.integers(1, 4))
            table[text.strip()] = np.clip(level + rng.normal(0, 0.7, size=members), 1, 7)
            return text.strip()

        opinions = tuple(say(f"I think {i}.{m}", 3.7) for m in range(members))
        base = say(f"Base {i}", 3.0)
        sft = tuple(say(f"Sft {i}.{k}", 3.7 + rng.normal(0, 0.4)) for k in range(size))
        ppo = tuple(say(f"Ppo {i}.{k}", 3.7 + lift + rng.normal(0, 0.3)) for k in range(size))
        utilities = [
            np.clip(np.stack([table[s] for s in pool], axis=1) + rng.normal(0, noise, (members, size)), 1, 7)
            for pool in (sft, ppo)
        ]
        question = f"Should the council do thing {i}?"
        deliberation = Deliberation(f"d{i}", question, opinions)
        sampled.append(Sampled(deliberation, base, sft, ppo, *utilities, rng.normal(1.8, 0.5, size), np.array([0.9])))
        tables.append(table)
    return sampled, TableGold(tables)


def make_history(updates: int = 40) -> list[dict]:
    """A PPO log with rollout metrics every update and held-out ones every fifth."""
    rng = np.random.default_rng(0)
    rows = []
    for step in range(updates + 1):
        rise = 1 - np.exp(-step / 15)
        row = {"step": step, "reward": 4 + rise + rng.normal(0, 0.08), "objective/kl": 2.5 * rise,
               "completions/mean_length": 24 + 3 * rise + rng.normal(0, 0.5)}  # fmt: skip
        if step % 5 == 0:
            row |= {"eval/reward": 3.9 + rise, "eval/gold_welfare": 3.8 + 0.7 * rise, "eval/kl": 2.6 * rise}
        rows.append(row)
    return rows


PREFERENCE = {"accuracy": 0.803, "ceiling": 0.842, "correlation": 0.89, "longest": 0.561, "overlap": 0.604}
