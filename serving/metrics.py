"""What the service counts, by the names that its dashboard and alarms use (docs/operations.md)."""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper ends of the latency histograms, seconds."""

REQUESTS = "consensus_requests_total"
REQUEST_SECONDS = "consensus_request_seconds"
STAGE_SECONDS = "consensus_stage_seconds"
CANDIDATES = "consensus_candidates_total"
PROMPT_TOKENS = "consensus_prompt_tokens_total"
COMPLETION_TOKENS = "consensus_completion_tokens_total"
HELP = {
    REQUESTS: "Requests answered, by route, method and status",
    REQUEST_SECONDS: "Seconds from the first byte read to the last byte sent, by route",
    STAGE_SECONDS: "Seconds of a stage of a consensus request: sample, judge",
    CANDIDATES: "Candidates sampled",
    PROMPT_TOKENS: "Tokens of the prompts that policies read, each prompt once for all its samples",
    COMPLETION_TOKENS: "Tokens that policies wrote",
}


class Metrics(Protocol):
    """Where counts go."""

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered."""

    def stage(self, name: str, seconds: float) -> None:
        """A stage (``sample``, ``judge``) of a consensus request ended."""

    def candidates(self, count: int) -> None:
        """So many candidates were sampled."""

    def tokens(self, prompt: int, completion: int) -> None:
        """A policy read and wrote so many tokens."""

    async def text(self) -> str:
        """All counts in Prometheus' text format."""


class ProcessMetrics:
    """Counts of this process, kept by ``prometheus_client``."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(REQUESTS, HELP[REQUESTS], ["route", "method", "status"], registry=self._registry)
        self._seconds = self._histogram(REQUEST_SECONDS, "route")
        self._stages = self._histogram(STAGE_SECONDS, "stage")
        self._candidates = self._counter(CANDIDATES)
        self._prompt, self._completion = self._counter(PROMPT_TOKENS), self._counter(COMPLETION_TOKENS)

    def _counter(self, name: str) -> Counter:
        return Counter(name, HELP[name], registry=self._registry)

    def _histogram(self, name: str, label: str) -> Histogram:
        return Histogram(name, HELP[name], [label], buckets=LATENCY_BUCKETS, registry=self._registry)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def stage(self, name: str, seconds: float) -> None:
        self._stages.labels(name).observe(seconds)

    def candidates(self, count: int) -> None:
        self._candidates.inc(count)

    def tokens(self, prompt: int, completion: int) -> None:
        self._prompt.inc(prompt)
        self._completion.inc(completion)

    async def text(self) -> str:
        return generate_latest(self._registry).decode()
