"""``TwoStageScheduler``: which stage a training batch belongs to."""

from __future__ import annotations

import math
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_ast.callbacks._faults import ConfigurationError, is_number, rate_faults, run_length_epochs
from lightning_ast.callbacks._fit_loop import first_callback
from lightning_ast.words import counted

__all__ = ["STAGE_CODES", "Stage", "TwoStageScheduler", "stage_at"]

Stage = Literal["warmup", "sparse", "cooldown"]
STAGE_CODES: dict[Stage, int] = {"warmup": 0, "sparse": 1, "cooldown": 2}


def stage_at(
    epoch: float, total_epochs: float | None, *, warmup_epochs: int | float, cooldown_epochs: int | float
) -> Stage:
    """The stage at a point of the run.

    Args:
        epoch: epochs done so far, with the share of the running one, >= 0.
        total_epochs: length of the run in epochs, or None where it is open-ended.
        warmup_epochs: an int counts epochs, a float in (0, 1) is a share of the run.
        cooldown_epochs: likewise, at the end of the run.

    Returns:
        The stage; warmup wins where the two overlap.

    Example:
        >>> [stage_at(e, 10, warmup_epochs=2, cooldown_epochs=0.1) for e in (1.99, 2.0, 9.0)]
        ['warmup', 'sparse', 'cooldown']
    """
    rounding = 1e-9
    if epoch + rounding < _in_epochs(warmup_epochs, total_epochs):
        return "warmup"
    if total_epochs is not None and cooldown_epochs:
        start = total_epochs - _in_epochs(cooldown_epochs, total_epochs)
        if epoch + rounding >= start:
            return "cooldown"
    return "sparse"


def _in_epochs(length: int | float, total_epochs: float | None) -> float:
    if not isinstance(length, float):
        return length
    return length * (math.inf if total_epochs is None else total_epochs) if length else 0.0


class TwoStageScheduler(Callback):
    """Warmup on all samples, then sparse training, then (optionally) cooldown on all samples again.

    Warmup and cooldown are the plain run: no scoring, no selection, bitwise. The order of the callbacks does not
    matter. Without this callback every step is sparse; without a :class:`SparseSelectionCallback` it is an error.
    The stage follows from the position of each batch in the run, so a run resumed in mid-epoch is in the right one.

    Args:
        warmup_epochs: an int counts epochs, a float in (0, 1) is a share of the run.
        cooldown_epochs: likewise, at the end. An int needs a run of known length, as does any float.
        target_activation_rate: takes the place of the selection callback's target, in (0, 1]; None keeps it.

    Raises:
        ConfigurationError: at setup, together with every other fault: negative lengths, floats outside [0, 1), a run
            without a sparse step, an open-ended run with a cooldown or a share.

    Example:
        >>> TwoStageScheduler(warmup_epochs=10, cooldown_epochs=0.1).cooldown_epochs
        0.1
    """

    def __init__(
        self,
        *,
        warmup_epochs: int | float = 1,
        cooldown_epochs: int | float = 0,
        target_activation_rate: float | None = None,
    ) -> None:
        super().__init__()
        self.warmup_epochs = warmup_epochs
        self.cooldown_epochs = cooldown_epochs
        self.target_activation_rate = target_activation_rate

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse to run alone; all other faults are reported by the selection callback."""
        from lightning_ast.callbacks.sparse_selection import SparseSelectionCallback

        if stage == "fit" and first_callback(trainer, SparseSelectionCallback) is None:
            raise ConfigurationError(["TwoStageScheduler has nothing to switch: add a SparseSelectionCallback."])

    def stage(self, trainer: pl.Trainer, batch_idx: int) -> Stage:
        """The stage of a training batch.

        Args:
            trainer: its progress and limits.
            batch_idx: index of the batch in the running epoch.
        """
        batches = trainer.num_training_batches
        done = trainer.current_epoch + (batch_idx / batches if math.isfinite(batches) and batches else 0.0)
        return self.stage_at(done, run_length_epochs(trainer))

    def stage_at(self, epoch: float, total_epochs: float | None) -> Stage:
        """The stage at a point of the run; see :func:`stage_at`."""
        return stage_at(epoch, total_epochs, warmup_epochs=self.warmup_epochs, cooldown_epochs=self.cooldown_epochs)

    def faults(self, trainer: pl.Trainer, *, batches_known: bool) -> list[str]:
        """Everything wrong with this schedule that can be known.

        Args:
            trainer: limits of the run.
            batches_known: whether the dataloader has been looked at (before the first batch) or not yet (at setup).
        """
        found = []
        for name, length in (("warmup_epochs", self.warmup_epochs), ("cooldown_epochs", self.cooldown_epochs)):
            if not is_number(length) or length < 0 or (isinstance(length, float) and not 0 <= length < 1):
                found.append(f"{name}: expected an int >= 0 or a float in [0, 1), got {length!r}.")
        rate = self.target_activation_rate
        if rate is not None:
            found += rate_faults("TwoStageScheduler(target_activation_rate)", rate)
        return found or self._length_faults(trainer, batches_known)

    def _length_faults(self, trainer: pl.Trainer, batches_known: bool) -> list[str]:
        total = run_length_epochs(trainer)
        needs_length = bool(self.cooldown_epochs) or isinstance(self.warmup_epochs, float)
        shares = [n for n in ("warmup_epochs", "cooldown_epochs") if isinstance(getattr(self, n), float)]
        by_steps = trainer.max_steps > 0
        fault = None
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a smoke test of one batch has no stages to keep
            pass
        elif needs_length and by_steps and not trainer.lightning_module.automatic_optimization:
            fault = (
                "with manual optimization max_steps counts every optimizer's steps, so the end of the run is not known "
                "in epochs: set Trainer(max_epochs=...) instead of max_steps, or use a whole warmup without cooldown."
            )
        elif shares and batches_known and math.isinf(trainer.num_training_batches):
            fault = f"{' and '.join(shares)}: a share of the run needs a dataloader with a length: give whole epochs."
        elif total is None and needs_length and (batches_known or not by_steps):
            fault = (
                "a cooldown or a share of the run needs a run of known length: set Trainer(max_epochs=...), or "
                "max_steps with a dataloader that has a length."
            )
        elif total is not None:
            dense = _in_epochs(self.warmup_epochs, total) + _in_epochs(self.cooldown_epochs, total)
            if dense >= total:
                fault = (
                    f"warmup_epochs={self.warmup_epochs!r} and cooldown_epochs={self.cooldown_epochs!r} leave no "
                    f"sparse step in a run of {counted(total, 'epoch')}: shorten them, or train longer."
                )
        return [] if fault is None else [fault]
