"""Settings of the service, in one dataclass that TRL's parser fills from YAML and the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from deliberation.types import InputError
from reward.welfare import check_uncertainty_penalty
from serving.checks import check_count, check_seed, check_welfare

DEFAULT_POLICY = "default"
"""Name of the policy that answers a request that names none."""

DEFAULT_PREFERENCE_MODEL = "default"
"""Name of the preference model that scores for a request that names none."""


LOOPBACK = ("127.0.0.1", "localhost")
"""Addresses to listen on that only this machine reaches."""


@dataclass(frozen=True)
class Sampling:
    """How a policy samples: at most ``max_new_tokens`` tokens, ``temperature`` > 0, nucleus ``top_p`` in (0, 1]."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 0.8


@dataclass(frozen=True)
class Server:
    """A policy behind an OpenAI-compatible server (vLLM, SGLang, ...).

    Attributes:
        url: of its API, e.g. ``http://127.0.0.1:8001/v1``.
        model: one of the names that ``GET /models`` lists.
    """

    url: str
    model: str


def server_of(place: str) -> Server | None:
    """The server that ``URL#MODEL`` names; None for a folder or a hub name."""
    found = re.fullmatch(r"(https?://[^#\s]+?)/*#(\S+)", place)
    return None if found is None else Server(*found.groups())


