"""Settings of the service, in one dataclass that TRL's parser fills from YAML and the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from deliberation.types import InputError
from reward.welfare import check_uncertainty_penalty
from serving.checks import check_count, check_seed, check_welfare

DEFAULT_POLICY = "default"
"""Name of the policy that answers a request that names none."""


@dataclass(frozen=True)
class Sampling:
    """How a policy samples: at most ``max_new_tokens`` tokens, ``temperature`` > 0, nucleus ``top_p`` in (0, 1]."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 0.8


@dataclass
class ServeConfig:
    """Configuration of ``consensus serve``.

    Raises:
        InputError: on a value out of range, naming the key.
    """

    model_name_or_path: str = "embedded/writer"
    """Folder or name of the policy that answers by default."""

    preference_model: str = "embedded/judge"
    """Folder of the preference model that scores every candidate for every member."""

    policies: list[str] = field(default_factory=list)
    """Further policies, each ``NAME=FOLDER``; a request picks one by ``"policy": "NAME"``."""

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

    max_new_tokens: int = 64
    """Longest statement, in tokens of the policy."""

    temperature: float = 1.0
    """Sampling temperature, above 0."""

    top_p: float = 0.8
    """Sample from the smallest set of tokens with this probability mass; in (0, 1], 1 for all tokens."""

    device: str = "cpu"
    """``cpu``, or ``cuda``: the models then share one GPU, in equal parts."""

    host: str = "127.0.0.1"
    """Address to listen on. The service knows no login: keep it on loopback or behind a proxy that does."""

    port: int = 8000
    """Port to listen on; 0 picks a free one."""

    request_timeout_s: float = 120.0
    """Seconds after which a request is answered with 504."""

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
        _check(self.request_timeout_s > 0, "request_timeout_s", self.request_timeout_s, "must be above 0")
        self.policy_folders()

    @property
    def sampling(self) -> Sampling:
        """The sampling keys as one value."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    def policy_folders(self) -> dict[str, str]:
        """Policy name -> folder, the default one first."""
        folders = {DEFAULT_POLICY: self.model_name_or_path}
        for entry in self.policies:
            name, equals, folder = entry.partition("=")
            if not equals or not folder or not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
                raise InputError("policies", entry, "write NAME=FOLDER, with a name of letters, digits, - and _")
            if name in folders:
                raise InputError("policies", entry, f"the name {name} is taken; choose another")
            folders[name] = folder
        return folders


def _check(good: bool, name: str, value: object, mend: str) -> None:
    if not good:
        raise InputError(name, value, mend)
