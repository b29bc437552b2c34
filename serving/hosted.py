"""What a model process holds: a policy or a preference model, with the probe of its health checks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from deliberation.prompts import statement_prompt
from rl.policy import sample
from serving.config import Sampling
from serving.exchange import Draft, Judgement, Order
from serving.local import LocalJudge, LocalSampler

torch.set_num_threads(1)

PROBE = ("Is all well?", ["Yes."])
"""Question and opinions that a health check has the models read."""


class HostedPolicy:
    """A policy, loaded from a folder or hub name (InputError on what is none)."""

    def __init__(self, model_name_or_path: str, sampling: Sampling, device: str):
        self._sampler = LocalSampler.load(model_name_or_path, sampling, device)

    def sample(self, question: str, opinions: Sequence[str], orders: Sequence[Order]) -> list[Draft]:
        return self._sampler.sample(question, opinions, orders)

    def version(self) -> str:
        return self._sampler.version

    def probe(self) -> None:
        """Sample one token.

        Raises:
            RuntimeError: if its probability is not a number.
        """
        model, tokenizer = self._sampler.model, self._sampler.tokenizer
        ((drawn,),) = sample(model, tokenizer, [statement_prompt(*PROBE)], n=1, seeds=[0], max_new_tokens=1)
        if not np.isfinite(drawn.logprobs).all():
            raise RuntimeError("the policy gives no number for the first token of the simplest statement")


class HostedJudge:
    """A preference model, loaded from a folder (InputError on what is none)."""

    def __init__(self, path: str, device: str):
        self._judge = LocalJudge.load(path, device)

    def judge(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Judgement:
        return self._judge.judge(question, opinions, statements)

    def version(self) -> str:
        return self._judge.version

    def probe(self) -> None:
        """Judge one statement.

        Raises:
            RuntimeError: if its utility is not a number.
        """
        if not np.isfinite(self._judge.judge(*PROBE, ["Yes."]).utilities).all():
            raise RuntimeError("the preference model gives no number for the simplest statement")
