"""The samples of one run: their significance over the epochs, and how often each was selected."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from lightning_ast.report.derive import epoch_costs
from lightning_ast.report.series import Histogram, Run, rebin
from lightning_ast.report.style import COLOURS, Panel, drawing, new_figure

__all__ = ["has_samples", "percentiles", "samples"]

_PERCENTILES = {
    "ast/significance_p90": ("90th percentile", ":", "vermilion", "^"),
    "ast/significance_p50": ("median", "-", "blue", "o"),
    "ast/significance_p10": ("10th percentile", "--", "green", "v"),
}


def has_samples(run: Run) -> bool:
    """Tell whether there is more to show than on the dashboard: its percentiles are there only without histograms."""
    both = "ast/significance" in run.histograms and any(run.series(tag) is not None for tag in _PERCENTILES)
    return both or "ast/times_selected" in run.histograms


def samples(run: Run) -> Figure:
    """Draw percentiles of the significance by epoch, and how often samples were selected."""
    with drawing():
        figure, (left, right) = new_figure(11, 3.6, columns=2)
        left.set_title("Significance by epoch")
        if not percentiles(left, run):
            left.missing("not logged: add SparseTrainingMonitor to the Trainer")
        right.set_title("How often samples were selected")
        times = run.histograms.get("ast/times_selected")
        if times is None or times.counts.sum() == 0:
            right.missing("not logged: add SparseTrainingMonitor and a TensorBoardLogger to the Trainer")
        else:
            _times_selected(right, times)
    return figure


def percentiles(axes: Panel, run: Run) -> bool:
    """Draw the significance's percentiles by epoch; return False where none was logged."""
    known = {tag: series for tag in _PERCENTILES if (series := epoch_costs(run, tag)) is not None}
    for tag, series in known.items():
        name, style, colour, marker = _PERCENTILES[tag]
        shape = marker if len(series.epochs) <= 40 else ""
        axes.curve(*series, linestyle=style, marker=shape, color=COLOURS[colour], label=name)
    if not known:
        return False
    axes.set_ylabel("significance")
    axes.epoch_axis(np.unique(np.concatenate([series.epochs for series in known.values()])))
    axes.corner_legend()
    return True


def _times_selected(axes: Panel, times: Histogram) -> None:
    # one bin a number of times, as long as about 40 bins can be told apart
    most = max(0, int(np.ceil(times.edges[-1])))
    width = -(-(most + 1) // 40)
    # around whole numbers, so that no count lies on an edge
    edges = np.arange(-0.5, most + 0.5 + width, width)
    shares = rebin(times, edges) / times.counts.sum()
    axes.stairs(shares, edges, fill=True, facecolor=COLOURS["sky"], edgecolor=COLOURS["blue"], linewidth=0.8)
    axes.count_axis(f"times selected, up to step {times.step:,}")
    axes.set_ylabel("share of all samples")
    axes.percent_axis()
