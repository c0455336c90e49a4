"""The run that the user's Trainer, loader and callbacks make: lengths, stages, validations, what cannot be pruned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import CombinedLoader

from lightning_ast.advice.measured import RunFacts, ValidationFacts
from lightning_ast.callbacks.sparse_selection import SparseSelectionCallback
from lightning_ast.callbacks.two_stage import TwoStageScheduler
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.distributed import starts_processes
from lightning_ast.lightning_internals.fit_loop import (
    accumulation,
    epoch_limit,
    first_callback,
    run_length,
    validation_interval_seconds,
)
from lightning_ast.mode_facts import Mode
from lightning_ast.pruning.loader import LoaderFacts, loader_faults
from lightning_ast.pruning.run_plan import length_faults, planned_run
from lightning_ast.schedule import RunLength, Schedule
from lightning_ast.selection.setting_faults import setting_faults
from lightning_ast.selection.settings import SelectionSettings
from lightning_ast.words import counted

__all__ = ["Asked", "due_validations", "prune_fault", "run_facts", "trainer_faults"]

ASSUMED_EPOCHS = 10
ASSUMED_BATCHES = 1000
ASSUMED_DENSE = 0.1


def trainer_faults(trainer: pl.Trainer) -> list[str]:
    """Find why nothing can be measured."""
    settings: Any = trainer
    found = []
    if trainer.world_size > 1:
        found.append(
            f"the Trainer trains with {trainer.world_size} processes, and advise measures one: give it a "
            "Trainer(devices=1, num_nodes=1) with the same settings; its predictions are then for one device."
        )
    elif starts_processes(trainer):
        found.append("the strategy starts processes of its own: give advise a Trainer(devices=1, strategy='auto').")
    if settings.fast_dev_run:
        found.append("fast_dev_run runs a single batch, whose length says nothing: leave it out.")
    if settings.state.status == TrainerStatus.RUNNING:
        found.append("the Trainer is running: call advise before fit.")
    return found


@dataclass(frozen=True)
class Asked:
    """The wishes of the Trainer's own callbacks: of the first selection callback and the first schedule."""

    selection: SparseSelectionCallback  # with the defaults where the Trainer has none
    selects: bool  # whether the Trainer has one
    scheduler: TwoStageScheduler | None

    @classmethod
    def of(cls, trainer: pl.Trainer) -> Asked:
        """Read the wishes of a Trainer's callbacks, which may be faulty: then it raises a ConfigurationError."""
        given = first_callback(trainer, SparseSelectionCallback)
        scheduler = first_callback(trainer, TwoStageScheduler)
        selection = SparseSelectionCallback() if given is None else given
        faults = list(setting_faults(SelectionSettings.of(selection, scheduler)))
        if scheduler is not None:
            faults += scheduler.faults(trainer, batches_known=False)
        if faults:
            raise ConfigurationError(faults)
        return cls(selection, given is not None, scheduler)

    @property
    def rate(self) -> float | None:
        """Return the activation rate that is asked for, or None."""
        if self.scheduler is not None and self.scheduler.target_activation_rate is not None:
            return self.scheduler.target_activation_rate
        own = self.selection.target_activation_rate
        # what a function of the metrics will give is not known beforehand
        return None if callable(own) or not self.selects else own

    @property
    def coverage(self) -> float | None:
        """Return the coverage that is asked for, or None."""
        own = self.selection.target_coverage
        return None if callable(own) else own

    @property
    def schedule(self) -> Schedule:
        """Return the stages; without a scheduler all steps of a selection are sparse, and without both it assumes."""
        if self.scheduler is not None:
            return self.scheduler.schedule
        part = 0 if self.selects else ASSUMED_DENSE
        return Schedule(warmup_epochs=part, cooldown_epochs=part)

    def probe(self, mode: Mode) -> SparseSelectionCallback:
        """Make a callback for this mode with the user's settings."""
        own = self.selection
        return SparseSelectionCallback(
            mode=mode,
            # a hard gate, which its controller moves slowly, becomes one that costs the same and has the rate at once
            gate="soft" if own.gate == "soft" else "topk",
            significance=own.significance,
            weighting=own.weighting,
            min_selected=own.min_selected,
            batchnorm=own.batchnorm,
            # the few batches that are measured may all be bad: that is not to end the measurement
            quarantine_limit=None if own.quarantine_limit is None else 1.0,
            count_flops=own.count_flops,
        )

    def notes(self, trainer: pl.Trainer) -> list[str]:
        """List what a reader must know of the assumptions."""
        found = []
        if self.scheduler is None and not self.selects:
            found.append(f"Assumed: a dense warmup and a dense cooldown of {ASSUMED_DENSE:.0%} of the run each.")
        elif self.scheduler is None:
            found.append("The Trainer has no TwoStageScheduler: every step is sparse.")
        if callable(self.selection.target_coverage) or callable(self.selection.target_activation_rate):
            found.append(
                "The target is a function of the metrics: what it will give is not known, and what is called yours is "
                "at the default rate."
            )
        if first_callback(trainer, Timer) is not None:
            found.append("Trainer(max_time) is left out of account.")
        if first_callback(trainer, EarlyStopping) is not None:
            found.append("EarlyStopping is left out of account: the run is taken to reach its limits.")
        return found


