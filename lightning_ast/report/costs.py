"""The figure of what the epochs of one run cost."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from lightning_ast.report.derive import EpochSeries, epoch_values
from lightning_ast.report.series import Floats, Run
from lightning_ast.report.style import COLOURS, Panel, drawing, new_figure, unit_of

__all__ = ["costs"]


class _Part(NamedTuple):
    tag: str
    name: str
    colour: str
    hatch: str


_PARTS = {
    "seconds": (
        _Part("energy/loading_seconds", "loading", "orange", "...."),
        _Part("energy/scoring_seconds", "scoring", "purple", "xxxx"),
        _Part("energy/forward_backward_seconds", "forward + backward", "sky", ""),
        _Part("energy/validation_seconds", "validation", "green", "////"),
        _Part("energy/other_seconds", "other", "grey", ""),
    ),
    "joules": (_Part("energy/gpu_joules", "GPUs", "green", ""), _Part("energy/cpu_joules", "CPUs", "orange", "////")),
}


def costs(run: Run) -> Figure | None:
    """Draw the seconds and joules of each epoch, stacked; None where neither was logged.

    What was not measured gets no axes, but a line of text.
    """
    found = _found(run)
    if not found:
        return None
    with drawing():
        figure, panels = new_figure(11, 4, columns=len(found))
        for axes, (name, parts) in zip(panels, found.items(), strict=True):
            axes.set_title(f"{name.capitalize()} of an epoch")
            _stack(axes, parts, name)
            lacking = [part.name for part in _PARTS["joules"] if run.series(part.tag) is None]
            if "joules" not in found:
                axes.note("joules not measured: EnergyMonitor found no counter of a GPU (NVML) or a CPU (RAPL)")
            elif name == "joules" and lacking:
                axes.note(f"not measured: {', '.join(lacking)}")
    return figure


def _found(run: Run) -> dict[str, list[tuple[_Part, EpochSeries]]]:
    """Find the parts that were logged."""
    found = {}
    for name, parts in _PARTS.items():
        logged = [(part, series) for part in parts if (series := epoch_values(run, part.tag)) is not None]
        if any(np.any(series.values > 0) for _, series in logged):  # a chart of zeros would be empty
            found[name] = logged
    return found


def _stack(axes: Panel, found: list[tuple[_Part, EpochSeries]], base_unit: str) -> None:
    unit, size = unit_of(base_unit, max(float(series.values.max()) for _, series in found))
    # parts need not have the same epochs: a run that was resumed without a counter has joules of some alone
    epochs = np.unique(np.concatenate([series.epochs for _, series in found]))
    edges = np.unique(np.concatenate([epochs - 0.5, epochs + 0.5]))  # what is between two of them may be a gap
    few = len(edges) <= 61
    bottom: Floats = np.zeros(len(edges) - 1)
    for part, series in found:
        height: Floats = np.zeros(len(edges) - 1)
        height[np.searchsorted(edges, series.epochs) - 1] = series.values / size
        top = bottom + height
        # one step patch a part, not one bar an epoch: a long run has thousands
        axes.stairs(
            top, edges, baseline=bottom, fill=True, facecolor=COLOURS[part.colour], hatch=part.hatch or None,
            edgecolor="white" if few else "none", linewidth=0.6, label=part.name,
        )  # fmt: skip
        if few:
            axes.vlines(edges[1:-1], bottom[1:], top[1:], color="white", linewidth=2)
        bottom = top
    axes.set_ylabel(unit)
    axes.epoch_axis(epochs)
    handles, labels = axes.get_legend_handles_labels()
    above = {"handles": handles[::-1], "labels": labels[::-1]}  # in the order in which they are stacked
    axes.legend(**above, loc="upper left", bbox_to_anchor=(1, 1), handlelength=1.6, borderpad=0.2)
