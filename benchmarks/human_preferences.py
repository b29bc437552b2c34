"""A preference model on the votes of real people it has never read, against an anchor fitted on the same votes.

The folder holds profiles (what people wrote or endorsed), statements and votes of the sets ``polis`` and ``remesh``,
or of one of them; every split but ``train`` is measured. The anchor is an MLP on sentence vectors, fitted here on
``train``. The judged figures are ``model_minus_anchor`` and ``gain`` (own opinion over another person's).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.human_anchor import Anchor, SentenceEncoder, vectors_of
from benchmarks.human_report import plot, table
from benchmarks.human_scoring import model_predictor, score_table
from benchmarks.human_splits import DRAWS_OF_PERSONS, Predictor, make_plan, measure_split
from benchmarks.human_votes import TRAIN, IntArray, VoteSet, limited, load_sets
from deliberation.types import InputError
from reward.preference import PreferenceModel


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, fit the anchors, score, measure: the report as a JSON-able dict.

    Raises:
        InputError: on a folder, model or option that does not fit.
    """
    started = time.perf_counter()
    if args.draws < 1:
        raise InputError("draws", args.draws, "must be at least 1")
    if args.limit is not None and args.limit < 1:
        raise InputError("limit", args.limit, "must be at least 1 person a split")
    sets = load_sets(args.data)
    training = {} if args.no_anchor else _training_sets(args, sets)
    model = PreferenceModel.load(args.model, args.device)
    seconds = {"anchor": 0.0, "scores": 0.0, "measures": 0.0}
    encoder = None if args.no_anchor else SentenceEncoder()
    results: dict[str, dict[str, Any]] = {}
    cut: dict[str, int] = {}
    for name, data in sets.items():
        # 1. What is asked, before anyone answers
        rng = np.random.default_rng(args.seed)
        splits = [s if args.limit is None else limited(s, args.limit, rng) for s in data.measured]
        plans = [make_plan(data, s, draws=args.draws, seed=args.seed, resamplings=args.resamplings) for s in splits]
        if not plans:
            continue
        needed = np.concatenate([plan.needed() for plan in plans])
        # 2. The anchor, then the model
        clock = time.perf_counter()
        anchor, majority = None, None
        if encoder is not None:
            anchor, majority = _anchor(data, training[name], encoder, needed, args.seed)
        seconds["anchor"] += time.perf_counter() - clock
        clock = time.perf_counter()
        ours, cut[name] = model_predictor(model, data, needed)
        seconds["scores"] += time.perf_counter() - clock
        # 3. The measures
        clock = time.perf_counter()
        results[name] = {plan.split.name: measure_split(plan, ours, anchor, majority) for plan in plans}
        seconds["measures"] += time.perf_counter() - clock
    seconds["total"] = time.perf_counter() - started
    return {
        "benchmark": "human_preferences",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}",
        "seed": args.seed,
        "options": {"draws": args.draws, "limit": args.limit, "resamplings": args.resamplings},
        "data": Path(args.data).name,
        "model": describe(model, args.model),
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
        "opinions_cut": cut,
        "results": results,
    }


def describe(model: PreferenceModel, path: str) -> dict[str, Any]:
    """Which model it was: folder name, type, size, fingerprint of the weights, and the plain facts it carries."""
    plain = {k: v for k, v in model.metadata.items() if isinstance(v, str | int | float | bool)}
    return {
        "path": Path(path).name,
        "type": model.model.config.model_type,
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "fingerprint": model.version,
        "metadata": plain,
    }


def _training_sets(args: argparse.Namespace, sets: dict[str, VoteSet]) -> dict[str, VoteSet]:
    """Where each set's anchor learns; refused now, not after an hour of scoring."""
    folder = args.anchor_data or args.data
    training = sets if folder == args.data else load_sets(folder)
    for name in sets:
        if name not in training or TRAIN not in training[name].splits:
            mend = f"has no `train` rows of {name} to fit the anchor on; give --anchor-data a folder that has them"
            raise InputError("anchor_data", str(folder), mend)
    return training


def _anchor(
    data: VoteSet, training: VoteSet, encoder: SentenceEncoder, needed: IntArray, seed: int
) -> tuple[Predictor, float]:
    """The set's anchor as a predictor, and the share of agrees among its training votes."""
    anchor = Anchor(training, vectors_of(training, encoder), seed=seed)
    vectors = vectors_of(data, encoder)
    score = score_table(lambda pairs: anchor.probabilities(vectors, pairs), data, needed, who="anchor")
    return Predictor(score, lambda p: p), anchor.positive_share


def write(report: dict[str, Any], folder: Path) -> None:
    """``human_preferences.json`` and ``human_preferences.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    (folder / "human_preferences.json").write_text(text)
    plot(report, folder / "human_preferences.png")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a fitted preference model (with calibration.json)")
    parser.add_argument("--data", required=True, help="folder with *_profiles, *_statements and *_targets tables")
    parser.add_argument("--anchor-data", help="folder whose `train` rows the anchor learns from (default: --data)")
    parser.add_argument("--no-anchor", action="store_true", help="measure without the anchor")
    parser.add_argument("--draws", type=int, default=5, help="draws of the swapped-opinion control")
    parser.add_argument("--resamplings", type=int, default=DRAWS_OF_PERSONS, help="of the persons, for the intervals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="persons a split, drawn at random, for a quick look")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="folder for the JSON and the reliability plot")
    parser.add_argument("--json", action="store_true", help="print one JSON line only")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 2 after an input error said in one line."""
    args = make_parser().parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        report = run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.output is not None:
        write(report, args.output)
    print(json.dumps(report, allow_nan=False) if args.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
