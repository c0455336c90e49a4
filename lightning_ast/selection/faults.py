"""Configuration faults: found as text by pure functions, collected, and raised together before the first batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, get_args

import lightning.pytorch as pl
import torch

from lightning_ast.core.controller import PIController
from lightning_ast.core.gate import GateName, Weighting
from lightning_ast.core.partial import BatchNormBackward
from lightning_ast.core.selector import DEFAULT_RATE
from lightning_ast.core.significance import SIGNIFICANCE
from lightning_ast.lightning_internals.run_limits import accumulation
from lightning_ast.mixin import overrides
from lightning_ast.mode_facts import MODE_FACTS, Mode, PruneSteps
from lightning_ast.pruning.streamed import filter_faults
from lightning_ast.selection.sample_faults import sample_faults
from lightning_ast.selection.settings import SelectionSettings, StageSource
from lightning_ast.selection.strategy_faults import strategy_faults
from lightning_ast.selection.value_faults import is_number, percent_hint, rate_faults

__all__ = [
    "configuration_faults",
    "doubtful_settings",
    "not_logged",
    "setting_faults",
    "training_faults",
]


def not_logged(name: str, logged: Iterable[str]) -> str:
    """Describe a metric that is not logged, with the names that are: similar ones first."""
    others = [other for other in logged if not other.startswith(("ast/", "energy/"))]
    similar = get_close_matches(name, others, n=3, cutoff=0.5)
    ordered = [*similar, *sorted(set(others) - set(similar))]
    hint = f" Did you mean {similar[0]!r}?" if similar else ""
    return f"{name!r} is not logged.{hint} Logged are: {', '.join(map(repr, ordered)) or 'no metrics'}."


def doubtful_settings(
    settings: SelectionSettings, schedulers: Sequence[StageSource], module: pl.LightningModule
) -> list[str]:
    """Find settings that have no effect in this set-up, each with what counts in its place."""
    found = []
    mode = settings.mode
    own = settings.target_activation_rate
    if mode != "partial" and settings.batchnorm != "selected":
        found.append(
            f"batchnorm={settings.batchnorm!r} has no effect in mode={mode!r}: it is a setting of mode='partial'."
        )
    for name, value in (
        (f"prune_steps={settings.prune_steps!r}", settings.prune_steps),
        ("sample_filter", settings.sample_filter),
        ("own_parts", settings.samples.own_parts or None),
        ("initial_scores", settings.samples.initial_scores),
        ("keep_scores", settings.samples.keep_scores or None),
    ):
        if mode != "prune" and value is not None:
            found.append(f"{name} has no effect in mode={mode!r}: it is a setting of mode='prune'.")
    controller = settings.controller
    holds = settings.target_coverage is not None and controller is not None and controller.uses_feedforward
    if settings.gate == "topk" and controller is not None and not holds:
        found.append("controller has no effect with gate='topk', which always keeps the target's share of a batch.")
    if settings.significance != "gradient" and overrides(module, "significance"):
        found.append(
            f"significance={settings.significance!r} has no effect: the module's own significance method counts."
        )
    shown = "a function" if callable(own) else f"{own or 0:g}"
    for target in (scheduler.target_activation_rate for scheduler in schedulers):
        if target is not None and own is not None and own not in (target, DEFAULT_RATE):
            found.append(
                f"SparseSelectionCallback(target_activation_rate={shown}) has no effect: the target of the "
                f"TwoStageScheduler counts, {target:g}. Give one of them."
            )
    return found


def _one_of(name: str, value: object, choices: tuple[Any, ...]) -> list[str]:
    if value in choices:
        return []
    similar = get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    hint = f" Did you mean {similar[0]!r}?" if similar else ""
    return [f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}.{hint}"]


def configuration_faults(
    settings: SelectionSettings, trainer: pl.Trainer, module: pl.LightningModule, schedulers: Sequence[StageSource]
) -> list[str]:
    """Find everything that is wrong and can be known before the training data is there."""
    faults = setting_faults(settings) + _use_faults(module) + _follow_faults(settings, trainer, module)
    faults += strategy_faults(trainer)
    if len(schedulers) > 1:
        faults.append(f"expected one TwoStageScheduler, got {len(schedulers)}: keep one.")
    faults += two_target_faults(settings, schedulers)
    for scheduler in schedulers[:1]:
        faults += scheduler.faults(trainer, batches_known=False, whole_epochs=settings.mode == "prune")
    return faults


def two_target_faults(settings: SelectionSettings, schedulers: Sequence[StageSource]) -> list[str]:
    """Find schedules that ask for a rate where the selection callback is given a coverage."""
    coverage = settings.target_coverage
    rates = [s.target_activation_rate for s in schedulers if s.target_activation_rate is not None]
    return [
        f"expected one target, got SparseSelectionCallback(target_coverage={coverage!r}) and "
        f"TwoStageScheduler(target_activation_rate={rate!r}): give one of them."
        for rate in (rates if coverage is not None else [])
    ]


def _follow_faults(settings: SelectionSettings, trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """Find why schedules cannot follow the progress of a dense run."""
    if settings.mode != "prune" or settings.prune_steps != "follow":
        return []
    found = []
    if not module.automatic_optimization:
        found.append(
            "prune_steps='follow' advances learning-rate schedulers, and under manual optimization your training_step "
            "does so itself: use prune_steps='keep', which leaves every schedule right."
        )
    if trainer.max_steps > 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        found.append(
            f"prune_steps='follow' ends a run by its epochs, and max_steps={trainer.max_steps} counts steps: a "
            "pruned epoch has fewer. Set max_epochs alone, or use prune_steps='keep'."
        )
    interval = getattr(trainer, "val_check_interval", None)
    if type(interval) is int and trainer.check_val_every_n_epoch is not None and settings.has_moving_rate:
        found.append(
            f"val_check_interval={interval} may be more than the batches of a pruned epoch, which are not known "
            "beforehand with prune_steps='follow': use a share (a float), or prune_steps='keep'."
        )
    return found


def setting_faults(settings: SelectionSettings) -> list[str]:
    """Find what is wrong with the arguments of a ``SparseSelectionCallback`` on their own."""
    mode = settings.mode
    gate = settings.gate
    weighting = settings.weighting
    found = _target_faults(settings)
    found += _one_of("mode", mode, get_args(Mode))
    found += _one_of("gate", gate, get_args(GateName))
    found += _significance_faults(settings.significance)
    if weighting is not None:
        found += _one_of("weighting", weighting, get_args(Weighting))
        if weighting in ("sqrt", "unbiased") and gate in ("threshold", "topk"):
            found.append(
                f"weighting={weighting!r} needs keep-probabilities, which gate={gate!r} does not have: use "
                "gate='soft', or weighting=None."
            )
    found += _least_faults(settings.min_selected) + _trim_faults(settings) + _prune_steps_faults(settings)
    found += sample_faults(settings) + filter_faults(settings.sample_filter, mode, settings.steps_of_pruned_epochs)
    seed: object = settings.seed
    if not isinstance(seed, int):
        found.append(f"seed: expected an int, got {seed!r}.")
    controller: object = settings.controller
    if controller is not None and not isinstance(controller, PIController):
        found.append(f"controller: expected a PIController or None, got {controller!r}.")
    elif controller is not None and mode == "prune":
        found.append(
            "mode='prune' solves its threshold over the whole data set, exactly: a controller would have nothing to "
            "correct, leave controller=None."
        )
    found += _one_of("batchnorm", settings.batchnorm, get_args(BatchNormBackward))
    count_flops: object = settings.count_flops
    if not isinstance(count_flops, bool):
        found.append(f"count_flops: expected True or False, got {count_flops!r}.")
    limit = settings.quarantine_limit
    if limit is not None and not (is_number(limit) and 0 <= limit <= 1):
        hint = percent_hint(limit)
        found.append(
            f"quarantine_limit: expected a share of an epoch's samples in [0, 1] or None, got {limit!r}.{hint}"
        )
    return found


def _prune_steps_faults(settings: SelectionSettings) -> list[str]:
    if (settings.mode, settings.prune_steps) == ("prune", "replan") and settings.has_moving_rate:
        reason = "target_coverage" if settings.target_coverage is not None else "a function for the rate"
        return [
            f"prune_steps='replan' needs to know the number of steps beforehand, and with {reason} each epoch "
            "has its own: use 'keep' or 'follow', or a fixed target_activation_rate."
        ]
    return [] if settings.prune_steps is None else _one_of("prune_steps", settings.prune_steps, get_args(PruneSteps))


def _least_faults(least: object) -> list[str]:
    whole = isinstance(least, int) and not isinstance(least, bool) and least >= 1
    if whole or (isinstance(least, float) and 0 < least < 1):
        return []
    hint = f" Did you mean {int(least)}?" if isinstance(least, float) and least >= 1 and least.is_integer() else ""
    return [f"min_selected: expected an int >= 1 or a share of the batch in (0, 1), got {least!r}.{hint}"]


def _trim_faults(settings: SelectionSettings) -> list[str]:
    trim: object = settings.trim
    if not (is_number(trim) and 0 <= trim < 1):
        return [f"trim: expected a share of the samples in [0, 1), got {trim!r}.{percent_hint(trim)}"]
    rate = settings.target_activation_rate
    if trim > 0 and is_number(rate) and rate < 1 and rate + trim > 1:
        return [
            f"trim={trim:g} leaves out what target_activation_rate={rate:g} asks for: together they may be 1 at most."
        ]
    return []


def _significance_faults(significance: object) -> list[str]:
    if callable(significance):
        four = _takes(significance, 4)
        return [] if four else ["significance: a callable must take (losses, logits, inputs, targets), four arguments."]
    faults = _one_of("significance", significance, ("gradient", *SIGNIFICANCE))
    return [fault.replace(", got", ", or a callable, got", 1) for fault in faults]


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Tell whether so many positional arguments may be given, as far as can be told."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # built in, without a signature
        return True
    return True


def _target_faults(settings: SelectionSettings) -> list[str]:
    rate = settings.target_activation_rate
    coverage = settings.target_coverage
    found = []
    for name, value, kind in (("target_coverage", coverage, "coverage"), ("target_activation_rate", rate, "rate")):
        if callable(value):
            takes = _takes(value, 2)
            found += [] if takes else [f"{name}: a function must take (epoch, metrics), two arguments."]
        elif value is not None:
            found += rate_faults(name, value, kind=kind)
    if rate is not None and coverage is not None:
        found.append(
            f"expected target_activation_rate or target_coverage, got both ({rate!r} and {coverage!r}): the share of "
            "the samples is held, or the share of their significance. Leave one of them None."
        )
    return found


def _use_faults(module: pl.LightningModule) -> list[str]:
    """Find what is wrong with the module for this mode."""
    found = []
    step: Callable[..., Any] = module.training_step
    names = list(inspect.signature(step).parameters)
    if "dataloader_iter" in names:
        found.append("training_step(dataloader_iter) fetches its own batches: take `batch` and `batch_idx` instead.")
    elif not names:
        found.append("training_step takes no batch: define `training_step(self, batch, batch_idx)`.")
    return found


def training_faults(trainer: pl.Trainer, *, mode: Mode) -> list[str]:
    """Find what is wrong with the optimizers and with how gradients are accumulated; asked when they are there."""
    found: list[str] = []
    searching = any(group.get("line_search_fn") for optimizer in trainer.optimizers for group in optimizer.param_groups)
    if searching and MODE_FACTS[mode].keeps_full_loss:
        found.append(
            f"an optimizer searches along a line, comparing values of the loss; in mode={mode!r} the loss is that of "
            "the whole batch and its gradient that of the selection: set line_search_fn=None, or use mode='subset' or "
            "'prune'."
        )
    if max(accumulation(trainer).values()) == 1:
        return found
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        found.append(
            "LBFGS evaluates a batch several times, and Lightning adds up the gradients of all evaluations when it "
            "accumulates: set accumulate_grad_batches=1."
        )
    return found
