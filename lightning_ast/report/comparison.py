"""Several runs in one figure: accuracy by epochs, seconds and joules, and the training loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_ast.report.derive import (
    EpochSeries,
    accuracy,
    behind_each,
    elapsed_joules,
    elapsed_seconds,
    epoch_means,
    training_loss_tag,
)
from lightning_ast.report.series import Floats, Run
from lightning_ast.report.style import COLOURS, Panel, drawing, label, new_figure, unit_of

__all__ = ["comparison"]

_HOW = {
    "accuracy": "an accuracy: a tag with the word acc or accuracy",
    "loss": "a training loss: a tag with loss in its name, that of a validation apart",
}
_MOST_REMARKS = 3
_COLOURS = ("black", "blue", "vermilion", "green", "orange", "purple", "sky")
_DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vP*X<>"


def comparison(runs: Sequence[Run]) -> Figure:
    """Draw at least two runs side by side, with a panel of joules where one has them; name below what a run lacks."""
    measured = any(spent is not None and spent.values.max() > 0 for spent in map(elapsed_joules, runs))
    with drawing():
        legend_inches = 0.22 * -(-len(runs) // 3)
        grid = (2, 2) if measured else (1, 3)
        figure, panels = new_figure(11, (5.9 if measured else 3.6) + legend_inches, *grid)
        draw = (_by_epochs, _by_seconds, *((_by_joules,) if measured else ()), _losses)
        for axes, panel in zip(panels, draw, strict=True):
            if remarks := panel(axes, runs):
                axes.note("; ".join(remarks))
        handles = [panels[0].plot([], [], **_look(i))[0] for i in range(len(runs))]
        figure.legend(handles, [label(run.name, width=34) for run in runs], loc="outside lower center", ncols=3,
                      handlelength=3.5, frameon=False)  # fmt: skip
    return figure


def _at_epochs(cost: EpochSeries, values: EpochSeries) -> tuple[Floats, Floats]:
    """Return costs and values ``(n,)`` of the epochs that have both."""
    _, left, right = np.intersect1d(cost.epochs, values.epochs, return_indices=True)
    return cost.values[left], values.values[right]


def _look(i: int) -> dict[str, Any]:
    return {
        "color": COLOURS[_COLOURS[i % len(_COLOURS)]],
        "linestyle": _DASHES[i % len(_DASHES)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "markersize": 4.5,
    }


def _accuracies(runs: Sequence[Run]) -> list[EpochSeries | None]:
    return [None if (found := accuracy(run)) is None else found[1] for run in runs]


def _draw(axes: Panel, runs: Sequence[Run], found: Sequence[tuple[Floats, Floats] | None]) -> list[str]:
    """Draw the curve of each run that has one; return the remarks for below the panel, as all that follow do."""
    for i, points in enumerate(found):
        if points is not None:
            # markers tell runs apart in print and for the colour-blind: about 25 a curve, or they would cover it
            axes.curve(*points, **_look(i), markevery=max(1, -(-len(points[1]) // 25)))
    lacking = [run.name for run, points in zip(runs, found, strict=True) if points is None]
    return [f"not known of {_listed(lacking)}"] if lacking else []


def _by_epoch(axes: Panel, runs: Sequence[Run], found: Sequence[EpochSeries | None], what: str) -> list[str]:
    known = [series for series in found if series is not None]
    if not known:
        axes.missing(f"no run logged {_HOW[what]}")
        return []
    remarks = _draw(axes, runs, [series and (series.epochs.astype(np.float64), series.values) for series in found])
    axes.set_ylabel(what)
    axes.epoch_axis(np.unique(np.concatenate([series.epochs for series in known])))
    return remarks


def _by_epochs(axes: Panel, runs: Sequence[Run]) -> list[str]:
    axes.set_title("Accuracy by epoch")
    remarks = _by_epoch(axes, runs, _accuracies(runs), "accuracy")
    axes.percent_axis()
    return remarks


def _losses(axes: Panel, runs: Sequence[Run]) -> list[str]:
    """Draw the training loss, with what stands behind each point where that is not a whole epoch."""
    found = [epoch_means(run, training_loss_tag(run.scalars)) for run in runs]
    behind = [means and behind_each(means) for means in found]
    axes.set_title("Training loss by epoch" + ("" if any(behind) else " (means)"))
    remarks = _by_epoch(axes, runs, [means and means.means for means in found], "loss")
    if len({text for text in behind if text}) > _MOST_REMARKS:
        names = [run.name for run, text in zip(runs, behind, strict=True) if text]
        remarks.append(f"not of whole epochs, but of the steps that were logged: {_listed(names)}")
    else:
        for text in dict.fromkeys(filter(None, behind)):
            names = [run.name for run, own in zip(runs, behind, strict=True) if own == text]
            remarks.append(f"{text}: {_listed(names)}")
    return remarks


def _by_seconds(axes: Panel, runs: Sequence[Run]) -> list[str]:
    found = [elapsed_seconds(run) for run in runs]
    seconds = [None if each is None else each[0] for each in found]
    remarks = _over_cost(axes, runs, "Accuracy by training seconds", seconds, "seconds")
    # wall times hold start-up and what went on between epochs: a reader must not take them for training alone
    if any(not each[1] for each in found if each is not None):
        remarks.append("where EnergyMonitor is missing, from wall times of the event file")
    return remarks


def _by_joules(axes: Panel, runs: Sequence[Run]) -> list[str]:
    return _over_cost(axes, runs, "Accuracy by joules", [elapsed_joules(run) for run in runs], "joules")


def _over_cost(
    axes: Panel, runs: Sequence[Run], title: str, costs: Sequence[EpochSeries | None], base_unit: str
) -> list[str]:
    axes.set_title(title)
    accuracies = _accuracies(runs)
    points = [
        None if spent is None or values is None else _at_epochs(spent, values)
        for spent, values in zip(costs, accuracies, strict=True)
    ]
    most = max((float(each[0].max()) for each in points if each is not None and len(each[0])), default=None)
    if most is None:
        known = any(values is not None for values in accuracies)
        axes.missing(f"not known: add EnergyMonitor to the Trainer{'' if known else '; log an accuracy'}")
        return []
    unit, size = unit_of(base_unit, most)
    remarks = _draw(axes, runs, [each and (each[0] / size, each[1]) for each in points])
    axes.set_ylabel("accuracy")
    axes.percent_axis()
    axes.set_xlabel(unit)
    axes.set_xlim(left=0)
    return remarks


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(label(name, width=20) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
