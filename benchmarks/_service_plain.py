"""What many would write in an afternoon: FastAPI and transformers, one process, no batching across requests.

The same work as one request of the service: 16 samples of one prompt by ``generate``, then every statement scored for
every member, one forward pass each, and the mean over the members decides.

    python -m benchmarks._service_plain --port 8001 --new_tokens 80
"""

from __future__ import annotations

import argparse
import threading
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from deliberation.prompts import clean_statement, preference_prefix, preference_suffix, statement_prompt
from embedded import resolve


def make_plain_app(new_tokens: int, temperature: float) -> FastAPI:
    """The application, with the shipped models."""
    writer, judge = resolve("embedded/writer"), resolve("embedded/judge")
    policy = AutoModelForCausalLM.from_pretrained(writer, dtype=torch.float32).eval()
    model = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval()
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (writer, judge)]
    lock, app = threading.Lock(), FastAPI()

    @app.post("/v1/consensus")
    def consensus(body: dict[str, Any]) -> dict[str, Any]:
        with lock, torch.inference_mode():
            torch.manual_seed(body.get("seed", 0))
            inputs = tokenizers[0](statement_prompt(body["question"], body["opinions"]), return_tensors="pt")
            length = inputs.input_ids.shape[1]
            rows = policy.generate(
                **inputs,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                num_return_sequences=body["n"],
                max_new_tokens=new_tokens,
            )
            texts = [clean_statement(t) for t in tokenizers[0].batch_decode(rows[:, length:], skip_special_tokens=True)]
            scores = [
                [
                    _score(model, tokenizers[1], preference_prefix(body["question"], o) + preference_suffix(t))
                    for t in texts
                ]
                for o in body["opinions"]
            ]
            means = torch.tensor(scores).mean(dim=0)
        return {"statement": texts[int(means.argmax())], "scores": scores}

    return app


def _score(model: Any, tokenizer: Any, text: str) -> float:
    return float(model(**tokenizer(text, return_tensors="pt")).logits[0, 0])


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--new_tokens", type=int, required=True)
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    app = make_plain_app(args.new_tokens, args.temperature)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
