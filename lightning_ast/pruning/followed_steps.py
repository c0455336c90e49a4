"""Schedules that keep the pace of a dense run, where the batches of a pruned epoch stand for several of a dense one."""

from __future__ import annotations

import lightning.pytorch as pl

__all__ = ["advance_schedulers", "following_faults", "steps_due"]


def steps_due(done: int, *, dense: int, pruned: int, accumulate: int) -> int:
    """Count the steps that schedulers take beside Lightning's own, after ``done`` batches of a pruned epoch.

    ``dense`` and ``pruned`` are the batches of the two kinds of epochs.
    """
    if done % accumulate != 0 and done != pruned:  # between optimizer steps no rate may change
        return 0

    def steps(batches: int, in_epoch: int) -> int:
        # the last batch of an epoch ends an optimizer step, wherever accumulation stands
        return batches // accumulate + (batches == in_epoch and in_epoch % accumulate != 0)

    def behind(batches: int) -> int:
        # Lightning advances a scheduler after each optimizer step. It is advanced once more for each step that a dense
        # epoch would have taken up to the same share of its batches: schedules end where they end in a dense run.
        return steps(round(batches * dense / pruned), dense) - steps(batches, pruned)

    before = (done - 1) // accumulate * accumulate  # where the optimizer step before this one ended
    return behind(done) - behind(before)


def advance_schedulers(trainer: pl.Trainer, done: int, *, dense: int, pruned: int, accumulate: int) -> None:
    """Advance the schedulers of a trainer after a batch, by the module's own ``lr_scheduler_step``."""
    due = steps_due(done, dense=dense, pruned=pruned, accumulate=accumulate)
    for config in trainer.lr_scheduler_configs:
        if config.interval == "step" and not config.reduce_on_plateau:
            for _ in range(due):
                # The hook that Lightning calls: modules override it for schedulers that are not torch's.
                trainer.lightning_module.lr_scheduler_step(config.scheduler, None)


def following_faults(trainer: pl.Trainer) -> list[str]:
    """Find schedulers that cannot keep the pace of a dense run."""
    by_step = [config for config in trainer.lr_scheduler_configs if config.interval == "step"]
    if any(config.frequency != 1 and not config.reduce_on_plateau for config in by_step):
        return [
            "prune_steps='follow' advances schedulers with interval='step' after every optimizer step: set their "
            "frequency to 1, or use prune_steps='keep'."
        ]
    return []
