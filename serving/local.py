"""Policy and preference model in this process: what the deployments wrap, and what the library calls directly."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from deliberation.prompts import statement_prompt
from deliberation.tokens import plain_ids
from deliberation.types import InputError
from embedded import resolve
from reward.preference import PreferenceModel, check_ensemble, fingerprint
from reward.prefix_cache import PrefixCache
from reward.scoring import score
from rl.policy import load_policy, sample
from serving.config import Sampling, ServeConfig
from serving.exchange import Draft, Judgement, Order


class LocalSampler:
    """A policy that reads as many opinions as fit its context and samples statements.

    Args:
        model, tokenizer: as ``rl.policy.load_policy`` returns them.
        sampling: length, temperature, top_p.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.version = fingerprint(model)
        self.room = int(model.config.max_position_embeddings) - sampling.max_new_tokens

    @classmethod
    def load(cls, model_name_or_path: str, sampling: Sampling, device: str = "cpu") -> LocalSampler:
        """Load a policy folder (InputError on one without safetensors)."""
        model, tokenizer = load_policy(model_name_or_path, device=device)
        return cls(model, tokenizer, sampling)

    def sample(self, question: str, opinions: Sequence[str], orders: Sequence[Order]) -> list[Draft]:
        """One draft an order, all sampled in one batch.

        Raises:
            InputError: if not even the question and one opinion fit the context.
        """
        shown = [self._shown(question, opinions, order.members) for order in orders]
        samples = sample(
            self.model,
            self.tokenizer,
            [ids for _, ids in shown],
            n=[order.count for order in orders],
            seeds=[order.seed for order in orders],
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
        )
        return [
            Draft(
                texts=tuple(s.text for s in row),
                finished=tuple(s.finished for s in row),
                shown=members,
                version=self.version,
                prompt_tokens=len(ids),
                completion_tokens=sum(len(s.ids) for s in row),
            )
            for row, (members, ids) in zip(samples, shown, strict=True)
        ]

    def _shown(self, question: str, opinions: Sequence[str], order: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
        """The longest leading part of ``order`` whose prompt leaves room for ``max_new_tokens``; its ids too."""
        ids: dict[int, list[int]] = {}

        def tokens(count: int) -> int:
            prompt = statement_prompt(question, [opinions[m] for m in order[:count]])
            ids[count] = plain_ids(self.tokenizer, prompt)
            return len(ids[count])

        # All of them, most often; else bisection finds the last one that fits, as the prompt grows with every opinion.
        count = len(order)
        if tokens(count) > self.room:
            count = bisect.bisect_right(range(1, len(order)), self.room, key=tokens)
        if count == 0:
            mend = f"with the question takes {len(ids[1])} tokens; this policy reads {self.room}: shorten either"
            raise InputError(f"opinions[{order[0]}]", opinions[order[0]], mend)
        return tuple(order[:count]), ids[count]  # which has been looked at


class LocalJudge:
    """A preference model that scores every statement for every member."""

    def __init__(self, preference_model: PreferenceModel):
        self.preference_model = preference_model
        self.version = preference_model.version
        self._cache = PrefixCache()

    @classmethod
    def load(cls, path: str, device: str = "cpu") -> LocalJudge:
        """Load a preference model folder (InputError on one without safetensors or calibration)."""
        return cls(PreferenceModel.load(resolve(path), device=device))

    def judge(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Judgement:
        """Scores, utilities and rating probabilities of all members and statements.

        Raises:
            InputError: if an opinion with the longest statement, or a statement, exceeds the model's context.
        """
        model = self.preference_model
        scores = score(model, question, list(opinions), list(statements), cache=self._cache)
        probabilities = np.asarray(model.calibration.probabilities(scores.raw))
        return Judgement(scores.raw, scores.utilities, probabilities, self.version, scores.sd)


class LocalServices:
    """``serving.api.Services`` with all models in this process; one call at a time, in a thread of their own.

    Args:
        policies: policy name -> sampler.
        judges: name of the preference model -> judge.
    """

    def __init__(self, policies: Mapping[str, LocalSampler], judges: Mapping[str, LocalJudge]):
        self.policies, self.preference_models = tuple(policies), tuple(judges)
        thread = ThreadPoolExecutor(1)  # torch modules are not made for two callers at once
        self._samplers = {name: InThread(sampler, thread) for name, sampler in policies.items()}
        self._judges = {name: InThread(judge, thread) for name, judge in judges.items()}

    @classmethod
    def load(cls, config: ServeConfig) -> LocalServices:
        """Load all models that ``config`` names."""
        samplers = {
            name: LocalSampler.load(folder, config.sampling, config.device)
            for name, folder in config.policy_folders().items()
        }
        folders = config.preference_folders()
        if config.uncertainty_penalty:
            for folder in folders.values():
                check_ensemble(resolve(folder))
        return cls(samplers, {name: LocalJudge.load(folder, config.device) for name, folder in folders.items()})

    def sampler(self, policy: str) -> InThread:
        """The policy of that name, as an ``AsyncSampler``."""
        return self._samplers[policy]

    def judge(self, preference_model: str) -> InThread:
        """The preference model of that name, as an ``AsyncJudge``."""
        return self._judges[preference_model]

    async def versions(self) -> dict[str, str]:
        """Prints of all models' weights: ``preference_model:NAME`` and ``policy:NAME``."""
        prints = {f"preference_model:{name}": judge.model.version for name, judge in self._judges.items()}
        return prints | {f"policy:{name}": sampler.model.version for name, sampler in self._samplers.items()}


class InThread:
    """A ``LocalSampler`` or ``LocalJudge`` that is awaited: it works in a thread, which others may share."""

    def __init__(self, model: Any, thread: ThreadPoolExecutor):
        self.model, self._thread = model, thread

    async def sample(self, question: str, opinions: Sequence[str], orders: Sequence[Order]) -> list[Draft]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.model.sample, question, opinions, orders)

    async def judge(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Judgement:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.model.judge, question, opinions, statements)
