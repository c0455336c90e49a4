"""The prediction of steps, memory and runs from measured facts: arithmetic alone, no model and no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import get_args

from lightning_ast.advice.measured import Curve, Facts, LoadingFacts, RunFacts, StepAt, ValidationFacts
from lightning_ast.core.execution import Mode
from lightning_ast.core.gate import minimum_count
from lightning_ast.core.history import planned_count
from lightning_ast.pruning.run_plan import EpochLengths, PlannedRun

__all__ = [
    "DEFAULT_RATE",
    "RATES",
    "Lengths",
    "Prediction",
    "Predictions",
    "at_rate",
    "run_lengths",
    "validations",
    "wanted_rates",
    "with_loading",
]

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Activation rates that are predicted."""

DEFAULT_RATE = 0.4
"""The selection callback's own default, where the user has none."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one mode at one rate, or for dense training.

    Attributes:
        mode: The mode; None is dense training.
        rate: The activation rate in (0, 1].
        step_seconds: The time of a sparse step, loading and scoring included; in ``prune`` that of a whole batch.
        memory_bytes: The peak memory of a sparse step, or None; measured on CUDA, estimated elsewhere.
        run_seconds: The time of the whole run, warmup, cooldown and validation included.
        validation_seconds: The part of that time that is validation.
        run_share: The share of the dense run's seconds.
        batches: The batches of the whole run.
    """

    mode: Mode | None
    rate: float
    step_seconds: float
    memory_bytes: int | None
    run_seconds: float
    validation_seconds: float
    run_share: float
    batches: int


@dataclass(frozen=True)
class Lengths:
    """The lengths of a run in batches.

    Attributes:
        epochs: The epochs that are begun or, where ``max_steps`` ends the run within one, the fraction.
        dense_batches: The batches of warmup and cooldown, a short batch counted as one.
        sparse_batches: The batches of the sparse stage, likewise.
        sparse_epochs: The epochs of the sparse stage.
        sparse_batches_per_epoch: The batches of one of its epochs.
        dense_missing: The part of a full batch that the short ones among the dense batches lack, in batches, >= 0.
        sparse_missing: The same of the sparse stage.
        unscored_batches: The dense batches of ``prune`` that it does not score: those of every warmup epoch but the
            last.
    """

    epochs: float
    dense_batches: float
    sparse_batches: float
    sparse_epochs: float
    sparse_batches_per_epoch: int
    dense_missing: float = 0.0
    sparse_missing: float = 0.0
    unscored_batches: float = 0.0

    @property
    def batches(self) -> float:
        """Count the batches of the whole run."""
        return self.dense_batches + self.sparse_batches


def at_rate(curve: Curve, rate: float, dense: StepAt | None = None) -> StepAt:
    """Predict a step at another rate than those measured: linear between two neighbours.

    Below the lowest it is the lowest, which is measured; above the highest it goes on as before, and never falls.

    Args:
        curve: The measured steps, by rising rate, at least one.
        rate: The activation rate in (0, 1].
        dense: The dense step, which joins the curve at rate 1 where the mode becomes the dense step there.

    Returns:
        The step, with seconds >= 0; it has a memory where both neighbours have one.

    Example:
        >>> at_rate((StepAt(0.2, 2.0), StepAt(0.6, 4.0)), 0.4).seconds
        3.0
    """
    points = sorted({p.rate: p for p in [*curve, *([dense] if dense else [])]}.values(), key=lambda p: p.rate)
    if len(points) == 1 or rate <= points[0].rate:
        return StepAt(rate, points[0].seconds, points[0].peak_bytes)
    low, high = next((pair for pair in pairwise(points) if rate <= pair[1].rate), (points[-2], points[-1]))
    position = (rate - low.rate) / (high.rate - low.rate)

    def between(first: float, second: float) -> float:
        return max(second, first + position * (second - first)) if position > 1 else first + position * (second - first)

    known = low.peak_bytes is not None and high.peak_bytes is not None
    peak = round(between(low.peak_bytes or 0, high.peak_bytes or 0)) if known else None
    return StepAt(rate, between(low.seconds, high.seconds), peak)


def with_loading(compute_seconds: float, loading: LoadingFacts) -> float:
    """Add loading to a step: one after the other without workers, at the same time with them.

    Example:
        >>> with_loading(2.0, LoadingFacts(3.0)), with_loading(2.0, LoadingFacts(3.0, workers=2))
        (5.0, 3.0)
    """
    if loading.workers:
        return max(loading.seconds_per_batch, compute_seconds)
    return loading.seconds_per_batch + compute_seconds