def run_facts(
    trainer: pl.Trainer, combined: CombinedLoader, asked: Asked, *, batch_size: int, limits: pl.Trainer
) -> tuple[RunFacts, list[str]]:
    """Find the lengths of the run, and what had to be assumed."""
    # `trainer` is the twin, whose training starts; what was changed on it is read from the user's (`limits`)
    notes = asked.notes(limits)
    factors = accumulation(limits)
    max_steps = trainer.max_steps if trainer.max_steps > 0 else None
    batches, assumed = _batches_per_epoch(trainer, max_steps, factors)
    notes += assumed
    max_epochs = epoch_limit(limits) or (trainer.max_epochs if (trainer.max_epochs or 0) > 0 else None)
    epochs = run_length(trainer).epochs  # its accumulation is 1
    if max_steps is not None:
        by_steps = max_steps / math.ceil(batches / factors[max(factors)])
        epochs = by_steps if max_epochs is None else min(by_steps, float(max_epochs))
    if epochs is None:
        max_epochs = ASSUMED_EPOCHS
        epochs = float(max_epochs)
        notes.append(f"The run has no end: {ASSUMED_EPOCHS} epochs are assumed.")
    loader = _even_loader(combined)
    samples = batches * batch_size if loader is None else loader.offered
    facts = RunFacts(
        epochs=epochs,
        batches_per_epoch=batches,
        # a data set that is smaller than a batch makes one batch, which was measured
        batch_size=batch_size if loader is None else min(loader.batch_size, samples),
        samples_per_epoch=samples,
        drop_last=loader is not None and loader.drop_last,
        accumulate=factors,
        max_epochs=max_epochs,
        max_steps=max_steps,
        schedule=_without_steps(asked.schedule, epochs, RunLength(batches=batches, accumulate=factors)),
        min_selected=asked.selection.min_selected,
        own_mode=asked.selection.mode if asked.selects else None,
        own_rate=asked.rate,
        own_coverage=asked.coverage,
        prune_steps=SelectionSettings.of(asked.selection).steps_of_pruned_epochs,
    )
    return facts, notes


def _even_loader(combined: CombinedLoader) -> LoaderFacts | None:
    """Return the lengths of a loader of batches of one size; None of others."""
    loader = None if loader_faults(combined, processes=1) else LoaderFacts.of(combined)
    return None if loader is None or loader.batching != "plain" else loader


def _batches_per_epoch(trainer: pl.Trainer, max_steps: int | None, factors: dict[int, int]) -> tuple[int, list[str]]:
    """Count the batches of an epoch; where the loader has no length, some are assumed, and a note tells so."""
    if math.isfinite(trainer.num_training_batches):
        return int(trainer.num_training_batches), []
    batches = ASSUMED_BATCHES if max_steps is None else max_steps * factors[max(factors)]
    return batches, [f"The training loader has no length: an epoch of {counted(batches, 'batch')} is assumed."]


def _without_steps(schedule: Schedule, epochs: float, dense: RunLength) -> Schedule:
    """Turn stages in steps, whose number differs between modes, into shares of the run."""
    warmup, cooldown = schedule.dense_epochs(epochs, dense)
    return Schedule(
        warmup_epochs=warmup / epochs if schedule.warmup_epochs is None else schedule.warmup_epochs,
        cooldown_epochs=cooldown / epochs if schedule.cooldown_epochs is None else schedule.cooldown_epochs,
    )


def prune_fault(
    trainer: pl.Trainer, combined: CombinedLoader, asked: Asked, run: RunFacts, *, rate: float
) -> str | None:
    """Find why this run cannot be pruned at a rate, or None; lower rates may fail where it does not."""
    faults = loader_faults(combined, processes=1)
    if not faults:
        loader = LoaderFacts.of(combined)
        if loader.batching != "plain":
            return (
                "advise needs batches of torch's BatchSampler to predict it, and here the dataset or a batch sampler "
                "of your own makes them. Training with mode='prune' takes both: try it on a few epochs."
            )
        plan = planned_run(
            trainer,
            loader,
            schedule=asked.schedule,
            accumulate=run.accumulate,
            rate=rate,
            min_selected=run.min_selected,
            processes=1,
            steps=run.prune_steps,
        )
        faults = length_faults(plan, trainer, loader)
    return faults[0] if faults else None


def due_validations(trainer: pl.Trainer, *, batches: int, seconds_per_batch: float) -> ValidationFacts:
    """Find when validations are due, by the intervals of the user's Trainer."""
    facts = ValidationFacts(batches, seconds_per_batch)
    every = trainer.check_val_every_n_epoch
    interval = getattr(trainer, "val_check_interval", 1.0)
    if (timed := validation_interval_seconds(trainer)) is not None:
        return replace(facts, every_seconds=timed)
    if every is None:  # Lightning then counts batches over epochs
        return replace(facts, every_batches=int(interval))
    if isinstance(interval, int):  # 1 is every batch, and 1.0 the end of the epoch
        return replace(facts, every_epochs=every, every_batches_of_epoch=interval)
    return replace(facts, every_epochs=every, share=float(interval))
