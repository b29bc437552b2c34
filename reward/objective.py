"""What a preference model is fitted by: pairs and ordinal ratings, as pure functions of scores (torch).

For one head of the ensemble, summed over the members of a batch (Bakker et al. 2022, appendix; the sign is that of
Stiennon et al. 2020):

    - mean over a member's pairs (w, l) of                    log sigmoid(slope (s_w - s_l))     Bradley-Terry, within
    - between_weight * mean over pairs of members (a, b) of   log sigmoid(slope (s_a - s_b))     the same, between
    - ordinal_weight * mean over a member's ratings of        log P(r | s)                       cumulative logit

and, where a teacher spoke for the member, both terms' means over votes drawn from what it said (``SoftVote``): one more
pairwise mean, and its statements among the ratings.

*Within* orders one member's statements. *Between* orders the members of a deliberation on one statement, so that what
it tells cannot come from the statement alone, only from whose opinion is read. *Ordinal* puts all on one scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reward.calibration import Calibration, ordinal_log_likelihood


def preference_loss(
    scores: Tensor, batch: dict[str, Any], start: Calibration, ordinal_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Mean over the heads of the loss above, summed over the batch's members, and what happened.

    Args:
        scores: [rows, heads].
        batch: as ``reward.examples.Collator`` makes it; the weights of ``between`` are in its pairs.
        start: the fixed scale the scores move on.

    Returns:
        The loss, and ``pairwise`` and ``ordinal`` of it, and ``accuracy`` on the pairs by their weights (absent without
        a pair; on soft pairs the best there is lies below 1, as votes at random would differ from the teacher).
    """
    difference = scores[batch["pairs"][:, 0]] - scores[batch["pairs"][:, 1]]
    pairwise = -(batch["pair_weights"] * F.logsigmoid(start.slope * difference)).sum()
    cuts = torch.tensor(start.cut_points, dtype=scores.dtype, device=scores.device)
    likely = torch.stack([_log_likelihood(s, batch["labels"], cuts, start.slope) for s in scores.unbind(1)], dim=1)
    ordinal = -(batch["row_weights"] * likely).sum()
    heads = scores.shape[1]
    metrics = {"pairwise": float(pairwise.detach()) / heads, "ordinal": float(ordinal.detach()) / heads}
    if len(difference):
        right, weights = (difference.detach() > 0).float(), batch["pair_weights"]
        metrics["accuracy"] = float((weights * right).sum() / weights.sum())
    return (pairwise + ordinal_weight * ordinal) / heads, metrics


def _log_likelihood(scores: Tensor, labels: Tensor, cuts: Tensor, slope: float) -> Tensor:
    """Expected log P(r | s) [rows]: a label between two places of the scale, 1.7 say, is the upper one with P = .7.

    Rows without a label have label 0 (and weight 0).
    """
    lower, upper = labels.floor().clamp(min=1).long(), labels.ceil().clamp(min=1).long()
    low, high = (ordinal_log_likelihood(scores, place, cuts, slope) for place in (lower, upper))
    return torch.lerp(low, high, (labels - lower).clamp(min=0).to(scores.dtype))
