"""Scoring 5 members x 16 candidates: ours (each member's prefix once) against the best naive batching.

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
from reward.scoring import score

MEMBERS, CANDIDATES, SEED = 5, 16, 0


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


def main() -> None:
    """Alternate both, compare scores, print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(SEED)
    group = draw_group(load_questions("test")[0], rng, held_out=True, size=MEMBERS)
    # long opinions, as people write them: the prefixes have 170 to 230 tokens
    extra = [" ".join(c.opinion for c in draw_group(group.question, rng, size=4).citizens) for _ in range(MEMBERS)]
    opinions = [f"{c.opinion} {more}" for c, more in zip(group.citizens, extra, strict=True)]
    statements = [write_statement(group, rng, "list") for _ in range(CANDIDATES)]
    model, times = make_model(), {"ours": [], "naive": []}  # type: PreferenceModel, dict[str, list[float]]
    question = group.question.text
    for run in range(args.runs + 1):
        start = time.process_time()
        raw = torch.as_tensor(score(model, question, opinions, statements).raw)
        middle = time.process_time()
        reference = naive(model, question, opinions, statements)
        if run:  # the first is the warm-up
            times["ours"].append(middle - start)
            times["naive"].append(time.process_time() - middle)
    ours, theirs = (statistics.median(times[k]) for k in ("ours", "naive"))
    figures = {
        "ours_cpu_s": round(ours, 4),
        "naive_cpu_s": round(theirs, 4),
        "members": MEMBERS,
        "candidates": CANDIDATES,
        "max_difference": float((raw - reference).abs().max()),
        "runs": args.runs,
    }
    if not args.json:
        print(f"ours {ours:.3f} s, naive {theirs:.3f} s (CPU, medians of {args.runs})")
    machine = f"{platform.machine()}, torch {torch.__version__}, 1 thread"
    print(json.dumps({"ratio": round(theirs / ours, 3), "figures": figures, "machine": machine, "seed": SEED}))


if __name__ == "__main__":
    main()