@dataclass
class ServeConfig:
    """Configuration of ``consensus serve``.

    Raises:
        InputError: on a value out of range, naming the key.
    """

    model_name_or_path: str = "embedded/writer"
    """Folder or name of the policy that answers by default, or ``URL#MODEL`` of an OpenAI-compatible server, e.g.
    ``http://127.0.0.1:8001/v1#my-model``."""

    preference_model: str = "embedded/judge"
    """Folder of the preference model that scores every candidate for every member, by default."""

    preference_models: list[str] = field(default_factory=list)
    """Further preference models, each ``NAME=FOLDER``; a request picks one by ``"preference_model": "NAME"``."""

    policies: list[str] = field(default_factory=list)
    """Further policies, each ``NAME=FOLDER`` or ``NAME=URL#MODEL``; a request picks one by ``"policy": "NAME"``."""

    welfare: str = "nash"
    """Welfare function of requests that name none: ``utilitarian``, ``nash``, ``rawlsian``, alpha >= 0, ``p10`` or
    ``trimmed``."""

    uncertainty_penalty: float = 0.0
    """Lambda >= 0: utilities enter welfare as mean - lambda * standard deviation. Needs a preference model with an
    ensemble."""

    num_candidates: int = 16
    """Candidates of requests that bring no ``n``; 1 to 64."""

    seed: int = 0
    """Seed of requests that bring none: the same request then gets the same answer."""

    reshuffle: bool = True
    """Draw for every four samples anew in which order the policy reads the opinions, and leave a part of the group
    unread in every second one: no place and no single opinion then weighs on all samples. One order for all samples is
    somewhat faster."""

    max_new_tokens: int = 64
    """Longest statement, in tokens of the policy."""

    temperature: float = 1.0
    """Sampling temperature, above 0."""

    top_p: float = 0.8
    """Sample from the smallest set of tokens with this probability mass; in (0, 1], 1 for all tokens."""

    device: str = "cpu"
    """``cpu``, or ``cuda``: the models then share one GPU, in equal parts."""

    api_replicas: int = 2
    """Replicas of the HTTP interface."""

    min_replicas: int = 1
    """Replicas of every model at rest; with 2, the loss of one is no wait."""

    max_replicas: int = 2
    """Replicas of every model under load."""

    replica_cpus: float = 0.1
    """CPUs a model's replica books with Ray. A fraction lets all fit a laptop of two cores, twice while they are
    replaced; on a cluster, give 1."""

    replica_gpus: float = 0.125
    """Part of a GPU a model's replica books with ``device: cuda``: a policy and a preference model of two replicas
    each share one GPU, twice while they are replaced."""

    max_queued_requests: int = 8
    """Requests that wait for a model, for each replica of the HTTP interface, 1 or more; the next is refused with
    429."""

    host: str = "127.0.0.1"
    """IPv4 address or name to listen on; without keys it must be a loopback one."""

    port: int = 8000
    """Port to listen on; 0 picks a free one."""

    request_timeout_s: float = 120.0
    """Seconds after which a request is answered with 504. No single call of a model may take longer, in the background
    neither: it counts as stuck, its request fails as out of time, and the replica is replaced."""

    background_timeout_s: float = 3600.0
    """Seconds after which a request that is answered in the background fails, and the writing of a deliberation's
    candidates, for each arm."""

    retention_hours: float = 24.0
    """Hours for which requests with an idempotency key or in the background, and their answers, are kept; above 0."""

    require_keys: bool = False
    """Whether requests need an API key (``consensus keys create``). Without, whoever reaches the port may ask."""

    database: str = "sqlite:///runs/service.db"
    """URL of the database of keys, background requests and idempotency keys."""

    def __post_init__(self) -> None:
        check_welfare(self.welfare)
        check_uncertainty_penalty(self.uncertainty_penalty)
        check_seed(self.seed)
        try:
            check_count(self.num_candidates)
        except InputError as error:  # the same check as a request's, under this key's name
            raise InputError("num_candidates", error.value, error.mend) from error
        _check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "must be at least 1")
        _check(self.temperature > 0, "temperature", self.temperature, "must be above 0")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")
        _check(self.device in ("cpu", "cuda"), "device", self.device, "must be cpu or cuda")
        _check(0 <= self.port <= 65535, "port", self.port, "must be from 0 (any free port) to 65535")
        for name in ("request_timeout_s", "background_timeout_s", "retention_hours"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        # Ray Serve and HAProxy paste host and port together, where an IPv6 address would need brackets
        _check(":" not in self.host, "host", self.host, f"must be an IPv4 address or a name, e.g. {LOOPBACK[0]}")
        open_door = self.require_keys or self.host in LOOPBACK
        _check(open_door, "host", self.host, f"set require_keys: true, or listen on {LOOPBACK[0]}")
        _check(self.api_replicas >= 1, "api_replicas", self.api_replicas, "must be at least 1")
        _check(self.min_replicas >= 1, "min_replicas", self.min_replicas, "must be at least 1")
        mend = f"must be at least min_replicas ({self.min_replicas})"
        _check(self.max_replicas >= self.min_replicas, "max_replicas", self.max_replicas, mend)
        _check(self.replica_cpus >= 0, "replica_cpus", self.replica_cpus, "must be at least 0")
        _check(self.replica_gpus > 0, "replica_gpus", self.replica_gpus, "must be above 0")
        _check(self.max_queued_requests >= 1, "max_queued_requests", self.max_queued_requests, "must be at least 1")
        self.policy_folders()
        self.preference_folders()

    @property
    def sampling(self) -> Sampling:
        """The sampling keys as one value."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    def policy_folders(self) -> dict[str, str]:
        """Policy name -> folder, hub name or ``URL#MODEL``, the default one first."""
        folders = {DEFAULT_POLICY: self.model_name_or_path} | _named("policies", self.policies, DEFAULT_POLICY)
        for name, folder in folders.items():
            if "://" in folder and server_of(folder) is None:
                key = "model_name_or_path" if name == DEFAULT_POLICY else "policies"
                raise InputError(key, folder, "write http://HOST:PORT/v1#MODEL")
        return folders

    def preference_folders(self) -> dict[str, str]:
        """Name of a preference model -> its folder, the default one first."""
        further = _named("preference_models", self.preference_models, DEFAULT_PREFERENCE_MODEL)
        return {DEFAULT_PREFERENCE_MODEL: self.preference_model} | further


def _named(key: str, entries: list[str], taken: str) -> dict[str, str]:
    """The folders of entries ``NAME=FOLDER``."""
    folders: dict[str, str] = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not equals or not folder or not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
            raise InputError(key, entry, "write NAME=FOLDER, with a name of letters, digits, - and _")
        if name in folders or name == taken:
            raise InputError(key, entry, f"the name {name} is taken; choose another")
        folders[name] = folder
    return folders


def _check(good: bool, name: str, value: object, mend: str) -> None:
    if not good:
        raise InputError(name, value, mend)
