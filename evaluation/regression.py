"""A second opinion on an experiment at a fixed horizon, by somebody else's code: statsmodels (the extra ``stats``)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from deliberation.types import InputError
from evaluation.experiment_checks import DESCRIPTIVE_BELOW
from evaluation.measures import Estimate

Array = np.ndarray


def arm_effect(agreement: Array, in_a: Array, deliberation: Array) -> Estimate:
    """Agreement with A minus agreement with B: regression of members' ratings on the arm, errors by deliberation.

    Least squares with standard errors robust to whatever ratings of a deliberation have in common, and Student's t with
    deliberations - 1 degrees of freedom. Deliberations weigh alike, as in the primary measure: a rating weighs 1 over
    the ratings of its arm in its deliberation (with groups of one size this is ordinary least squares). Like
    ``experiment_checks.fixed_horizon``, it is for a single look, and gives no interval below 10 deliberations.

    Args:
        agreement: [ratings], 1 to 7; leave out members who did not rate both arms.
        in_a: [ratings], whether the statement is arm A's.
        deliberation: [ratings], anything that names it.

    Raises:
        InputError: statsmodels is not installed; the arrays do not fit; an arm without ratings, or a rating not 1 to 7.
    """
    agreement, in_a = np.asarray(agreement, dtype=np.float64), np.asarray(in_a, dtype=bool)
    names, cluster = np.unique(np.asarray(deliberation), return_inverse=True)
    if agreement.ndim != 1 or not agreement.shape == in_a.shape == cluster.shape:
        raise InputError("agreement", agreement.shape, "must be as long as in_a and deliberation")
    if not np.all((agreement >= 1) & (agreement <= 7)):
        raise InputError("agreement", float(agreement.min()), "must be ratings from 1 to 7; leave missing ones out")
    if in_a.all() or not in_a.any():
        raise InputError("in_a", int(in_a.sum()), "must name ratings of both arms")
    _, cell, count = np.unique(2 * cluster + in_a, return_inverse=True, return_counts=True)
    model = _statsmodels().WLS(agreement, np.column_stack([np.ones(len(agreement)), in_a]), weights=1 / count[cell])
    found = model.fit(cov_type="cluster", cov_kwds={"groups": cluster}, use_t=True)
    low, high = found.conf_int()[1] if len(names) >= DESCRIPTIVE_BELOW else (math.nan, math.nan)
    return Estimate(float(found.params[1]), float(low), float(high), len(names))


def _statsmodels() -> Any:
    try:
        from statsmodels import api
    except ImportError as error:
        mend = "is not installed; install the extra: pip install 'consensus-machine[stats]'"
        raise InputError("package", "statsmodels", mend) from error
    return api
