"""Sample N statements, score each for every member, aggregate, choose: the one path for library and service.

Pure: models come in as a ``Sampler`` and a ``Judge``, in this process (``serving.local``) or behind a
deployment handle (``serving.remote``); ``serving.answering`` does what ``answer`` does with models that are awaited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deliberation.prompts import clean_statement
from deliberation.types import Deliberation, InputError
from reward.welfare import ALPHAS, LOWEST_UTILITY, check_uncertainty_penalty, lower_utilities, welfare
from serving.checks import MAX_WAITING_MEMBERS, check_count, check_readable, check_seed, welfare_used
from serving.exchange import Draft, Judge, Judgement, Order, Sampler
from serving.orders import draw_orders
from serving.result import Candidate, Consensus, Versions, WelfareUsed, Winner
from serving.views import member_view, warnings_of


class NoStatement(RuntimeError):
    """The policy wrote nothing but empty statements: a fault of the policy, not of the request."""


# --- the plan -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A checked request: what to sample, and where each sample belongs.

    Attributes:
        orders: distinct prompts.
        places: for each order, the candidate indices its samples fill (``len(places[i]) == orders[i].count``).
        policy, preference_model: the names the answering models go by.
        influence: whether to say what each opinion changed (see ``serving.influence``).
    """

    question: str
    opinions: tuple[str, ...]
    n: int
    used: WelfareUsed
    seed: int
    policy: str
    preference_model: str
    uncertainty_penalty: float
    orders: tuple[Order, ...]
    places: tuple[tuple[int, ...], ...]
    influence: bool = False


def make_plan(
    question: str,
    opinions: Sequence[str],
    *,
    n: int,
    welfare: str | float,
    seed: int,
    policy: str = "default",
    preference_model: str = "default",
    uncertainty_penalty: float = 0.0,
    reshuffle: bool = True,
    influence: bool = False,
) -> Plan:
    """Check a request and draw the order(s) in which the policy reads the opinions.

    Args:
        n: candidates, 1 to ``checks.MAX_CANDIDATES``.
        welfare: a name (``worst_cluster`` excepted), or alpha >= 0 (``"inf"`` too).
        seed: 0 to ``checks.MAX_SEED``; decides orders and samples.
        uncertainty_penalty: lambda >= 0; utilities enter welfare as mean - lambda * sd, not below 1.
        reshuffle: change from sample to sample whom it reads, and in which order, instead of one order for all (see
            ``draw_orders``).
        influence: say what each opinion changed; for groups of 2 to ``checks.MAX_WAITING_MEMBERS``.

    Raises:
        InputError: naming the field.
    """
    if isinstance(opinions, str):  # a sequence too, of single letters
        raise InputError("opinions", opinions, "must be a list with one text a member")
    texts = tuple(opinions)
    Deliberation(id="request", question=question, opinions=texts)
    check_readable("question", question)
    for i, opinion in enumerate(texts):
        check_readable(f"opinions[{i}]", opinion)
    if influence and not 2 <= len(texts) <= MAX_WAITING_MEMBERS:
        raise InputError("influence", influence, f"is for groups of 2 to {MAX_WAITING_MEMBERS}; this has {len(texts)}")
    orders, places = draw_orders(len(texts), check_count(n), check_seed(seed), reshuffle)
    penalty = check_uncertainty_penalty(uncertainty_penalty)
    used = welfare_used(welfare)
    return Plan(question, texts, n, used, seed, policy, preference_model, penalty, orders, places, influence)


# --- the core -------------------------------------------------------------------------------------------------


def best_of_n(
    sampler: Sampler,
    judge: Judge,
    question: str,
    opinions: Sequence[str],
    *,
    n: int = 16,
    welfare: str | float = "nash",
    seed: int = 0,
    policy: str = "default",
    preference_model: str = "default",
    uncertainty_penalty: float = 0.0,
    reshuffle: bool = True,
) -> Consensus:
    """The statement, of ``n`` sampled ones, with the highest predicted welfare of the group.

    Raises:
        InputError: on a bad request (see ``make_plan``) or one that does not fit a model's context.
        NoStatement: if every candidate is empty.
    """
    return answer(
        sampler,
        judge,
        make_plan(
            question,
            opinions,
            n=n,
            welfare=welfare,
            seed=seed,
            policy=policy,
            preference_model=preference_model,
            uncertainty_penalty=uncertainty_penalty,
            reshuffle=reshuffle,
        ),
    )


