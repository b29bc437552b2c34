"""Gold welfare at equal KL, read off a run's curve."""

from __future__ import annotations

import numpy as np

from benchmarks.overoptimization import at_equal_kl


def test_gold_is_interpolated_in_the_root_of_kl_and_never_beyond_the_run():
    curve = [{"kl": kl, "gold": gold, "predicted": 0.0} for kl, gold in ((-0.01, 3.0), (4.0, 5.0), (1.0, 4.5))]
    np.testing.assert_allclose(at_equal_kl(curve, (0.25, 1.0, 4.0)), [3.75, 4.5, 5.0])
    assert np.isnan(at_equal_kl(curve, (4.1,))).all()
