"""What looking at an experiment after every deliberation costs: false stops, and how many deliberations it takes.

    python -m benchmarks.sequential --json

Groups of 5 rate both arms (``benchmarks/rating_model.py``; simulated, never people). (1) No difference: the share of
experiments that stop within 200 looks, by the confidence sequence and by a z-test repeated at every look. The gate is
5 % plus two standard errors. (2) A true difference: deliberations until 80 % of the experiments have stopped, beside a
plan with one look at the end. (3) How narrow the interval is by then. (4) A 60/40 assignment in place of 50/50: how
often the ratio check sees it. ``passed`` is about (1).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from benchmarks.rating_model import MEMBERS, Truth, draw_ratings, shift_for, truth
from evaluation.experiment_checks import sample_ratio
from evaluation.measures import wins
from evaluation.sequences import (
    ALPHA,
    START_VARIANCE,
    WIN_START_VARIANCE,
    confidence_sequence,
    decided_at,
    difference_sequence,
    first_crossing,
    log_e_values,
    to_unit,
)

Array = NDArray[np.float64]

LOOKS = 200
POWER = 0.8
Z = 1.959964
Z_POWER = 0.841621
Z_FROM = 10
"""Deliberations before the z-test looks for the first time, as in the reference."""

MEASURES: dict[str, tuple[Callable[[Array], Array], float]] = {
    "mean_difference": (to_unit, START_VARIANCE),
    "win_rate": (lambda d: wins(np.round(d, 9), np.zeros(1)), WIN_START_VARIANCE),
}
"""Measure -> from differences to values in [0, 1], and what its bets start from."""


def differences(runs: int, looks: int, shift: float, rng: np.random.Generator) -> Array:
    """Mean paired differences of simulated deliberations, [runs, looks]."""
    a, b = draw_ratings((runs, looks), shift, rng)
    found: Array = a.mean(-1) - b.mean(-1)
    return found


def z_stops(values: Array) -> Array:
    """Looks until a two-sided z-test of "the mean is 1/2" first has p < 5 %, from ``Z_FROM`` on; infinite if never."""
    n = np.arange(1, values.shape[1] + 1)
    mean = (values - 0.5).cumsum(1) / n
    variance = ((values - 0.5) ** 2).cumsum(1) / n - mean**2
    error = np.sqrt(np.maximum(variance, 0.0) / np.maximum(n - 1, 1))
    hits = (np.abs(mean) > Z * error) & (n >= Z_FROM)
    return np.where(hits.any(1), hits.argmax(1) + 1.0, np.inf)


def false_stops(runs: int, looks: int, rng: np.random.Generator) -> dict[str, Any]:
    """Share of experiments without a difference that stop, with the gate it must not pass."""
    gate = ALPHA + 2 * math.sqrt(ALPHA * (1 - ALPHA) / runs)
    drawn = differences(runs, looks, 0.0, rng)
    found: dict[str, Any] = {"runs": runs, "looks": looks, "gate": round(gate, 4)}
    for name, (to_values, start) in MEASURES.items():
        values = to_values(drawn)
        sequence = confidence_sequence(values, start_variance=start)
        stops, crossings = decided_at(sequence), first_crossing(sequence.log_e)
        found[name] = {
            "sequence": round(float(np.isfinite(stops).mean()), 4),
            "z_every_look": round(float(np.isfinite(z_stops(values)).mean()), 4),
            "interval_and_e_value_disagree": int((stops != crossings).sum()),
            "broken": int(sequence.broken.any(1).sum()),
        }
    found["passed"] = all(found[name]["sequence"] <= gate for name in MEASURES)
    return found


def power(name: str, win_rate: float, runs: int, looks: int, rng: np.random.Generator) -> dict[str, Any]:
    """Deliberations until half and until 80 % of the experiments have stopped, at a true win rate; null if not within
    ``looks``."""
    shift = shift_for(win_rate)
    known = truth(shift)
    to_values, start = MEASURES[name]
    values = to_values(differences(runs, looks, shift, rng))
    log_e = log_e_values(values, start_variance=start)
    stops = first_crossing(log_e)
    return {
        "measure": name, "win_rate": win_rate, "member_win_rate": round(known.member_win_rate, 3),
        "difference": round(known.difference, 3), "sd": round(known.difference_sd, 3), "runs": runs, "looks": looks,
        "half": reached(stops, 0.5), "most": reached(stops, POWER), "one_look": one_look(name, known),
        "z_every_look": reached(z_stops(values), POWER),
        "wrong_way": int((np.isfinite(stops) & (mean_at(values, stops) < 0.5)).sum()),
    }  # fmt: skip


def mean_at(values: Array, stops: Array) -> Array:
    """Mean of each row up to where it stopped (all of it if it did not), [runs]."""
    last = np.minimum(stops, values.shape[1]).astype(int) - 1
    found: Array = values.cumsum(1)[np.arange(len(values)), last] / (last + 1)
    return found


def reached(stops: Array, share: float) -> int | None:
    """Deliberations until this share of the experiments has stopped; None if it never did."""
    at = float(np.sort(stops)[math.ceil(share * len(stops)) - 1])
    return int(at) if math.isfinite(at) else None


def one_look(name: str, known: Truth) -> int:
    """Deliberations of a plan with one look: ((z_alpha + z_power) sd / effect)^2."""
    effect, sd = (known.difference, known.difference_sd)
    if name == "win_rate":
        effect, sd = known.win_rate - 0.5, known.win_sd
    return math.ceil(((Z + Z_POWER) * sd / effect) ** 2)


def widths(runs: int, looks: tuple[int, ...], rng: np.random.Generator) -> dict[str, Any]:
    """Mean half-width of the interval after some numbers of deliberations, in rating points and as a share."""
    drawn = differences(runs, max(looks), 0.0, rng)
    points = difference_sequence(drawn)
    shares = confidence_sequence(MEASURES["win_rate"][0](drawn), start_variance=WIN_START_VARIANCE)
    return {
        "looks": list(looks),
        "mean_difference": [round(float((points.high - points.low)[:, n - 1].mean() / 2), 3) for n in looks],
        "win_rate": [round(float((shares.high - shares.low)[:, n - 1].mean() / 2), 3) for n in looks],
    }


def ratio_alerts(share: float, sizes: tuple[int, ...], runs: int, rng: np.random.Generator) -> dict[str, float]:
    """Share of assignments at ``share`` to A that one check after ``size`` deliberations calls suspect."""
    found = {}
    for size in sizes:
        alerts = alert_table(size)
        found[str(size)] = round(float(alerts[rng.binomial(size, share, runs)].mean()), 4)
    return found


def ratio_alerts_at_every_look(looks: int, runs: int, rng: np.random.Generator) -> float:
    """The same for a fair assignment checked after every deliberation: the share ever called suspect."""
    counts = (rng.random((runs, looks)) < 0.5).cumsum(1)
    ever = np.zeros(runs, dtype=bool)
    for n in range(1, looks + 1):
        ever |= alert_table(n)[counts[:, n - 1]]
    return round(float(ever.mean()), 4)


def alert_table(size: int) -> NDArray[np.bool_]:
    """Whether each number of deliberations in arm A, 0 to ``size``, is suspect."""
    return np.array([sample_ratio([k, size - k]).alert for k in range(size + 1)])


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    rng, start = np.random.default_rng(args.seed), time.process_time()
    sizes = (100, 200, 400, 800)
    figures: dict[str, Any] = {
        "false_stops": false_stops(2000, LOOKS, rng),
        "power": [power(name, rate, 500, 2500, rng) for rate in (0.55, 0.6, 0.65, 0.7) for name in MEASURES],
        "half_width": widths(100, (25, 50, 100, 200, 400), rng),
        "ratio_check": {
            "caught_at_60_40": ratio_alerts(0.6, sizes, 2000, rng),
            "false_alarms_at_50_50": ratio_alerts(0.5, sizes, 2000, rng),
            "false_alarms_at_every_look": ratio_alerts_at_every_look(LOOKS, 2000, rng),
        },
    }
    if not args.json:
        print_figures(figures)
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, numpy {np.__version__}, scipy {scipy.__version__}"
    facts = {"members": MEMBERS, "alpha": ALPHA, "seed": args.seed, "date": date.today().isoformat()}
    seconds = round(time.process_time() - start, 1)
    print(json.dumps({"passed": figures["false_stops"]["passed"], "figures": figures, **facts, "cpu_s": seconds,
                      "machine": machine}))  # fmt: skip


def print_figures(figures: dict[str, Any]) -> None:
    """For a person to read."""
    stops = figures["false_stops"]
    for name in MEASURES:
        print(f"no difference, {name}: {stops[name]['sequence']:.1%} stop (gate {stops['gate']:.1%}), "
              f"z-test at every look {stops[name]['z_every_look']:.1%}")  # fmt: skip
    for row in figures["power"]:
        print(f"win rate {row['win_rate']:.0%} (difference {row['difference']:.2f}), {row['measure']}: half stopped "
              f"after {row['half']}, 80 % after {row['most']}; one look {row['one_look']}")  # fmt: skip
    for name in ("half_width", "ratio_check"):
        print(f"{name}: {figures[name]}")


if __name__ == "__main__":
    main()