def answer(sampler: Sampler, judge: Judge, plan: Plan) -> Consensus:
    """Carry out a plan: sample, score, choose."""
    drafts = sampler.sample(plan.question, plan.opinions, plan.orders)
    judgement = judge.judge(plan.question, plan.opinions, readable(statements(plan, drafts)))
    return choose(plan, drafts, judgement)


def statements(plan: Plan, drafts: Sequence[Draft]) -> list[str]:
    """All ``n`` cleaned statements in candidate order; empty where the policy wrote nothing."""
    texts = [""] * plan.n
    for draft, places in zip(drafts, plan.places, strict=True):
        for text, place in zip(draft.texts, places, strict=True):
            texts[place] = clean_statement(text)
    return texts


def readable(texts: Sequence[str]) -> list[str]:
    """The statements worth scoring, i.e. the non-empty ones.

    Raises:
        NoStatement: if there is none.
    """
    kept = [text for text in texts if text]
    if not kept:
        raise NoStatement(f"all {len(texts)} candidates are empty: the policy ends every statement at once")
    return kept


def choose(plan: Plan, drafts: Sequence[Draft], judgement: Judgement) -> Consensus:
    """Aggregate the members' utilities into welfare and pick the winner. Ties go to the earlier candidate."""
    # 1. Spread the scored columns over all candidates; empty statements get the lowest utility.
    texts = statements(plan, drafts)
    scored = [i for i, text in enumerate(texts) if text]
    utilities = np.full((len(plan.opinions), plan.n), LOWEST_UTILITY)
    utilities[:, scored] = judgement.utilities
    column = {place: i for i, place in enumerate(scored)}
    bounds = utilities.copy()
    if plan.uncertainty_penalty:
        bounds[:, scored] = lower_utilities(judgement.utilities, judgement.sd, plan.uncertainty_penalty)[0]
    # 2. Welfare and winner under the function asked for, and under the three named ones.
    values = np.asarray(welfare(bounds, plan.used.function))
    best = best_index(values, scored)
    winners = {name: _winner(texts, bounds, alpha, scored) for name, alpha in ALPHAS.items()}
    # 3. The members' view of the winner.
    shown = {member for draft in drafts for member in draft.shown}
    members = tuple(
        member_view(i, judgement.probabilities[i, column[best]], i in shown) for i in range(len(plan.opinions))
    )
    # 4. The result.
    candidates = _candidates(plan, drafts, texts, utilities, values, judgement.raw, column)
    not_shown = tuple(i for i in range(len(plan.opinions)) if i not in shown)
    return Consensus(
        statement=texts[best],
        index=best,
        welfare=float(values[best]),
        welfare_used=plan.used,
        candidates=candidates,
        members=members,
        dissenters=tuple(m.member for m in members if m.dissents),
        winners=winners,
        choice_mattered=len({texts[best], *(w.statement for w in winners.values())}) > 1,
        not_shown=not_shown,
        versions=Versions(plan.policy, drafts[0].version, plan.preference_model, judgement.version),
        seed=plan.seed,
        warnings=warnings_of(candidates, best, members, not_shown, plan.uncertainty_penalty),
    )


def best_index(values: NDArray, among: Sequence[int]) -> int:
    """Index of the highest of ``values`` [candidates] among the given indices; the first of equals."""
    return max(among, key=lambda i: (values[i], -i))


def _winner(texts: list[str], utilities: NDArray, alpha: float, scored: list[int]) -> Winner:
    values = np.asarray(welfare(utilities, alpha))
    best = best_index(values, scored)
    return Winner(best, texts[best], float(values[best]))


def _candidates(
    plan: Plan,
    drafts: Sequence[Draft],
    texts: list[str],
    utilities: NDArray,
    values: NDArray,
    raw: NDArray,
    column: dict[int, int],
) -> tuple[Candidate, ...]:
    finished = [False] * plan.n
    for draft, places in zip(drafts, plan.places, strict=True):
        for ended, place in zip(draft.finished, places, strict=True):
            finished[place] = ended
    ranking = sorted(range(plan.n), key=lambda i: (i not in column, -values[i], i))
    rank = {place: position + 1 for position, place in enumerate(ranking)}
    return tuple(
        Candidate(
            statement=texts[i],
            welfare=float(values[i]),
            utilities=tuple(float(u) for u in utilities[:, i]),
            scores=tuple(float(s) for s in raw[:, column[i]]) if i in column else None,
            rank=rank[i],
            finished=finished[i],
        )
        for i in range(plan.n)
    )
