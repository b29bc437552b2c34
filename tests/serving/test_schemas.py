"""Answers that an earlier version recorded are still answers of this one."""

from __future__ import annotations

from serving.schemas import ConsensusResponse, Problem

FIRST = {
    "statement": "Tea for all.",
    "index": 0,
    "welfare": 5.0,
    "welfare_used": {"name": "nash", "alpha": 1.0},
    "candidates": [{"statement": "Tea for all.", "welfare": 5.0, "utilities": [5.0], "scores": [0.5], "rank": 1,
                    "finished": True}],
    "members": [{"member": 0, "agreement": 5.0, "sd": 1.0, "low": 3, "high": 7, "disagree": 0.1, "dissents": False,
                 "shown": True}],
    "dissenters": [],
    "winners": {"nash": {"index": 0, "statement": "Tea for all.", "welfare": 5.0}},
    "choice_mattered": False,
    "not_shown": [],
    "versions": {"policy": "default", "policy_weights": "sha256:policy", "preference_model": "default",
                 "preference_model_weights": "sha256:judge"},
    "seed": 0,
    "warnings": [],
}  # fmt: skip
"""An answer of the first version, whole. Never add a field here: a later one needs a default, or this test fails."""


def test_an_answer_of_the_first_version_can_be_read():
    assert ConsensusResponse.model_validate(FIRST).influence is None


def test_a_problem_of_the_first_version_can_be_read():
    kept = {"type": "about:blank", "title": "Out of time", "status": 504, "detail": "late", "retryable": True}
    assert Problem.model_validate({**kept, "errors": []}).retryable
