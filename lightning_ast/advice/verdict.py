"""The advice on which mode and rate to use, or that sparse training will not help, decided from predictions alone."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ast.advice.measured import StepFacts
from lightning_ast.advice.predict import Prediction, Predictions
from lightning_ast.core.partial.registry import has_rule
from lightning_ast.core.partial.rules.normalization import FEWEST_VALUES, is_batchnorm
from lightning_ast.core.selector import DEFAULT_RATE
from lightning_ast.mode_facts import Mode
from lightning_ast.words import counted, time_words

__all__ = ["LEAST_SAVING", "Verdict", "decide"]

LEAST_SAVING = 0.05
"""Share of the run's seconds below which a saving is not worth a change of method."""
_MUCH = 0.5
_SOME_DENSE = 0.1
_SAME_RATE = 0.005


@dataclass(frozen=True)
class Verdict:
    """The verdict: what to do, and why.

    Attributes:
        mode: The mode to use, or None where none saves at least :data:`LEAST_SAVING` of the run, or where there is
            nothing to skip yet.
        rate: The activation rate that was compared; None where it is not known which one the user's coverage needs.
        coverage: The user's coverage that needs this rate; None where the rate itself is held.
        saving: The share of the run's seconds saved by the mode or, without one, by the best there is; None where all
            are refused.
        baseline_epochs: The epochs of dense training that take the seconds of the best mode: what it must beat.
        reasons: The reasons that hold savings back, and what to know of the mode, a sentence each.
        headline: The verdict in a sentence.
    """

    mode: Mode | None
    rate: float | None
    coverage: float | None
    saving: float | None
    baseline_epochs: float | None
    reasons: tuple[str, ...]
    headline: str


def decide(predictions: Predictions) -> Verdict:
    """Decide at the user's own rate or coverage, else at a rate of 0.4."""
    saves = [p for p in predictions.own if p.mode != "mask"]  # which computes all that a dense step does
    best = min(saves, key=lambda p: p.run_seconds, default=None)
    saving = None if best is None else 1 - best.run_share
    is_worth_it = saving is not None and saving >= LEAST_SAVING and not predictions.has_nothing_to_skip
    mode = best.mode if best is not None and is_worth_it else None
    reasons = [*_held_back(predictions), *_of_modes(predictions, mode), *_refusals(predictions)]
    return Verdict(
        mode=mode,
        rate=predictions.rate,
        coverage=predictions.facts.run.own_coverage,
        saving=saving,
        baseline_epochs=None if best is None else predictions.facts.run.epochs * best.run_share,
        reasons=tuple(reasons),
        headline=_headline(predictions, mode, best),
    )


def _headline(predictions: Predictions, mode: Mode | None, best: Prediction | None) -> str:
    coverage = predictions.facts.run.own_coverage
    if not predictions.modes:
        return "AST cannot run here: every mode is refused."
    if predictions.rate is None:
        return f"The rate that a coverage of {coverage:g} needs is not known: no sample had a finite significance."
    if predictions.has_nothing_to_skip:
        return f"Nothing to skip yet at a coverage of {coverage:g}: it needs {predictions.rate:.0%} of the samples now."
    if best is None:
        return "AST will not help here: no mode that saves anything can run."
    saving = 1 - best.run_share
    if mode is None:
        most = f"the best mode, {best.mode!r} at {best.setting}, would change the run by {-saving:+.0%}"
        return f"AST will not help here: {'no mode makes the run shorter' if abs(saving) < 0.005 else most}."
    target = f"target_activation_rate={best.rate:g}" if coverage is None else f"target_coverage={coverage:g}"
    now = "" if coverage is None else f", at the {best.rate:.0%} of the samples that it needs now"
    return (
        f"Use mode={mode!r}, {target}: it saves {saving:.0%} of the run's seconds "
        f"({time_words(predictions.dense.run_seconds)} to {time_words(best.run_seconds)}){now}."
    )


