"""Several runs in one figure: accuracy by epochs, seconds and joules, and the training loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_ast.report.derive import EpochSeries, accuracy, epoch_means, epoch_values, training_loss_tag
from lightning_ast.report.series import Floats, Ints, Run
from lightning_ast.report.style import COLOURS, Panel, drawing, label, new_figure, unit_of

__all__ = ["comparison"]

_COLOURS = ("black", "blue", "vermilion", "green", "orange", "purple", "sky")
_DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vP*X<>"


def comparison(runs: Sequence[Run]) -> Figure:
    """Draw at least two runs side by side, with a panel of joules where one has them; name below what a run lacks."""
    accuracies = [None if (found := accuracy(run)) is None else found[1] for run in runs]
    joules = [epoch_values(run, "energy/total_joules") for run in runs]
    measured = any(spent is not None and spent.values.max() > 0 for spent in joules)
    with drawing():
        legend_inches = 0.22 * -(-len(runs) // 3)
        grid = (2, 2) if measured else (1, 3)
        figure, panels = new_figure(11, (5.9 if measured else 3.6) + legend_inches, *grid)
        _accuracy(panels[0], runs, accuracies)
        panels[1].set_title("Accuracy by training seconds")
        _by_cost(panels[1], runs, "seconds", [epoch_values(run, "energy/total_seconds") for run in runs], accuracies)
        if measured:
            panels[2].set_title("Accuracy by joules")
            _by_cost(panels[2], runs, "joules", joules, accuracies)
        _loss(panels[-1], runs)
        handles = [panels[0].plot([], [], **_look(i))[0] for i in range(len(runs))]
        figure.legend(handles, [label(run.name, width=34) for run in runs], loc="outside lower center", ncols=3,
                      handlelength=3.5, frameon=False)  # fmt: skip
    return figure


def _look(i: int) -> dict[str, Any]:
    return {
        "color": COLOURS[_COLOURS[i % len(_COLOURS)]],
        "linestyle": _DASHES[i % len(_DASHES)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "markersize": 4.5,
    }


def _accuracy(axes: Panel, runs: Sequence[Run], accuracies: Sequence[EpochSeries | None]) -> None:
    axes.set_title("Accuracy by epoch")
    axes.percent_axis()
    if not any(accuracies):
        axes.missing("no run logged an accuracy: a tag with the word acc or accuracy")
        return
    axes.set_ylabel("accuracy")
    _by_epoch(axes, runs, accuracies)


def _loss(axes: Panel, runs: Sequence[Run]) -> None:
    found = [epoch_means(run, training_loss_tag(run.scalars)) for run in runs]
    of_logged = [run.name for run, means in zip(runs, found, strict=True) if means is not None and not means[1]]
    axes.set_title("Training loss by epoch" + ("" if of_logged else " (means)"))
    if not any(found):
        axes.missing("no run logged a training loss: a tag with loss in its name, that of a validation apart")
        return
    axes.set_ylabel("loss")
    remark = f"mean of what was logged in an epoch: {_listed(of_logged)}" if of_logged else ""
    _by_epoch(axes, runs, [None if means is None else means[0] for means in found], remark)


def _by_epoch(axes: Panel, runs: Sequence[Run], found: Sequence[EpochSeries | None], remark: str = "") -> None:
    axes.epoch_axis(np.unique(np.concatenate([series.epochs for series in found if series is not None])))
    _draw(axes, runs, found, remark)


def _by_cost(
    axes: Panel,
    runs: Sequence[Run],
    base_unit: str,
    costs: Sequence[EpochSeries | None],
    accuracies: Sequence[EpochSeries | None],
) -> None:
    points = [
        None if spent is None or values is None else _at_epochs(spent, values)
        for spent, values in zip(costs, accuracies, strict=True)
    ]
    most = max((float(each[0].max()) for each in points if each is not None and len(each[0])), default=None)
    if most is None:
        axes.missing(f"not known: add EnergyMonitor to the Trainer{'' if any(accuracies) else '; log an accuracy'}")
        return
    unit, size = unit_of(base_unit, most)
    axes.set_xlabel(unit)
    axes.set_ylabel("accuracy")
    axes.percent_axis()
    _draw(axes, runs, [each and (each[0] / size, each[1]) for each in points])
    axes.set_xlim(left=0)


def _at_epochs(cost: EpochSeries, values: EpochSeries) -> tuple[Floats, Floats]:
    """Return costs and values ``(n,)`` of the epochs that have both."""
    _, left, right = np.intersect1d(cost.epochs, values.epochs, return_indices=True)
    return cost.values[left], values.values[right]


def _draw(
    axes: Panel, runs: Sequence[Run], found: Sequence[tuple[Floats | Ints, Floats] | None], remark: str = ""
) -> None:
    """Draw the curve of each run that has one; name the others below the panel, before a remark."""
    for i, points in enumerate(found):
        if points is not None:
            # markers tell runs apart in print and for the colour-blind: about 25 a curve, or they would cover it
            axes.curve(*points, **_look(i), markevery=max(1, -(-len(points[1]) // 25)))
    lacking = [run.name for run, points in zip(runs, found, strict=True) if points is None]
    remarks = [f"not known of {_listed(lacking)}" if lacking else "", remark]
    if any(remarks):
        axes.note("; ".join(filter(None, remarks)))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(label(name, width=20) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
