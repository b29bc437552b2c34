"""Make the base judge: the base writer's body with a scalar head, taught on simulated noise-free ratings.

Run once by ``make embedded-models``; nobody who uses the project needs to. The auxiliary heads are thrown away.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForSequenceClassification, PreTrainedTokenizerFast

from embedded.packing import pack
from embedded.ratings import AUX, KINDS, USES, WORDING, Labeller, Pool, Row, rows
from embedded.train_writer import give_back_memory, optimisers, schedule

GROUPS_A_STEP = 4
PHRASE_LAYER = 2
"""Layer behind which categories and attitudes of phrases are read off."""
WORDING_LAYER = 4
"""Layer behind which the wording labels are read off."""


class Judge(nn.Module):
    """The classifier with its auxiliary heads.

    Args:
        classifier: the model that ships; its body starts from the base writer.
    """

    def __init__(self, classifier: LlamaForSequenceClassification):
        super().__init__()
        self.classifier = classifier
        width = classifier.config.hidden_size
        self.aux = nn.Linear(width, len(AUX))
        self.kinds = nn.Linear(width, len(KINDS))
        self.uses = nn.Linear(width, len(USES))
        self.wording = nn.Linear(width, len(WORDING))
        self.gains = nn.Linear(width, 1)


@dataclass
class Batch:
    """Packed rows as tensors; b rows of length t, n statements.

    Attributes:
        ids, positions, kinds, uses, wording: long [b, t]; labels 0 where there is none.
        gains: float [b, t], NaN where there is none.
        mask: float [b, 1, t, t], 0 where attention may look, else -inf: a statement sees its member's prefix and
            itself, never another statement.
        last: long [n, 2], (row, position) of each statement's last token.
        agreement: float [n], share of the scale. aux: float [n, len(AUX)].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    kinds: torch.Tensor
    uses: torch.Tensor
    wording: torch.Tensor
    gains: torch.Tensor
    last: torch.Tensor
    agreement: torch.Tensor
    aux: torch.Tensor


def collate(packed: list[Row], pad: int) -> Batch:
    """Pad and stack rows, each a member's prefix and the statements behind it."""
    together = pack([[r.prefix, *r.suffixes] for r in packed], pad)
    labels = {name: torch.zeros_like(together.ids) for name in ("kinds", "uses", "wording")}
    gains, last = torch.full(together.ids.shape, float("nan")), []
    for b, row in enumerate(packed):
        cursor = len(row.prefix)
        for suffix in row.suffixes:
            cursor += len(suffix)
            last.append((b, cursor - 1))
        for name, tensor in labels.items():
            tensor[b, :cursor] = torch.tensor(getattr(row, name))
        gains[b, :cursor] = torch.tensor(row.gains)
    agreement = torch.tensor([a for r in packed for a in r.agreement])
    aux = torch.tensor([a for r in packed for a in r.aux])
    ends = torch.tensor(last)
    return Batch(
        together.ids, together.positions, together.mask, **labels, gains=gains, last=ends, agreement=agreement, aux=aux
    )


def losses(judge: Judge, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """Weighted sum of the rating loss and the auxiliary losses, with each by name."""
    with torch.autocast("cpu", torch.bfloat16):
        states = judge.classifier.model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            attention_mask=batch.mask,
            output_hidden_states=True,
            use_cache=False,
        )
    final = states.last_hidden_state.float()
    rows_, cols = batch.last.unbind(1)
    ends = final[rows_, cols]
    score = judge.classifier.score(ends)[:, 0]
    parts = {"rating": F.binary_cross_entropy_with_logits(score, batch.agreement)}
    parts["entropy"] = -F.binary_cross_entropy(batch.agreement, batch.agreement)  # so that a perfect fit reads 0
    parts["aux"] = F.mse_loss(judge.aux(ends), batch.aux)
    phrase = states.hidden_states[PHRASE_LAYER].float()
    for name, head in (("kinds", judge.kinds), ("uses", judge.uses)):
        label = getattr(batch, name)
        parts[name] = _over_labels(F.cross_entropy, head(phrase), label, label > 0)
    wording = judge.wording(states.hidden_states[WORDING_LAYER].float())
    parts["wording"] = _over_labels(F.cross_entropy, wording, batch.wording, batch.wording > 0)
    gains = judge.gains(final)[..., 0]
    parts["gains"] = _over_labels(F.mse_loss, gains, batch.gains.clamp(-3, 3), ~batch.gains.isnan())
    weights = {"rating": 4.0, "entropy": 4.0, "aux": 1.0, "kinds": 0.15, "uses": 0.15, "wording": 0.5, "gains": 0.5}
    total = sum((weights[k] * v for k, v in parts.items()), torch.zeros(()))
    return total, {k: float(v.detach()) for k, v in parts.items()} | {"correlation": correlation(score, batch)}


