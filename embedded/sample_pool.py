"""Statements sampled from a policy for training groups: a quarter of what the base judge reads."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from random import Random

import torch

from deliberation.prompts import clean_statement, statement_prompt
from embedded.corpus import training_group
from rl.policy import load_policy, sample


def main() -> None:
    """Sample ``--groups`` groups of ``--n`` statements each and save (group, statements) pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--groups", type=int, default=3000)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_policy(args.policy, device="cpu")
    rng, pool, started = Random(f"pool {args.seed}"), [], time.time()
    for start in range(0, args.groups, 32):
        groups = [training_group(rng) for _ in range(min(32, args.groups - start))]
        prompts = [statement_prompt(g.question.text, [c.opinion for c in g.citizens]) for g in groups]
        seeds = [args.seed * 1_000_003 + start + k for k in range(len(groups))]
        drawn = sample(model, tokenizer, prompts, n=args.n, seeds=seeds, max_new_tokens=80, top_p=args.top_p)
        pool += [(g, [clean_statement(s.text) for s in row]) for g, row in zip(groups, drawn, strict=True)]
        print(f"{len(pool)} groups, {time.time() - started:.0f} s", flush=True)
    torch.save(pool, args.output)


if __name__ == "__main__":
    main()
