"""Scoring 5 members x 16 candidates and 20 x 64: ours (every prefix once) against the best naive batching.

The anchor is what a user would write: one row a (member, candidate), sorted by length, batches of 8, right-padded.
Random Llama of 5.8 M parameters, fp32, one thread; both sides alternate in one run; medians. ``ratio`` is the
anchor's time over ours.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from deliberation.citizens import draw_group
from deliberation.questions import load_questions
from deliberation.writer import write_statement
from embedded import resolve
from reward.preference import Calibration, PreferenceModel
from reward.prefix_cache import PrefixCache
from reward.scoring import score

SIZES = ((5, 16), (20, 64))
"""(members, candidates)."""
SEED = 0


def make_model() -> PreferenceModel:
    """The preference model both sides use."""
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded/judge"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForSequenceClassification(config).eval()
    return PreferenceModel(model, tokenizer, Calibration((-3.0, -2.0, -1.0, 0.0, 1.0, 2.0)))


@torch.no_grad()
def naive(model: PreferenceModel, question: str, opinions: list[str], statements: list[str]) -> torch.Tensor:
    """Raw scores [members, statements]: every row in full, sorted by length, eight at a time."""
    rows = [model.prefix_ids(question, o) + model.suffix_ids(s) for o in opinions for s in statements]
    order = sorted(range(len(rows)), key=lambda k: len(rows[k]))
    found = torch.empty(len(rows))
    for start in range(0, len(rows), 8):
        part = order[start : start + 8]
        width = max(len(rows[k]) for k in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        for i, k in enumerate(part):
            ids[i, : len(rows[k])] = torch.tensor(rows[k])
        mask = torch.arange(width) < torch.tensor([len(rows[k]) for k in part])[:, None]
        states = model.model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        ends = states[torch.arange(len(part)), mask.sum(1) - 1]
        found[torch.tensor(part)] = model.model.score(ends)[:, 0]
    return found.view(len(opinions), len(statements))


def make_work(members: int, candidates: int) -> tuple[str, list[str], list[str]]:
    """Question, opinions (long ones, as people write them: prefixes of 170 to 230 tokens) and statements."""
    rng = random.Random(SEED)
    group = draw_group(load_questions("test")[0], rng, held_out=True, size=members)
    extra = [" ".join(c.opinion for c in draw_group(group.question, rng, size=4).citizens) for _ in range(members)]
    opinions = [f"{c.opinion} {more}" for c, more in zip(group.citizens, extra, strict=True)]
    return group.question.text, opinions, [write_statement(group, rng, "list") for _ in range(candidates)]


def token_bound(model: PreferenceModel, question: str, opinions: list[str], statements: list[str]) -> float:
    """Real tokens of the naive rows over the tokens that have to be computed at least: the question once, each
    opinion once, each statement once a member. The ratio that a forward pass of equal cost a token would reach."""
    prefixes = [model.prefix_ids(question, o) for o in opinions]
    suffixes = sum(len(model.suffix_ids(s)) for s in statements)
    shared = next(k for k, ids in enumerate(zip(*prefixes, strict=False)) if len(set(ids)) > 1)
    naive_tokens = sum(len(p) for p in prefixes) * len(statements) + suffixes * len(opinions)
    return naive_tokens / (shared + sum(len(p) - shared for p in prefixes) + suffixes * len(opinions))


def measure(model: PreferenceModel, members: int, candidates: int, runs: int) -> dict[str, float]:
    """Medians of alternated runs: naive, ours, and ours with the members' prefixes kept from an earlier call."""
    work = make_work(members, candidates)
    cache, times = PrefixCache(), {"ours": [], "kept": [], "naive": []}  # type: PrefixCache, dict[str, list[float]]
    sides = {
        "ours": lambda: torch.as_tensor(score(model, *work).raw),
        "kept": lambda: torch.as_tensor(score(model, *work, cache=cache).raw),
        "naive": lambda: naive(model, *work),
    }
    found = {}
    for run in range(runs + 1):
        for name, side in sides.items():
            start = time.process_time()
            found[name] = side()
            if run:  # the first is the warm-up
                times[name].append(time.process_time() - start)
    ours, kept, theirs = (statistics.median(times[name]) for name in sides)
    return {
        "members": members,
        "candidates": candidates,
        "ratio": round(theirs / ours, 3),
        "ratio_kept": round(theirs / kept, 3),
        "token_bound": round(token_bound(model, *work), 3),
        "share_of_bound": round(theirs / ours / token_bound(model, *work), 3),
        "ours_cpu_s": round(ours, 4),
        "naive_cpu_s": round(theirs, 4),
        "scores_per_s": round(members * candidates / ours, 1),
        "max_difference": max(float((found[name] - found["naive"]).abs().max()) for name in ("ours", "kept")),
        "runs": runs,
    }


def main() -> None:
    """Alternate all sides, compare scores, print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model()
    figures = [measure(model, *size, args.runs) for size in SIZES]
    if not args.json:
        for one in figures:
            print(f"{one['members']} x {one['candidates']}: {one['ratio']}x naive ({one['ratio_kept']}x with members "
                  f"kept from an earlier call; token bound {one['token_bound']}x)")  # fmt: skip
    machine = f"{platform.machine()}, torch {torch.__version__}, 1 thread"
    print(json.dumps({"ratio": figures[0]["ratio"], "figures": figures, "machine": machine, "seed": SEED}))


if __name__ == "__main__":
    main()
