"""What is wrong with the arguments of a selection callback on their own: found as text by pure functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any, TypeGuard, get_args

from lightning_ast.core.controller import PIController
from lightning_ast.core.gate import GateName, Weighting
from lightning_ast.core.partial.rows import BatchNormBackward
from lightning_ast.core.significance import SIGNIFICANCE
from lightning_ast.mode_facts import Mode, PruneSteps
from lightning_ast.pruning.streamed import filter_faults
from lightning_ast.selection.settings import SelectionSettings

__all__ = ["rate_faults", "setting_faults"]


def setting_faults(settings: SelectionSettings) -> Iterator[str]:
    """Find what is wrong with the arguments of a ``SparseSelectionCallback`` on their own."""
    yield from _target_faults(settings)
    yield from _one_of("mode", settings.mode, get_args(Mode))
    yield from _one_of("gate", settings.gate, get_args(GateName))
    yield from _significance_faults(settings.significance)
    yield from _weighting_faults(settings)
    yield from _least_faults(settings.min_selected)
    yield from _trim_faults(settings)
    yield from _prune_steps_faults(settings)
    yield from _sample_faults(settings)
    yield from filter_faults(settings.sample_filter, settings.mode, settings.steps_of_pruned_epochs)
    yield from _controller_faults(settings)
    yield from _one_of("batchnorm", settings.batchnorm, get_args(BatchNormBackward))
    for name, kind, expected in (("seed", int, "an int"), ("count_flops", bool, "True or False")):
        if not isinstance(getattr(settings, name), kind):
            yield _fault(name, expected, getattr(settings, name))
    limit = settings.quarantine_limit
    if limit is not None:
        shares = "a share of an epoch's samples in [0, 1] or None"
        yield from _share_faults("quarantine_limit", limit, shares, _is_number(limit) and 0 <= limit <= 1)


def rate_faults(name: str, rate: object, *, kind: str = "rate") -> Iterator[str]:
    """Find what is wrong with an activation rate, or with another share of that range that is called by its kind."""
    return _share_faults(name, rate, f"a {kind} in (0, 1]", _is_number(rate) and 0 < rate <= 1)


def _share_faults(name: str, value: object, expected: str, is_good: bool) -> Iterator[str]:
    """Describe a share that is not as expected, with what was meant where it is a percentage."""
    if not is_good:
        hint = f" Did you mean {value / 100:g}?" if _is_number(value) and 1 < value <= 100 else ""
        yield _fault(name, expected, value, hint)


def _fault(name: str, expected: str, got: object, hint: str = "") -> str:
    return f"{name}: expected {expected}, got {got!r}.{hint}"


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _one_of(name: str, value: object, choices: tuple[Any, ...], *, or_else: str = "") -> Iterator[str]:
    if value not in choices:
        similar = get_close_matches(value, choices, n=1) if isinstance(value, str) else []
        hint = f" Did you mean {similar[0]!r}?" if similar else ""
        yield _fault(name, f"one of {', '.join(map(repr, choices))}{or_else}", value, hint)


def _target_faults(settings: SelectionSettings) -> Iterator[str]:
    rate = settings.target_activation_rate
    coverage = settings.target_coverage
    for name, value, kind in (("target_coverage", coverage, "coverage"), ("target_activation_rate", rate, "rate")):
        if callable(value) and not _takes(value, 2):
            yield f"{name}: a function must take (epoch, metrics), two arguments."
        elif value is not None and not callable(value):
            yield from rate_faults(name, value, kind=kind)
    if rate is not None and coverage is not None:
        yield (
            f"expected target_activation_rate or target_coverage, got both ({rate!r} and {coverage!r}): the share of "
            "the samples is held, or the share of their significance. Leave one of them None."
        )
    if coverage is not None and settings.scheduled_rate is not None:
        yield (
            f"expected one target, got SparseSelectionCallback(target_coverage={coverage!r}) and "
            f"TwoStageScheduler(target_activation_rate={settings.scheduled_rate!r}): give one of them."
        )


def _significance_faults(significance: object) -> Iterator[str]:
    if not callable(significance):
        yield from _one_of("significance", significance, ("gradient", *SIGNIFICANCE), or_else=", or a callable")
    elif not _takes(significance, 4):
        yield "significance: a callable must take (losses, logits, inputs, targets), four arguments."


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Tell whether so many positional arguments may be given, as far as can be told."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except (TypeError, ValueError) as error:
        return isinstance(error, ValueError)  # built in, without a signature
    return True


def _weighting_faults(settings: SelectionSettings) -> Iterator[str]:
    weighting = settings.weighting
    if weighting in ("sqrt", "unbiased") and settings.gate in ("threshold", "topk"):
        yield (
            f"weighting={weighting!r} needs keep-probabilities, which gate={settings.gate!r} does not have: use "
            "gate='soft', or weighting=None."
        )
    elif weighting is not None:
        yield from _one_of("weighting", weighting, get_args(Weighting))


def _least_faults(least: object) -> Iterator[str]:
    if not _is_count(least, 1) and not (isinstance(least, float) and 0 < least < 1):
        hint = f" Did you mean {int(least)}?" if isinstance(least, float) and least >= 1 and least.is_integer() else ""
        yield _fault("min_selected", "an int >= 1 or a share of the batch in (0, 1)", least, hint)


def _trim_faults(settings: SelectionSettings) -> Iterator[str]:
    trim = settings.trim
    rate = settings.target_activation_rate
    is_share = _is_number(trim) and 0 <= trim < 1
    yield from _share_faults("trim", trim, "a share of the samples in [0, 1)", is_share)
    if is_share and trim > 0 and _is_number(rate) and rate < 1 and rate + trim > 1:
        yield f"trim={trim:g} leaves out what target_activation_rate={rate:g} asks for: together they may be 1 at most."


def _prune_steps_faults(settings: SelectionSettings) -> Iterator[str]:
    if (settings.mode, settings.prune_steps) == ("prune", "replan") and settings.has_moving_rate:
        reason = "target_coverage" if settings.target_coverage is not None else "a function for the rate"
        yield (
            f"prune_steps='replan' needs to know the number of steps beforehand, and with {reason} each epoch "
            "has its own: use 'keep' or 'follow', or a fixed target_activation_rate."
        )
    elif settings.prune_steps is not None:
        yield from _one_of("prune_steps", settings.prune_steps, get_args(PruneSteps))


def _sample_faults(settings: SelectionSettings) -> Iterator[str]:
    samples = settings.samples
    if not _is_count(samples.keep_scores, 0):
        yield _fault("keep_scores", "a number of epochs, an int >= 0", samples.keep_scores)
    floor = samples.class_floor
    rate = settings.target_activation_rate
    is_share = _is_number(floor) and 0 <= floor < 1
    yield from _share_faults("class_floor", floor, "a share of each class in [0, 1)", is_share)
    if is_share and _is_number(rate) and floor > rate > 0:
        yield (
            f"class_floor={floor:g} keeps more of each class than target_activation_rate={rate:g} keeps of all "
            "samples: give a smaller floor."
        )
    for name in ("always", "never"):
        if getattr(samples, name) is not None and settings.mode != "prune":
            yield (
                f"{name} names samples by their dataset index, which mode={settings.mode!r} does not know: use "
                "mode='prune'."
            )


def _controller_faults(settings: SelectionSettings) -> Iterator[str]:
    controller: object = settings.controller
    if controller is None:
        return
    if not isinstance(controller, PIController):
        yield _fault("controller", "a PIController or None", controller)
    elif settings.mode == "prune":
        yield (
            "mode='prune' solves its threshold over the whole data set, exactly: a controller would have nothing to "
            "correct, leave controller=None."
        )
