"""Drawing tokens: reproducible uniform numbers, the nucleus, and the inverse of the cumulative distribution."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

NUCLEUS_TOP = 128
"""Tokens looked at first when cutting the nucleus; a full sort only where they hold less than ``top_p``."""

BLOCK = 64
"""Tokens summed at once when drawing."""


def uniforms(seed: int, n: int, steps: int) -> Tensor:
    """Uniform numbers [n, steps] (float64, CPU): entry (i, t) depends on ``seed``, i and t only, not on n or steps."""
    parent = torch.Generator().manual_seed(seed)
    children = torch.randint(2**63 - 1, (n,), generator=parent).tolist()
    rows = [torch.rand(steps, generator=torch.Generator().manual_seed(c), dtype=torch.float64) for c in children]
    return torch.stack(rows)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero what lies outside the smallest set of most likely tokens with mass >= ``top_p`` (ties with its last stay).

    Args:
        probabilities: [rows, vocabulary], each row summing to 1.

    Returns:
        The same shape, not renormalised.
    """
    vocabulary = probabilities.shape[-1]
    lowest = _lowest_kept(_largest(probabilities, min(NUCLEUS_TOP, vocabulary)), top_p)
    wide = lowest.isnan().squeeze(-1)  # rows too flat for the first look
    if bool(wide.any()):
        lowest[wide] = _lowest_kept(_largest(probabilities[wide], vocabulary), top_p, whole=True)
    return probabilities.masked_fill(probabilities < lowest, 0.0)


def _largest(probabilities: Tensor, count: int) -> Tensor:
    """The ``count`` largest of each row, descending. On a CPU by numpy, which sorts many times faster than torch."""
    if probabilities.device.type != "cpu":
        return probabilities.topk(count, dim=-1).values
    found = np.partition(probabilities.numpy(), -count, axis=-1)[:, -count:]
    return torch.from_numpy(np.sort(found, axis=-1)[:, ::-1].copy())


def _lowest_kept(descending: Tensor, top_p: float, whole: bool = False) -> Tensor:
    """The probability [rows, 1] at which the mass of ``descending`` [rows, k] reaches ``top_p``.

    NaN where it does not, unless ``descending`` is the ``whole`` distribution, of which then all is kept.
    """
    short = (descending.double().cumsum(-1) < top_p).sum(-1, keepdim=True)
    last = descending.shape[-1] - 1
    lowest = descending.gather(-1, short.clamp_max(last))
    return lowest if whole else lowest.masked_fill(short > last, torch.nan)


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tokens by inverse cumulative distribution, and the log-probabilities they were drawn with.

    Args:
        logits: [rows, vocabulary].
        uniform: [rows] float64 in [0, 1).

    Returns:
        [rows] token ids (a token of probability 0 is never drawn) and [rows] their log-probabilities, float64.
    """
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1.0:
        probabilities = nucleus(probabilities, top_p)
    # Running sums of blocks, then within one: a running sum over the whole vocabulary takes several times as long
    blocks = pad(probabilities, (0, -logits.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    up_to = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    mass = up_to[:, -1:]
    target = uniform[:, None] * mass
    block = _first_above(up_to, target)
    before = pad(up_to, (1, 0)).gather(-1, block)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    tokens = (block * BLOCK + _first_above(within, target - before)).clamp_max(logits.shape[-1] - 1)
    return tokens.squeeze(-1), (probabilities.gather(-1, tokens) / mass).log().squeeze(-1)


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """The first place [rows, 1] at which the running sum [rows, k] exceeds ``target`` [rows, 1].

    A target that rounding has put at or above the whole sum is taken for one just below it, so that the place is one
    that adds to the sum. Sums that are no numbers give the last place.
    """
    below = torch.nextafter(running[:, -1:], torch.zeros_like(target))
    found = torch.searchsorted(running, torch.minimum(target, below), right=True)
    return found.clamp_max(running.shape[-1] - 1)
