"""Several runs in one figure: accuracy by epochs, seconds and joules, and the training loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_ast.report.derive import EpochSeries, accuracy, elapsed_joules, elapsed_seconds, loss_tag, mean_by_epoch
from lightning_ast.report.series import Floats, Run
from lightning_ast.report.style import (
    COLOURS,
    Unit,
    curve,
    drawing,
    epoch_axis,
    joule_unit,
    label,
    missing,
    new_figure,
    note,
    percent_axis,
    second_unit,
)

__all__ = ["at_epochs", "comparison"]

_COLOURS = ("black", "blue", "vermilion", "green", "orange", "purple", "sky")
_DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vP*X<>"


def comparison(runs: Sequence[Run]) -> Figure:
    """The runs side by side.

    Args:
        runs: at least two; those that lack what a panel shows are named below it.

    Returns:
        The figure: 11 inches wide, four axes, by rows, and the legend below them.
    """
    with drawing():
        rows = -(-len(runs) // 3)
        figure = new_figure(11, 5.9 + 0.22 * rows)
        axes = figure.subplots(2, 2)
        _by_epoch(axes[0, 0], runs, "Accuracy by epoch", _accuracies(runs), "accuracy")
        percent_axis(axes[0, 0])
        _over_cost(axes[0, 1], runs, "Accuracy by training seconds", _seconds, second_unit)
        _over_cost(axes[1, 0], runs, "Accuracy by joules", elapsed_joules, joule_unit)
        losses = [mean_by_epoch(run, loss_tag(run.scalars)) for run in runs]
        _by_epoch(axes[1, 1], runs, "Training loss by epoch (means)", losses, "loss")
        if any(not measured for found in map(elapsed_seconds, runs) if found for measured in found[1:]):
            note(axes[0, 1], "where EnergyMonitor is missing, from wall times of the event file")
        handles = [axes[0, 0].plot([], [], **_look(i))[0] for i in range(len(runs))]
        figure.legend(handles, [label(run.name, width=34) for run in runs], loc="outside lower center", ncols=3,
                      handlelength=3.5, frameon=False)  # fmt: skip
    return figure


def at_epochs(cost: EpochSeries, values: EpochSeries) -> tuple[Floats, Floats]:
    """Costs and values ``(n,)`` of the epochs that have both.

    Example:
        >>> cost = EpochSeries(np.array([0, 1]), np.array([5.0, 10.0]))
        >>> [a.tolist() for a in at_epochs(cost, EpochSeries(np.array([1, 2]), np.array([0.7, 0.8])))]
        [[10.0], [0.7]]
    """
    _, left, right = np.intersect1d(cost.epochs, values.epochs, return_indices=True)
    return cost.values[left], values.values[right]


def _look(i: int) -> dict[str, object]:
    return {
        "color": COLOURS[_COLOURS[i % len(_COLOURS)]],
        "linestyle": _DASHES[i % len(_DASHES)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "markersize": 4.5,
    }


def _accuracies(runs: Sequence[Run]) -> list[EpochSeries | None]:
    return [None if (found := accuracy(run)) is None else found[1] for run in runs]


def _seconds(run: Run) -> EpochSeries | None:
    found = elapsed_seconds(run)
    return None if found is None else found[0]


def _draw(axes: Axes, i: int, x: Floats, y: Floats) -> None:
    curve(axes, x, y, **_look(i), markevery=max(1, -(-len(y) // 25)))


def _by_epoch(axes: Axes, runs: Sequence[Run], title: str, found: Sequence[EpochSeries | None], what: str) -> None:
    axes.set_title(title)
    known = [series for series in found if series is not None]
    if not known:
        missing(axes, f"no run logged a tag with '{what}' in its name")
        return
    for i, series in enumerate(found):
        if series is not None:
            _draw(axes, i, series.epochs.astype(np.float64), series.values)
    axes.set_ylabel(what)
    epoch_axis(axes, np.unique(np.concatenate([series.epochs for series in known])))
    _name_missing(axes, [run.name for run, series in zip(runs, found, strict=True) if series is None])


def _over_cost(
    axes: Axes,
    runs: Sequence[Run],
    title: str,
    cost: Callable[[Run], EpochSeries | None],
    unit_of: Callable[[float], Unit],
) -> None:
    axes.set_title(title)
    curves: dict[int, tuple[Floats, Floats]] = {}
    for i, (run, values) in enumerate(zip(runs, _accuracies(runs), strict=True)):
        spent = cost(run)
        if spent is not None and values is not None:
            curves[i] = at_epochs(spent, values)
    if not any(len(x) for x, _ in curves.values()):
        measured = any("energy/epoch_seconds" in run.scalars for run in runs)
        remedy = "EnergyMonitor found no counter" if measured else "add EnergyMonitor to the Trainer"
        missing(
            axes, f"not known: {remedy}{'' if any(v is not None for v in _accuracies(runs)) else '; log an accuracy'}"
        )
        return
    unit = unit_of(max(float(x.max()) for x, _ in curves.values() if len(x)))
    for i, (x, y) in curves.items():
        _draw(axes, i, x / unit.size, y)
    axes.set_ylabel("accuracy")
    percent_axis(axes)
    axes.set_xlabel(unit.name)
    axes.set_xlim(left=0)
    _name_missing(axes, [run.name for i, run in enumerate(runs) if i not in curves])


def _name_missing(axes: Axes, names: list[str]) -> None:
    if names:
        shown = ", ".join(label(name, width=20) for name in names[:3])
        note(axes, f"not known of {shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
