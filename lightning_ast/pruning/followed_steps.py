"""Schedules that keep the pace of a dense run, where the batches of a pruned epoch stand for several of a dense one."""

from __future__ import annotations

import math

import lightning.pytorch as pl

from lightning_ast.pruning.run_plan import EpochLengths

__all__ = ["FollowedSteps"]


class FollowedSteps:
    """Advances learning-rate schedulers by the dense steps that Lightning does not take in a pruned epoch."""

    def __init__(self, dense: EpochLengths, pruned: EpochLengths, *, accumulate: int, done: int = 0) -> None:
        self._dense = dense.batches
        self._pruned = pruned.batches
        self._accumulate = accumulate
        self._taken: dict[int, int] = {}  # by the frequency of a scheduler
        self._begun_at = done

    def behind(self, done: int, frequency: int) -> int:
        """Count the steps that Lightning is behind a dense run, after a number of batches of this epoch."""
        # Lightning advances a scheduler of interval "step" after each optimizer step. It is advanced once more for each
        # step that a dense epoch would have taken up to the same share of its batches: schedules end where they end in
        # a dense run.
        reached = round(done * self._dense / self._pruned)
        behind = self._steps(reached, self._dense, frequency) - self._steps(done, self._pruned, frequency)
        # With a frequency above 1 Lightning may catch up by itself: no more than what is missing at the epoch's end.
        missing = self._steps(self._dense, self._dense, frequency) - self._steps(self._pruned, self._pruned, frequency)
        return max(0, min(behind, missing))

    def _steps(self, batches: int, in_epoch: int, frequency: int) -> int:
        """Count how often Lightning advances a scheduler in the first batches of an epoch of ``in_epoch``."""
        steps = batches // math.lcm(self._accumulate, frequency)
        # the last batch of an epoch ends an optimizer step, wherever accumulation stands
        return steps + (batches == in_epoch and in_epoch % self._accumulate != 0 and in_epoch % frequency == 0)

    def _ends_step(self, done: int) -> bool:
        """Tell whether an optimizer step follows a batch: between steps no rate may change."""
        return done % self._accumulate == 0 or done == self._pruned

    def due(self, done: int, frequency: int) -> int:
        """Count the steps to take after a batch, ``done`` with it included, which then count as taken."""
        if frequency not in self._taken:
            # Where a run is resumed in mid-epoch, the checkpoint's scheduler has taken these already.
            before = filter(self._ends_step, range(1, self._begun_at + 1))
            self._taken[frequency] = max([0, *(self.behind(number, frequency) for number in before)])
        if not self._ends_step(done):
            return 0
        due = max(0, self.behind(done, frequency) - self._taken[frequency])
        self._taken[frequency] += due
        return due

    def advance(self, trainer: pl.Trainer, done: int) -> None:
        """Advance the schedulers of a trainer after a batch, by the module's own ``lr_scheduler_step``."""
        configs = trainer.lr_scheduler_configs
        by_step = [config for config in configs if config.interval == "step" and not config.reduce_on_plateau]
        # schedulers of one frequency are due together
        due = {frequency: self.due(done, frequency) for frequency in {config.frequency for config in by_step}}
        for config in by_step:
            for _ in range(due[config.frequency]):
                # The hook that Lightning calls: modules override it for schedulers that are not torch's.
                trainer.lightning_module.lr_scheduler_step(config.scheduler, None)
