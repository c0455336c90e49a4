"""The dashboard of one run, which has the six panels of the original project."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from lightning_ast.report.derive import accuracy, epoch_values, stage_of_epochs, stage_spans, training_loss_tag
from lightning_ast.report.series import Floats, Histogram, Run, Series, rebin
from lightning_ast.report.style import COLOURS, GREY, Panel, drawing, label, new_figure

__all__ = ["dashboard", "smooth"]

_SAVINGS = {
    "samples": (COLOURS["orange"], "-", 3.0),
    "flops": (COLOURS["blue"], "--", 1.6),
    "seconds": (COLOURS["green"], "-.", 1.6),
    "joules": (COLOURS["purple"], ":", 2.2),
}
_PERCENTILES = {
    "ast/significance_p90": ("90th percentile", ":", "vermilion", "^"),
    "ast/significance_p50": ("median", "-", "blue", "o"),
    "ast/significance_p10": ("10th percentile", "--", "green", "v"),
}
_DENSE_OR = "not logged: a dense run, or add SparseSelectionCallback to the Trainer"


def dashboard(run: Run) -> Figure:
    """Draw the six panels of a run; name in each what is missing."""
    # of a run without adaptive sparse training the lower row, which has nothing to show, is low
    sparse = any(tag.startswith("ast/") for tag in (*run.scalars, *run.histograms))
    with drawing(title_pad=16 if run.series("ast/stage") else 6):
        figure, panels = new_figure(11, 6.4 if sparse else 4.6, 2, 3, height_ratios=(1, 1 if sparse else 0.25))
        draw = (_accuracy, _loss, _activation, _savings, _threshold, _significance)
        for axes, panel in zip(panels, draw, strict=True):
            panel(axes, run)
    return figure


def _accuracy(axes: Panel, run: Run) -> None:
    found = accuracy(run)
    if found is None:
        axes.set_title("Accuracy")
        axes.missing('not logged: self.log("val_acc", ...) in validation_step')
        return
    tag, (epochs, values) = found
    axes.set_title(f"Accuracy: {label(tag, width=16)}, last {values[-1]:.1%}")
    stages = stage_of_epochs(run)
    axes.epoch_axis(np.append(epochs, max(epochs[-1], *stages, 0)))
    axes.percent_axis()
    axes.curve(epochs, values, color=COLOURS["blue"], marker="o" if len(epochs) <= 40 else "")
    axes.stage_bands(stage_spans(run, axis="epochs"))


def _steps(axes: Panel, run: Run, series: Series) -> None:
    axes.count_axis("training step")
    first = float(series.steps[0])
    last = float(series.steps[-1])
    if first < last:
        axes.set_xlim(first, last)
    axes.stage_bands([span for span in stage_spans(run, axis="steps") if span.start < last])


def smooth(values: Floats, *, span: int | None = None) -> Floats:
    """Take the exponential moving average ``(n,)`` over ``span`` points, a twentieth by default; pass over NaN."""
    decay = 1 - 2 / ((span or max(2, len(values) // 20)) + 1)
    mean = 0.0
    weight = 0.0
    out = np.full(len(values), np.nan)
    for i, value in enumerate(values.tolist()):
        if np.isfinite(value):
            mean = decay * mean + (1 - decay) * value
            weight = decay * weight + 1 - decay
        if weight:
            out[i] = mean / weight  # by the weight so far: without the pull to 0 that a mean begun at 0 has
    return out


def _loss(axes: Panel, run: Run) -> None:
    tag = training_loss_tag(run.scalars)
    series = run.series(tag)
    if tag is None or series is None:
        axes.set_title("Training loss")
        axes.missing('not logged: self.log("train_loss", loss) in training_step')
        return
    axes.set_title(f"Training loss: {label(tag, width=20)}")
    axes.set_ylabel("loss")
    faint: dict[str, Any] = {"color": COLOURS["grey"], "alpha": 0.7, "linewidth": 0.7, "marker": ""}
    axes.curve(series.steps, series.values, **faint, label="as logged")
    axes.curve(series.steps, smooth(series.values), color=COLOURS["blue"], label="smoothed")
    _steps(axes, run, series)
    axes.corner_legend()


def _activation(axes: Panel, run: Run) -> None:
    axes.set_title("Activation rate")
    rate = run.series("ast/activation_rate")
    if rate is None:
        axes.missing(_DENSE_OR)
        return
    axes.percent_axis()
    axes.curve(rate.steps, rate.values, color=COLOURS["grey"], alpha=0.7, linewidth=0.8, label="of the step")
    coverage = run.series("ast/coverage")
    holds_coverage = run.series("ast/target_coverage") is not None
    if holds_coverage and coverage is not None:
        axes.curve(coverage.steps, coverage.values, color=COLOURS["green"], linewidth=0.8, marker="", label="coverage")
    target = "target coverage" if holds_coverage else "target"
    drawn = {
        "ast/activation_rate_ema": ("moving average", "-", "blue"),
        "ast/target_coverage" if holds_coverage else "ast/target_activation_rate": (target, "--", "vermilion"),
    }
    for tag, (name, style, colour) in drawn.items():
        if (series := run.series(tag)) is not None:
            axes.curve(series.steps, series.values, linestyle=style, color=COLOURS[colour], marker="", label=name)
    axes.set_ylim(0, 1.05)
    _steps(axes, run, rate)
    axes.corner_legend()
    if lacking := [f"{name} ({tag})" for tag, (name, *_) in drawn.items() if run.series(tag) is None]:
        axes.note(f"not logged: {', '.join(lacking)}; SparseSelectionCallback logs it")


def _savings(axes: Panel, run: Run) -> None:
    axes.set_title("Savings so far, and samples skipped")
    found = {name: series for name in _SAVINGS if (series := run.series(f"ast/savings_{name}")) is not None}
    if not found:
        axes.missing(_DENSE_OR)
        return
    axes.percent_axis()
    for name, series in found.items():
        colour, style, width = _SAVINGS[name]
        shown = {"flops": "FLOPs", "samples": "skipped"}.get(name, name)
        text = f"{shown} " + ("not known at the end" if series.closing is None else f"{series.closing:.0%}")
        axes.curve(series.steps, series.values, linestyle=style, color=colour, linewidth=width, label=text)
    axes.axhline(0, color=GREY, linewidth=0.8)
    _steps(axes, run, max(found.values(), key=len))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.35 * (high - low))  # room for the legend above the curves
    axes.corner_legend(loc="upper left", ncols=2, handlelength=2.1, columnspacing=0.7, borderpad=0.2, handletextpad=0.5)
    how = {
        "flops": "FLOPs (not counted in compiled modules)",
        "seconds": "seconds (need a warmup: TwoStageScheduler)",
        "joules": "joules (no counter)" if "energy/epoch_seconds" in run.scalars else "joules (add EnergyMonitor)",
    }
    if lacking := [text for name, text in how.items() if name not in found]:
        axes.note(f"not logged: {', '.join(lacking)}")


def _threshold(axes: Panel, run: Run) -> None:
    axes.set_title("Threshold")
    series = run.series("ast/threshold")
    if series is None:
        axes.missing(_DENSE_OR)
        return
    finite = series.values[np.isfinite(series.values)]
    axes.curve(series.steps, series.values, color=COLOURS["blue"])
    axes.set_ylabel("significance")
    # a threshold of 0, which keeps all samples, has no logarithm
    if finite.min() > 0 and finite.max() > 10 * finite.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    whole = run.series("ast/stage")  # dense steps have no threshold, but the axis is that of the other panels
    _steps(axes, run, series if whole is None else whole)


def _significance(axes: Panel, run: Run) -> None:
    everything = run.histograms.get("ast/significance")
    selected = run.histograms.get("ast/significance_selected")
    if everything is not None and everything.counts.sum() > 0:
        _histograms(axes, everything, selected)
        return
    axes.set_title("Significance of the samples")
    known = {tag: series for tag in _PERCENTILES if (series := epoch_values(run, tag)) is not None}
    if not known:
        axes.missing("not logged: add SparseTrainingMonitor and a TensorBoardLogger to the Trainer")
        return
    for tag, series in known.items():
        name, style, colour, marker = _PERCENTILES[tag]
        shape = marker if len(series.epochs) <= 40 else ""
        axes.curve(*series, linestyle=style, marker=shape, color=COLOURS[colour], label=name)
    axes.set_ylabel("significance")
    axes.epoch_axis(np.unique(np.concatenate([series.epochs for series in known.values()])))
    axes.corner_legend()
    axes.note("the distributions themselves: add a TensorBoardLogger")


def _histograms(axes: Panel, everything: Histogram, selected: Histogram | None) -> None:
    total = float(everything.counts.sum())
    low = float(everything.edges[0])
    high = float(everything.edges[-1])
    edges = np.linspace(low, high if high > low else low + 1, 31)
    axes.set_title("Significance of the samples")
    axes.stairs(rebin(everything, edges) / total, edges, color=COLOURS["black"], linewidth=1.2, label="all samples")
    if selected is not None:
        share = float(selected.counts.sum()) / total
        axes.stairs(
            rebin(selected, edges) / total, edges, fill=True, facecolor=COLOURS["sky"], edgecolor=COLOURS["blue"],
            hatch="////", linewidth=0.8, label=f"selected, {share:.0%}",
        )  # fmt: skip
    axes.set_xlabel(f"significance, at step {everything.step:,}")
    axes.set_ylabel("share of all samples")
    axes.percent_axis()
    axes.set_ylim(bottom=0)
    axes.corner_legend()
    if selected is None:
        axes.note("not logged: ast/significance_selected")
