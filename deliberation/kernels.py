"""A switch of transformers' attention that is right for processes without a GPU."""

from __future__ import annotations

import os

SWITCH = "TRANSFORMERS_SDPA_FORCE_GQA"


def share_heads(cuda: bool) -> None:
    """Let attention with a mask read key and value heads that query heads share as they are, not copied for each.

    On a CPU the numbers are the same in less time (gradients but for rounding on some). With a mask, CUDA has no fast
    kernel for it: a process that sees a CUDA device keeps transformers' default. So does one whose environment has the
    switch.

    Args:
        cuda: ``torch.cuda.is_available()``; this module does without torch.
    """
    if not cuda:
        os.environ.setdefault(SWITCH, "1")
