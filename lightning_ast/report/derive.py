"""The values that figures and table show, derived from the series of a run. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from lightning_ast.report.series import Floats, Ints, Run, Series
from lightning_ast.schedule import STAGE_CODES, Stage

__all__ = [
    "EpochSeries",
    "Span",
    "accuracy",
    "accuracy_tag",
    "activation_rate_when_sparse",
    "clip_to_training",
    "epoch_means",
    "epoch_values",
    "epochs_at",
    "is_dense",
    "last_epoch",
    "stage_of_epochs",
    "stage_spans",
    "training_loss_tag",
]
_STAGES = {code: stage for stage, code in STAGE_CODES.items()}


class EpochSeries(NamedTuple):
    """A series of one value an epoch: ``epochs (n,)``, increasing, from 0; ``values (n,)``."""

    epochs: Ints
    values: Floats


class Span(NamedTuple):
    """A stage, from ``start`` to ``end`` on the axis it was asked for (steps, or epochs from 0)."""

    start: float
    end: float
    stage: Stage


def training_loss_tag(tags: Iterable[str]) -> str | None:
    """Find the training loss: a tag with ``loss`` and ``train``, not an epoch's mean; else the nearest to that.

    It is never that of a validation or a test.
    """
    others = {"val", "valid", "validation", "eval", "test"}
    losses = [tag for tag in _own(tags) if "loss" in tag.lower()]
    losses = [tag for tag in losses if "train" in tag.lower() or not _words(tag) & others]

    def distance(tag: str) -> tuple[bool, bool, str]:
        name = tag.lower()
        return "train" not in name, "_epoch" in name or "epoch/" in name, tag

    return min(losses, key=distance, default=None)


def accuracy_tag(tags: Iterable[str]) -> str | None:
    """Find the validation accuracy; else any accuracy: a tag with the word acc or accuracy; None without any."""
    accuracies = [tag for tag in _own(tags) if _words(tag) & {"acc", "accuracy"}]
    return min(accuracies, key=lambda tag: ("val" not in tag.lower(), tag), default=None)


def _words(tag: str) -> set[str]:
    """List a tag's words in lower case: letters between other characters, or from one capital to the next."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", tag)}


def _own(tags: Iterable[str]) -> list[str]:
    return [tag for tag in tags if not tag.startswith(("ast/", "energy/"))]


def clip_to_training(run: Run) -> Run:
    """Leave out what ``trainer.validate`` or ``trainer.test`` logged after the fit, as if in one more epoch."""
    # Lightning logs it one step past the last one, under the number of the epoch that would be next.
    epoch = run.scalars.get("epoch")
    if epoch is None or len(epoch) < 2 or epoch.values[-1] <= epoch.values[-2]:
        return run
    last = int(epoch.steps[-1])
    before = int(epoch.steps[-2])
    earlier = epoch.steps[epoch.values < epoch.values[-2]]
    steps_an_epoch = before - int(earlier[-1]) if earlier.size else before + 1
    # a callback writes its last stage at the number of steps done, which is this step, so that the loss decides
    training = run.scalars.get(training_loss_tag(run.scalars) or "ast/stage")
    trained = training is not None and last in training.steps
    if trained or last != before + 1 or steps_an_epoch == 1:
        return run
    scalars = {}
    for tag, series in run.scalars.items():
        # what callbacks write to the logger themselves at the end of the last epoch stands at this step too
        kept = (series.steps < last) | tag.startswith(("ast/", "energy/"))
        if kept.any():
            scalars[tag] = Series(series.steps[kept], series.values[kept])
    return replace(run, scalars=scalars)


def epochs_at(run: Run, steps: Ints) -> Ints:
    """Find the epoch ``(n,)`` of each step, from 0: the last one logged by then. Without any, a step is an epoch."""
    epoch = run.series("epoch")
    if epoch is None:
        return np.arange(len(steps), dtype=np.int64)
    at = np.searchsorted(epoch.steps, steps, side="right") - 1
    return epoch.values[np.clip(at, 0, None)].astype(np.int64)


