"""Calibrate the base judge to simulated noisy ratings of training topics, and measure it on held-out ones.

The last step of ``make embedded-models``. The gate: a correlation of at least 0.85 with noise-free gold agreement on
statements sampled from a policy, on held-out topics, words and phrases. The same is measured once more with the groups
in disguise: opinions in phrases, words and sentences that the citizens' grammar does not know.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from deliberation.citizens import Group, draw_group, noisy_rating, rate
from deliberation.prompts import clean_statement, statement_prompt
from deliberation.questions import load_questions
from deliberation.recogniser import read
from deliberation.writer import write_statement
from embedded.corpus import training_group
from embedded.disguise import Disguise, draw_disguise, shown_opinions
from embedded.leads import own_leads
from reward.preference import Calibration, PreferenceModel
from reward.scoring import score
from rl.policy import load_policy, sample


@dataclass
class Case:
    """A group with statements.

    Attributes:
        group, texts: as the gold rater knows them.
        question, opinions, shown: as the models see them.
    """

    group: Group
    texts: list[str]
    question: str
    opinions: list[str]
    shown: list[str]


Pool = Sequence[Case]


def plain(group: Group, texts: list[str]) -> Case:
    """A group without a disguise."""
    return Case(group, texts, group.question.text, [c.opinion for c in group.citizens], texts)


def scores_and_gold(model: PreferenceModel, pool: Pool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Raw scores and noise-free gold agreement, [members, statements] a group."""
    scores, gold = [], []
    for case in pool:
        scores.append(score(model, case.question, case.opinions, case.shown).raw.astype(np.float64))
        readings = [read(t, case.group.question) for t in case.texts]
        gold.append(np.array([[rate(c, r).agreement for r in readings] for c in case.group.citizens]))
    return scores, gold


def correlations(utilities: Sequence[np.ndarray], gold: Sequence[np.ndarray]) -> dict[str, float]:
    """Pearson correlations: over all ratings, within groups across members or statements, of group mean and minimum."""

    def pearson(a: list[np.ndarray], b: list[np.ndarray]) -> float:
        return round(float(np.corrcoef(np.concatenate(a), np.concatenate(b))[0, 1]), 4)

    both = (utilities, gold)
    found = {"all": pearson(*([x.ravel() for x in side] for side in both))}
    for name, axis in (("across_members", 0), ("across_statements", 1)):
        found[name] = pearson(*([(x - x.mean(axis, keepdims=True)).ravel() for x in side] for side in both))
    found["group_mean"] = pearson(*([x.mean(0) for x in side] for side in both))
    found["group_min"] = pearson(*([x.min(0) for x in side] for side in both))
    return found


def policy_pool(path: str, count: int, n: int, temperature: float, disguised: bool = False, seed: int = 0) -> Pool:
    """Statements a policy samples for held-out groups, plain or with every group in other phrases and sentences."""
    model, tokenizer = load_policy(path, device="cpu")
    rng = Random(f"gate {seed}")
    groups = _held_out_groups(rng, count)
    disguises = [_open_disguise(g, rng) if disguised else Disguise() for g in groups]
    questions = [d.show(g.question.text) for g, d in zip(groups, disguises, strict=True)]
    opinions = [shown_opinions(g, d) for g, d in zip(groups, disguises, strict=True)]
    if disguised:
        opinions = [own_leads(said, rng) for said in opinions]
    prompts = [statement_prompt(q, said) for q, said in zip(questions, opinions, strict=True)]
    drawn = sample(model, tokenizer, prompts, n=n, seeds=list(range(count)), max_new_tokens=80, temperature=temperature)
    pool = []
    for group, disguise, question, said, row in zip(groups, disguises, questions, opinions, drawn, strict=True):
        shown = [t for s in row if (t := clean_statement(s.text))]
        if shown:
            pool.append(Case(group, [disguise.read_back(t) for t in shown], question, said, shown))
    return pool


def _held_out_groups(rng: Random, count: int) -> list[Group]:
    questions = load_questions("validation")
    return [draw_group(rng.choice(questions), rng, held_out=True) for _ in range(count)]


def _open_disguise(group: Group, rng: Random) -> Disguise:
    while not (disguise := draw_disguise(group, rng)).phrases:
        pass
    return disguise


def main() -> None:
    """Write ``calibration.json`` into the judge's folder and print the gate's figures as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judge", type=Path, default=Path(__file__).parent / "judge")
    parser.add_argument("--policy", nargs="+", default=["embedded/writer"], help="policies to measure the judge on")
    parser.add_argument("--temperature", type=float, default=0.7, help="as configs/embedded/compare.yaml samples")
    parser.add_argument("--groups", type=int, default=200)
    parser.add_argument("--measure_only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    classifier = AutoModelForSequenceClassification.from_pretrained(args.judge, dtype=torch.float32).eval()
    tokenizer, rng = AutoTokenizer.from_pretrained(args.judge), Random("calibrate")
    model = PreferenceModel(classifier, tokenizer, Calibration.of_ratings([1, 2, 3, 4, 5, 6, 7]))
    groups = [training_group(rng) for _ in range(args.groups)]
    kinds = (None, None, "balanced", "balanced", "one_sided", "careless")
    pool = [plain(g, [write_statement(g, rng, kind) for kind in kinds]) for g in groups]
    scores, gold = scores_and_gold(model, pool)
    noisy = [noisy_rating(value, rng) for table in gold for value in table.ravel()]
    model.calibration = Calibration.fit(np.concatenate([s.ravel() for s in scores]), noisy)
    written = [plain(g, [write_statement(g, rng) for _ in range(4)]) for g in _held_out_groups(rng, args.groups)]
    figures = {"writer text": _figures(model, written)}
    for path in args.policy:
        figures[path] = _figures(model, policy_pool(path, args.groups, 4, args.temperature))
        disguised = policy_pool(path, args.groups, 4, args.temperature, disguised=True)
        figures[f"{path}, groups in disguise"] = _figures(model, disguised)
    if not args.measure_only:
        classifier.to(torch.bfloat16)
        model.metadata = {"ratings": len(noisy), "citizens": "simulated", "gate": figures}
        model.save(args.judge)
    print(json.dumps(figures))


def _figures(model: PreferenceModel, pool: Pool) -> dict[str, float]:
    scores, gold = scores_and_gold(model, pool)
    return correlations([model.calibration.utilities(s) for s in scores], gold)


if __name__ == "__main__":
    main()