def _over_labels(
    loss: Callable[..., torch.Tensor], predicted: torch.Tensor, label: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """Mean loss over the labelled tokens; 0 where a batch has none, as when all its groups are in disguise."""
    return loss(predicted[known], label[known], reduction="sum") / known.sum().clamp(min=1)


def correlation(score: torch.Tensor, batch: Batch) -> float:
    """Pearson correlation of predicted and noise-free agreement within one batch."""
    pair = torch.stack([score.detach().sigmoid(), batch.agreement])
    return float(torch.corrcoef(pair)[0, 1])


def produce(queue, tokenizer: PreTrainedTokenizerFast, seed: str, pool: Pool) -> None:
    """Fill ``queue`` with lists of rows."""
    rng, labeller = Random(seed), Labeller(tokenizer)
    while True:
        queue.put([row for _ in range(GROUPS_A_STEP) for row in rows(labeller, rng, pool)])


def main() -> None:
    """Train on a number of ratings and save the classifier in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--writer", type=Path, default=Path(__file__).parent / "writer")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="judge.pt of an earlier phase, auxiliary heads included")
    parser.add_argument("--samples", type=Path, nargs="*", default=[], help="made by embedded.sample_pool")
    parser.add_argument("--ratings", type=float, default=400e3)
    parser.add_argument("--lr", type=float, default=0.0025)
    parser.add_argument("--lr_end", type=float, default=0.02, help="share of the learning rate at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("judge.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.writer)
    classifier = LlamaForSequenceClassification.from_pretrained(
        args.writer, num_labels=1, dtype=torch.float32, attn_implementation="eager", use_safetensors=True
    )
    nn.init.normal_(classifier.score.weight, std=0.02)
    pool = [entry for path in args.samples for entry in torch.load(path, weights_only=False)]
    judge = Judge(classifier)
    if args.start:
        judge.load_state_dict(torch.load(args.start, weights_only=True))
    opts = optimisers(judge, args.lr)
    context = get_context("fork")
    queue = context.Queue(maxsize=16)
    worker = context.Process(target=produce, args=(queue, tokenizer, f"judge {args.seed}", pool), daemon=True)
    worker.start()
    train(judge, opts, queue, args, tokenizer)
    worker.terminate()
    save(judge, tokenizer, args.output_dir)


def train(judge: Judge, opts: list[torch.optim.Optimizer], queue, args, tokenizer: PreTrainedTokenizerFast) -> None:
    """The loop: draw, forward, backward, step, log."""
    seen, step, started, window = 0, 0, time.time(), []
    with args.log.open("w") as log:
        while seen < args.ratings:
            batch = collate(queue.get(timeout=300), tokenizer.pad_token_id)
            for opt in opts:
                for group in opt.param_groups:
                    group["lr"] = args.lr * schedule(seen / args.ratings, args.lr_end)
            loss, parts = losses(judge, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad()
            seen, step = seen + len(batch.agreement), step + 1
            window.append(parts)
            if step % 50 == 0:
                give_back_memory()
                row = {k: round(sum(w[k] for w in window) / len(window), 4) for k in parts}
                row = {"step": step, "ratings": seen, "seconds": round(time.time() - started), **row}
                print(row, flush=True)
                log.write(json.dumps(row) + "\n")
                log.flush()
                window.clear()
            if step % 500 == 0:
                save(judge, tokenizer, args.output_dir)


def save(judge: Judge, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a bfloat16 copy of the classifier as safetensors, its tokenizer, and beside it all heads, to resume."""
    half = LlamaForSequenceClassification(judge.classifier.config)
    half.load_state_dict(judge.classifier.state_dict())
    half.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(judge.state_dict(), folder.parent / f"{folder.name}.pt")


if __name__ == "__main__":
    main()
