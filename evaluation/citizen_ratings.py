"""What simulated citizens say of candidates, the demo's data; a deliberation's id ends in the number of its group."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from deliberation.citizens import Group
from deliberation.types import Rating
from evaluation.gold import noisy_ratings


def rated(groups: Sequence[Group], candidates: Sequence[list[str]], prefix: str, seed: int) -> list[Rating]:
    """Every citizen's noisy ratings of their group's candidates."""
    found = []
    for k, (group, texts) in enumerate(zip(groups, candidates, strict=True)):
        found += noisy_ratings(group, f"{prefix}-{k}", texts, f"demo {prefix} {seed} {k}")
    return found


def shown_twice(groups: Sequence[Group], ratings: Sequence[Rating], seed: int) -> list[Rating]:
    """The first rating of every statement by every citizen of a group, and a second one: it tells noise from mind."""
    first: dict[tuple[str, int, str], Rating] = {}
    texts: dict[str, list[str]] = {}
    for r in ratings:
        first.setdefault((r.deliberation_id, r.member, r.statement), r)
        if r.statement not in texts.setdefault(r.deliberation_id, []):
            texts[r.deliberation_id].append(r.statement)
    second = []
    for name, statements in texts.items():
        second += noisy_ratings(groups[int(name.rpartition("-")[2])], name, statements, f"demo again {seed} {name}")
    return [*first.values(), *second]


def good_statements(groups: Sequence[Group], ratings: Sequence[Rating], at_least: float) -> list[dict[str, Any]]:
    """The distinct statements whose mean quality rating is at least ``at_least``, as SFT rows."""
    qualities: dict[tuple[str, str], list[int]] = {}
    for r in ratings:
        qualities.setdefault((r.deliberation_id, r.statement), []).append(r.quality)
    rows = []
    for (name, statement), given in qualities.items():
        group = groups[int(name.rpartition("-")[2])]
        if statistics.mean(given) >= at_least:
            opinions = [c.opinion for c in group.citizens]
            rows.append(
                {
                    "question": group.question.text,
                    "opinions": opinions,
                    "statement": statement,
                    "topic": group.question.topic,
                }
            )
    return rows


def first_candidates(ratings: Sequence[Rating], count: int, groups: int) -> list[Rating]:
    """The ratings of each group's first ``count`` distinct statements, for the first ``groups`` groups."""
    kept, seen = [], {}  # type: list[Rating], dict[str, list[str]]
    for r in ratings:
        texts = seen.setdefault(r.deliberation_id, [])
        if r.statement not in texts and len(texts) < count:
            texts.append(r.statement)
        if r.statement in texts and int(r.deliberation_id.rpartition("-")[2]) < groups:
            kept.append(r)
    return kept