def _held_back(predictions: Predictions) -> list[str]:
    facts = predictions.facts
    dense = predictions.dense
    found = []
    validation = dense.validation_seconds / dense.run_seconds
    if validation >= _MUCH:
        found.append(
            f"{validation:.0%} of the run is validation: validate less often (check_val_every_n_epoch), or on less "
            "(limit_val_batches)."
        )
    loading = facts.loading.seconds_per_batch
    compute = predictions.compute_seconds
    if loading >= compute:
        faster = "Load faster" if "prune" in facts.step.refused else "Only 'prune' loads less; or load faster"
        found.append(
            f"Loader-bound: a batch takes {time_words(loading)} to load and {time_words(compute)} to train on. "
            f"{faster} (num_workers is {facts.loading.workers})."
        )
    host = facts.step.host_share
    few = facts.step.few_samples
    fresh = _own(predictions, "partial", "subset")
    if host is not None and host >= _MUCH and all(p.compute_seconds > (1 - LEAST_SAVING) * compute for p in fresh):
        found.append(
            f"Host-bound at this batch size: a step on {few} of {counted(facts.run.batch_size, 'sample')} takes "
            f"{host:.0%} of a dense step, so 'partial' and 'subset' have little to save: use larger batches."
        )
    return found


def _own(predictions: Predictions, *modes: Mode) -> list[Prediction]:
    return [p for p in predictions.own if p.mode in modes]


def _of_modes(predictions: Predictions, mode: Mode | None) -> list[str]:
    step = predictions.facts.step
    found = []
    if "partial" not in step.refused and step.compiled:
        found.append("A part of the module is compiled: 'partial' runs its whole backward and gains nothing there.")
    if "partial" not in step.refused:
        found += _dense_backward(step, DEFAULT_RATE if predictions.rate is None else predictions.rate)
    if step.batchnorm_layers and mode in ("partial", "subset"):
        how = "its backward is an approximation" if mode == "partial" else "it sees the selected samples alone"
        found.append(f"{counted(step.batchnorm_layers, 'BatchNorm layer')} in training mode: in {mode!r} {how}.")
    run = predictions.facts.run
    limited = run.max_steps is not None and run.prune_steps == "replan"  # else its steps stand for a dense run's
    if limited and mode != "prune" and any(p.batches >= predictions.dense.batches for p in _own(predictions, "prune")):
        found.append("max_steps fixes the number of steps: 'prune' saves no seconds; set max_epochs.")
    return found


def _dense_backward(step: StepFacts, rate: float) -> list[str]:
    """Describe what ``partial`` spends on every sample at a rate, or at the nearest one that was measured, and why."""
    nearest = step.dense_backward(rate)
    if nearest is None or not nearest.ops or (nearest.share is not None and nearest.share < _SOME_DENSE):
        return []
    is_counted = nearest.share is not None
    cost = f"{nearest.share:.0%} of the backward" if is_counted else "a share of the backward that was not counted"
    where = f"at a rate of {nearest.rate:g}"
    if abs(nearest.rate - rate) > _SAME_RATE:
        where += f" (measured nearest to {rate:.3g})"
    by_batchnorm = any(map(is_batchnorm, nearest.ops))
    # Behind a BatchNorm that runs over all rows, what has a rule meets its gradient: that is no other cause.
    names = sorted(name for name in nearest.ops if not (by_batchnorm and (is_batchnorm(name) or has_rule(name))))
    causes = [f"for want of a rule: {', '.join(names)}"] if names else []
    if by_batchnorm and step.batchnorm == "exact":
        causes.append("as batchnorm='exact' has it: batchnorm='selected' runs BatchNorm over the selected rows")
    elif by_batchnorm:
        causes.append(
            f"for want of values: BatchNorm needs {FEWEST_VALUES} a channel among the selected rows, so use larger "
            "batches or a higher rate"
        )
    return [f"'partial' spends {cost} on every sample {where}, {'; and '.join(causes)}."]


def _refusals(predictions: Predictions) -> list[str]:
    refused = predictions.facts.step.refused
    found = [f"{mode!r} cannot run here: {reason}" for mode, reason in refused.items()]
    if "prune" not in refused and predictions.rate is not None and not _own(predictions, "prune"):
        found.append("'prune' is not measured: 'subset', which tells the time of smaller batches, cannot run here.")
    return found