def wanted_rates(run: RunFacts) -> tuple[float, ...]:
    """List the rates that are predicted: :data:`RATES`, and the user's own."""
    return tuple(sorted({*RATES, run.own_rate or DEFAULT_RATE}))


def run_lengths(run: RunFacts, mode: Mode | None, rate: float) -> Lengths:
    """Count the batches and epochs of a run.

    Args:
        run: The facts of the dense run.
        mode: The mode; None is dense training.
        rate: The activation rate of the sparse stage, in (0, 1].
    """
    missing = run.batches_per_epoch - run.samples_per_epoch / run.batch_size  # 0 but for a short last batch
    if mode == "prune":
        return _pruned_lengths(run, rate, missing)
    dense = sum(run.schedule.dense_epochs(run.epochs))
    sparse = 0.0 if mode is None else max(0.0, run.epochs - dense)
    dense = run.epochs - sparse
    batches = run.batches_per_epoch
    return Lengths(run.epochs, dense * batches, sparse * batches, sparse, batches, dense * missing, sparse * missing)


def _pruned_lengths(run: RunFacts, rate: float, missing: float) -> Lengths:
    """Count whole epochs, the sparse ones shorter; ``max_steps`` then makes more of them."""
    count = planned_count(
        run.samples_per_epoch, rate, batch_size=run.batch_size, drop_last=run.drop_last, min_selected=run.min_selected
    )
    batches = math.ceil(count / run.batch_size)
    plan = PlannedRun(
        schedule=run.schedule,
        dense=EpochLengths(run.samples_per_epoch, run.batches_per_epoch),
        sparse=EpochLengths(count, batches),
        accumulate=run.accumulate,
        max_epochs=run.max_epochs,
        max_steps=run.max_steps,
    )
    epochs = plan.total_epochs or 0
    sparse = plan.sparse_epochs() or 0
    warmup, _ = plan.sparse_range(epochs)
    dense_batches = (epochs - sparse) * run.batches_per_epoch
    sparse_batches = sparse * batches
    kept = 1.0
    if run.max_steps is not None:  # ends the last epoch early
        most = run.max_steps * run.accumulate[max(run.accumulate)]
        cut = max(0, dense_batches + sparse_batches - most)
        from_dense = min(cut, dense_batches if epochs > sparse else 0)
        kept = 1 - cut / max(1, dense_batches + sparse_batches)
        dense_batches -= from_dense
        sparse_batches -= cut - from_dense
    return Lengths(
        epochs,
        dense_batches,
        sparse_batches,
        sparse,
        batches,
        dense_missing=kept * (epochs - sparse) * missing,
        sparse_missing=kept * sparse * (batches - count / run.batch_size),
        unscored_batches=min(dense_batches, max(0, warmup - 1) * run.batches_per_epoch),
    )


def validations(facts: ValidationFacts, run: RunFacts, lengths: Lengths, training_seconds: float) -> float:
    """Count the validations of a run.

    Args:
        facts: The facts that tell when one is due.
        run: The facts of the dense run.
        lengths: The lengths of this run.
        training_seconds: The time that this run trains.
    """
    if facts.every_seconds is not None:
        return math.floor(training_seconds / facts.every_seconds)
    if facts.every_batches is not None:
        return math.floor(lengths.batches / facts.every_batches)
    every = facts.every_epochs or 1

    def of_epoch(batches: int) -> int:
        interval = facts.every_batches_of_epoch or max(1, int(batches * (facts.share or 1.0)))
        return batches // interval

    dense = lengths.epochs - lengths.sparse_epochs
    often = dense * of_epoch(run.batches_per_epoch) + lengths.sparse_epochs * of_epoch(lengths.sparse_batches_per_epoch)
    return often / every if every == 1 else often / lengths.epochs * math.floor(lengths.epochs / every)


