"""Sample N statements, score each for every member, aggregate, choose: the one path for library and service.

Pure: models come in as a ``Sampler`` and a ``Judge``, in this process (``serving.local``) or behind a
deployment handle (``serving.remote``); ``serving.answering`` does what ``answer`` does with models that are awaited.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deliberation.prompts import clean_statement
from deliberation.types import Deliberation, InputError
from reward.welfare import ALPHAS, LOWEST_UTILITY, check_uncertainty_penalty, lower_utilities, welfare
from serving.checks import MAX_WAITING_MEMBERS, check_count, check_readable, check_seed, welfare_used
from serving.result import Candidate, Consensus, MemberView, Versions, WelfareUsed, Winner

RATINGS = np.arange(1, 8)

PARTS = 8
"""Parts of a group that take turns in not being read: with 16 samples, one is left without each of them."""

TURN = 4
"""Samples that share an order of the opinions, but for the parts that two of them go without."""


class NoStatement(RuntimeError):
    """The policy wrote nothing but empty statements: a fault of the policy, not of the request."""


# --- what the models exchange with the core -------------------------------------------------------------------


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


def draw_orders(
    members: int, n: int, seed: int, reshuffle: bool
) -> tuple[tuple[Order, ...], tuple[tuple[int, ...], ...]]:
    """Orders to sample from and the candidate indices each fills; see ``Plan``.

    With ``reshuffle``, no place in a prompt and no single opinion weighs on all samples: every ``TURN`` samples have an
    order of their own, and from three members on every second sample goes without a part of the group, one part after
    the other. All are among the judges all the same. So whatever a member writes, there are statements written by the
    others alone to choose from; what that costs and what it keeps out: ``benchmarks/injection.py``.

    The parts that samples of a turn go without come last in its order: their prompts begin alike, and a policy in this
    process reads what they share once.
    """
    draws = np.random.default_rng(seed)
    if not reshuffle:
        return (Order(_permutation(draws, members), n, seed),), (tuple(range(n)),)
    turns = _permutation(draws, members)
    parts = [turns[k::PARTS] for k in range(min(members, PARTS))] if members > 2 else [()]
    places: dict[tuple[int, ...], list[int]] = {}
    for first in range(0, n, TURN):
        unread = [parts[i // 2 % len(parts)] if i % 2 else () for i in range(first, first + TURN)]
        order = _late(draws, members, [part for part in unread if part])
        for i in range(first, min(n, first + TURN)):
            places.setdefault(tuple(m for m in order if m not in unread[i - first]), []).append(i)
    # Every order has its own seed, or all of them would draw the same random numbers.
    orders = tuple(Order(order, len(at), _sub_seed(seed, at[0])) for order, at in places.items())
    return orders, tuple(tuple(at) for at in places.values())


def _late(draws: np.random.Generator, members: int, parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """A random order of all members in which some parts of the group come last, in random order too."""
    last = [parts[k] for k in _permutation(draws, len(parts))]
    place = {member: 1 + k for k, part in enumerate(last) for member in part}
    return tuple(sorted(_permutation(draws, members), key=lambda member: place.get(member, 0)))


def _permutation(draws: np.random.Generator, members: int) -> tuple[int, ...]:
    return tuple(int(i) for i in draws.permutation(members))


def _sub_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 11)


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


def member_view(member: int, probabilities: NDArray, shown: bool) -> MemberView:
    """One member's predicted rating from P(rating = 1..7), shape [7]."""
    p = np.asarray(probabilities, dtype=np.float64)
    mean = float(p @ RATINGS)
    disagree = float(p[:3].sum())
    return MemberView(
        member=member,
        agreement=mean,
        sd=float(np.sqrt(p @ (RATINGS - mean) ** 2)),
        low=rating_quantile(p, 0.05),
        high=rating_quantile(p, 0.95),
        disagree=disagree,
        dissents=disagree > 0.5,
        shown=shown,
    )


def rating_quantile(probabilities: NDArray, level: float) -> int:
    """Smallest rating k with P(rating <= k) >= level (up to 1e-9 of rounding); P has shape [7], level in (0, 1)."""
    return int(np.argmax(np.cumsum(probabilities) >= level - 1e-9)) + 1


def warnings_of(
    candidates: Sequence[Candidate],
    best: int,
    members: Sequence[MemberView],
    not_shown: Sequence[int],
    uncertainty_penalty: float = 0.0,
) -> tuple[str, ...]:
    """What a caller should know before using the statement, as sentences."""
    warnings = []
    distinct = {c.statement for c in candidates if c.statement}
    empty = sum(not c.statement for c in candidates)
    if not candidates[best].finished:
        warnings.append("The chosen statement was cut off at the token limit.")
    if empty:
        warnings.append(f"{empty} of {len(candidates)} candidates are empty.")
    if len(distinct) < len(candidates) - empty:
        warnings.append(f"Only {len(distinct)} of {len(candidates)} candidates are distinct.")
    if not_shown:
        warnings.append(f"{len(not_shown)} opinions did not fit the policy's context; they were scored, not read.")
    if uncertainty_penalty:
        lowered = f"Welfare counts every utility lowered by {uncertainty_penalty:g} standard deviations."
        warnings.append(lowered)
    dissenters = sum(m.dissents for m in members)
    if 2 * dissenters >= len(members):
        warnings.append(f"{dissenters} of {len(members)} members likely disagree: this is no consensus.")
    return tuple(warnings)