def last_epoch(run: Run) -> int | None:
    """Return the last epoch that logged anything, from 0; None where epochs were not logged."""
    epoch = run.series("epoch")
    return None if epoch is None or epoch.last is None else int(epoch.last)


def epoch_values(run: Run, tag: str | None) -> EpochSeries | None:
    """Return the last finite value of each epoch; None where there is none."""
    series = run.series(tag)
    if series is None:
        return None
    finite = np.isfinite(series.values)
    # the epochs of a damaged log need not rise
    epochs, from_the_end = np.unique(epochs_at(run, series.steps)[finite][::-1], return_index=True)
    return EpochSeries(epochs, series.values[finite][::-1][from_the_end])


def accuracy(run: Run) -> tuple[str, EpochSeries] | None:
    """Return tag and values, in [0, 1], of the accuracy by epoch."""
    tag = accuracy_tag(tag for tag in run.scalars if run.series(tag) is not None)
    found = epoch_values(run, tag)
    if tag is None or found is None:
        return None
    # percentages were logged where a value is above 1.5; a share may be above 1 by its rounding
    return tag, EpochSeries(found.epochs, found.values / (100 if found.values.max() > 1.5 else 1))


def stage_of_epochs(run: Run) -> dict[int, Stage]:
    """Find the stage in which each epoch ended."""
    found = epoch_values(run, "ast/stage")
    if found is None:
        return {}
    codes = zip(found.epochs.tolist(), found.values.tolist(), strict=True)
    return {epoch: _STAGES[int(code)] for epoch, code in codes if code in _STAGES}


def stage_spans(run: Run, *, axis: str) -> list[Span]:
    """Find where each stage begins and ends on an axis, ``"steps"`` or ``"epochs"``, in order and without gaps."""
    if axis == "epochs":
        marks = [(epoch - 0.5, stage) for epoch, stage in sorted(stage_of_epochs(run).items())]
        end = marks[-1][0] + 1 if marks else 0.0
    elif (series := run.series("ast/stage")) is not None:
        known = np.isin(series.values, list(_STAGES))
        points = zip(series.steps[known].tolist(), series.values[known].tolist(), strict=True)
        marks = [(step, _STAGES[int(code)]) for step, code in points]
        end = float(series.steps[-1])
    else:
        return []
    starts = [next(group) for _, group in groupby(marks, key=itemgetter(1))]
    ends = [*(place for place, _ in starts[1:]), end]
    return [Span(place, stop, stage) for (place, stage), stop in zip(starts, ends, strict=False)]


def epoch_means(run: Run, tag: str | None) -> tuple[EpochSeries, bool] | None:
    """Return the mean of each epoch, and whether it was logged as that, or is of the values logged in the epoch.

    It is None where no value is finite.
    """
    if tag is None:
        return None
    # Lightning logs the mean of an epoch (`on_epoch=True`) beside the steps, under their name with `_epoch`.
    whole = run.series(f"{tag.removesuffix('_step')}_epoch")
    series = whole or run.series(tag)
    if series is None:
        return None
    finite = np.isfinite(series.values)
    epochs, position = np.unique(epochs_at(run, series.steps)[finite], return_inverse=True)
    means = np.bincount(position, series.values[finite]) / np.bincount(position)
    return EpochSeries(epochs, means), tag.endswith("_epoch") or whole is not None


def is_dense(run: Run) -> bool:
    """Tell whether every logged step trained on all samples."""
    rate = run.series("ast/activation_rate")
    return rate is None or bool(np.all(rate.values[np.isfinite(rate.values)] == 1))


def activation_rate_when_sparse(run: Run) -> float | None:
    """Average the logged activation rates of sparse steps, in [0, 1]; of all steps where no stage was logged."""
    rate = run.series("ast/activation_rate")
    stage = run.series("ast/stage")
    if rate is None:
        return None
    wanted = np.isfinite(rate.values)
    if stage is not None:
        wanted &= np.isin(rate.steps, stage.steps[stage.values == STAGE_CODES["sparse"]])
    return float(rate.values[wanted].mean()) if wanted.any() else None
