"""Configuration faults: found as text by pure functions, collected, and raised together before the first batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy

from lightning_ast.core.selector import DEFAULT_RATE
from lightning_ast.lightning_internals.fit_loop import accumulation
from lightning_ast.mixin import overrides
from lightning_ast.mode_facts import MODE_FACTS, Mode
from lightning_ast.selection.setting_faults import setting_faults
from lightning_ast.selection.settings import SelectionSettings

__all__ = ["configuration_faults", "doubtful_settings", "strategy_faults", "training_faults"]


def doubtful_settings(settings: SelectionSettings, module: pl.LightningModule) -> Iterator[str]:
    """Find settings that have no effect in this set-up, each with what counts in its place."""
    mode = settings.mode
    without_effect = {
        f"batchnorm={settings.batchnorm!r}": ("partial", settings.batchnorm != "selected"),
        f"prune_steps={settings.prune_steps!r}": ("prune", settings.prune_steps is not None),
        "sample_filter": ("prune", settings.sample_filter is not None),
        "own_parts": ("prune", settings.samples.own_parts),
        "initial_scores": ("prune", settings.samples.initial_scores is not None),
        "keep_scores": ("prune", settings.samples.keep_scores > 0),
    }
    for name, (other, is_given) in without_effect.items():
        if is_given and mode != other:
            yield f"{name} has no effect in mode={mode!r}: it is a setting of mode={other!r}."
    controller = settings.controller
    holds = settings.target_coverage is not None and controller is not None and controller.uses_feedforward
    if settings.gate == "topk" and controller is not None and not holds:
        yield "controller has no effect with gate='topk', which always keeps the target's share of a batch."
    if settings.significance != "gradient" and overrides(module, "significance"):
        yield f"significance={settings.significance!r} has no effect: the module's own significance method counts."
    own = settings.target_activation_rate
    target = settings.scheduled_rate
    if target is not None and own not in (None, target, DEFAULT_RATE):
        shown = "a function" if callable(own) else own
        yield (
            f"SparseSelectionCallback(target_activation_rate={shown}) has no effect: the target of the "
            f"TwoStageScheduler counts, {target:g}. Give one of them."
        )


def configuration_faults(settings: SelectionSettings, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[str]:
    """Find everything that is wrong and can be known before the training data is there."""
    yield from setting_faults(settings)
    yield from _step_faults(module)
    yield from _follow_faults(settings, trainer, module)
    yield from strategy_faults(trainer)
    if settings.scheduler is not None:
        yield from settings.scheduler.faults(trainer, batches_known=False, whole_epochs=settings.mode == "prune")


def _follow_faults(settings: SelectionSettings, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[str]:
    """Find why schedules cannot follow the progress of a dense run."""
    if settings.mode != "prune" or settings.prune_steps != "follow":
        return
    if not module.automatic_optimization:
        yield (
            "prune_steps='follow' advances learning-rate schedulers, and under manual optimization your training_step "
            "does so itself: use prune_steps='keep', which leaves every schedule right."
        )
    if trainer.max_steps > 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        yield (
            f"prune_steps='follow' ends a run by its epochs, and max_steps={trainer.max_steps} counts steps: a "
            "pruned epoch has fewer. Set max_epochs alone, or use prune_steps='keep'."
        )
    interval = getattr(trainer, "val_check_interval", None)
    if type(interval) is int and trainer.check_val_every_n_epoch is not None and settings.has_moving_rate:
        yield (
            f"val_check_interval={interval} may be more than the batches of a pruned epoch, which are not known "
            "beforehand with prune_steps='follow': use a share (a float), or prune_steps='keep'."
        )


def _step_faults(module: pl.LightningModule) -> Iterator[str]:
    names = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in names:
        yield "training_step(dataloader_iter) fetches its own batches: take `batch` and `batch_idx` instead."
    if not names:
        yield "training_step takes no batch: define `training_step(self, batch, batch_idx)`."


def strategy_faults(trainer: pl.Trainer) -> Iterator[str]:
    """Find what is wrong with how the trainer spreads a step over its processes."""
    strategy = trainer.strategy
    if isinstance(strategy, ParallelStrategy) and trainer.world_size > 1:
        parts = strategy.distributed_sampler_kwargs["num_replicas"]
        if parts != trainer.world_size:
            yield (
                f"{type(strategy).__name__} splits layers over processes (tensor parallelism): {trainer.world_size} "
                f"processes share {parts} part(s) of the data, and those with the same samples would each select "
                f"others. Set data_parallel_size={trainer.world_size} and tensor_parallel_size=1, and shard the "
                "parameters with fully_shard."
            )
    if isinstance(strategy, DeepSpeedStrategy):
        if strategy.zero_stage_3:
            yield (
                "DeepSpeed's stage 3 gathers the parameters within the forward, by a way that no test here can run: "
                "use stage=1 or 2, or ModelParallelStrategy with fully_shard, which shards the parameters too."
            )
        if max(accumulation(trainer).values()) > 1:
            yield (
                "DeepSpeed accumulates gradients out of sight, so micro-batches that keep different numbers of samples "
                "cannot be weighted alike: set accumulate_grad_batches=1, or use DDP or FSDP2."
            )


def training_faults(trainer: pl.Trainer, *, mode: Mode) -> Iterator[str]:
    """Find what is wrong with the optimizers and with how gradients are accumulated; asked when they are there."""
    searching = any(group.get("line_search_fn") for optimizer in trainer.optimizers for group in optimizer.param_groups)
    if searching and MODE_FACTS[mode].keeps_full_loss:
        yield (
            f"an optimizer searches along a line, comparing values of the loss; in mode={mode!r} the loss is that of "
            "the whole batch and its gradient that of the selection: set line_search_fn=None, or use mode='subset' or "
            "'prune'."
        )
    accumulates = max(accumulation(trainer).values()) > 1
    if accumulates and any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        yield (
            "LBFGS evaluates a batch several times, and Lightning adds up the gradients of all evaluations when it "
            "accumulates: set accumulate_grad_batches=1."
        )
