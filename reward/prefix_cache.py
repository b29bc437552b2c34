"""Members' prefixes kept across calls, for the groups being served or trained on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reward.heads import is_encoder
from reward.prefixes import Prefixes, shared_states

CACHE_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
"""Memory of keys and values that a cache holds by default. A token of the embedded judge takes 6 KiB, one of Qwen3-0.6B
in bfloat16 112 KiB: room for about 40,000 tokens of either."""

States = list[tuple[Tensor, Tensor]]


class PrefixCache:
    """Least-recently-used keys and values of prefixes, for one model whose weights do not change.

    Not made for several threads at once; ``reward.scoring`` holds the model's lock while it uses one.

    Args:
        max_bytes: memory of the kept keys and values; a prefix that alone exceeds it is not kept. None takes
            ``CACHE_BYTES`` of the device.

    Attributes:
        hits, misses: prefixes found and not found since the beginning.
    """

    def __init__(self, max_bytes: int | None = None):
        self.max_bytes, self.bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._kept: OrderedDict[tuple[int, ...], States] = OrderedDict()

    def states(self, model: nn.Module, prefixes: Sequence[tuple[int, ...]], device: torch.device | str) -> Prefixes:
        """Keys and values of prefixes as token ids, those not kept computed together."""
        if self.max_bytes is None:
            self.max_bytes = CACHE_BYTES.get(torch.device(device).type, CACHE_BYTES["cuda"])
        missing = list(dict.fromkeys(prefix for prefix in prefixes if prefix not in self._kept))
        self.hits, self.misses = self.hits + len(prefixes) - len(missing), self.misses + len(missing)
        found = {prefix: self._kept[prefix] for prefix in prefixes if prefix in self._kept}
        if missing:
            found |= dict(zip(missing, shared_states(model, missing, device).split(), strict=True))
        for prefix in prefixes:
            self._keep(prefix, found[prefix])
        opening = prefixes[0][0] if is_encoder(model) else None
        return Prefixes.join([found[prefix] for prefix in prefixes], opening)

    def _keep(self, prefix: tuple[int, ...], states: States) -> None:
        if prefix in self._kept:
            self._kept.move_to_end(prefix)
            return
        size, limit = _bytes(states), self.max_bytes or 0
        if size > limit:
            return
        self._kept[prefix] = states
        self.bytes += size
        while self.bytes > limit:
            self.bytes -= _bytes(self._kept.popitem(last=False)[1])


def _bytes(states: States) -> int:
    return sum(tensor.nbytes for layer in states for tensor in layer)