@dataclass(frozen=True)
class Predictions:
    """The predictions that follow from the facts.

    Attributes:
        facts: The measured facts.
    """

    facts: Facts

    @property
    def rate(self) -> float:
        """Return the user's own activation rate, else 0.4."""
        return self.facts.run.own_rate or DEFAULT_RATE

    @cached_property
    def dense(self) -> Prediction:
        """Predict dense training."""
        return self._prediction(None, 1.0)

    @cached_property
    def table(self) -> tuple[Prediction, ...]:
        """Predict every mode that can run, at every rate."""
        modes = [mode for mode in get_args(Mode) if mode not in self.facts.step.refused]
        rates = wanted_rates(self.facts.run)
        return tuple(self._prediction(mode, rate) for mode in modes for rate in rates if self._validated(mode, rate))

    def at(self, mode: str, rate: float) -> Prediction | None:
        """Return the prediction of a mode at a rate of the table; None where the mode, or this rate, is refused."""
        return next((p for p in self.table if (p.mode, p.rate) == (mode, rate)), None)

    def _validated(self, mode: Mode, rate: float) -> bool:
        """Tell whether an epoch reaches its first validation, which ``prune`` insists on."""
        interval = None if self.facts.validation is None else self.facts.validation.every_batches_of_epoch
        if mode != "prune" or interval is None:
            return True
        return run_lengths(self.facts.run, mode, rate).sparse_batches_per_epoch >= interval

    @property
    def compute_seconds(self) -> float:
        """Return the time of a dense step in memory, the optimizer's part shared among accumulated batches."""
        return self._accumulated(self.facts.step.dense.seconds)

    @property
    def _host_seconds(self) -> float:
        """Return the time of a short batch that its missing samples do not save; none where loading sets the pace."""
        hidden = self.facts.loading.workers > 0 and self.facts.loading.seconds_per_batch >= self.compute_seconds
        return 0.0 if hidden else (self.facts.step.host_share or 0.0) * self.compute_seconds

    def _accumulated(self, seconds: float) -> float:
        phases = self.facts.step.phases
        factors = self.facts.run.accumulate
        factor = factors[max(factors)]
        return seconds if phases is None else seconds - min(seconds, phases.rest_seconds) * (1 - 1 / factor)

    def sparse_compute(self, mode: Mode, rate: float) -> float:
        """Return the time of a sparse step on a batch in memory, likewise."""
        return self._accumulated(self._sparse_step(mode, rate).seconds)

    def _sparse_step(self, mode: Mode, rate: float) -> StepAt:
        """Predict a step of a mode on batches in memory."""
        step = self.facts.step
        if mode in step.curves:
            size = self.facts.run.batch_size
            rate = max(rate, minimum_count(size, self.facts.run.min_selected) / size)
            return at_rate(step.curves[mode], rate, step.dense if mode == "partial" else None)
        return StepAt(rate, step.dense.seconds + (step.selection_seconds or 0.0), step.dense.peak_bytes)

    def _memory(self, mode: Mode | None, rate: float, measured: int | None) -> int | None:
        estimate = self.facts.step.memory
        if measured is not None or estimate is None:
            return measured
        return round(estimate.static_bytes + estimate.activation_bytes * (rate if mode == "subset" else 1.0))

    def _prediction(self, mode: Mode | None, rate: float) -> Prediction:
        facts = self.facts
        step = facts.step.dense if mode is None else self._sparse_step(mode, rate)
        dense_seconds = with_loading(self.compute_seconds, facts.loading)
        step_seconds = with_loading(self._accumulated(step.seconds), facts.loading)
        lengths = run_lengths(facts.run, mode, rate)
        starts = lengths.epochs if facts.loading.restarts else 1
        unscored = lengths.unscored_batches if mode == "prune" else lengths.dense_batches
        scored = lengths.batches - unscored
        unscored_missing = lengths.dense_missing * unscored / max(1.0, lengths.dense_batches)
        scored_missing = lengths.dense_missing + lengths.sparse_missing - unscored_missing
        training = (unscored - unscored_missing) * dense_seconds + (scored - scored_missing) * step_seconds
        # a short batch spares its missing samples, but not what a step costs whatever its size
        training += (unscored_missing + scored_missing) * self._host_seconds
        training += starts * facts.loading.start_seconds
        validation = 0.0
        if facts.validation is not None:
            validation = facts.validation.seconds * validations(facts.validation, facts.run, lengths, training)
        return Prediction(
            mode=mode,
            rate=rate,
            step_seconds=step_seconds,
            memory_bytes=self._memory(mode, rate, step.peak_bytes),
            run_seconds=training + validation,
            validation_seconds=validation,
            run_share=1.0 if mode is None else (training + validation) / self.dense.run_seconds,
            batches=math.ceil(lengths.batches - 1e-9),
        )
