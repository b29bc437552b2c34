"""Statements sampled from a policy for training groups, most with made-up words: a third of what the judge reads."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from random import Random

import torch

from deliberation.prompts import clean_statement, statement_prompt
from embedded.corpus import FOREIGN_SHARE, foreign_words, rename, training_group
from embedded.tokenizer import word_pieces
from rl.policy import load_policy, sample


def main() -> None:
    """Sample ``--n`` statements for each of ``--groups`` groups; save (group, statements, made-up words) each.

    The statements are saved with the made-up words turned back, so that the gold rater can read them.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--groups", type=int, default=3000)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.85)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_policy(args.policy, device="cpu")
    rng, pool, started = Random(f"pool {args.seed}"), [], time.time()
    pieces = word_pieces(tokenizer)
    for start in range(0, args.groups, 32):
        groups = [training_group(rng) for _ in range(min(32, args.groups - start))]
        said = [[g.question.text, *(c.opinion for c in g.citizens)] for g in groups]
        words = [foreign_words(t, rng, pieces) if rng.random() < FOREIGN_SHARE else {} for t in said]
        renamed = [[rename(t, w) for t in texts] for texts, w in zip(said, words, strict=True)]
        seeds = [args.seed * 1_000_003 + start + k for k in range(len(groups))]
        prompts = [statement_prompt(t[0], t[1:]) for t in renamed]
        keys = {"max_new_tokens": 80, "temperature": args.temperature}
        drawn = sample(model, tokenizer, prompts, n=args.n, seeds=seeds, **keys)
        for group, row, w in zip(groups, drawn, words, strict=True):
            back = {new.lower(): old for old, new in w.items()}  # what the policy copied wrongly stays foreign
            pool.append((group, [rename(clean_statement(s.text), back) for s in row], w))
        print(f"{len(pool)} groups, {time.time() - started:.0f} s", flush=True)
    torch.save(pool, args.output)


if __name__ == "__main__":
    main()
