"""Make the base writer: a Llama that has read the mixed-quality writer. Run once by ``make embedded-models``.

One process, one thread, hours; nobody who uses the project needs to run it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from random import Random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deliberation.prompts import OPENING
from embedded.corpus import writer_document
from embedded.packing import pack
from embedded.tokenizer import train_tokenizer, word_pieces

SIZE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4)
TOKENS_A_STEP = 4096
PROMPT_SHARE = 0.3
"""Share of prompt tokens that are predicted: the completion matters, and the softmax is a third of the cost."""
POOL = 256
"""Documents drawn at once and sorted by length, so that batches hold little padding."""


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The architecture both embedded models share."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.02,
        **SIZE,
    )


Row = list[list[int]]
"""Token ids: a group's prompt and several statements about it, each ended."""


def batches(tokenizer: PreTrainedTokenizerFast, seed: str) -> Iterator[list[Row]]:
    """Endless batches of rows, documents of similar length together."""
    rng, pieces = Random(seed), word_pieces(tokenizer)
    while True:
        pool = []
        for _ in range(POOL):
            prompt, *completions = (tokenizer(text).input_ids for text in writer_document(rng, pieces))
            pool.append([prompt, *(ids + [tokenizer.eos_token_id] for ids in completions)])
        pool.sort(key=length_of)
        groups: list[list[Row]] = [[]]
        for row in pool:
            if groups[-1] and length_of(row) * (len(groups[-1]) + 1) > TOKENS_A_STEP:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from groups


def length_of(row: Row) -> int:
    """Tokens of a row."""
    return sum(map(len, row))


def targets(rows: list[Row], opening: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is predicted from where: (row, position that predicts, token), each long [targets].

    Every completion token, the first from the prompt's last position; a share of the prompt behind its opening.
    """
    found = []
    for b, (prompt, *completions) in enumerate(rows):
        cursor = len(prompt)
        for t in range(opening, cursor):
            if torch.rand(()) < PROMPT_SHARE:
                found.append((b, t - 1, prompt[t]))
        for completion in completions:
            sources = [len(prompt) - 1, *range(cursor, cursor + len(completion) - 1)]
            found += [(b, source, token) for source, token in zip(sources, completion, strict=True)]
            cursor += len(completion)
    row, source, token = torch.tensor(found).unbind(1)
    return row, source, token


def optimisers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and heads."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    outer = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    return [
        torch.optim.Muon(inner, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(share: float, end: float = 0.02, warmup: float = 0.02) -> float:
    """Learning-rate factor at ``share`` of the run: short linear warm-up, then linear decay to ``end``."""
    if share < warmup:
        return share / warmup
    return end + (1.0 - end) * (1.0 - share) / (1.0 - warmup)


def produce(queue, tokenizer, seed: str) -> None:
    """Fill ``queue`` with batches (a process of its own, so that drawing documents costs the trainer nothing)."""
    for batch in batches(tokenizer, seed):
        queue.put(batch)


def give_back_memory() -> None:
    """Hand freed memory back to the system: batches of ever new shapes fragment glibc's heap by gigabytes."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def loss_of(model: torch.nn.Module, rows: list[Row], pad: int, opening: int) -> torch.Tensor:
    """Mean cross-entropy of the predicted tokens in nats."""
    packed, (row, source, token) = pack(rows, pad), targets(rows, opening)
    with torch.autocast("cpu", torch.bfloat16):
        states = model.model(
            input_ids=packed.ids, position_ids=packed.positions, attention_mask=packed.mask, use_cache=False
        ).last_hidden_state
        logits = torch.nn.functional.linear(states[row, source], model.lm_head.weight)
    return torch.nn.functional.cross_entropy(logits.float(), token)


def load(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """A new tokenizer and model, or those of ``args.start``, in float32."""
    if args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32, attn_implementation="eager")
        return tokenizer, model
    tokenizer = train_tokenizer(seed=args.seed)
    return tokenizer, LlamaForCausalLM._from_config(config(tokenizer), attn_implementation="eager")


def main() -> None:
    """Train for a number of tokens and save the weights in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "writer")
    parser.add_argument("--tokens", type=float, default=40e6)
    parser.add_argument("--start", type=Path, help="go on from the weights saved in this folder")
    parser.add_argument("--seen", type=float, default=0, help="tokens those weights have read")
    parser.add_argument("--lr", type=float, default=0.004)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("writer.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer, model = load(args)
    steps, seen, started = 0, args.seen, time.time()
    opening = len(tokenizer(OPENING).input_ids)
    opts = optimisers(model, args.lr)
    context = get_context("fork")
    queue = context.Queue(maxsize=8)
    worker = context.Process(target=produce, args=(queue, tokenizer, f"writer {args.seed} {args.seen}"), daemon=True)
    worker.start()
    with args.log.open("w") as log:
        while seen < args.tokens:
            rows = queue.get(timeout=300)
            for opt in opts:
                for group in opt.param_groups:
                    group["lr"] = args.lr * schedule(seen / args.tokens)
            loss = loss_of(model, rows, tokenizer.pad_token_id, opening)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad()
            seen += sum(map(length_of, rows))
            steps += 1
            if steps % 25 == 0:
                give_back_memory()
                row = dict(step=steps, tokens=seen, loss=round(loss.item(), 4), seconds=round(time.time() - started))
                print(row, flush=True)
                log.write(json.dumps(row) + "\n")
                log.flush()
            if steps % 500 == 0:
                save(model, tokenizer, args.output_dir)
    worker.terminate()
    save(model, tokenizer, args.output_dir)


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a bfloat16 copy as safetensors with its tokenizer."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    half.generation_config.do_sample = True
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
