"""The preference model: a sequence classifier that reads one opinion and one statement, and its calibration.

On disk it is what transformers writes (``AutoModelForSequenceClassification``, one label, safetensors), so TRL and
vLLM load it without this code; beside it ``calibration.json`` turns the scalar score into P(rating = k), k = 1..7.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deliberation.prompts import preference_prefix, preference_suffix
from deliberation.types import RATING_SCALE, InputError

CALIBRATION_FILE = "calibration.json"
CONFIG_FILE = "config.json"
WEIGHTS = "*.safetensors"

_MIN_SLOPE = 1e-3
"""Smallest slope a fit may give, per standard deviation of the scores: utilities never fall as the score rises."""


@dataclass(frozen=True)
class Calibration:
    """Score -> distribution of the rating: P(r <= k) = sigmoid(c_k - slope * score), k = 1..6 (cumulative logit).

    McCullagh 1980, "Regression models for ordinal data". Utility is the expected rating, so it lies in [1, 7] and
    means the same for every member.

    Attributes:
        cut_points: c_1 < ... < c_6.
        slope: > 0, so that a higher score is never a lower utility.

    Raises:
        InputError: field ``cut_points`` or ``slope``.
    """

    cut_points: tuple[float, ...]
    slope: float = 1.0

    def __post_init__(self) -> None:
        cuts = np.asarray(self.cut_points, dtype=np.float64)
        if cuts.shape != (len(RATING_SCALE) - 1,) or not np.isfinite(cuts).all() or (np.diff(cuts) <= 0).any():
            raise InputError("cut_points", self.cut_points, "must be 6 finite, increasing numbers")
        if not (np.isfinite(self.slope) and self.slope > 0):
            raise InputError("slope", self.slope, "must be a finite number above 0")
        object.__setattr__(self, "cut_points", tuple(float(c) for c in cuts))
        object.__setattr__(self, "slope", float(self.slope))

    def _at_most(self, scores: ArrayLike) -> NDArray[np.float64]:
        """P(r <= k), k = 1..6: scores [...] -> [..., 6]."""
        distance = np.asarray(self.cut_points) - self.slope * np.asarray(scores, dtype=np.float64)[..., None]
        return np.exp(-np.logaddexp(0.0, -distance))  # the sigmoid, without overflow

    def probabilities(self, scores: ArrayLike) -> NDArray[np.float64]:
        """P(r = k), k = 1..7: scores [...] -> [..., 7], each row of sum 1."""
        at_most = self._at_most(scores)
        return np.diff(at_most, axis=-1, prepend=0.0, append=1.0)

    def utilities(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Expected rating in [1, 7], scores [...] -> [...]: 1 + sum_k P(r > k)."""
        return len(RATING_SCALE) - self._at_most(scores).sum(axis=-1)

    def to_dict(self) -> dict[str, Any]:
        return {"cut_points": list(self.cut_points), "slope": self.slope}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """The inverse of ``to_dict``.

        Raises:
            InputError: field ``calibration``, on a missing key.
        """
        for key in ("cut_points", "slope"):
            if key not in values:
                raise InputError("calibration", sorted(values), f"has no key {key!r}; fit the preference model again")
        return cls(tuple(values["cut_points"]), values["slope"])

    @classmethod
    def of_ratings(cls, ratings: ArrayLike) -> Calibration:
        """Slope 1 and the cut-points at which a score of 0 gives the observed shares of the ratings.

        Each rating is counted one seventh of a time more than seen, so that a rating never seen stays possible.
        """
        seen = _check_ratings(ratings)
        counts = np.bincount(seen, minlength=8)[1:] + 1 / len(RATING_SCALE)
        at_most = np.cumsum(counts)[:-1] / counts.sum()
        return cls(tuple(np.log(at_most / (1 - at_most))))

    @classmethod
    def fit(cls, scores: ArrayLike, ratings: ArrayLike) -> Calibration:
        """Maximum likelihood on scores [n] and ratings [n] (1..7), with one observation of prior.

        The prior is one more rating, spread evenly over 1..7 and over the mean score and one standard deviation to
        either side: it keeps the fit finite where a rating is never seen or scores separate ratings perfectly.
        If scores do not rise with ratings, the slope stays at its lower bound and a warning says so.

        Raises:
            InputError: on empty, not finite or unequal inputs.
        """
        y = _check_ratings(ratings)
        s = np.asarray(scores, dtype=np.float64)
        if s.shape != y.shape or not np.isfinite(s).all():
            raise InputError("scores", s.shape, f"must be one finite number a rating ({y.shape[0]})")
        mean, spread = float(s.mean()), max(float(s.std()), 1e-6)
        cuts, slope = _maximum_likelihood(torch.tensor((s - mean) / spread), torch.tensor(y), cls.of_ratings(y))
        if slope < 2 * _MIN_SLOPE:
            warnings.warn("scores do not rise with ratings; the preference model tells nothing", stacklevel=2)
        return cls(tuple(cuts + slope * mean / spread), slope / spread)


def _check_ratings(ratings: ArrayLike) -> NDArray[np.int64]:
    y = np.asarray(ratings)
    if y.ndim != 1 or y.size == 0 or not np.isin(y, RATING_SCALE).all():
        raise InputError("ratings", y.shape, "must be a non-empty list of integers from 1 to 7")
    return y.astype(np.int64)


