"""An experiment's confidence sequence as a picture."""

from __future__ import annotations

import io
import threading
from typing import Any

from serving.experiment_report import ExperimentReport
from serving.experiment_text import measure_title
from serving.problems import ApiError
from serving.trial_analysis import sequence_of

_DRAWING = threading.Lock()  # matplotlib's settings are the whole process's


def figure_of(report: ExperimentReport, pair: int = 0) -> Any:
    """The primary measure of one pair of arms after each look, as a matplotlib figure.

    Args:
        pair: which of ``report.contrasts``.

    Raises:
        ApiError: ``wrong-state``, if results are hidden or there are none yet; ``not-found``, if there is no such pair.
    """
    if report.hidden is not None:
        raise ApiError("wrong-state", f"results are hidden: {report.hidden}")
    if not 0 <= pair < len(report.contrasts):
        raise ApiError("not-found", f"no such pair of arms; there are {len(report.contrasts)}, counted from 0")
    contrast = report.contrasts[pair]
    if not contrast.path.mean:
        raise ApiError("wrong-state", "nothing to draw: no deliberation has been closed and rated by two members")
    from matplotlib.text import Text  # only here: matplotlib is slow to load

    from evaluation.sequence_plot import sequence_figure

    names = (contrast.a, contrast.b)
    title = measure_title(report.metric) + ("" if report.mode == "paired" else "; one of each arm counts as one")
    figure = sequence_figure(sequence_of(contrast), title, arms=names, minimum=report.minimum)
    for written in figure.findobj(Text):
        written.set_parse_math(False)  # an arm may have any name, a "$" in it too
    return figure


def picture(report: ExperimentReport, suffix: str, pair: int = 0) -> bytes:
    """``figure_of`` as ``png`` or ``svg``; raises the same."""
    import matplotlib

    from evaluation.plots import STYLE

    buffer = io.BytesIO()
    with _DRAWING:
        figure = figure_of(report, pair)
        with matplotlib.rc_context(STYLE):
            figure.savefig(buffer, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
    return buffer.getvalue()
