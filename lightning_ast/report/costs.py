"""What the epochs of one run cost: seconds by what they went into, and joules."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_ast.report.derive import EpochSeries, epoch_costs
from lightning_ast.report.series import Floats, Ints, Run
from lightning_ast.report.style import (
    COLOURS,
    Unit,
    drawing,
    epoch_axis,
    joule_unit,
    missing,
    new_figure,
    note,
    second_unit,
)

__all__ = ["costs", "has_costs"]


class _Part(NamedTuple):
    tag: str
    name: str
    colour: str
    hatch: str


_SECONDS = (
    _Part("energy/loading_seconds", "loading", "orange", "...."),
    _Part("energy/scoring_seconds", "scoring", "purple", "xxxx"),
    _Part("energy/forward_backward_seconds", "forward + backward", "sky", ""),
    _Part("energy/validation_seconds", "validation", "green", "////"),
    _Part("energy/other_seconds", "other", "grey", ""),
)
_WHOLE_SECONDS = _Part("energy/epoch_seconds", "epoch", "sky", "")
_JOULES = (
    _Part("energy/gpu_joules", "GPUs", "green", ""),
    _Part("energy/cpu_joules", "CPUs", "orange", "////"),
)
_WHOLE_JOULES = _Part("energy/epoch_joules", "together", "green", "")


def has_costs(run: Run) -> bool:
    """Whether ``EnergyMonitor`` logged anything of the run."""
    return any(run.series(part.tag) is not None for part in (*_SECONDS, _WHOLE_SECONDS, *_JOULES, _WHOLE_JOULES))


def costs(run: Run) -> Figure:
    """Seconds and joules of each epoch, stacked.

    Args:
        run: with ``energy/`` series; what is missing of them is said in the panel.

    Returns:
        The figure: 11 x 4 inches, two axes.
    """
    with drawing():
        figure = new_figure(11, 4)
        left, right = figure.subplots(1, 2)
        left.set_title("Seconds of an epoch")
        found = _found(run, _SECONDS, _WHOLE_SECONDS)
        if found:
            _stack(left, found, second_unit(max(float(series.values.max()) for _, series in found)))
        else:
            missing(left, "not logged: add EnergyMonitor to the Trainer")
        right.set_title("Joules of an epoch")
        found = _found(run, _JOULES, _WHOLE_JOULES)
        if found:
            _stack(right, found, joule_unit(max(float(series.values.max()) for _, series in found)))
            if lacking := [part.name for part in _JOULES if run.series(part.tag) is None]:
                note(right, f"not measured: {', '.join(lacking)}")
        else:
            missing(right, "not measured: EnergyMonitor found no counter of a GPU (NVML) or a CPU (RAPL)")
    return figure


def _found(run: Run, parts: tuple[_Part, ...], whole: _Part) -> list[tuple[_Part, EpochSeries]]:
    found = [(part, series) for part in parts if (series := epoch_costs(run, part.tag)) is not None]
    if not found and (series := epoch_costs(run, whole.tag)) is not None:
        return [(whole, series)]
    return found


def _stack(axes: Axes, found: list[tuple[_Part, EpochSeries]], unit: Unit) -> None:
    first = min(int(series.epochs[0]) for _, series in found)
    last = max(int(series.epochs[-1]) for _, series in found)
    epochs = np.arange(first, last + 1, dtype=np.int64)
    bottom: Floats = np.zeros(len(epochs))
    gap = "white" if len(epochs) <= 60 else "none"
    for part, series in found:
        height: Floats = np.zeros(len(epochs))
        height[series.epochs - first] = series.values / unit.size
        _blocks(axes, epochs, bottom, bottom + height, part, gap)
        bottom = bottom + height
    axes.set_ylabel(unit.name)
    epoch_axis(axes, epochs)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1, 1), handlelength=1.6, borderpad=0.2
    )  # in the order in which they are stacked


def _blocks(axes: Axes, epochs: Ints, bottom: Floats, top: Floats, part: _Part, gap: str) -> None:
    """One step patch a part, not one bar an epoch: a long run has thousands."""
    edges = np.append(epochs - 0.5, epochs[-1] + 0.5)
    axes.stairs(
        top, edges, baseline=bottom, fill=True, facecolor=COLOURS[part.colour], hatch=part.hatch or None,
        edgecolor="white" if gap == "white" else "none", linewidth=0.6, label=part.name,
    )  # fmt: skip
    if gap == "white":
        axes.vlines(edges[1:-1], bottom[1:], top[1:], color="white", linewidth=2)
