"""``TwoStageScheduler``: which stage a training batch belongs to."""

from __future__ import annotations

import math
from dataclasses import replace

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ast.callbacks.selection_readings import SelectionReadings
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.fit_loop import first_callback, run_length
from lightning_ast.schedule import Point, Schedule, Stage
from lightning_ast.selection.setting_faults import rate_faults
from lightning_ast.words import counted

__all__ = ["TwoStageScheduler"]


class TwoStageScheduler(Callback):
    """Warmup on all samples, then sparse training, then (optionally) cooldown on all samples again.

    Warmup and cooldown are the plain run, bitwise: nothing is selected, and only ``prune`` scores what is trained on
    anyway. The order of the callbacks does not matter. Without this callback every step is sparse; without a
    :class:`SparseSelectionCallback` it is an error.
    The stage follows from the position of each batch in the run, so a run resumed in mid-epoch is in the right one.

    The run ends with the first of the Trainer's ``max_epochs`` and ``max_steps``. Optimizer steps are those that
    ``trainer.global_step`` counts: under accumulation each has several batches; under manual optimization the steps of
    every optimizer count. A stage begins with an optimizer step. Mode ``prune`` rounds the stages to whole epochs. With
    ``fast_dev_run`` there is no warmup and no cooldown: every batch of the smoke test is a sparse one.

    Args:
        warmup_epochs: A whole number counts epochs, a float in [0, 1) is a share of the run. Without it and
            ``warmup_steps`` the warmup is 1 epoch.
        cooldown_epochs: The same at the end. It needs a run of known length. Without it and ``cooldown_steps`` there is
            no cooldown.
        target_activation_rate: The target in place of the selection callback's, in (0, 1]; None keeps that one.
        warmup_steps: The warmup in optimizer steps, in place of ``warmup_epochs``.
        cooldown_steps: The cooldown in optimizer steps, in place of ``cooldown_epochs``.

    Raises:
        ConfigurationError: At setup or before the first batch, together with every other fault: negative lengths,
            floats outside [0, 1), one stage in epochs and in steps, a run without a sparse step, an open-ended run with
            a cooldown or a share. Where it cannot be known beforehand that no step will be sparse, a warning is given
            once it is certain.

    Example:
        >>> TwoStageScheduler(warmup_steps=500, cooldown_epochs=0.1).cooldown_epochs
        0.1
    """

    def __init__(
        self,
        *,
        warmup_epochs: int | float | None = None,
        cooldown_epochs: int | float | None = None,
        target_activation_rate: float | None = None,
        warmup_steps: int | None = None,
        cooldown_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.warmup_epochs = 1 if warmup_epochs is None and warmup_steps is None else _counted(warmup_epochs)
        self.cooldown_epochs = 0 if cooldown_epochs is None and cooldown_steps is None else _counted(cooldown_epochs)
        self.target_activation_rate = target_activation_rate
        self.warmup_steps = warmup_steps
        self.cooldown_steps = cooldown_steps
        self._warned = False
        self._stage: Stage = "warmup"
        self._epoch: object = None  # the one whose stage that is, and what it depends on

    @property
    def schedule(self) -> Schedule:
        """Return the settings as a :class:`~lightning_ast.schedule.Schedule`."""
        return Schedule(
            warmup_epochs=self.warmup_epochs,
            cooldown_epochs=self.cooldown_epochs,
            warmup_steps=self.warmup_steps,
            cooldown_steps=self.cooldown_steps,
        )

    def schedule_of(self, trainer: pl.Trainer) -> Schedule:
        """Return the schedule that this run keeps: a smoke test has neither warmup nor cooldown."""
        return Schedule() if trainer.fast_dev_run else self.schedule  # type: ignore[attr-defined]

    def stage(self, trainer: pl.Trainer, batch_idx: int) -> Stage:
        """Return the stage of the batch with an index in the running epoch."""
        # Stages of whole epochs are those of an epoch's first batch: reading the limits of the run takes its time.
        has_shares = float in map(type, (self.warmup_epochs, self.cooldown_epochs))
        has_steps = self.warmup_steps or self.cooldown_steps or trainer.max_steps > 0
        epoch = trainer.current_epoch, trainer.max_epochs, self.warmup_epochs, self.cooldown_epochs
        if batch_idx == 0 or epoch != self._epoch or has_shares or has_steps:
            run = run_length(trainer)
            within = 0.0 if run.batches is None else batch_idx / run.batches
            at = Point(trainer.current_epoch + within, trainer.global_step)
            self._stage = self.schedule_of(trainer).stage(at, run)
            self._epoch = epoch
        return self._stage

    def stage_at(self, epoch: float, total_epochs: float | None) -> Stage:
        """Return the stage at a point in epochs; see :meth:`lightning_ast.schedule.Schedule.stage_at`."""
        return self.schedule.stage_at(epoch, total_epochs)

    def faults(self, trainer: pl.Trainer, *, batches_known: bool, whole_epochs: bool = False) -> list[str]:
        """Find what is wrong with this schedule: at setup, and again once the dataloader is known.

        Mode ``prune`` rounds the stages to whole epochs.
        """
        found = self.schedule.setting_faults()
        rate = self.target_activation_rate
        if rate is not None:
            found += rate_faults("TwoStageScheduler(target_activation_rate)", rate)
        if found:
            return found
        return self.schedule_of(trainer).length_faults(
            run_length(trainer), batches_known=batches_known, whole_epochs=whole_epochs
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse to run alone; all other faults are reported by the selection callback."""
        if stage != "fit":
            return
        self._warned = False
        self._epoch = None
        if first_callback(trainer, SelectionReadings) is None:
            raise ConfigurationError("TwoStageScheduler has nothing to switch: add a SparseSelectionCallback.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Inform where the stages differ from the settings."""
        whole_warmup = isinstance(self.warmup_epochs, int) and self.warmup_epochs > 0
        if trainer.fast_dev_run and self.schedule.dense:  # type: ignore[attr-defined]
            rank_zero_info(
                f"lightning-ast: fast_dev_run trains every batch sparsely, without {self.schedule.dense}, to test the "
                "selection."
            )
        elif whole_warmup and run_length(trainer).epochs is None and math.isinf(trainer.num_training_batches):
            rank_zero_info(
                f"lightning-ast: the dataloader has no length, so when warmup_epochs={self.warmup_epochs} ends is not "
                "known: warmup_steps, or a share of max_steps (a float), do not depend on it."
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn as soon as an epoch has shown that the run will not come to its sparse stage."""
        run = run_length(trainer)
        steps = trainer.global_step
        ended = run.max_steps is not None and steps >= run.max_steps
        in_steps = run.max_steps is not None or self.warmup_steps or self.cooldown_steps
        if self._warned or ended or not in_steps or run.steps_at(1) is not None:
            return  # over, or known since before the first batch
        # The first epoch has shown what could not be known before it: how many steps an endless or manual run makes.
        per_epoch = math.ceil(steps / (trainer.current_epoch + 1))
        measured = replace(run, batches=per_epoch or None, accumulate={0: 1})
        if self._stages(trainer) and "sparse" not in self._stages(trainer) and self.schedule.never_sparse(measured):
            self._warn(
                f"an epoch has {counted(per_epoch, 'optimizer step')}, so {self.schedule.dense} will leave no sparse "
                f"step in this run of {measured}"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of a run that ended before its sparse stage."""
        stages = self._stages(trainer)
        if stages and "sparse" not in stages and not self._warned:
            self._warn(f"the run ended after {counted(trainer.global_step, 'optimizer step')} without a sparse one")

    def _warn(self, fact: str) -> None:
        self._warned = True
        rank_zero_warn(
            f"lightning-ast: {fact}: all of it is dense. Shorten the warmup (warmup_steps=...), or train longer."
        )

    def _stages(self, trainer: pl.Trainer) -> set[str]:
        """Return the stages that the run has had, the part before a resumption included."""
        selection = first_callback(trainer, SelectionReadings)
        return set() if selection is None else set(selection.ledger.stages)


def _counted(epochs: int | float | None) -> int | float | None:
    """Return a whole float of 1 or more as an int."""
    # Python holds `int | float` and `float | int` for one type, so that a parser may make 1.0 of the 1 of a file.
    return int(epochs) if isinstance(epochs, float) and epochs >= 1 and epochs.is_integer() else epochs
