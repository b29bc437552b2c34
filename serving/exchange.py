"""What the models of best-of-n exchange with its core: plain data, and the two interfaces."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from numpy.typing import NDArray


@dataclass(frozen=True)
class Order:
    """One prompt to sample from: the members in the order the policy reads them, how many samples, their seed."""

    members: tuple[int, ...]
    count: int
    seed: int


@dataclass(frozen=True)
class Draft:
    """What a sampler returns for one ``Order``.

    Attributes:
        texts: ``count`` completions, not yet cleaned.
        finished: for each, whether the policy ended it itself.
        shown: the members whose opinions the prompt held, a leading part of the order.
        version: print of the policy's weights.
        prompt_tokens: of the prompt, once for all samples; 0 where a server does not say.
        completion_tokens: of all samples together, the ends included; the same.
    """

    texts: tuple[str, ...]
    finished: tuple[bool, ...]
    shown: tuple[int, ...]
    version: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Judgement:
    """What a judge returns: plain arrays, so that nothing but numpy is needed to read it.

    Attributes:
        raw: preference-model scores, [members, statements] float32.
        utilities: expected ratings in [1, 7], same shape.
        probabilities: P(rating = 1..7), [members, statements, 7].
        version: print of the preference model's weights.
        sd: standard deviations of the utilities, [members, statements]; None without an ensemble.
    """

    raw: NDArray
    utilities: NDArray
    probabilities: NDArray
    version: str
    sd: NDArray | None = None


class Sampler(Protocol):
    """A policy in this process."""

    def sample(self, question: str, opinions: Sequence[str], orders: Sequence[Order]) -> list[Draft]: ...


class Judge(Protocol):
    """A preference model in this process."""

    def judge(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Judgement: ...


class AsyncSampler(Protocol):
    """A policy somewhere else."""

    def sample(self, question: str, opinions: Sequence[str], orders: Sequence[Order]) -> Awaitable[list[Draft]]: ...


class AsyncJudge(Protocol):
    """A preference model somewhere else."""

    def judge(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Awaitable[Judgement]: ...
