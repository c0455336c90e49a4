"""The mean of each epoch: as it was logged, or else of the steps that were."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_ast.report.derive import EpochSeries, epochs_at, last_of_each
from lightning_ast.report.series import Ints, Run
from lightning_ast.words import counted

__all__ = ["EpochMeans", "behind_each", "epoch_means"]


class EpochMeans(NamedTuple):
    """A value an epoch, and what it is the mean of."""

    means: EpochSeries
    logged: Ints | None  # (n,), how many logged values stand behind each; None where each is a whole epoch's mean
    at_ends: bool  # whether each epoch has one value, at its last step: that step's, or the mean of the epoch


def epoch_means(run: Run, tag: str | None) -> EpochMeans | None:
    """Return the mean of each epoch, as logged or else of its logged steps; None where no value is finite."""
    if tag is None:
        return None
    # Lightning logs the mean of an epoch (`on_epoch=True`) at its last step: beside the steps under their name with
    # `_epoch`, without them under the tag's own name.
    for candidate in (f"{tag.removesuffix('_step')}_epoch", tag):
        series = run.series(candidate)
        if series is None:
            continue
        finite = np.isfinite(series.values)
        epochs, position = np.unique(epochs_at(run, series.steps)[finite], return_inverse=True)
        logged = np.bincount(position)
        means = EpochSeries(epochs, np.bincount(position, series.values[finite]) / logged)
        at_ends = bool((logged == 1).all()) and not _between_ends(run, series.steps[finite]).any()
        if at_ends and (candidate.endswith("_epoch") or _steps_are_logged(run)):
            return EpochMeans(means, None, at_ends)
        if candidate == tag:
            return EpochMeans(means, logged, at_ends)
    return None


def _between_ends(run: Run, steps: Ints) -> NDArray[np.bool_]:
    """Find the steps that are not the last one of their epoch."""
    epoch = run.series("epoch")
    if epoch is None:
        return np.ones(len(steps), dtype=np.bool_)
    ends = last_of_each(epoch.values.astype(np.int64), epoch.steps.astype(np.float64)).values
    between: NDArray[np.bool_] = ~np.isin(steps, ends) & (steps < ends.max())
    return between


def _steps_are_logged(run: Run) -> bool:
    """Tell whether steps inside epochs were logged: a tag of steps then has values there, one of epochs has none."""
    # Without such a step an epoch may be as long as the interval of logging. Only tags count that Lightning logs with
    # the steps: a validation inside an epoch, or a user's own call of the logger, is no sign of one.
    of_steps = [series for tag, series in run.scalars.items() if tag == "ast/stage" or tag.endswith("_step")]
    return any(_between_ends(run, series.steps).any() for series in of_steps)


def behind_each(found: EpochMeans) -> str | None:
    """Describe what each value is the mean of, where that is not a whole epoch."""
    if found.logged is None:
        return None
    if found.at_ends:
        return "one value an epoch, at its last step"
    least = int(found.logged.min())
    most = int(found.logged.max())
    if least < most:
        return f"mean of {least} to {most:,} logged steps an epoch"
    return f"mean of {counted(most, 'logged step')} an epoch"