def ordinal_log_likelihood(scores: Tensor, ratings: Tensor, cut_points: Tensor, slope: Tensor | float) -> Tensor:
    """log P(r = rating) under the cumulative-logit model: scores [n], ratings [n] in 1..7 -> [n].

    Uses sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), exact where the difference would
    cancel. The outer categories have one bound only.
    """
    upper = cut_points[(ratings - 1).clamp(max=5)] - slope * scores
    lower = cut_points[(ratings - 2).clamp(min=0)] - slope * scores
    top, bottom = ratings == len(RATING_SCALE), ratings == 1
    below = torch.where(top, 0.0, F.logsigmoid(upper))
    above = torch.where(bottom, 0.0, F.logsigmoid(-lower))
    gap = torch.where(top | bottom, 1.0, upper - lower)
    return below + above + torch.where(top | bottom, 0.0, torch.log(-torch.expm1(-gap)))


def _maximum_likelihood(z: Tensor, ratings: Tensor, start: Calibration) -> tuple[NDArray[np.float64], float]:
    """Cut-points [6] and slope for standardised scores z [n] float64, by L-BFGS on an unconstrained form."""
    # 1. Free parameters: first cut-point, logs of the gaps, log of the slope above its bound
    first = torch.tensor(start.cut_points[:1], dtype=torch.float64)
    gaps = torch.tensor(np.diff(start.cut_points), dtype=torch.float64).log()
    free = torch.cat([first, gaps, torch.zeros(1, dtype=torch.float64)]).requires_grad_()

    def bounded() -> tuple[Tensor, Tensor]:
        cuts = torch.cumsum(torch.cat([free[:1], free[1:6].exp()]), dim=0)
        return cuts, _MIN_SLOPE + free[6].exp()

    # 2. Likelihood of the data and of the prior observation
    prior_ratings = torch.tensor(RATING_SCALE).repeat(3)
    prior_z = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).repeat_interleave(len(RATING_SCALE))
    optimiser = torch.optim.LBFGS(
        [free], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        cuts, slope = bounded()
        data = ordinal_log_likelihood(z, ratings, cuts, slope).sum()
        prior = ordinal_log_likelihood(prior_z, prior_ratings, cuts, slope).mean()
        value = -(data + prior) / (len(z) + 1)
        value.backward()
        return value

    # 3. Fit
    with torch.enable_grad():
        optimiser.step(loss)
    with torch.no_grad():
        cuts, slope = bounded()
        return cuts.numpy(), float(slope)


@dataclass
class PreferenceModel:
    """A sequence classifier with one label, its tokenizer, its calibration, and what is known about it.

    Attributes:
        model: gives the score, read at the last real token of prefix + suffix.
        tokenizer: its tokenizer; prefix and suffix are tokenised apart, in training and in scoring alike.
        calibration: score -> distribution of the rating.
        metadata: JSON-able facts (data, measures, seed ...).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: Calibration
    metadata: dict[str, Any] = field(default_factory=dict)

    def prefix_ids(self, question: str, opinion: str) -> list[int]:
        """Token ids of what a member's candidates share; carries the tokenizer's special tokens."""
        return list(self.tokenizer(preference_prefix(question, opinion)).input_ids)

    def suffix_ids(self, statement: str) -> list[int]:
        """Token ids of one candidate; at least one."""
        return list(self.tokenizer(preference_suffix(statement), add_special_tokens=False).input_ids)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> PreferenceModel:
        """Load a folder that ``save`` wrote: float32 on CPU, the saved precision elsewhere. No code is trusted.

        Raises:
            InputError: field ``preference_model``; see ``check_folder``.
        """
        calibration, metadata = check_folder(path)
        folder = Path(path)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32 if torch.device(device).type == "cpu" else "auto",
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return cls(model.to(device).eval(), tokenizer, calibration, metadata)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder so that it is either the old model, the new one, or refused by ``load``; never a mixture.

        Everything is written to a temporary folder beside it first. A new folder then appears by one rename; in an
        existing one the model's files are replaced, and ``calibration.json``, without which nothing loads, comes last.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.model.config.pad_token_id is None:  # TRL and vLLM refuse to batch without it
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            folder = Path(temporary) / "model"
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            document = {**self.calibration.to_dict(), "metadata": self.metadata}
            (folder / CALIBRATION_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
            _move(folder, target)


def _move(folder: Path, target: Path) -> None:
    """Put the finished ``folder`` at ``target``; other files already there (logs, checkpoints) stay."""
    if not target.exists():
        folder.rename(target)
        return
    (target / CALIBRATION_FILE).unlink(missing_ok=True)
    for old in (*target.glob(WEIGHTS), *target.glob(WEIGHTS + ".index.json")):
        old.unlink()
    for new in sorted(folder.iterdir(), key=lambda file: file.name == CALIBRATION_FILE):
        new.replace(target / new.name)


def check_folder(path: str | os.PathLike[str]) -> tuple[Calibration, dict[str, Any]]:
    """Refuse a folder that ``PreferenceModel.load`` cannot load, without reading its weights.

    Returns:
        The calibration and the metadata beside the model.

    Raises:
        InputError: field ``preference_model``: no folder, no calibration, no config, no safetensors, or not one label.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError("preference_model", str(folder), "is not a folder; give one that `consensus preference` wrote")
    for name in (CALIBRATION_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise InputError("preference_model", str(folder), f"has no {name}; fit with `consensus preference`")
    if not any(folder.glob(WEIGHTS)):
        raise InputError("preference_model", str(folder), "has no safetensors weights; save it with safetensors")
    labels = AutoConfig.from_pretrained(folder, trust_remote_code=False).num_labels
    if labels != 1:
        raise InputError("preference_model", str(folder), f"has {labels} labels; needs exactly 1")
    document = json.loads((folder / CALIBRATION_FILE).read_text())
    return Calibration.from_dict(document), document.get("metadata", {})


def fingerprint(model: torch.nn.Module) -> str:
    """Short SHA-256 (16 hex digits) over names, types, shapes and bytes of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()[:16]}"
