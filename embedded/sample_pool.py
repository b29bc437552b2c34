"""Statements sampled from a policy for training groups, most with made-up words: a third of what the judge reads."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from random import Random

import torch

from deliberation.prompts import clean_statement, statement_prompt
from embedded.corpus import LEADS_SHARE, training_group
from embedded.disguise import draw_disguise, shown_opinions
from embedded.leads import own_leads
from embedded.tokenizer import word_pieces
from rl.policy import load_policy, sample


def main() -> None:
    """Sample ``--n`` statements for each of ``--groups`` groups; save (group, statements, disguise) each.

    The statements are saved as the gold rater reads them; what the policy copied wrongly stays foreign.
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
        disguises = [draw_disguise(g, rng, pieces) for g in groups]
        shown = [shown_opinions(g, d) for g, d in zip(groups, disguises, strict=True)]
        shown = [own_leads(said, rng, pieces) if rng.random() < LEADS_SHARE else said for said in shown]
        seeds = [args.seed * 1_000_003 + start + k for k in range(len(groups))]
        questions = [d.show(g.question.text) for g, d in zip(groups, disguises, strict=True)]
        prompts = [statement_prompt(q, said) for q, said in zip(questions, shown, strict=True)]
        keys = {"max_new_tokens": 80, "temperature": args.temperature}
        drawn = sample(model, tokenizer, prompts, n=args.n, seeds=seeds, **keys)
        for group, row, disguise in zip(groups, drawn, disguises, strict=True):
            pool.append((group, [disguise.read_back(clean_statement(s.text)) for s in row], disguise))
        print(f"{len(pool)} groups, {time.time() - started:.0f} s", flush=True)
    torch.save(pool, args.output)


if __name__ == "__main__":
    main()
