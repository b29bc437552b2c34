"""The service's counts where replicas answer: kept by Ray, which adds those of all replicas and prefixes ``ray_``."""

from __future__ import annotations

import httpx
import ray
from ray.util.metrics import Counter, Histogram

from serving.metrics import (
    CANDIDATES,
    COMPLETION_TOKENS,
    HELP,
    LATENCY_BUCKETS,
    PROMPT_TOKENS,
    REQUEST_SECONDS,
    REQUESTS,
    STAGE_SECONDS,
)


class RayMetrics:
    """``serving.metrics.Metrics`` on Ray's; ``text`` is what this node's Prometheus endpoint says, of all processes."""

    def __init__(self) -> None:
        # Ray appends _total to counters itself
        self._requests = _counter(REQUESTS, ("route", "method", "status"))
        self._candidates = _counter(CANDIDATES, ())
        self._prompt, self._completion = _counter(PROMPT_TOKENS, ()), _counter(COMPLETION_TOKENS, ())
        self._seconds = Histogram(REQUEST_SECONDS, HELP[REQUEST_SECONDS], list(LATENCY_BUCKETS), ("route",))
        self._stages = Histogram(STAGE_SECONDS, HELP[STAGE_SECONDS], list(LATENCY_BUCKETS), ("stage",))

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.inc(1, {"route": route, "method": method, "status": str(status)})
        self._seconds.observe(max(seconds, 1e-9), {"route": route})

    def stage(self, name: str, seconds: float) -> None:
        self._stages.observe(max(seconds, 1e-9), {"stage": name})

    def candidates(self, count: int) -> None:
        self._candidates.inc(count)

    def tokens(self, prompt: int, completion: int) -> None:
        for counter, count in ((self._prompt, prompt), (self._completion, completion)):
            if count:  # Ray refuses to add nothing
                counter.inc(count)

    async def text(self) -> str:
        async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
            response = await client.get(_endpoint())
        return response.raise_for_status().text


def _counter(name: str, tags: tuple[str, ...]) -> Counter:
    return Counter(name.removesuffix("_total"), HELP[name], tags)


def _endpoint() -> str:
    """URL of this node's metrics, as Ray's agent exports them."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
