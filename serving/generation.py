"""Writes the candidates of a deliberation that people take part in: each arm's, from the members' opinions.

Carried out as a request of the ledger: under a lease, and by another process where the first one dies. Same models and
seed write the same candidates, so doing it twice does no harm.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Row

from serving import trials
from serving.answering import Report, Services, carry_out, silent
from serving.best_of_n import make_plan
from serving.config import ServeConfig
from serving.exchange import AsyncJudge, AsyncSampler, Draft, Order
from serving.experiments import Arm
from serving.ledger import Entry
from serving.metrics import Metrics
from serving.patience import Patient
from serving.problems import problem_of
from serving.result import Consensus
from serving.schemas import Problem
from serving.sessions import GENERATING, Sessions
from serving.store import new_id, reading

SHOWN = 4
"""Statements a group rates, where no experiment says so."""


class Revising:
    """Services whose policy reads more than the judge: the first winner, and what members have against it.

    The critique round of Tessler et al. 2024 (the Habermas Machine). The judge sees opinions alone: it was fitted to
    those.

    Args:
        services: the models.
        winner: the statement that was criticised.
        comments: one a member, in the order of the opinions; "" where there is none.
    """

    def __init__(self, services: Services, winner: str, comments: Sequence[str]):
        self._services, self.winner, self.comments = services, winner, tuple(comments)
        self.policies, self.preference_models = services.policies, services.preference_models

    def sampler(self, policy: str) -> AsyncSampler:
        return _Revised(self, self._services.sampler(policy))

    def judge(self, preference_model: str) -> AsyncJudge:
        return self._services.judge(preference_model)

    async def versions(self) -> dict[str, str]:
        return await self._services.versions()


@dataclass(frozen=True)
class _Revised:
    by: Revising
    sampler: AsyncSampler

    async def sample(self, question: str, opinions: Sequence[str], orders: Sequence[Order]) -> list[Draft]:
        said = [f"{o} On the first statement: {c}" if c else o for o, c in zip(opinions, self.by.comments, strict=True)]
        return await self.sampler.sample(f"{question} First statement: {self.by.winner}", said, orders)


class Generation:
    """Carries out the writing of candidates.

    Args:
        services, metrics, defaults: as of the API.
        sessions: where opinions come from and candidates go to.
    """

    def __init__(self, services: Services, defaults: ServeConfig, sessions: Sessions, metrics: Metrics):
        self.services, self.defaults, self.sessions, self.metrics = Patient(services), defaults, sessions, metrics

    async def run(self, body: str, report: Report = silent) -> dict[str, Any]:
        """Write the candidates of a round.

        Args:
            body: JSON of ``deliberation`` and ``generation``.
            report: told nothing: texts would outlive the deliberation that they are erased with.

        Returns:
            JSON-able: how many candidates there are; none, if the generation is no longer the one going on.

        Raises:
            Whatever models raise, TimeoutError for an arm after ``background_timeout_s``; the deliberation is back
            where it was then, and the arm's failure is counted.
        """
        job = json.loads(body)
        name, generation = job["deliberation"], job["generation"]
        found = await asyncio.to_thread(self._read, name, generation)
        if found is None:
            return {"candidates": 0}
        row, said, services, arms = found
        rows: list[dict[str, Any]] = []
        exposed: list[dict[str, Any]] = []
        for arm in arms:
            try:
                started = time.perf_counter()
                writing = self._arm(services, row, arm, [text for _, text in said])
                consensus = await asyncio.wait_for(writing, self.defaults.background_timeout_s)
            except Exception as error:
                problem, _ = problem_of(error)
                await asyncio.to_thread(self.sessions.failed, name, generation, problem.model_dump(), arm.name)
                raise
            seconds = time.perf_counter() - started
            wanted = 1 if row.experiment is not None else json.loads(row.settings)["shown"]
            best = _best(consensus, wanted)
            for place in best:
                new = _candidate(consensus, place, [member for member, _ in said], arm, winner=place == best[0])
                same = next((old for old in rows if old["statement"] == new["statement"]), None)
                if same is None:
                    rows.append(new | {"number": len(rows)})
                if row.experiment is not None:
                    exposed.append({"arm": arm.name, "candidate": (same or new)["id"], "seconds": seconds})
        await asyncio.to_thread(self.sessions.keep, name, generation, rows, exposed)
        return {"candidates": len(rows)}

    def failed(self, entry: Entry, problem: Problem) -> None:
        """Let the deliberation go back where it was, if it is not yet: no arm's fault."""
        job = json.loads(entry.body)
        self.sessions.failed(job["deliberation"], job["generation"], problem.model_dump(), arm=None)

    def _read(self, name: str, generation: str) -> tuple[Row, list[tuple[str, str]], Services, list[Arm]] | None:
        """The deliberation, (member id, opinion) of all who wrote, the models and the arms; None if that is over."""
        row = self.sessions.get(name)
        if row.state != GENERATING or row.generation != generation:
            return None
        said = self.sessions.written(name)
        return row, said, self._services(name, row.round, [member for member, _ in said]), self._arms(row)

    def _services(self, name: str, number: int, who: list[str]) -> Services:
        if number == 1:
            return self.services
        winner, said = self.sessions.criticised(name)
        return Revising(self.services, winner, [said.get(member, "") for member in who])

    def _arms(self, row: Row) -> list[Arm]:
        if row.experiment is None:
            settings = json.loads(row.settings)
            return [Arm(name="", **{key: settings[key] for key in ("policy", "preference_model", "n", "welfare")})]
        with reading(self.sessions.engine) as connection:
            return trials.arms_of(connection, row.id)

    async def _arm(self, services: Services, row: Row, arm: Arm, texts: list[str]) -> Consensus:
        plan = make_plan(
            row.question,
            texts,
            policy=arm.policy,
            preference_model=arm.preference_model,
            n=arm.n,
            welfare=arm.welfare,
            seed=json.loads(row.settings)["seed"],
            uncertainty_penalty=self.defaults.uncertainty_penalty,
            reshuffle=self.defaults.reshuffle,
        )
        return await carry_out(services, plan, self.metrics)


def _best(consensus: Consensus, wanted: int) -> list[int]:
    """Indices of the best candidates, the winner first, no text twice, none empty."""
    order = [consensus.index, *sorted(range(len(consensus.candidates)), key=lambda i: consensus.candidates[i].rank)]
    found: dict[str, int] = {}
    for i in order:
        if consensus.candidates[i].statement:
            found.setdefault(consensus.candidates[i].statement, i)
    return list(found.values())[:wanted]


def _candidate(consensus: Consensus, place: int, who: list[str], arm: Arm, winner: bool) -> dict[str, Any]:
    candidate = consensus.candidates[place]
    predicted = {member: round(float(u), 4) for member, u in zip(who, candidate.utilities, strict=True)}
    return {
        "id": new_id("can"),
        "statement": candidate.statement,
        "policy": arm.policy,
        "versions": json.dumps(asdict(consensus.versions)),
        "welfare": float(candidate.welfare),
        "predicted": json.dumps(predicted),
        "winner": winner,
    }
