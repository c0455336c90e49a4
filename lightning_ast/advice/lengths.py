"""The lengths of a run in each mode: its batches, its epochs and its validations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_ast.advice.measured import RunFacts, ValidationFacts
from lightning_ast.mode_facts import Mode
from lightning_ast.pruning.loader import LoaderFacts
from lightning_ast.pruning.run_plan import EpochLengths, PlannedRun, pruned_lengths
from lightning_ast.schedule import RunLength

__all__ = ["Lengths", "run_lengths", "validations"]


@dataclass(frozen=True)
class Lengths:
    """The lengths of a run in batches, of which a short one counts as one."""

    epochs: float  # that are begun or, where ``max_steps`` ends the run within one, the fraction
    dense_batches: float  # of warmup and cooldown
    sparse_batches: float
    sparse_epochs: float
    sparse_batches_per_epoch: int
    # dense batches; in ``prune`` those before the last warmup epoch, whose scores the first plan is made of
    unscored_batches: float
    sparse_share: float = 1.0  # samples of a sparse batch over a full one's; < 1 in ``prune`` that keeps its steps

    @property
    def batches(self) -> float:
        """Count the batches of the whole run."""
        return self.dense_batches + self.sparse_batches


def run_lengths(run: RunFacts, mode: Mode | None, rate: float) -> Lengths:
    """Count the batches and epochs of a run at an activation rate in (0, 1]; no mode is dense training."""
    if mode == "prune":
        return _pruned_lengths(run, rate)
    dense = sum(run.schedule.dense_epochs(run.epochs))
    sparse = 0.0 if mode is None else max(0.0, run.epochs - dense)
    dense = run.epochs - sparse
    batches = run.batches_per_epoch
    return Lengths(
        epochs=run.epochs,
        dense_batches=dense * batches,
        sparse_batches=sparse * batches,
        sparse_epochs=sparse,
        sparse_batches_per_epoch=batches,
        unscored_batches=dense * batches,
    )


def _pruned_lengths(run: RunFacts, rate: float) -> Lengths:
    """Count whole epochs, the sparse ones of fewer batches, of which ``max_steps`` makes more, or of smaller ones."""
    samples = run.samples_per_epoch
    loader = LoaderFacts(samples, samples, run.batch_size, run.drop_last, run.batches_per_epoch)
    pruned = pruned_lengths(loader, rate, steps=run.prune_steps, min_selected=run.min_selected, processes=1)
    batches = pruned.batches
    share = pruned.samples / run.batch_size / batches if run.prune_steps == "keep" else 1.0
    plan = PlannedRun(
        schedule=run.schedule,
        dense=EpochLengths(samples, run.batches_per_epoch),
        pruned=pruned,
        dense_run=RunLength(
            max_epochs=run.max_epochs,
            max_steps=run.max_steps,
            batches=run.batches_per_epoch,
            accumulate=run.accumulate,
        ),
        follows=run.prune_steps == "follow",
    )
    epochs = plan.total_epochs or 0
    warmup, cooldown = plan.sparse_range(epochs)
    sparse = cooldown - warmup
    dense_batches = (epochs - sparse) * run.batches_per_epoch
    sparse_batches = sparse * batches
    # ``max_steps`` ends the last epoch early: that is a cooldown epoch, if there is any epoch but sparse ones
    if run.max_steps is not None:
        most = run.max_steps * run.accumulate[max(run.accumulate)]
        cut = max(0, dense_batches + sparse_batches - most)
        from_dense = min(cut, dense_batches if epochs > sparse else 0)
        dense_batches -= from_dense
        sparse_batches -= cut - from_dense
    return Lengths(
        epochs=epochs,
        dense_batches=dense_batches,
        sparse_batches=sparse_batches,
        sparse_epochs=sparse,
        sparse_batches_per_epoch=batches,
        unscored_batches=min(dense_batches, max(0, warmup - 1) * run.batches_per_epoch),
        sparse_share=share,
    )


def validations(facts: ValidationFacts, run: RunFacts, lengths: Lengths, training_seconds: float) -> float:
    """Count the validations of a run of these lengths that trains for so long."""
    if facts.every_seconds is not None:
        return math.floor(training_seconds / facts.every_seconds)
    if facts.every_batches is not None:
        return math.floor(lengths.batches / facts.every_batches)
    every = facts.every_epochs or 1

    # Lightning counts ``val_check_interval`` anew in each epoch: a pruned one, which is shorter, has fewer
    def of_epoch(batches: int) -> int:
        interval = facts.every_batches_of_epoch or max(1, int(batches * (facts.share or 1.0)))
        return batches // interval

    dense = lengths.epochs - lengths.sparse_epochs
    often = dense * of_epoch(run.batches_per_epoch) + lengths.sparse_epochs * of_epoch(lengths.sparse_batches_per_epoch)
    return often / every if every == 1 else often / lengths.epochs * math.floor(lengths.epochs / every)
